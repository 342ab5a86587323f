from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from tmca.errors import DataError
from tmca.imaging.dicom import capture, read_frames
from tmca.imaging.dicom.capture import draw_capture, write_capture
from tmca.imaging.dicom.results import ResultContext
from tmca.imaging.overlay import PREDICTION_COLOUR

pytest.importorskip("highdicom", reason="DICOM results need highdicom")

SIZE = (60, 80)
MASK = np.zeros(SIZE, bool)
MASK[20:40, 30:50] = True
GREY = np.random.default_rng(0).integers(0, 4096, SIZE).astype(np.uint16)


def _yellow(picture: np.ndarray) -> np.ndarray:
    return (picture == PREDICTION_COLOUR).all(axis=-1)


def test_the_region_is_not_covered_and_the_rest_of_the_image_stays():
    image = np.full((*SIZE, 3), 100, np.uint8)
    drawn = draw_capture(image, MASK, ["Polyp: 1 region"])
    assert drawn.shape[0] > SIZE[0]
    assert drawn.shape[1] == SIZE[1]
    above = drawn[: SIZE[0]]
    assert (above[MASK] == 100).all()
    changed = (above != 100).any(axis=2)
    assert changed[10:50, 20:60].sum() == changed.sum()
    down, right = np.indices(SIZE)
    away = np.maximum(0, np.maximum(20 - down, down - 39)) + np.maximum(0, np.maximum(30 - right, right - 49))
    np.testing.assert_array_equal(_yellow(above), (away == 1) | (away == 2))
    assert (above[away == 3] == 0).all()  # dark outside, so that it is seen on bright ground


def test_text_stands_below_the_image_and_wraps():
    image = np.zeros((*SIZE, 3), np.uint8)
    heights = [draw_capture(image, MASK, [text]).shape[0] for text in ("a", "a " * 40)]
    assert heights[1] > heights[0] > SIZE[0]
    picture = draw_capture(image, MASK & False, ["first", "second"])
    assert not picture[: SIZE[0]].any()
    assert _yellow(picture[SIZE[0] :]).any()
    assert (picture[SIZE[0] :].min(axis=2) > 200).any()


