from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tmca.errors import ConfigError, DataError
from tmca.jobs import Job, find_images, make_jobs, make_series_jobs, part_of, read_jobs, slug

PARAMETRIC_MAP = "1.2.840.10008.5.1.4.1.1.30"
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


# Finding images --------------------------------------------------------------------------------------------------


def test_a_folder_is_searched_through_and_through(tmp_path: Path):
    _touch(*(tmp_path / name for name in ("b.png", "a.JPG", "deep/er/c.tiff", "notes.txt", "deep/manifest.csv")))
    (tmp_path / "folder.png").mkdir()
    found = find_images([tmp_path])
    assert found == sorted(tmp_path / name for name in ("a.JPG", "b.png", "deep/er/c.tiff"))


def test_what_every_export_holds_beside_images_is_passed_over(draw_dicom: Callable[..., Path], tmp_path: Path):
    pydicom = pytest.importorskip("pydicom")
    film = draw_dicom(tmp_path / "st" / "film.dcm", np.zeros((8, 8), dtype=np.uint8), "CR")
    report = pydicom.dcmread(film)
    pixels = ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored")
    for name in (*pixels, "PixelData"):
        del report[name]
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    report.save_as(tmp_path / "st" / "report.dcm")
    (tmp_path / "st" / "damaged.dcm").write_bytes(b"nothing")
    _touch(tmp_path / "st" / "._film.png", tmp_path / "st" / ".hidden" / "a.png")
    assert find_images([tmp_path / "st"]) == [tmp_path / "st" / "damaged.dcm", film]


def test_linked_folders_are_searched_once(tmp_path: Path):
    _touch(tmp_path / "far" / "a.png", tmp_path / "in" / "b.png")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "in")
    assert [path.name for path in find_images([tmp_path / "in"])] == ["b.png", "a.png"]


@pytest.mark.parametrize("name", ["", "  "])
def test_a_blank_name_is_not_the_current_folder(name: str):
    with pytest.raises(ConfigError, match="blank"):
        find_images([name])
    with pytest.raises(ConfigError, match="blank"):
        make_series_jobs([name], None)


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


def test_long_names_are_cut_and_stay_different(tmp_path: Path):
    deep = [tmp_path / ("é" * 60 + "a") / ("ü" * 60) / folder / "x.png" for folder in ("one", "two")]
    names = [job.name for job in make_jobs([*deep, tmp_path / "x.png"], None)]
    assert len(set(names)) == 3
    assert all(len(name.encode()) <= 160 for name in names)


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


def test_a_line_with_an_unknown_image_is_the_problem_of_its_case_alone(tmp_path: Path):
    (tmp_path / "jobs.csv").write_text("image,text\na.png,one\nz.png,two\n")
    first, second = read_jobs(tmp_path / "jobs.csv", [_picture(tmp_path / "a.png")])
    assert (first.text, first.problem) == ("one", None)
    assert "line 3: image 'z.png' is not among the inputs" in str(second.problem)
    (tmp_path / "jobs.csv").write_text("image,text\nz.png,two\n")
    with pytest.raises(DataError, match=r"line 2: image 'z\.png' is not among the inputs"):
        read_jobs(tmp_path / "jobs.csv", [tmp_path / "a.png"])


@pytest.mark.parametrize("column", ["Text", "sentence", "TEXT"])
def test_a_file_without_sentences_is_refused_not_segmented_without(tmp_path: Path, column: str):
    (tmp_path / "jobs.csv").write_text(f"image,{column}\na.png,one lesion\n")
    with pytest.raises(DataError, match="no column 'text'"):
        read_jobs(tmp_path / "jobs.csv")


def test_a_blank_line_and_a_bad_report_of_one_image_are_two_cases(tmp_path: Path):
    (tmp_path / "jobs.csv").write_text("image,text,report\na.png,,\na.png,,gone.txt\nb.png,one,\n")
    blank, gone, _ = read_jobs(tmp_path / "jobs.csv")
    assert (blank.problem, gone.problem is None) == (None, False)


def test_a_file_without_the_column_is_refused(tmp_path: Path):
    (tmp_path / "jobs.csv").write_text("file,text\na.png,one\n")
    with pytest.raises(DataError, match="no column 'image'"):
        read_jobs(tmp_path / "jobs.csv", [])


def test_a_file_may_name_its_images_itself(tmp_path: Path):
    (tmp_path / "manifest.csv").write_text("id,image,text\n1,in/a.png,one lesion\n2,in/gone.png,\n")
    assert read_jobs(tmp_path / "manifest.csv") == [
        Job(tmp_path / "in/a.png", "one lesion", "a"),
        Job(tmp_path / "in/gone.png", None, "gone"),
    ]


def test_jobs_are_found_in_linear_time(tmp_path: Path):
    images = [Path(f"/data/patient{number}/scan.png") for number in range(4000)]
    lines = "".join(f"patient{number}/scan.png,one lesion\n" for number in range(4000))
    (tmp_path / "jobs.csv").write_text("image,text\n" + lines)
    jobs = read_jobs(tmp_path / "jobs.csv", images)
    assert [job.image for job in jobs] == images


