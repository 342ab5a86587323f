from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryF1Score,
    BinaryJaccardIndex,
    BinaryPrecision,
    BinaryRecall,
)

from tmca.errors import ConfigError
from tmca.metrics import (
    OVERLAPS,
    SCORES,
    Counts,
    EmptyPolicy,
    SurfaceScores,
    bootstrap_intervals,
    case_scores,
    check_tolerance,
    confusion_counts,
    per_case_mean,
    pooled_scores,
    resampled_sums,
    surface_scores,
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


REFERENCES = {
    "dice": BinaryF1Score(),
    "jaccard": BinaryJaccardIndex(),
    "precision": BinaryPrecision(),
    "recall": BinaryRecall(),
    "accuracy": BinaryAccuracy(),
}

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
    assert scores.keys() == REFERENCES.keys() == set(SCORES)
    for name, reference in REFERENCES.items():
        expected = reference(predictions.flatten().int(), masks.flatten().int())
        assert scores[name] == pytest.approx(float(expected), abs=1e-6)


def test_case_scores_equal_torchmetrics():
    predictions, masks = _masks()
    scores = case_scores(confusion_counts(predictions, masks))
    for name, reference in REFERENCES.items():
        # Without the first case, which is empty in both: that is a matter of policy.
        expected = [float(reference(predictions[case].int(), masks[case].int())) for case in range(1, len(masks))]
        np.testing.assert_allclose(scores[name][1:], expected, atol=1e-6)


def test_scores_by_hand():
    overlaps = {"dice": 18 / 26, "jaccard": 9 / 17, "precision": 9 / 15, "recall": 9 / 11}
    assert pooled_scores(MIXED) == pytest.approx(overlaps | {"accuracy": 32 / 40})
    scores = case_scores(MIXED)
    np.testing.assert_allclose(scores["dice"], [1, 0, 12 / 16, 1])
    np.testing.assert_allclose(scores["jaccard"], [1, 0, 6 / 10, 1])
    np.testing.assert_allclose(scores["precision"], [1, 0, 6 / 8, 1])
    np.testing.assert_allclose(scores["recall"], [1, 0, 6 / 8, 1])
    np.testing.assert_allclose(scores["accuracy"], [1, 0.6, 0.6, 1])


@pytest.mark.parametrize(("policy", "dice"), [("one", 2.75 / 4), ("zero", 1.75 / 4), ("skip", 1.75 / 3)])
def test_empty_policies(policy: EmptyPolicy, dice: float):
    value = {"one": 1.0, "zero": 0.0, "skip": np.nan}[policy]
    scores = case_scores(MIXED, policy)
    for name in OVERLAPS:
        np.testing.assert_equal(scores[name][0], value)
        np.testing.assert_array_equal(scores[name][1:], case_scores(MIXED)[name][1:])
    assert per_case_mean(MIXED, policy)["dice"] == pytest.approx(dice)
    assert per_case_mean(MIXED, policy)["accuracy"] == pytest.approx(0.8)
    assert pooled_scores(MIXED)["dice"] == pytest.approx(18 / 26)


def test_nothing_to_find_and_nothing_found_is_perfect():
    empty = _counts((0, 0, 0, 10), (0, 0, 0, 10))
    assert pooled_scores(empty) == dict.fromkeys(SCORES, 1.0)
    assert per_case_mean(empty, "one") == dict.fromkeys(SCORES, 1.0)
    assert per_case_mean(empty, "zero") == dict.fromkeys(OVERLAPS, 0.0) | {"accuracy": 1.0}


@pytest.mark.parametrize("policy", ["one", "zero", "skip"])
@pytest.mark.parametrize("case", [(0, 4, 0, 6), (0, 0, 4, 6)], ids=["nothing there", "nothing found"])
def test_where_one_of_both_is_empty_every_overlap_is_0(case: tuple[int, int, int, int], policy: EmptyPolicy):
    expected = dict.fromkeys(OVERLAPS, 0.0) | {"accuracy": 0.6}
    assert pooled_scores(_counts(case)) == per_case_mean(_counts(case), policy) == expected


@given(CASES)
def test_dice_follows_from_jaccard(cases: list[tuple[int, int, int, int]]):
    counts = _counts(*cases)
    scores = pooled_scores(counts)
    assert scores["dice"] == pytest.approx(2 * scores["jaccard"] / (1 + scores["jaccard"]), abs=1e-9)
    assert all(0 <= value <= 1 for value in scores.values())
    each = case_scores(counts)
    np.testing.assert_allclose(each["dice"], 2 * each["jaccard"] / (1 + each["jaccard"]), atol=1e-9)


@given(CASES)
def test_dice_is_the_harmonic_mean_of_precision_and_recall(cases: list[tuple[int, int, int, int]]):
    counts = _counts(*cases)
    for scores in (case_scores(counts), {name: np.array(value) for name, value in pooled_scores(counts).items()}):
        product, total = scores["precision"] * scores["recall"], scores["precision"] + scores["recall"]
        np.testing.assert_allclose(scores["dice"] * total, 2 * product, atol=1e-9)
        assert np.all(scores["jaccard"] <= np.minimum(scores["precision"], scores["recall"]))


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
    points = {f"pooled_{name}": pooled[name] for name in OVERLAPS}
    return points | {f"per_case_{name}": mean[name] for name in OVERLAPS}


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


def test_columns_are_drawn_together():
    values = np.random.default_rng(0).random((7, 2))
    groups = list("aabbcde")
    sums = resampled_sums(values, groups, resamples=20, seed=5)
    of_group = np.stack([values[[name == group for name in groups]].sum(axis=0) for group in "abcde"])
    drawn = np.random.default_rng(5).integers(0, 5, size=(20, 5))
    np.testing.assert_allclose(sums, of_group[drawn].sum(axis=1))
    np.testing.assert_allclose(sums[:, 1:], resampled_sums(values[:, 1:], groups, resamples=20, seed=5))
    assert resampled_sums(values, ["a"] * 7, resamples=20, seed=5).shape == (0, 2)


# --- outlines -----------------------------------------------------------------------------------------------------


def _box(rows: tuple[int, int], columns: tuple[int, int], size: int = 40) -> Tensor:
    mask = torch.zeros(1, 1, size, size, dtype=torch.bool)
    mask[:, :, slice(*rows), slice(*columns)] = True
    return mask


def _outline(mask: Tensor) -> np.ndarray:
    """Return the places of the foreground pixels that have a neighbour outside, one by one."""
    padded = np.pad(mask[0, 0].numpy(), 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.argwhere(padded[1:-1, 1:-1] & ~inner)


def _by_hand(prediction: Tensor, mask: Tensor, tolerance: float, spacing: tuple[float, float]) -> tuple[float, float]:
    places = (_outline(prediction) * np.array(spacing))[:, None] - (_outline(mask) * np.array(spacing))[None]
    distances = np.sqrt((places**2).sum(axis=-1))
    there, back = distances.min(axis=1), distances.min(axis=0)
    within = (there <= tolerance).sum() + (back <= tolerance).sum()
    return max(np.percentile(there, 95), np.percentile(back, 95)), within / (len(there) + len(back))


def test_a_line_that_is_moved_lies_as_far_away():
    hd95, surface_dice = surface_scores(_box((13, 14), (5, 30)), _box((10, 11), (5, 30)), tolerance=2.0)
    assert (hd95.tolist(), surface_dice.tolist()) == ([3], [0])
    assert surface_scores(_box((13, 14), (5, 30)), _box((10, 11), (5, 30)), tolerance=3.0)[1] == [1]
    # A pixel is 0.5 mm high: the same line lies 1.5 mm away.
    hd95, surface_dice = surface_scores(_box((13, 14), (5, 30)), _box((10, 11), (5, 30)), 2.0, spacing=(0.5, 7.0))
    assert (hd95.tolist(), surface_dice.tolist()) == ([1.5], [1])


def test_equal_masks_have_no_distance():
    masks = torch.cat([_box((3, 9), (4, 30)), _box((0, 40), (0, 40))])
    hd95, surface_dice = surface_scores(masks, masks, tolerance=0.0)
    assert hd95.tolist() == [0, 0]
    assert surface_dice.tolist() == [1, 1]


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 1.9)])
def test_surface_scores_equal_all_distances_by_hand(spacing: tuple[float, float]):
    generator = torch.Generator().manual_seed(0)
    noise = torch.nn.functional.avg_pool2d(torch.rand(12, 1, 30, 30, generator=generator), 5, 1, 2)
    predictions, masks = noise[:6] > 0.5, noise[6:] > 0.52
    hd95, surface_dice = surface_scores(predictions, masks, 2.05, spacing)
    for case in range(6):
        expected = _by_hand(predictions[case : case + 1], masks[case : case + 1], 2.05, spacing)
        assert (hd95[case], surface_dice[case]) == pytest.approx(expected, abs=1e-4)
    assert len(set(hd95)) > 3


