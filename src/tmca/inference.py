"""Predictor: encode an image once, then ask it as many sentences as you like.

The masks come back at the image's own size, through the same preprocessing the model was trained with.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray

from tmca.calibration import Calibration, read_calibration
from tmca.checkpoints import MODEL_FILE, file_hashes, load_checkpoint, resolve_checkpoint
from tmca.config import PreprocessingConfig
from tmca.data.preprocessing import ImageArray, prepare_image, restore
from tmca.devices import Precision, resolve_device, uses_bfloat16
from tmca.errors import ConfigError, OutOfMemoryError
from tmca.imaging.frames import Frame, Geometry
from tmca.imaging.raster import rgb_from_array
from tmca.imaging.reading import read_frames
from tmca.metrics import check_threshold
from tmca.mirrored import MirrorAveraged
from tmca.models import SegmentationModel
from tmca.models.preparation import prepare_for_prediction
from tmca.prediction import (
    Prediction,
    PredictionOptions,
    difference,
    find_conflicts,
    find_regions,
    make_mask,
    wrong_sentences,
)
from tmca.types import ImageFeatures

Mask = NDArray[np.bool_]
Probability = NDArray[np.float32]
ImageSource = str | Path | NDArray[np.generic] | Frame

BATCH_SIZE = 8
DEFAULTS = PredictionOptions()


@dataclass(frozen=True)
class _Member:
    """One of the models that a predictor averages."""

    network: SegmentationModel
    preprocessing: PreprocessingConfig
    calibration: Calibration = field(default_factory=Calibration)


class Predictor:
    """A trained model, or several, that answer sentences about an image with masks.

    Args:
        models: One with its ``experiment`` set, which tells the preprocessing; of several the probabilities are
            averaged.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        precision: ``32``; ``bf16``; or ``auto``: bfloat16 where the device computes it natively and the method is known
            to keep its masks.
        mirrored: Average over each image and its mirror image, too; see :mod:`tmca.mirrored`.

    Attributes:
        model: The first model, in float32 and evaluation mode.
        names: Where the models come from: folders or ids; empty where they came as objects.
        precision: ``float32`` or ``bfloat16``, what masks are computed in.
        calibrated: Whether probabilities mean what they say: every model has been calibrated (``tmca calibrate``).

    Example:
        >>> predictor = Predictor.from_pretrained("runs/kvasir-mobile")  # doctest: +SKIP
        >>> predictor.set_image("colon.jpg")  # doctest: +SKIP
        >>> mask = predictor.predict("one small polyp, located in top left of the image")  # doctest: +SKIP
    """

    def __init__(
        self,
        models: SegmentationModel | Sequence[SegmentationModel],
        device: str = "auto",
        precision: Precision = "auto",
        *,
        mirrored: bool = False,
    ) -> None:
        chosen = [models] if isinstance(models, SegmentationModel) else list(models)
        if not chosen:
            raise ConfigError("There is no model to predict with", hint="name at least one")
        self.device = resolve_device(device)
        exact = all(model.exact_parts is not None for model in chosen)
        half = uses_bfloat16(precision, self.device) and (precision == "bf16" or exact)
        self.precision = "bfloat16" if half else "float32"
        self.mirrored = mirrored
        self.names: tuple[str, ...] = ()
        self.calibrated = False
        experiments = [model.experiment for model in chosen if model.experiment is not None]
        if len(experiments) < len(chosen):
            raise ConfigError("This model does not know its preprocessing", hint="load it with from_pretrained")
        self._members = []
        for model, experiment in zip(chosen, experiments, strict=True):
            network = prepare_for_prediction(model.to(self.device).eval(), self.device, half=half)
            network = MirrorAveraged(network) if mirrored else network
            self._members.append(_Member(network, experiment.preprocessing))
        self._models = chosen
        self.model = chosen[0]
        self.experiment = experiments[0]
        self._features: list[ImageFeatures] = []
        self._geometry = Geometry((0, 0))
        self._encoding_seconds: dict[str, float] = {}

    @classmethod
    def from_pretrained(
        cls,
        names: str | Path | Sequence[str | Path],
        device: str = "auto",
        precision: Precision = "auto",
        *,
        mirrored: bool = False,
    ) -> Predictor:
        """Load a run folder (its best checkpoint), a checkpoint folder or a hub id; or several, to average them.

        Raises:
            CheckpointError: The folder holds no usable checkpoint.
            WeightsError: A hub id that is neither on disk nor reachable.
            ConfigError: The device is unknown or not there.
        """
        listed = [names] if isinstance(names, str | Path) else list(names)
        predictor = cls([load_checkpoint(name) for name in listed], device, precision, mirrored=mirrored)
        predictor.names = tuple(str(name) for name in listed)
        predictor._hashes = [file_hashes(resolve_checkpoint(name)) for name in listed]
        found = [read_calibration(resolve_checkpoint(name)) for name in listed]
        predictor.calibrated = all(calibration is not None for calibration in found)
        predictor._members = [
            replace(member, calibration=calibration or Calibration())
            for member, calibration in zip(predictor._members, found, strict=True)
        ]
        return predictor

    @cached_property
    def _hashes(self) -> list[dict[str, str]]:
        """The SHA-256 of each model's files when it was loaded; of a model that came as an object, of its weights."""
        return [{MODEL_FILE: _state_hash(model)} for model in self._models]

    @property
    def reads_text(self) -> bool:
        """Whether sentences can change the masks."""
        return any(member.network.reads_text for member in self._members)

    def provenance(self) -> dict[str, Any]:
        """Return what the masks come from, for a report: models with the hashes of their files, device, precision."""
        return {
            "models": [
                {"id": name, "sha256": hashes, "temperature": member.calibration.temperature}
                for name, hashes, member in zip(
                    self.names or ("in memory",) * len(self._members), self._hashes, self._members, strict=True
                )
            ],
            "preset": self.experiment.name,
            "reads_text": self.reads_text,
            "mirrored": self.mirrored,
            "calibrated": self.calibrated,
            "device": str(self.device),
            "precision": self.precision,
        }

    def set_image(self, image: ImageSource) -> None:
        """Encode an image; later calls refer to it.

        Args:
            image: A file of any kind that :mod:`tmca.imaging.reading` knows (one image of a volume by its number:
                ``scan.nii.gz#12``), one of its frames, or an upright array: ``(height, width)`` grey,
                ``(height, width, 3)`` RGB or ``(height, width, 4)`` RGBA. uint8 is taken as it is; other types are
                scaled from their own minimum and maximum.

        Raises:
            DataError: The file cannot be read, or the array is no image.
            OutOfMemoryError: The image does not fit the device's memory.
        """
        self._features = []  # whatever happens, nobody is told of the image before
        started = time.perf_counter()
        frame = _frame(image)
        read = time.perf_counter()
        with self._computing():
            self._features = self._encode([frame.pixels])
        self._geometry = frame.geometry
        self._encoding_seconds = {"read": read - started, "encode": time.perf_counter() - read}

    def ask(self, text: str | None = None, options: PredictionOptions = DEFAULTS) -> Prediction:
        """Return everything that can be said of what a sentence names: mask, sureness, regions, whether it mattered.

        Args:
            text: The sentence; ``None`` or blank segments by the image alone, which is another setting: do not
                compare its scores with guided ones.
            options: Threshold, smallest region, and the wrong sentences whose masks are compared.

        Raises:
            ConfigError: No image was set.
            OutOfMemoryError: It does not fit the device's memory.
        """
        return self.ask_all([text], options)[0]

    def ask_all(self, texts: Sequence[str | None], options: PredictionOptions = DEFAULTS) -> list[Prediction]:
        """Return what :meth:`ask` returns for each of several sentences; all that is needed is decoded together."""
        guided = [bool(text and text.strip()) and self.reads_text for text in texts]
        others = [
            wrong_sentences(text, options.effects) if text and is_guided else {}
            for text, is_guided in zip(texts, guided, strict=True)
        ]
        started = time.perf_counter()
        unique = list(dict.fromkeys([*texts, *(other for found in others for other in found.values())]))
        maps = dict(zip(unique, self.probabilities(unique), strict=True))
        masks = {text: make_mask(probability, options) for text, probability in maps.items()}
        seconds = self._encoding_seconds | {"segment": (time.perf_counter() - started) / max(1, len(texts))}
        predictions = []
        for text, is_guided, wrong in zip(texts, guided, others, strict=True):
            mask, probability = masks[text], maps[text]
            tokens, truncated = self.count_tokens(text)
            differences = {name: difference(mask, masks[other]) for name, other in wrong.items()}
            predictions.append(
                Prediction(
                    mask=mask,
                    probability=probability,
                    text=text,
                    setting="guided" if is_guided else "no text",
                    threshold=options.threshold,
                    regions=find_regions(mask, probability, self._geometry),
                    geometry=self._geometry,
                    tokens=tokens,
                    truncated=truncated,
                    effects={name: differences.get(name) for name in options.effects} if is_guided else {},
                    conflicts=find_conflicts(text, mask) if is_guided else (),
                    expected_dice=self._expected_dice(probability, mask, options),
                    seconds=seconds,
                )
            )
        return predictions

    def predict(self, text: str | None = None, *, threshold: float = 0.5) -> Mask:
        """Return the mask of what a sentence names, at the size of the image.

        Args:
            text: The sentence; ``None`` or blank segments by the image alone, which is another setting: do not
                compare its scores with guided ones.
            threshold: Probability above which a pixel belongs to the mask, in (0, 1).

        Returns:
            bool ``(height, width)``.

        Raises:
            ConfigError: No image was set, or the threshold lies outside (0, 1).
            OutOfMemoryError: It does not fit the device's memory.
        """
        check_threshold(threshold)
        return self.probability(text) > threshold

    def probability(self, text: str | None = None) -> Probability:
        """Return the probability of each pixel to belong to what a sentence names, at the size of the image.

        Returns:
            float32 ``(height, width)`` in [0, 1].

        Raises:
            ConfigError: No image was set.
            OutOfMemoryError: It does not fit the device's memory.
        """
        return self.probabilities([text])[0]

    def probabilities(self, texts: Sequence[str | None], batch_size: int = BATCH_SIZE) -> list[Probability]:
        """Return what :meth:`probability` returns for each of several sentences, decoded together.

        Args:
            texts: Sentences about the image that was set.
            batch_size: Sentences decoded at a time.

        Raises:
            ConfigError: No image was set.
            OutOfMemoryError: It does not fit the device's memory.
        """
        if not self._features:
            raise ConfigError("There is no image to segment yet", hint="call set_image first")
        found: list[Probability] = []
        for start in range(0, len(texts), batch_size):
            chosen = texts[start : start + batch_size]
            with self._computing():
                features = [one.repeat(len(chosen)) for one in self._features]
                found += self._decode(features, chosen, [self._geometry.size] * len(chosen))
        return found

    def segment(
        self, pairs: Iterable[tuple[ImageSource, str | None]], batch_size: int = BATCH_SIZE
    ) -> Iterator[Probability]:
        """Yield the probability map of each image and its sentence, several at a time; the image that is set remains.

        Args:
            pairs: Images, as :meth:`set_image` takes them, each with its sentence or ``None``.
            batch_size: Images computed at a time. Only so many are held in memory.

        Raises:
            DataError: A file cannot be read, or an array is no image.
            OutOfMemoryError: The batch does not fit the device's memory.
        """
        remaining = iter(pairs)
        while batch := list(islice(remaining, batch_size)):
            arrays = [_frame(image).pixels for image, _ in batch]
            sizes = [(array.shape[0], array.shape[1]) for array in arrays]
            with self._computing():
                found = self._decode(self._encode(arrays), [text for _, text in batch], sizes)
            yield from found

    def count_tokens(self, text: str | None) -> tuple[int, bool]:
        """Return how many tokens a sentence has, and whether it is cut to the limit; of several models the worst."""
        encoders = [member.network.text_encoder for member in self._members]
        tokens = [encoder.tokenizer([text]) for encoder in encoders if encoder is not None]
        counts = [(found.truncated[0], found.token_counts[0]) for found in tokens]
        truncated, count = max(counts, default=(False, 0))
        return count, truncated

    def _expected_dice(self, probability: Probability, mask: Mask, options: PredictionOptions) -> float | None:
        """Return the mean of the models' estimates; they were fitted for masks of something at the threshold 0.5."""
        if not self.calibrated or options.threshold != DEFAULTS.threshold or options.min_region > 1 or not mask.any():
            return None
        return float(np.mean([member.calibration.expected_dice(probability, mask) for member in self._members]))

    def _encode(self, arrays: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> list[ImageFeatures]:
        features = []
        for member in self._members:
            prepared = torch.stack([prepare_image(array, member.preprocessing) for array in arrays])
            images = prepared.to(self.device, memory_format=torch.channels_last)
            features.append(member.network.encode_image(images))
        return features

    def _decode(
        self, features: Sequence[ImageFeatures], texts: Sequence[str | None], sizes: Sequence[tuple[int, int]]
    ) -> list[Probability]:
        found = []
        for member, encoded in zip(self._members, features, strict=True):
            logits = member.network.segment(encoded, member.network.encode_text(texts)).mask_logits
            maps = (logits[:, 0].float() / member.calibration.temperature).sigmoid()
            found.append([restore(probability, *size) for probability, size in zip(maps, sizes, strict=True)])
        if len(found) == 1:
            return found[0]
        return [np.mean(maps, axis=0, dtype=np.float32) for maps in zip(*found, strict=True)]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        half = self.precision == "bfloat16"
        try:
            with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                yield
        except torch.cuda.OutOfMemoryError as error:
            hint = "lower the batch size, or use --device cpu"
            raise OutOfMemoryError("The device ran out of memory", hint=hint) from error


def _state_hash(model: SegmentationModel) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _frame(image: ImageSource) -> Frame:
    if isinstance(image, Frame):
        return image
    if isinstance(image, np.ndarray):
        pixels: ImageArray = rgb_from_array(image)
        return Frame(pixels, Geometry((pixels.shape[0], pixels.shape[1])))
    return next(iter(read_frames(image).only(None)))
