"""Paired comparison of runs that were scored on the same cases.

Cases differ far more from each other than methods do. So runs are compared case by case, and what is uncertain is the
difference: the bootstrap draws the same patients for both runs, the signed-rank test asks for the sign of each
patient's difference. See ``docs/how-to/compare-models.md``.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from tmca.config import Experiment, config_hash, from_dict
from tmca.errors import ConfigError, DataError, TMCAError
from tmca.evaluation.writing import LEDGER_VERSION
from tmca.metrics import (
    COUNTS,
    EMPTY_SCORES,
    Counts,
    EmptyPolicy,
    case_scores,
    interval,
    overlap_scores,
    pooled_scores,
    resampled_sums,
)

TIE = 0.001
"""Difference of Dice up to which neither run is better on a case."""

RESAMPLES = 2000
"""Bootstrap draws of patients."""

_HINTS = {
    "split": "score both on one split: tmca evaluate … --split SPLIT",
    "data_hash": "it covers images, masks, sentences and splits; score both on one manifest",
    "space": "pixels of other sizes are other pixels: score both with --space original",
    "threshold": "score both with one --threshold",
    "empty_policy": "score both with one --empty-policy",
}


@dataclass(frozen=True)
class Protocol:
    """What must agree for scores to be comparable.

    Attributes:
        split: Name of the split.
        data_hash: Of images, masks, sentences and splits.
        space: Side of the compared masks in pixels, or ``original``.
        threshold: Probability above which a pixel is foreground.
        empty_policy: Score of a case that is empty in mask and prediction.
    """

    split: str
    data_hash: str
    space: str
    threshold: float
    empty_policy: EmptyPolicy


@dataclass(frozen=True)
class ScoredRun:
    """A run and its counts of every case.

    Attributes:
        name: What tables call it.
        source: The file its scores were read from.
        protocol: What they mean.
        ids: Case names.
        patients: Patient of each case.
        texts: Sentence of each case; blank where there is none.
        counts: Of each case with its own sentence.
        experiment: Its fields; ``None`` in files of older versions.
        mirrored: Whether mirror images were averaged.
        models: Number of models whose probabilities were averaged.
    """

    name: str
    source: Path
    protocol: Protocol
    ids: tuple[str, ...]
    patients: tuple[str, ...]
    texts: tuple[str, ...]
    counts: Counts
    experiment: dict[str, Any] | None
    mirrored: bool = False
    models: int = 1

    @property
    def averaging(self) -> tuple[str, ...]:
        """What was averaged in a prediction, in words."""
        return (*([f"{self.models} models"] if self.models > 1 else []), *(["mirrored"] if self.mirrored else []))

    @cached_property
    def case_scores(self) -> dict[str, Float[np.ndarray, " cases"]]:
        """The scores of each case; NaN where the empty policy leaves it out."""
        return case_scores(self.counts, self.protocol.empty_policy)


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
    def seeds(self) -> list[int | None]:
        """The seeds of training; ``None`` where the file does not tell."""
        return [None if run.experiment is None else run.experiment.get("seed") for run in self.runs]


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


# --- reading ------------------------------------------------------------------------------------------------------


def read_runs(sources: Sequence[Path], split: str = "test") -> list[ScoredRun]:
    """Read the scores of runs, and give the runs distinct names.

    Args:
        sources: Run folders, folders that ``tmca evaluate`` wrote, or entries of a results ledger.
        split: Which scores of a run folder to take.

    Raises:
        ConfigError: Fewer than two runs are named, or one twice.
        DataError: A run has no scores, or its files cannot be read.
    """
    if len(sources) < 2:
        raise ConfigError(f"{len(sources)} run is named, expected two or more", hint="tmca compare RUN_A RUN_B")
    runs = [read_scores(source, split) for source in sources]
    places = Counter(run.source.resolve() for run in runs)
    names = Counter(run.name for run in runs)
    for source, run in zip(sources, runs, strict=True):
        if places[run.source.resolve()] > 1:
            raise ConfigError(f"{source} is named twice", hint="name each run once")
    return [
        run if names[run.name] == 1 else replace(run, name=str(source))
        for source, run in zip(sources, runs, strict=True)
    ]


def read_scores(source: Path, split: str = "test") -> ScoredRun:
    """Read the scores of one run: its protocol from a JSON file, its cases from the CSV file that belongs to it.

    Args:
        source: A run folder, a folder that ``tmca evaluate`` wrote, or an entry of a results ledger.
        split: Which scores of a run folder to take.

    Raises:
        DataError: There are no scores, or they cannot be read.
    """
    path, table = _files(source, split)
    hint = "it may be damaged or of an older version: score the run again with tmca evaluate"
    try:
        values = json.loads(path.read_text("utf-8"))
        metrics = values["protocol"] if "protocol" in values else values["metrics"]
        protocol = Protocol(
            split=str(values["split"]),
            data_hash=str(values["data_hash"]),
            space=str(metrics["space"]),
            threshold=float(metrics["threshold"]),
            empty_policy=metrics["per_case_mean"]["empty_policy"],
        )
        EMPTY_SCORES[protocol.empty_policy]
        pooled = float(metrics["pooled"]["dice"])
        mirrored, models = bool(metrics.get("mirrored", False)), int(metrics.get("models", 1))
        version = int(values.get("schema_version", LEDGER_VERSION))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} holds no scores: {type(error).__name__} {error}", hint=hint) from error
    if version > LEDGER_VERSION:
        raise DataError(f"{path} has version {version}, expected {LEDGER_VERSION} at most", hint="update tmca")
    run = replace(_read_cases(table, hint), name=_name(path), source=path, protocol=protocol)
    if abs(pooled_scores(run.counts)["dice"] - pooled) > 1e-6:
        raise DataError(
            f"The cases in {table} have a pooled Dice of {pooled_scores(run.counts)['dice']:.6f}, but {path} says "
            f"{pooled:.6f}: the two files are not of one evaluation",
            hint="score the run again with tmca evaluate",
        )
    run = replace(run, experiment=values.get("experiment"), mirrored=mirrored, models=models)
    return replace(run, name=_described(run.name, run.averaging))


def _files(source: Path, split: str) -> tuple[Path, Path]:
    """Return the file of the protocol and the file of the cases."""
    if source.name == "summary.json":
        source = source.parent
    if source.suffix == ".json":
        return source, source.with_suffix(".csv")
    for folder in (source, source / f"evaluation-{split}"):
        if (folder / "summary.json").is_file():
            return folder / "summary.json", folder / "metrics.csv"
    if any((source / name).is_file() for name in ("experiment.json", "config.json")):
        others = sorted(path.parent.name for path in source.glob("evaluation-*/summary.json"))
        has = f"; it has {', '.join(others)}" if others else ""
        raise DataError(
            f"{source} has no scores of the split {split!r}{has}",
            hint=f"tmca evaluate -m {source} --data DATA --split {split}",
        )
    raise DataError(
        f"{source} is no run folder, no evaluation folder and no entry of a results ledger",
        hint="name what `tmca train` or `tmca evaluate` wrote, or a file like results/NAME.json",
    )


def _name(path: Path) -> str:
    """Return what to call the run whose scores are in a file: the entry's name, or that of its folder."""
    if path.name != "summary.json":
        return path.stem
    folder = path.resolve().parent
    return folder.parent.name if folder.name.startswith("evaluation-") else folder.name


