"""Predictor: encode an image once, then ask it as many sentences as you like.

The masks come back at the image's own size, through the same preprocessing the model was trained with.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tmca.checkpoints import load_checkpoint
from tmca.data.preprocessing import prepare_image, restore
from tmca.devices import resolve_device
from tmca.errors import ConfigError, OutOfMemoryError
from tmca.imaging.raster import rgb_from_array
from tmca.imaging.reading import read_image
from tmca.metrics import check_threshold
from tmca.models import SegmentationModel
from tmca.types import ImageFeatures

Mask = NDArray[np.bool_]
Probability = NDArray[np.float32]


class Predictor:
    """A trained model that answers sentences about an image with masks.

    Args:
        model: With its ``experiment`` set, which tells the preprocessing.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Example:
        >>> predictor = Predictor.from_pretrained("runs/kvasir-mobile")  # doctest: +SKIP
        >>> predictor.set_image("colon.jpg")  # doctest: +SKIP
        >>> mask = predictor.predict("one small polyp, located in top left of the image")  # doctest: +SKIP
    """

    def __init__(self, model: SegmentationModel, device: str = "auto") -> None:
        if model.experiment is None:
            raise ConfigError("This model does not know its preprocessing", hint="load it with from_pretrained")
        self.device = resolve_device(device)
        self.model = model.to(self.device).eval()
        self.experiment = model.experiment
        self._features: ImageFeatures | None = None
        self._size = (0, 0)

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str = "auto") -> Predictor:
        """Load a run folder (its best checkpoint), a checkpoint folder or a hub id.

        Raises:
            CheckpointError: The folder holds no usable checkpoint.
            WeightsError: A hub id that is neither on disk nor reachable.
            ConfigError: The device is unknown or not there.
        """
        return cls(load_checkpoint(name), device)

    def set_image(self, image: str | Path | NDArray[np.generic]) -> None:
        """Encode an image; later calls of :meth:`predict` refer to it.

        Args:
            image: A file of any kind that :mod:`tmca.imaging.reading` knows, or an upright array: ``(height, width)``
                grey, ``(height, width, 3)`` RGB or ``(height, width, 4)`` RGBA. uint8 is taken as it is; other types
                are scaled from their own minimum and maximum.

        Raises:
            DataError: The file cannot be read, or the array is no image.
            OutOfMemoryError: The image does not fit the device's memory.
        """
        array = rgb_from_array(image) if isinstance(image, np.ndarray) else read_image(image)
        prepared = prepare_image(array, self.experiment.preprocessing)[None].to(self.device)
        try:
            with torch.inference_mode():
                self._features = self.model.encode_image(prepared)
        except torch.cuda.OutOfMemoryError as error:
            raise OutOfMemoryError("The device ran out of memory", hint="use --device cpu") from error
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
        """
        check_threshold(threshold)
        return self.probability(text) > threshold

    def probability(self, text: str | None = None) -> Probability:
        """Return the probability of each pixel to belong to what a sentence names, at the size of the image.

        Returns:
            float32 ``(height, width)`` in [0, 1].

        Raises:
            ConfigError: No image was set.
        """
        if self._features is None:
            raise ConfigError("There is no image to segment yet", hint="call set_image first")
        with torch.inference_mode():
            output = self.model.segment(self._features, self.model.encode_text([text]))
            return restore(output.mask_logits[0, 0].float().sigmoid(), *self._size)

    def count_tokens(self, text: str | None) -> tuple[int, bool]:
        """Return how many tokens a sentence has, and whether it is cut to the model's limit."""
        if self.model.text_encoder is None:
            return 0, False
        tokens = self.model.text_encoder.tokenizer([text])
        return tokens.token_counts[0], tokens.truncated[0]
