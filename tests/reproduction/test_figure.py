from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tmca.data.manifest import Manifest, Record
from tmca.errors import DataError
from tmca.reproduction.figure import Compared, boxes, compare_cases, dice, draw_comparison


def _mask(*blocks: tuple[int, int, int, int], size: int = 100) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    for left, top, right, bottom in blocks:
        mask[top:bottom, left:right] = True
    return mask


def test_a_wrong_region_gets_its_box():
    assert boxes(_mask((10, 20, 30, 50))) == [(10, 20, 30, 50)]
    assert boxes(_mask((10, 20, 30, 50), (60, 60, 80, 90))) == [(10, 20, 30, 50), (60, 60, 80, 90)]
    assert boxes(_mask()) == []


def test_a_displaced_outline_gets_none():
    assert boxes(_mask((10, 10, 80, 13))) == []  # long, but three pixels thin
    assert boxes(_mask((10, 10, 14, 14))) == []  # a speck


def test_dice_by_hand():
    assert dice(_mask((0, 0, 10, 10)), _mask((0, 0, 10, 20))) == pytest.approx(2 * 100 / 300)
    assert dice(_mask(), _mask()) == 1
    assert dice(_mask((0, 0, 10, 10)), _mask()) == 0


def _case(*predicted: np.ndarray) -> Compared:
    truth = _mask((20, 20, 60, 60))
    image = np.full((100, 100, 3), 90, dtype=np.uint8)
    masks = {f"method {index}": mask for index, mask in enumerate(predicted)}
    return Compared(Record("a", "a.png", text="one lesion"), image, truth, masks)


def test_the_spread_is_between_the_best_and_the_worst():
    case = _case(_mask((20, 20, 60, 60)), _mask(), _mask((20, 20, 40, 60)))
    assert case.spread == 1


def test_the_figure_shows_false_positives_red_and_false_negatives_blue(tmp_path: Path):
    path = tmp_path / "figure.png"
    draw_comparison([_case(_mask((20, 20, 60, 60)), _mask((20, 20, 40, 60), (70, 70, 95, 95)))], path)
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    width = pixels.shape[1]
    red = (abs(pixels - (232, 17, 45)).max(axis=2) < 30).nonzero()[1]
    blue = (abs(pixels - (31, 111, 255)).max(axis=2) < 30).nonzero()[1]
    assert len(red) > 50
    assert len(blue) > 50
    assert min(red.min(), blue.min()) > 0.75 * width  # in the last of the four columns only


def test_a_figure_needs_models(phantoms: Manifest):
    with pytest.raises(DataError, match="no trained model to show"):
        compare_cases({}, phantoms)
