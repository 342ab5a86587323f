from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from tmca.comparison import Comparison, compare
from tmca.comparison_report import (
    MOST_DOTS,
    case_list,
    in_words,
    latex_table,
    method_in_words,
    pair_table,
    run_table,
    write_comparison,
)
from tmca.evaluation.reading import Protocol, ScoredRun, read_runs
from tmca.metrics import Counts

RESULTS = Path(__file__).resolve().parents[1] / "results"


def _counts(cases: Sequence[tuple[int, int, int]]) -> Counts:
    """Return the counts of cases given as true positive, false positive, false negative."""
    table = np.array(cases, dtype=np.int64).reshape(-1, 3)
    return Counts(*table.T, true_negative=100 - table.sum(axis=1))


def _random(seed: int, cases: int = 30) -> Counts:
    rng = np.random.default_rng(seed)
    found, wrong = rng.integers(10, 41, cases), rng.integers(0, 30, cases)
    return Counts(found, wrong, 40 - found, 60 - wrong)


def _compare(
    *counts: Counts, patients: Sequence[str] | None = None, names: Sequence[str] = (), **protocol: Any
) -> Comparison:
    ids = tuple(f"case-{number:02}" for number in range(len(counts[0])))
    meaning = Protocol(
        **{"split": "test", "data_hash": "a", "space": "64", "threshold": 0.5, "empty_policy": "one"} | protocol
    )
    texts = tuple(f"one polyp & {name}" for name in ids)
    names = names or [f"run-{number}" for number in range(len(counts))]
    return compare(
        [
            ScoredRun(name, (Path(name),), meaning, ids, tuple(patients or ids), texts, part, None)
            for name, part in zip(names, counts, strict=True)
        ]
    )


@pytest.fixture
def comparison() -> Comparison:
    return _compare(_random(1), _random(2), _random(3))


def _print(table: Table, width: int = 100) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_terminal_names_runs_by_their_numbers(comparison: Comparison):
    runs, pairs, cases = (
        _print(table) for table in (run_table(comparison), pair_table(comparison), case_list(comparison, 2))
    )
    assert re.search(r"2 │ run-1 +│", runs)
    for pair, name in zip(comparison.pairs, ("2 − 1", "3 − 1", "3 − 2"), strict=True):
        (line,) = [line for line in pairs.splitlines() if line.startswith(f"│ {name} ")]
        assert f"{pair.pooled_dice_difference:+.3f} [" in line
        assert f"{pair.wins}/{pair.ties}/{pair.losses}" in line
    assert f"case-{comparison.most_different(1)[0]:02}" in cases
    assert "one polyp" in cases


def test_the_tables_fit_a_terminal():
    recorded = ("kvasir-mobile", "kvasir-mobile-ariadne", "kvasir-mobile-image-only", "kvasir-mobile-seed2")
    comparison = compare(read_runs([RESULTS / f"{name}.json" for name in recorded]), group_seeds=True)
    assert re.search(r"kvasir-mobile \(2 seeds\) +│ 0\.\d{3} ± 0\.\d{3} ", _print(run_table(comparison)))
    for table in (run_table(comparison), pair_table(comparison), case_list(comparison, 3)):
        assert "…" not in _print(table, width=80)


def test_the_words_tell_what_was_compared():
    patients = [f"patient {number // 3}" for number in range(30)]
    comparison = _compare(_random(1), _random(2), patients=patients, space="original", empty_policy="skip")
    assert in_words(comparison) == (
        "Split test, 30 cases of 10 patients, compared at each image's original size, threshold 0.5; a case that is "
        "empty in mask and prediction is left out."
    )
    assert "bootstrap over patients" in method_in_words(comparison)
    assert "Holm-corrected for 1 pair." in method_in_words(comparison)


@pytest.fixture
def written(comparison: Comparison, tmp_path: Path) -> Path:
    write_comparison(comparison, tmp_path / "out", cases=4)
    return tmp_path / "out"


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_tables_hold_a_row_a_pair_and_a_row_a_case(comparison: Comparison, written: Path):
    pairs, cases = _rows(written / "comparison.csv"), _rows(written / "cases.csv")
    assert [(row["reference"], row["run"]) for row in pairs] == [
        (pair.reference, pair.run) for pair in comparison.pairs
    ]
    for row, pair in zip(pairs, comparison.pairs, strict=True):
        assert list(row) == list(pair.row())
        assert float(row["pooled_dice_difference"]) == pytest.approx(pair.pooled_dice_difference, abs=1e-6)
        assert int(row["wins"]) + int(row["ties"]) + int(row["losses"]) == int(row["n"]) == 30
    assert list(cases[0]) == ["id", "patient_id", "run-0", "run-1", "run-2", "text"]
    assert len(cases) == 30
    dice = comparison.columns[1].cases("dice")
    assert [float(row["run-1"]) for row in cases] == pytest.approx(dice.tolist(), abs=1e-6)


