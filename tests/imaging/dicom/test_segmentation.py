from __future__ import annotations

import dataclasses
import itertools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.pixels import get_encoder
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from tmca.errors import DataError, StorageError
from tmca.imaging.dicom import read_frames, segmentation
from tmca.imaging.dicom.results import ResultContext
from tmca.imaging.dicom.segmentation import check_mask, write_fractional, write_segmentation
from tmca.imaging.dicom.sources import SourceImage, SourceImages

hd = pytest.importorskip("highdicom", reason="DICOM results need highdicom")

AXES = [tuple(sign * value for value in axis) for axis in np.eye(3).tolist() for sign in (1, -1)]
ORIENTATIONS = [(*row, *column) for row, column in itertools.product(AXES, AXES) if abs(np.dot(row, column)) < 0.5]
COPIED = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "ReferringPhysicianName"),
    *("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "StudyDescription", "AccessionNumber"),
)
SIZE = (9, 13)
RANDOM = np.random.default_rng(0)


def _masks(count: int, size: tuple[int, int] = SIZE, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).random((count, *size)) > 0.6)


@pytest.fixture
def kinds(
    tmp_path: Path, draw_dicom: Callable, draw_slices: Callable, draw_enhanced: Callable
) -> dict[str, list[Path | str]]:
    """Return the images of a result by their kind."""
    grey = RANDOM.integers(0, 4096, SIZE).astype(np.uint16)
    colours = RANDOM.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    volume = RANDOM.integers(-1000, 1000, (4, *SIZE)).astype(np.int16)
    enhanced = draw_enhanced(tmp_path / "enhanced.dcm", volume)
    sequence = draw_dicom(tmp_path / "sequence.dcm", np.stack([colours] * 4), "US sequence")
    return {
        "CR": [draw_dicom(tmp_path / "cr.dcm", grey, "CR", PhotometricInterpretation="MONOCHROME1")],
        "DX in a frame of reference": [
            draw_dicom(tmp_path / "dx.dcm", grey, "DX", FrameOfReferenceUID="1.2.3", PixelSpacing=[1, 1])
        ],
        "endoscopy": [draw_dicom(tmp_path / "es.dcm", colours, "ES", PatientOrientation=["L", "F"])],
        "secondary capture": [draw_dicom(tmp_path / "sc.dcm", colours, "OT")],
        "CT slice": draw_slices(tmp_path / "slice", volume[:1]),
        "CT slice of unknown thickness": draw_slices(tmp_path / "thin", volume[:1], SliceThickness=None),
        "CT series": draw_slices(tmp_path / "series", volume),
        "enhanced CT": [enhanced],
        "frames of an enhanced CT": [f"{enhanced}#1", f"{enhanced}#2"],
        "a frame of an enhanced CT": [f"{enhanced}#2"],
        "sequence": [sequence],
        "frames of a sequence": [f"{sequence}#3", f"{sequence}#1"],
        "a frame of a sequence": [f"{sequence}#2"],
    }


COUNTS = {"CT series": 4, "enhanced CT": 4, "frames of an enhanced CT": 2, "sequence": 4, "frames of a sequence": 2}
KINDS = [
    "CR",
    "DX in a frame of reference",
    "endoscopy",
    "secondary capture",
    "CT slice",
    "CT slice of unknown thickness",
    "CT series",
    "enhanced CT",
    "frames of an enhanced CT",
    "a frame of an enhanced CT",
    "sequence",
    "frames of a sequence",
    "a frame of a sequence",
]


def _sources(paths: list[Path | str]) -> list[tuple[str, int | None]]:
    """Return UID and frame number, as DICOM counts, of each image that is meant."""
    found: list[tuple[str, int | None]] = []
    for path in paths:
        name, _, number = str(path).partition("#")
        header = pydicom.dcmread(name)
        frames = [int(number)] if number else range(int(header.get("NumberOfFrames", 1)))
        found += [(header.SOPInstanceUID, frame + 1 if "NumberOfFrames" in header else None) for frame in frames]
    return found


