from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from tmca.errors import DataError
from tmca.imaging.dicom.sources import PATIENT_AND_STUDY, copy_patient_and_study, read_sources, stand_ins

SIZE = (4, 5)


def _change(path: Path, **tags: Any) -> Path:
    dataset = pydicom.dcmread(path)
    for keyword, value in tags.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    with pydicom.config.disable_value_validation():
        dataset.save_as(path)
    return path


def test_one_image(tmp_path: Path, draw_dicom: Callable):
    sources = read_sources([draw_dicom(tmp_path / "a.dcm", np.zeros(SIZE, np.uint8))])
    assert (sources.layout, sources.located, sources.step, sources.order) == ("image", False, None, (0,))
    assert (sources.first.number, sources.first.frame_number, sources.first.frame_numbers) == (None, None, None)
    assert sources.voxel_volume is None


def test_slices_in_any_order_are_a_stack(tmp_path: Path, draw_slices: Callable):
    paths = draw_slices(tmp_path, np.zeros((3, *SIZE), np.int16), step=(0, 0, -2.5))
    sources = read_sources([paths[1], paths[2], paths[0]])
    assert (sources.layout, sources.located) == ("stack", True)
    assert [sources.images[place].source.path.name for place in sources.order] == ["002.dcm", "001.dcm", "000.dcm"]
    np.testing.assert_allclose(sources.step, (0, 0, 2.5))
    assert sources.voxel_volume == pytest.approx(0.5 * 0.25 * 2.5)
    assert len(sources.files) == 3


def test_the_number_of_a_result(tmp_path: Path, draw_dicom: Callable, draw_slices: Callable, draw_enhanced: Callable):
    film = draw_dicom(tmp_path / "a.dcm", np.zeros(SIZE, np.uint8), InstanceNumber=7)
    volume = draw_enhanced(tmp_path / "b.dcm", np.zeros((4, *SIZE), np.int16), InstanceNumber=8)
    slices = draw_slices(tmp_path / "ct", np.zeros((3, *SIZE), np.int16))
    for names, number in (([film], 7), ([volume], 8), ([f"{volume}#2"], 3), ([slices[1]], 2), (slices[::-1], 1)):
        assert read_sources(names).instance_number == number
    for odd in (None, -1):
        assert read_sources([_change(film, InstanceNumber=odd)]).instance_number == 1


def test_the_volume_of_slices_that_are_shifted_is_not_larger(tmp_path: Path, draw_slices: Callable):
    paths = draw_slices(tmp_path, np.zeros((3, *SIZE), np.int16), step=(0, 1.5, 2.5))
    assert read_sources(paths).voxel_volume == pytest.approx(0.5 * 0.25 * 2.5)


def test_frames_of_one_file(tmp_path: Path, draw_enhanced: Callable, draw_dicom: Callable):
    volume = draw_enhanced(tmp_path / "a.dcm", np.zeros((4, *SIZE), np.int16))
    sources = read_sources([volume])
    assert (sources.layout, len(sources.images), len(sources.files)) == ("stack", 4, 1)
    assert [image.frame_number for image in sources.images] == [1, 2, 3, 4]
    assert [image.number for image in read_sources([f"{volume}#2", f"{volume}#1"]).images] == [2, 1]
    sequence = draw_dicom(tmp_path / "b.dcm", np.zeros((3, *SIZE, 3), np.uint8), "US sequence")
    assert read_sources([sequence]).layout == "sequence"
    assert read_sources([f"{sequence}#1"]).layout == "image"


def test_thickness(tmp_path: Path, draw_slices: Callable):
    paths = draw_slices(tmp_path / "a", np.zeros((2, *SIZE), np.int16), SliceThickness=None)
    sources = read_sources(paths)
    assert sources.thickness(sources.first) == 2.5
    alone = read_sources(paths[:1])
    assert (alone.thickness(alone.first), alone.located) == (None, False)
    overlapping = draw_slices(tmp_path / "b", np.zeros((2, *SIZE), np.int16), SliceThickness=5)
    sources = read_sources(overlapping)
    assert sources.thickness(sources.first) == 5


def test_arrays_are_stacked_as_the_files_store_them(tmp_path: Path, draw_slices: Callable):
    sources = read_sources(draw_slices(tmp_path, np.zeros((2, *SIZE), np.int16)))
    arrays = list(np.random.default_rng(0).random((2, *SIZE)))
    np.testing.assert_array_equal(sources.stored(arrays, "maps"), arrays)
    with pytest.raises(DataError, match="There are 1 maps for 2 images"):
        sources.stored(arrays[:1], "maps")
    with pytest.raises(DataError, match="The array is 5 × 4, expected 4 × 5"):
        sources.stored([array.T for array in arrays], "maps")


def test_patient_and_study_are_not_in_what_the_result_is_built_from(tmp_path: Path, draw_dicom: Callable):
    sources = read_sources([draw_dicom(tmp_path / "a.dcm", np.zeros(SIZE, np.uint8))])
    (stand_in,) = stand_ins(sources)
    assert not stand_in.PatientName
    assert not stand_in.StudyDate
    result = pydicom.Dataset()
    result.SpecificCharacterSet = sources.header.SpecificCharacterSet
    copy_patient_and_study(sources.header, result)
    copied = {keyword for keyword in PATIENT_AND_STUDY if keyword in sources.header}
    assert len(copied) == 11
    for keyword in copied:
        value = result[keyword].value
        text = value.decode("latin-1") if isinstance(value, bytes) else value
        assert text == sources.header[keyword].value