@pytest.mark.parametrize("size", [(512, 512), (3000, 2500)])
def test_lines_and_letters_grow_with_the_image(size: tuple[int, int]):
    mask = np.zeros(size, bool)
    mask[size[0] // 3 : size[0] // 2, size[1] // 3 : size[1] // 2] = True
    picture = draw_capture(np.zeros((*size, 3), np.uint8), mask, ["Polyp"])
    column = _yellow(picture)[: size[0], size[1] * 2 // 5]
    assert column.sum() == pytest.approx(2 * min(size) / 250, abs=1)
    letters = np.flatnonzero(picture[size[0] :].any(axis=(1, 2)))
    assert 0.02 * size[1] < len(letters) < 0.06 * size[1]


def test_a_mask_at_the_edge():
    picture = draw_capture(np.zeros((*SIZE, 3), np.uint8), np.ones(SIZE, bool), ["all"])
    assert not picture[: SIZE[0]].any()


@pytest.mark.parametrize("kind", ["CR", "ES"])
def test_an_image(tmp_path: Path, draw_dicom: Callable, context: ResultContext, kind: str):
    pixels = GREY if kind == "CR" else np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    tags: dict[str, Any] = {"PhotometricInterpretation": "MONOCHROME1"} if kind == "CR" else {}
    path = draw_dicom(tmp_path / "a.dcm", pixels, kind, **tags)
    uid = write_capture(tmp_path / "out.dcm", [path], [MASK], context)
    written = pydicom.dcmread(tmp_path / "out.dcm")
    assert (written.SOPInstanceUID, written.SOPClassUID) == (uid, "1.2.840.10008.5.1.4.1.1.7")
    assert (written.PhotometricInterpretation, written.BitsStored) == ("RGB", 8)
    shown = read_frames(path)[0].pixels
    np.testing.assert_array_equal(written.pixel_array[: SIZE[0]][MASK], shown[MASK])
    np.testing.assert_array_equal(written.pixel_array[:10], shown[:10])
    assert str(written.PatientName) == "Müller^Änne"
    assert written.SourceImageSequence[0].ReferencedSOPInstanceUID == pydicom.dcmread(path).SOPInstanceUID
    assert (written.ContentQualification, written.ImageComments) == ("RESEARCH", "Research only; not a medical device.")
    assert b"John Smith" not in (tmp_path / "out.dcm").read_bytes()


def test_what_stands_in_the_band(
    tmp_path: Path, draw_dicom: Callable, context: ResultContext, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[list[str]] = []
    original = capture.draw_capture
    monkeypatch.setattr(
        capture,
        "draw_capture",
        lambda image, mask, lines: (drawn.append(list(lines)), original(image, mask, lines))[1],
    )
    path = draw_dicom(tmp_path / "a.dcm", GREY, PixelSpacing=[1, 1])
    write_capture(tmp_path / "out.dcm", [path], [MASK], context)
    write_capture(tmp_path / "out.dcm", [path], [MASK & False], context)
    end = ["Research only; not a medical device", "Drawn by a program: tmca-test 1.2.3"]
    assert drawn == [["Polyp: 1 region, 4 square cm", *end], ["Polyp: no region found", *end]]


def test_a_window_is_applied(tmp_path: Path, draw_dicom: Callable, context: ResultContext):
    path = draw_dicom(tmp_path / "a.dcm", GREY)
    write_capture(tmp_path / "out.dcm", [path], [MASK & False], context, window=(1000.0, 200.0))
    shown = read_frames(path, window=(1000.0, 200.0))[0].pixels
    np.testing.assert_array_equal(pydicom.dcmread(tmp_path / "out.dcm").pixel_array[: SIZE[0]], shown)


def test_slices_become_frames_from_the_feet_up(tmp_path: Path, draw_slices: Callable, context: ResultContext):
    volume = np.stack([np.full(SIZE, shade, np.int16) for shade in (10, 20, 30)])
    paths = draw_slices(tmp_path / "ct", volume, step=(0, 0, -2), WindowCenter=20.5, WindowWidth=41)
    masks = [MASK, MASK & False, MASK & False]
    write_capture(tmp_path / "out.dcm", [paths[1], paths[0], paths[2]], [masks[1], masks[0], masks[2]], context)
    written = pydicom.dcmread(tmp_path / "out.dcm")
    assert (written.SOPClassUID, written.NumberOfFrames) == ("1.2.840.10008.5.1.4.1.1.7.4", 3)
    pictures = written.pixel_array
    shades = [int(read_frames(path)[0].pixels[0, 0, 0]) for path in reversed(paths)]
    assert len(set(shades)) == 3
    assert pictures[:, 0, 0, 0].tolist() == shades
    assert [bool(_yellow(picture[: SIZE[0]]).any()) for picture in pictures] == [False, False, True]


@pytest.mark.parametrize(("said", "expected"), [("NO", "NO"), ("YES", "YES"), (None, "YES")])
def test_burned_in_names_are_not_denied(
    tmp_path: Path, draw_dicom: Callable, context: ResultContext, said: str | None, expected: str
):
    path = draw_dicom(tmp_path / "a.dcm", GREY, BurnedInAnnotation=said)
    write_capture(tmp_path / "out.dcm", [path], [MASK], context)
    assert pydicom.dcmread(tmp_path / "out.dcm").BurnedInAnnotation == expected


def test_equal_input_gives_equal_files(tmp_path: Path, draw_dicom: Callable, context: ResultContext):
    path = draw_dicom(tmp_path / "a.dcm", GREY)
    uids = {write_capture(tmp_path / name, [path], [MASK], context) for name in ("b.dcm", "c.dcm")}
    assert len(uids) == 1
    assert (tmp_path / "b.dcm").read_bytes() == (tmp_path / "c.dcm").read_bytes()


def test_a_picture_that_is_not_what_was_meant_does_not_stay(
    tmp_path: Path, draw_dicom: Callable, context: ResultContext, monkeypatch: pytest.MonkeyPatch
):
    path = draw_dicom(tmp_path / "a.dcm", GREY)
    original = capture._build

    def build(*args: Any) -> pydicom.Dataset:
        result = original(*args)
        result.PixelData = bytes([result.PixelData[0] ^ 1]) + result.PixelData[1:]
        return result

    monkeypatch.setattr(capture, "_build", build)
    with pytest.raises(DataError, match="pixels of the picture"):
        write_capture(tmp_path / "out" / "a.dcm", [path], [MASK], context)
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(DataError, match="There are 2 masks for 1 images"):
        write_capture(tmp_path / "out" / "a.dcm", [path], [MASK] * 2, context)


@pytest.mark.parametrize("tool", ["dciodvfy", "dcmdump"])
@pytest.mark.parametrize("kind", ["image", "stack", "sequence"])
def test_other_programs_find_nothing_wrong(
    tmp_path: Path, draw_dicom: Callable, draw_slices: Callable, context: ResultContext, tool: str, kind: str
):
    program = shutil.which(tool)
    if program is None:
        pytest.skip(f"{tool} is not installed (Debian packages dcmtk and dicom3tools)")
    sources = {
        "image": lambda: [draw_dicom(tmp_path / "a.dcm", GREY, Laterality="R")],
        "stack": lambda: draw_slices(tmp_path / "ct", np.zeros((2, *SIZE), np.int16), Laterality="R"),
        "sequence": lambda: [
            f"{draw_dicom(tmp_path / 'b.dcm', np.zeros((2, *SIZE, 3), np.uint8), 'US sequence', Laterality='R')}#{n}"
            for n in (0, 1)
        ],
    }[kind]()
    write_capture(tmp_path / "out.dcm", sources, [MASK] * len(sources), context)
    options = ["-new"] if tool == "dciodvfy" else []
    command = [program, *options, str(tmp_path / "out.dcm")]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith(("Error", "Warning", "E:", "W:"))] == []
