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
from tmca.imaging.dicom import report
from tmca.imaging.dicom.report import write_report
from tmca.imaging.dicom.results import ResultContext
from tmca.imaging.dicom.segmentation import write_segmentation

hd = pytest.importorskip("highdicom", reason="DICOM results need highdicom")

SIZE = (9, 13)
MASK = np.zeros(SIZE, bool)
MASK[2:5, 3:7] = True
MASK[7, 12] = True


def _measured(path: Path) -> list[list[tuple[str, float, str]]]:
    """Return what highdicom reads: for each group, name, value and unit of its measurements."""
    content = hd.sr.srread(path).content
    groups = (
        content.get_planar_roi_measurement_groups()
        + content.get_volumetric_roi_measurement_groups()
        + content.get_image_measurement_groups()
    )
    return [[(each.name.meaning, each.value, each.unit.value) for each in group.get_measurements()] for group in groups]


@pytest.mark.parametrize("with_segmentation", [True, False])
def test_an_image(tmp_path: Path, draw_dicom: Callable, context: ResultContext, with_segmentation: bool):
    path = draw_dicom(tmp_path / "a.dcm", np.zeros(SIZE, np.uint8), "DX", PixelSpacing=[0.5, 2.0])
    segmentation = tmp_path / "seg.dcm" if with_segmentation else None
    if segmentation:
        write_segmentation(segmentation, [path], [MASK], context)
    probability = np.where(MASK, 0.75, 0.1)
    uid = write_report(
        tmp_path / "out.dcm", [path], [MASK], context, probabilities=[probability], segmentation=segmentation
    )
    assert _measured(tmp_path / "out.dcm") == [
        [("Number of regions", 2, "1"), ("Area", 13, "mm2"), ("Fractional Probabilistic Segmentation", 0.75, "1")]
    ]
    written = pydicom.dcmread(tmp_path / "out.dcm")
    assert written.SOPInstanceUID == uid
    assert str(written.PatientName) == "Müller^Änne"
    assert (written.CompletionFlag, written.VerificationFlag) == ("COMPLETE", "UNVERIFIED")
    assert written.ContentQualification == "RESEARCH"
    assert b"John Smith" not in (tmp_path / "out.dcm").read_bytes()


def test_it_refers_to_the_segmentation_and_its_image(tmp_path: Path, draw_dicom: Callable, context: ResultContext):
    path = draw_dicom(tmp_path / "a.dcm", np.zeros(SIZE, np.uint8))
    write_segmentation(tmp_path / "seg.dcm", [path], [MASK], context)
    write_report(tmp_path / "out.dcm", [path], [MASK], context, segmentation=tmp_path / "seg.dcm")
    segmentation = pydicom.dcmread(tmp_path / "seg.dcm")
    (group,) = hd.sr.srread(tmp_path / "out.dcm").content.get_planar_roi_measurement_groups()
    assert group.tracking_uid == segmentation.SegmentSequence[0].TrackingUID
    assert group.finding_type.value == "68496003"
    assert group.finding_sites[0].value.value == "71854001"
    written = pydicom.dcmread(tmp_path / "out.dcm")
    (study,) = written.CurrentRequestedProcedureEvidenceSequence
    referred = {
        instance.ReferencedSOPInstanceUID
        for series in study.ReferencedSeriesSequence
        for instance in series.ReferencedSOPSequence
    }
    assert referred == {segmentation.SOPInstanceUID, pydicom.dcmread(path).SOPInstanceUID}


def test_a_stack_has_a_volume(tmp_path: Path, draw_slices: Callable, context: ResultContext):
    paths = draw_slices(tmp_path / "ct", np.zeros((3, *SIZE), np.int16))
    masks = [MASK, MASK & False, MASK]
    write_segmentation(tmp_path / "seg.dcm", paths, masks, context)
    for segmentation in (None, tmp_path / "seg.dcm"):
        write_report(tmp_path / "out.dcm", paths, masks, context, segmentation=segmentation)
        volume = 26 * 0.5 * 0.25 * 2.5
        assert _measured(tmp_path / "out.dcm") == [[("Number of regions", 4, "1"), ("Volume", volume, "mm3")]]
    procedure = hd.sr.srread(tmp_path / "out.dcm").content[0].ContentSequence
    assert any(
        item.ValueType == "CODE" and item.ConceptCodeSequence[0].CodeMeaning == "Computed tomography"
        for item in procedure
    )


def test_frames_of_a_sequence_one_by_one(tmp_path: Path, draw_dicom: Callable, context: ResultContext):
    path = draw_dicom(tmp_path / "a.dcm", np.zeros((3, *SIZE, 3), np.uint8), "US sequence")
    masks = [MASK, MASK & False]
    sources = [f"{path}#2", f"{path}#0"]
    write_segmentation(tmp_path / "seg.dcm", sources, masks, context)
    for segmentation in (None, tmp_path / "seg.dcm"):
        write_report(tmp_path / "out.dcm", sources, masks, context, segmentation=segmentation)
        assert _measured(tmp_path / "out.dcm") == [[("Number of regions", 2, "1")], [("Number of regions", 0, "1")]]
    groups = hd.sr.srread(tmp_path / "out.dcm").content.get_planar_roi_measurement_groups()
    references = [group.reference_type.value for group in groups]
    assert references == ["121214", "121214"]


def _comment(path: Path) -> str:
    items = pydicom.dcmread(path).ContentSequence
    (item,) = [each for each in items if each.ConceptNameCodeSequence[0].CodeMeaning == "Comment"]
    return str(item.TextValue)


