"""Scores from thresholded masks: per-image counts, then pooled and per-case Dice, Jaccard and accuracy.

The field uses two definitions under one name. *Pooled* sums the pixels of a whole split before dividing (Ariadne,
TMCA); *per case* averages one score an image (LViT, TGANet, nnU-Net). They rank methods differently and are always
reported together. See ``docs/concepts/metrics.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tmca.errors import ConfigError

EmptyPolicy = Literal["one", "zero", "skip"]
"""Score of a case whose mask and prediction are both empty.

1 (TGANet, medvlsm, LViT's validation), 0 (LViT's test), or left out of the mean (nnU-Net).
"""

SCORES = ("dice", "jaccard", "accuracy")


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
        names = ("true_positive", "false_positive", "false_negative", "true_negative")
        none = np.zeros(0, dtype=np.int64)
        return cls(*(np.concatenate([none, *(getattr(part, name) for part in parts)]) for name in names))


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
    """Return Dice, Jaccard and accuracy of all pixels of the split taken together, in [0, 1].

    Cases without foreground in mask and prediction add nothing to Dice and Jaccard. If no case has any, both are 1.
    Always ``dice == 2 * jaccard / (1 + jaccard)``.
    """
    true_positive, wrong = int(counts.true_positive.sum()), int((counts.false_positive + counts.false_negative).sum())
    pixels = true_positive + wrong + int(counts.true_negative.sum())
    return {
        "dice": 2 * true_positive / (2 * true_positive + wrong) if true_positive + wrong else 1.0,
        "jaccard": true_positive / (true_positive + wrong) if true_positive + wrong else 1.0,
        "accuracy": (pixels - wrong) / pixels if pixels else 1.0,
    }


def case_scores(counts: Counts, empty_policy: EmptyPolicy = "one") -> dict[str, Float[np.ndarray, " cases"]]:
    """Return Dice, Jaccard and accuracy of each case, in [0, 1].

    Args:
        counts: Of each case.
        empty_policy: Score of cases that are empty in mask and prediction; ``skip`` gives NaN.
    """
    value = {"one": 1.0, "zero": 0.0, "skip": np.nan}[empty_policy]
    wrong = counts.false_positive + counts.false_negative
    foreground = counts.true_positive + wrong
    safe = np.maximum(foreground, 1)
    dice = np.where(foreground > 0, 2 * counts.true_positive / np.maximum(2 * counts.true_positive + wrong, 1), value)
    jaccard = np.where(foreground > 0, counts.true_positive / safe, value)
    return {"dice": dice, "jaccard": jaccard, "accuracy": 1 - wrong / np.maximum(foreground + counts.true_negative, 1)}


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
    """Return 95 % percentile bootstrap intervals of pooled and per-case Dice and Jaccard.

    Args:
        counts: Of each case.
        groups: Patient of each case; whole patients are drawn. ``None``: cases are drawn.
        empty_policy: See :func:`case_scores`.
        resamples: Number of draws.
        seed: Of the draws.

    Returns:
        ``pooled_dice``, ``pooled_jaccard``, ``per_case_dice``, ``per_case_jaccard`` → (low, high); empty for fewer
        than two groups.
    """
    names = groups if groups is not None else [str(index) for index in range(len(counts))]
    _, group_of = np.unique(np.asarray(names), return_inverse=True)
    n_groups = int(group_of.max()) + 1 if len(group_of) else 0
    if n_groups < 2:
        return {}
    scores = case_scores(counts, empty_policy)
    columns = {
        "tp": counts.true_positive,
        "wrong": counts.false_positive + counts.false_negative,
        "dice": np.nan_to_num(scores["dice"]),
        "jaccard": np.nan_to_num(scores["jaccard"]),
        "n": np.isfinite(scores["dice"]).astype(np.float64),
    }
    sums = {name: np.bincount(group_of, weights=values, minlength=n_groups) for name, values in columns.items()}
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, n_groups, size=(resamples, n_groups))
    total = {name: values[drawn].sum(axis=1) for name, values in sums.items()}
    samples = {
        "pooled_dice": _ratio(2 * total["tp"], 2 * total["tp"] + total["wrong"]),
        "pooled_jaccard": _ratio(total["tp"], total["tp"] + total["wrong"]),
        "per_case_dice": _ratio(total["dice"], total["n"]),
        "per_case_jaccard": _ratio(total["jaccard"], total["n"]),
    }
    return {
        name: (float(np.percentile(values, 2.5)), float(np.percentile(values, 97.5)))
        for name, values in samples.items()
    }


def _ratio(part: Float[np.ndarray, " draws"], whole: Float[np.ndarray, " draws"]) -> Float[np.ndarray, " draws"]:
    """Return ``part / whole``, and 1 where there is nothing, as the scores themselves do."""
    ratios: Float[np.ndarray, " draws"] = np.divide(part, whole, out=np.ones_like(whole), where=whole > 0)
    return ratios
