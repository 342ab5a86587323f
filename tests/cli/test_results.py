from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tmca import cli
from tmca.data.manifest import Manifest
from tmca.models import TMCA

RESULTS = Path(__file__).resolve().parents[2] / "results"
ENTRIES = [RESULTS / f"{name}.json" for name in ("kvasir-mobile", "kvasir-mobile-ariadne", "kvasir-mobile-seed2")]


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def tmca(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: object) -> Outcome:
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Outcome(code, captured.out, captured.err)

    return call


def test_entries_of_the_ledger_are_compared(tmca: Callable[..., Outcome], tmp_path: Path):
    outcome = tmca("compare", *ENTRIES, "-o", tmp_path / "out", "--cases", 2)
    assert (outcome.code, outcome.err) == (0, "")
    for words in ("Split test, 100 cases, compared at 224 × 224", "kvasir-mobile-seed2", "2 − 1", "3 − 2", "Wilcoxon"):
        assert words in outcome.out
    assert len(set(re.findall(r"│ (c[a-z0-9]{20,})", outcome.out))) == 2
    files = {"comparison.csv", "comparison.html", "comparison.json", "comparison.tex", "cases.csv"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert str(tmp_path / "out" / "comparison.html") in outcome.out


def test_nothing_is_written_unless_asked(tmca: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    outcome = tmca("compare", *ENTRIES, "--group-seeds", "--cases", 0)
    assert outcome.code == 0
    assert "kvasir-mobile (2 seeds)" in outcome.out
    assert "polyp" not in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_be_compared_is_one_line(tmca: Callable[..., Outcome], tmp_path: Path):
    assert tmca("compare", ENTRIES[0]).code == 2
    run = tmp_path / "run"
    run.mkdir()
    (run / "experiment.json").write_text("{}")
    outcome = tmca("compare", ENTRIES[0], run, "--split", "val")
    assert outcome.code == 3
    (line,) = outcome.err.splitlines()
    assert f"(tmca evaluate -m {run} --data DATA --split val)" in line


def test_what_evaluate_writes_can_be_compared(
    tmca: Callable[..., Outcome], tiny_model: Callable[..., TMCA], phantoms: Manifest, tmp_path: Path
):
    """The whole way, with distances between outlines."""
    for seed in (1, 2):
        model = tiny_model(seed, sentences=phantoms.sentences)
        model.save_pretrained(tmp_path / f"model-{seed}")
        flags = ("--surface", "--tolerance", 3, "--threshold", 0.45)
        outcome = tmca("evaluate", "-m", tmp_path / f"model-{seed}", "--data", phantoms.root, *flags)
        assert outcome.code == 0
        assert "HD95 " in outcome.out
        assert "at a tolerance of 3 pixels" in outcome.out
    folder = tmp_path / "model-1" / "evaluation-test"
    surface = json.loads((folder / "summary.json").read_text("utf-8"))["protocol"]["surface"]
    assert (surface["tolerance"], surface["unit"], surface["n_surface_dice"]) == (3, "pixels", 8)
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as stream:
        assert {"hd95", "surface_dice"} <= set(next(csv.reader(stream)))
    outcome = tmca("compare", folder, tmp_path / "model-2" / "evaluation-test")
    assert outcome.code == 0
    assert "model-1" in outcome.out
    assert "8 cases, compared at 64 × 64 pixels, threshold 0.45" in outcome.out


def test_distances_are_not_measured_unless_asked(
    tmca: Callable[..., Outcome], tiny_model: Callable[..., TMCA], phantoms: Manifest, tmp_path: Path
):
    tiny_model(sentences=phantoms.sentences).save_pretrained(tmp_path / "model")
    outcome = tmca("evaluate", "-m", tmp_path / "model", "--data", phantoms.root)
    assert outcome.code == 0
    assert "HD95" not in outcome.out
    assert tmca("evaluate", "-m", tmp_path / "model", "--data", phantoms.root, "--surface", "--tolerance", -1).code == 2


def test_an_entry_that_cannot_be_written_is_refused_before_the_scoring(
    tmca: Callable[..., Outcome], tiny_model: Callable[..., TMCA], phantoms: Manifest, tmp_path: Path
):
    tiny_model().save_pretrained(tmp_path / "model")
    command = ["evaluate", "-m", tmp_path / "model", "--data", phantoms.root, "-o", tmp_path / "scores", "--ledger"]
    for name, message in (("x.csv", "ends in .json"), ("x.json", "no run folder")):
        outcome = tmca(*command, tmp_path / name)
        assert outcome.code != 0
        assert message in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_what_cannot_be_reproduced_is_refused_before_the_first_training(tmca: Callable[..., Outcome], tmp_path: Path):
    command = ["reproduce", "table1", "table2", "--scale", "smoke", "--runs", tmp_path / "runs", "--ledger", tmp_path]
    outcome = tmca(*command, "--seeds", "1", "1")
    assert outcome.code == 2
    assert "count one run as two" in outcome.err
    outcome = tmca(*command, "--only", "unett")
    assert outcome.code == 2
    assert "did you mean 'unet'" in outcome.err.lower()
    outcome = tmca("reproduce", "figure", "--scale", "smoke")
    assert outcome.code == 2
    assert "known: figure2, table1" in outcome.err
    assert not (tmp_path / "runs" / "phantoms").exists()


def test_a_row_of_one_table_leaves_the_other_out(tmca: Callable[..., Outcome], tmp_path: Path):
    command = ["reproduce", "table1", "table2", "figure2", "--scale", "smoke", "--only", "unet", "--seeds", "1"]
    outcome = tmca(*command, "--dry-run", "--runs", tmp_path / "runs", "--ledger", tmp_path / "ledger")
    assert outcome.code == 0
    assert "phantoms-smoke-unet-seed1: would be trained" in outcome.err
    assert "table2 has none of these rows: unet" in outcome.err
    assert "figure2 would show 0 methods" in outcome.out
    assert not list(tmp_path.rglob("*figure2*"))
