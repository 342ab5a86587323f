from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tmca import files
from tmca.batch import BatchOptions, CaseRunner, predict_batch
from tmca.data.manifest import Manifest
from tmca.errors import ConfigError, DataError, StorageError
from tmca.files import sha256_of
from tmca.imaging.raster import read_mask
from tmca.inference import Predictor
from tmca.jobs import Job, make_jobs, make_series_jobs
from tmca.models import TMCA
from tmca.outputs import OutputOptions
from tmca.prediction import PredictionOptions
from tmca.reports.prompt import prompt_from_report

PROMPT = "one small bright round lesion, located in top left of the image"
OPTIONS = BatchOptions(PredictionOptions(threshold=0.4), OutputOptions(probabilities=True))


def _picture(path: Path, height: int = 40, width: int = 56, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def model_folder(tiny_model: Callable[..., TMCA], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batch") / "model"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def predictor(model_folder: Path) -> Predictor:
    return Predictor.from_pretrained(model_folder, "cpu")


# The batch -------------------------------------------------------------------------------------------------------


def test_masks_overlays_and_a_report_are_written(
    predictor: Predictor, model_folder: Path, phantoms: Manifest, tmp_path: Path
):
    images = [phantoms.image_path(record) for record in phantoms.records[:2]] + [_picture(tmp_path / "wide.jpg")]
    jobs = make_jobs(images, PROMPT)
    out = tmp_path / "out"
    predict_batch(predictor, jobs, out, OPTIONS)

    names = {job.name for job in jobs}
    assert {path.name for path in out.iterdir()} == (
        {f"{name}.png" for name in names}
        | {f"{name}_prob.png" for name in names}
        | {"overlays", "run_report.json", "journal.jsonl"}
    )
    assert {path.name for path in (out / "overlays").iterdir()} == {f"{name}.png" for name in names}
    for job in jobs:
        predictor.set_image(job.image)
        probability = predictor.probability(PROMPT)
        np.testing.assert_array_equal(read_mask(out / f"{job.name}.png"), probability > 0.4)
        stored = np.asarray(Image.open(out / f"{job.name}_prob.png"))
        assert stored.dtype == np.uint16
        np.testing.assert_array_equal(stored, np.rint(probability.astype(np.float64) * 65535))
        with Image.open(job.image) as image, Image.open(out / "overlays" / f"{job.name}.png") as overlay:
            assert overlay.size == image.size

    report = json.loads((out / "run_report.json").read_text("utf-8"))
    assert report["intended_use"] == "research only; not a medical device"
    files = ("model.safetensors", "tokenizer.json")
    (source,) = report["model"]["models"]
    assert (source["id"], source["temperature"]) == (str(model_folder), 1.0)
    assert source["sha256"] == {name: sha256_of(model_folder / name) for name in files}
    assert (report["model"]["device"], report["model"]["precision"]) == ("cpu", predictor.precision)
    assert report["failures"] == []
    assert report["environment"]["packages"]["tmca"]
    assert len(report["cases"]) == 3
    for case, job in zip(report["cases"], jobs, strict=True):
        assert case["sha256"] == sha256_of(job.image)
        assert (case["image"], case["prompt"], case["setting"]) == (str(job.image), PROMPT, "guided")
        assert case["tokens"] == predictor.count_tokens(PROMPT)[0]
        assert case["truncated"] is False
        mask = read_mask(out / case["outputs"]["mask"])
        assert case["shape"] == list(mask.shape)
        assert case["foreground_share"] == pytest.approx(mask.mean(), abs=1e-6)
        assert case["region_found"] == bool(mask.any())
        predictor.set_image(job.image)
        without = predictor.predict(None, threshold=0.4)
        share = 2 * (mask & without).sum() / max(1, mask.sum() + without.sum())
        expected = 1 - share if mask.any() or without.any() else 0
        assert case["prompt_effect"] == {"none": pytest.approx(expected, abs=1e-4)}
        assert set(case["seconds"]) == {"read", "encode", "segment", "write"}


def test_several_sentences_on_one_image_encode_it_once(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first, second = _picture(tmp_path / "a.png"), _picture(tmp_path / "b.png", seed=1)
    jobs = [Job(first, text, f"a{number}") for number, text in enumerate((PROMPT, "two dark lesions", None))]
    encoded = []
    real = Predictor.set_image

    def counted(chosen: Predictor, image: object) -> None:
        encoded.append(image)
        real(chosen, image)

    monkeypatch.setattr(Predictor, "set_image", counted)
    report = predict_batch(predictor, [*jobs, Job(second, None, "b")], tmp_path / "out")
    assert len(encoded) == 2
    assert [case["setting"] for case in report.cases] == ["guided", "guided", "no text", "no text"]
    assert [set(case["prompt_effect"]) for case in report.cases] == [{"none"}, {"none"}, set(), set()]
    assert report.cases[0]["foreground_share"] >= 0


def test_a_broken_image_does_not_end_the_batch_nor_spoil_the_next(predictor: Predictor, tmp_path: Path):
    good = _picture(tmp_path / "good.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes(good.read_bytes()[:300])
    jobs = [Job(good, None, "one"), Job(broken, None, "two"), Job(broken, PROMPT, "three"), Job(good, None, "four")]
    report = predict_batch(predictor, jobs, tmp_path / "out")
    assert [case["outputs"]["mask"] for case in report.cases] == ["one.png", "four.png"]
    assert (tmp_path / "out" / "one.png").read_bytes() == (tmp_path / "out" / "four.png").read_bytes()
    assert [failure["image"] for failure in report.failures] == [str(broken)] * 2
    for failure in report.failures:
        assert set(failure) == {"image", "name", "code", "message", "hint"}
        assert failure["code"] == "invalid_input"
        assert str(broken) in failure["message"]
        assert failure["hint"]
    assert json.loads((tmp_path / "out" / "run_report.json").read_text("utf-8"))["failures"] == report.failures


def test_a_sentence_over_the_limit_is_reported(predictor: Predictor, tmp_path: Path):
    job = Job(_picture(tmp_path / "a.png"), "lesion " * 50, "a")
    (case,) = predict_batch(predictor, [job], tmp_path / "out").cases
    assert case["truncated"] is True
    assert case["tokens"] > 24


def test_masks_that_are_there_are_kept_unless_told(predictor: Predictor, tmp_path: Path):
    jobs = make_jobs([_picture(tmp_path / "a.png"), _picture(tmp_path / "b.png")], None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.png").write_bytes(b"precious")
    with pytest.raises(StorageError, match=r"b\.png already") as caught:
        predict_batch(predictor, jobs, tmp_path / "out")
    assert "--overwrite" in caught.value.hint
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"b.png"}
    predict_batch(predictor, jobs, tmp_path / "out", BatchOptions(overwrite=True))
    assert read_mask(tmp_path / "out" / "b.png").shape == (40, 56)


def test_a_full_disk_ends_the_batch(predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    jobs = make_jobs([_picture(tmp_path / "a.png")], None)

    def full(path: Path, _: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(files.Path, "write_bytes", full)
    with pytest.raises(StorageError, match=r"a\.png") as caught:
        predict_batch(predictor, jobs, tmp_path / "out")
    assert "disk is full" in caught.value.hint


# Again, in parts, and one at a time --------------------------------------------------------------------------------


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    return make_jobs([_picture(tmp_path / "in" / f"{name}.png", seed=ord(name)) for name in "abcde"], PROMPT)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Images that were encoded."""
    seen: list[object] = []
    real = Predictor.set_image

    def counted(chosen: Predictor, image: object) -> None:
        seen.append(image)
        real(chosen, image)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "set_image", counted)
    return seen


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


def test_what_is_finished_is_not_computed_again(
    predictor: Predictor, jobs: list[Job], tmp_path: Path, computed: list[object]
):
    out = tmp_path / "out"
    first = predict_batch(predictor, jobs[:3], out)
    written = _content(out)
    (out / "b.png").unlink()  # not finished any more
    second = predict_batch(predictor, jobs, out)
    assert len(computed) == 3 + 3
    assert (first.resumed, second.resumed) == (0, 2)
    assert [case["name"] for case in second.cases] == list("abcde")
    assert second.cases[0] == first.cases[0]
    assert {name: content for name, content in _content(out).items() if name in written} == written
    report = json.loads((out / "run_report.json").read_text("utf-8"))
    assert (report["resumed"], len(report["cases"])) == (2, 5)


def test_a_journal_that_was_cut_off_is_read_to_there(
    predictor: Predictor, jobs: list[Job], tmp_path: Path, computed: list[object]
):
    out = tmp_path / "out"
    predict_batch(predictor, jobs[:2], out)
    lines = (out / "journal.jsonl").read_text("utf-8")
    (out / "journal.jsonl").write_text(lines[: len(lines) - 40], "utf-8")
    assert predict_batch(predictor, jobs[:2], out).resumed == 1
    assert len(computed) == 3
    content = (out / "journal.jsonl").read_text("utf-8")
    assert content.startswith(lines[: len(lines) - 40] + "\n{")  # nothing is glued to what was cut off
    assert predict_batch(predictor, jobs[:2], out).resumed == 2


@pytest.mark.parametrize(
    ("change", "reason"), [("sentence", "of another sentence"), ("threshold", "of another model or option")]
)
def test_another_question_is_not_taken_for_the_same(
    predictor: Predictor, jobs: list[Job], tmp_path: Path, change: str, reason: str
):
    out = tmp_path / "out"
    predict_batch(predictor, jobs[:1], out)
    job, options = jobs[0], BatchOptions()
    if change == "sentence":
        job = Job(job.image, "two dark lesions", job.name)
    else:
        options = BatchOptions(PredictionOptions(threshold=0.3))
    with pytest.raises(StorageError, match=r"a\.png already") as caught:
        predict_batch(predictor, [job], out, options)
    assert reason in caught.value.hint


def test_a_mask_of_another_version_is_kept(
    predictor: Predictor, jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    predict_batch(predictor, jobs[:1], tmp_path / "out")
    monkeypatch.setattr("tmca.journal.version", lambda _: "99.0")
    with pytest.raises(StorageError) as caught:
        predict_batch(predictor, jobs[:1], tmp_path / "out")
    assert "made it, this is 99.0" in caught.value.hint


def test_a_changed_image_is_segmented_again(
    predictor: Predictor, jobs: list[Job], tmp_path: Path, computed: list[object]
):
    out = tmp_path / "out"
    predict_batch(predictor, jobs[:2], out)
    before = (out / "a.png").read_bytes(), (out / "overlays" / "a.png").read_bytes()
    _picture(jobs[0].image, seed=99)
    report = predict_batch(predictor, jobs[:3], out)
    assert (report.resumed, report.failures, len(computed)) == (1, [], 4)
    assert (out / "overlays" / "a.png").read_bytes() != before[1]
    assert predict_batch(predictor, jobs[:3], out).resumed == 3


def test_a_damaged_image_leaves_its_earlier_mask_and_says_so(predictor: Predictor, jobs: list[Job], tmp_path: Path):
    out = tmp_path / "out"
    predict_batch(predictor, jobs[:2], out)
    jobs[0].image.write_bytes(jobs[0].image.read_bytes()[:200])
    for overwrite in (False, True):
        report = predict_batch(predictor, jobs[:3], out, BatchOptions(overwrite=overwrite))
        (failure,) = report.failures
        assert (failure["name"], len(report.cases)) == ("a", 2)
        assert failure["message"].endswith("; a.png is still that of an earlier run")


def test_only_what_is_in_the_way_fails_where_a_batch_goes_on(predictor: Predictor, jobs: list[Job], tmp_path: Path):
    out = tmp_path / "out"
    predict_batch(predictor, jobs[:2], out)
    (out / "c.png").write_bytes(b"precious")
    changed = Job(jobs[1].image, "two dark lesions", "b")
    report = predict_batch(predictor, [jobs[0], changed, jobs[2], jobs[3]], out)
    assert [case["name"] for case in report.cases] == ["a", "d"]
    assert [(failure["name"], failure["code"]) for failure in report.failures] == [
        ("b", StorageError.code),
        ("c", StorageError.code),
    ]
    assert "another sentence" in report.failures[0]["hint"]
    assert "nothing here says" in report.failures[1]["hint"]
    assert (out / "c.png").read_bytes() == b"precious"


def test_an_image_keeps_its_name_when_others_come_and_go(predictor: Predictor, tmp_path: Path, computed: list[object]):
    out, folder = tmp_path / "out", tmp_path / "in"
    first, second = _picture(folder / "p1" / "x.png"), _picture(folder / "p1" / "y.png", seed=1)
    predict_batch(predictor, make_jobs([first, second], None), out)
    third = _picture(folder / "p0" / "x.png", seed=2)
    report = predict_batch(predictor, make_jobs([third, first, second], None), out)
    assert [case["name"] for case in report.cases] == ["p0_x", "x", "y"]
    first.unlink()
    report = predict_batch(predictor, make_jobs([third, second], None), out)  # alone it would be called x
    assert [case["name"] for case in report.cases] == ["p0_x", "y"]
    fourth = _picture(folder / "p2" / "x.png", seed=3)
    report = predict_batch(predictor, make_jobs([fourth], None), out)
    assert [case["name"] for case in report.cases] == ["x_2"]
    assert len(computed) == 4
    report = predict_batch(predictor, make_jobs([fourth], None), out, BatchOptions(overwrite=True))
    assert [case["name"] for case in report.cases] == ["x_2"]
    with pytest.raises(StorageError) as caught:  # and no further name for another sentence
        predict_batch(predictor, make_jobs([fourth], PROMPT), out)
    assert "x_2.png already" in caught.value.message


def test_more_sentences_of_an_image_get_names_of_their_own(predictor: Predictor, jobs: list[Job], tmp_path: Path):
    out, image = tmp_path / "out", jobs[0].image
    predict_batch(predictor, [Job(image, "one", "a")], out)
    report = predict_batch(predictor, [Job(image, "one", "a_one"), Job(image, "two", "a_two")], out)
    assert ([case["name"] for case in report.cases], report.resumed) == (["a", "a_two"], 1)
    report = predict_batch(predictor, [Job(image, "two", "a"), Job(image, "three", "a_three")], out)
    assert ([case["name"] for case in report.cases], report.resumed) == (["a_two", "a_three"], 1)


def test_a_renamed_folder_is_known_by_its_content(predictor: Predictor, jobs: list[Job], tmp_path: Path):
    out = tmp_path / "out"
    predict_batch(predictor, jobs[:2], out)
    moved = [replace(job, image=tmp_path / "new" / job.image.name) for job in jobs[:2]]
    jobs[0].image.parent.rename(tmp_path / "new")
    assert predict_batch(predictor, moved, out).resumed == 2


def test_an_emptied_mask_is_made_again(predictor: Predictor, jobs: list[Job], tmp_path: Path):
    predict_batch(predictor, jobs[:2], tmp_path / "out")
    (tmp_path / "out" / "a.png").write_bytes(b"")
    assert predict_batch(predictor, jobs[:2], tmp_path / "out").resumed == 1
    assert (tmp_path / "out" / "a.png").stat().st_size


def test_a_share_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="Part 2 of 2"):
        BatchOptions(part=(2, 2))


def test_shares_write_to_one_folder(predictor: Predictor, jobs: list[Job], tmp_path: Path, computed: list[object]):
    out = tmp_path / "out"
    for number in range(2):
        predict_batch(predictor, jobs, out, BatchOptions(part=(number, 2)))
    assert len(computed) == 5
    assert {path.name for path in out.glob("*.json*")} == {
        *(f"run_report-part-{number}-of-2.json" for number in range(2)),
        *(f"journal-part-{number}-of-2.jsonl" for number in range(2)),
    }
    assert predict_batch(predictor, jobs, out).resumed == 5
    assert len(computed) == 5


def test_a_runner_and_an_engine_give_what_the_batch_gives(predictor: Predictor, jobs: list[Job], tmp_path: Path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    asked = [*jobs[:2], Job(broken, None, "broken")]
    expected = predict_batch(predictor, asked, tmp_path / "batch")

    def backwards(jobs: Sequence[Job], folder: Path, options: BatchOptions) -> Iterator[tuple[Job, dict[str, object]]]:
        run = CaseRunner(predictor, folder, options, "-worker-1")
        for job in reversed(jobs):
            yield job, run(job)

    found = predict_batch(predictor, asked, tmp_path / "alone", engine=backwards)
    for entry in (*expected.cases, *found.cases):
        del entry["seconds"]
    assert (found.cases, found.failures) == (expected.cases, expected.failures)
    assert _content(tmp_path / "alone") == _content(tmp_path / "batch")
    assert (tmp_path / "alone" / "journal-worker-1.jsonl").exists()
    assert predict_batch(predictor, asked, tmp_path / "alone").resumed == 2


def test_a_fault_of_ours_does_not_end_the_batch(
    predictor: Predictor, jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = Predictor.ask_all

    def faulty(chosen: Predictor, *arguments: object) -> object:
        if chosen._current().geometry.size == (41, 56):
            raise ZeroDivisionError("division by zero")
        return real(chosen, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "ask_all", faulty)
    _picture(jobs[1].image, height=41)
    report = predict_batch(predictor, jobs, tmp_path / "out")
    assert [case["name"] for case in report.cases] == list("acde")
    (failure,) = report.failures
    assert failure["code"] == "runtime_error"
    assert "ZeroDivisionError" in failure["message"]
    assert str(jobs[1].image) in failure["message"]


def test_a_volume_is_segmented_slice_by_slice(predictor: Predictor, tmp_path: Path):
    nibabel = pytest.importorskip("nibabel")
    values = np.random.default_rng(0).integers(0, 200, (20, 24, 3)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([-2.0, -2.0, 5.0, 1.0])), tmp_path / "scan.nii.gz")
    out, job = tmp_path / "out", Job(tmp_path / "scan.nii.gz", PROMPT, "scan")
    options = BatchOptions(PredictionOptions(threshold=0.4), OutputOptions(("nifti", "png")))
    (case,) = predict_batch(predictor, [job], out, options).cases
    assert case["outputs"].keys() >= {"nifti", "mask"}
    labels = np.asarray(nibabel.load(out / "scan.nii.gz").dataobj)
    assert labels.shape == values.shape
    for number in range(3):
        predictor.set_image(f"{job.image}#{number}")
        expected = predictor.predict(PROMPT, threshold=0.4)
        np.testing.assert_array_equal(read_mask(out / "scan" / f"{number:04d}.png"), expected)
        assert case["slices"].get(str(number), 0) == expected.sum() == labels[:, :, number].sum()
    assert case["pixels"] == labels.sum()
    assert case["cubic_millimetres"] == pytest.approx(labels.sum() * 20.0)
    assert case["shape"][0] == 3
    assert predict_batch(predictor, [job], out, options).resumed == 1


def test_a_shorter_volume_leaves_no_slices_of_the_longer_one(predictor: Predictor, tmp_path: Path):
    nibabel = pytest.importorskip("nibabel")
    job, out = Job(tmp_path / "scan.nii.gz", PROMPT, "scan"), tmp_path / "out"
    options = BatchOptions(PredictionOptions(threshold=0.05), OutputOptions(("png",), probabilities=True))
    for depth in (5, 2):
        values = np.random.default_rng(depth).integers(0, 200, (20, 24, depth)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), job.image)
        (case,) = predict_batch(predictor, [job], out, options).cases
        (out / "scan" / "notes.txt").write_text("mine")
    for folder in (case["outputs"][kind] for kind in ("mask", "probability", "overlay")):
        assert {path.name for path in (out / folder).glob("*.png")} == {"0000.png", "0001.png"}
    assert (out / "scan" / "notes.txt").exists()
    assert not list(out.rglob(".*"))


def test_a_picture_is_no_volume(predictor: Predictor, jobs: list[Job], tmp_path: Path):
    report = predict_batch(predictor, jobs[:1], tmp_path / "out", BatchOptions(outputs=OutputOptions(("nifti",))))
    (failure,) = report.failures
    assert "is no NIfTI or DICOM volume" in failure["message"]
    assert not list((tmp_path / "out").glob("a*"))


def test_an_interrupted_batch_keeps_what_is_finished(
    predictor: Predictor, jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = Predictor.ask_all
    asked = []

    def interrupted(chosen: Predictor, *arguments: object) -> object:
        asked.append(1)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return real(chosen, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("tmca.batch.WRITE_BEHIND", 0)
    monkeypatch.setattr(Predictor, "ask_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict_batch(predictor, jobs, tmp_path / "out")
    assert predict_batch(predictor, jobs, tmp_path / "out").resumed == 3


def test_what_a_killed_run_left_half_done_is_replaced(
    predictor: Predictor, jobs: list[Job], tmp_path: Path, computed: list[object]
):
    out = tmp_path / "out"
    predict_batch(predictor, jobs[:2], out)
    lines = (out / "journal.jsonl").read_text("utf-8").splitlines(keepends=True)
    assert [("outputs" in json.loads(line)) for line in lines].count(True) == 2
    kept = [line for line in lines if "outputs" not in line or json.loads(line)["name"] == "a"]
    (out / "journal.jsonl").write_text(
        "".join(kept), "utf-8"
    )  # b was begun, its files are there, its end was not noted
    written = _content(out)
    assert predict_batch(predictor, jobs[:2], out).resumed == 1
    assert _content(out) == written
    assert len(computed) == 3


def test_the_same_model_in_another_folder_is_the_same(
    predictor: Predictor, model_folder: Path, jobs: list[Job], tmp_path: Path
):
    predict_batch(predictor, jobs[:1], tmp_path / "out")
    shutil.copytree(model_folder, tmp_path / "copy")
    assert predict_batch(Predictor.from_pretrained(tmp_path / "copy", "cpu"), jobs[:1], tmp_path / "out").resumed == 1


def test_a_report_is_asked_and_shown(predictor: Predictor, jobs: list[Job], tmp_path: Path):
    report = prompt_from_report("Opacity in the right lower zone. The left lung is clear.", "lung")
    silent = prompt_from_report("The lungs are clear. No opacity.", "lung")
    asked = [Job(jobs[0].image, report.prompt, "a", report), Job(jobs[1].image, None, "b", silent)]
    batch = predict_batch(predictor, asked, tmp_path / "out")
    (case,) = batch.cases
    assert case["prompt"] == report.prompt
    assert case["report"]["evidence"][0]["text"] in report.report
    (skipped,) = batch.skipped
    assert batch.failures == []
    assert skipped["name"] == "b"
    assert "names no finding" in skipped["message"]
    assert not (tmp_path / "out" / "b.png").exists()
    assert json.loads((tmp_path / "out" / "run_report.json").read_text("utf-8"))["skipped"] == [skipped]


def test_the_latest_journal_counts(predictor: Predictor, jobs: list[Job], tmp_path: Path):
    out = tmp_path / "out"
    predict_batch(predictor, jobs[:2], out)
    other = PredictionOptions(threshold=0.3)
    for number in range(2):  # whose journals come first by name
        predict_batch(predictor, jobs[:2], out, BatchOptions(other, overwrite=True, part=(number, 2)))
    assert predict_batch(predictor, jobs[:2], out, BatchOptions(other)).resumed == 2
    with pytest.raises(StorageError):
        predict_batch(predictor, jobs[:2], out)


def test_models_that_came_as_objects_are_told_apart(tiny_model: Callable[..., TMCA], jobs: list[Job], tmp_path: Path):
    first, second = tiny_model(), tiny_model()
    with torch.no_grad():
        second.head.classify.bias += 1.0
    predict_batch(Predictor(first, "cpu"), jobs[:1], tmp_path / "out")
    assert predict_batch(Predictor(tiny_model(), "cpu"), jobs[:1], tmp_path / "out").resumed == 1
    with pytest.raises(StorageError, match="already"):
        predict_batch(Predictor(second, "cpu"), jobs[:1], tmp_path / "out")


def test_pictures_of_a_volume_are_not_replaced(predictor: Predictor, tmp_path: Path):
    nibabel = pytest.importorskip("nibabel")
    values = np.random.default_rng(0).integers(0, 200, (20, 24, 2)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "scan.nii.gz")
    job, out = Job(tmp_path / "scan.nii.gz", PROMPT, "scan"), tmp_path / "out"
    first = BatchOptions(PredictionOptions(threshold=0.05), OutputOptions(("png",)))
    predict_batch(predictor, [job], out, first)
    assert len(list((out / "overlays" / "scan").iterdir())) == 2
    nothing = BatchOptions(PredictionOptions(threshold=0.97), OutputOptions(("png",)))
    with pytest.raises(StorageError, match="scan"):
        predict_batch(predictor, [job], out, nothing)
    predict_batch(predictor, [job], out, BatchOptions(nothing.prediction, nothing.outputs, overwrite=True))
    assert not (out / "overlays" / "scan").exists()


def test_a_file_name_that_is_no_text_does_not_end_the_batch(predictor: Predictor, jobs: list[Job], tmp_path: Path):
    odd = tmp_path / os.fsdecode(b"\xe9.png")
    odd.write_bytes(jobs[0].image.read_bytes())
    report = predict_batch(predictor, [Job(odd, None, "odd"), jobs[1]], tmp_path / "out")
    assert len(report.cases) == 2
    assert len(json.loads((tmp_path / "out" / "run_report.json").read_text("utf-8"))["cases"]) == 2


# Names, repeats and what is left over ----------------------------------------------------------------------------


def test_no_result_gets_the_name_of_another_image(predictor: Predictor, tmp_path: Path):
    images = [
        _picture(tmp_path / "in" / name, seed=seed) for seed, name in enumerate(("a/x.png", "b/x.png", "c/x_2.png"))
    ]
    report = predict_batch(predictor, [Job(image, None, image.stem) for image in images], tmp_path / "out")
    assert [case["name"] for case in report.cases] == ["x", "x_3", "x_2"]


def test_names_whose_files_would_meet_are_told_apart(predictor: Predictor, tmp_path: Path):
    names = ("a.png", "a_prob.png", "A.png", "overlays.png", "run_report.png")
    images = [_picture(tmp_path / "in" / str(number) / name, seed=number) for number, name in enumerate(names)]
    jobs = [Job(image, None, image.stem) for image in images]
    options = BatchOptions(outputs=OutputOptions(("png", "rle"), probabilities=True))
    report = predict_batch(predictor, jobs, tmp_path / "out", options)
    assert [case["name"] for case in report.cases] == ["a", "a_prob_2", "A_2", "overlays_2", "run_report_2"]
    written = [path.casefold() for case in report.cases for path in case["outputs"].values()]
    assert len(set(written)) == len(written) == 5 * 4
    assert predict_batch(predictor, jobs, tmp_path / "out", options).resumed == 5
    report_file = json.loads((tmp_path / "out" / "run_report.json").read_text("utf-8"))
    assert len(report_file["cases"]) == 5


def test_one_bad_sentence_does_not_spoil_the_others_on_its_image(
    predictor: Predictor, jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = Predictor.ask_all

    def faulty(chosen: Predictor, texts: Sequence[str | None], *arguments: object) -> object:
        if "bad" in texts:
            raise ValueError("no such word")
        return real(chosen, texts, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "ask_all", faulty)
    asked = [Job(jobs[0].image, text, name) for name, text in (("one", PROMPT), ("two", "bad"), ("three", None))]
    report = predict_batch(predictor, asked, tmp_path / "out")
    assert [case["name"] for case in report.cases] == ["one", "three"]
    (failure,) = report.failures
    assert "no such word" in failure["message"]


def test_hundreds_of_sentences_on_one_image_are_not_held_together(
    predictor: Predictor, jobs: list[Job], tmp_path: Path, computed: list[object], monkeypatch: pytest.MonkeyPatch
):
    asked: list[int] = []
    real = Predictor.ask_all

    def counted(chosen: Predictor, texts: Sequence[str | None], *arguments: object) -> object:
        asked.append(len(texts))
        return real(chosen, texts, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "ask_all", counted)
    many = [Job(jobs[0].image, f"lesion {number}", f"a_{number}") for number in range(20)]
    report = predict_batch(predictor, many, tmp_path / "out")
    assert len(report.cases) == 20
    assert asked == [8, 8, 4]
    assert len(computed) == 1


def test_a_replacement_that_was_interrupted_goes_on_where_it_was(
    predictor: Predictor, jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    predict_batch(predictor, jobs, out)
    other = BatchOptions(PredictionOptions(threshold=0.3), overwrite=True)
    real = Predictor.ask_all
    asked: list[int] = []

    def interrupted(chosen: Predictor, *arguments: object) -> object:
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(chosen, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr("tmca.batch.WRITE_BEHIND", 0)
        patch.setattr(Predictor, "ask_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            predict_batch(predictor, jobs, out, other)
    going_on = predict_batch(predictor, jobs, out, BatchOptions(other.prediction))
    assert going_on.resumed == 2
    assert {case["threshold"] for case in going_on.cases} == {0.3}
    with pytest.raises(StorageError, match="already"):  # what was there before is of another question again
        predict_batch(predictor, jobs, out)
    predict_batch(predictor, jobs, out, BatchOptions(overwrite=True))
    with pytest.raises(StorageError, match="already"):  # the order to replace was given before these were written
        predict_batch(predictor, jobs, out, BatchOptions(other.prediction))


def test_what_is_not_asked_for_any_more_is_removed(predictor: Predictor, jobs: list[Job], tmp_path: Path):
    out = tmp_path / "out"
    predict_batch(predictor, jobs[:2], out, OPTIONS)
    (out / "a_prob_mine.png").write_text("another's")
    assert (out / "a_prob.png").exists()
    predict_batch(predictor, jobs[:1], out, BatchOptions(overwrite=True))
    assert not (out / "a_prob.png").exists()
    assert (out / "b_prob.png").exists()
    assert (out / "a_prob_mine.png").exists()


def test_a_job_known_to_be_impossible_is_a_failure(predictor: Predictor, jobs: list[Job], tmp_path: Path):
    broken = replace(jobs[1], problem=DataError("a slice is missing", hint="send it again"))
    report = predict_batch(predictor, [jobs[0], broken], tmp_path / "out")
    assert [case["name"] for case in report.cases] == ["a"]
    assert report.failures[0]["message"] == "a slice is missing"
    runner = CaseRunner(predictor, tmp_path / "other", BatchOptions(), "-x")
    assert runner(broken)["failure"]["message"] == "a slice is missing"


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_image_is_never_replaced_by_its_mask(predictor: Predictor, tmp_path: Path, overwrite: bool):
    picture = _picture(tmp_path / "scans" / "a.png")
    before = picture.read_bytes()
    with pytest.raises(StorageError, match="would be replaced by a mask") as caught:
        predict_batch(predictor, [Job(picture, PROMPT, "a")], tmp_path / "scans", BatchOptions(overwrite=overwrite))
    assert "--overwrite" not in caught.value.hint
    assert picture.read_bytes() == before
    assert [path.name for path in (tmp_path / "scans").iterdir()] == ["a.png"]


def test_results_of_another_sentence_are_not_removed_unasked(predictor: Predictor, jobs: list[Job], tmp_path: Path):
    out = tmp_path / "out"
    predict_batch(predictor, jobs[:1], out, BatchOptions(outputs=OutputOptions(("png",), overlays=False)))
    other = Job(jobs[0].image, "two dark lesions", jobs[0].name)
    options = BatchOptions(outputs=OutputOptions(("rle",), overlays=False))
    with pytest.raises(StorageError, match=r"a\.png already"):
        predict_batch(predictor, [other], out, options)
    assert (out / "a.png").exists()
    predict_batch(predictor, [other], out, replace(options, overwrite=True))
    assert not (out / "a.png").exists()


def test_the_volume_of_a_series_goes_by_the_distance_of_its_slices(
    predictor: Predictor, draw_slices: Callable[..., list[Path]], tmp_path: Path
):
    pixels = np.random.default_rng(0).integers(0, 200, (4, 40, 48)).astype(np.uint8)
    draw_slices(tmp_path / "series", pixels, step=(0, 0, 2.5), SliceThickness=5.0)  # they overlap
    (job,) = make_series_jobs([str(tmp_path / "series")], PROMPT, None)
    (case,) = predict_batch(predictor, [job], tmp_path / "out", BatchOptions(PredictionOptions(threshold=0.4))).cases
    assert case["pixels"] > 0
    assert case["cubic_millimetres"] == pytest.approx(case["pixels"] * 0.5 * 0.25 * 2.5)
    assert case["spacing_from"] == "PixelSpacing"
