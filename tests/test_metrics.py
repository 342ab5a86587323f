from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score, BinaryJaccardIndex

from tmca.metrics import (
    SCORES,
    Counts,
    EmptyPolicy,
    bootstrap_intervals,
    case_scores,
    confusion_counts,
    per_case_mean,
    pooled_scores,
)

PIXELS = st.integers(0, 10**9)
CASES = st.lists(st.tuples(PIXELS, PIXELS, PIXELS, PIXELS), min_size=1, max_size=8)


def _counts(*cases: tuple[int, int, int, int]) -> Counts:
    """Return the counts of cases given as true positive, false positive, false negative, true negative."""
    return Counts(*np.array(cases, dtype=np.int64).reshape(-1, 4).T)


def _masks(cases: int = 7, size: int = 9) -> tuple[Tensor, Tensor]:
    shares = torch.rand(2, cases, 1, 1, 1)
    predictions, masks = torch.rand(2, cases, 1, size, size) < shares
    masks[0], predictions[0] = False, False
    masks[1] = False
    predictions[2] = False
    return predictions, masks


MIXED = _counts((0, 0, 0, 10), (0, 4, 0, 6), (6, 2, 2, 0), (3, 0, 0, 7))
"""Both empty, nothing there but something found, a usual case, a perfect one."""


def test_counts_by_hand():
    predictions = torch.tensor([[[[1, 1, 0, 0, 1, 0]]], [[[0, 0, 0, 0, 0, 0]]]], dtype=torch.bool)
    masks = torch.tensor([[[[1, 0, 1, 1, 1, 0]]], [[[1, 0, 0, 0, 0, 0]]]], dtype=torch.bool)
    counts = confusion_counts(predictions, masks)
    assert counts.true_positive.tolist() == [2, 0]
    assert counts.false_positive.tolist() == [1, 0]
    assert counts.false_negative.tolist() == [2, 1]
    assert counts.true_negative.tolist() == [1, 5]
    assert counts.true_positive.dtype == np.int64
    assert len(counts) == 2


def test_pooled_scores_equal_torchmetrics():
    predictions, masks = _masks()
    scores = pooled_scores(confusion_counts(predictions, masks))
    references = {"dice": BinaryF1Score(), "jaccard": BinaryJaccardIndex(), "accuracy": BinaryAccuracy()}
    assert scores.keys() == references.keys() == set(SCORES)
    for name, reference in references.items():
        expected = reference(predictions.flatten().int(), masks.flatten().int())
        assert scores[name] == pytest.approx(float(expected), abs=1e-6)


def test_case_scores_equal_torchmetrics():
    predictions, masks = _masks()
    scores = case_scores(confusion_counts(predictions, masks))
    references = {"dice": BinaryF1Score(), "jaccard": BinaryJaccardIndex(), "accuracy": BinaryAccuracy()}
    for name, reference in references.items():
        # Without the first case, which is empty in both: that is a matter of policy.
        expected = [float(reference(predictions[case].int(), masks[case].int())) for case in range(1, len(masks))]
        np.testing.assert_allclose(scores[name][1:], expected, atol=1e-6)


def test_scores_by_hand():
    assert pooled_scores(MIXED) == pytest.approx({"dice": 18 / 26, "jaccard": 9 / 17, "accuracy": 32 / 40})
    scores = case_scores(MIXED)
    np.testing.assert_allclose(scores["dice"], [1, 0, 12 / 16, 1])
    np.testing.assert_allclose(scores["jaccard"], [1, 0, 6 / 10, 1])
    np.testing.assert_allclose(scores["accuracy"], [1, 0.6, 0.6, 1])


@pytest.mark.parametrize(("policy", "dice"), [("one", 2.75 / 4), ("zero", 1.75 / 4), ("skip", 1.75 / 3)])
def test_empty_policies(policy: EmptyPolicy, dice: float):
    value = {"one": 1.0, "zero": 0.0, "skip": np.nan}[policy]
    scores = case_scores(MIXED, policy)
    for name in ("dice", "jaccard"):
        np.testing.assert_equal(scores[name][0], value)
        np.testing.assert_array_equal(scores[name][1:], case_scores(MIXED)[name][1:])
    assert per_case_mean(MIXED, policy)["dice"] == pytest.approx(dice)
    assert per_case_mean(MIXED, policy)["accuracy"] == pytest.approx(0.8)
    assert pooled_scores(MIXED)["dice"] == pytest.approx(18 / 26)


def test_nothing_to_find_and_nothing_found_is_perfect():
    empty = _counts((0, 0, 0, 10), (0, 0, 0, 10))
    assert pooled_scores(empty) == {"dice": 1.0, "jaccard": 1.0, "accuracy": 1.0}
    assert per_case_mean(empty, "one") == {"dice": 1.0, "jaccard": 1.0, "accuracy": 1.0}
    assert per_case_mean(empty, "zero") == {"dice": 0.0, "jaccard": 0.0, "accuracy": 1.0}


@given(CASES)
def test_dice_follows_from_jaccard(cases: list[tuple[int, int, int, int]]):
    counts = _counts(*cases)
    scores = pooled_scores(counts)
    assert scores["dice"] == pytest.approx(2 * scores["jaccard"] / (1 + scores["jaccard"]), abs=1e-9)
    assert all(0 <= value <= 1 for value in scores.values())
    each = case_scores(counts)
    np.testing.assert_allclose(each["dice"], 2 * each["jaccard"] / (1 + each["jaccard"]), atol=1e-9)