def test_without_an_outline_there_is_no_distance():
    nothing, something = torch.zeros(1, 1, 40, 40, dtype=torch.bool), _box((3, 9), (4, 30))
    predictions = torch.cat([nothing, nothing, something, something])
    masks = torch.cat([nothing, something, nothing, something])
    hd95, surface_dice = surface_scores(predictions, masks, 2.0)
    np.testing.assert_array_equal(hd95, [np.nan, np.nan, np.nan, 0])
    np.testing.assert_array_equal(surface_dice, [np.nan, 0, 0, 1])
    assert all(np.isnan(values).all() for values in surface_scores(nothing, nothing, 2.0))


@pytest.mark.parametrize(("policy", "mean", "n"), [("one", 2.5 / 4, 4), ("zero", 1.5 / 4, 4), ("skip", 1.5 / 3, 3)])
def test_the_summary_counts_the_cases_of_each_mean(policy: EmptyPolicy, mean: float, n: int):
    scores = SurfaceScores(np.array([np.nan, np.nan, 3, 5]), np.array([np.nan, 0, 1, 0.5]), 2.0, "mm")
    summary = scores.summary(policy)
    assert (summary["hd95"], summary["n_hd95"]) == (4, 2)
    assert (summary["surface_dice"], summary["n_surface_dice"]) == (pytest.approx(mean), n)
    assert (summary["tolerance"], summary["unit"]) == (2, "mm")


def test_a_split_without_outlines_has_no_mean_distance():
    nothing = SurfaceScores(np.full(2, np.nan), np.full(2, np.nan), 2.0, "pixels")
    assert nothing.summary("skip")["hd95"] is nothing.summary("skip")["surface_dice"] is None
    assert nothing.summary("one")["surface_dice"] == 1


@pytest.mark.parametrize("tolerance", [-1.0, math.inf, math.nan])
def test_an_impossible_tolerance_is_refused(tolerance: float):
    check_tolerance(0.0)
    with pytest.raises(ConfigError, match="tolerance"):
        check_tolerance(tolerance)


def test_samples_drawn_in_parts_are_those_drawn_at_once(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(0).random((37, 3))
    groups = [str(number // 2) for number in range(37)]
    whole = resampled_sums(values, groups, resamples=100, seed=3)
    monkeypatch.setattr("tmca.metrics.DRAWN_AT_ONCE", 19 * 7)
    np.testing.assert_allclose(resampled_sums(values, groups, resamples=100, seed=3), whole, rtol=1e-12)
