from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmca.errors import ConfigError, DataError
from tmca.imaging.frames import (
    Frame,
    Frames,
    Geometry,
    Identity,
    check_window,
    robust_limits,
    shown_between,
    window_limits,
)

booleans = st.booleans()


@given(st.integers(1, 5), st.integers(1, 5), booleans, booleans, booleans, st.sampled_from([(), (3,)]))
def test_stored_and_upright_are_inverse(rows: int, columns: int, transposed: bool, up: bool, left: bool, more: tuple):
    geometry = Geometry((rows, columns), transposed, up, left)
    stored = np.arange(rows * columns * 3).reshape(rows, columns, 3)
    stored = stored if more else stored[:, :, 0]
    upright = geometry.to_upright(stored)
    assert upright.shape[:2] == geometry.size
    np.testing.assert_array_equal(geometry.to_stored(upright), stored)


def test_an_upright_array_is_transposed_then_flipped():
    stored = np.arange(6).reshape(2, 3)
    upright = Geometry((2, 3), transposed=True, flip_rows=True).to_upright(stored)
    np.testing.assert_array_equal(upright, [[2, 5], [1, 4], [0, 3]])


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(DataError, match="The array is 3 × 2, expected 2 × 3"):
        Geometry((2, 3)).to_stored(np.zeros((3, 2), dtype=bool))


def test_the_plane_is_where_the_mask_belongs_in_the_stored_array():
    volume = np.zeros((4, 5, 6), dtype=int)
    geometry = Geometry((4, 6), slice_axis=1, slice_index=2)
    volume[geometry.plane] = geometry.to_stored(np.ones((4, 6), dtype=int))
    assert volume[:, 2].all()
    assert volume.sum() == 24
    assert np.zeros((4, 6))[Geometry((4, 6)).plane].shape == (4, 6)


def test_area_and_volume_need_the_spacing():
    assert Geometry((2, 2)).pixel_area is None
    assert Geometry((2, 2)).voxel_volume is None
    flat = Geometry((2, 2), spacing=(0.5, 2.0))
    assert flat.pixel_area == 1.0
    assert flat.voxel_volume is None
    assert Geometry((2, 2), spacing=(0.5, 2.0), slice_spacing=3.0).voxel_volume == 3.0


def test_the_area_of_slanted_pixels_is_that_of_their_parallelogram():
    affine = ((1.0, 1.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    assert Geometry((2, 2), spacing=(1.0, 2**0.5), affine=affine).pixel_area == pytest.approx(1)


def test_the_patient_is_not_in_the_representation():
    assert "Jane" not in repr(Identity(patient_id="Jane", modality="CT"))


def _frames(count: int) -> Frames:
    def load(number: int) -> Frame:
        return Frame(np.full((2, 3, 3), number, dtype=np.uint8), Geometry((2, 3)), number=number)

    return Frames(Path("scan.nii"), (2, 3), range(count), numbered=count > 1, load=load)


def test_frames_are_loaded_in_order_and_by_number():
    frames = _frames(4)
    assert len(frames) == 4
    assert [frame.number for frame in frames] == [0, 1, 2, 3]
    assert frames[3].number == 3
    one = frames.only(2)
    assert len(one) == 1
    assert [frame.number for frame in one] == [2]
    assert _frames(1).only(None).numbers == range(1)


def test_a_number_is_needed_and_checked():
    with pytest.raises(DataError, match=r"scan\.nii holds 4 images") as caught:
        _frames(4).only(None)
    assert caught.value.hint == "name one of them: scan.nii#0 to scan.nii#3"
    for number in (4, -1):
        with pytest.raises(DataError, match=f"no image number {number}") as caught:
            _frames(4)[number]
        assert caught.value.hint == "it holds numbers 0 to 3"
    with pytest.raises(DataError, match="no image number 1") as caught:
        _frames(1).only(1)
    assert caught.value.hint == "it holds number 0"


def test_window_limits():
    assert window_limits((-600.0, 1500.0)) == (-1350, 150)


@pytest.mark.parametrize("window", [(0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_a_window_that_shows_nothing_is_refused(window: tuple[float, float]):
    with pytest.raises(ConfigError, match="expected a centre and a width above 0"):
        check_window(window)
    check_window(None)


def test_values_between_limits():
    values = np.array([-5, 0, 5, 10, 99], dtype=np.int16)
    np.testing.assert_array_equal(shown_between(values, 0.0, 10.0), [0, 0, 128, 255, 255])
    np.testing.assert_array_equal(shown_between(values, 3.0, 3.0), [0] * 5)
    huge = np.array([-1e308, 0, 1e308])
    np.testing.assert_array_equal(shown_between(huge, -1e308, 1e308), [0, 128, 255])


def test_robust_limits_leave_out_the_outermost():
    values = np.arange(1001)
    assert robust_limits(values) == (5, 995)
    rare = np.zeros(10_000)
    rare[0] = 7
    assert robust_limits(rare) == (0, 7)
    assert robust_limits(np.full(3, 4)) == (4, 4)