# What does not go together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"])
def test_uids_must_be_there(tmp_path: Path, draw_dicom: Callable, keyword: str):
    path = draw_dicom(tmp_path / "a.dcm", np.zeros(SIZE, np.uint8))
    _change(path, **{keyword: None})
    with pytest.raises(DataError, match=f"a.dcm lacks {keyword}") as caught:
        read_sources([path])
    assert "export the image from the archive" in caught.value.hint


@pytest.mark.parametrize("uid", ["1.2.x", "1..2", "1.02", "1." * 40 + "1"])
@pytest.mark.filterwarnings("ignore:Invalid value for VR UI", "ignore:The value length")
def test_uids_must_be_uids(tmp_path: Path, draw_dicom: Callable, uid: str):
    path = draw_dicom(tmp_path / "a.dcm", np.zeros(SIZE, np.uint8))
    dataset = pydicom.dcmread(path)
    with pydicom.config.disable_value_validation():
        dataset.StudyInstanceUID = uid
        dataset.save_as(path)
    with pytest.raises(DataError, match=r"has the StudyInstanceUID .* which is no UID"):
        read_sources([path])


def test_no_patient_data_in_logs(tmp_path: Path, draw_dicom: Callable):
    sources = read_sources([draw_dicom(tmp_path / "a.dcm", np.zeros(SIZE, np.uint8))])
    assert "Müller" not in repr(sources)
    assert "P-17" not in repr(sources)


def test_nothing_is_no_source():
    with pytest.raises(DataError, match="There is no image"):
        read_sources([])


@pytest.mark.parametrize(
    ("place", "tags", "reason"),
    [
        (2, {"SeriesInstanceUID": "1.9"}, "2 values of SeriesInstanceUID"),
        (2, {"StudyInstanceUID": "1.9"}, "2 values of StudyInstanceUID"),
        (2, {"FrameOfReferenceUID": "1.9"}, "2 values of FrameOfReferenceUID"),
        (2, {"ImagePositionPatient": [-100, -100, -97.5]}, "2 slices lie at one place: 001.dcm and 002.dcm"),
        (2, {"ImagePositionPatient": None}, "no position or orientation in 002.dcm"),
        (2, {"ImageOrientationPatient": [0, 1, 0, 1, 0, 0]}, "several orientations: 002.dcm differ"),
        (2, {"PixelSpacing": [0.5, 0.5]}, "several pixel spacings: 002.dcm differ"),
        (2, {"Rows": 5, "Columns": 4}, "several sizes: 002.dcm differ"),
        (2, {"SOPInstanceUID": "1.2.826.0.1.3.13563782415974253"}, "is there twice"),
    ],
)
def test_slices_that_do_not_go_together(tmp_path: Path, draw_slices: Callable, place: int, tags: dict, reason: str):
    paths = draw_slices(tmp_path, np.zeros((5, *SIZE), np.int16))
    if "SOPInstanceUID" in tags:
        tags = {"SOPInstanceUID": pydicom.dcmread(paths[0]).SOPInstanceUID}
    _change(paths[place], **tags)
    with pytest.raises(DataError, match=reason) as caught:
        read_sources(paths)
    assert caught.value.hint


def test_a_missing_slice_is_noticed(tmp_path: Path, draw_slices: Callable):
    paths = draw_slices(tmp_path, np.zeros((5, *SIZE), np.int16))
    with pytest.raises(DataError, match=r"a gap.*5 mm between 002\.dcm and 004\.dcm, usually 2\.5 mm"):
        read_sources([*paths[:3], paths[4]])


def test_positions_without_what_they_are_measured_in(tmp_path: Path, draw_slices: Callable):
    paths = draw_slices(tmp_path, np.zeros((3, *SIZE), np.int16), FrameOfReferenceUID=None)
    with pytest.raises(DataError, match="no Frame of Reference UID"):
        read_sources(paths)


def test_images_that_are_no_stack(tmp_path: Path, draw_dicom: Callable, draw_enhanced: Callable):
    pixels = np.zeros(SIZE, np.uint8)
    paths = [draw_dicom(tmp_path / name, pixels) for name in ("a.dcm", "b.dcm")]
    with pytest.raises(DataError, match=r"2 images beginning with .* have no positions") as caught:
        read_sources(paths)
    assert caught.value.hint == "write one result for each image"
    with pytest.raises(DataError, match=r"a\.dcm is there twice"):
        read_sources([paths[0], paths[0]])
    volumes = [draw_enhanced(tmp_path / name, np.zeros((2, *SIZE), np.int16)) for name in ("c.dcm", "d.dcm")]
    with pytest.raises(DataError, match="and others hold several frames each"):
        read_sources(volumes)
    with pytest.raises(DataError, match=r"c\.dcm#1 is there twice"):
        read_sources([volumes[0], f"{volumes[0]}#1"])
    with pytest.raises(DataError, match=r"c\.dcm has no image number 2"):
        read_sources([f"{volumes[0]}#2"])
    gap = draw_enhanced(tmp_path / "e.dcm", np.zeros((4, *SIZE), np.int16))
    with pytest.raises(DataError, match=r"e\.dcm is not one stack of slices: a gap"):
        read_sources([f"{gap}#0", f"{gap}#1", f"{gap}#3"])


def test_a_picture_is_no_source(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"picture")
    with pytest.raises(DataError, match=r"a\.png is not a DICOM file"):
        read_sources([tmp_path / "a.png"])
