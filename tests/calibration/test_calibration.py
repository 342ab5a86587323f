from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmca.calibration import (
    CALIBRATION_FILE,
    LOGIT_BINS,
    Calibration,
    LogitCounts,
    dice_errors,
    fit_calibration,
    read_calibration,
    reliability,
)
from tmca.errors import CheckpointError, ConfigError, DataError


def _drawn(scale: float, cases: int = 40, pixels: int = 4000, seed: int = 0) -> LogitCounts:
    """Pixels whose true log-odds are known, seen by a model that states ``scale`` times as much."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(rng.normal(0, 1.5, (cases, 1)), 2.0, (cases, pixels))
    truth = rng.random((cases, pixels)) < 1 / (1 + np.exp(-logits))
    return LogitCounts.of((scale * logits).astype(np.float32), truth)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_overconfidence(scale: float):
    counts = _drawn(scale)
    calibration = fit_calibration(counts, "drawn", "val")
    assert calibration.temperature == pytest.approx(scale, rel=0.03)
    assert (calibration.dataset, calibration.split, calibration.cases) == ("drawn", "val", 40)
    after = reliability(counts, calibration.temperature).error
    assert after < 0.01
    assert scale == 1.0 or after < reliability(counts).error / 5


def test_the_estimated_dice_is_near_the_true_one():
    calibration = fit_calibration(_drawn(3.0))
    unseen = _drawn(3.0, seed=1)
    errors = np.abs(dice_errors(unseen, calibration))
    assert errors.mean() < 0.03
    assert errors.mean() < np.abs(unseen.dice() - unseen.dice().mean()).mean() / 2
    assert calibration.dice_error == pytest.approx(errors.mean(), abs=0.02)


def test_counts_give_the_dice_of_the_masks():
    logits = np.array([[3.0, -2.0, 1.0, -1.0], [-1.0, -2.0, -3.0, -4.0], [-1.0, -2.0, -3.0, -4.0]], dtype=np.float32)
    truth = np.array([[True, True, False, False], [False] * 4, [True, False, False, False]])
    counts = LogitCounts.of(logits, truth)
    np.testing.assert_allclose(counts.dice(), [0.5, 1.0, 0.0])
    assert counts.inside.sum() + counts.outside.sum() == 12
    joined = LogitCounts.concatenate([counts, counts])
    assert joined.inside.shape == (6, LOGIT_BINS)


@given(st.lists(st.floats(-60, 60), min_size=4, max_size=4), st.lists(st.booleans(), min_size=4, max_size=4))
def test_the_expected_dice_lies_between_0_and_1(logits: list[float], truth: list[bool]):
    counts = LogitCounts.of(np.array([logits], dtype=np.float32), np.array([truth]))
    for temperature in (0.3, 1.0, 4.0):
        assert 0 <= counts.expected_dice(temperature)[0] <= 1 + 1e-9


def test_counts_and_maps_estimate_the_same():
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 4, (8, 8)).astype(np.float32)
    probability = 1 / (1 + np.exp(-logits / 1.7))
    calibration = Calibration(1.7)
    found = calibration.expected_dice(probability.astype(np.float32), probability > 0.5)
    counts = LogitCounts.of(logits.reshape(1, -1), np.zeros((1, 64), dtype=bool))
    assert found == pytest.approx(counts.expected_dice(1.7)[0], abs=0.01)
    nothing = np.full((8, 8), 1e-4, dtype=np.float32)
    assert calibration.expected_dice(nothing, nothing > 0.5) == pytest.approx(math.exp(-64e-4), abs=1e-4)


def test_a_sure_model_expects_a_perfect_mask():
    probability = np.zeros((6, 6), dtype=np.float32)
    assert Calibration().expected_dice(probability, probability > 0.5) == 1.0
    probability[2:4, 2:4] = 1.0
    assert Calibration().expected_dice(probability, probability > 0.5) == 1.0
    assert Calibration(dice_intercept=0.5, dice_slope=0.4).expected_dice(probability, probability > 0.5) == 0.9


def test_reliability_by_hand():
    # Stated 0.9 for 4 pixels of which 3 are true, 0.1 for 4 of which none is.
    value = math.log(9)
    logits = np.array([[value] * 4 + [-value] * 4], dtype=np.float32)
    truth = np.array([[True] * 3 + [False] * 5])
    found = reliability(LogitCounts.of(logits, truth))
    np.testing.assert_allclose(found.said, [0.1, 0.9], atol=3e-3)
    np.testing.assert_allclose(found.true, [0.0, 0.75])
    assert found.error == pytest.approx(0.5 * 0.1 + 0.5 * 0.15, abs=3e-3)


def test_too_few_cases_are_refused():
    with pytest.raises(DataError, match="4 cases"):
        fit_calibration(_drawn(1.0, cases=4))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_temperature_is_refused(temperature: float):
    with pytest.raises(ConfigError, match="temperature"):
        Calibration(temperature)


def test_a_file_is_read_as_it_was_written(tmp_path: Path):
    assert read_calibration(tmp_path) is None
    calibration = Calibration(1.5, 0.1, 0.9, 0.05, 12, "drawn", "val")
    calibration.write(tmp_path)
    assert read_calibration(tmp_path) == calibration


@pytest.mark.parametrize("content", ["", "{", "[]", '{"temperature": -1}', '{"heat": 1}', '{"temperature": "x"}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str):
    (tmp_path / CALIBRATION_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=CALIBRATION_FILE) as caught:
        read_calibration(tmp_path)
    assert "tmca calibrate" in caught.value.hint


def test_the_file_is_plain_json(tmp_path: Path):
    Calibration(2.0).write(tmp_path)
    assert json.loads((tmp_path / CALIBRATION_FILE).read_text("utf-8"))["temperature"] == 2.0
