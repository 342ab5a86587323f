"""Model × split → numbers, with the right sentences and with wrong ones.

Every evaluation answers "did the sentence matter?": each image is encoded once and segmented with its own sentence,
with another image's, with one that contradicts its own, and without any.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tmca.checkpoints import MODEL_FILE, file_hashes, resolve_checkpoint
from tmca.data.grammar import contradict
from tmca.data.loading import SegmentationDataset, make_loader
from tmca.data.manifest import Manifest
from tmca.data.preprocessing import restore
from tmca.devices import resolve_device
from tmca.environment import describe_hardware, source_commit
from tmca.errors import CheckpointError, ConfigError
from tmca.files import write_json, write_text
from tmca.imaging.reading import image_size, read_mask
from tmca.metrics import (
    Counts,
    EmptyPolicy,
    bootstrap_intervals,
    case_scores,
    check_threshold,
    confusion_counts,
    per_case_mean,
    pooled_scores,
)
from tmca.models import TMCA
from tmca.progress import track

Space = Literal["network", "original"]
RIGHT = "right"
VARIANTS = {
    RIGHT: "the right one",
    "shuffled": "another image's",
    "contradictory": "a contradictory one",
    "none": "none",
}
"""Which sentence each image is segmented with, in the order of every table."""
LEDGER_VERSION = 1


@dataclass(frozen=True)
class Evaluation:
    """Counts of every case under every sentence, and what they were computed with.

    Attributes:
        split: Name of the split.
        ids: Case names.
        patients: Patient of each case, or the case's own name; bootstrap draws patients.
        texts: Variant → the sentences used; ``None`` where a case has none of that kind.
        counts: Variant → counts of the cases whose number is in ``cases``.
        cases: Variant → indices of the cases it could be computed for.
        threshold: Probability above which a pixel counts as foreground.
        space: ``network``: at the size the model sees; ``original``: at the size of the mask file.
        image_size: Side of the images the model saw, in pixels.
        empty_policy: Score of a case that is empty in mask and prediction.
        seconds: Duration.
        over_limit: Sentences that are cut because they have more tokens than the model takes.
    """

    split: str
    ids: tuple[str, ...]
    patients: tuple[str, ...]
    texts: dict[str, tuple[str | None, ...]]
    counts: dict[str, Counts]
    cases: dict[str, np.ndarray]
    threshold: float
    space: Space
    image_size: int
    empty_policy: EmptyPolicy
    seconds: float = 0.0
    over_limit: tuple[str, ...] = ()

    def pooled(self, variant: str = RIGHT) -> dict[str, float]:
        """Return the scores of all pixels taken together."""
        return pooled_scores(self.counts[variant])

    def per_case(self, variant: str = RIGHT) -> dict[str, float]:
        """Return the means of the cases' scores."""
        return per_case_mean(self.counts[variant], self.empty_policy)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Return 95 % bootstrap intervals of the scores with the right sentences, drawn by patient."""
        return bootstrap_intervals(self.counts[RIGHT], groups=list(self.patients), empty_policy=self.empty_policy)

    def protocol(self) -> dict[str, Any]:
        """Return the scores with the words that say what they mean."""
        counts = self.counts[RIGHT]
        empty = (counts.true_positive + counts.false_negative) == 0
        return {
            "pooled": self.pooled(),
            "per_case_mean": self.per_case() | {"empty_policy": self.empty_policy, "n_empty": int(empty.sum())},
            "ci95": {name: list(values) for name, values in self.intervals().items()},
            "threshold": self.threshold,
            "space": "original" if self.space == "original" else str(self.image_size),
        }

    def text_ablation(self) -> dict[str, Any]:
        """Return the scores with the wrong sentences and with none."""
        return {
            variant: {
                "pooled": self.pooled(variant),
                "per_case_mean": self.per_case(variant),
                "n": len(self.cases[variant]),
            }
            for variant in self.counts
            if variant != RIGHT
        }

    def by_dice(self) -> list[int]:
        """Return the case indices from the worst to the best Dice with the right sentence."""
        order: list[int] = np.argsort(case_scores(self.counts[RIGHT], "one")["dice"], kind="stable").tolist()
        return order


@torch.inference_mode()
def evaluate(
    model: TMCA,
    manifest: Manifest,
    split: str = "test",
    *,
    threshold: float = 0.5,
    space: Space = "network",
    empty_policy: EmptyPolicy = "one",
    seed: int = 0,
    batch_size: int = 16,
    device: str = "auto",
) -> Evaluation:
    """Score a model on a split of a manifest.

    Args:
        model: With its ``experiment`` set.
        manifest: All splits; ``split`` is chosen from it.
        split: The split to score.
        threshold: Probability above which a pixel is foreground, in (0, 1).
        space: Compare at the network's size (as the paper) or at each mask's original size.
        empty_policy: See :data:`tmca.metrics.EmptyPolicy`.
        seed: Decides which other sentence an image gets.
        batch_size: Images encoded at a time.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        DataError: The split is empty or its files cannot be used.
        ConfigError: The threshold or the device is impossible.
    """
    check_threshold(threshold)
    experiment = model.experiment
    if experiment is None:
        raise ConfigError("This model does not know its preprocessing", hint="load it with from_pretrained")
    started = time.monotonic()
    chosen = manifest.split(split)
    chosen.check(require_text=model.reads_text, require_mask=True)
    place = resolve_device(device)
    model = model.to(place).eval()
    own = [record.text for record in chosen.records]
    texts = sentence_variants(own, seed) if model.reads_text else {RIGHT: tuple(own)}
    dataset = SegmentationDataset(chosen, experiment.preprocessing)
    loader = make_loader(dataset, batch_size, training=False)
    parts: dict[str, list[Counts]] = {variant: [] for variant in texts}
    first = 0
    for batch in track(loader, f"Scoring {split}", len(loader)):
        features = model.encode_image(batch.images.to(place))
        rows = range(first, first + batch.batch_size)
        for variant, sentences in texts.items():
            output = model.segment(features, model.encode_text([sentences[row] for row in rows]))
            probabilities = output.mask_logits.float().sigmoid().cpu()
            parts[variant] += _count(probabilities, batch.masks, threshold, space, chosen, rows)
        first += batch.batch_size
    cases = {variant: _computable(variant, sentences) for variant, sentences in texts.items()}
    counts = {variant: Counts.concatenate(parts[variant]).select(cases[variant]) for variant in texts}
    return Evaluation(
        split=split,
        ids=tuple(record.id for record in chosen.records),
        patients=tuple(record.patient_id or record.id for record in chosen.records),
        texts=texts,
        counts={variant: values for variant, values in counts.items() if len(values)},
        cases=cases,
        threshold=threshold,
        space=space,
        image_size=experiment.preprocessing.image_size,
        empty_policy=empty_policy,
        seconds=time.monotonic() - started,
        over_limit=_over_limit(model, own),
    )


def sentence_variants(texts: Sequence[str | None], seed: int) -> dict[str, tuple[str | None, ...]]:
    """Return the sentences of each variant; ``None`` where a case has no wrong sentence of that kind.

    Args:
        texts: Each image's own sentence.
        seed: Decides which other sentence an image gets.
    """
    return {
        RIGHT: tuple(texts),
        "shuffled": shuffled(texts, seed),
        "contradictory": tuple(contradict(text) if text else None for text in texts),
        "none": (None,) * len(texts),
    }


def shuffled(texts: Sequence[str | None], seed: int) -> tuple[str | None, ...]:
    """Give each image the sentence of another one, and one that reads differently.

    Sentences are drawn as often as they occur. If all are the same there is none to give.
    """
    rng = np.random.default_rng(seed)
    present = [text for text in texts if text]
    given: list[str | None] = []
    for text in texts:
        others = [other for other in present if other != text]
        given.append(others[int(rng.integers(len(others)))] if text and others else None)
    return tuple(given)


def write_evaluation(evaluation: Evaluation, model: str | Path, manifest: Manifest, folder: Path) -> None:
    """Write ``metrics.csv`` (a row a case) and ``summary.json`` (nnU-Net's keys and the protocol).

    Raises:
        StorageError: The folder cannot be written.
    """
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
            "model": str(model),
            "model_sha256": file_hashes(resolve_checkpoint(model))[MODEL_FILE],
            "sentences_over_token_limit": list(evaluation.over_limit),
            "seconds": round(evaluation.seconds, 1),
        },
    )


def case_table(evaluation: Evaluation) -> str:
    """Return one CSV row a case: counts, scores with its own sentence, Dice with the wrong ones."""
    scores = case_scores(evaluation.counts[RIGHT], evaluation.empty_policy)
    counts = evaluation.counts[RIGHT]
    others = {}
    for variant in evaluation.counts:
        if variant != RIGHT:
            dice = case_scores(evaluation.counts[variant], evaluation.empty_policy)["dice"]
            others[variant] = dict(zip(evaluation.cases[variant].tolist(), dice.tolist(), strict=True))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = ("true_positive", "false_positive", "false_negative", "true_negative")
    writer.writerow(
        ["id", "patient_id", "dice", "jaccard", "accuracy", *names, *(f"dice_{name}" for name in others), "text"]
    )
    for index, case in enumerate(evaluation.ids):
        row: list[Any] = [case, evaluation.patients[index]]
        row += [f"{scores[name][index]:.6f}" for name in ("dice", "jaccard", "accuracy")]
        row += [int(getattr(counts, name)[index]) for name in names]
        row += [f"{values[index]:.6f}" if index in values else "" for values in others.values()]
        writer.writerow([*row, evaluation.texts[RIGHT][index] or ""])
    return buffer.getvalue()


def write_ledger(evaluation: Evaluation, run: Path, manifest: Manifest, dataset: str, path: Path) -> None:
    """Write a run's entry of the results ledger, and its per-case scores beside it as CSV.

    Args:
        evaluation: The scores.
        run: The run folder, which tells the training's length, data and commit.
        manifest: The data it was scored on.
        dataset: The dataset's name.
        path: ``results/<name>.json``.

    Raises:
        CheckpointError: ``run`` is no run folder.
        StorageError: The entry cannot be written.
    """
    training = read_run(run)
    # A folder's place on the machine that trained is nobody's business; its name tells which weights they were.
    for encoder in ("image_encoder", "text_encoder"):
        weights = training["experiment"]["model"][encoder]
        if Path(weights["weights"]).is_dir():
            weights["weights"] = Path(weights["weights"]).name
    write_json(
        path,
        {
            "schema_version": LEDGER_VERSION,
            "name": path.stem,
            "preset": training["experiment"]["name"],
            "experiment": training["experiment"],
            "dataset": dataset,
            "split": evaluation.split,
            "n": len(evaluation.ids),
            "n_train": training["n_train"],
            "data_hash": manifest.content_hash(),
            "commit": training["commit"],
            "evaluation_commit": source_commit(),
            "hardware": training["hardware"],
            "evaluation_hardware": describe_hardware(),
            "seed": training["experiment"]["seed"],
            "seconds": training["seconds"],
            "epochs": training["epochs"],
            "metrics": evaluation.protocol(),
            "text_ablation": evaluation.text_ablation(),
        },
    )
    write_text(path.with_suffix(".csv"), case_table(evaluation))


def read_run(folder: Path) -> dict[str, Any]:
    """Return what a run folder says of its training: experiment, commit, hardware, images, epochs, seconds.

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
            "epochs": len(rows),
            "seconds": float(rows[-1]["seconds"]) if rows else 0.0,
        }
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder} is no run folder: {error}", hint="give the folder that `tmca train` wrote"
        ) from error


def _computable(variant: str, sentences: Sequence[str | None]) -> np.ndarray:
    everyone = variant in (RIGHT, "none")
    return np.array([index for index, text in enumerate(sentences) if everyone or text], dtype=np.int64)


def _count(
    probabilities: Tensor, masks: Tensor, threshold: float, space: Space, manifest: Manifest, rows: range
) -> Iterator[Counts]:
    if space == "network":
        yield confusion_counts(probabilities > threshold, masks)
        return
    for probability, row in zip(probabilities, rows, strict=True):
        record = manifest.records[row]
        path = manifest.mask_path(record)
        height, width = image_size(manifest.image_path(record))
        truth = read_mask(path) if path is not None else np.zeros((height, width), dtype=bool)
        predicted = restore(probability[0], height, width) > threshold
        yield confusion_counts(torch.from_numpy(predicted)[None, None], torch.from_numpy(truth)[None, None])


def _over_limit(model: TMCA, texts: Sequence[str | None]) -> tuple[str, ...]:
    if model.text_encoder is None:
        return ()
    distinct = list(dict.fromkeys(text for text in texts if text))
    flags = model.text_encoder.tokenizer(distinct).truncated
    return tuple(text for text, is_cut in zip(distinct, flags, strict=True) if is_cut)


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
