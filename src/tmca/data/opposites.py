"""A sentence changed: its mirror image, its denial, its contradiction."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from tmca.data.grammar import PLACES, Facts, grammar_of, parse, place_lists, unknown_words, write_sentence

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

_CHEST = re.compile(
    r"\b(consolidations?|opacit(y|ies)|infiltrat\w+|pneumoni\w+|effusions?|zones?|apical|basal|hil(um|ar))\b",
    re.IGNORECASE,
)
"""Words of chest reports that need not stand beside "lung", "pulmonary", "chest"."""
_HIDDEN_SIDES = {
    "horizontal": re.compile(
        r"\b((left|right)[^\W\d_]+|l|r|lt|rt|lft|rgt|rght|[lr]\s?[uml][lzq]|[lr]hs|lingula\w*|o\W?clock|\d{1,2}:00"
        r"|link\w{0,2}|rechts?|rechte\w|gauche\w?|droite?s?|izquierd\w+|derech\w+|sinistr\w+|destr[aoei])\b",
        re.IGNORECASE,
    ),
    "vertical": re.compile(
        r"\b((top|bottom|upper|lower)[^\W\d_]+|up|down|above|below|beneath|under(neath)?|high(er|est)?|low(est)?"
        r"|superior\w*|inferior\w*|[lr]\s?[uml][lzq]|o\W?clock|\d{1,2}:00|oben|unten|ober\w+|unt\w{3,}|haut|bas"
        r"|arriba|abajo|sopra|sotto)\b",
        re.IGNORECASE,
    ),
}
"""Words that name a side in another way than those that :func:`mirror` exchanges."""
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
        down, a lung sentence with an unknown (mostly misspelled) word may hide a side, and so does a word like
        "leftmost", "9 o'clock" or "links".
    """
    if grammar_of(text) == "lung" and (axis == "vertical" or unknown_words(text)):
        return None
    if _HIDDEN_SIDES[axis].search(text) or (axis == "vertical" and _CHEST.search(text)):
        return None
    return _replaced(text, _HORIZONTAL if axis == "horizontal" else _VERTICAL)


def deny(text: str) -> str:
    """Return the sentence of the same grammar that says there is nothing."""
    return write_sentence(Facts(grammar_of(text), present=False, count=0))


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
      region only, its height exchanged. "All" and "middle" have no opposite: only side and count are false then.
    - Anything else: words for place, side, size, brightness and count become their opposites.

    Args:
        text: A sentence that is true for the image.

    Returns:
        The contradiction, or ``None`` where the sentence says nothing that has an opposite.
    """
    if re.match(r"\s*no\b", text, re.IGNORECASE) or parse(text).present is False:
        return _PRESENT_INFECTION if grammar_of(text) == "lung" else _PRESENT_LESION
    if grammar_of(text) == "lung":
        return _contradict_lung(text)
    if located := place_lists(text):
        span, places = located[0]
        opposite = _opposite_places(places)
        if parse(text).count == 2:
            opposite = opposite[:1]
        separator = " and the " if re.search(r"\band the\b", text[span], re.IGNORECASE) else ", "
        changed = [_replaced(part, _OPPOSITES) or part for part in (text[: span.start], text[span.stop :])]
        return _with_count(text, separator.join(opposite).join(changed))
    exchanged = _replaced(text, _OPPOSITES)
    # "small, large polyp" becomes "large, small polyp", which says the same.
    if exchanged is None or sorted(re.findall(r"\w+", exchanged)) == sorted(re.findall(r"\w+", text)):
        return None
    return _with_count(text, exchanged)


def _contradict_lung(text: str) -> str | None:
    regions = re.findall(r"((?:\b(?:all|upper|middle|lower)\b\W*)*)\b(left|right)\b", text.lower())
    if len({side for _, side in regions}) < 2:
        changed = _replaced(text, {**_HORIZONTAL, **_VERTICAL} if regions else _OPPOSITES)
        return None if changed == text else changed
    heights, side = regions[0]
    region = _replaced(" ".join([*heights.split(), side]), _VERTICAL)
    return f"Unilateral pulmonary infection, one infected area, {region} lung."


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


def _with_count(old: str, new: str) -> str:
    """Make verb and "lesion" agree with a count that was changed; polyp sentences have no plural and keep the noun."""
    if re.search(r"\bone\b", old, re.IGNORECASE):
        return re.sub(r"\bthere is\b", "there are", re.sub(r"\blesion\b", "lesions", new))
    if re.search(r"\btwo\b", old, re.IGNORECASE):
        return re.sub(r"\bthere are\b", "there is", re.sub(r"\blesions\b", "lesion", new))
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