@given(st.integers(0, 2**32), st.lists(st.integers(1, 6), max_size=5))
def test_scores_do_not_depend_on_the_batches(seed: int, cuts: list[int]):
    torch.manual_seed(seed)
    predictions, masks = _masks()
    whole = confusion_counts(predictions, masks)
    edges = [0, *sorted(set(cuts)), len(masks)]
    parts = [confusion_counts(predictions[start:end], masks[start:end]) for start, end in itertools.pairwise(edges)]
    joined = Counts.concatenate(parts)
    for name in ("true_positive", "false_positive", "false_negative", "true_negative"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
    order = torch.randperm(len(masks))
    shuffled = confusion_counts(predictions[order], masks[order])
    assert pooled_scores(shuffled) == pooled_scores(joined) == pooled_scores(whole)
    assert per_case_mean(shuffled) == pytest.approx(per_case_mean(whole))


def test_cases_are_selected_in_order_and_may_repeat():
    chosen = MIXED.select(np.array([2, 0, 2]))
    assert chosen.true_positive.tolist() == [6, 0, 6]
    assert chosen.true_negative.tolist() == [0, 10, 0]
    assert len(Counts.concatenate([])) == 0
    assert Counts.concatenate([]).true_positive.dtype == np.int64


# --- intervals ----------------------------------------------------------------------------------------------------


def _plain(cases: int = 40) -> Counts:
    rng = np.random.default_rng(0)
    return Counts(rng.integers(20, 90, cases), *rng.integers(0, 30, (2, cases)), rng.integers(200, 300, cases))


def _width(interval: tuple[float, float]) -> float:
    return interval[1] - interval[0]


def _points(counts: Counts, policy: EmptyPolicy = "one") -> dict[str, float]:
    pooled, mean = pooled_scores(counts), per_case_mean(counts, policy)
    points = {f"pooled_{name}": pooled[name] for name in ("dice", "jaccard")}
    return points | {f"per_case_{name}": mean[name] for name in ("dice", "jaccard")}


@pytest.mark.parametrize("policy", ["one", "zero", "skip"])
def test_an_interval_holds_the_score(policy: EmptyPolicy):
    counts = Counts.concatenate([_plain(), MIXED])
    intervals, points = bootstrap_intervals(counts, empty_policy=policy), _points(counts, policy)
    assert intervals.keys() == points.keys()
    for name, (low, high) in intervals.items():
        assert 0 <= low < points[name] < high <= 1


def test_the_interval_equals_a_resampling_by_hand():
    counts = _plain(6)
    intervals = bootstrap_intervals(counts, resamples=50, seed=3)
    drawn = np.random.default_rng(3).integers(0, 6, size=(50, 6))
    points = [_points(counts.select(draw)) for draw in drawn]
    for name, interval in intervals.items():
        assert interval == pytest.approx(tuple(np.percentile([point[name] for point in points], [2.5, 97.5])))


def test_repeated_cases_of_one_patient_do_not_narrow_the_interval():
    counts = _plain(20)
    repeated = Counts.concatenate([counts] * 5)
    patients = [f"patient {case}" for case in range(20)] * 5
    grouped, ungrouped = bootstrap_intervals(repeated, groups=patients), bootstrap_intervals(repeated)
    for name, interval in bootstrap_intervals(counts).items():
        assert _width(grouped[name]) > 1.5 * _width(ungrouped[name])
        assert _width(grouped[name]) == pytest.approx(_width(interval), rel=0.2)


def test_intervals_are_deterministic():
    assert bootstrap_intervals(_plain()) == bootstrap_intervals(_plain())
    assert bootstrap_intervals(_plain(), seed=1) != bootstrap_intervals(_plain())


def test_equal_cases_have_an_interval_without_width():
    intervals = bootstrap_intervals(Counts.concatenate([_counts((6, 2, 2, 0))] * 5))
    assert intervals["pooled_dice"] == pytest.approx((0.75, 0.75))
    assert intervals["per_case_jaccard"] == pytest.approx((0.6, 0.6))


@pytest.mark.parametrize(
    ("counts", "groups"), [(_plain(5), ["same"] * 5), (_plain(1), None), (Counts.concatenate([]), None)]
)
def test_fewer_than_two_groups_have_no_interval(counts: Counts, groups: list[str] | None):
    assert bootstrap_intervals(counts, groups=groups) == {}


def test_the_interval_of_cases_without_foreground_holds_the_score():
    empty = _counts((0, 0, 0, 10), (0, 0, 0, 10), (0, 0, 0, 10))
    for policy in ("one", "zero", "skip"):
        points = _points(empty, policy)
        for name, (low, high) in bootstrap_intervals(empty, empty_policy=policy).items():
            assert low <= points[name] <= high, (policy, name)


def test_draws_without_foreground_score_like_such_a_split():
    # One case in three has foreground and is found: whichever cases are drawn, the pooled scores are 1.
    counts = _counts((5, 0, 0, 5), (0, 0, 0, 10), (0, 0, 0, 10))
    intervals = bootstrap_intervals(counts)
    assert intervals["pooled_dice"] == intervals["pooled_jaccard"] == (1.0, 1.0)