def _described(name: str, details: Sequence[str]) -> str:
    details = [detail for detail in details if detail not in name]
    return f"{name} ({', '.join(details)})" if details else name


def _read_cases(path: Path, hint: str) -> ScoredRun:
    """Return a run of which only the cases are known."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        ids = tuple(row["id"] for row in rows)
        patients, texts = tuple(row["patient_id"] for row in rows), tuple(row.get("text", "") for row in rows)
        counts = Counts(*(np.array([int(row[name]) for row in rows], dtype=np.int64) for name in COUNTS))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no cases: {type(error).__name__} {error}", hint=hint) from error
    if not rows or len(set(ids)) < len(ids):
        raise DataError(f"{path} has no case, or one twice", hint=hint)
    return ScoredRun("", path, Protocol("", "", "", 0.5, "one"), ids, patients, texts, counts, None)


def align(runs: Sequence[ScoredRun]) -> list[ScoredRun]:
    """Return the runs with their cases in the order of the first run's.

    Raises:
        DataError: Their scores cannot be compared; the message names what differs.
    """
    first, *others = runs
    return [first, *(_aligned(run, first) for run in others)]


def _aligned(run: ScoredRun, first: ScoredRun) -> ScoredRun:
    names = f"{first.name} and {run.name} cannot be compared"
    for field, hint in _HINTS.items():
        got, expected = getattr(run.protocol, field), getattr(first.protocol, field)
        if got != expected:
            raise DataError(f"{names}: {field} is {expected!s:.12} in the first, {got!s:.12} in the second", hint=hint)
    hint = "score both on one manifest"
    unshared = sorted(set(first.ids) ^ set(run.ids))
    if unshared:
        raise DataError(f"{names}: {len(unshared)} cases are in one of them only, e.g. {unshared[0]}", hint=hint)
    place = {case: index for index, case in enumerate(run.ids)}
    index = np.array([place[case] for case in first.ids])
    aligned = replace(run, ids=first.ids, counts=run.counts.select(index), texts=first.texts, patients=first.patients)
    patients = np.array([run.patients[position] for position in index])
    facts: dict[str, Callable[[Counts], np.ndarray]] = {
        "pixels of the mask": lambda counts: counts.true_positive + counts.false_negative,
        "pixels": lambda counts: sum(getattr(counts, name) for name in COUNTS),
    }
    differ = {name: fact(first.counts) != fact(aligned.counts) for name, fact in facts.items()}
    differ["patient"] = np.array(first.patients) != patients
    for name, where in differ.items():
        if where.any():
            case = first.ids[int(np.argmax(where))]
            raise DataError(f"{names}: the {name} of {int(where.sum())} cases differ, e.g. {case}", hint=hint)
    return aligned


# --- comparing ----------------------------------------------------------------------------------------------------


def compare(runs: Sequence[ScoredRun], *, group_seeds: bool = False, seed: int = 0) -> Comparison:
    """Compare every pair of runs on the cases they share.

    The 95 % intervals are percentiles of :data:`RESAMPLES` bootstrap samples of whole patients, the same ones for both
    runs. The Wilcoxon signed-rank test (two-sided; differences of zero are left out) sees one value a patient, the
    mean difference of the patient's cases: cases of one patient are not independent. Its p-values are corrected for
    the number of pairs after Holm.

    Args:
        runs: Two or more, scored alike on the same cases.
        group_seeds: Average the runs that differ in nothing but their seed, and compare the averages.
        seed: Of the draws.

    Raises:
        DataError: The runs cannot be compared or grouped; the message names the reason.
    """
    aligned = align(runs)
    columns = group_by_experiment(aligned) if group_seeds else [Column(run.name, (run,)) for run in aligned]
    if len(columns) < 2:
        raise DataError(f"All runs are seeds of {columns[0].name}: nothing is left to compare", hint="name another run")
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
    """Join the runs that differ in nothing but their seed; averaged ones join only those averaged alike.

    Raises:
        DataError: A run's file does not tell its experiment, or two runs are the same one.
    """
    groups: dict[tuple[str, bool, int], list[ScoredRun]] = {}
    for run in runs:
        groups.setdefault((_without_seed(run), run.mirrored, run.models), []).append(run)
    columns = []
    for group in groups.values():
        first, *others = group
        column = Column(first.name, tuple(group))
        if others:
            seeds = Counter(column.seeds)
            if len(seeds) < len(group):
                named = " and ".join(run.name for run in group)
                raise DataError(f"{named} hold a seed of one experiment twice", hint="name each seed once")
            name = _described((first.experiment or {})["name"], (f"{len(group)} seeds", *first.averaging))
            column = replace(column, name=name)
        columns.append(column)
    names = Counter(column.name for column in columns)
    return [
        column if names[column.name] == 1 else replace(column, name=" + ".join(run.name for run in column.runs))
        for column in columns
    ]


def _without_seed(run: ScoredRun) -> str:
    if run.experiment is None:
        raise DataError(
            f"{run.source} does not tell with what the run was trained, so its seeds cannot be grouped",
            hint="score it again with tmca evaluate",
        )
    try:
        return config_hash(replace(from_dict(Experiment, run.experiment), seed=0))
    except TMCAError as error:
        raise DataError(f"{run.source}: {error.message}", hint=error.hint) from error


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
