from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tmca.calibration import Calibration, LogitCounts, fit_calibration, read_calibration, reliability
from tmca.calibration.fitting import DIAGRAM_FILE, CalibrationReport, calibrate_model
from tmca.data.manifest import Manifest
from tmca.errors import CheckpointError, DataError
from tmca.inference import Predictor
from tmca.models import TMCA
from tmca.prediction import PredictionOptions


@pytest.fixture
def folder(tiny_model: Callable[..., TMCA], tmp_path: Path) -> Path:
    model = tiny_model()
    with torch.no_grad():
        model.head.classify.bias += 0.3  # so that it marks something
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_is_calibrated_in_its_folder(folder: Path, phantoms: Manifest):
    before = Predictor.from_pretrained(folder, "cpu", "32")
    report = calibrate_model(folder, phantoms, "train", check="test", device="cpu")
    calibration = read_calibration(folder)
    assert calibration == report.calibration
    assert calibration.cases == len(phantoms.split("train").records)
    counts = report.counts["train"]
    assert reliability(counts, calibration.temperature).error <= reliability(counts).error
    assert [row["split"] for row in report.rows()] == ["train", "test"]
    with Image.open(folder / DIAGRAM_FILE) as diagram:
        assert diagram.size[0] > 500

    after = Predictor.from_pretrained(folder, "cpu", "32")
    assert (before.calibrated, after.calibrated) == (False, True)
    record = phantoms.records[0]
    answers = []
    for predictor in (before, after):
        predictor.set_image(phantoms.image_path(record))
        answers.append(predictor.ask(record.text))
    assert answers[0].expected_dice is None
    assert answers[1].expected_dice is not None
    assert 0 <= answers[1].expected_dice <= 1
    assert after.ask(record.text, PredictionOptions(threshold=0.4)).expected_dice is None
    assert not np.allclose(answers[0].probability, answers[1].probability)
    np.testing.assert_array_equal(answers[0].probability > 0.5, answers[1].probability > 0.5)
    assert after.provenance()["models"][0]["temperature"] == calibration.temperature


def test_a_picture_that_fails_leaves_the_model_as_it_was(
    folder: Path, phantoms: Manifest, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError):
        calibrate_model(folder, phantoms, "train", device="cpu")
    assert read_calibration(folder) is None


def test_the_estimate_is_judged_where_there_is_one():
    """Nothing is estimated of an empty mask."""
    rng = np.random.default_rng(0)
    truth = rng.random((20, 100)) < 0.3
    logits = np.where(truth, 2.0, -2.0) + rng.normal(0, 0.5, truth.shape)
    logits[10:] = -5.0  # nothing is marked, all is missed
    counts = LogitCounts.of(logits, truth)
    (row,) = CalibrationReport(fit_calibration(counts), {"val": counts}).rows()
    assert row["cases"] == "20"
    assert float(row["Dice estimate off by"]) < 0.05
    (row,) = CalibrationReport(Calibration(), {"val": LogitCounts.of(logits[10:], truth[10:])}).rows()
    assert row["Dice estimate off by"] == row["the mean off by"] == "–"


def test_what_speaks_against_a_calibration_is_told():
    rng = np.random.default_rng(1)
    truth = rng.random((60, 100)) < 0.3
    logits = np.where(truth, 2.0, -2.0) + rng.normal(0, 2, truth.shape) * rng.random((60, 1))
    counts = LogitCounts.of(logits, truth)
    good = fit_calibration(counts, split="val")
    assert CalibrationReport(good, {"val": counts}).warnings() == []
    few = fit_calibration(LogitCounts.of(logits[:10], truth[:10]), split="val")
    assert "it was fitted on 10 cases only" in CalibrationReport(few, {"test": counts}).warnings()
    bad = Calibration(temperature=9.0, dice_intercept=1.0, dice_slope=-1.0, cases=60, split="val")
    assert CalibrationReport(bad, {"test": counts}).warnings() == [
        "on test the probabilities were better without it",
        "on test the estimated Dice says less than the mean of all cases does",
    ]


def test_on_the_split_it_was_fitted_on_each_case_is_left_out_in_turn():
    rng = np.random.default_rng(2)
    truth = rng.random((6, 100)) < 0.3
    logits = np.where(truth, 2.0, -2.0) + rng.normal(0, 2, truth.shape)
    counts = LogitCounts.of(logits, truth)
    calibration = fit_calibration(counts, split="val")
    row, other = CalibrationReport(calibration, {"val": counts, "test": counts}).rows()
    assert row["Dice estimate off by"] == f"{calibration.dice_error:.3f}"
    assert float(row["Dice estimate off by"]) > float(other["Dice estimate off by"])
    dice = counts.dice()
    left_out = [abs(dice[case] - np.delete(dice, case).mean()) for case in range(len(dice))]
    assert row["the mean off by"] == f"{np.mean(left_out):.3f}"


def test_a_damaged_calibration_is_not_used(folder: Path):
    (folder / "calibration.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        Predictor.from_pretrained(folder)


def test_a_split_that_is_not_there_is_named(folder: Path, phantoms: Manifest):
    with pytest.raises(DataError, match="validation"):
        calibrate_model(folder, phantoms, "validation")
    with pytest.raises(DataError, match="tset"):
        calibrate_model(folder, phantoms, "train", check="tset")
    assert read_calibration(folder) is None
