from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tmca.config import Experiment
from tmca.data.manifest import Manifest
from tmca.evaluation import VARIANTS, Evaluation, evaluate
from tmca.inference import Predictor
from tmca.metrics import Counts
from tmca.models import TMCA
from tmca.presets import NO_ALIGNMENT, NO_ENHANCEMENT
from tmca.report import prompt_effect, score_rows, score_table, surface_line, write_report

EVIL = 'one <script>alert("x")</script> & small "lesion", located in left of the image'


class _Page(HTMLParser):
    """Collects what a browser would load, and checks that tags are closed."""

    VOID = ("meta", "img", "br", "rect", "link", "input", "hr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def predictor(tiny_model: Callable[..., TMCA], phantoms: Manifest) -> Predictor:
    return Predictor(tiny_model(sentences=phantoms.sentences), "cpu")


@pytest.fixture(scope="module")
def data(phantoms: Manifest) -> Manifest:
    """The phantoms with one sentence that tries to be a program."""
    first, *others = phantoms.split("test").records
    return phantoms.with_records([replace(first, text=EVIL), *others])


@pytest.fixture(scope="module")
def evaluation(predictor: Predictor, data: Manifest) -> Evaluation:
    return evaluate(predictor.model, data, threshold=0.4)


@pytest.fixture(scope="module")
def folder(
    evaluation: Evaluation, predictor: Predictor, data: Manifest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("report")
    assert (
        write_report(evaluation, predictor, data, folder, model="a <b>model</b>", examples=4) == folder / "report.html"
    )
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text("utf-8")


def test_the_page_loads_nothing_from_elsewhere(page: str):
    parsed = _Page(page)
    assert parsed.addresses
    assert all(address.startswith("data:image/png;base64,") for address in parsed.addresses)
    assert not {"script", "link", "iframe", "object", "embed"} & set(parsed.tags)
    assert not re.search(r"@import|url\(\s*['\"]?(?!data:)", page)
    assert not re.search(r"https?://", page)


def test_the_pictures_are_in_the_page(page: str):
    pictures = [address.partition(",")[2] for address in _Page(page).addresses]
    assert len(pictures) == 8
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture, validate=True))) as image:
            assert image.format == "PNG"
            assert image.width > image.height > 100
            assert max(image.size) <= 1600


def test_the_drawn_cases_are_also_files(folder: Path, evaluation: Evaluation):
    assert {path.stem for path in (folder / "overlays").iterdir()} == set(evaluation.ids)


def test_the_worst_and_the_best_cases_are_drawn(
    evaluation: Evaluation, predictor: Predictor, data: Manifest, tmp_path: Path
):
    page = write_report(evaluation, predictor, data, tmp_path, model="m", examples=2).read_text("utf-8")
    first, second, *_, last_but_one, last = (evaluation.ids[index] for index in evaluation.by_dice())
    assert re.findall(r'alt="Case (\S+):', page) == [first, second, last, last_but_one]


def test_sentences_and_names_are_escaped(page: str):
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "a &lt;b&gt;model" in page
    assert "<b>" not in page
    (alt,) = re.findall(r'alt="(Case test-00000: [^"]*)"', page)  # its quotes do not end the attribute
    assert html.unescape(alt).startswith(f"Case test-00000: {EVIL}; Dice ")


def test_the_page_names_protocol_scores_and_origin(page: str, evaluation: Evaluation, data: Manifest):
    text = " ".join(_Page(page).text.split())
    for words in (
        *("pooled Dice", "per-case Dice", "Pooled", "per case", "95 % intervals", "threshold 0.4", "64 × 64"),
        *("not a medical device", "8 cases", data.content_hash(), f"{evaluation.pooled()['dice']:.3f}"),
        f"{evaluation.per_case('none')['dice']:.3f}",
        *VARIANTS.values(),
    ):
        assert words in text, words


