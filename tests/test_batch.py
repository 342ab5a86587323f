from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tmca import files
from tmca.batch import Job, find_images, make_jobs, predict_batch, read_jobs, slug
from tmca.data.manifest import Manifest
from tmca.errors import DataError, StorageError
from tmca.files import sha256_of
from tmca.imaging.raster import read_mask
from tmca.inference import Predictor
from tmca.models import TMCA

PROMPT = "one small bright round lesion, located in top left of the image"


def _touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


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


# Finding images --------------------------------------------------------------------------------------------------


def test_a_folder_is_searched_through_and_through(tmp_path: Path):
    _touch(*(tmp_path / name for name in ("b.png", "a.JPG", "deep/er/c.tiff", "notes.txt", "deep/manifest.csv")))
    (tmp_path / "folder.png").mkdir()
    found = find_images([tmp_path])
    assert found == sorted(tmp_path / name for name in ("a.JPG", "b.png", "deep/er/c.tiff"))


def test_globs_are_expanded(tmp_path: Path):
    _touch(*(tmp_path / name for name in ("a1.png", "a2.png", "b1.png", "deep/a3.png")))
    assert find_images([f"{tmp_path}/a*.png"]) == [tmp_path / "a1.png", tmp_path / "a2.png"]
    assert len(find_images([f"{tmp_path}/**/a*.png"])) == 3


def test_a_name_that_looks_like_a_glob_is_a_file_first(tmp_path: Path):
    _touch(tmp_path / "case[1].png", tmp_path / "case1.png")
    assert find_images([tmp_path / "case[1].png"]) == [tmp_path / "case[1].png"]


def test_a_file_is_taken_whatever_its_ending(tmp_path: Path):
    _touch(tmp_path / "picture.dat")
    assert find_images([tmp_path / "picture.dat"]) == [tmp_path / "picture.dat"]


def test_an_image_named_twice_is_taken_once(tmp_path: Path):
    _touch(tmp_path / "a.png", tmp_path / "b.png")
    assert find_images([tmp_path, tmp_path / "a.png", f"{tmp_path}/*.png"]) == [tmp_path / "a.png", tmp_path / "b.png"]


def test_an_image_named_absolutely_and_relatively_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _touch(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert len(find_images(["a.png", tmp_path / "a.png", "./a.png"])) == 1


@pytest.mark.parametrize("name", ["nothing.png", "*.png", "nothing"])
def test_an_input_that_is_not_there_is_named(tmp_path: Path, name: str):
    with pytest.raises(DataError, match="no file, folder or match") as caught:
        find_images([str(tmp_path / name)])
    assert str(tmp_path / name) in caught.value.message


def test_a_folder_without_images_is_named(tmp_path: Path):
    _touch(tmp_path / "notes.txt")
    with pytest.raises(DataError, match="holds no image") as caught:
        find_images([tmp_path])
    assert ".png" in caught.value.hint


# Jobs ------------------------------------------------------------------------------------------------------------


def test_output_names_are_stems():
    jobs = make_jobs([Path("in/a.png"), Path("in/b.jpg")], PROMPT)
    assert [job.name for job in jobs] == ["a", "b"]
    assert {job.text for job in jobs} == {PROMPT}


def test_equal_stems_are_told_apart_by_their_folders():
    paths = [Path("/data/first/x.png"), Path("/data/second/x.png"), Path("/data/y.png")]
    assert [job.name for job in make_jobs(paths, None)] == ["first_x", "second_x", "y"]
    assert [job.name for job in make_jobs([Path("/a/s/x.png"), Path("/b/s/x.png")], None)] == ["a_s_x", "b_s_x"]


def test_equal_stems_in_one_folder_are_told_apart_by_their_endings():
    assert [job.name for job in make_jobs([Path("/d/x.png"), Path("/d/x.jpg")], None)] == ["x", "x_jpg"]


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from("ab"), max_size=2), st.sampled_from(("x.png", "x.jpg", "a_x.png", "y.png"))),
        min_size=1,
        max_size=6,
        unique_by=lambda item: (tuple(item[0]), item[1]),
    )
)
def test_every_image_has_an_output_name_of_its_own(parts: list[tuple[list[str], str]]):
    paths = [Path("/data", *folders, name) for folders, name in parts]
    names = [job.name for job in make_jobs(paths, None)]
    assert len(set(names)) == len(paths)


def test_an_output_name_of_an_image_in_the_root_folder_is_no_path():
    names = [job.name for job in make_jobs([Path("/x.png"), Path("/a/x.png")], None)]
    assert not any("/" in name for name in names)


