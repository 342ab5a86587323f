from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmca.errors import DataError, StorageError
from tmca.imaging.dicom.volume import write_masks, write_probabilities
from tmca.imaging.reading import read_frames

AXES = [tuple(sign * value for value in axis) for axis in np.eye(3).tolist() for sign in (1, -1)]
ORIENTATIONS = [(*row, *column) for row, column in itertools.product(AXES, AXES) if abs(np.dot(row, column)) < 0.5]


@settings(max_examples=40)
@given(
    orientation=st.sampled_from(ORIENTATIONS),
    spacing=st.tuples(st.sampled_from([0.5, 0.7]), st.sampled_from([0.5, 1.1])),
    step=st.sampled_from([-3.0, 1.25]),
    shift=st.sampled_from([0.0, 0.4]),
    size=st.tuples(st.integers(1, 4), st.integers(2, 5), st.integers(2, 5)),
    data=st.data(),
)
def test_a_voxel_lies_where_the_slices_pixel_lies(
    draw_slices: Callable,
    orientation: tuple,
    spacing: tuple,
    step: float,
    shift: float,
    size: tuple,
    data: st.DataObject,
):
    normal = np.cross(orientation[:3], orientation[3:])
    place = tuple(data.draw(st.integers(0, length - 1)) for length in size)
    marked = np.zeros(size, bool)
    marked[place] = True
    with TemporaryDirectory() as name:
        folder = Path(name)
        paths = draw_slices(
            folder,
            np.zeros(size, np.int16),
            orientation,
            spacing,
            normal * step + shift * np.array(orientation[:3]),
            SliceThickness=abs(step),
        )
        order = data.draw(st.permutations(range(size[0])))
        write_masks(folder / "mask.nii.gz", [paths[index] for index in order], [marked[index] for index in order])
        image = nibabel.load(folder / "mask.nii.gz")
        frame = read_frames(paths[place[0]])[0]
        values = np.asanyarray(image.dataobj)
    assert values.dtype == np.uint8
    assert values.sum() == 1
    meant = np.array(frame.geometry.affine) @ [place[1], place[2], 0, 1]
    voxel = np.argwhere(values)[0]
    np.testing.assert_allclose(image.affine @ [*voxel, 1], meant, atol=1e-3)
    assert tuple(voxel[:2]) == (place[2], place[1])
    assert image.header.get_xyzt_units()[0] == "mm"
    if size[0] == 1:
        assert image.header.get_zooms()[2] == pytest.approx(abs(step))


def test_frames_of_a_volume_in_one_file(tmp_path: Path, draw_enhanced: Callable):
    path = draw_enhanced(tmp_path / "a.dcm", np.zeros((3, 4, 5), np.int16), heights=(5, 2.5, 0))
    values = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)
    write_probabilities(tmp_path / "p.nii", [path], list(values))
    image = nibabel.load(tmp_path / "p.nii")
    assert image.get_data_dtype() == np.float32
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), values[::-1].transpose(2, 1, 0))
    np.testing.assert_allclose(image.affine, [[-0.25, 0, 0, -10], [0, -0.5, 0, -20], [0, 0, 2.5, 0], [0, 0, 0, 1]])


def test_images_without_a_place_are_no_volume(tmp_path: Path, draw_dicom: Callable):
    path = draw_dicom(tmp_path / "a.dcm", np.zeros((3, 4), np.uint8))
    with pytest.raises(DataError, match="does not say where in the patient it lies") as caught:
        write_masks(tmp_path / "mask.nii", [path], [np.zeros((3, 4), bool)])
    assert "PNG" in caught.value.hint
    assert not (tmp_path / "mask.nii").exists()


def test_what_cannot_be_written(tmp_path: Path, draw_slices: Callable):
    paths = draw_slices(tmp_path, np.zeros((2, 3, 4), np.int16))
    masks = [np.zeros((3, 4), bool)] * 2
    with pytest.raises(StorageError, match=r"let the name end in \.nii"):
        write_masks(tmp_path / "mask.png", paths, masks)
    with pytest.raises(DataError, match="There are 1 masks for 2 images"):
        write_masks(tmp_path / "mask.nii", paths, masks[:1])
    with pytest.raises(DataError, match="outside"):
        write_probabilities(tmp_path / "p.nii", paths, [np.full((3, 4), 1.5)] * 2)
