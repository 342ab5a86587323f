"""What a dataset looks like split by split: counts, sizes, grey values, masks, sentences, and how far splits differ."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from scipy import stats

from tmca.data.audit.case_facts import CaseFacts
from tmca.data.manifest import Record

REFERENCE_SPLIT = "train"
"""The split with which the others are compared."""

FEWEST_COMPARED = 20
"""Number of values in both splits from which their distributions are compared."""

SOURCE_SHARE = 0.02
"""Share of the cases from which a name's first letters count as a source."""

OTHER_SOURCES = "other"

_LISTED_SIZES = 5
_PERMUTATIONS = 4999
_SPLIT_NAMES = frozenset(
    ("train", "training", "tr", "val", "valid", "validation", "dev", "eval", "test", "testing", "ts")
)
"""First letters of files that tell the split and not the source."""


@dataclass(frozen=True)
class Spread:
    """Distribution of one quantity over the cases of a split."""

    minimum: float
    median: float
    mean: float
    maximum: float


@dataclass(frozen=True)
class SplitFacts:
    """What one split holds; ``None`` where nothing of that kind is there.

    Attributes:
        cases: Number of cases.
        patients: Number of patients, volumes or sequences that the manifest names.
        with_mask: Cases whose mask could be read.
        with_text: Cases with a sentence.
        image_sizes: Number of images by "height × width", the five most frequent.
        distinct_image_sizes: Number of different sizes.
        darkest: Smallest grey value of any image, 0 to 255.
        brightest: Largest grey value of any image.
        brightness: Mean grey value of an image.
        contrast: Standard deviation of an image's grey values.
        foreground: Share of foreground in a mask.
        empty_masks: Number of masks without foreground.
        words: Number of words in a sentence.
        tokens: Number of tokens in a sentence, if they were counted.
        distinct_sentences: Number of different sentences.
        effective_sentences: Inverse of the chance that two cases drawn at random have the same sentence: the number of
            equally frequent sentences that would have that chance.
        unseen_sentences: Share of the cases whose sentence no training case has; ``None`` for the training split.
        sources: Number of cases by the first letters of their image's name; the name of a split is passed over.
    """

    cases: int
    patients: int
    with_mask: int
    with_text: int
    image_sizes: dict[str, int]
    distinct_image_sizes: int
    darkest: int | None
    brightest: int | None
    brightness: Spread | None
    contrast: Spread | None
    foreground: Spread | None
    empty_masks: int
    words: Spread | None
    tokens: Spread | None
    distinct_sentences: int
    effective_sentences: float
    unseen_sentences: float | None
    sources: dict[str, int]


@dataclass(frozen=True)
class Shift:
    """How far the distribution of one feature in a split lies from that in the training split.

    Attributes:
        split: The other split.
        feature: ``brightness``, ``contrast``, ``foreground``, ``pixels``, ``words`` or ``source``.
        distance: Largest difference of the two cumulative distributions (Kolmogorov–Smirnov), 0 to 1; for sources half
            the sum of the differences of their shares.
        effect: Difference of the means in standard deviations of the training split; ``None`` for sources and where
            training cases do not vary.
        p_value: Of the two-sample test; for sources the share of random divisions of the same cases, two splits of the
            same sizes, that are as far apart.
    """

    split: str
    feature: str
    distance: float
    effect: float | None
    p_value: float


@dataclass(frozen=True)
class Fingerprint:
    """Facts of a dataset.

    Attributes:
        cases: Number of cases.
        distinct_sentences: Number of different sentences in all splits.
        splits: Facts by split, in order of appearance.
        shifts: Distances of the other splits from the training split, where both are large enough.
    """

    cases: int
    distinct_sentences: int
    splits: dict[str, SplitFacts]
    shifts: tuple[Shift, ...]


def fingerprint(
    records: Sequence[Record], facts: Sequence[CaseFacts], token_counts: Mapping[str, int] | None = None
) -> Fingerprint:
    """Return the fingerprint of a dataset.

    Args:
        records: The cases.
        facts: What was found in the files of each.
        token_counts: Number of tokens of each distinct sentence.
    """
    common = _common_sources(records)
    positions: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        positions.setdefault(record.split, []).append(number)
    seen = {record.text for record in records if record.split == REFERENCE_SPLIT}
    splits, features = {}, {}
    for name, numbers in positions.items():
        chosen, found = [records[number] for number in numbers], [facts[number] for number in numbers]
        sources = Counter(_source(record, common) for record in chosen)
        splits[name] = _split_facts(chosen, found, sources, token_counts, None if name == REFERENCE_SPLIT else seen)
        features[name] = _features(chosen, found)
    shifts = [
        shift
        for name in positions
        if REFERENCE_SPLIT in positions and name != REFERENCE_SPLIT
        for shift in [
            *_shifts(name, features[REFERENCE_SPLIT], features[name]),
            *_source_shift(name, splits[REFERENCE_SPLIT], splits[name]),
        ]
    ]
    distinct = len({record.text for record in records if record.text is not None})
    return Fingerprint(len(records), distinct, splits, tuple(shifts))