def test_sentences_are_taken_from_reports(tmp_path: Path):
    (tmp_path / "a.txt").write_text("Opacity in the right lower zone. The left lung is clear.")
    (tmp_path / "jobs.csv").write_text("image,text,report\na.png,,a.txt\nb.png,one lesion,a.txt\n")
    first, second = read_jobs(tmp_path / "jobs.csv")
    assert first.report is not None
    assert first.text == first.report.prompt == "Unilateral pulmonary infection, lower left lung."
    assert (second.text, second.report) == ("one lesion", None)


def test_a_report_that_cannot_be_read_is_the_problem_of_its_case_alone(tmp_path: Path):
    (tmp_path / "a.txt").write_text("Opacity in the right lower zone.")
    (tmp_path / "b.txt").write_text("Kein Hinweis auf eine Verschattung, links ist der Befund nicht so klar.")
    (tmp_path / "jobs.csv").write_text("image,report\na.png,gone.txt\nb.png,b.txt\nc.png,a.txt\n")
    gone, german, read = read_jobs(tmp_path / "jobs.csv")
    assert (read.text, read.problem) == ("Pulmonary infection, lower left lung.", None)
    assert [str(job.problem).partition(":")[0] for job in (gone, german)] == [
        f"{tmp_path / 'jobs.csv'}, line {line}" for line in (2, 3)
    ]
    assert "report gone.txt: " in str(gone.problem)
    assert "report b.txt: The report does not read as English" in str(german.problem)


# Series ----------------------------------------------------------------------------------------------------------


def _of_kind(path: Path, syntax: str, **tags: str) -> None:
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = syntax
    if pydicom.uid.UID(syntax).is_compressed:
        dataset.PixelData = pydicom.encaps.encapsulate([b"film"])
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path)


@pytest.mark.parametrize(
    ("syntax", "tags", "reason"),
    [
        (pydicom.uid.MPEG4HP41, {}, "is compressed as MPEG-4"),
        (pydicom.uid.ExplicitVRLittleEndian, {"SOPClassUID": PARAMETRIC_MAP}, "holds a parametric map, which is not"),
    ],
)
def test_a_file_that_is_not_supported_refuses_only_the_series_that_it_names(
    draw_slices: Callable, draw_dicom: Callable, tmp_path: Path, syntax: str, tags: dict[str, str], reason: str
):
    draw_slices(tmp_path, np.zeros((5, 8, 8), np.int16), SeriesInstanceUID="1.2.3")
    clip = draw_dicom(tmp_path / "clip.dcm", np.zeros((8, 8), np.uint8), SeriesInstanceUID="1.2.4")
    _of_kind(clip, syntax, **tags)
    alone, series = make_series_jobs([tmp_path], PROMPT)
    assert (alone.image, len(series.slices)) == (clip, 5)
    assert reason in str(alone.problem)
    assert "damaged" not in str(alone.problem)
    assert series.problem is None
    _of_kind(clip, syntax, **tags, SeriesInstanceUID="1.2.3")
    _, series = make_series_jobs([tmp_path], PROMPT)
    assert re.search(f"clip.dcm of the same series cannot be used: .*clip.dcm {reason}", str(series.problem))


# Shares of the work ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 7))
def test_shares_are_disjoint_complete_and_keep_an_image_together(images: list[int], count: int):
    jobs = [Job(Path(f"{image}.png"), str(number), f"{number}") for number, image in enumerate(sorted(images))]
    shares = [part_of(jobs, count, number) for number in range(count)]
    assert sorted((job for share in shares for job in share), key=jobs.index) == jobs
    places = [{job.image for job in share} for share in shares]
    assert sum(len(place) for place in places) == len({job.image for job in jobs})
    sizes = [len(place) for place in places]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("count", "number"), [(0, 0), (2, 2), (2, -1), (-1, 0)])
def test_a_share_that_is_not_there_is_refused(count: int, number: int):
    with pytest.raises(ConfigError, match=f"Part {number} of {count}"):
        part_of([], count, number)


def test_earlier_results_are_no_images(tmp_path: Path):
    _touch(*(tmp_path / name for name in ("a.png", "out/a.png", "out/overlays/a.png", "output.png")))
    assert find_images([tmp_path], tmp_path / "out") == [tmp_path / "a.png", tmp_path / "output.png"]
    assert find_images([tmp_path / "out"], tmp_path / "out") == [
        tmp_path / "out/a.png",
        tmp_path / "out/overlays/a.png",
    ]
    assert len(find_images([tmp_path / "out" / "a.png"], tmp_path / "out")) == 1


@pytest.mark.parametrize(("on_disk", "written"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_may_be_written_apart_from_their_letters(tmp_path: Path, on_disk: str, written: str):
    image = _picture(tmp_path / unicodedata.normalize(on_disk, "Köhler/é.png"))
    name = unicodedata.normalize(written, "Köhler/é.png")
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"image": name, "text": PROMPT}, ensure_ascii=False), "utf-8")
    assert [job.image for job in read_jobs(tmp_path / "jobs.jsonl", [image])] == [image]
    assert [job.image for job in read_jobs(tmp_path / "jobs.jsonl")] == [image]


def test_half_of_a_character_is_no_sentence_to_fail_on(tmp_path: Path):
    image = _picture(tmp_path / "a.png")
    (tmp_path / "jobs.jsonl").write_text('{"image": "a.png", "text": "one polyp \\ud83d left"}', "utf-8")
    (job,) = read_jobs(tmp_path / "jobs.jsonl", [image])
    assert job.text == "one polyp ? left"
