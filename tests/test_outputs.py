from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

from tmca.batch import BatchOptions, predict_batch
from tmca.errors import ConfigError
from tmca.imaging.raster import read_mask
from tmca.imaging.rle import decode_mask
from tmca.inference import Predictor
from tmca.jobs import Job, make_jobs, make_series_jobs
from tmca.models import TMCA
from tmca.outputs import OUTPUT_TYPES, OutputOptions
from tmca.prediction import PredictionOptions
from tmca.reports.prompt import prompt_from_report

PROMPT = "Unilateral pulmonary infection, one infected area, lower left lung."
DICOM = ("dicom-seg", "dicom-fractional", "dicom-sr", "dicom-sc")


@pytest.fixture(scope="module")
def predictor(tiny_model: Callable[..., TMCA], tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = tmp_path_factory.mktemp("outputs") / "model"
    tiny_model().save_pretrained(folder)
    return Predictor.from_pretrained(folder, "cpu")


@pytest.fixture
def film(draw_dicom: Callable[..., Path], tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 4000, (40, 56)).astype(np.uint16)
    return draw_dicom(tmp_path / "in" / "film.dcm", pixels, "CR", PixelSpacing=[0.5, 0.5])


def _options(*types: str, **further: object) -> BatchOptions:
    return BatchOptions(PredictionOptions(threshold=0.45), OutputOptions(types, **further))  # type: ignore[arg-type]


def test_a_film_gives_every_type(predictor: Predictor, film: Path, tmp_path: Path):
    out = tmp_path / "out"
    predictor.set_image(film)
    middle = float(np.median(predictor.probability(PROMPT)))
    types = tuple(kind for kind in OUTPUT_TYPES if kind != "nifti")
    options = BatchOptions(PredictionOptions(threshold=middle), OutputOptions(types))
    (case,) = predict_batch(predictor, make_jobs([film], PROMPT), out, options).cases
    assert case["outputs"].keys() == {"mask", "rle", *DICOM, "overlay"}
    mask = read_mask(out / case["outputs"]["mask"])
    assert 0 < mask.sum() < mask.size
    np.testing.assert_array_equal(decode_mask(json.loads((out / case["outputs"]["rle"]).read_text())), mask)
    segmentation = highdicom.seg.segread(out / case["outputs"]["dicom-seg"])
    np.testing.assert_array_equal(segmentation.pixel_array.reshape(mask.shape), mask)
    described = segmentation.get_segment_description(1)
    assert described.segment_label == "Lung infection"
    assert described.SegmentAlgorithmType == "SEMIAUTOMATIC"
    assert PROMPT not in str(segmentation)
    fractional = pydicom.dcmread(out / case["outputs"]["dicom-fractional"])
    assert fractional.SegmentationType == "FRACTIONAL"
    report = highdicom.sr.srread(out / case["outputs"]["dicom-sr"])
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    assert case["square_millimetres"] == pytest.approx(mask.sum() * 0.25)
    capture = pydicom.dcmread(out / case["outputs"]["dicom-sc"])
    assert capture.SOPClassUID.name == "Secondary Capture Image Storage"
    assert predict_batch(predictor, make_jobs([film], PROMPT), out, options).resumed == 1


def test_the_sentence_stands_in_dicom_only_if_asked(predictor: Predictor, film: Path, tmp_path: Path):
    options = _options("dicom-seg", prompt_in_dicom=True, target="lesion")
    (case,) = predict_batch(predictor, make_jobs([film], PROMPT), tmp_path / "out", options).cases
    (segment,) = pydicom.dcmread(tmp_path / "out" / case["outputs"]["dicom-seg"]).SegmentSequence
    assert PROMPT in segment.SegmentDescription
    assert segment.SegmentLabel == "Lesion"


def test_a_sentence_from_a_report_makes_it_automatic(predictor: Predictor, film: Path, tmp_path: Path):
    report = prompt_from_report("Opacity in the right lower zone. The left lung is clear.", "lung")
    jobs = make_jobs([film], report.prompt, report)
    (case,) = predict_batch(predictor, jobs, tmp_path / "out", _options("dicom-seg")).cases
    (segment,) = pydicom.dcmread(tmp_path / "out" / case["outputs"]["dicom-seg"]).SegmentSequence
    assert segment.SegmentAlgorithmType == "AUTOMATIC"


def test_an_empty_mask_is_a_result(predictor: Predictor, film: Path, tmp_path: Path):
    options = BatchOptions(PredictionOptions(threshold=0.999), OutputOptions(("rle", *DICOM)))
    (case,) = predict_batch(predictor, make_jobs([film], None), tmp_path / "out", options).cases
    assert case["answer"] == "no region found"
    segmentation = highdicom.seg.segread(tmp_path / "out" / case["outputs"]["dicom-seg"])
    assert not segmentation.pixel_array.any()


def test_a_series_is_one_volume(predictor: Predictor, draw_slices: Callable[..., list[Path]], tmp_path: Path):
    volume = np.random.default_rng(0).integers(-1000, 1000, (4, 20, 24)).astype(np.int16)
    draw_slices(tmp_path / "ct", volume)
    (job,) = make_series_jobs([tmp_path / "ct"], PROMPT)
    assert (job.name, len(job.slices)) == ("ct_1", 4)
    out = tmp_path / "out"
    options = _options("nifti", "png", "dicom-seg", "dicom-sr", probabilities=True)
    (case,) = predict_batch(predictor, [job], out, options).cases
    labels = np.asarray(nibabel.load(out / case["outputs"]["nifti"]).dataobj)
    assert labels.sum() == case["pixels"] > 0
    assert case["cubic_millimetres"] == pytest.approx(labels.sum() * 0.5 * 0.25 * 2.5)
    for number, path in enumerate(job.slices):
        predictor.set_image(path)
        mask = predictor.predict(PROMPT, threshold=0.45)
        np.testing.assert_array_equal(read_mask(out / case["outputs"]["mask"] / f"{number:04d}.png"), mask)
        assert labels[:, :, number].sum() == mask.sum()
    maps = np.asarray(nibabel.load(out / case["outputs"]["probability"]).dataobj)
    np.testing.assert_array_equal(maps > 0.45, labels > 0)
    assert highdicom.seg.segread(out / case["outputs"]["dicom-seg"]).pixel_array.sum() == labels.sum()
    assert predict_batch(predictor, [job], out, options).resumed == 1


def test_a_series_with_a_gap_is_refused_before_anything_is_computed(
    draw_slices: Callable[..., list[Path]], tmp_path: Path
):
    paths = draw_slices(tmp_path / "ct", np.zeros((5, 8, 8), dtype=np.int16))
    paths[2].unlink()
    draw_slices(tmp_path / "whole", np.zeros((3, 8, 8), dtype=np.int16))
    gap, whole = make_series_jobs([tmp_path / "ct", tmp_path / "whole"], PROMPT)
    assert "gap" in str(gap.problem)
    assert whole.problem is None


def test_a_series_that_fails_leaves_no_slices(
    predictor: Predictor, draw_slices: Callable[..., list[Path]], tmp_path: Path
):
    pydicom = pytest.importorskip("pydicom")
    paths = draw_slices(tmp_path / "ct", np.zeros((4, 20, 24), dtype=np.int16))
    (job,) = make_series_jobs([tmp_path / "ct"], PROMPT)
    data = pydicom.dcmread(paths[2])
    data.PixelData = data.PixelData[:100]
    data.save_as(paths[2])
    report = predict_batch(predictor, [job], tmp_path / "out", _options("png"))
    assert len(report.failures) == 1
    assert [path.name for path in (tmp_path / "out").rglob("*.png")] == []
    assert not list((tmp_path / "out").rglob(".*"))


def test_a_series_is_known_by_its_uid_and_keeps_its_name(
    predictor: Predictor, draw_slices: Callable[..., list[Path]], tmp_path: Path
):
    volume, out = np.zeros((3, 20, 24), dtype=np.int16), tmp_path / "out"
    draw_slices(tmp_path / "study" / "b", volume, SeriesInstanceUID="1.2.4", SeriesNumber=5)
    report = predict_batch(predictor, make_series_jobs([tmp_path / "study"], PROMPT), out, _options("nifti"))
    assert [(case["name"], case["series_uid"]) for case in report.cases] == [("study_1", "1.2.4")]
    draw_slices(tmp_path / "study" / "a", volume + 1, SeriesInstanceUID="1.2.3", SeriesNumber=1)
    report = predict_batch(predictor, make_series_jobs([tmp_path / "study"], PROMPT), out, _options("nifti"))
    names = {case["series_uid"]: case["name"] for case in report.cases}
    assert names == {"1.2.3": "study_1_2", "1.2.4": "study_1"}
    assert (report.resumed, report.failures) == (1, [])


def test_results_below_the_series_are_not_taken_for_series(
    predictor: Predictor, draw_slices: Callable[..., list[Path]], tmp_path: Path
):
    draw_slices(tmp_path / "ct", np.zeros((3, 20, 24), dtype=np.int16))
    out = tmp_path / "ct" / "out"
    for resumed in (0, 1):
        jobs = make_series_jobs([tmp_path / "ct"], PROMPT, None, out)
        assert predict_batch(predictor, jobs, out, _options(*DICOM)).resumed == resumed


def test_a_damaged_file_refuses_what_it_may_be_a_slice_of(draw_slices: Callable[..., list[Path]], tmp_path: Path):
    for name, uid in (("ct", "1.2.3"), ("whole", "1.2.4")):
        draw_slices(tmp_path / "study" / name, np.zeros((3, 8, 8), dtype=np.int16), SeriesInstanceUID=uid)
    (tmp_path / "study" / "ct" / "last.dcm").write_bytes(b"")
    damaged, *series = make_series_jobs([tmp_path / "study"], PROMPT)
    assert damaged.image.name == "last.dcm"
    assert damaged.problem is not None
    problems = {job.slices[0].parent.name: job.problem for job in series}
    assert "last.dcm beside its slices is damaged" in str(problems["ct"])
    assert problems["whole"] is None


def test_films_of_a_folder_are_jobs_of_their_own(draw_dicom: Callable[..., Path], tmp_path: Path):
    for number in range(2):
        draw_dicom(tmp_path / "study" / f"{number}.dcm", np.zeros((8, 8), dtype=np.uint8), "CR")
    jobs = make_series_jobs([tmp_path / "study"], None)
    assert [(job.image.name, job.slices) for job in jobs] == [("0.dcm", ()), ("1.dcm", ())]


@pytest.mark.parametrize("kind", [*DICOM, "nifti"])
def test_a_picture_cannot_become_a_medical_file(predictor: Predictor, tmp_path: Path, kind: str):
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "a.png")
    report = predict_batch(predictor, [Job(tmp_path / "a.png", None, "a")], tmp_path / "out", _options(kind))
    (failure,) = report.failures
    assert "--output-type" in failure["hint"]
    assert not list((tmp_path / "out").glob("a*"))


def test_a_film_without_its_study_is_a_failure_that_leaves_nothing(
    predictor: Predictor, draw_dicom: Callable[..., Path], tmp_path: Path
):
    film = draw_dicom(tmp_path / "film.dcm", np.zeros((8, 8), dtype=np.uint8), "CR", StudyInstanceUID=None)
    report = predict_batch(predictor, make_jobs([film], None), tmp_path / "out", _options("dicom-seg"))
    (failure,) = report.failures
    assert "StudyInstanceUID" in failure["message"]
    assert not list((tmp_path / "out").glob("*.dcm"))


def test_an_unknown_type_or_target_is_refused():
    with pytest.raises(ConfigError, match="dicom-seg"):
        OutputOptions(("dicom",))
    with pytest.raises(ConfigError, match="polyp"):
        OutputOptions(target="polypp")
