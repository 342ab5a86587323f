"""What a prediction says: the mask, how sure it is, what lies in it, and whether the sentence mattered and fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from tmca.data.contradictions import Contradiction, contradictions
from tmca.data.grammar import parse
from tmca.data.opposites import contradict
from tmca.errors import ConfigError, unknown_name
from tmca.imaging.frames import Geometry
from tmca.metrics import check_threshold

MaskArray = Bool[np.ndarray, "height width"]
ProbabilityArray = Float[np.ndarray, "height width"]

Setting = Literal["guided", "no text"]

NO_SENTENCE, REORDERED, CONTRADICTORY = "none", "reordered", "contradictory"

TOUCHING = np.ones((3, 3), dtype=bool)
"""Pixels connect over edges and corners."""


@dataclass(frozen=True)
class PredictionOptions:
    """How probabilities become an answer.

    Attributes:
        threshold: Probability above which a pixel belongs to the mask, in (0, 1).
        min_region: Connected regions of fewer pixels are left out of the mask.
        effects: Wrong sentences the mask is compared with; see :func:`wrong_sentences`.
    """

    threshold: float = 0.5
    min_region: int = 0
    effects: tuple[str, ...] = (NO_SENTENCE,)

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if self.min_region < 0:
            raise ConfigError(f"The smallest region is {self.min_region} pixels", hint="choose 0 or more")
        for name in self.effects:
            if name not in ALL_EFFECTS:
                raise unknown_name("effect", name, ALL_EFFECTS)


ALL_EFFECTS = (NO_SENTENCE, REORDERED, CONTRADICTORY)


@dataclass(frozen=True)
class Region:
    """One connected part of a mask.

    Attributes:
        top: First row.
        left: First column.
        bottom: Row after the last.
        right: Column after the last.
        pixels: Area.
        square_millimetres: Area, where the file says how large a pixel is.
        probability: Mean over its pixels.
    """

    top: int
    left: int
    bottom: int
    right: int
    pixels: int
    square_millimetres: float | None
    probability: float


MOST_WORDS = 8
"""How many unknown words are named."""


def shortened(words: Sequence[str]) -> str:
    """Return words in quotation marks, those beyond the first :data:`MOST_WORDS` as their number."""
    named = ", ".join(f"“{word}”" for word in words[:MOST_WORDS])
    return named + f" and {len(words) - MOST_WORDS} more" * (len(words) > MOST_WORDS)


@dataclass(frozen=True, eq=False)
class Prediction:
    """The answer to a sentence about one image, at the image's own size.

    Attributes:
        mask: What the sentence names.
        probability: Of each pixel to belong to it, calibrated where the model is.
        text: The sentence; ``None`` where there was none.
        setting: ``no text`` where no sentence was given or the model reads none: another setting, whose scores do not
            compare with guided ones.
        threshold: Probability above which a pixel is in the mask.
        regions: Connected parts of the mask, the largest first.
        geometry: How the array lies in the file and in millimetres.
        tokens: Of the sentence.
        truncated: Whether the model has not read the end of the sentence.
        unknown_words: Words that are not in the model's vocabulary; see
            :meth:`tmca.inference.Predictor.unknown_words`.
        effects: Wrong sentence → 1 − Dice of its mask and this one: 0 where the mask is the same, 1 where they share
            nothing; ``None`` where there is no such sentence.
        conflicts: What the sentence states and the mask denies.
        expected_dice: Estimated Dice of the mask and the truth; ``None`` of a model that is not calibrated, of an empty
            mask, and with another threshold or a smallest region, for which nothing was fitted.
        seconds: Stage → duration.
    """

    mask: MaskArray = field(repr=False)
    probability: ProbabilityArray = field(repr=False)
    text: str | None
    setting: Setting
    threshold: float
    regions: tuple[Region, ...]
    geometry: Geometry
    tokens: int = 0
    truncated: bool = False
    unknown_words: tuple[str, ...] = ()
    effects: dict[str, float | None] = field(default_factory=dict)
    conflicts: tuple[Contradiction, ...] = ()
    expected_dice: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def pixels(self) -> int:
        """Area of the mask."""
        return sum(region.pixels for region in self.regions)

    @property
    def square_millimetres(self) -> float | None:
        """Area of the mask, where the file says how large a pixel is."""
        area = self.geometry.pixel_area
        return None if area is None else area * self.pixels

    @property
    def answer(self) -> str:
        """What was found, in words."""
        if self.regions:
            return "one region" if len(self.regions) == 1 else f"{len(self.regions)} regions"
        if self.text and parse(self.text).present is False:
            return "no region found, and the sentence says that there is none"
        return "no region found"

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the arrays, for JSON."""
        return {
            "shape": list(self.mask.shape),
            "prompt": self.text,
            "setting": self.setting,
            "answer": self.answer,
            "region_found": bool(self.regions),
            "threshold": self.threshold,
            "tokens": self.tokens,
            "truncated": self.truncated,
            "unknown_words": list(self.unknown_words),
            "prompt_effect": {name: _rounded(value) for name, value in self.effects.items()},
            "conflicts": [asdict(conflict) for conflict in self.conflicts],
            "expected_dice": _rounded(self.expected_dice),
            "foreground_share": round(self.pixels / self.mask.size, 6),
            "pixels": self.pixels,
            "square_millimetres": _rounded(self.square_millimetres),
            "spacing": None if self.geometry.spacing is None else list(self.geometry.spacing),
            "spacing_from": self.geometry.spacing_from,
            "regions": [
                {
                    "box": [region.top, region.left, region.bottom, region.right],
                    "pixels": region.pixels,
                    "square_millimetres": _rounded(region.square_millimetres),
                    "probability": _rounded(region.probability),
                }
                for region in self.regions
            ],
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
        }


