from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import tmca.reproduction
from tmca.data.manifest import Manifest
from tmca.errors import ConfigError, DataError, WeightsError
from tmca.reproduction import Data, Planned, Reproduction, draw_smoke_data, plan, recorded, reproduce, run_folders
from tmca.reproduction.ledger import Ledger
from tmca.reproduction.tables import Row, Table
from tmca.training import note_end

ROWS = (Row("baseline", "ariadne"), Row("without language", "image-only"))
TABLE = Table("table0", "Table 0: a test", ROWS)


def _reproduce(manifest: Manifest, folder: Path, **settings: object) -> Reproduction:
    return reproduce(TABLE, manifest, "smoke", ledger=folder / "results", runs=folder / "runs", **settings)


@pytest.fixture(scope="module")
def finished(phantoms: Manifest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reproduction]:
    """Return a folder with one run of each row, and what the call returned. Do not write to it."""
    folder = tmp_path_factory.mktemp("reproduced")
    return folder, _reproduce(phantoms, folder)


@pytest.fixture
def copied(finished: tuple[Path, Reproduction], tmp_path: Path) -> Path:
    """Return a copy of that folder's ledger and runs."""
    for path in finished[0].rglob("*"):
        target = tmp_path / path.relative_to(finished[0])
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training fail the test."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("something was trained that was known")

    monkeypatch.setattr(tmca.reproduction, "train_run", refuse)


def test_a_plan_names_every_run(phantoms: Manifest):
    runs = plan(TABLE, Data.of(phantoms), "smoke", [1, 2])
    assert [run.name for run in runs] == [
        "phantoms-smoke-ariadne-seed1",
        "phantoms-smoke-ariadne-seed2",
        "phantoms-smoke-image-only-seed1",
        "phantoms-smoke-image-only-seed2",
    ]
    assert [run.experiment.seed for run in runs] == [1, 2, 1, 2]
    assert len({run.folder_name for run in runs}) == 4
    share = Table("t", "t", (Row("a quarter", "tmca", fraction=0.25),))
    (run,) = plan(share, Data.of(phantoms), "cpu", [7])
    assert run.name == "phantoms-cpu-tmca-25-seed7"
    assert run.experiment.trainer.train_fraction == 0.25


def test_only_some_rows_are_planned(phantoms: Manifest):
    assert [run.row.label for run in plan(TABLE, Data.of(phantoms), "smoke", [1], ["image-only"])] == [
        "without language"
    ]
    with pytest.raises(ConfigError, match="Unknown row of table0 'image'"):
        plan(TABLE, Data.of(phantoms), "smoke", [1], ["image"])


def test_a_table_is_trained_and_scored(finished: tuple[Path, Reproduction], phantoms: Manifest):
    folder, result = finished
    assert [row.row.label for row in result.rows] == ["baseline", "without language"]
    assert [len(row.entries) for row in result.rows] == [1, 1]
    assert result.problems == ()
    entry = result.rows[0].entries[0]
    assert entry.path == folder / "results" / "phantoms-smoke-ariadne-seed1.json"
    assert entry.data_hash == phantoms.content_hash()
    assert entry.values["split"] == "test"
    assert entry.values["n"] == 8
    assert 0 <= entry.score("pooled", "dice") <= 1
    assert entry.path.with_suffix(".csv").is_file()
    assert set(run_folders(TABLE, phantoms, "smoke", 1, folder / "runs")) == {"baseline", "without language"}
    assert run_folders(TABLE, phantoms, "smoke", 2, folder / "runs") == {}


def test_a_ledger_is_a_table_without_its_data(finished: tuple[Path, Reproduction]):
    folder, result = finished
    known = recorded(TABLE, Ledger(folder / "results"), "phantoms", "smoke")
    assert [row.entries[0].name for row in known.rows] == [row.entries[0].name for row in result.rows]
    assert [row.entries for row in recorded(TABLE, Ledger(folder), "phantoms", "smoke").rows] == [(), ()]
    assert [row.entries for row in recorded(TABLE, Ledger(folder / "results"), "other", "smoke").rows] == [(), ()]


@pytest.mark.usefixtures("untrained")
def test_what_is_known_is_not_computed_again(copied: Path, phantoms: Manifest, finished: tuple[Path, Reproduction]):
    before = {path: path.read_bytes() for path in (copied / "results").iterdir()}
    again = _reproduce(phantoms, copied)
    assert [row.entries[0].values for row in again.rows] == [row.entries[0].values for row in finished[1].rows]
    assert {path: path.read_bytes() for path in (copied / "results").iterdir()} == before


@pytest.mark.usefixtures("untrained")
def test_nothing_is_trained_in_a_dry_run(phantoms: Manifest, tmp_path: Path):
    result = _reproduce(phantoms, tmp_path, train=False)
    assert [len(row.entries) for row in result.rows] == [0, 0]
    assert list(tmp_path.iterdir()) == []


