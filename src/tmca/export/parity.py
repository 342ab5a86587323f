"""The gate: an exported model is written only if its masks are those of the model.

Both get the same images and sentences, the exported form through the runner's own code (:mod:`tmca_run`), which a
bundle carries along: preprocessing, tokenizer, graphs and the way back to the image's size are compared together.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tmca.data.layouts import open_dataset
from tmca.data.manifest import Manifest
from tmca.data.phantom import write_phantoms
from tmca.data.preprocessing import prepare_image
from tmca.errors import ConfigError, ParityError
from tmca.imaging.reading import read_image, read_mask
from tmca.inference import Predictor
from tmca.models.preparation import prepare_for_prediction
from tmca.progress import track
from tmca_run import Segmenter

LEAST_DICE, LEAST_DICE_INT8 = 0.999, 0.99
"""Pooled Dice of an export's masks against the model's from which on it is written; int8 may be a little off."""
IMAGES = 64
DRAWN_SIZE = 256
THRESHOLD = 0.5


@dataclass(frozen=True)
class Cases:
    """Images with sentences on which an export is compared with its model.

    Attributes:
        manifest: The images to compare, each with its sentence.
        drawn: Whether they are phantoms, which say less than real images.
    """

    manifest: Manifest
    drawn: bool


@dataclass(frozen=True)
class Parity:
    """How far the masks of an export are from the model's.

    Attributes:
        data: Name of the data set.
        drawn: Whether its images are drawn, not real.
        images: Their number.
        masks: Number of compared masks: of each image with its sentence and, where the model reads text, without.
        dice: Of the export's masks against the model's, pixels of all masks taken together.
        least_dice: Of the mask that differs most.
        marked: Share of the pixels that the model marks; with none, the Dice says nothing.
        logit_error: Largest difference between logits.
        probability_error: Largest difference between calibrated probabilities, at the images' own sizes.
        model_score: Dice of the model's masks with sentences against the true ones, pixels taken together; ``None``
            where no true masks are known.
        export_score: The same of the export.
    """

    data: str
    drawn: bool
    images: int
    masks: int
    dice: float
    least_dice: float
    marked: float
    logit_error: float
    probability_error: float
    model_score: float | None
    export_score: float | None

    @property
    def loss(self) -> float | None:
        """What the export loses of the model's Dice."""
        if self.model_score is None or self.export_score is None:
            return None
        return self.model_score - self.export_score

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for a manifest."""
        return asdict(self)

    def in_words(self) -> str:
        """Return the figures as one line."""
        kind = "drawn" if self.drawn else "real"
        line = (
            f"Dice {self.dice:.5f} against torch on {self.masks} masks of {self.images} {kind} images ({self.data}), "
            f"least {self.least_dice:.4f}; largest logit error {self.logit_error:.2g}"
        )
        if self.model_score is not None and self.export_score is not None:
            line += f"; Dice against the true masks {self.export_score:.4f}, torch {self.model_score:.4f}"
        return line


@contextlib.contextmanager
def open_cases(data: Path | None, count: int = IMAGES) -> Iterator[Cases]:
    """Yield images to compare on: of a data set's test split where it has one, spread evenly, or drawn.

    Args:
        data: Manifest file or dataset folder; ``None`` draws phantoms, which are gone afterwards.
        count: Images at most.

    Raises:
        ConfigError: The count is impossible.
        DataError: The data set cannot be used.
    """
    if count < 1:
        raise ConfigError(f"--images is {count}, expected at least 1", hint=f"leave it out for {IMAGES}")
    if data is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Cases(write_phantoms(Path(temporary) / "phantoms", {"test": count}, size=DRAWN_SIZE), drawn=True)
        return
    manifest = open_dataset(data)
    chosen = _spread(manifest.split("test") if "test" in manifest.splits else manifest, count)
    with_masks = [record for record in chosen.records if record.mask]
    chosen.with_records(with_masks).check(require_text=False, require_mask=True)
    yield Cases(chosen, drawn=False)


def _spread(manifest: Manifest, count: int) -> Manifest:
    places = np.linspace(0, len(manifest.records), num=min(count, len(manifest.records)), endpoint=False).astype(int)
    return manifest.with_records([manifest.records[place] for place in places])


@torch.inference_mode()
def measure_parity(predictor: Predictor, forms: Mapping[str, Segmenter], cases: Cases) -> dict[str, Parity]:
    """Return how far each form of an export is from its model in float32.

    Args:
        predictor: Of the model, on the CPU and in float32.
        forms: Name → the export, behind the runner's own code.
        cases: What to compare on.

    Raises:
        DataError: An image cannot be read.
    """
    network = prepare_for_prediction(predictor.model, predictor.device, half=False)
    tallies = {name: _Tally() for name in forms}
    records = cases.manifest.records
    for record in track(records, "Comparing with torch", len(records)):
        image = read_image(cases.manifest.image_path(record))
        mask_path = cases.manifest.mask_path(record)
        truth = read_mask(mask_path) if mask_path is not None else None
        predictor.set_image(image)
        features = network.encode_image(prepare_image(image, predictor.experiment.preprocessing).unsqueeze(0))
        for segmenter in forms.values():
            segmenter.set_image(image)
        for text in dict.fromkeys((record.text, None)) if predictor.reads_text else (None,):
            logits = network.segment(features, network.encode_text([text])).mask_logits[0, 0].numpy()
            expected = predictor.probability(text)
            for name, segmenter in forms.items():
                found = segmenter.probability(text)
                errors = (np.abs(segmenter.logits(text) - logits).max(), np.abs(found - expected).max())
                known = truth if text == record.text or not predictor.reads_text else None
                tallies[name].add(found > THRESHOLD, expected > THRESHOLD, errors, known)
    return {name: tally.parity(cases) for name, tally in tallies.items()}


def require_parity(parity: Mapping[str, Parity], least: float = LEAST_DICE) -> None:
    """Refuse an export one of whose forms does not give the model's masks.

    Raises:
        ParityError: With the figures.
    """
    for form, figures in parity.items():
        if not figures.dice >= least or not np.isfinite(figures.logit_error):
            raise ParityError(
                f"Nothing was written: {form} does not give the model's masks. {figures.in_words()}; expected a "
                f"Dice of at least {least}",
                hint="`tmca predict` is not affected; for int8, leave --int8 out",
            )


class _Tally:
    """Sums over masks."""

    def __init__(self) -> None:
        self.dices: list[float] = []
        self.errors: list[tuple[float, float]] = []
        self.overlap = self.area = self.marked = self.pixels = 0
        self.truth: list[tuple[int, int, int, int]] = []

    def add(self, found: np.ndarray, mask: np.ndarray, errors: tuple[float, float], truth: np.ndarray | None) -> None:
        overlap, area = 2 * int((found & mask).sum()), int(found.sum()) + int(mask.sum())
        self.overlap, self.area = self.overlap + overlap, self.area + area
        self.marked, self.pixels = self.marked + int(mask.sum()), self.pixels + mask.size
        self.dices.append(overlap / area if area else 1.0)
        self.errors.append(errors)
        if truth is not None:
            sums = [(2 * int((each & truth).sum()), int(each.sum()) + int(truth.sum())) for each in (mask, found)]
            self.truth.append((*sums[0], *sums[1]))

    def parity(self, cases: Cases) -> Parity:
        scores: list[float | None] = [None, None]
        if self.truth:
            sums = np.sum(self.truth, axis=0)
            scores = [float(sums[place] / sums[place + 1]) if sums[place + 1] else 1.0 for place in (0, 2)]
        logit_error, probability_error = np.max(self.errors, axis=0)
        return Parity(
            data=cases.manifest.name,
            drawn=cases.drawn,
            images=len(cases.manifest.records),
            masks=len(self.dices),
            dice=self.overlap / self.area if self.area else 1.0,
            least_dice=min(self.dices),
            marked=self.marked / self.pixels,
            logit_error=float(logit_error),
            probability_error=float(probability_error),
            model_score=scores[0],
            export_score=scores[1],
        )