def test_a_name_made_from_the_ending_does_not_meet_another_image():
    paths = [Path("/d/x.png"), Path("/d/x.jpg"), Path("/d/x_png.png")]
    assert len({job.name for job in make_jobs(paths, None)}) == 3


def test_a_slug_fits_a_file_name_and_tells_sentences_apart():
    assert slug(None) == "no-text"
    assert slug(PROMPT).startswith("one-small-bright-round-lesion")
    assert slug("Größe / 3: ../../etc") != slug("größe 3 etc")
    long = [slug("word " * 40 + ending) for ending in ("a", "b")]
    assert len(set(long)) == 2
    for text in (*long, slug("../.."), slug("éü")):
        assert len(text) < 60
        assert set(text) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


@pytest.mark.parametrize("column", ["text", "prompt"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_sentences_are_read_by_image(tmp_path: Path, column: str, suffix: str):
    images = [_picture(tmp_path / f"{name}.png") for name in "abc"]
    rows = [("a.png", "first"), ("b", "second"), (str(images[2]), "third")]
    if suffix == ".csv":
        content = f"image,{column}\n" + "".join(f"{name},{text}\n" for name, text in rows)
    else:
        content = "".join(json.dumps({"image": name, column: text}) + "\n" for name, text in rows)
    (tmp_path / f"jobs{suffix}").write_text(content, encoding="utf-8")
    jobs = read_jobs(tmp_path / f"jobs{suffix}", images)
    assert jobs == [Job(image, text, image.stem) for image, (_, text) in zip(images, rows, strict=True)]


def test_an_image_on_several_lines_gets_a_mask_for_each_sentence(tmp_path: Path):
    image = _picture(tmp_path / "a.png")
    (tmp_path / "jobs.csv").write_text("image,text\na.png,one lesion\na.png,two lesions\na.png,\n")
    jobs = read_jobs(tmp_path / "jobs.csv", [image])
    assert [job.text for job in jobs] == ["one lesion", "two lesions", None]
    assert [job.name for job in jobs] == [
        f"a_{slug('one lesion')}",
        f"a_{slug('two lesions')}",
        "a_no-text",
    ]


def test_paths_are_relative_to_the_file(tmp_path: Path):
    image = _picture(tmp_path / "in" / "a.png")
    (tmp_path / "jobs.csv").write_text("image,text\nin/a.png,one lesion\n./in/../in/a.png,one lesion\n")
    assert read_jobs(tmp_path / "jobs.csv", [image]) == [Job(image, "one lesion", "a")]  # equal lines count once


def test_equal_stems_get_their_own_sentences(tmp_path: Path):
    images = [_picture(tmp_path / folder / "x.png") for folder in ("first", "second")]
    (tmp_path / "jobs.csv").write_text("image,text\nfirst/x.png,one\nsecond/x.png,two\n")
    jobs = read_jobs(tmp_path / "jobs.csv", images)
    assert [(job.image, job.text) for job in jobs] == [(images[0], "one"), (images[1], "two")]


def test_a_stem_that_several_images_share_is_refused(tmp_path: Path):
    images = [_picture(tmp_path / folder / "x.png") for folder in ("first", "second")]
    (tmp_path / "jobs.csv").write_text("image,text\nx,one\n")
    with pytest.raises(DataError, match="line 2"):
        read_jobs(tmp_path / "jobs.csv", images)


def test_an_image_is_meant_by_how_its_path_ends(tmp_path: Path):
    images = [_picture(tmp_path / folder / "x.png") for folder in ("first", "second")]
    (tmp_path / "jobs.csv").write_text("image,text\nsecond/x.png,one\nfirst/x,two\n")
    assert [job.image for job in read_jobs(tmp_path / "jobs.csv", images)] == images[::-1]


def test_the_name_of_an_input_in_another_folder_does_not_mean_it(tmp_path: Path):
    (tmp_path / "jobs.csv").write_text("image,text\nthird/x.png,one\n")
    with pytest.raises(DataError, match=r"'third/x\.png' is not among the inputs"):
        read_jobs(tmp_path / "jobs.csv", [_picture(tmp_path / "first" / "x.png")])


def test_a_line_with_an_unknown_image_is_named(tmp_path: Path):
    (tmp_path / "jobs.csv").write_text("image,text\na.png,one\nz.png,two\n")
    with pytest.raises(DataError, match=r"line 3: image 'z\.png' is not among the inputs"):
        read_jobs(tmp_path / "jobs.csv", [_picture(tmp_path / "a.png")])


def test_a_file_without_the_column_is_refused(tmp_path: Path):
    (tmp_path / "jobs.csv").write_text("file,text\na.png,one\n")
    with pytest.raises(DataError, match="no column 'image'"):
        read_jobs(tmp_path / "jobs.csv", [])


# The batch -------------------------------------------------------------------------------------------------------


def test_masks_overlays_and_a_report_are_written(
    predictor: Predictor, model_folder: Path, phantoms: Manifest, tmp_path: Path
):
    images = [phantoms.image_path(record) for record in phantoms.records[:2]] + [_picture(tmp_path / "wide.jpg")]
    jobs = make_jobs(images, PROMPT)
    out = tmp_path / "out"
    predict_batch(predictor, jobs, out, model=str(model_folder), threshold=0.4, save_probabilities=True)

    names = {job.name for job in jobs}
    assert {path.name for path in out.iterdir()} == (
        {f"{name}.png" for name in names} | {f"{name}_prob.png" for name in names} | {"overlays", "run_report.json"}
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
    assert report["model"]["sha256"] == {name: sha256_of(model_folder / name) for name in files}
    assert (report["device"], report["precision"], report["failures"]) == ("cpu", predictor.precision, [])
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
        assert case["prompt_effect"] == pytest.approx(1 - share if mask.any() or without.any() else 0, abs=1e-4)
        assert set(case["seconds"]) == {"read_and_encode", "segment", "write"}


def test_several_sentences_on_one_image_encode_it_once(
    predictor: Predictor, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first, second = _picture(tmp_path / "a.png"), _picture(tmp_path / "b.png", seed=1)
    jobs = [Job(first, text, f"a{number}") for number, text in enumerate((PROMPT, "two dark lesions", None))]
    encoded = []
    real = Predictor.set_image

    def counted(chosen: Predictor, image: object) -> None:
        encoded.append(image)
        real(chosen, image)

    monkeypatch.setattr(Predictor, "set_image", counted)
    report = predict_batch(predictor, [*jobs, Job(second, None, "b")], tmp_path / "out", model=str(model_folder))
    assert len(encoded) == 2
    assert [case["setting"] for case in report.cases] == ["guided", "guided", "no text", "no text"]
    assert [case["prompt_effect"] is None for case in report.cases] == [False, False, True, True]
    assert report.cases[0]["foreground_share"] >= 0


def test_a_broken_image_does_not_end_the_batch_nor_spoil_the_next(
    predictor: Predictor, model_folder: Path, tmp_path: Path
):
    good = _picture(tmp_path / "good.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes(good.read_bytes()[:300])
    jobs = [Job(good, None, "one"), Job(broken, None, "two"), Job(broken, PROMPT, "three"), Job(good, None, "four")]
    report = predict_batch(predictor, jobs, tmp_path / "out", model=str(model_folder))
    assert [case["outputs"]["mask"] for case in report.cases] == ["one.png", "four.png"]
    assert (tmp_path / "out" / "one.png").read_bytes() == (tmp_path / "out" / "four.png").read_bytes()
    assert [failure["image"] for failure in report.failures] == [str(broken)] * 2
    for failure in report.failures:
        assert set(failure) == {"image", "code", "message", "hint"}
        assert failure["code"] == "invalid_input"
        assert str(broken) in failure["message"]
        assert failure["hint"]
    assert json.loads((tmp_path / "out" / "run_report.json").read_text("utf-8"))["failures"] == report.failures


def test_a_sentence_over_the_limit_is_reported(predictor: Predictor, model_folder: Path, tmp_path: Path):
    job = Job(_picture(tmp_path / "a.png"), "lesion " * 50, "a")
    (case,) = predict_batch(predictor, [job], tmp_path / "out", model=str(model_folder)).cases
    assert case["truncated"] is True
    assert case["tokens"] > 24


def test_masks_that_are_there_are_kept_unless_told(predictor: Predictor, model_folder: Path, tmp_path: Path):
    jobs = make_jobs([_picture(tmp_path / "a.png"), _picture(tmp_path / "b.png")], None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.png").write_bytes(b"precious")
    with pytest.raises(StorageError, match=r"b\.png already") as caught:
        predict_batch(predictor, jobs, tmp_path / "out", model=str(model_folder))
    assert "--overwrite" in caught.value.hint
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"b.png"}
    predict_batch(predictor, jobs, tmp_path / "out", model=str(model_folder), overwrite=True)
    assert read_mask(tmp_path / "out" / "b.png").shape == (40, 56)


def test_a_full_disk_ends_the_batch(
    predictor: Predictor, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    jobs = make_jobs([_picture(tmp_path / "a.png")], None)

    def full(path: Path, _: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(files.Path, "write_bytes", full)
    with pytest.raises(StorageError, match=r"a\.png") as caught:
        predict_batch(predictor, jobs, tmp_path / "out", model=str(model_folder))
    assert "disk is full" in caught.value.hint