def test_the_page_tells_how_far_outlines_lie_apart(page: str, predictor: Predictor, data: Manifest, tmp_path: Path):
    assert "HD95" not in page
    evaluation = evaluate(predictor.model, data, threshold=0.4, surface_tolerance=3.0)
    assert evaluation.surface is not None
    n = int(np.isfinite(evaluation.surface.hd95).sum())
    line = surface_line(evaluation)
    assert f"HD95 {np.nanmean(evaluation.surface.hd95):.3f} pixels (mean of the {n} of 8 cases" in line
    assert "at a tolerance of 3 pixels (8 cases)" in line
    assert line in write_report(evaluation, predictor, data, tmp_path, model="m", examples=1).read_text("utf-8")
    assert surface_line(replace(evaluation, surface=None)) == ""


def test_the_histogram_counts_every_case(page: str):
    counts = [int(count) for count in re.findall(r": (\d+) cases</title>", page)]
    assert len(counts) == 20
    assert sum(counts) == 8


def test_a_small_split_draws_no_case_twice(
    evaluation: Evaluation, predictor: Predictor, data: Manifest, tmp_path: Path
):
    page = write_report(evaluation, predictor, data, tmp_path, model="m", examples=6).read_text("utf-8")
    drawn = re.findall(r'alt="Case (\S+):', page)
    assert len(drawn) == 8
    assert len(set(drawn)) == 8


def test_cut_sentences_are_told(predictor: Predictor, phantoms: Manifest, tmp_path: Path):
    first, *others = phantoms.split("test").records
    long = phantoms.with_records([replace(first, text="lesion " * 40), *others[:2]])
    page = write_report(evaluate(predictor.model, long), predictor, long, tmp_path, model="m").read_text("utf-8")
    assert "1 distinct sentence was cut at the token limit" in page


def test_the_report_of_an_image_only_model(
    tiny_model: Callable[..., TMCA], tiny_experiment: Experiment, phantoms: Manifest, tmp_path: Path
):
    model = tiny_model(guidance=False, alignment=NO_ALIGNMENT, enhancement=NO_ENHANCEMENT)
    silent = phantoms.with_records(replace(record, text=None) for record in phantoms.split("test").records[:3])
    evaluation = evaluate(model, silent)
    assert prompt_effect(evaluation) is None
    assert [row["variant"] for row in score_rows(evaluation)] == ["right"]
    page = write_report(evaluation, Predictor(model, "cpu"), silent, tmp_path, model=tiny_experiment.name)
    assert "sentence gives nearly the same" not in page.read_text("utf-8")
    _Page(page.read_text("utf-8"))


def _evaluation(right: int, shuffled: int) -> Evaluation:
    """Ten pixels of foreground, of which so many are found with the right sentence and with another's."""

    def counts(found: int) -> Counts:
        return Counts(*(np.array([value], dtype=np.int64) for value in (found, 0, 10 - found, 90)))

    names = {"right": right, "shuffled": shuffled}
    return Evaluation(
        split="test",
        ids=("a",),
        patients=("a",),
        texts=dict.fromkeys(names, ("one lesion",)),
        counts={name: counts(found) for name, found in names.items()},
        cases={name: np.array([0]) for name in names},
        threshold=0.5,
        space="network",
        image_size=64,
        empty_policy="one",
    )


def test_whether_the_sentence_matters_is_said_in_words():
    assert "from 1.000 to 0.182" in (prompt_effect(_evaluation(10, 1)) or "")
    assert "reads the sentence" in (prompt_effect(_evaluation(10, 1)) or "")
    assert "hardly reads" in (prompt_effect(_evaluation(9, 9)) or "")
    assert "gives a better score (0.947 instead of 0.667)" in (prompt_effect(_evaluation(5, 9)) or "")


def test_the_table_of_the_terminal(evaluation: Evaluation):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(score_table(evaluation, "Title"))
    text = console.export_text()
    assert "Title" in text
    for row in score_rows(evaluation):
        assert row["label"] in text
        assert f"{row['pooled']['dice']:.3f}" in text
    assert score_rows(evaluation)[0]["n"] == 8
