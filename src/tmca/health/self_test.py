"""Whether a known image gets its known masks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SELF_TEST = Path(__file__).with_name("self_test_data")
"""Model, image, sentences and masks of the self-test."""
LEAST_DICE = 0.98
"""Dice with the stored mask that other processors and versions must reach: only pixels at the outline may differ."""


def run_self_test(device: str = "auto") -> tuple[list[float], str]:
    """Segment a drawn image by two sentences with the small model that comes with tmca.

    Model, image, sentences and true masks lie in the package. The model was trained on phantoms, so that its masks have
    clear outlines: between processors, versions and precisions only pixels at the outline change.

    Returns:
        The Dice of each mask with the stored one, and where and in what precision it was computed.

    Raises:
        TMCAError: The model cannot be loaded, or the device is not there.
    """
    from tmca.imaging.raster import read_mask
    from tmca.inference import Predictor

    sentences: dict[str, str] = json.loads((SELF_TEST / "sentences.json").read_text("utf-8"))
    predictor = Predictor.from_pretrained(SELF_TEST / "model", device)
    predictor.set_image(SELF_TEST / "image.png")
    dice = []
    for file, sentence in sentences.items():
        dice.append(mask_dice(predictor.predict(sentence), read_mask(SELF_TEST / file)))
    return dice, f"{predictor.device} in {predictor.precision}"


def mask_dice(mask: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Return the Dice of two masks, of which one is not empty."""
    return 2 * int((mask & other).sum()) / max(1, int(mask.sum()) + int(other.sum()))
