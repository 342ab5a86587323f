"""Reads the scores that :mod:`tmca.evaluation.writing` wrote, and puts the cases of several runs in one order."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from tmca.errors import ConfigError, DataError
from tmca.evaluation.writing import LEDGER_VERSION
from tmca.metrics import COUNTS, EMPTY_SCORES, Counts, EmptyPolicy, case_scores, pooled_scores

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
        sources: The file its scores were read from, or one a fold.
        protocol: What they mean.
        ids: Case names.
        patients: Patient of each case.
        texts: Sentence of each case; blank where there is none.
        counts: Of each case with its own sentence.
        experiment: Its fields; ``None`` in files of older versions.
        mirrored: Whether mirror images were averaged.
        models: Number of models whose probabilities were averaged.
        trained_on: Hash of the data it was trained on; blank where the file does not tell.
    """

    name: str
    sources: tuple[Path, ...]
    protocol: Protocol
    ids: tuple[str, ...]
    patients: tuple[str, ...]
    texts: tuple[str, ...]
    counts: Counts
    experiment: dict[str, Any] | None
    mirrored: bool = False
    models: int = 1
    trained_on: str = ""

    @property
    def details(self) -> tuple[str, ...]:
        """How many folds were joined and what was averaged in a prediction, in words."""
        return (
            *([f"{len(self.sources)} folds"] if len(self.sources) > 1 else []),
            *([f"{self.models} models"] if self.models > 1 else []),
            *(["mirrored"] if self.mirrored else []),
        )

    @cached_property
    def case_scores(self) -> dict[str, Float[np.ndarray, " cases"]]:
        """The scores of each case; NaN where the empty policy leaves it out."""
        return case_scores(self.counts, self.protocol.empty_policy)


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
    places = Counter(run.sources[0].resolve() for run in runs)
    names = Counter(run.name for run in runs)
    for source, run in zip(sources, runs, strict=True):
        if places[run.sources[0].resolve()] > 1:
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
    if not path.is_file():
        raise DataError(f"There is no {path}", hint="name what `tmca train` or `tmca evaluate` wrote")
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
        trained_on = str(values.get("train_data_hash") or "")
        version = int(values.get("schema_version", LEDGER_VERSION))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} holds no scores: {type(error).__name__} {error}", hint=hint) from error
    if version > LEDGER_VERSION:
        raise DataError(f"{path} has version {version}, expected {LEDGER_VERSION} at most", hint="update tmca")
    run = replace(_read_cases(table, hint), name=_name(path), sources=(path,), protocol=protocol)
    if abs(pooled_scores(run.counts)["dice"] - pooled) > 1e-6:
        raise DataError(
            f"The cases in {table} have a pooled Dice of {pooled_scores(run.counts)['dice']:.6f}, but {path} says "
            f"{pooled:.6f}: the two files are not of one evaluation",
            hint="score the run again with tmca evaluate",
        )
    run = replace(run, experiment=values.get("experiment"), mirrored=mirrored, models=models, trained_on=trained_on)
    return replace(run, name=described(run.name, run.details))


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


def described(name: str, details: Sequence[str]) -> str:
    """Return a name with what it does not say yet in brackets."""
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
    return ScoredRun("", (path,), Protocol("", "", "", 0.5, "one"), ids, patients, texts, counts, None)


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