def test_the_json_holds_protocol_runs_and_pairs(comparison: Comparison, written: Path):
    values = json.loads((written / "comparison.json").read_text("utf-8"), parse_constant=pytest.fail)
    protocol = {"split": "test", "space": "64", "threshold": 0.5, "empty_policy": "one", "n": 30, "n_patients": 30}
    assert protocol.items() <= values.items()
    assert [run["name"] for run in values["runs"]] == ["run-0", "run-1", "run-2"]
    assert len(values["pairs"]) == 3
    first = values["pairs"][0]
    assert first["wilcoxon_p"] == comparison.pairs[0].p
    assert len(first["cases"]) == 4
    worst = first["cases"][0]
    assert worst["difference"] == pytest.approx(worst["run"] - worst["reference"])
    assert worst["text"] == f"one polyp & {worst['id']}"


def test_left_out_cases_and_single_patients_are_written_too(tmp_path: Path):
    first, second = _counts([(0, 0, 0), (5, 5, 5)]), _counts([(0, 7, 0), (6, 0, 4)])
    comparison = _compare(first, second, empty_policy="skip", patients=["one", "one"])
    write_comparison(comparison, tmp_path / "out")
    json.loads((tmp_path / "out" / "comparison.json").read_text("utf-8"), parse_constant=pytest.fail)
    assert _rows(tmp_path / "out" / "comparison.csv")[0]["pooled_dice_low"] == ""
    assert _rows(tmp_path / "out" / "cases.csv")[0]["run-0"] == ""
    assert "nan" not in (tmp_path / "out" / "comparison.html").read_text("utf-8")


def test_the_latex_table_has_a_row_a_run(comparison: Comparison):
    lines = latex_table(comparison).splitlines()
    assert lines[0].startswith("% Split test")
    start, end = lines.index(r"\begin{tabular}{lrrrrr}"), lines.index(r"\end{tabular}")
    rows = [line for line in lines[start:end] if line.endswith(r"\\")]
    assert len(rows) == 4
    assert all(row.count("&") == 5 for row in rows)
    assert rows[1].endswith(r"&  &  \\")
    assert f"${comparison.pairs[0].pooled_dice_difference:+.3f} [" in rows[2]
    assert all(line.startswith("%") for line in lines[:start])


def test_names_are_escaped_for_latex():
    text = latex_table(_compare(_random(1), _random(2), names=("first", r"[50_% of #1 & $2] ~^{\x}")))
    escaped = r"{[}50\_\% of \#1 \& \$2] \textasciitilde{}\textasciicircum{}\{\textbackslash{}x\}"
    assert any(line.startswith(f"{escaped} & ") for line in text.splitlines())


class _Page(HTMLParser):
    """Collects tags and addresses, and checks that tags are closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "data")]
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def test_the_page_stands_alone(written: Path, comparison: Comparison):
    text = (written / "comparison.html").read_text("utf-8")
    page = _Page(text)
    assert page.addresses == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"@import|url\(|https?://", text)
    assert page.tags.count("svg") == 3
    assert page.tags.count("circle") == 90
    for pair in comparison.pairs:
        assert f"{pair.run} minus {pair.reference}" in text
    assert "one polyp &amp; case-" in text
    assert "not a medical device" in text


def test_the_page_escapes_names(tmp_path: Path):
    write_comparison(_compare(_random(1), _random(2), names=("first", "<script>x</script>")), tmp_path / "out")
    assert "<script" not in (tmp_path / "out" / "comparison.html").read_text("utf-8")


def test_a_large_split_draws_some_of_its_dots(tmp_path: Path):
    many = 2 * MOST_DOTS + 1
    write_comparison(_compare(_random(1, many), _random(2, many)), tmp_path / "out")
    page = (tmp_path / "out" / "comparison.html").read_text("utf-8")
    dots = page.count("<circle")
    assert MOST_DOTS / 2 < dots <= MOST_DOTS
    assert f"{dots} of {many} cases" in page


def test_dots_lie_within_the_picture_in_the_order_of_their_difference(written: Path):
    page = (written / "comparison.html").read_text("utf-8").partition("</svg>")[0]
    dots = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', page)]
    assert len(dots) == 30
    assert all(0 <= x <= 960 and 0 <= y <= 240 for x, y in dots)
    assert dots == sorted(dots)
    assert [y for _, y in dots] == sorted((y for _, y in dots), reverse=True)