@pytest.mark.parametrize(
    ("tags", "mask", "name", "comment"),
    [
        ({}, MASK, None, "Research only; not a medical device. The size of a pixel is unknown."),
        (
            {"ImagerPixelSpacing": [1, 1]},
            MASK,
            "Area at the detector",
            "Research only; not a medical device. The area is measured at the detector; in the patient it is smaller.",
        ),
        (
            {"NominalScannedPixelSpacing": [1, 1]},
            MASK,
            "Area on the scanned film",
            "Research only; not a medical device. The area is measured on the scanned film.",
        ),
        (
            {"PixelSpacing": [1, 1]},
            MASK & False,
            "Area",
            "Research only; not a medical device. No region was found.",
        ),
    ],
)
def test_what_an_area_is_and_what_it_is_not(
    tmp_path: Path,
    draw_dicom: Callable,
    context: ResultContext,
    tags: dict,
    mask: np.ndarray,
    name: str | None,
    comment: str,
):
    path = draw_dicom(tmp_path / "a.dcm", np.zeros(SIZE, np.uint8), **tags)
    probability = np.full(SIZE, 0.4)
    write_report(tmp_path / "out.dcm", [path], [mask], context, probabilities=[probability])
    (values,) = _measured(tmp_path / "out.dcm")
    names = [each[0] for each in values]
    assert names[0] == "Number of regions"
    assert ("Fractional Probabilistic Segmentation" in names) == bool(mask.any())
    assert [each for each in names if each.startswith("Area")] == ([] if name is None else [name])
    assert _comment(tmp_path / "out.dcm") == comment


def test_equal_input_gives_equal_files(tmp_path: Path, draw_slices: Callable, context: ResultContext):
    paths = draw_slices(tmp_path / "ct", np.zeros((2, *SIZE), np.int16))
    uids = {write_report(tmp_path / name, paths, [MASK] * 2, context) for name in ("a.dcm", "b.dcm")}
    assert len(uids) == 1
    assert (tmp_path / "a.dcm").read_bytes() == (tmp_path / "b.dcm").read_bytes()
    assert write_report(tmp_path / "c.dcm", paths, [MASK, MASK & False], context) not in uids


def test_a_segmentation_of_something_else(tmp_path: Path, draw_dicom: Callable, context: ResultContext):
    path = draw_dicom(tmp_path / "a.dcm", np.zeros(SIZE, np.uint8))
    other = draw_dicom(tmp_path / "b.dcm", np.zeros(SIZE, np.uint8))
    write_segmentation(tmp_path / "seg.dcm", [other], [MASK], context)
    for wrong, reason in {"seg.dcm": "belongs to other images", "b.dcm": "is no DICOM SEG"}.items():
        with pytest.raises(DataError, match=reason):
            write_report(tmp_path / "out.dcm", [path], [MASK], context, segmentation=tmp_path / wrong)
    assert not (tmp_path / "out.dcm").exists()


def test_a_report_that_is_not_what_was_meant_does_not_stay(
    tmp_path: Path, draw_dicom: Callable, context: ResultContext, monkeypatch: pytest.MonkeyPatch
):
    path = draw_dicom(tmp_path / "a.dcm", np.zeros(SIZE, np.uint8))
    original = report._build
    wrong = ["NUM"]

    def build(*args: Any) -> Any:
        result, numbers = original(*args)
        for item in report._content(result):
            if item.ValueType == wrong[0] == "NUM":
                item.MeasuredValueSequence[0].NumericValue = 17
            if item.ValueType == wrong[0] == "IMAGE":
                item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID = "1.2.3"
        return result, numbers

    monkeypatch.setattr(report, "_build", build)
    for wrong[0], reason in (("NUM", "the measurements"), ("IMAGE", "it refers to other images")):
        with pytest.raises(DataError, match=reason):
            write_report(tmp_path / "out" / "a.dcm", [path], [MASK], context)
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("tool", ["dciodvfy", "dsrdump"])
@pytest.mark.parametrize("kind", ["image", "stack", "sequence"])
def test_other_programs_find_nothing_wrong(
    tmp_path: Path, draw_dicom: Callable, draw_slices: Callable, context: ResultContext, tool: str, kind: str
):
    program = shutil.which(tool)
    if program is None:
        pytest.skip(f"{tool} is not installed (Debian packages dcmtk and dicom3tools)")
    sources = {
        "image": lambda: [draw_dicom(tmp_path / "a.dcm", np.zeros(SIZE, np.uint8), ImagerPixelSpacing=[1, 1])],
        "stack": lambda: draw_slices(tmp_path / "ct", np.zeros((2, *SIZE), np.int16)),
        "sequence": lambda: [
            f"{draw_dicom(tmp_path / 'b.dcm', np.zeros((2, *SIZE, 3), np.uint8), 'US sequence')}#{n}" for n in (0, 1)
        ],
    }[kind]()
    masks = [MASK] * len(sources)
    maps = [np.full(SIZE, 0.5)] * len(sources)
    write_segmentation(tmp_path / "seg.dcm", sources, masks, context)
    for segmentation in (tmp_path / "seg.dcm", None):
        path = tmp_path / "out.dcm"
        write_report(path, sources, masks, context, probabilities=maps, segmentation=segmentation)
        options = ["-new"] if tool == "dciodvfy" else []
        result = subprocess.run(
            [program, *options, str(path)], capture_output=True, text=True, errors="replace", check=False
        )
        assert result.returncode == 0, result.stderr
        lines = [line for line in result.stderr.splitlines() if line.startswith(("Error", "Warning", "E:", "W:"))]
        # That a private coding scheme is private is all that it may say.
        assert [line for line in lines if "Unrecognized defined term = <99TMCA>" not in line] == []
        if tool == "dsrdump":
            assert "Number of regions" in result.stdout