def make_mask(probability: ProbabilityArray, options: PredictionOptions) -> MaskArray:
    """Return the pixels above the threshold, without regions that are too small."""
    mask = probability > options.threshold
    if options.min_region > 1:
        labels, _ = ndimage.label(mask, TOUCHING)
        mask &= (np.bincount(labels.ravel()) >= options.min_region)[labels]
    return mask


def find_regions(mask: MaskArray, probability: ProbabilityArray, geometry: Geometry) -> tuple[Region, ...]:
    """Return the connected parts of a mask, the largest first."""
    labels, count = ndimage.label(mask, TOUCHING)
    pixel_area = geometry.pixel_area
    regions = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels, count), start=1):
        inside = labels[rows, columns] == number
        pixels = int(inside.sum())
        area = None if pixel_area is None else pixel_area * pixels
        mean = float(probability[rows, columns][inside].mean())
        regions.append(Region(rows.start, columns.start, rows.stop, columns.stop, pixels, area, mean))
    return tuple(sorted(regions, key=lambda region: -region.pixels))


def find_conflicts(text: str | None, mask: MaskArray) -> tuple[Contradiction, ...]:
    """Return what a sentence states of place, side, count and size and its mask denies."""
    return tuple(contradictions(text, mask)) if text and mask.size > 1 else ()


def wrong_sentences(text: str, effects: Sequence[str]) -> dict[str, str | None]:
    """Return the sentences a mask is compared with, to see whether the sentence mattered.

    ``none`` is no sentence; ``reordered`` the same words in another order, the same at every call; ``contradictory``
    one that names what is not there (:func:`tmca.data.opposites.contradict`).

    Args:
        text: The sentence.
        effects: Which.

    Returns:
        Effect → sentence, without those for which the sentence gives none.
    """
    found: dict[str, str | None] = {}
    for effect in effects:
        if effect == NO_SENTENCE:
            found[effect] = None
        elif effect == REORDERED:
            words = text.split()
            order = np.random.default_rng(len(text)).permutation(len(words))
            other = " ".join(words[index] for index in order)
            if other != " ".join(words):
                found[effect] = other
        elif (denied := contradict(text)) is not None:
            found[effect] = denied
    return found


def difference(mask: MaskArray, other: MaskArray) -> float:
    """Return 1 − Dice of two masks: 0 where they are equal (or both empty), 1 where they share nothing."""
    total = int(mask.sum()) + int(other.sum())
    return 1 - 2 * int((mask & other).sum()) / total if total else 0.0


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
