"""Predictor: encode an image once, then ask it as many sentences as you like.

The masks come back at the image's own size, through the same preprocessing the model was trained with.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
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
from tmca.data.preprocessing import prepare_image, restore
from tmca.devices import Precision, by_threads, resolve_device, uses_bfloat16
from tmca.errors import ConfigError, OutOfMemoryError
from tmca.imaging.frames import Geometry
from tmca.imaging.given import ImageSource, frames_of
from tmca.metrics import check_threshold
from tmca.mirrored import MirrorAveraged
from tmca.models import SegmentationModel
from tmca.models.preparation import prepare_for_prediction
from tmca.models.tokenizer import SentenceTokenizer
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

BATCH_SIZE = 8
DEFAULTS = PredictionOptions()


@dataclass(frozen=True)
class _Member:
    """One of the models that a predictor averages."""

    network: SegmentationModel
    preprocessing: PreprocessingConfig
    calibration: Calibration = field(default_factory=Calibration)

    @property
    def own_tokenizer(self) -> SentenceTokenizer | None:
        """The tokenizer whose vocabulary is all words of the training sentences, if it is of that kind."""
        encoder, experiment = self.network.text_encoder, self.network.experiment
        if encoder is None or experiment is None:
            return None
        config = experiment.model.text_encoder
        whole = config.learns_vocabulary and encoder.tokenizer.vocabulary_size < config.vocabulary_size
        return encoder.tokenizer if whole else None


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image as the models of a predictor see it; any number of sentences can be asked of it.

    Attributes:
        features: Of each model.
        geometry: How the image lies in its file and in millimetres.
        seconds: Stage → duration.
    """

    features: tuple[ImageFeatures, ...] = field(repr=False)
    geometry: Geometry
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return sum(features.nbytes for features in self.features)


