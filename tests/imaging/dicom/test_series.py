from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from tmca.errors import DataError
from tmca.imaging.dicom.series import Plane, find_series, order_planes, read_stack, survey_series

AXIAL = np.array([[0, -1, 0], [-1, 0, 0], [0, 0, 1]], dtype=float)  # rows to the back, columns to the left


def _planes(heights: Sequence[float], **fields: Any) -> list[Plane]:
    values: dict[str, Any] = {"size": (4, 5), "spacing": (0.5, 0.5), "directions": AXIAL} | fields
    return [Plane(f"{index}.dcm", position=np.array([1.0, 2.0, z]), **values) for index, z in enumerate(heights)]


def _written(path: Path, position: Sequence[float] | None, **tags: Any) -> Path:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    values = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
        "SOPInstanceUID": f"1.2.{abs(hash(path.name))}",
        "SeriesInstanceUID": "1.2.3",
        "SeriesDescription": "thorax",
        "Modality": "CT",
        "Rows": 2,
        "Columns": 3,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelRepresentation": 0,
        "PixelData": bytes(6),
        "PixelSpacing": [0.5, 0.5],
        "ImageOrientationPatient": None if position is None else [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": None if position is None else list(position),
        **tags,
    }
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    if "PixelData" in dataset:
        dataset["PixelData"].VR = "OB"
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


# The order of slices ---------------------------------------------------------------------------------------------


@given(order=st.permutations(range(5)), spacing=st.floats(0.4, 6), start=st.floats(-500, 500))
def test_slices_are_ordered_towards_the_head(order: list[int], spacing: float, start: float):
    stack = order_planes(_planes([start + spacing * place for place in order]))
    assert [order[index] for index in stack.order] == [0, 1, 2, 3, 4]
    assert stack.problems == ()
    np.testing.assert_allclose(stack.step, (0, 0, spacing), atol=1e-9)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_slices_are_ordered_towards_right_front_or_head(axis: int, sign: int):
    normal = sign * np.eye(3)[axis]
    rows, columns = (np.eye(3)[other] for other in range(3) if other != axis)
    directions = np.stack([rows, columns, normal], axis=1)
    planes = [Plane(f"{n}", (2, 2), None, n * np.eye(3)[axis], directions) for n in (3, 1, 2)]
    stack = order_planes(planes)
    assert stack.order == (1, 2, 0)
    np.testing.assert_allclose(stack.step, np.eye(3)[axis])


def test_slices_of_a_tilted_gantry_are_a_stack():
    planes = [Plane(f"{n}", (2, 2), None, np.array([0, 0.4 * n, 1.0 * n]), AXIAL) for n in range(4)]
    assert order_planes(planes).problems == ()
    np.testing.assert_allclose(order_planes(planes).step, (0, 0.4, 1))
    planes[2] = Plane("2", (2, 2), None, np.array([0, 5, 2.0]), AXIAL)
    assert order_planes(planes).problems == ("slices that are shifted against each other unevenly",)


def test_rounded_positions_are_no_gap():
    stack = order_planes(_planes([0, 0.62, 1.25, 1.88, 2.5]))
    assert stack.problems == ()
    np.testing.assert_allclose(stack.step, (0, 0, 0.625))


def test_one_image_has_no_step():
    stack = order_planes(_planes([7]))
    assert (stack.order, stack.step, stack.problems) == ((0,), None, ())


@pytest.mark.parametrize(
    ("planes", "problem"),
    [
        (_planes([0, 1, 2, 4, 5]), "a gap, .*: 2 mm between 2.dcm and 3.dcm, usually 1 mm"),
        (_planes([0, 1, 2, 2.5, 3.5]), "unevenly spaced: 0.5 mm between 2.dcm and 3.dcm"),
        (_planes([0, 2, 1, 2, 3]), "2 slices lie at one place: 1.dcm and 3.dcm"),
        (_planes([1, 1, 1]), "3 slices lie at one place"),
        (_planes([0, 1, 2]) + _planes([3], size=(5, 4)), "several sizes: 0.dcm differ"),
        (_planes([0, 1, 2]) + _planes([3], spacing=(0.5, 0.6)), "several pixel spacings: 0.dcm differ"),
        (_planes([0, 1, 2]) + _planes([3], spacing=None), "several pixel spacings: 0.dcm differ"),
        (_planes([0, 1, 2]) + _planes([3], directions=AXIAL[:, [1, 0, 2]]), "several orientations: 0.dcm differ"),
        (_planes([0, 1, 2]) + _planes([3], directions=None), "no position or orientation in 0.dcm"),
        ([*_planes([0]), Plane("x", (4, 5), None, None, AXIAL)], "no position or orientation in x"),
        (_planes([*range(9), *range(9)]), "and 6 more"),
    ],
)
def test_what_is_no_stack(planes: list[Plane], problem: str):
    stack = order_planes(planes)
    assert stack.step is None
    assert sorted(stack.order) == list(range(len(planes)))
    (found,) = [each for each in stack.problems if each.startswith(problem[:9])] or stack.problems
    assert re.search(problem, found)


# Folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_slices_is_one_stack(tmp_path: Path):
    heights = {"b": 0, "a": 5, "d": 10, "c": 15}
    for name, height in heights.items():
        _written(tmp_path / "deeper" / name, (0, 0, height), InstanceNumber=ord(name))
    (tmp_path / "notes.txt").write_text("no DICOM", "utf-8")
    _written(tmp_path / "report.dcm", None, SeriesInstanceUID="9", Rows=None, Columns=None, SamplesPerPixel=None,
             PhotometricInterpretation=None, BitsAllocated=None, BitsStored=None, PixelData=None)  # fmt: skip
    _written(tmp_path / "mask.dcm", None, SeriesInstanceUID="8", SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4")
    series = read_stack(tmp_path)
    assert [path.name for path in series.paths] == ["b", "a", "d", "c"]
    assert (series.uid, series.modality, series.description) == ("1.2.3", "CT", "thorax")
    assert (series.step, series.is_stack, series.problems) == ((0, 0, 5), True, ())


def test_images_without_positions_are_ordered_by_their_numbers(tmp_path: Path):
    for name, number in {"a.dcm": 10, "b.dcm": 9, "c.dcm": None}.items():
        _written(tmp_path / name, None, InstanceNumber=number, Modality="CR")
    (series,) = find_series(tmp_path)
    assert ([path.name for path in series.paths], series.is_stack) == (["b.dcm", "a.dcm", "c.dcm"], False)
    with pytest.raises(DataError, match="3 images without positions"):
        read_stack(tmp_path)


def test_a_volume_in_one_file_is_no_stack_of_files(tmp_path: Path):
    _written(tmp_path / "a.dcm", (0, 0, 0), NumberOfFrames=2, PixelData=bytes(12))
    (series,) = find_series(tmp_path)
    assert (len(series.paths), series.is_stack, series.problems) == (1, False, ())


def test_series_are_told_apart(tmp_path: Path):
    for (name, number), height in itertools.product((("x", 4), ("y", 3)), (0, 1)):
        _written(tmp_path / f"{name}{height}.dcm", (0, 0, height), SeriesInstanceUID=f"1.{number}", SeriesNumber=number)
    assert [[path.name for path in series.paths] for series in find_series(tmp_path)] == [
        ["y0.dcm", "y1.dcm"],
        ["x0.dcm", "x1.dcm"],
    ]
    with pytest.raises(DataError, match="holds 2 series: 2 × CT 'thorax'; 2 × CT") as caught:
        read_stack(tmp_path)
    assert caught.value.hint == "give each series its own folder"


def test_a_missing_slice_is_noticed(tmp_path: Path):
    for height in (0, 1, 2, 4):
        _written(tmp_path / f"{height}.dcm", (0, 0, height))
    (series,) = find_series(tmp_path)
    assert len(series.problems) == 1
    with pytest.raises(
        DataError, match=r"is not one stack of slices: a gap, .*2 mm between 2\.dcm and 4\.dcm"
    ) as caught:
        read_stack(tmp_path)
    assert "send the series again" in caught.value.hint
    _written(tmp_path / "3.dcm", None)
    with pytest.raises(DataError, match=r"no position or orientation in 3\.dcm"):
        read_stack(tmp_path)


def test_folders_without_images(tmp_path: Path):
    with pytest.raises(DataError, match="There is no folder"):
        find_series(tmp_path / "missing")
    (tmp_path / "slice.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"slice\.png is a file, expected the folder of a series"):
        survey_series(tmp_path / "slice.png")
    with pytest.raises(DataError, match="holds no DICOM image"):
        find_series(tmp_path)
    (tmp_path / "a.dcm").write_bytes(b"words")
    with pytest.raises(DataError, match=r"a\.dcm"):
        find_series(tmp_path)
