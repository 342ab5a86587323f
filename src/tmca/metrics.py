"""Scores from thresholded masks: counts an image, then pooled and per-case scores; distances between outlines.

The field uses two definitions under one name. *Pooled* sums the pixels of a whole split before dividing (Ariadne,
TMCA); *per case* averages one score an image (LViT, TGANet, nnU-Net). They rank methods differently and are always
reported together. See ``docs/concepts/metrics.md``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from tmca.errors import ConfigError

EmptyPolicy = Literal["one", "zero", "skip"]
"""Score of a case whose mask and prediction are both empty.

1 (TGANet, medvlsm, LViT's validation), 0 (LViT's test), or left out of the mean (nnU-Net).
"""

EMPTY_SCORES: dict[EmptyPolicy, float] = {"one": 1.0, "zero": 0.0, "skip": math.nan}

COUNTS = ("true_positive", "false_positive", "false_negative", "true_negative")

OVERLAPS = ("dice", "jaccard", "precision", "recall")
"""Scores of the foreground alone."""

SCORES = (*OVERLAPS, "accuracy")

LengthUnit = Literal["pixels", "mm"]


def check_threshold(threshold: float) -> None:
    """Refuse a threshold that no probability can cross.

    Raises:
        ConfigError: It lies outside (0, 1).
    """
    if not 0 < threshold < 1:
        raise ConfigError(f"The threshold is {threshold}, expected a value between 0 and 1", hint="0.5 is usual")


@dataclass(frozen=True)
class Counts:
    """Pixels of each image by prediction and truth, int64 ``(cases,)`` each."""

    true_positive: Int[np.ndarray, " cases"]
    false_positive: Int[np.ndarray, " cases"]
    false_negative: Int[np.ndarray, " cases"]
    true_negative: Int[np.ndarray, " cases"]

    def __len__(self) -> int:
        return len(self.true_positive)

    def select(self, index: Int[np.ndarray, " chosen"]) -> Counts:
        """Return the counts of some cases, in the order of ``index``; a case may be named more than once."""
        return Counts(
            self.true_positive[index], self.false_positive[index], self.false_negative[index], self.true_negative[index]
        )

    @classmethod
    def concatenate(cls, parts: list[Counts]) -> Counts:
        """Join the counts of several batches."""
        none = np.zeros(0, dtype=np.int64)
        return cls(*(np.concatenate([none, *(getattr(part, name) for part in parts)]) for name in COUNTS))


def confusion_counts(
    predictions: Bool[Tensor, "batch 1 height width"], masks: Bool[Tensor, "batch 1 height width"]
) -> Counts:
    """Count the pixels of each image by prediction and truth.

    Args:
        predictions: Thresholded masks.
        masks: Ground-truth foreground.
    """
    predicted, truth = predictions.flatten(1), masks.flatten(1)
    true_positive = (predicted & truth).sum(dim=1)
    n_predicted, n_truth = predicted.sum(dim=1), truth.sum(dim=1)
    false_positive, false_negative = n_predicted - true_positive, n_truth - true_positive
    true_negative = predicted.shape[1] - true_positive - false_positive - false_negative
    counts = torch.stack([true_positive, false_positive, false_negative, true_negative]).cpu().numpy().astype(np.int64)
    return Counts(counts[0], counts[1], counts[2], counts[3])


def pooled_scores(counts: Counts) -> dict[str, float]:
    """Return the :data:`SCORES` of all pixels of the split taken together, in [0, 1].

    Cases without foreground in mask and prediction add nothing but to the accuracy. If no case has any foreground, all
    are 1; if only the masks have some, or only the predictions, precision and recall are 0, as Dice and Jaccard are.
    Always ``dice == 2 * jaccard / (1 + jaccard)``.
    """
    total = [np.array([getattr(counts, name).sum()]) for name in COUNTS[:3]]
    scores = {name: float(values[0]) for name, values in overlap_scores(*total, empty=1.0).items()}
    wrong = int(total[1][0] + total[2][0])
    pixels = int(total[0][0]) + wrong + int(counts.true_negative.sum())
    return scores | {"accuracy": (pixels - wrong) / pixels if pixels else 1.0}


def case_scores(counts: Counts, empty_policy: EmptyPolicy = "one") -> dict[str, Float[np.ndarray, " cases"]]:
    """Return the :data:`SCORES` of each case, in [0, 1].

    Args:
        counts: Of each case.
        empty_policy: Score of cases that are empty in mask and prediction, except for the accuracy; ``skip`` gives NaN.
            A case that is empty in one of the two only has precision and recall 0, as it has Dice and Jaccard 0.
    """
    wrong = counts.false_positive + counts.false_negative
    pixels = counts.true_positive + wrong + counts.true_negative
    return overlap_scores(
        counts.true_positive, counts.false_positive, counts.false_negative, empty=EMPTY_SCORES[empty_policy]
    ) | {"accuracy": 1 - wrong / np.maximum(pixels, 1)}


def per_case_mean(counts: Counts, empty_policy: EmptyPolicy = "one") -> dict[str, float]:
    """Return the mean of each case's scores; under ``skip`` over the cases that are not empty in both."""
    scores = case_scores(counts, empty_policy)
    return {name: float(np.nanmean(values)) if np.isfinite(values).any() else 1.0 for name, values in scores.items()}


