from __future__ import annotations

import json
from pathlib import Path

import pytest

from tmca.config import Experiment
from tmca.data.manifest import Manifest
from tmca.demo import run_demo
from tmca.presets import change

COUNTS = {"train": 8, "val": 2, "test": 4}


def test_the_demo_tells_the_whole_story(
    tiny_experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    experiment = change(tiny_experiment, "tiny", trainer={"max_epochs": 1})
    for seed in (3, 4):  # the second replaces the first
        evaluation, result = run_demo(tmp_path / "demo", seed=seed, counts=COUNTS, experiment=experiment)
    names = {"data", "run", "report.html", "overlays", "metrics.csv", "summary.json", "demo.json"}
    assert {entry.name for entry in (tmp_path / "demo").iterdir()} == names
    stored = json.loads((tmp_path / "demo" / "demo.json").read_text("utf-8"))
    assert stored == result
    assert set(stored) == {"pooled_dice", "per_case_dice", "seconds", "run"}
    variants = {"right", "shuffled", "contradictory", "none"}
    assert set(stored["pooled_dice"]) == set(stored["per_case_dice"]) == variants
    assert set(stored["seconds"]) == {"draw", "train", "evaluate"}
    assert all(value >= 0 for value in stored["seconds"].values())
    assert stored["run"] == str(tmp_path / "demo" / "run")
    assert stored["pooled_dice"]["right"] == pytest.approx(evaluation.pooled()["dice"])

    data = Manifest.read(tmp_path / "demo" / "data" / "manifest.csv")
    assert data.splits == COUNTS
    assert json.loads((tmp_path / "demo" / "run" / "experiment.json").read_text("utf-8"))["seed"] == 4
    said = capsys.readouterr().err
    for words in ("Drawing 14 phantoms", "Training a small TMCA on 8", "Scoring it on 4"):
        assert words in said
