"""What an evaluation writes: the scores of each case, their summary, and a run's entry of the results ledger."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tmca.checkpoints import MODEL_FILE, file_hashes, resolve_checkpoint
from tmca.config import Experiment, config_hash, from_dict, to_dict
from tmca.data.manifest import Manifest
from tmca.environment import describe_hardware, source_commit
from tmca.errors import CheckpointError
from tmca.evaluation import RIGHT, Evaluation
from tmca.files import write_json, write_text
from tmca.metrics import COUNTS, SCORES, Counts, case_scores

LEDGER_VERSION = 1


def write_evaluation(
    evaluation: Evaluation,
    model: str | Path | Sequence[str | Path],
    manifest: Manifest,
    folder: Path,
    *,
    model_sha256: str | None = None,
) -> None:
    """Write ``metrics.csv`` (a row a case) and ``summary.json`` (nnU-Net's keys and the protocol).

    Args:
        evaluation: The scores.
        model: The model as the user named it; several that were averaged.
        manifest: The data it was scored on.
        folder: Where to write.
        model_sha256: Hash of the weights, of a model that is no checkpoint of ours.

    Raises:
        StorageError: The folder cannot be written.
    """
    names = [model] if isinstance(model, str | Path) else list(model)
    hashes = [model_sha256 or file_hashes(resolve_checkpoint(name))[MODEL_FILE] for name in names]
    write_text(folder / "metrics.csv", case_table(evaluation))
    chosen = manifest.split(evaluation.split)
    cases = case_scores(evaluation.counts[RIGHT], evaluation.empty_policy)
    counts = evaluation.counts[RIGHT]
    scores = [_nnunet_scores(counts.select(np.array([index])), cases, index) for index in range(len(counts))]
    rows = [
        {"reference_file": record.mask, "prediction_file": None, "metrics": {"1": values}}
        for record, values in zip(chosen.records, scores, strict=True)
    ]
    mean = {name: _mean([values[name] for values in scores]) for name in scores[0]}
    write_json(
        folder / "summary.json",
        {
            "foreground_mean": mean,
            "mean": {"1": mean},
            "metric_per_case": rows,
            "protocol": evaluation.protocol(),
            "text_ablation": evaluation.text_ablation(),
            "split": evaluation.split,
            "n": len(evaluation.ids),
            "data_hash": manifest.content_hash(),
            **_trained_with(None if evaluation.experiment is None else to_dict(evaluation.experiment)),
            "model": ", ".join(str(name) for name in names),
            "model_sha256": ", ".join(hashes),
            "train_data_hash": _training_data(names),
            "sentences_over_token_limit": list(evaluation.over_limit),
            "seconds": round(evaluation.seconds, 1),
        },
    )


def case_table(evaluation: Evaluation, *, with_text: bool = True) -> str:
    """Return one CSV row a case: counts, scores with its own sentence, Dice with the wrong ones, what they mean.

    Args:
        evaluation: The scores.
        with_text: Add the sentences. A ledger that is published goes without: they are the dataset's.
    """
    counts = evaluation.counts[RIGHT]
    columns = {name: _cells(values) for name, values in case_scores(counts, evaluation.empty_policy).items()}
    columns = {name: columns[name] for name in SCORES}
    for name in COUNTS:
        columns[name] = [str(value) for value in getattr(counts, name)]
    for variant in evaluation.counts:
        if variant != RIGHT:
            dice = np.full(len(evaluation.ids), np.nan)
            dice[evaluation.cases[variant]] = case_scores(evaluation.counts[variant], evaluation.empty_policy)["dice"]
            columns[f"dice_{variant}"] = _cells(dice)
    meaning = {
        "threshold": evaluation.threshold,
        "space": evaluation.compared_at,
        "empty_policy": evaluation.empty_policy,
    }
    if evaluation.surface is not None:
        scores = evaluation.surface.case_scores(evaluation.empty_policy)
        columns |= {name: _cells(values) for name, values in scores.items()}
        meaning |= {"tolerance": evaluation.surface.tolerance, "unit": evaluation.surface.unit}
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["id", "patient_id", *columns, *meaning, *(["text"] if with_text else [])])
    for index, case in enumerate(evaluation.ids):
        row = [values[index] for values in columns.values()]
        text = [evaluation.texts[RIGHT][index] or ""] if with_text else []
        writer.writerow([case, evaluation.patients[index], *row, *meaning.values(), *text])
    return buffer.getvalue()


def _cells(values: np.ndarray) -> list[str]:
    """Return values as cells of a table, blank where there is none."""
    return [f"{value:.6f}" if np.isfinite(value) else "" for value in values]


def write_ledger(
    evaluation: Evaluation, run: Path | Sequence[Path], manifest: Manifest, dataset: str, path: Path
) -> None:
    """Write a run's entry of the results ledger, and its per-case scores beside it as CSV.

    Args:
        evaluation: The scores.
        run: The run folder, which tells the training's length, data and commit; of several that were averaged, the
            first stands for the experiment and ``seconds`` is the sum.
        manifest: The data it was scored on.
        dataset: The dataset's name.
        path: ``results/<name>.json``.

    Raises:
        CheckpointError: ``run`` is no run folder.
        StorageError: The entry cannot be written.
    """
    trainings = [read_run(folder) for folder in ([run] if isinstance(run, Path) else run)]
    training = trainings[0]
    # The cases first: without its JSON file an entry is not known, and is written again.
    write_text(path.with_suffix(".csv"), case_table(evaluation, with_text=False))
    write_json(
        path,
        {
            "schema_version": LEDGER_VERSION,
            "name": path.stem,
            **_trained_with(training["experiment"]),
            "dataset": dataset,
            "split": evaluation.split,
            "n": len(evaluation.ids),
            "n_train": training["n_train"],
            "data_hash": manifest.content_hash(),
            "train_data_hash": training["data_hash"],
            "commit": training["commit"],
            "evaluation_commit": source_commit(),
            "hardware": training["hardware"],
            "evaluation_hardware": describe_hardware(),
            "seconds": sum(each["seconds"] for each in trainings),
            "epochs": training["epochs"],
            "stopped": training["stopped"],
            "metrics": evaluation.protocol(),
            "text_ablation": evaluation.text_ablation(),
        },
    )


def read_run(folder: Path) -> dict[str, Any]:
    """Return what a run folder says of its training: experiment, commit, hardware, data, length, and why it ended.

    Raises:
        CheckpointError: The folder is no run folder.
    """
    try:
        experiment = json.loads((folder / "experiment.json").read_text("utf-8"))
        environment = json.loads((folder / "environment.json").read_text("utf-8"))
        splits = json.loads((folder / "splits.json").read_text("utf-8"))
        with (folder / "metrics.csv").open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        return {
            "experiment": experiment,
            "commit": environment["commit"],
            "hardware": environment["hardware"],
            "n_train": len(splits["train"]),
            "data_hash": str(splits["hash"]),
            "stopped": environment.get("stopped", "not recorded"),
            "epochs": len(rows),
            "seconds": float(rows[-1]["seconds"]) if rows else 0.0,
        }
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder} is no run folder: {error}", hint="give the folder that `tmca train` wrote"
        ) from error


def _training_data(names: Sequence[str | Path]) -> str | None:
    """Return the hash of the data that models were trained on; ``None`` if not all tell the same."""
    hashes: set[str | None] = set()
    for name in map(Path, names):
        told = [folder / "splits.json" for folder in (name, *name.absolute().parents[:2])]  # a run, or its checkpoint
        path = next((path for path in told if path.is_file()), None)
        try:
            hashes.add(None if path is None else str(json.loads(path.read_text("utf-8"))["data_hash"]))
        except (OSError, ValueError, KeyError, TypeError):
            hashes.add(None)
    return hashes.pop() if len(hashes) == 1 else None


def _trained_with(experiment: dict[str, Any] | None) -> dict[str, Any]:
    """Return what files of results say of the experiment behind them."""
    if experiment is None:
        return dict.fromkeys(("preset", "seed", "config_hash", "experiment"))
    # A folder's place on the machine that trained is nobody's business; its name tells which weights they were.
    model = experiment["model"]
    for encoder, field in (("image_encoder", "weights"), ("text_encoder", "weights"), ("text_encoder", "tokenizer")):
        folder = Path(model[encoder][field])
        if model[encoder][field] and folder.is_dir():
            model[encoder][field] = folder.name
    return {
        "preset": experiment["name"],
        "seed": experiment["seed"],
        "config_hash": config_hash(from_dict(Experiment, experiment)),
        "experiment": experiment,
    }


def _finite(value: float) -> float | None:
    """Return a score as JSON knows it: a case that is left out has none."""
    return float(value) if np.isfinite(value) else None


def _mean(values: Sequence[float | int | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def _nnunet_scores(counts: Counts, cases: dict[str, np.ndarray], index: int) -> dict[str, float | int | None]:
    true_positive, false_positive = int(counts.true_positive[0]), int(counts.false_positive[0])
    false_negative, true_negative = int(counts.false_negative[0]), int(counts.true_negative[0])
    return {
        "Dice": _finite(cases["dice"][index]),
        "IoU": _finite(cases["jaccard"][index]),
        "TP": true_positive,
        "FP": false_positive,
        "FN": false_negative,
        "TN": true_negative,
        "n_pred": true_positive + false_positive,
        "n_ref": true_positive + false_negative,
    }
