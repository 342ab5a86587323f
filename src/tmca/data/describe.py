"""The vocabulary of the sentences: their mirror images and their contradictions.

Two grammars are known, both of which mean left and right *in the image*:

- polyps: "two small white round polyp, located in top left, bottom of the image";
- lungs: "Bilateral pulmonary infection, two infected areas, upper left lung and middle right lung."
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
"""The nine places of the polyp grammar, in reading order."""

COUNT_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
"""Count words by their value."""

_HORIZONTAL = {"left": "right", "right": "left"}
_VERTICAL = {"top": "bottom", "bottom": "top", "upper": "lower", "lower": "upper"}
_OPPOSITES = {
    **_HORIZONTAL,
    **_VERTICAL,
    "small": "large",
    "large": "small",
    "bright": "dark",
    "dark": "bright",
    "one": "two",
    "two": "one",
    "bilateral": "unilateral",
    "unilateral": "bilateral",
}

_LUNG = re.compile(r"\b(lungs?|pulmonary|chest|thorax|lobes?)\b", re.IGNORECASE)
_LUNG_WORDS = frozenset(
    (
        *("bilateral", "unilateral", "pulmonary", "infection", "infected", "area", "areas", "and", "lung", "lungs"),
        *("all", "upper", "higher", "middle", "lower", "left", "right", "zero", *COUNT_WORDS),
    )
)
_LOCATED = re.compile(r"(?P<before>.*located in )(?P<places>.+?)(?P<after> of the image.*)", re.IGNORECASE | re.DOTALL)
_PRESENT_LESION = "one large bright round lesion, located in center of the image"
_PRESENT_INFECTION = "Unilateral pulmonary infection, one infected area, lower left lung."


def mirror(text: str, axis: Literal["horizontal", "vertical"]) -> str | None:
    """Return the sentence that is true for the mirrored image.

    Case and punctuation stay; mirroring twice gives the sentence back.

    Args:
        text: A sentence that is true for the image.
        axis: ``horizontal`` exchanges the image's left and right, ``vertical`` its top and bottom.

    Returns:
        The sentence, unchanged where it names no side; ``None`` where it cannot be stated: a chest is never upside
        down, and a lung sentence with an unknown (mostly misspelled) word may hide a side.
    """
    if _LUNG.search(text):
        words = re.findall(r"\w+", text.lower())
        if axis == "vertical" or not _LUNG_WORDS.issuperset(words):
            return None
    return _replaced(text, _HORIZONTAL if axis == "horizontal" else _VERTICAL)


def contradict(text: str) -> str | None:
    """Return a sentence in the same grammar that names something which is not there.

    The rules, so that the new sentence never means the same places:

    - "no lesion …" and "no pulmonary infection …" become a fixed sentence with one target.
    - A list of places: each becomes the diagonally opposite one, or where the list holds that too, the opposite along
      one axis, or the next free place; the center becomes top left. The other words become their opposites; where two
      targets become one, the first place is kept.
    - A lung sentence that names one side: side and height are exchanged. Count and "unilateral" stay: a sentence on
      both lungs would name the true one as well.
    - A lung sentence that names both sides: "Unilateral pulmonary infection, one infected area, …" with the first
      region only, its height exchanged.
    - Anything else: words for place, side, size, brightness and count become their opposites.

    Args:
        text: A sentence that is true for the image.

    Returns:
        The contradiction, or ``None`` where the sentence says nothing that has an opposite.
    """
    if re.match(r"\s*no\b", text, re.IGNORECASE):
        return _PRESENT_INFECTION if _LUNG.search(text) else _PRESENT_LESION
    if _LUNG.search(text):
        return _contradict_lung(text)
    located = _LOCATED.fullmatch(text)
    places = _places(located["places"]) if located else ()
    if located and places:
        before = _with_plural(located["before"], _replaced(located["before"], _OPPOSITES) or located["before"])
        opposite = _opposite_places(places)
        if re.match(r"\s*two\b", text, re.IGNORECASE):
            opposite = opposite[:1]
        return f"{before}{', '.join(opposite)}{located['after']}"
    changed = _replaced(text, _OPPOSITES)
    return None if changed is None or changed == text else _with_plural(text, changed)


def _contradict_lung(text: str) -> str | None:
    regions = re.findall(r"((?:\b(?:all|upper|middle|lower)\b\W*)*)\b(left|right)\b", text.lower())
    if len({side for _, side in regions}) < 2:
        changed = _replaced(text, {**_HORIZONTAL, **_VERTICAL} if regions else _OPPOSITES)
        return None if changed == text else changed
    heights, side = regions[0]
    region = _replaced(" ".join([*heights.split(), side]), _VERTICAL)
    return f"Unilateral pulmonary infection, one infected area, {region} lung."


def _places(listed: str) -> tuple[str, ...]:
    places = tuple(place.strip().lower() for place in listed.split(","))
    return places if set(places) <= set(PLACES) else ()


def _opposite_places(places: tuple[str, ...]) -> list[str]:
    chosen: list[str] = []
    for place in places:
        if place == "center":
            candidates = ["top left"]
        else:
            axes = ({**_HORIZONTAL, **_VERTICAL}, _HORIZONTAL, _VERTICAL)
            candidates = [_replaced(place, words) or place for words in axes]
        free = [name for name in (*candidates, *PLACES) if name not in places and name not in chosen]
        chosen += free[:1]
    return chosen or [_replaced(place, _OPPOSITES) or place for place in places[:1]]


def _with_plural(old: str, new: str) -> str:
    """Make "lesion" agree with a count that was changed; the polyp grammar has no plural and keeps its word."""
    if re.match(r"\s*one\b", old, re.IGNORECASE):
        return re.sub(r"\blesion\b", "lesions", new)
    if re.match(r"\s*two\b", old, re.IGNORECASE):
        return re.sub(r"\blesions\b", "lesion", new)
    return new


def _replaced(text: str, words: Mapping[str, str]) -> str | None:
    """Replace whole words, all at once, in their case; ``None`` where a word's case has no pattern (e.g. "lEFT")."""
    pattern = re.compile(r"\b(" + "|".join(words) + r")\b", re.IGNORECASE)
    if any(word not in (word.lower(), word.upper(), word.capitalize()) for word in pattern.findall(text)):
        return None

    def opposite(match: re.Match[str]) -> str:
        word = match[0]
        other = words[word.lower()]
        return other if word.islower() else other.upper() if word.isupper() else other.capitalize()

    return pattern.sub(opposite, text)
