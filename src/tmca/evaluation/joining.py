"""Sets the folds of a cross-validation end to end, and tells which runs were trained and scored alike."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tmca.config import Experiment, config_hash, from_dict
from tmca.errors import DataError, TMCAError
from tmca.evaluation.reading import ScoredRun, described
from tmca.metrics import Counts


def joined(runs: Sequence[ScoredRun]) -> list[ScoredRun]:
    """Set the runs of one experiment and seed end to end that were scored on other cases each: folds of one dataset.

    The joined run's data hash is that of its folds' hashes, whatever their order.

    Raises:
        DataError: A run's file does not tell its experiment, two runs were scored on one case, or a run lacks a fold
            that another one has.
    """
    groups: dict[tuple[Any, ...], list[ScoredRun]] = {}
    for run in runs:
        if run.trained_on not in ("", run.protocol.data_hash):
            raise DataError(
                f"{run.name} was trained on other data than it was scored on, maybe on the cases of its test split",
                hint="score each model on the manifest of its own fold",
            )
        groups.setdefault(kind_of(run, experiment_of(run)), []).append(run)
    tested = {run.protocol.data_hash: run for run in runs}
    for group in groups.values():
        missing = tested.keys() - {run.protocol.data_hash for run in group}
        if missing:
            other = min((tested[fold] for fold in missing), key=lambda run: run.name)
            raise DataError(
                f"Of {group[0].name} no run is on the data of {other.name}", hint="name the same folds of every method"
            )
    columns = [_end_to_end(group) for group in groups.values()]
    names = Counter(run.name for run in columns)
    return [run if names[run.name] == 1 else _named(run, *run.details, f"seed {seed_of(run)}") for run in columns]


def kind_of(run: ScoredRun, experiment: str) -> tuple[Any, ...]:
    """Return what runs have in common that are joined; of an average of models the file names the first one only."""
    return experiment, run.mirrored, run.name if run.models > 1 else ""


def _end_to_end(folds: Sequence[ScoredRun]) -> ScoredRun:
    """Return the folds of one experiment as one run over all their cases."""
    first, *others = folds
    if not others:
        return first
    for run in others:
        for field in ("split", "space", "threshold", "empty_policy"):
            got, expected = getattr(run.protocol, field), getattr(first.protocol, field)
            if got != expected:
                raise DataError(f"{first.name} and {run.name} are no folds of one dataset: {field} {expected}, {got}")
    ids = Counter(case for run in folds for case in run.ids)
    twice = [case for case, count in ids.items() if count > 1]
    if twice:
        raise DataError(
            f"{' and '.join(run.name for run in folds)} are no folds of one dataset: {len(twice)} cases were scored "
            f"more than once, e.g. {twice[0]}",
            hint="make folds with tmca data split --folds, and name each once",
        )
    hashes = sorted(run.protocol.data_hash for run in folds)
    run = ScoredRun(
        name="",
        sources=tuple(source for run in folds for source in run.sources),
        protocol=replace(first.protocol, data_hash=hashlib.sha256("".join(hashes).encode()).hexdigest()),
        ids=tuple(case for run in folds for case in run.ids),
        patients=tuple(patient for run in folds for patient in run.patients),
        texts=tuple(text for run in folds for text in run.texts),
        counts=Counts.concatenate([run.counts for run in folds]),
        experiment=first.experiment,
        mirrored=first.mirrored,
        models=first.models,
    )
    return _named(run, *run.details)


def experiment_of(run: ScoredRun, *, any_seed: bool = False, any_weights: bool = False) -> str:
    """Return the hash of what a run was trained with, or of all but its seed and the names of pretrained weights."""
    if run.experiment is None:
        raise DataError(
            f"{run.sources[0]} does not tell with what the run was trained, so it cannot be joined with others",
            hint="score it again with tmca evaluate",
        )
    try:
        experiment = from_dict(Experiment, run.experiment)
        if any_seed:
            experiment = replace(experiment, seed=0)
        if any_weights:
            model = experiment.model
            image_encoder = replace(model.image_encoder, weights=_any_name(model.image_encoder.weights))
            text_encoder = replace(model.text_encoder, weights=_any_name(model.text_encoder.weights))
            experiment = replace(
                experiment, model=replace(model, image_encoder=image_encoder, text_encoder=text_encoder)
            )
        return config_hash(experiment)
    except TMCAError as error:
        raise DataError(f"{run.sources[0]}: {error.message}", hint=error.hint) from error


def _any_name(weights: str) -> str:
    return weights if weights in ("none", "scratch") else "pretrained"


def _named(run: ScoredRun, *details: str) -> ScoredRun:
    """Return a run called by its experiment."""
    return replace(run, name=described((run.experiment or {})["name"], details))


def seed_of(run: ScoredRun) -> int | None:
    """Return the seed of training; ``None`` where the file does not tell."""
    return None if run.experiment is None else run.experiment.get("seed")
