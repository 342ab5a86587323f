from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tmca.imaging.overlay import (
    FILL,
    INK,
    MARGIN,
    PAPER,
    PREDICTION_COLOUR,
    SHORTEST_PANEL,
    TRUTH_COLOUR,
    Panel,
    draw_overlay,
    draw_strip,
    outline,
)


def _grey(height: int = 40, width: int = 60, value: int = 100) -> NDArray[np.uint8]:
    return np.full((height, width, 3), value, dtype=np.uint8)


def _box(height: int, width: int, rows: slice, columns: slice) -> NDArray[np.bool_]:
    mask = np.zeros((height, width), dtype=bool)
    mask[rows, columns] = True
    return mask


def _is(picture: NDArray[np.uint8], colour: tuple[int, int, int]) -> NDArray[np.bool_]:
    return np.asarray((picture == colour).all(axis=2))


# Outlines --------------------------------------------------------------------------------------------------------


def test_an_outline_by_hand():
    mask = _box(7, 7, slice(1, 6), slice(1, 6))
    expected = mask.copy()
    expected[2:5, 2:5] = False
    np.testing.assert_array_equal(outline(mask), expected)
    expected[2:5, 2:5] = True
    expected[3, 3] = False
    np.testing.assert_array_equal(outline(mask, 2), expected)


def test_an_outline_runs_along_the_edge_of_the_image():
    expected = np.ones((5, 6), dtype=bool)
    expected[1:4, 1:5] = False
    np.testing.assert_array_equal(outline(np.ones((5, 6), dtype=bool)), expected)


@pytest.mark.parametrize("thickness", [1, 2, 5])
def test_small_and_empty_masks(thickness: int):
    dot = _box(9, 9, slice(4, 5), slice(4, 5))
    np.testing.assert_array_equal(outline(dot, thickness), dot)
    assert not outline(np.zeros((9, 9), dtype=bool), thickness).any()


def test_an_outline_surrounds_a_hole():
    mask = np.ones((9, 9), dtype=bool)
    mask[4, 4] = False
    border = outline(mask)
    assert border[3, 4]
    assert border[4, 3]
    assert not border[4, 4]
    assert not border[2, 2]


# Overlays --------------------------------------------------------------------------------------------------------


def test_a_prediction_is_filled_and_outlined():
    image, mask = _grey(), _box(40, 60, slice(10, 30), slice(20, 50))
    drawn = draw_overlay(image, mask)
    assert drawn.dtype == np.uint8
    assert drawn.shape == image.shape
    np.testing.assert_array_equal(drawn[~mask], image[~mask])
    border = _is(drawn, PREDICTION_COLOUR)
    assert border[10, 20]
    assert border[29, 49]
    assert (border <= mask).all()
    inside = mask & ~border
    expected = (1 - FILL) * 100 + FILL * np.array(PREDICTION_COLOUR)
    assert inside[20, 35]
    np.testing.assert_allclose(drawn[inside], np.broadcast_to(expected, (inside.sum(), 3)), atol=1)


def test_the_truth_is_an_outline_on_top():
    image, mask = _grey(), _box(40, 60, slice(10, 30), slice(20, 50))
    truth = _box(40, 60, slice(10, 30), slice(5, 40))
    drawn = draw_overlay(image, mask, truth)
    border = _is(drawn, TRUTH_COLOUR)
    np.testing.assert_array_equal(border, outline(truth, _thickness(border)))
    assert border[20, 5]
    assert not border[20, 12]
    np.testing.assert_array_equal(drawn[20, 12], image[20, 12])
    only_truth = draw_overlay(image, None, truth)
    np.testing.assert_array_equal(only_truth[~border], image[~border])


def _thickness(border: NDArray[np.bool_]) -> int:
    return int(border[20, 5:20].sum())


def test_nothing_to_draw_leaves_the_image_alone():
    image = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    np.testing.assert_array_equal(draw_overlay(image, None), image)
    np.testing.assert_array_equal(draw_overlay(image, np.zeros((30, 30), dtype=bool)), image)


def test_drawing_does_not_change_its_arguments():
    image, mask = _grey(), _box(40, 60, slice(10, 30), slice(20, 50))
    draw_overlay(image, mask, mask)
    draw_strip(image, [Panel("x", mask)], mask)
    assert (image == 100).all()
    assert mask.sum() == 600


def test_lines_grow_with_the_image():
    small, large = (draw_overlay(_grey(size, size), np.ones((size, size), dtype=bool)) for size in (100, 1000))
    assert _is(large, PREDICTION_COLOUR)[500].sum() > _is(small, PREDICTION_COLOUR)[50].sum()


# Strips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("panels", [1, 3])
def test_panels_stand_side_by_side(panels: int):
    image, mask = _grey(300, 240), _box(300, 240, slice(100, 200), slice(60, 180))
    strip = draw_strip(image, [Panel("reference"), Panel("one", mask), Panel("two", None)][:panels], mask)
    assert strip.dtype == np.uint8
    assert strip.shape[1] == panels * (240 + MARGIN) + MARGIN
    assert strip.shape[0] > 300 + MARGIN
    top = strip.shape[0] - 300 - MARGIN
    for number in range(panels):
        left = MARGIN + number * (240 + MARGIN)
        panel = strip[top : top + 300, left : left + 240]
        expected = draw_overlay(image, mask if number == 1 else None, mask)
        np.testing.assert_array_equal(panel, expected)
    assert (strip[:, :MARGIN] == PAPER).all()


def test_captions_are_written_above():
    strip = draw_strip(_grey(300, 240), [Panel("reference")])
    top = strip.shape[0] - 300 - MARGIN
    darkest = strip[:top].min(axis=(0, 1))
    assert (darkest <= np.array(INK) + 60).all()
    empty = draw_strip(_grey(300, 240), [Panel("")])
    assert (empty[: empty.shape[0] - 300 - MARGIN] == PAPER).all()


def test_long_captions_are_wrapped():
    long = "two large dark oval lesions, located in top left, bottom right of the image " * 3
    short, tall = (draw_strip(_grey(300, 240), [Panel(caption), Panel("x")]) for caption in ("x", long))
    assert tall.shape[1] == short.shape[1]
    assert tall.shape[0] > short.shape[0] + 30


def test_small_images_are_enlarged_by_whole_pixels():
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    mask = _box(32, 48, slice(8, 24), slice(8, 40))
    strip = draw_strip(image, [Panel(""), Panel("", mask)])
    scale = round(SHORTEST_PANEL / 32)
    width = (strip.shape[1] - 3 * MARGIN) // 2
    assert width == 48 * scale
    panel = strip[-MARGIN - 32 * scale : -MARGIN, MARGIN : MARGIN + width]
    np.testing.assert_array_equal(panel[::scale, ::scale], image)
    np.testing.assert_array_equal(panel[scale - 1 :: scale, scale - 1 :: scale], image)