def _by_source(path: Path, sources: list[tuple[str, int | None]]) -> np.ndarray:
    """Return a segmentation's frames in the order of the images, as highdicom's own reader finds them."""
    read = hd.seg.segread(path)
    if sources[0][1] is None:
        uids = [uid for uid, _ in sources]
        return read.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=False)[..., 0]
    numbers = [number for _, number in sources]
    return read.get_pixels_by_source_frame(sources[0][0], numbers)[..., 0]


@pytest.mark.parametrize("kind", KINDS)
def test_masks_come_back_on_the_images_they_were_drawn_on(
    kinds: dict[str, list], kind: str, tmp_path: Path, context: ResultContext
):
    paths = kinds[kind]
    masks = _masks(COUNTS.get(kind, 1))
    uid = write_segmentation(tmp_path / "out.dcm", paths, masks, context)
    written = pydicom.dcmread(tmp_path / "out.dcm")
    assert written.SOPInstanceUID == uid
    assert (written.Rows, written.Columns) == SIZE
    np.testing.assert_array_equal(_by_source(tmp_path / "out.dcm", _sources(paths)), masks)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_come_back_within_half_a_step(
    kinds: dict[str, list], kind: str, tmp_path: Path, context: ResultContext
):
    paths = kinds[kind]
    maps = list(RANDOM.random((COUNTS.get(kind, 1), *SIZE)).astype(np.float32))
    write_fractional(tmp_path / "out.dcm", paths, maps, context)
    written = pydicom.dcmread(tmp_path / "out.dcm")
    assert (written.SegmentationType, written.SegmentationFractionalType) == ("FRACTIONAL", "PROBABILITY")
    read = _by_source(tmp_path / "out.dcm", _sources(paths))
    assert np.abs(read - np.stack(maps)).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_mask_is_a_result(kinds: dict[str, list], kind: str, tmp_path: Path, context: ResultContext):
    count = COUNTS.get(kind, 1)
    write_segmentation(tmp_path / "out.dcm", kinds[kind], [np.zeros(SIZE, bool)] * count, context)
    written = pydicom.dcmread(tmp_path / "out.dcm")
    assert written.NumberOfFrames == count
    assert not written.pixel_array.any()


