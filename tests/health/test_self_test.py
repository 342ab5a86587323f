from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from tmca.health.self_test import LEAST_DICE, SELF_TEST, mask_dice
from tmca.imaging.raster import read_mask
from tmca.inference import Predictor


def test_the_self_test_is_small_and_needs_nothing_else():
    assert sum(path.stat().st_size for path in SELF_TEST.rglob("*") if path.is_file()) < 600_000


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_the_masks_do_not_hang_on_the_precision(precision: Any):
    predictor = Predictor.from_pretrained(SELF_TEST / "model", "cpu", precision)
    predictor.set_image(SELF_TEST / "image.png")
    sentences = json.loads((SELF_TEST / "sentences.json").read_text("utf-8"))
    masks = [predictor.predict(sentence) for sentence in sentences.values()]
    for file, mask in zip(sentences, masks, strict=True):
        assert mask.sum() > 50
        assert mask_dice(mask, read_mask(SELF_TEST / file)) > 0.99
    assert not (masks[0] & masks[1]).any()  # the sentence decides


def test_small_changes_of_the_weights_do_not_matter_and_large_ones_do():
    """As small as what other processors and versions do to the sums."""
    sentences = json.loads((SELF_TEST / "sentences.json").read_text("utf-8"))
    for noise, passes in ((1e-4, True), (0.5, False)):
        predictor = Predictor.from_pretrained(SELF_TEST / "model", "cpu", "32")
        with torch.no_grad():
            for parameter in predictor.model.parameters():
                parameter.mul_(1 + noise * torch.randn_like(parameter))
        predictor = Predictor(predictor.model, "cpu", "32")
        predictor.set_image(SELF_TEST / "image.png")
        dice = [mask_dice(predictor.predict(text), read_mask(SELF_TEST / file)) for file, text in sentences.items()]
        assert (min(dice) >= LEAST_DICE) is passes, (noise, dice)


def test_the_dice_of_masks():
    mask = np.array([[True, True], [False, False]])
    assert mask_dice(mask, mask) == 1
    assert mask_dice(mask, ~mask) == 0
    assert mask_dice(mask, np.array([[True, False], [False, False]])) == pytest.approx(2 / 3)