def bootstrap_intervals(
    counts: Counts,
    *,
    groups: list[str] | None = None,
    empty_policy: EmptyPolicy = "one",
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Return 95 % percentile bootstrap intervals of the pooled and the per-case :data:`OVERLAPS`.

    Args:
        counts: Of each case.
        groups: Patient of each case; whole patients are drawn. ``None``: cases are drawn.
        empty_policy: See :func:`case_scores`.
        resamples: Number of draws.
        seed: Of the draws.

    Returns:
        ``pooled_dice``, ``pooled_jaccard``, … ``per_case_recall`` → (low, high); empty for fewer than two groups.
    """
    names = groups if groups is not None else [str(index) for index in range(len(counts))]
    scores = case_scores(counts, empty_policy)
    columns = [counts.true_positive, counts.false_positive, counts.false_negative, np.isfinite(scores["dice"])]
    columns += [np.nan_to_num(scores[name]) for name in OVERLAPS]
    sums = resampled_sums(np.stack(columns, axis=1).astype(np.float64), names, resamples=resamples, seed=seed)
    if not len(sums):
        return {}
    true_positive, false_positive, false_negative, present, *case_sums = sums.T
    pooled = overlap_scores(true_positive, false_positive, false_negative, empty=1.0)
    samples = {f"pooled_{name}": values for name, values in pooled.items()}
    for name, values in zip(OVERLAPS, case_sums, strict=True):
        samples[f"per_case_{name}"] = np.where(present > 0, values / np.maximum(present, 1), 1.0)
    return {name: interval(values) for name, values in samples.items()}


DRAWN_AT_ONCE = 10_000_000
"""Groups drawn at a time, which bounds the memory of a bootstrap to some 250 MB."""


def resampled_sums(
    values: Float[np.ndarray, "cases columns"], groups: Sequence[str], *, resamples: int, seed: int
) -> Float[np.ndarray, "resamples columns"]:
    """Return the sum of each column over bootstrap samples of whole groups.

    The draws depend on the seed and the number of groups only: columns, and calls with equal groups, see the same ones.

    Args:
        values: A row a case.
        groups: Patient of each case.
        resamples: Number of draws.
        seed: Of the draws.

    Returns:
        A row a draw; no row for fewer than two groups, which tell nothing of how groups differ.
    """
    known, group_of = np.unique(np.asarray(groups), return_inverse=True)
    if len(known) < 2:
        return np.zeros((0, values.shape[1]))
    sums = np.zeros((len(known), values.shape[1]))
    np.add.at(sums, group_of, values)
    rng = np.random.default_rng(seed)
    at_once = max(1, DRAWN_AT_ONCE // len(known))
    parts = []
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = rng.integers(0, len(known), size=(rows, len(known)))
        drawn += len(known) * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        parts.append(times.astype(np.float64) @ sums)
    return np.concatenate(parts) if parts else np.zeros((0, values.shape[1]))


def interval(samples: Float[np.ndarray, " resamples"]) -> tuple[float, float]:
    """Return the central 95 % of resampled values."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def overlap_scores(
    true_positive: Num[np.ndarray, " cases"],
    false_positive: Num[np.ndarray, " cases"],
    false_negative: Num[np.ndarray, " cases"],
    *,
    empty: float,
) -> dict[str, Float[np.ndarray, " cases"]]:
    """Return the :data:`OVERLAPS` of counts, or of sums of counts.

    Args:
        true_positive: Pixels that are foreground in mask and prediction.
        false_positive: Pixels that are foreground in the prediction only.
        false_negative: Pixels that are foreground in the mask only.
        empty: The scores where there is no foreground at all. Where only a score's denominator is 0, it is 0.
    """
    wrong = false_positive + false_negative
    ratios = {
        "dice": (2 * true_positive, 2 * true_positive + wrong),
        "jaccard": (true_positive, true_positive + wrong),
        "precision": (true_positive, true_positive + false_positive),
        "recall": (true_positive, true_positive + false_negative),
    }
    is_empty = true_positive + wrong == 0
    return {name: np.where(is_empty, empty, part / np.maximum(whole, 1)) for name, (part, whole) in ratios.items()}


