"""Model × split → numbers, with the right sentences and with wrong ones.

Every evaluation answers "did the sentence matter?": each image is encoded once and segmented with its own sentence,
with another image's, with one that contradicts its own, and without any.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from tmca.config import Experiment
from tmca.data.loading import SegmentationDataset, make_loader
from tmca.data.manifest import Manifest, Record
from tmca.data.opposites import contradict
from tmca.data.preprocessing import resize_mask, restore
from tmca.devices import resolve_device
from tmca.errors import ConfigError, DataError
from tmca.imaging.reading import image_size, read_mask
from tmca.metrics import (
    Counts,
    EmptyPolicy,
    LengthUnit,
    SurfaceScores,
    bootstrap_intervals,
    case_scores,
    check_threshold,
    check_tolerance,
    confusion_counts,
    per_case_mean,
    pooled_scores,
    surface_scores,
)
from tmca.mirrored import MirrorAveraged
from tmca.models import SegmentationModel
from tmca.models.operations import channels_last
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
        surface: Distances between outlines with the right sentences; ``None`` where they were not asked for.
        experiment: What the model was trained with; ``None`` where nobody knows.
        mirrored: Whether each image was segmented together with its mirror image; see :mod:`tmca.mirrored`.
        models: Number of models whose probabilities were averaged.
        temperatures: By which the logits of each model were divided.
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
    surface: SurfaceScores | None = None
    experiment: Experiment | None = None
    mirrored: bool = False
    models: int = 1
    temperatures: tuple[float, ...] = (1.0,)

    @property
    def compared_at(self) -> str:
        """The size of the compared masks: ``original``, or the side in pixels."""
        return "original" if self.space == "original" else str(self.image_size)

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
            "surface": None if self.surface is None else self.surface.summary(self.empty_policy),
            "threshold": self.threshold,
            "space": self.compared_at,
            "mirrored": self.mirrored,
            "models": self.models,
            "temperatures": list(self.temperatures),
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
    model: SegmentationModel | Sequence[SegmentationModel],
    manifest: Manifest,
    split: str = "test",
    *,
    threshold: float = 0.5,
    space: Space = "network",
    empty_policy: EmptyPolicy = "one",
    surface_tolerance: float | None = None,
    mirrored: bool = False,
    temperatures: Sequence[float] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    device: str = "auto",
) -> Evaluation:
    """Score a model on a split of a manifest.

    Args:
        model: With its ``experiment`` set; of several that see images in the same way the probabilities are averaged.
        manifest: All splits; ``split`` is chosen from it.
        split: The split to score.
        threshold: Probability above which a pixel is foreground, in (0, 1).
        space: Compare at the network's size (as the paper) or at each mask's original size.
        empty_policy: See :data:`tmca.metrics.EmptyPolicy`.
        surface_tolerance: Also measure the distances between outlines, and count those up to this one as none. In
            millimetres at the original size if every case has a spacing, else in pixels. ``None``: do not measure.
        mirrored: Segment each image together with its mirror image, and average; see :mod:`tmca.mirrored`.
        temperatures: Of each model's calibration (see :mod:`tmca.calibration`): its logits are divided by it, as in a
            prediction. ``None``: by 1.
        seed: Decides which other sentence an image gets.
        batch_size: Images encoded at a time.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        DataError: The split is empty or its files cannot be used.
        ConfigError: The threshold, the tolerance or the device is impossible, or the models see images in different
            ways.
    """
    check_threshold(threshold)
    if surface_tolerance is not None:
        check_tolerance(surface_tolerance)
    models = [model] if isinstance(model, SegmentationModel) else list(model)
    experiment = _common_experiment(models)
    scales = [1.0] * len(models) if temperatures is None else [float(value) for value in temperatures]
    started = time.monotonic()
    chosen = manifest.split(split)
    reads_text = any(member.reads_text for member in models)
    chosen.check(require_text=reads_text, require_mask=True)
    place = resolve_device(device)
    models = [channels_last(member.to(place)).eval() for member in models]
    models = [MirrorAveraged(member) for member in models] if mirrored else models
    own = [record.text for record in chosen.records]
    texts = sentence_variants(own, seed) if reads_text else {RIGHT: tuple(own)}
    dataset = SegmentationDataset(chosen, experiment.preprocessing)
    loader = make_loader(dataset, batch_size, training=False)
    parts: dict[str, list[Counts]] = {variant: [] for variant in texts}
    outlines = None if surface_tolerance is None else _Outlines(surface_tolerance, chosen, space)
    first = 0
    for batch in track(loader, f"Scoring {split}", len(loader)):
        images = batch.images.to(place, memory_format=torch.channels_last)
        features = [member.encode_image(images) for member in models]
        rows = range(first, first + batch.batch_size)
        for variant, sentences in texts.items():
            asked = [sentences[row] for row in rows]
            found = [
                (member.segment(encoded, member.encode_text(asked)).mask_logits.float() / scale).sigmoid()
                for member, encoded, scale in zip(models, features, scales, strict=True)
            ]
            probabilities = (found[0] if len(found) == 1 else torch.stack(found).mean(0)).cpu()
            for predictions, masks in _compared(probabilities, batch.masks, threshold, space, chosen, rows):
                parts[variant].append(confusion_counts(predictions, masks))
                if outlines is not None and variant == RIGHT:
                    outlines.add(predictions, masks)
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
        over_limit=_over_limit(models[0], own),
        surface=None if outlines is None else outlines.scores(),
        experiment=experiment,
        mirrored=mirrored,
        models=len(models),
        temperatures=tuple(scales),
    )


def _common_experiment(models: Sequence[SegmentationModel]) -> Experiment:
    """Return the first model's experiment, after all have proved to see images in the same way."""
    experiments = [model.experiment for model in models if model.experiment is not None]
    if not models or len(experiments) < len(models):
        raise ConfigError("This model does not know its preprocessing", hint="load it with from_pretrained")
    if any(experiment.preprocessing != experiments[0].preprocessing for experiment in experiments):
        raise ConfigError(
            "The models see images at different sizes or normalised in different ways",
            hint="average models of one preset; `tmca predict` can average others",
        )
    return experiments[0]