def effective_number(texts: Sequence[str]) -> float:
    """Return the inverse of the chance that two of the sentences, drawn with replacement, are the same; 0 for none."""
    if not texts:
        return 0.0
    shares = np.array(list(Counter(texts).values())) / len(texts)
    return float(1 / (shares**2).sum())


def _split_facts(
    records: list[Record],
    facts: list[CaseFacts],
    sources: Counter[str],
    token_counts: Mapping[str, int] | None,
    seen: set[str | None] | None,
) -> SplitFacts:
    texts = [record.text for record in records if record.text is not None]
    sizes = Counter(f"{fact.image_size[0]} × {fact.image_size[1]}" for fact in facts if fact.image_size is not None)
    readable = [fact for fact in facts if fact.darkest is not None and fact.brightest is not None]
    values = _features(records, facts)
    return SplitFacts(
        cases=len(records),
        patients=len({record.patient_id for record in records if record.patient_id}),
        with_mask=len(values["foreground"]),
        with_text=len(texts),
        image_sizes=dict(sizes.most_common(_LISTED_SIZES)),
        distinct_image_sizes=len(sizes),
        darkest=min((fact.darkest for fact in readable if fact.darkest is not None), default=None),
        brightest=max((fact.brightest for fact in readable if fact.brightest is not None), default=None),
        brightness=_spread(values["brightness"]),
        contrast=_spread(values["contrast"]),
        foreground=_spread(values["foreground"]),
        empty_masks=sum(fact.foreground == 0 for fact in facts),
        words=_spread(values["words"]),
        tokens=_spread([float(token_counts[text]) for text in texts]) if token_counts is not None else None,
        distinct_sentences=len(set(texts)),
        effective_sentences=effective_number(texts),
        unseen_sentences=sum(text not in seen for text in texts) / len(texts) if texts and seen is not None else None,
        sources=dict(sources.most_common()),
    )


def _features(records: list[Record], facts: list[CaseFacts]) -> dict[str, list[float]]:
    return {
        "brightness": [fact.brightness for fact in facts if fact.brightness is not None],
        "contrast": [fact.contrast for fact in facts if fact.contrast is not None],
        "foreground": [fact.foreground for fact in facts if fact.foreground is not None],
        "pixels": [float(np.prod(fact.image_size)) for fact in facts if fact.image_size is not None],
        "words": [float(len(record.text.split())) for record in records if record.text is not None],
    }


def _shifts(split: str, reference: dict[str, list[float]], other: dict[str, list[float]]) -> list[Shift]:
    shifts = []
    for feature, values in reference.items():
        if min(len(values), len(other[feature])) < FEWEST_COMPARED:
            continue
        test = stats.ks_2samp(values, other[feature], method="asymp")
        spread = float(np.std(values))
        effect = float(np.mean(other[feature]) - np.mean(values)) / spread if spread > 0 else None
        shifts.append(Shift(split, feature, float(test.statistic), effect, float(test.pvalue)))
    return shifts


def _source_shift(split: str, reference: SplitFacts, other: SplitFacts) -> list[Shift]:
    names = sorted(reference.sources.keys() | other.sources.keys())
    if len(names) < 2 or min(reference.cases, other.cases) < FEWEST_COMPARED:
        return []
    counts = np.array([other.sources.get(name, 0) for name in names])
    totals = counts + [reference.sources.get(name, 0) for name in names]
    drawn = np.random.default_rng(0).multivariate_hypergeometric(totals, other.cases, _PERMUTATIONS)
    distances = [
        np.abs(part / other.cases - (totals - part) / reference.cases).sum(axis=-1) / 2 for part in (counts, drawn)
    ]
    as_far = int((distances[1] >= distances[0] - 1e-9).sum())
    return [Shift(split, "source", float(distances[0]), None, (as_far + 1) / (_PERMUTATIONS + 1))]


def _common_sources(records: Sequence[Record]) -> set[str]:
    counts = Counter(_first_letters(record) for record in records)
    return {name for name, count in counts.items() if name and count >= SOURCE_SHARE * len(records)}


def _source(record: Record, common: set[str]) -> str:
    name = _first_letters(record)
    return name if name in common else OTHER_SOURCES


def _first_letters(record: Record) -> str:
    words = re.split(r"[\W_]+", PurePosixPath(record.image).stem.lower())
    word = words[1] if words[0].rstrip("0123456789") in _SPLIT_NAMES and len(words) > 1 else words[0]
    found = re.match(r"[^\W\d_]+", word)
    return "" if found is None or found[0] in _SPLIT_NAMES else found[0]


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    return Spread(min(values), float(np.median(values)), float(np.mean(values)), max(values))