# --- outlines -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SurfaceScores:
    """How far the outlines of predictions lie from those of the masks.

    Attributes:
        hd95: Of each case, in ``unit``; NaN where the mask or the prediction is empty and there is no outline.
        surface_dice: Of each case, in [0, 1]; 0 where one of the two is empty, NaN where both are.
        tolerance: Distance up to which an outline pixel counts as met, in ``unit``.
        unit: Of all distances.
    """

    hd95: Float[np.ndarray, " cases"]
    surface_dice: Float[np.ndarray, " cases"]
    tolerance: float
    unit: LengthUnit

    def case_scores(self, empty_policy: EmptyPolicy = "one") -> dict[str, Float[np.ndarray, " cases"]]:
        """Return the scores of each case; the policy is the surface Dice of a case that is empty in both."""
        surface_dice = np.where(np.isnan(self.surface_dice), EMPTY_SCORES[empty_policy], self.surface_dice)
        return {"hd95": self.hd95, "surface_dice": surface_dice}

    def summary(self, empty_policy: EmptyPolicy = "one") -> dict[str, Any]:
        """Return the means with the words that say what they mean; ``None`` where no case has a value."""
        summary: dict[str, Any] = {}
        for name, values in self.case_scores(empty_policy).items():
            finite = values[np.isfinite(values)]
            summary |= {name: float(finite.mean()) if len(finite) else None, f"n_{name}": len(finite)}
        return summary | {"tolerance": self.tolerance, "unit": self.unit}


def check_tolerance(tolerance: float) -> None:
    """Refuse a tolerance that is no distance.

    Raises:
        ConfigError: It is negative or not finite.
    """
    if not 0 <= tolerance < math.inf:
        raise ConfigError(f"The tolerance is {tolerance}, expected a distance of 0 or more", hint="2 pixels is usual")


def surface_scores(
    predictions: Bool[Tensor, "batch 1 height width"],
    masks: Bool[Tensor, "batch 1 height width"],
    tolerance: float,
    spacing: tuple[float, float] = (1.0, 1.0),
) -> tuple[Float[np.ndarray, " batch"], Float[np.ndarray, " batch"]]:
    """Return the HD95 and the surface Dice of each image, by MONAI.

    An outline is the foreground pixels that touch the background or the image's border. HD95 is the larger of the two
    95th percentiles of the distances from one outline to the other; the surface Dice at a tolerance (also: normalised
    surface distance) is the share of the pixels of both outlines that lie no further than it from the other outline.

    Args:
        predictions: Thresholded masks.
        masks: Ground-truth foreground.
        tolerance: In the unit of the spacing.
        spacing: Distance of neighbouring rows and of neighbouring columns; ones: distances are in pixels.

    Returns:
        What :class:`SurfaceScores` holds, NaN included.

    Source:
        Huttenlocher et al., 1993 (Hausdorff distance); Nikolov et al., 2021 (surface Dice).
    """
    # Slow to import, and needed for this alone.
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.surface_dice import compute_surface_dice

    found, exists = predictions.flatten(1).any(dim=1), masks.flatten(1).any(dim=1)
    both = found & exists
    hd95 = np.full(len(masks), np.nan)
    surface_dice = np.where((found | exists).cpu().numpy(), 0.0, np.nan)
    if both.any():
        pair, rows = (predictions[both].cpu(), masks[both].cpu()), both.cpu().numpy()
        with warnings.catch_warnings():
            # MONAI 1.6 calls itself with an argument that it has deprecated.
            warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
            distance = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing)
            share = compute_surface_dice(*pair, [tolerance], include_background=True, spacing=spacing)
        hd95[rows], surface_dice[rows] = distance[:, 0], share[:, 0]
    return hd95, surface_dice
