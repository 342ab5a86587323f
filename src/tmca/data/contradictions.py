"""Sentences held against their masks: what a sentence states and its mask denies, and such sentences corrected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tmca.data.describe import SIZE_LIMITS, SPECK_SHARES, MaskArray, half_profiles, measure, parts_of
from tmca.data.grammar import PLACES, SIDES, Facts, fact_words, parse, unknown_words, write_sentence
from tmca.data.manifest import Manifest, Record
from tmca.errors import DataError
from tmca.imaging.reading import read_mask
from tmca.progress import say, track

_SIZE_TOLERANCE = 1.25
_PLACE_TOLERANCE = 0.1
_THIRD_REACH = {"upper": (0.0, 0.45), "middle": (0.15, 0.65), "lower": (0.35, 1.0)}
_OWNED = 0.9
_NOTHING = 0.01
_PLENTY = 0.25


@dataclass(frozen=True)
class Contradiction:
    """A fact that a sentence states and its mask denies.

    Attributes:
        kind: What is contradicted: whether there is a target, how many, how large, where from left to right, or where
            from top to bottom.
        said: What the sentence says, in its words.
        seen: What the mask shows.
    """

    kind: Literal["presence", "count", "size", "side", "height"]
    said: str
    seen: str


def contradictions(text: str, mask: MaskArray) -> list[Contradiction]:
    """Return what a sentence says against its mask.

    Doubt is no contradiction. Counts may be those with or without small parts, and with gaps or necks of 1 % of the
    image closed or cut; sizes may miss their class by a factor of 1.25; a place, side or height contradicts where it
    and its surroundings hold next to nothing of the mask. Words for colour and shape are not judged.

    Args:
        text: The sentence; facts that it does not state, or not for sure, are not judged.
        mask: Ground truth, upright.
    """
    said = parse(text)
    if said.present is None:
        return []
    if said.present != bool(mask.any()):
        words = ("no target", "a target")
        return [Contradiction("presence", words[said.present], words[not said.present])]
    if not said.present:
        return []
    seen = measure(mask, None, said.grammar)
    found = _contradicted_count(said, seen, mask)
    if said.grammar == "lung":
        return found + _contradicted_lungs(said, seen, mask)
    return found + _contradicted_sizes(said, seen, mask) + _contradicted_places(said, seen, mask)


def corrected(text: str, mask: MaskArray) -> str:
    """Return a sentence without what its mask denies.

    Where a count, a size or a place is contradicted, all of these that the sentence states become those of the mask;
    for lungs, sides, thirds and count. Colour and shape stay, and so does a sentence without contradictions. Where a
    target is named that is not there, or denied though it is, the mask is described anew. The wording becomes that of
    the published sentences.

    Args:
        text: The sentence.
        mask: Ground truth, upright.

    Raises:
        DataError: A contradicted sentence has words that the grammar does not know, or words for a place, a colour or a
            shape that it cannot place. They would be lost.
    """
    if not contradictions(text, mask):
        return text
    said = parse(text)
    lost = unknown_words(text) or _unread(text, said)
    if lost:
        raise DataError(
            f"“{text}” contradicts its mask, and {', '.join(lost)} would be lost", hint="correct it by hand"
        )
    seen = measure(mask, None, said.grammar)
    if said.present != seen.present:
        return write_sentence(seen)
    return write_sentence(
        replace(
            said,
            count=said.count if said.count is None else seen.count,
            sizes=seen.sizes if said.sizes else (),
            places=seen.places if said.places else (),
            bilateral=said.bilateral if said.bilateral is None else seen.bilateral,
            sides=seen.sides if said.sides else (),
            left=seen.left if said.left or said.right else (),
            right=seen.right if said.left or said.right else (),
        )
    )


def _unread(text: str, said: Facts) -> list[str]:
    """Return the words of a sentence for places, colours and shapes that are not among the facts read from it."""
    read = set(fact_words(write_sentence(said)))
    return [word for word in fact_words(text) if word not in read]


def correct_manifest(manifest: Manifest) -> Manifest:
    """Return the manifest with :func:`corrected` sentences; theirs is the ``text_provenance`` ``from_mask``.

    One line to stderr says how many there were, another which ones could not be corrected.

    Args:
        manifest: The cases; one at a time is read.

    Raises:
        DataError: No case has a sentence and a mask.
    """
    judged = [record for record in manifest.records if record.text is not None and record.mask is not None]
    if not judged:
        raise DataError(
            f"no case of {manifest.name} has both a sentence and a mask",
            hint="`tmca data describe` writes sentences from masks",
        )
    kinds: Counter[str] = Counter()
    kept: list[str] = []

    def correct() -> Iterator[Record]:
        for record in manifest.records:
            mask_path = manifest.mask_path(record)
            if mask_path is None or record.text is None:
                yield record
                continue
            try:
                mask = read_mask(mask_path)
                text = corrected(record.text, mask)
            except DataError as error:
                kept.append(f"{record.id}: {error.message}")
                yield record
                continue
            if text == record.text:
                yield record
                continue
            kinds.update(dict.fromkeys((found.kind for found in contradictions(record.text, mask)), 1))
            yield replace(record, text=text, text_provenance="from_mask")

    records = tuple(track(correct(), f"Correcting {manifest.name}", len(manifest.records)))
    changed = sum(new.text != old.text for old, new in zip(manifest.records, records, strict=True))
    counted = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    say(f"{changed} of {len(judged)} sentences corrected" + f" ({counted})" * bool(counted))
    if kept:
        say(f"{len(kept)} could not be judged or corrected and stay as they are:")
        for message in kept:
            say(f"  {message}")
    return manifest.with_records(records)


def _contradicted_count(said: Facts, seen: Facts, mask: MaskArray) -> list[Contradiction]:
    if said.count is None or said.count == seen.count:
        return []
    speck = SPECK_SHARES[said.grammar]
    across = 2 * max(1, round(0.005 * max(mask.shape))) + 1
    bridged, cut = (
        change(mask.view(np.uint8), across, mode="constant").view(bool)  # row by row: quick on large images
        for change in (ndimage.maximum_filter, ndimage.minimum_filter)
    )
    counts = {len(parts_of(mask, share)) for share in (0.0, speck / 4, speck, 4 * speck)}
    counts |= {len(parts_of(changed, speck)) for changed in (bridged, cut)}
    if min(counts) <= said.count <= max(counts):
        return []
    return [Contradiction("count", str(said.count), str(seen.count))]


def _contradicted_sizes(said: Facts, seen: Facts, mask: MaskArray) -> list[Contradiction]:
    areas = [part.area for part in parts_of(mask, SPECK_SHARES[said.grammar])]
    limits = dict(zip(("small", "medium", "large"), SIZE_LIMITS[said.grammar], strict=True))
    upper = dict(zip(limits, [*SIZE_LIMITS[said.grammar][1:], 1.0], strict=True))
    wrong = [
        size
        for size in said.sizes
        if size in limits
        and not any(
            limits[size] / _SIZE_TOLERANCE <= area <= upper[size] * _SIZE_TOLERANCE for area in (*areas, sum(areas))
        )
    ]
    if not wrong:
        return []
    shares = ", ".join(f"{100 * area:.1f} %" for area in areas)
    return [Contradiction("size", ", ".join(said.sizes), f"{', '.join(seen.sizes)} ({shares} of the image)")]


def _contradicted_places(said: Facts, seen: Facts, mask: MaskArray) -> list[Contradiction]:
    kinds: set[Literal["side", "height"]] = set()
    centres = [part.centre(mask.shape) for part in parts_of(mask, SPECK_SHARES[said.grammar])]
    for place in said.places:
        row, column = divmod(PLACES.index(place), 3)
        down, across = _band(row), _band(column)
        if any(down[0] <= y <= down[1] and across[0] <= x <= across[1] for y, x in centres):
            continue
        rows, columns = _pixels(down, mask.shape[0]), _pixels(across, mask.shape[1])
        total = mask.sum()
        if mask[rows, columns].sum() >= _NOTHING * total:
            continue
        off_side = mask[:, columns].sum() < _NOTHING * total
        off_height = mask[rows].sum() < _NOTHING * total
        kinds |= {"side"} if off_side or not off_height else set()
        kinds |= {"height"} if off_height else set()
    words = ", ".join(said.places), ", ".join(seen.places)
    return [Contradiction(kind, *words) for kind in ("side", "height") if kind in kinds]


def _band(position: int) -> tuple[float, float]:
    """Return the limits of a row or column of the 3 × 3 grid, widened by the tolerance."""
    return position / 3 - _PLACE_TOLERANCE, (position + 1) / 3 + _PLACE_TOLERANCE


def _pixels(band: tuple[float, float], size: int) -> slice:
    return slice(max(0, round(band[0] * size)), max(0, round(band[1] * size)))


def _contradicted_lungs(said: Facts, seen: Facts, mask: MaskArray) -> list[Contradiction]:
    # What each lung must own and what it can claim: a part across the midline may belong to either.
    least = _owned_shares(mask)
    most = {"left": 1 - least["right"], "right": 1 - least["left"]}
    named = SIDES if said.bilateral and not said.sides else said.sides
    empty = [side for side in named if side not in seen.sides and most[side] < _NOTHING]
    unnamed = [side for side in SIDES if side not in named and least[side] > _PLENTY]
    one_sided = said.bilateral is False or (len(named) == 1 and not said.bilateral)
    both_full = said.bilateral is False and min(least.values()) > _PLENTY
    if empty or (one_sided and named and unnamed) or both_full:
        shares = ", ".join(f"{side} {100 * share:.0f} %" for side, share in _side_shares(mask).items())
        return [Contradiction("side", _lungs_said(said), f"{' and '.join(seen.sides)} ({shares})")]
    halves = half_profiles(mask)
    wrong = [side for side in said.sides if said.thirds(side) and _holds_nothing(halves[side], said.thirds(side))]
    if not wrong:
        return []
    words = (" and ".join(f"{' '.join(facts.thirds(side))} {side} lung" for side in wrong) for facts in (said, seen))
    return [Contradiction("height", *words)]


def _holds_nothing(profile: NDArray[np.intp], thirds: Sequence[str]) -> bool:
    """Return whether the reach of the named thirds of one lung holds next to nothing of its mask."""
    inside = np.zeros(len(profile), dtype=bool)
    for third in thirds:
        inside[_pixels(_THIRD_REACH[third], len(profile))] = True
    return bool(profile[inside].sum() < _NOTHING * profile.sum())


def _owned_shares(mask: MaskArray) -> dict[str, float]:
    """Return the share of the mask in parts that lie in one half of the image, all but a tenth."""
    owned = dict.fromkeys(SIDES, 0.0)
    middle = mask.shape[1] // 2
    for part in parts_of(mask, 0.0):
        on_left = float((part.columns < middle).mean())
        if max(on_left, 1 - on_left) >= _OWNED:
            owned["left" if on_left > 0.5 else "right"] += len(part.rows) / int(mask.sum())
    return owned


def _side_shares(mask: MaskArray) -> dict[str, float]:
    return {side: float(profile.sum() / mask.sum()) for side, profile in half_profiles(mask).items()}


def _lungs_said(said: Facts) -> str:
    extent = {True: "bilateral", False: "unilateral", None: ""}[said.bilateral]
    return ", ".join(part for part in (extent, " and ".join(said.sides)) if part)