def score_masks(
    masks: Mapping[str, Bool[np.ndarray, "_ _"]],
    manifest: Manifest,
    split: str = "test",
    *,
    experiment: Experiment,
    space: Space = "network",
    empty_policy: EmptyPolicy = "one",
    surface_tolerance: float | None = None,
) -> Evaluation:
    """Score masks that another program predicted, in the protocol of :func:`evaluate`.

    Args:
        masks: Record id → predicted foreground; of another size than the comparison's it is resized, nearest neighbour.
        manifest: All splits; ``split`` is chosen from it.
        split: The split to score.
        experiment: What the program was trained with; its image size is the network's.
        space: As for :func:`evaluate`.
        empty_policy: As for :func:`evaluate`.
        surface_tolerance: As for :func:`evaluate`.

    Raises:
        DataError: The split is empty, its files cannot be used, or a case has no predicted mask.
        ConfigError: The tolerance is impossible.
    """
    if surface_tolerance is not None:
        check_tolerance(surface_tolerance)
    started = time.monotonic()
    chosen = manifest.split(split)
    chosen.check(require_text=False, require_mask=True)
    missing = [record.id for record in chosen.records if record.id not in masks]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(chosen.records)} cases of {split} have no predicted mask, first {missing[0]!r}",
            hint="predict all of them",
        )
    size = experiment.preprocessing.image_size
    outlines = None if surface_tolerance is None else _Outlines(surface_tolerance, chosen, space)
    parts: list[Counts] = []
    for record in track(chosen.records, f"Scoring {split}", len(chosen.records)):
        truth = read_mask(manifest.root / (record.mask or ""))
        height, width = truth.shape if space == "original" else (size, size)
        predicted, true = (_resized(mask, height, width) for mask in (masks[record.id], truth))
        parts.append(confusion_counts(predicted, true))
        if outlines is not None:
            outlines.add(predicted, true)
    return Evaluation(
        split=split,
        ids=tuple(record.id for record in chosen.records),
        patients=tuple(record.patient_id or record.id for record in chosen.records),
        texts={RIGHT: tuple(record.text for record in chosen.records)},
        counts={RIGHT: Counts.concatenate(parts)},
        cases={RIGHT: np.arange(len(parts))},
        threshold=0.5,
        space=space,
        image_size=size,
        empty_policy=empty_policy,
        seconds=time.monotonic() - started,
        surface=None if outlines is None else outlines.scores(),
        experiment=experiment,
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
    before: dict[str, list[int]] = defaultdict(list)  # of each occurrence: how many other sentences stand before it
    for place, other in enumerate(present):
        before[other].append(place - len(before[other]))
    given: list[str | None] = []
    for text in texts:
        others = len(present) - len(before[text]) if text else 0
        if not text or not others:
            given.append(None)
            continue
        number = int(rng.integers(others))
        given.append(present[number + bisect_right(before[text], number)])
    return tuple(given)


def _computable(variant: str, sentences: Sequence[str | None]) -> np.ndarray:
    everyone = variant in (RIGHT, "none")
    return np.array([index for index, text in enumerate(sentences) if everyone or text], dtype=np.int64)


def _compared(
    probabilities: Tensor, masks: Tensor, threshold: float, space: Space, manifest: Manifest, rows: range
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield predicted and true masks: those of the whole batch, or at the original size one case at a time."""
    if space == "network":
        yield probabilities > threshold, masks
        return
    for probability, row in zip(probabilities, rows, strict=True):
        record = manifest.records[row]
        path = manifest.mask_path(record)
        height, width = image_size(manifest.image_path(record))
        truth = read_mask(path) if path is not None else np.zeros((height, width), dtype=bool)
        predicted = restore(probability[0], height, width) > threshold
        yield torch.from_numpy(predicted)[None, None], torch.from_numpy(truth)[None, None]


def _resized(mask: Bool[np.ndarray, "_ _"], height: int, width: int) -> Bool[Tensor, "1 1 rows cols"]:
    return torch.from_numpy(resize_mask(mask, height, width).copy())[None, None]


class _Outlines:
    """Collects the distances between outlines, case after case, in one unit."""

    def __init__(self, tolerance: float, manifest: Manifest, space: Space) -> None:
        known = [pixel_size(record) for record in manifest.records] if space == "original" else []
        spacings = [spacing for spacing in known if spacing is not None]
        measured = bool(spacings) and len(spacings) == len(manifest.records)
        self._tolerance = tolerance
        self._unit: LengthUnit = "mm" if measured else "pixels"
        self._spacings = spacings if measured else [(1.0, 1.0)] * len(manifest.records)
        self._hd95: list[np.ndarray] = []
        self._surface_dice: list[np.ndarray] = []
        self._cases = 0

    def add(self, predictions: Tensor, masks: Tensor) -> None:
        """Measure the next cases; those of one call have one spacing."""
        spacing = self._spacings[self._cases]
        self._cases += len(masks)
        hd95, surface_dice = surface_scores(predictions, masks, self._tolerance, spacing)
        self._hd95.append(hd95)
        self._surface_dice.append(surface_dice)

    def scores(self) -> SurfaceScores:
        """Return what was measured."""
        return SurfaceScores(
            np.concatenate(self._hd95), np.concatenate(self._surface_dice), self._tolerance, self._unit
        )


def pixel_size(record: Record) -> tuple[float, float] | None:
    """Return a record's distance between rows and between columns in millimetres, or ``None`` where it is unknown.

    Raises:
        DataError: The record's spacing is not two positive numbers.
    """
    if not record.spacing:
        return None
    try:
        row, column = (float(part) for part in record.spacing.split(","))
    except ValueError:
        row = column = math.nan
    if not (0 < row < math.inf and 0 < column < math.inf):
        raise DataError(
            f"Case {record.id!r} has the spacing {record.spacing!r}, expected two numbers in millimetres",
            hint="write row,column, for example 0.7,0.7, or leave it blank",
        )
    return row, column


def _over_limit(model: SegmentationModel, texts: Sequence[str | None]) -> tuple[str, ...]:
    if model.text_encoder is None:
        return ()
    distinct = list(dict.fromkeys(text for text in texts if text))
    flags = model.text_encoder.tokenizer(distinct).truncated
    return tuple(text for text, is_cut in zip(distinct, flags, strict=True) if is_cut)