def test_a_run_killed_before_its_scores_is_scored_without_training(copied: Path, phantoms: Manifest):
    for path in (copied / "results").glob("*ariadne*"):
        path.unlink()
    history = next((copied / "runs").glob("*ariadne*")) / "metrics.csv"
    before = history.read_text("utf-8")
    result = _reproduce(phantoms, copied)
    assert len(result.rows[0].entries) == 1
    assert history.read_text("utf-8") == before


def test_an_interruption_keeps_what_was_finished(
    phantoms: Manifest, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for path in (copied / "results").glob("*image-only*"):
        path.unlink()

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tmca.reproduction, "train_run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            _reproduce(phantoms, copied)
    assert [path.name for path in (copied / "results").glob("*.json")] == ["phantoms-smoke-ariadne-seed1.json"]
    assert "[1 of 1] phantoms-smoke-image-only-seed1" in capsys.readouterr().err
    assert len(_reproduce(phantoms, copied).rows[1].entries) == 1


def test_what_another_process_records_meanwhile_is_not_computed_again(
    phantoms: Manifest, copied: Path, monkeypatch: pytest.MonkeyPatch
):
    entries = {path: path.read_bytes() for path in (copied / "results").iterdir()}
    for path in entries:
        path.unlink()
    worked_on: list[str] = []

    def record_all(run: Planned, *_: object) -> None:
        worked_on.append(run.name)
        for path, content in entries.items():
            path.write_bytes(content)

    monkeypatch.setattr(tmca.reproduction, "_train_and_score", record_all)
    result = _reproduce(phantoms, copied)
    assert worked_on == ["phantoms-smoke-ariadne-seed1"]
    assert [len(row.entries) for row in result.rows] == [1, 1]
    assert set((copied / "results").iterdir()) == entries.keys()


def test_other_data_gets_an_entry_of_its_own(copied: Path, phantoms: Manifest, capsys: pytest.CaptureFixture[str]):
    entry = copied / "results" / "phantoms-smoke-ariadne-seed1.json"
    before = entry.read_bytes()
    other = replace(phantoms, records=phantoms.records[1:])
    result = _reproduce(other, copied, only=["ariadne"])
    assert f"{entry} is the same run on other data" in capsys.readouterr().err
    assert entry.read_bytes() == before
    (found,) = result.rows[0].entries
    assert found.path.name == f"phantoms-smoke-ariadne-seed1-{other.content_hash()[:8]}.json"
    assert json.loads(found.path.read_text("utf-8"))["data_hash"] == other.content_hash()
    assert result.rows[1].entries == ()


def test_a_method_that_cannot_run_does_not_stop_the_others(
    phantoms: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    original = tmca.reproduction.train_run

    def fit(experiment, *arguments, **settings):
        if experiment.model.guidance:
            raise WeightsError("Weights 'x' are not on this machine", hint="download them")
        return original(experiment, *arguments, **settings)

    monkeypatch.setattr(tmca.reproduction, "train_run", fit)
    result = _reproduce(phantoms, tmp_path)
    problem = "phantoms-smoke-ariadne-seed1: Weights 'x' are not on this machine (download them)"
    assert result.problems == (problem,)
    assert [len(row.entries) for row in result.rows] == [0, 1]
    assert problem in capsys.readouterr().err


@pytest.mark.usefixtures("untrained")
def test_data_that_cannot_be_scored_is_not_trained_on(phantoms: Manifest, tmp_path: Path):
    with pytest.raises(DataError, match="no split 'test'"):
        _reproduce(replace(phantoms, records=tuple(r for r in phantoms.records if r.split != "test")), tmp_path)
    without_masks = tuple(replace(r, mask=None) if r.split == "test" else r for r in phantoms.records)
    with pytest.raises(DataError, match="no mask"):
        _reproduce(replace(phantoms, records=without_masks), tmp_path)


def test_an_unexpected_failure_does_not_stop_the_others(
    phantoms: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a fault of the method")

    monkeypatch.setattr(tmca.reproduction, "train_run", fail)
    problems = _reproduce(phantoms, tmp_path).problems
    assert [problem.partition(": ")[2] for problem in problems] == ["ZeroDivisionError: a fault of the method"] * 2


def test_the_figure_shows_no_model_that_is_still_training(copied: Path, phantoms: Manifest):
    folders = run_folders(TABLE, phantoms, "smoke", 1, copied / "runs")
    assert list(folders) == ["baseline", "without language"]
    note_end(folders["baseline"], None)
    assert list(run_folders(TABLE, phantoms, "smoke", 1, copied / "runs")) == ["without language"]


def test_smoke_data_is_drawn_once(tmp_path: Path):
    first = draw_smoke_data(tmp_path / "phantoms")
    assert first.splits == {"train": 96, "val": 16, "test": 24}
    drawn = (tmp_path / "phantoms" / "manifest.csv").stat().st_mtime_ns
    assert draw_smoke_data(tmp_path / "phantoms").content_hash() == first.content_hash()
    assert (tmp_path / "phantoms" / "manifest.csv").stat().st_mtime_ns == drawn
