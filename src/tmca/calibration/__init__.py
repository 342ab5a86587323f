"""How sure a model may be: probabilities that mean what they say, and an estimate of a mask's Dice.

A trained network's probabilities are too extreme. One number, the temperature by which its logits are divided, is
fitted on validation data; the sign of a logit, and with it the mask at the threshold 0.5, does not change. From the
calibrated probabilities follows the Dice that a mask can be expected to have; a line, fitted on the same data, corrects
what that estimate gets wrong.

Source:
    Guo et al., On Calibration of Modern Neural Networks, 2017 (temperature, ECE).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from tmca.config import from_dict
from tmca.errors import CheckpointError, ConfigError, DataError
from tmca.files import write_json

CALIBRATION_FILE = "calibration.json"

LOGIT_RANGE = 24.0
"""Logits beyond ± this count as this: a probability of 4e-11."""
LOGIT_BINS = 1200
RELIABILITY_BINS = 15
LEAST_CASES = 5
LOG_TEMPERATURES = (-3.0, 3.0)
"""Bounds of the natural logarithm of the temperature: 1/20 to 20."""

_CENTRES = (np.arange(LOGIT_BINS) + 0.5) / LOGIT_BINS * 2 * LOGIT_RANGE - LOGIT_RANGE


@dataclass(frozen=True)
class Calibration:
    """What was fitted for a model; ``calibration.json`` in its folder.

    Attributes:
        temperature: Divides the logits.
        dice_intercept: Of the line from the expected Dice of calibrated probabilities to the estimate.
        dice_slope: Of the same.
        dice_error: Mean absolute error of the estimate on the cases it was fitted on, each left out in turn.
        cases: Number of those.
        dataset: Their name.
        split: Which part of it.
    """

    temperature: float = 1.0
    dice_intercept: float = 0.0
    dice_slope: float = 1.0
    dice_error: float = math.nan
    cases: int = 0
    dataset: str = ""
    split: str = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"The temperature is {self.temperature}, expected a number above 0")

    def expected_dice(
        self, probability: Float[np.ndarray, "height width"], mask: Bool[np.ndarray, "height width"]
    ) -> float:
        """Return the estimated Dice of a mask and the truth, from calibrated probabilities, in [0, 1]."""
        whole = float(probability.sum(dtype=np.float64))
        marked = float(probability[mask].sum(dtype=np.float64))
        soft = 2 * marked / (whole + int(mask.sum())) if mask.any() else math.exp(-whole)
        return float(np.clip(self.dice_intercept + self.dice_slope * soft, 0, 1))

    def write(self, folder: Path) -> None:
        """Write ``calibration.json`` into a checkpoint folder.

        Raises:
            StorageError: It cannot be written.
        """
        write_json(folder / CALIBRATION_FILE, asdict(self))


def read_calibration(folder: Path) -> Calibration | None:
    """Return the calibration of a checkpoint folder, or ``None`` where it has none.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = folder / CALIBRATION_FILE
    if not path.is_file():
        return None
    try:
        return from_dict(Calibration, json.loads(path.read_text("utf-8")), where=CALIBRATION_FILE)
    except (ValueError, TypeError, OSError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", hint="run tmca calibrate again") from error


@dataclass(frozen=True)
class LogitCounts:
    """How often each logit occurred inside and outside of the truth, by case; all that calibration needs to know.

    Attributes:
        inside: Pixels of the truth by bin of their logit.
        outside: The others.
    """

    inside: Int[np.ndarray, "cases bins"]
    outside: Int[np.ndarray, "cases bins"]

    @classmethod
    def of(cls, logits: Float[np.ndarray, "cases pixels"], truth: Bool[np.ndarray, "cases pixels"]) -> LogitCounts:
        """Count the logits of some cases."""
        scaled = (np.clip(logits, -LOGIT_RANGE, LOGIT_RANGE) + LOGIT_RANGE) * (LOGIT_BINS / (2 * LOGIT_RANGE))
        bins = np.minimum(scaled.astype(np.int64), LOGIT_BINS - 1)
        counted = [
            [np.bincount(row[chosen], minlength=LOGIT_BINS) for row, chosen in zip(bins, wanted, strict=True)]
            for wanted in (truth, ~truth)
        ]
        return cls(*(np.asarray(rows, dtype=np.int64).reshape(len(logits), LOGIT_BINS) for rows in counted))

    @classmethod
    def concatenate(cls, parts: list[LogitCounts]) -> LogitCounts:
        """Join the cases of several batches."""
        return cls(np.concatenate([part.inside for part in parts]), np.concatenate([part.outside for part in parts]))

    def marked(self) -> Bool[np.ndarray, " cases"]:
        """Return in which cases the model marks something."""
        marked = slice(LOGIT_BINS // 2, None)
        return np.asarray((self.inside[:, marked] + self.outside[:, marked]).sum(1) > 0)

    def dice(self) -> Float[np.ndarray, " cases"]:
        """Return each case's Dice at the threshold 0.5; 1 where mask and truth are empty."""
        marked = slice(LOGIT_BINS // 2, None)
        overlap = self.inside[:, marked].sum(1)
        total = self.inside.sum(1) + overlap + self.outside[:, marked].sum(1)
        return np.asarray(np.where(total > 0, 2 * overlap / np.maximum(total, 1), 1.0))

    def expected_dice(self, temperature: float) -> Float[np.ndarray, " cases"]:
        """Return the Dice that each case's mask has on average if its probabilities are right.

        Of an empty mask it is the probability that there is nothing.
        """
        probability = _sigmoid(_CENTRES / temperature)
        counts = self.inside + self.outside
        marked = slice(LOGIT_BINS // 2, None)
        total = counts @ probability + counts[:, marked].sum(1)
        overlap = 2 * counts[:, marked] @ probability[marked]
        found = np.where(counts[:, marked].sum(1) > 0, overlap / np.maximum(total, 1e-12), np.exp(-total))
        return np.asarray(found)


@dataclass(frozen=True)
class Reliability:
    """Said and true, by bins of the said probability.

    Attributes:
        said: Mean probability of each bin.
        true: Share of its pixels that belong to the truth.
        share: Its share of all pixels.
    """

    said: Float[np.ndarray, " bins"]
    true: Float[np.ndarray, " bins"]
    share: Float[np.ndarray, " bins"]

    @property
    def error(self) -> float:
        """Expected calibration error (ECE): the mean distance of said and true over pixels."""
        return float((self.share * np.abs(self.said - self.true)).sum())


def reliability(counts: LogitCounts, temperature: float = 1.0) -> Reliability:
    """Return said and true probabilities over all pixels, in bins of equal width without the empty ones."""
    probability = _sigmoid(_CENTRES / temperature)
    inside, outside = counts.inside.sum(0), counts.outside.sum(0)
    number = np.minimum((probability * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
    pixels = np.bincount(number, inside + outside, RELIABILITY_BINS)
    said = np.bincount(number, (inside + outside) * probability, RELIABILITY_BINS)
    true = np.bincount(number, inside, RELIABILITY_BINS)
    filled = pixels > 0
    return Reliability(said[filled] / pixels[filled], true[filled] / pixels[filled], pixels[filled] / pixels.sum())


def fit_calibration(counts: LogitCounts, dataset: str = "", split: str = "") -> Calibration:
    """Fit temperature and quality estimate.

    The temperature is the one of least cross-entropy over all pixels. The line from expected to true Dice is fitted by
    least squares over the cases in which the model marks something.

    Args:
        counts: Of data that the model was not trained on.
        dataset: Its name, for the record.
        split: Its split.

    Raises:
        DataError: There are too few cases to fit anything.
    """
    from scipy import optimize  # slow to import, and predicting does not need it

    cases = len(counts.inside)
    if cases < LEAST_CASES:
        raise DataError(f"There are {cases} cases to calibrate on", hint=f"at least {LEAST_CASES} are needed")
    inside, outside = counts.inside.sum(0), counts.outside.sum(0)

    def cross_entropy(log_temperature: float) -> float:
        scaled = _CENTRES / math.exp(log_temperature)
        return float(inside @ np.logaddexp(0, -scaled) + outside @ np.logaddexp(0, scaled))

    found = optimize.minimize_scalar(cross_entropy, bounds=LOG_TEMPERATURES, method="bounded")
    temperature = math.exp(float(found.x))
    shown = counts.marked()
    if shown.sum() < LEAST_CASES or not inside.any():
        raise DataError(
            f"The model marks something in {shown.sum()} of {cases} cases", hint=f"at least {LEAST_CASES} are needed"
        )
    expected, true = counts.expected_dice(temperature)[shown], counts.dice()[shown]
    intercept, slope = _line(expected, true)
    left_out = []
    for case in range(len(true)):
        others = np.arange(len(true)) != case
        a, b = _line(expected[others], true[others])
        left_out.append(abs(float(np.clip(a + b * expected[case], 0, 1)) - true[case]))
    return Calibration(temperature, intercept, slope, float(np.mean(left_out)), cases, dataset, split)


def dice_errors(counts: LogitCounts, calibration: Calibration) -> Float[np.ndarray, " cases"]:
    """Return estimated − true Dice of each case."""
    expected = counts.expected_dice(calibration.temperature)
    estimated = np.clip(calibration.dice_intercept + calibration.dice_slope * expected, 0, 1)
    return np.asarray(estimated - counts.dice())


def _line(x: Float[np.ndarray, " cases"], y: Float[np.ndarray, " cases"]) -> tuple[float, float]:
    """Return intercept and slope of least squares; the mean alone where x does not vary."""
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread > 1e-12 else 0.0
    return float(y.mean()) - slope * float(x.mean()), slope


def _sigmoid(values: Float[np.ndarray, " bins"]) -> Float[np.ndarray, " bins"]:
    return np.asarray(1 / (1 + np.exp(-values)))
