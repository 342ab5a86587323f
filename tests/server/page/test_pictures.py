from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from tmca.imaging.overlay import PREDICTION_COLOUR
from tmca.server.page import pictures


def _pictures(markup: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', markup)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))) for content in found]


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((40, 60), dtype=np.bool_)
    mask[10:30, 20:40] = True
    return mask


def test_image_fill_and_outline_lie_over_one_another(image: np.ndarray, mask: np.ndarray):
    shown, fill, outline = _pictures(pictures.mask_figure(image, mask, "caption", "alt", 100))
    assert np.array_equal(shown, image)
    assert np.array_equal(fill[:, :, 3] > 0, mask)
    assert (fill[mask][:, :3] == PREDICTION_COLOUR).all()
    drawn = outline[:, :, 3] > 0
    assert drawn.any()
    assert not drawn[20, 30]  # the middle of the mask


def test_without_a_mask_the_image_stands_alone(image: np.ndarray):
    assert len(_pictures(pictures.mask_figure(image, None, "", "alt", 100))) == 1


def test_words_of_users_are_no_markup(image: np.ndarray):
    markup = pictures.mask_figure(image, None, "<script>", '"><script>', 100)
    assert "<script>" not in markup
    assert "&lt;script&gt;" in pictures.legend("<script>", "high")


def test_large_images_are_reduced_alike(image: np.ndarray, mask: np.ndarray):
    shown, fill, _ = _pictures(pictures.mask_figure(image, mask, "", "", 30))
    assert shown.shape[:2] == fill.shape[:2] == (20, 30)
    assert abs((fill[:, :, 3] > 0).mean() - mask.mean()) < 0.01


def test_a_heat_map_is_lighter_where_values_are_higher():
    values = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(8, axis=0)
    (shown,) = _pictures(pictures.heat_figure(np.zeros((8, 64, 3), dtype=np.uint8), values, "", "", 100))
    lightness = shown.astype(float) @ (0.299, 0.587, 0.114)
    assert (np.diff(lightness[0]) >= -1).all()
    assert lightness[0, -1] - lightness[0, 0] > 100


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (1024, 3), (3, 2000)])
def test_no_side_vanishes(size: tuple[int, int]):
    height, width = pictures.reduced_size(size, 16)
    assert 1 <= height <= 16
    assert 1 <= width <= 16


def test_a_mask_is_enlarged_by_its_nearest_pixels():
    small = np.array([[True, False], [False, True]])
    assert np.array_equal(pictures.resized_mask(small, (4, 6)), small.repeat(2, axis=0).repeat(3, axis=1))
    assert np.array_equal(pictures.resized_mask(pictures.resized_mask(small, (8, 8)), (2, 2)), small)


def test_figures_say_how_many_they_are():
    assert 'class="panels panels-2"' in pictures.figures(["<a>", "<b>"])
    assert 'class="panels panels-3"' in pictures.figures(["<a>"] * 7)