@pytest.mark.parametrize("tool", ["dciodvfy", "dcmdump", "dcmftest"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_programs_find_nothing_wrong(
    kinds: dict[str, list], kind: str, tool: str, tmp_path: Path, context: ResultContext
):
    program = shutil.which(tool)
    if program is None:
        pytest.skip(f"{tool} is not installed (Debian packages dcmtk and dicom3tools)")
    count = COUNTS.get(kind, 1)
    write_segmentation(tmp_path / "mask.dcm", kinds[kind], _masks(count), context)
    write_fractional(tmp_path / "map.dcm", kinds[kind], [np.full(SIZE, 0.5)] * count, context)
    for path in (tmp_path / "mask.dcm", tmp_path / "map.dcm"):
        options = ["-new"] if tool == "dciodvfy" else []
        result = subprocess.run(
            [program, *options, str(path)], capture_output=True, text=True, errors="replace", check=False
        )
        assert result.returncode == 0, result.stderr
        complaints = [line for line in result.stderr.splitlines() if line.startswith(("Error", "Warning", "E:", "W:"))]
        assert complaints == []


@settings(max_examples=60)
@given(
    orientation=st.sampled_from(ORIENTATIONS),
    angle=st.floats(-0.6, 0.6),
    spacing=st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)).map(lambda pair: [round(value, 3) for value in pair]),
    step=st.sampled_from([-2.5, 0.7, 3.0]),
    count=st.integers(1, 4),
    size=st.tuples(st.integers(1, 11), st.integers(8, 12)),
    dtype=st.sampled_from([np.uint8, np.uint16, np.int16]),
    inverted=st.booleans(),
    in_one_file=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_marked_pixel_is_found_where_it_lies_in_the_patient(
    draw_slices: Callable,
    draw_enhanced: Callable,
    context: ResultContext,
    orientation: tuple,
    angle: float,
    spacing: list,
    step: float,
    count: int,
    size: tuple,
    dtype: type,
    inverted: bool,
    in_one_file: bool,
    seed: int,
):
    """The mask is made from what is read, upright, and looked up where the standard puts the stored pixel."""
    random = np.random.default_rng(seed)
    bright = random.random((count, *size)) > 0.7
    volume = np.where(bright != inverted, 120, 0).astype(dtype)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    along_row, along_column = (turn @ np.reshape(orientation, (2, 3)).T).T.round(8)
    normal = np.cross(along_row, along_column).round(8)
    tags: dict[str, Any] = {
        "PhotometricInterpretation": "MONOCHROME1" if inverted else "MONOCHROME2",
        "WindowCenter": 60,
        "WindowWidth": 120,
    }
    with TemporaryDirectory() as name:
        folder = Path(name)
        if in_one_file:
            paths = [draw_enhanced(folder / "a.dcm", volume, heights=[step * place for place in range(count)], **tags)]
            masks = [frame.pixels[:, :, 0] > 127 for frame in read_frames(paths[0])]
        else:
            oblique = [*along_row, *along_column]
            paths = draw_slices(folder, volume, oblique, spacing, (step * normal).round(8), **tags)
            order = random.permutation(count)
            paths = [paths[place] for place in order]
            masks = [read_frames(path)[0].pixels[:, :, 0] > 127 for path in paths]
        write_segmentation(folder / "out.dcm", paths, masks, context)
        written = pydicom.dcmread(folder / "out.dcm")
        frames = written.pixel_array.reshape(-1, *size)
        headers = {pydicom.dcmread(path).SOPInstanceUID: pydicom.dcmread(path) for path in paths}
    shared = written.SharedFunctionalGroupsSequence[0]
    assert len(frames) == count
    for frame, groups in zip(frames, written.PerFrameFunctionalGroupsSequence, strict=True):
        reference = groups.DerivationImageSequence[0].SourceImageSequence[0]
        header = headers[reference.ReferencedSOPInstanceUID]
        if in_one_file:
            own = header.PerFrameFunctionalGroupsSequence[reference.get("ReferencedFrameNumber", 1) - 1]
            position = own.PlanePositionSequence[0].ImagePositionPatient
            common = header.SharedFunctionalGroupsSequence[0]
            cosines = common.PlaneOrientationSequence[0].ImageOrientationPatient
            distances = common.PixelMeasuresSequence[0].PixelSpacing
            stored = header.pixel_array.reshape(-1, *size)[reference.get("ReferencedFrameNumber", 1) - 1]
        else:
            position, cosines = header.ImagePositionPatient, header.ImageOrientationPatient
            distances, stored = header.PixelSpacing, header.pixel_array
        np.testing.assert_array_equal(frame, (stored > 60) != inverted)
        for written_values, meant in (
            (groups.PlanePositionSequence[0].ImagePositionPatient, position),
            (shared.PlaneOrientationSequence[0].ImageOrientationPatient, cosines),
            (shared.PixelMeasuresSequence[0].PixelSpacing, distances),
        ):
            np.testing.assert_allclose(written_values, meant, rtol=0, atol=1e-9)
    assert written.FrameOfReferenceUID == next(iter(headers.values())).FrameOfReferenceUID


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_compressed_sources(tmp_path: Path, draw_dicom: Callable, context: ResultContext, syntax: pydicom.uid.UID):
    if not get_encoder(syntax).is_available:
        pytest.skip(f"no encoder for {syntax.name}")
    path = draw_dicom(tmp_path / "a.dcm", np.add.outer(np.arange(32), np.arange(48)).astype(np.uint16))
    dataset = pydicom.dcmread(path)
    dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(path)
    mask = read_frames(path)[0].pixels[:, :, 0] > 127
    assert mask.any()
    write_segmentation(tmp_path / "out.dcm", [path], [mask], context)
    np.testing.assert_array_equal(pydicom.dcmread(tmp_path / "out.dcm").pixel_array, mask)


def test_the_sources_are_looked_through_a_fixed_number_of_times(
    tmp_path: Path, draw_slices: Callable, context: ResultContext, monkeypatch: pytest.MonkeyPatch
):
    original = SourceImages.thickness
    asked: list[SourceImage] = []
    monkeypatch.setattr(SourceImages, "thickness", lambda self, image: (asked.append(image), original(self, image))[1])

    def times(count: int) -> int:
        asked.clear()
        paths = draw_slices(tmp_path / str(count), np.zeros((count, *SIZE), np.int16))
        write_segmentation(tmp_path / "out.dcm", paths, _masks(count), context)
        return len(asked)

    assert times(12) <= 3 * times(4)


def test_what_the_file_says_about_itself(tmp_path: Path, draw_dicom: Callable, context: ResultContext):
    path = draw_dicom(tmp_path / "a.dcm", np.zeros(SIZE, np.uint8), "ES")
    write_segmentation(tmp_path / "out.dcm", [path], _masks(1), context)
    source, written = pydicom.dcmread(path), pydicom.dcmread(tmp_path / "out.dcm")
    for keyword in COPIED:
        assert written[keyword].value == source[keyword].value, keyword
    assert written.SeriesInstanceUID != source.SeriesInstanceUID
    assert written.Modality == "SEG"
    assert written.ContentQualification == "RESEARCH"
    assert written.ContentDescription == "Research only; not a medical device"
    assert "research only, not a medical device" in written.SeriesDescription
    assert (written.Manufacturer, written.ManufacturerModelName) == ("tmca", "tmca-test")
    assert (written.SoftwareVersions, written.DeviceSerialNumber) == ("1.2.3", "0123456789abcdef")
    (segment,) = written.SegmentSequence
    assert segment.SegmentLabel == "Polyp"
    assert segment.SegmentAlgorithmType == "SEMIAUTOMATIC"
    assert segment.SegmentAlgorithmName == "tmca-test"
    for sequence, expected in {
        "SegmentedPropertyCategoryCodeSequence": ("SCT", "49755003", "Morphologically Abnormal Structure"),
        "SegmentedPropertyTypeCodeSequence": ("SCT", "68496003", "Polyp of colon"),
        "AnatomicRegionSequence": ("SCT", "71854001", "Colon"),
    }.items():
        (code,) = segment[sequence].value
        assert (code.CodingSchemeDesignator, code.CodeValue, code.CodeMeaning) == expected


def test_the_sentence_stays_out_unless_it_is_asked_for(tmp_path: Path, draw_dicom: Callable, context: ResultContext):
    path = draw_dicom(tmp_path / "a.dcm", np.zeros(SIZE, np.uint8))
    write_segmentation(tmp_path / "out.dcm", [path], _masks(1), context)
    assert b"John Smith" not in (tmp_path / "out.dcm").read_bytes()
    asked = dataclasses.replace(context, prompt="un polype, vu à gauche", prompt_in_description=True)
    write_segmentation(tmp_path / "with.dcm", [path], _masks(1), asked)
    written = pydicom.dcmread(tmp_path / "with.dcm")
    assert written.SegmentSequence[0].SegmentDescription.endswith("Prompt: un polype, vu à gauche")
    assert written.SpecificCharacterSet == "ISO_IR 192"
    assert str(written.PatientName) == "Müller^Änne"  # Latin 1 in the source


def test_equal_input_gives_equal_files(tmp_path: Path, draw_slices: Callable, context: ResultContext):
    paths = draw_slices(tmp_path / "ct", np.zeros((3, *SIZE), np.int16))
    masks = _masks(3)
    for name in ("a", "b"):
        write_segmentation(tmp_path / f"{name}.dcm", paths, masks, context)
    assert (tmp_path / "a.dcm").read_bytes() == (tmp_path / "b.dcm").read_bytes()


def test_uids_change_with_what_they_stand_for(tmp_path: Path, draw_dicom: Callable, context: ResultContext):
    path = draw_dicom(tmp_path / "a.dcm", np.zeros(SIZE, np.uint8))
    other = draw_dicom(tmp_path / "b.dcm", np.zeros(SIZE, np.uint8))
    elsewhere = draw_dicom(tmp_path / "c.dcm", np.zeros(SIZE, np.uint8), SeriesInstanceUID="1.2.9")
    moved = tmp_path / "moved.dcm"
    shutil.copy(path, moved)

    def uids(source: Path, seed: int = 0, **changes: Any) -> tuple[str, str]:
        changed = dataclasses.replace(context, **changes)
        write_segmentation(tmp_path / "out.dcm", [source], _masks(1, seed=seed), changed)
        written = pydicom.dcmread(tmp_path / "out.dcm")
        assert written.SOPInstanceUID.is_valid
        assert written.SeriesInstanceUID.is_valid
        return written.SeriesInstanceUID, written.SOPInstanceUID

    series, instance = uids(path)
    assert uids(moved) == (series, instance)
    assert uids(other)[0] == series
    for changed in (
        *(uids(path, **change) for change in ({"model_hash": "f"}, {"prompt": "two polyps"}, {"target": "lesion"})),
        uids(path, model_version="2"),
        uids(elsewhere),
    ):
        assert changed[0] != series
        assert changed[1] != instance
    for changed in (uids(other), uids(path, seed=1), uids(path, corrected=True)):
        assert changed == (series, changed[1])
        assert changed[1] != instance


def test_a_file_that_is_not_what_was_meant_does_not_stay(
    tmp_path: Path, draw_slices: Callable, context: ResultContext, monkeypatch: pytest.MonkeyPatch
):
    paths = draw_slices(tmp_path / "ct", np.zeros((3, *SIZE), np.int16))
    original = segmentation._build

    def spoiled(change: Callable[[pydicom.Dataset], None]) -> None:
        def build(*args: Any) -> pydicom.Dataset:
            result = original(*args)
            change(result)
            return result

        monkeypatch.setattr(segmentation, "_build", build)

    def pixel(result: pydicom.Dataset) -> None:
        result.PixelData = bytes([result.PixelData[0] ^ 1]) + result.PixelData[1:]

    def exchanged(result: pydicom.Dataset) -> None:
        first, second, third = result.PerFrameFunctionalGroupsSequence
        result.PerFrameFunctionalGroupsSequence = [second, first, third]

    def moved(result: pydicom.Dataset) -> None:
        result.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence[0].ImagePositionPatient = [0, 0, 0]

    def twice(result: pydicom.Dataset) -> None:
        first, second, _ = result.PerFrameFunctionalGroupsSequence
        result.PerFrameFunctionalGroupsSequence = [first, second, second]

    def cut(result: pydicom.Dataset) -> None:
        result.PixelData = result.PixelData[:4]

    def unreadable(result: pydicom.Dataset) -> None:
        del result.BitsAllocated

    for change, reason in {
        pixel: r"1 pixels of the mask of 00\d.dcm",
        exchanged: "pixels of the mask of",
        moved: "the position of 001.dcm",
        twice: "3 frames for 3 of 3 images",
        cut: "was read back and differs",
        unreadable: "was read back and differs",
    }.items():
        spoiled(change)
        with pytest.raises(DataError, match=reason) as caught:
            write_segmentation(tmp_path / "out" / "mask.dcm", paths, _masks(3), context)
        assert "please report it" in caught.value.hint
        assert list((tmp_path / "out").iterdir()) == []


def test_a_result_of_another_patient_does_not_stay(
    tmp_path: Path, draw_dicom: Callable, context: ResultContext, monkeypatch: pytest.MonkeyPatch
):
    path = draw_dicom(tmp_path / "a.dcm", np.zeros(SIZE, np.uint8))
    original = segmentation._build

    def build(*args: Any) -> pydicom.Dataset:
        result = original(*args)
        result.PatientID, result.StudyDate = "P-18", "20260103"
        return result

    monkeypatch.setattr(segmentation, "_build", build)
    with pytest.raises(DataError, match="differs: PatientID, StudyDate; nothing was written"):
        write_segmentation(tmp_path / "out.dcm", [path], _masks(1), context)
    assert not (tmp_path / "out.dcm").exists()


def test_an_old_file_stays_when_a_new_one_fails(tmp_path: Path, draw_dicom: Callable, context: ResultContext):
    path = draw_dicom(tmp_path / "a.dcm", np.zeros(SIZE, np.uint8))
    out = tmp_path / "out.dcm"
    write_segmentation(out, [path], _masks(1), context)
    before = out.read_bytes()
    with pytest.raises(DataError, match="The array is 13 × 9, expected 9 × 13"):
        write_segmentation(out, [path], _masks(1, (13, 9)), context)
    with pytest.raises(DataError, match="There are 2 masks for 1 images"):
        write_segmentation(out, [path], _masks(2), context)
    for value in (np.nan, -0.1, 1.1):
        with pytest.raises(DataError, match="Probabilities outside"):
            write_fractional(out, [path], [np.full(SIZE, value)], context)
    assert out.read_bytes() == before
    with pytest.raises(StorageError):
        write_segmentation(tmp_path / "a.dcm" / "out.dcm", [path], _masks(1), context)


def test_probabilities_are_not_taken_for_a_mask():
    for values in ([0, 1, 1], [0.0, 1.0, 1.0], [False, True, True]):
        np.testing.assert_array_equal(check_mask(np.array(values)), [False, True, True])
    for wrong in ([0.1, 0.9], [0, 255], [np.nan, 0]):
        with pytest.raises(DataError, match="values other than 0 and 1") as caught:
            check_mask(np.array(wrong))
        assert "probability > 0.5" in caught.value.hint


def test_odd_values_of_the_source_are_copied_as_they_are(tmp_path: Path, draw_dicom: Callable, context: ResultContext):
    path = draw_dicom(tmp_path / "a.dcm", np.zeros(SIZE, np.uint8), PatientSex=None, StudyID=None, PatientID=None)
    dataset = pydicom.dcmread(path)
    dataset.add_new("PatientBirthDate", "LO", "12.3.1950")  # what a date may not be
    dataset.add_new("PatientSex", "LO", "female")
    dataset["PatientBirthDate"].VR, dataset["PatientSex"].VR = "DA", "CS"
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.3.4.5"  # a private kind of image
    dataset.save_as(path)
    write_segmentation(tmp_path / "out.dcm", [path], _masks(1), context)
    with pydicom.config.disable_value_validation():
        written = pydicom.dcmread(tmp_path / "out.dcm")
        assert (written.PatientBirthDate, written.PatientSex) == ("12.3.1950", "female")
    assert (written.StudyID, written.PatientID) == ("", "")
    assert written.SourceImageSequence[0].ReferencedSOPClassUID == "1.2.3.4.5"


@pytest.mark.parametrize(
    ("character_set", "name"),
    [
        ("ISO_IR 192", "Wang^XiaoDong=王^小东"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("ISO_IR 138", "שרון^דבורה"),
        (None, "Plain^Name"),
    ],
)
@pytest.mark.parametrize("own", ["plain", "é"])
def test_names_in_every_script(
    tmp_path: Path, draw_dicom: Callable, context: ResultContext, character_set: Any, name: str, own: str
):
    path = draw_dicom(
        tmp_path / "a.dcm", np.zeros(SIZE, np.uint8), SpecificCharacterSet=character_set, PatientName=name
    )
    write_segmentation(tmp_path / "out.dcm", [path], _masks(1), dataclasses.replace(context, model_name=own))
    written = pydicom.dcmread(tmp_path / "out.dcm")
    assert str(written.PatientName) == name
    assert written.ManufacturerModelName == own
    assert written.get("SpecificCharacterSet") == ("ISO_IR 192" if own == "é" else character_set)


def _draw_name(draw_dicom: Callable, path: Path, character_set: Any, name: bytes, implicit: bool = False) -> Path:
    """Draw an image whose patient has a name of bytes that need not fit its character set."""
    stand_in = "N" * len(name)
    tags = {"SpecificCharacterSet": character_set, "PatientName": stand_in, "InstitutionName": stand_in}
    draw_dicom(path, np.zeros(SIZE, np.uint8), **tags)
    if implicit:
        plain = pydicom.dcmread(path)
        plain.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        plain.save_as(path, implicit_vr=True, little_endian=True, enforce_file_format=True)
    path.write_bytes(path.read_bytes().replace(stand_in.encode(), name))
    return path


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize(
    ("character_set", "name"),
    [
        ("ISO_IR 192", b"M\xfcller^Anna"),
        (["", "ISO 2022 IR 87"], b"\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B\x1b(B"),  # with an escape too many
    ],
)
def test_a_name_keeps_its_bytes(
    tmp_path: Path, draw_dicom: Callable, context: ResultContext, character_set: Any, name: bytes, implicit: bool
):
    path = _draw_name(draw_dicom, tmp_path / "a.dcm", character_set, name, implicit)
    write_segmentation(tmp_path / "out.dcm", [path], _masks(1), context)
    written = pydicom.dcmread(tmp_path / "out.dcm")
    assert written.get_item("PatientName").value.rstrip() == name
    assert "\ufffd".encode() not in (tmp_path / "out.dcm").read_bytes()
    assert written.SpecificCharacterSet == character_set


def test_a_name_that_would_have_to_be_decoded_and_cannot_is_refused(
    tmp_path: Path, draw_dicom: Callable, context: ResultContext
):
    path = _draw_name(draw_dicom, tmp_path / "a.dcm", "GB18030", b"M\xff\xffller^Anna")
    with pytest.raises(DataError, match=r"PatientName does not fit its own character set \(GB18030\)") as caught:
        write_segmentation(tmp_path / "out.dcm", [path], _masks(1), dataclasses.replace(context, model_name="é"))
    assert "plain letters" in caught.value.hint
    assert "Anna" not in str(caught.value)
    assert not (tmp_path / "out.dcm").exists()


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_sources_of_every_encoding(
    tmp_path: Path, draw_slices: Callable, context: ResultContext, syntax: pydicom.uid.UID
):
    volume = np.arange(2 * 9 * 13, dtype=np.uint16).reshape(2, *SIZE)
    paths = draw_slices(tmp_path / "ct", volume)
    little, implicit = syntax != ExplicitVRBigEndian, syntax == ImplicitVRLittleEndian
    for path, plane in zip(paths, volume, strict=True):
        read = pydicom.dcmread(path)
        read.decode()
        dataset = pydicom.Dataset(read)
        dataset.file_meta = read.file_meta
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = plane.astype("<u2" if little else ">u2").tobytes()
        dataset.save_as(path, implicit_vr=implicit, little_endian=little, enforce_file_format=True)
        np.testing.assert_array_equal(pydicom.dcmread(path).pixel_array, plane)
    masks = _masks(2)
    write_segmentation(tmp_path / "out.dcm", paths, masks, context)
    np.testing.assert_array_equal(_by_source(tmp_path / "out.dcm", _sources(list(paths))), masks)
    assert str(pydicom.dcmread(tmp_path / "out.dcm").PatientName) == "Müller^Änne"


def test_a_missing_package_is_named(
    tmp_path: Path, draw_dicom: Callable, context: ResultContext, monkeypatch: pytest.MonkeyPatch
):
    path = draw_dicom(tmp_path / "a.dcm", np.zeros(SIZE, np.uint8))
    monkeypatch.setitem(__import__("sys").modules, "highdicom.seg", None)
    with pytest.raises(DataError, match=r"DICOM results need highdicom") as caught:
        write_segmentation(tmp_path / "out.dcm", [path], _masks(1), context)
    assert caught.value.hint == "pip install 'tmca[medical]'"
    assert not (tmp_path / "out.dcm").exists()
