"""Paired comparison of runs that were scored on the same cases.

Cases differ far more from each other than methods do. So runs are compared case by case, and what is uncertain is the
difference: the bootstrap draws the same patients for both runs, the signed-rank test asks for the sign of each
patient's difference. See ``docs/how-to/compare-models.md``.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from tmca.errors import DataError
from tmca.evaluation.joining import experiment_of, joined, kind_of, seed_of
from tmca.evaluation.reading import ScoredRun, align, described
from tmca.metrics import COUNTS, interval, overlap_scores, pooled_scores, resampled_sums

_SEED_IN_NAME = re.compile(r"[-_. ]?seed[-_. ]?\d+", re.IGNORECASE)
_DETAILS_IN_NAME = re.compile(r" \([^()]*\)$")

TIE = 0.001
"""Difference of Dice up to which neither run is better on a case."""

RESAMPLES = 2000
"""Bootstrap draws of patients."""


@dataclass(frozen=True)
class Column:
    """What is compared: one run, or the runs of one experiment with several seeds, whose scores are averaged.

    Attributes:
        name: What tables call it.
        runs: One, or one a seed.
    """

    name: str
    runs: tuple[ScoredRun, ...]

    def cases(self, score: str) -> Float[np.ndarray, " cases"]:
        """Return a score of each case, averaged over the seeds that have one; NaN where none has."""
        scores = np.stack([run.case_scores[score] for run in self.runs])
        counted = np.isfinite(scores).sum(axis=0)
        averaged: Float[np.ndarray, " cases"] = np.where(
            counted > 0, np.nansum(scores, axis=0) / np.maximum(counted, 1), np.nan
        )
        return averaged

    def per_case(self, score: str) -> float:
        """Return the mean over cases."""
        return float(np.nanmean(self.cases(score)))

    def pooled(self, score: str) -> float:
        """Return the score of all pixels together, averaged over the seeds."""
        return float(np.mean(self.pooled_by_seed(score)))

    def pooled_by_seed(self, score: str) -> list[float]:
        """Return the score of all pixels together, one value a seed."""
        return [pooled_scores(run.counts)[score] for run in self.runs]

    @property
    def sources(self) -> list[str]:
        """The files that the scores were read from."""
        return [str(source) for run in self.runs for source in run.sources]

    @property
    def seeds(self) -> list[int | None]:
        """The seeds of training; ``None`` where the file does not tell."""
        return [seed_of(run) for run in self.runs]


@dataclass(frozen=True)
class Pair:
    """The difference of two columns, always ``run`` minus ``reference``.

    Attributes:
        reference: Name of the column that is subtracted.
        run: Name of the column it is subtracted from.
        differences: Of the Dice of each case; NaN where one of the two has none.
        jaccard_differences: The same of the Jaccard.
        pooled_dice_difference: Of the pooled Dice.
        pooled_dice_interval: Its 95 % interval; ``None`` for fewer than two patients.
        mean_dice_interval: The 95 % interval of the mean of ``differences``.
        p: Of the signed-rank test.
        p_holm: The same, corrected for the number of pairs.
    """

    reference: str
    run: str
    differences: Float[np.ndarray, " cases"]
    jaccard_differences: Float[np.ndarray, " cases"]
    pooled_dice_difference: float
    pooled_dice_interval: tuple[float, float] | None
    mean_dice_interval: tuple[float, float] | None
    p: float
    p_holm: float

    @property
    def wins(self) -> int:
        """Cases on which the run is better by more than :data:`TIE`."""
        return int((self.differences > TIE).sum())

    @property
    def losses(self) -> int:
        """Cases on which the reference is better by more than :data:`TIE`."""
        return int((self.differences < -TIE).sum())

    @property
    def ties(self) -> int:
        """The other cases."""
        return self.n - self.wins - self.losses

    @property
    def n(self) -> int:
        """Cases that both have a score of."""
        return int(np.isfinite(self.differences).sum())

    def most_different(self, count: int) -> list[int]:
        """Return the indices of the cases with the largest differences, largest first."""
        return _largest(np.abs(self.differences), count)

    def row(self) -> dict[str, Any]:
        """Return the pair as one row of a table."""
        low, high = self.pooled_dice_interval or (None, None)
        mean_low, mean_high = self.mean_dice_interval or (None, None)
        return {
            "reference": self.reference,
            "run": self.run,
            "n": self.n,
            "pooled_dice_difference": self.pooled_dice_difference,
            "pooled_dice_low": low,
            "pooled_dice_high": high,
            "mean_dice_difference": float(np.nanmean(self.differences)),
            "mean_dice_low": mean_low,
            "mean_dice_high": mean_high,
            "median_dice_difference": float(np.nanmedian(self.differences)),
            "mean_jaccard_difference": float(np.nanmean(self.jaccard_differences)),
            "median_jaccard_difference": float(np.nanmedian(self.jaccard_differences)),
            "wilcoxon_p": self.p,
            "holm_p": self.p_holm,
            "wins": self.wins,
            "ties": self.ties,
            "losses": self.losses,
        }


@dataclass(frozen=True)
class Comparison:
    """Every pair of columns, the first column before the others.

    Attributes:
        columns: What is compared, in the order in which it was named.
        pairs: All of them; those with the first column as reference come first.
    """

    columns: tuple[Column, ...]
    pairs: tuple[Pair, ...]

    @property
    def first(self) -> ScoredRun:
        """A run, to ask for what all have in common: cases, patients, sentences, protocol."""
        return self.columns[0].runs[0]

    @property
    def n_patients(self) -> int:
        """Number of patients."""
        return len(set(self.first.patients))

    def most_different(self, count: int) -> list[int]:
        """Return the indices of the cases on which the Dice of the columns spreads most, widest first."""
        return _largest(np.ptp([column.cases("dice") for column in self.columns], axis=0), count)


def compare(
    runs: Sequence[ScoredRun], *, join_folds: bool = False, group_seeds: bool = False, seed: int = 0
) -> Comparison:
    """Compare every pair of runs on the cases they share.

    The 95 % intervals are percentiles of :data:`RESAMPLES` bootstrap samples of whole patients, the same ones for both
    runs. The Wilcoxon signed-rank test (two-sided; differences of zero are left out) sees one value a patient, the
    mean difference of the patient's cases: cases of one patient are not independent. Its p-values are corrected for
    the number of pairs after Holm.

    Args:
        runs: Two or more, scored alike on the same cases.
        join_folds: Set the folds of a cross-validation end to end first: runs of one experiment, each scored on other
            cases, become one run over all of them.
        group_seeds: Average the runs that differ in nothing but their seed, and compare the averages.
        seed: Of the draws.

    Raises:
        DataError: The runs cannot be compared, joined or grouped; the message names the reason.
    """
    aligned = align(joined(runs) if join_folds else runs)
    columns = group_by_experiment(aligned) if group_seeds else [Column(run.name, (run,)) for run in aligned]
    if len(columns) < 2:
        kind = "folds or seeds" if join_folds else "seeds"
        raise DataError(
            f"All runs are {kind} of {columns[0].name}: nothing is left to compare", hint="name another run"
        )
    pairs = list(itertools.combinations(range(len(columns)), 2))
    dice, jaccard = ([column.cases(score) for column in columns] for score in ("dice", "jaccard"))
    differences = [dice[run] - dice[reference] for reference, run in pairs]
    for (reference, run), values in zip(pairs, differences, strict=True):
        if not np.isfinite(values).any():
            raise DataError(
                f"No case has a score in {columns[reference].name} and in {columns[run].name}",
                hint="score the runs with --empty-policy one",
            )
    pooled, means = _resampled(columns, differences, seed)
    patients = np.unique(np.array(aligned[0].patients), return_inverse=True)[1]
    p = [signed_rank_p(_group_means(values, patients)) for values in differences]
    compared = [
        Pair(
            reference=columns[reference].name,
            run=columns[run].name,
            differences=differences[number],
            jaccard_differences=jaccard[run] - jaccard[reference],
            pooled_dice_difference=columns[run].pooled("dice") - columns[reference].pooled("dice"),
            pooled_dice_interval=interval(pooled[:, run] - pooled[:, reference]) if len(pooled) else None,
            mean_dice_interval=interval(means[:, number]) if len(means) else None,
            p=p[number],
            p_holm=corrected,
        )
        for number, ((reference, run), corrected) in enumerate(zip(pairs, holm(p), strict=True))
    ]
    return Comparison(tuple(columns), tuple(compared))


def group_by_experiment(runs: Sequence[ScoredRun]) -> list[Column]:
    """Join the runs that differ in nothing but their seed: also trained on the same data, and averaged alike.

    Raises:
        DataError: A run's file does not tell its experiment, or two runs are the same one.
    """
    groups: dict[tuple[Any, ...], list[ScoredRun]] = {}
    for run in runs:
        trained_on = run.trained_on or run.protocol.data_hash
        groups.setdefault((*kind_of(run, experiment_of(run, any_seed=True)), trained_on), []).append(run)
    columns = []
    for group in groups.values():
        first, *others = group
        column = Column(first.name, tuple(group))
        if others:
            seeds = Counter(column.seeds)
            if len(seeds) < len(group):
                named = " and ".join(run.name for run in group)
                raise DataError(f"{named} hold a seed of one experiment twice", hint="name each seed once")
            column = replace(column, name=described(_name_of_all(group), (f"{len(group)} seeds", *first.details)))
        columns.append(column)
    names = Counter(column.name for column in columns)
    return [
        column if names[column.name] == 1 else replace(column, name=" + ".join(run.name for run in column.runs))
        for column in columns
    ]


def apart_by_weights(columns: Sequence[Column]) -> list[str]:
    """Return a note for each two columns that differ in nothing but what their pretrained weights are called."""
    notes = []
    for one, other in itertools.combinations(columns, 2):
        first, second = one.runs[0], other.runs[0]
        if first.experiment is None or second.experiment is None or {*one.seeds} & {*other.seeds}:
            continue
        if kind_of(first, experiment_of(first, any_seed=True, any_weights=True)) == kind_of(
            second, experiment_of(second, any_seed=True, any_weights=True)
        ):
            notes.append(
                f"{one.name} and {other.name} are the same but for the name of their pretrained weights, and are "
                f"therefore not averaged; if the weights are the same, write one name into "
                f"{' and '.join(str(run.sources[0]) for run in (first, second))}"
            )
    return notes


def _name_of_all(group: Sequence[ScoredRun]) -> str:
    """Return what the names of the runs have in common besides their seed, or else the name of their experiment."""
    names = {_SEED_IN_NAME.sub("", _DETAILS_IN_NAME.sub("", run.name)) for run in group}
    return names.pop() if len(names) == 1 and "" not in names else str((group[0].experiment or {})["name"])


def _resampled(
    columns: Sequence[Column], differences: Sequence[Float[np.ndarray, " cases"]], seed: int
) -> tuple[Float[np.ndarray, "draws columns"], Float[np.ndarray, "draws pairs"]]:
    """Return each column's pooled Dice and each pair's mean difference, over the same draws of patients."""
    runs = [run for column in columns for run in column.runs]
    values = [getattr(run.counts, name) for run in runs for name in COUNTS[:3]]
    values += [np.nan_to_num(difference) for difference in differences]
    values += [np.isfinite(difference) for difference in differences]
    stacked = np.stack(values, axis=1).astype(np.float64)
    sums = resampled_sums(stacked, runs[0].patients, resamples=RESAMPLES, seed=seed)
    counted, total, present = np.split(sums, [3 * len(runs), 3 * len(runs) + len(differences)], axis=1)
    by_run = [overlap_scores(*counted[:, 3 * place : 3 * place + 3].T, empty=1.0)["dice"] for place in range(len(runs))]
    ends = np.cumsum([len(column.runs) for column in columns])
    pooled = [np.mean(by_run[end - len(column.runs) : end], axis=0) for column, end in zip(columns, ends, strict=True)]
    return np.stack(pooled, axis=1), total / np.maximum(present, 1)


def _group_means(values: Float[np.ndarray, " cases"], groups: np.ndarray) -> Float[np.ndarray, " groups"]:
    present = np.isfinite(values)
    counts = np.bincount(groups[present])
    sums = np.bincount(groups[present], weights=values[present])
    means: Float[np.ndarray, " groups"] = sums[counts > 0] / counts[counts > 0]
    return means


def signed_rank_p(differences: Float[np.ndarray, " groups"]) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test; 1 if no difference is other than zero."""
    # Scores of equal masks are equal, but means of them may differ in the last digit.
    rounded = np.round(differences, 12)
    return float(stats.wilcoxon(rounded).pvalue) if rounded.any() else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number: the smallest times m, the next times m - 1, … never decreasing.

    Source:
        Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _largest(values: Float[np.ndarray, " cases"], count: int) -> list[int]:
    order: list[int] = np.argsort(-np.nan_to_num(values, nan=-1.0), kind="stable").tolist()
    return [index for index in order if values[index] > 0][: max(0, count)]
