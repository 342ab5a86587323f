"""The sentences: their words, the facts they state, and the sentences that state facts.

Three grammars are known, all of which mean left and right *in the image*:

- polyps: "two small white round polyp, located in top left, bottom of the image";
- phantoms: "two small bright lesions, located in top left, bottom of the image";
- lungs: "Bilateral pulmonary infection, two infected areas, upper left lung and middle right lung."
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from tmca.errors import unknown_name

Grammar = Literal["polyp", "phantom", "lung"]

GRAMMARS: tuple[Grammar, ...] = ("polyp", "phantom", "lung")
"""The known grammars."""

LEVELS = ("p0", "p1", "p2", "p3", "p4", "p5", "p6")
"""Levels of detail of a written sentence, from none to all facts."""

PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
"""The nine places of polyps and phantoms, in reading order."""

COUNT_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
"""Count words by their value."""

SIZES = ("tiny", "small", "medium", "large")
"""Size classes, ascending."""

COLOURS = ("white", "yellow", "orange", "tan", "brown", "pink", "red", "black", "gray", "peach", "bright", "dark")
"""Colours of the published polyp sentences, and the two brightnesses of phantoms."""

SHAPES = (
    *("round", "oval", "triangular", "heart", "kidney", "thumb", "ear", "mouth", "bone", "flat", "donut", "nail"),
    *("toe", "semicircle", "rectangle", "irregular"),
)
"""Shapes of the published polyp sentences, and the one that this package adds."""

SIDES = ("left", "right")
"""The two lungs by their place in the image."""

THIRDS = ("upper", "middle", "lower")
"""The thirds of a lung; "all" names the three."""

PARAPHRASES = 4
"""Wordings of each sentence; number 0 is the published one."""

_SYNONYMS = {"circle": "round", "circular": "round", "ovoid": "oval", "grey": "gray", "higher": "upper", "zero": "no"}
_COUNTS = {word: value for value, word in enumerate(COUNT_WORDS)} | {"zero": 0}
_GLUE = "a an the is are it this in of at on and with which that there be can seen shows shown image located shape"
_POLYP_WORDS = frozenset(
    f"{_GLUE} polyp polyps lesion lesions projecting growth tissue tissues often bumpy flesh rectum lump lining colon "
    "resemble mushroom like stalks abnormal from membrane top bottom left right center centre middle upper lower side "
    "part corner".split()
) | {*COUNT_WORDS, *SIZES, *COLOURS, *SHAPES, *_SYNONYMS}
_LUNG_WORDS = frozenset(
    f"{_GLUE} bilateral unilateral both pulmonary infection infected area areas lung lungs all".split()
) | {*SIDES, *THIRDS, *COUNT_WORDS, "higher", "zero"}

_FACT_WORDS = frozenset({*COLOURS, *SHAPES, *THIRDS, "all", *(word for place in PLACES for word in place.split())})

_WORD = re.compile(r"[^\W_]+")
_LUNG = re.compile(r"\b(lungs?|pulmonary|chest|thorax|lobes?)\b", re.IGNORECASE)
_LESION = re.compile(r"\blesions?\b", re.IGNORECASE)
_NUMBER = rf"(?:\d+|{'|'.join(_COUNTS)})"
_COUNTED = re.compile(rf"(?<![\w.,:/-])(?:{_NUMBER})\b(?!\s?(?:mm|cm|%|x\b|[.,:/-]\d))", re.IGNORECASE)
_UNCLEAR_DENIAL = re.compile(r"\b(?:not|without|none|never|nor|neither|absent|free|clear|\w+n['’]t)\b", re.IGNORECASE)
"""Words that deny something, but not as the grammars do: what, is not told for sure."""
_COUNTED_AREAS = re.compile(rf"\b((?:{_NUMBER}\s+)+)infected\s+areas?\b", re.IGNORECASE)
_PLACE = r"(?:(?:top|bottom|upper|lower|middle|cent(?:er|re))(?:[\s-]+(?:left|right|middle|cent(?:er|re)))?|left|right)"
_LOCATED = re.compile(
    rf"\b(?:in|on|at)\s+(?:the\s+)?(?P<places>{_PLACE}(?:\s*(?:,\s*(?:and\s+)?|\band\s+)(?:the\s+)?{_PLACE})*)\b",
    re.IGNORECASE,
)
_BETWEEN_PLACES = re.compile(r"\s*(?:,\s*(?:and\s+)?|\band\s+)(?:the\s+)?", re.IGNORECASE)
_NOUN = re.compile(r"\b(?:polyps?|lesions?)\b|\bwhich\b|\blocated\b|,\s*(?:in|on|at)\b", re.IGNORECASE)
_SIZE_LIST = re.compile(rf"\b(?:{'|'.join(SIZES)})\b(?:\s*(?:,|\band\b)\s*(?:{'|'.join(SIZES)})\b)*", re.IGNORECASE)


@dataclass(frozen=True)
class Facts:
    """What a sentence states or a mask shows; ``None`` or empty where it does not.

    Attributes:
        grammar: In which grammar.
        present: Whether there is any target.
        count: Number of targets, of infected areas in lungs; 0 where there is none.
        sizes: Size classes of the targets, ascending, each once.
        colour: A word of :data:`COLOURS`.
        shape: A word of :data:`SHAPES`.
        places: Place of each target, in reading order; a place that holds several is repeated.
        bilateral: Whether both lungs are infected.
        sides: Infected lungs by their side of the image: left before right.
        left: Infected thirds of the lung on the image's left, from top to bottom.
        right: The same of the other lung.
    """

    grammar: Grammar
    present: bool | None = None
    count: int | None = None
    sizes: tuple[str, ...] = ()
    colour: str | None = None
    shape: str | None = None
    places: tuple[str, ...] = ()
    bilateral: bool | None = None
    sides: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    right: tuple[str, ...] = ()

    def thirds(self, side: str) -> tuple[str, ...]:
        """Return the infected thirds of one lung."""
        return self.left if side == "left" else self.right


def grammar_of(text: str) -> Grammar:
    """Return the grammar that a sentence is closest to: lungs by their words, phantoms by "lesion", else polyps."""
    if _LUNG.search(text):
        return "lung"
    return "phantom" if _LESION.search(text) else "polyp"


def unknown_words(text: str) -> list[str]:
    """Return the words that the sentence's grammar does not have, in lower case and order, each once.

    They are often typing errors ("midle", "lunge"), which a tokenizer breaks into meaningless pieces.
    """
    known = _LUNG_WORDS if grammar_of(text) == "lung" else _POLYP_WORDS
    words = (word.lower() for word in _WORD.findall(text))
    return list(dict.fromkeys(word for word in words if word not in known and not word.isdecimal()))


def fact_words(text: str) -> list[str]:
    """Return the words of a sentence that name a place, a colour or a shape, each once and in its usual form."""
    words = (_SYNONYMS.get(word.lower(), word.lower()) for word in _WORD.findall(text))
    return [word for word in dict.fromkeys(words) if word in _FACT_WORDS]


def place_lists(text: str) -> list[tuple[slice, tuple[str, ...]]]:
    """Return every list of places in a sentence ("in top left, bottom"): where it stands, and its places in its order.

    The places are named as in :data:`PLACES`.
    """
    found = []
    for match in _LOCATED.finditer(text):
        phrases = _BETWEEN_PLACES.split(match["places"].strip())
        found.append((slice(*match.span("places")), tuple(_place(_WORD.findall(phrase.lower())) for phrase in phrases)))
    return found


def parse(text: str) -> Facts:
    """Return the facts that a sentence states.

    Any wording is read as far as its words are known. A lung sentence whose sides and heights cannot be told for sure
    (a misspelled word among them, a height without a side) states neither.

    Args:
        text: A sentence; may be empty.
    """
    grammar = grammar_of(text)
    return _parse_lung(text) if grammar == "lung" else _parse_polyp(text, grammar)


def _parse_polyp(text: str, grammar: Grammar) -> Facts:
    if not _WORD.search(text) or _UNCLEAR_DENIAL.search(text):
        return Facts(grammar)
    places = sorted((place for _, places in place_lists(text) for place in places), key=PLACES.index)
    head = _LOCATED.sub(" ", text)
    head = head[: noun.start()] if (noun := _NOUN.search(head)) else head
    numbers = [match for match in _COUNTED.finditer(head) if not _is_label(head, match)]
    counts = [_number(match[0]) for match in numbers if _counts(match, head)]
    count = counts[0] if counts else None
    if count is None and any(_number(match[0]) == 0 for match in numbers):  # "no bleeding, small polyp": no what?
        return Facts(grammar)
    if count == 0:  # "no polyp on the left" says nothing about the rest of the image
        return Facts(grammar) if places else Facts(grammar, present=False, count=0)
    sizes = _SIZE_LIST.search(head)
    named = {word.lower() for word in _WORD.findall(sizes[0])} if sizes else set()
    words = [_SYNONYMS.get(word.lower(), word.lower()) for word in _WORD.findall(head)]
    named_noun = re.search(r"\b(?:polyps?|lesions?)\b", text, re.IGNORECASE) is not None
    return Facts(
        grammar,
        present=True if named_noun or count or places else None,
        count=count,
        sizes=tuple(size for size in SIZES if size in named),
        colour=next((word for word in words if word in COLOURS), None),
        shape=next((word for word in reversed(words) if word in SHAPES), None),
        places=tuple(places),
    )


def _place(words: list[str]) -> str:
    height = "top" if {"top", "upper"} & set(words) else "bottom" if {"bottom", "lower"} & set(words) else ""
    side = "left" if "left" in words else "right" if "right" in words else ""
    return f"{height} {side}".strip() or "center"


def _counts(number: re.Match[str], head: str) -> bool:
    """Return whether a number surely counts what stands at the end: "two spongy" does, "no visible" and "5-mm" not."""
    between = head[number.end() :]
    if number[0].isdecimal() or _number(number[0]) == 0:
        return not any(word.lower() not in _POLYP_WORDS for word in _WORD.findall(between) if not word.isdecimal())
    phrase, *further = re.split(r"[,.;:]", between, maxsplit=1)
    words = [word.lower() for word in _WORD.findall(phrase)]
    is_unclear = bool(further) or any(word in _COUNTS or word.isdecimal() for word in words)
    return not (is_unclear and any(word not in _POLYP_WORDS for word in words))


def _is_label(head: str, figure: re.Match[str]) -> bool:
    """Return whether a figure numbers what stands before it: "frame 12", "grade 3"."""
    before = _WORD.findall(head[: figure.start()])
    return figure[0].isdecimal() and bool(before) and before[-1].lower() not in _POLYP_WORDS


def _parse_lung(text: str) -> Facts:
    words = [_SYNONYMS.get(word.lower(), word.lower()) for word in _WORD.findall(text)]
    if _UNCLEAR_DENIAL.search(text):
        return Facts("lung")
    if re.search(r"\bno\s+(?:pulmonary|infection|infected)\b", text, re.IGNORECASE):
        if any(side in words for side in SIDES):  # "no infected area in the left lung" leaves the right one open
            return Facts("lung")
        return Facts("lung", present=False, count=0)
    counted = _COUNTED_AREAS.search(text)
    numbers = [_number(word) for word in counted[1].split()] if counted else []
    count = numbers[0] if len(numbers) == 1 else None  # "two one infected area" is no count
    if count == 0:
        return Facts("lung", present=False, count=0)
    bilateral = True if "bilateral" in words or "both" in words else False if "unilateral" in words else None
    infected = count is not None or any(word in words for word in ("infection", "infected"))
    facts = Facts("lung", present=True if infected else None, count=count, bilateral=bilateral)
    regions = {} if unknown_words(text) else _regions(words)
    if bilateral is False and set(map(bool, regions.values())) == {True, False}:
        # MosMedData+ writes "Unilateral …, left lung and middle right lung" for a right lung alone.
        regions = {side: thirds for side, thirds in regions.items() if thirds}
    return replace(
        facts,
        sides=tuple(side for side in SIDES if side in regions),
        left=tuple(third for third in THIRDS if third in regions.get("left", ())),
        right=tuple(third for third in THIRDS if third in regions.get("right", ())),
    )


def _number(word: str) -> int:
    return int(word) if word.isdecimal() else _COUNTS[word.lower()]


def _regions(words: list[str]) -> dict[str, set[str]]:
    """Return the thirds named for each named lung; nothing where a height or a side stands alone or twice."""
    regions: dict[str, set[str]] = {}
    heights: list[str] = []
    before = ""
    for word in words:
        if word in THIRDS or word == "all":
            heights.append(word)
        elif word in SIDES:
            if before in SIDES:
                return {}
            regions.setdefault(word, set()).update(THIRDS if "all" in heights else heights)
            heights = []
        elif heights and word not in ("and", "of", "the"):
            return {}
        before = word
    return {} if heights else regions


def stated(facts: Facts, level: str) -> Facts:
    """Return the facts that a sentence of a level states; see :func:`write_sentence`.

    Raises:
        ConfigError: The level does not exist.
    """
    if level not in LEVELS:
        raise unknown_name("level", level, LEVELS)
    detail = LEVELS.index(level)
    if detail == 0:
        return Facts(facts.grammar)
    if not facts.present:
        return Facts(facts.grammar, present=False, count=0)
    if facts.grammar == "lung":
        return Facts(
            "lung",
            present=True,
            bilateral=facts.bilateral if detail >= 2 else None,
            count=facts.count if detail in (3, 4, 6) else None,
            sides=facts.sides if detail >= 4 else (),
            left=facts.left if detail >= 5 else (),
            right=facts.right if detail >= 5 else (),
        )
    return Facts(
        facts.grammar,
        present=True,
        shape=facts.shape if detail >= 2 else None,
        colour=facts.colour if detail >= 3 else None,
        sizes=facts.sizes if detail >= 4 else (),
        count=facts.count if detail >= 5 else None,
        places=facts.places if detail >= 6 else (),
    )


def write_sentence(facts: Facts, level: str = "p6", paraphrase: int = 0) -> str:
    """Return the sentence that states facts; :func:`parse` gives back :func:`stated` of them.

    Polyps and phantoms: p0 nothing, p1 the noun, p2 adds shape, p3 colour, p4 sizes, p5 count, p6 places. Lungs: p1
    the infection, p2 whether of one or both lungs, p3 adds the number of areas, p4 the lungs, p5 the lungs and their
    thirds without the number, p6 everything. What the facts leave open is left out.

    Args:
        facts: What to say.
        level: One of :data:`LEVELS`.
        paraphrase: Which wording, taken modulo :data:`PARAPHRASES`; 0 is the published one.

    Raises:
        ConfigError: The level does not exist.
    """
    facts = stated(facts, level)
    if facts.present is None:
        return ""
    wording = paraphrase % PARAPHRASES
    return _write_lung(facts, wording) if facts.grammar == "lung" else _write_polyp(facts, wording)


def _write_polyp(facts: Facts, wording: int) -> str:
    noun = "lesion" if facts.grammar == "phantom" else "polyp"
    several = (facts.count or 0) > 1
    if facts.grammar == "phantom" and several:  # the published polyp sentences have no plural
        noun = "lesions"
    number = "" if facts.count is None else _count_word(facts.count)
    words = (number, ", ".join(facts.sizes), facts.colour or "", facts.shape or "", noun)
    what = " ".join(word for word in words if word)
    if facts.present is False:
        wordings = ("{what} in the image", "{what}", "the image shows {what}", "there is {what} in the image")
    elif not facts.places:
        wordings = (
            "{what}",
            "the image shows {what}",
            "{there} {what} in the image",
            "{what} can be seen in the image",
        )
    else:
        wordings = (
            "{what}, located in {listed} of the image",
            "{what} in the {joined} of the image",
            "the image shows {what} in the {joined}",
            "in the {joined} of the image {there} {what}",
        )
    there = "there are" if several else "there is"
    return wordings[wording].format(
        what=what, there=there, listed=", ".join(facts.places), joined=" and the ".join(facts.places)
    )


def _write_lung(facts: Facts, wording: int) -> str:
    if facts.present is False:
        wordings = (
            "No pulmonary infection, zero infected areas.",
            "No infection of the lungs.",
            "The image shows no pulmonary infection.",
            "There is no infected area in the lungs.",
        )
        return wordings[wording]
    extent = {True: "bilateral ", False: "unilateral ", None: ""}[facts.bilateral]
    areas = ""
    if facts.count is not None:
        areas = f"{_count_word(facts.count)} infected {'area' if facts.count == 1 else 'areas'}"
    lungs = [_lung(facts, side) for side in facts.sides]
    within = " and ".join(f"the {lung}" for lung in lungs).replace("the all", "all of the")
    if wording == 0:
        parts = [f"{extent}pulmonary infection", areas, " and ".join(lungs)]
        text = ", ".join(part for part in parts if part)
    elif wording == 1:
        text = f"{extent}infection of the lungs"
        text += f" with {areas}" * bool(areas) + f": {' and '.join(lungs)}" * bool(lungs)
    elif wording == 2:
        text = f"the image shows {extent}pulmonary infection"
        text += f" with {areas}" * bool(areas) + f" in {within}" * bool(lungs)
    else:
        text = f"{areas}, {extent}pulmonary infection" if areas else f"there is {extent}pulmonary infection"
        text += f" in {within}" * bool(lungs)
    return f"{text[0].upper()}{text[1:]}."


def _lung(facts: Facts, side: str) -> str:
    thirds = facts.thirds(side)
    heights = ("all",) if thirds == THIRDS else thirds
    return " ".join((*heights, side, "lung"))


def _count_word(count: int) -> str:
    return COUNT_WORDS[count] if count < len(COUNT_WORDS) else str(count)
