"""Predictor: encode an image once, then ask it as many sentences as you like.

The masks come back at the image's own size, through the same preprocessing the model was trained with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray

from tmca.checkpoints import load_checkpoint
from tmca.data.preprocessing import ImageArray, prepare_image, restore
from tmca.devices import Precision, resolve_device, uses_bfloat16
from tmca.errors import ConfigError, OutOfMemoryError
from tmca.imaging.raster import rgb_from_array
from tmca.imaging.reading import read_image
from tmca.metrics import check_threshold
from tmca.models import SegmentationModel
from tmca.models.prediction import prepare_for_prediction
from tmca.types import ImageFeatures

Mask = NDArray[np.bool_]
Probability = NDArray[np.float32]
ImageSource = str | Path | NDArray[np.generic]

BATCH_SIZE = 8


class Predictor:
    """A trained model that answers sentences about an image with masks.

    Args:
        model: With its ``experiment`` set, which tells the preprocessing.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        precision: ``32``; ``bf16``; or ``auto``: bfloat16 where the device computes it natively and the method is known
            to keep its masks.

    Attributes:
        model: The model, in float32 and evaluation mode.
        precision: ``float32`` or ``bfloat16``, what masks are computed in.

    Example:
        >>> predictor = Predictor.from_pretrained("runs/kvasir-mobile")  # doctest: +SKIP
        >>> predictor.set_image("colon.jpg")  # doctest: +SKIP
        >>> mask = predictor.predict("one small polyp, located in top left of the image")  # doctest: +SKIP
    """

    def __init__(self, model: SegmentationModel, device: str = "auto", precision: Precision = "auto") -> None:
        if model.experiment is None:
            raise ConfigError("This model does not know its preprocessing", hint="load it with from_pretrained")
        self.device = resolve_device(device)
        self.experiment = model.experiment
        half = uses_bfloat16(precision, self.device) and (precision == "bf16" or model.exact_parts is not None)
        self.precision = "bfloat16" if half else "float32"
        self.model = model.to(self.device).eval()
        self._network = prepare_for_prediction(self.model, self.device, half=half)
        self._features: ImageFeatures | None = None
        self._size = (0, 0)

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str = "auto", precision: Precision = "auto") -> Predictor:
        """Load a run folder (its best checkpoint), a checkpoint folder or a hub id.

        Raises:
            CheckpointError: The folder holds no usable checkpoint.
            WeightsError: A hub id that is neither on disk nor reachable.
            ConfigError: The device is unknown or not there.
        """
        return cls(load_checkpoint(name), device, precision)

    def set_image(self, image: ImageSource) -> None:
        """Encode an image; later calls of :meth:`predict` refer to it.

        Args:
            image: A file of any kind that :mod:`tmca.imaging.reading` knows, or an upright array: ``(height, width)``
                grey, ``(height, width, 3)`` RGB or ``(height, width, 4)`` RGBA. uint8 is taken as it is; other types
                are scaled from their own minimum and maximum.

        Raises:
            DataError: The file cannot be read, or the array is no image.
            OutOfMemoryError: The image does not fit the device's memory.
        """
        array = _upright(image)
        with self._computing():
            self._features = self._encode([array])
        self._size = (array.shape[0], array.shape[1])

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
        if self._features is None:
            raise ConfigError("There is no image to segment yet", hint="call set_image first")
        found: list[Probability] = []
        for start in range(0, len(texts), batch_size):
            chosen = texts[start : start + batch_size]
            with self._computing():
                found += self._decode(self._features.repeat(len(chosen)), chosen, [self._size] * len(chosen))
        return found

    def logits(self, text: str | None = None) -> Probability:
        """Return what :meth:`probability` is computed from: the logits at the size the network sees.

        Returns:
            float32 ``(size, size)``.

        Raises:
            ConfigError: No image was set.
            OutOfMemoryError: It does not fit the device's memory.
        """
        if self._features is None:
            raise ConfigError("There is no image to segment yet", hint="call set_image first")
        with self._computing():
            logits = self._network.segment(self._features, self._network.encode_text([text])).mask_logits
            found: Probability = logits[0, 0].float().cpu().numpy()
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
            arrays = [_upright(image) for image, _ in batch]
            sizes = [(array.shape[0], array.shape[1]) for array in arrays]
            with self._computing():
                found = self._decode(self._encode(arrays), [text for _, text in batch], sizes)
            yield from found

    def count_tokens(self, text: str | None) -> tuple[int, bool]:
        """Return how many tokens a sentence has, and whether it is cut to the model's limit."""
        if self.model.text_encoder is None:
            return 0, False
        tokens = self.model.text_encoder.tokenizer([text])
        return tokens.token_counts[0], tokens.truncated[0]

    def _encode(self, arrays: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> ImageFeatures:
        prepared = torch.stack([prepare_image(array, self.experiment.preprocessing) for array in arrays])
        return self._network.encode_image(prepared.to(self.device, memory_format=torch.channels_last))

    def _decode(
        self, features: ImageFeatures, texts: Sequence[str | None], sizes: Sequence[tuple[int, int]]
    ) -> list[Probability]:
        logits = self._network.segment(features, self._network.encode_text(texts)).mask_logits
        maps = logits[:, 0].float().sigmoid()
        return [restore(probability, *size) for probability, size in zip(maps, sizes, strict=True)]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        half = self.precision == "bfloat16"
        try:
            with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                yield
        except torch.cuda.OutOfMemoryError as error:
            hint = "lower the batch size, or use --device cpu"
            raise OutOfMemoryError("The device ran out of memory", hint=hint) from error


def _upright(image: ImageSource) -> ImageArray:
    return rgb_from_array(image) if isinstance(image, np.ndarray) else read_image(image)