@dataclass(frozen=True, eq=False)
class Question:
    """What one sentence asks of one encoded image.

    Attributes:
        image: From :meth:`Predictor.encode`.
        text: The sentence; ``None`` or blank segments by the image alone.
        options: How probabilities become an answer.
    """

    image: EncodedImage
    text: str | None = None
    options: PredictionOptions = DEFAULTS


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
        self._image: EncodedImage | None = None

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
                ``scan.nii.gz#12``), one of its frames, an image of Pillow, or an upright array: ``(height, width)``
                grey, ``(height, width, 3)`` RGB or ``(height, width, 4)`` RGBA. uint8 is taken as it is; other types
                are scaled from their own minimum and maximum.

        Raises:
            DataError: The file cannot be read, or the array is no image.
            OutOfMemoryError: The image does not fit the device's memory.
        """
        self._image = None  # whatever happens, nobody is told of the image before
        (self._image,) = self.encode([image])

    def encode(self, images: Sequence[ImageSource]) -> list[EncodedImage]:
        """Encode images together, each as :meth:`set_image` takes it, for :meth:`answer`; what was set remains.

        Raises:
            DataError: A file cannot be read, or an array is no image.
            OutOfMemoryError: The images do not fit the device's memory.
        """
        if not images:
            return []
        started = time.perf_counter()
        frames = frames_of(images)
        read = time.perf_counter()
        with self._computing():
            encoded = self._encode([frame.pixels for frame in frames])
            features = zip(*(batch.split(len(frames)) for batch in encoded), strict=True)
        count = max(1, len(frames))
        seconds = {"read": (read - started) / count, "encode": (time.perf_counter() - read) / count}
        return [EncodedImage(one, frame.geometry, seconds) for one, frame in zip(features, frames, strict=True)]

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
        image = self._current()
        return self.answer([Question(image, text, options) for text in texts])

    def answer(self, questions: Sequence[Question]) -> list[Prediction]:
        """Return what :meth:`ask` returns for sentences about any images; all that is needed is decoded together.

        Raises:
            OutOfMemoryError: It does not fit the device's memory.
        """
        _check_texts([question.text for question in questions])
        guided = [bool(question.text and question.text.strip()) and self.reads_text for question in questions]
        others = [
            wrong_sentences(question.text, question.options.effects) if question.text and is_guided else {}
            for question, is_guided in zip(questions, guided, strict=True)
        ]
        started = time.perf_counter()
        pairs = [(question.image, question.text) for question in questions]
        for question, found in zip(questions, others, strict=True):
            pairs += [(question.image, other) for other in found.values()]
        maps = self._maps(pairs, BATCH_SIZE)
        seconds = (time.perf_counter() - started) / max(1, len(questions))
        predictions = []
        for question, is_guided, wrong in zip(questions, guided, others, strict=True):
            image, text, options = question.image, question.text, question.options
            probability = maps[image, text]
            mask = make_mask(probability, options)
            differences = {
                name: difference(mask, make_mask(maps[image, other], options)) for name, other in wrong.items()
            }
            tokens, truncated = self.count_tokens(text)
            predictions.append(
                Prediction(
                    mask=mask,
                    probability=probability,
                    text=text,
                    setting="guided" if is_guided else "no text",
                    threshold=options.threshold,
                    regions=find_regions(mask, probability, image.geometry),
                    geometry=image.geometry,
                    tokens=tokens,
                    truncated=truncated,
                    unknown_words=self.unknown_words(text),
                    effects={name: differences.get(name) for name in options.effects} if is_guided else {},
                    conflicts=find_conflicts(text, mask) if is_guided else (),
                    expected_dice=self._expected_dice(probability, mask, options),
                    seconds=image.seconds | {"segment": seconds},
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
        image = self._current()
        _check_texts(texts)
        _check_batch_size(batch_size)
        maps = self._maps([(image, text) for text in texts], batch_size)
        return [maps[image, text] for text in texts]

    def attention(self, image: EncodedImage, text: str | None) -> Probability | None:
        """Return where in an image a sentence points, by the attention that amplifies its target (LTEM).

        Of several models the first is asked.

        Returns:
            float32 ``(height, width)``, mean 1 before it is resized; ``None`` of a method without that attention, and
            without a sentence.

        Raises:
            OutOfMemoryError: It does not fit the device's memory.
        """
        network = self._members[0].network
        with self._computing():
            features = network.encode_text([text])
            attention = None if features is None else network.target_attention(image.features[0], features)
            return None if attention is None else restore(attention[0, 0].float(), *image.geometry.size)

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
        _check_batch_size(batch_size)
        remaining = iter(pairs)
        while batch := list(islice(remaining, batch_size)):
            _check_texts([text for _, text in batch])
            arrays = [frame.pixels for frame in frames_of([image for image, _ in batch])]
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

    def unknown_words(self, text: str | None) -> tuple[str, ...]:
        """Return the words of a sentence that are not in the model's vocabulary, and are spelled, in lower case.

        Empty unless the vocabulary was learned from the training sentences and holds all of their words. Of several
        models the words that any of them does not know.
        """
        tokenizers = [member.own_tokenizer for member in self._members]
        broken = [tokenizer.broken_words(text) for tokenizer in tokenizers if tokenizer is not None and text]
        return tuple(dict.fromkeys(word for words in broken for word in words))

    def _expected_dice(self, probability: Probability, mask: Mask, options: PredictionOptions) -> float | None:
        """Return the mean of the models' estimates; they were fitted for masks of something at the threshold 0.5."""
        if not self.calibrated or options.threshold != DEFAULTS.threshold or options.min_region > 1 or not mask.any():
            return None
        return float(np.mean([member.calibration.expected_dice(probability, mask) for member in self._members]))

    def _current(self) -> EncodedImage:
        if self._image is None:
            raise ConfigError("There is no image to segment yet", hint="call set_image first")
        return self._image

    def _maps(
        self, pairs: Iterable[tuple[EncodedImage, str | None]], batch_size: int
    ) -> dict[tuple[EncodedImage, str | None], Probability]:
        """Return the probability map of each different image and sentence, several decoded at a time."""
        remaining = iter(dict.fromkeys(pairs))
        maps: dict[tuple[EncodedImage, str | None], Probability] = {}
        while batch := list(islice(remaining, batch_size)):
            images, texts = [image for image, _ in batch], [text for _, text in batch]
            with self._computing():
                if all(image is images[0] for image in images):
                    features = [one.repeat(len(images)) for one in images[0].features]
                else:
                    features = [ImageFeatures.join(parts) for parts in zip(*(i.features for i in images), strict=True)]
                found = self._decode(features, texts, [image.geometry.size for image in images])
            maps.update(zip(batch, found, strict=True))
        return maps

    def _encode(self, arrays: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> list[ImageFeatures]:
        features = []
        for member in self._members:
            prepared = torch.stack(by_threads(partial(prepare_image, config=member.preprocessing), arrays))
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


def _check_texts(texts: Sequence[object]) -> None:
    for text in texts:
        if not (text is None or isinstance(text, str)):
            raise ConfigError(
                f"The sentence is {type(text).__name__}, expected text or None", hint="ask one sentence at a time"
            )


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"The batch size is {batch_size}, expected at least 1", hint=f"leave it out for {BATCH_SIZE}")
