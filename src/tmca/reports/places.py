"""Places in a report: the words that say where, and which of a sentence's nouns they belong to.

Left and right are the report's words here; :mod:`tmca.reports.prompt` turns them into sides of the image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tmca.data.grammar import SIDES, THIRDS, Grammar
from tmca.reports.sections import Sentence

Span = tuple[int, int]
"""First and one past the last character."""

PHRASE_ENDS = re.compile(
    r"[:;()]|\b(?:in|at|on|of|with|within|is|are|was|were|has|have|had|there|shows?|showed|demonstrates?|reveals?|which|that"
    r"|to|over|from|without|and|or|no|not|for|by|seen|noted|found|near|next|containing|contains?|from|than|but|while|whereas|although|then)\b|clock\b",
    re.IGNORECASE,
)
"""What parts a noun from the words before it."""

_HEIGHTS = {
    **dict.fromkeys(("upper", "apex", "apices", "apical", "apically"), "upper"),
    **dict.fromkeys(("mid", "middle"), "middle"),
    **dict.fromkeys(("lower", "base", "bases", "basal", "basally", "basilar"), "lower"),
}
_INITIALS = {"u": "upper", "m": "middle", "l": "lower"}
_ZONES = r"(?:lungs?|zones?|thirds?|fields?|parts?|portions?|areas?|regions?)"
_HEIGHT_LIST = r"(?:upper|mid(?:dle)?|lower)"
_AND_MORE = rf"(?:[\s-]*(?:,|/|&|-|and|or|to|through)[\s-]*(?:and\s+)?(?:(?:left|right)\s+)?{_HEIGHT_LIST})*"
_ATOM = re.compile(
    r"(?P<abbreviation>\b[RL][UML]L\b)"
    r"|(?P<initials>\b[RL]\s?[UML]Z\b)"
    r"|(?P<initial>(?-i:\b[RL])\b(?=\s+(?:lungs?|upper|mid(?:dle)?|lower|bases?|basal|apex|apical)\b))"
    r"|(?P<bi>\bbi[\s-]?(?:basal|basilar|basally|apical)(?:ly)?\b)"
    r"|(?P<lingula>\blingular?\b)"
    r"|(?P<segment>\b(?:apical|basal|anterior|posterior|superior|medial|lateral)(?:\s+basal)?\s+segments?\b)"
    r"|(?P<whole>\b(?:throughout|entire|whole|all\s+(?:zones|thirds|parts)\s+of)(?=\s+(?:of\s+)?(?:the\s+)?(?:both|left|right|lungs?)\b))"
    rf"|(?P<lobe>\b{_HEIGHT_LIST}(?={_AND_MORE}[\s-]+lobes?\b))"
    rf"|(?P<zone>\b{_HEIGHT_LIST}(?={_AND_MORE}[\s-]*(?:(?:left|right)\s+)?{_ZONES}\b))"
    r"|(?P<edge>\b(?:apex|apices|apical(?:ly)?|bases?|basal(?:ly)?|basilar)\b(?!\s+of\s+(?:the\s+)?(?:heart|skull|neck)))"
    r"|(?P<side>\b(?:left|right|lt|rt)(?:[\s-]sided)?\b|\((?:[lr]|lt|rt)\))"
    r"|(?P<both>\bbilateral(?:ly)?\b|\bb/l\b|\b(?:both|either)(?=\s+(?:\w+\s+){0,3}?(?:lungs?|bases|apices|zones|sides|lobes|hemithora\w+|fields))\b)",
    re.IGNORECASE,
)
_LINK = re.compile(
    rf"[\s,/&-]*(?:(?:and|or|of|the|in|on|at|to|both|through|lobes?|side|sides|hemithorax|hemithoraces|lung|aspect|{_ZONES})[\s,/&-]*)*",
    re.IGNORECASE,
)
_SHOWS = re.compile(
    r"\s*(?:lungs?|lobes?|zones?|fields?|side)?\s*(?:shows?|showed|demonstrates?|demonstrated|reveals?|contains?"
    r"|(?:has|have|had)(?!\s+(?:\w+ly\s+)?(?:been|not|\w+ed)\b)|exhibits?"
    r"|(?:is|are)\s+(?:free|clear)\s+(?:of|from)"
    r"|there\s+(?:is|are|was|were))\b|\s*(?:lung|lobe|zone|side)?\s*:",
    re.IGNORECASE,
)
_TURNS = re.compile(r"[,;]|\b(?:but|while|whereas|although)\b", re.IGNORECASE)
_OF_A_SIDE = re.compile(rf"\s+(?:{_ZONES}\s+|lobes?\s+)?of\s+(?:the\s+)?(?:left|right)\b", re.IGNORECASE)
_PLACE_NOUN = re.compile(rf"[\s-]*(?:{_ZONES}|lobes?|hemithorax|sided?)\b", re.IGNORECASE)
_LABEL_END = re.compile(r"[\s\w-]{0,20}:")
_WITHIN = re.compile(
    r"\b(?:in|at|on|of|within|over(?:lying)?|involving|throughout|along|into|across|affecting|near)\s+(?:the\s+|an?\s+)?$",
    re.IGNORECASE,
)
_WORDS = re.compile(rf"(?:[ \t]+(?!{PHRASE_ENDS.pattern})[\w-]+)+", re.IGNORECASE)
_NO_NOUN = re.compile(
    r"(?:ly|greater|more|worse|less|only|again|too|also|still|now|today|posterior|anterior|medial|lateral|present|visible"
    r"|unchanged|stable|larger|smaller|new|suspicious|compatible|consistent|likely|region|area|location|space|distribution"
    r"|aspect|chest|side)$",
    re.IGNORECASE,
)
_EXCEPTED = re.compile(
    r"\b(?:not|except(?:\s+for)?|excluding|never|nor|sparing|previously|formerly|no\s+longer|rather\s+than|instead\s+of"
    r"|none|nothing|absent|(?:no|without)\s+(?:\w+\s+)?(?:involvement|extension|changes?|abnormalit(?:y|ies)|disease))"
    r"\s+(?:\w+ly\s+)?(?:(?:in|on|at|of|to|into|involving|within)\s+)?(?:(?:the|its)\s+)?$",
    re.IGNORECASE,
)
_IS = re.compile(
    rf"\s*(?:{_ZONES}|lobes?|side)?\s*(?:is|are|was|were|remains?|appears?)\s+(?:\w+ly\s+|otherwise\s+|now\s+)*",
    re.IGNORECASE,
)
_FREE = re.compile(r"(?:clear|unremarkable|normal|spared)\b", re.IGNORECASE)
_IMAGE = r"(?:image|picture|frame|photograph|photo|view|field(?:\s+of\s+view)?|screen|film|radiograph)"
_OF_IMAGE = re.compile(
    rf"\s*(?:side\s+|half\s+|part\s+|corner\s+|quadrant\s+|third\s+)?of\s+(?:the\s+|this\s+)?{_IMAGE}\b", re.IGNORECASE
)
_PLACE_WORDS = (
    r"(?:left|right)\s+(?:upper|lower|top|bottom)|(?:top|bottom|upper|lower|middle|cent(?:er|re|ral)|left|right)"
    r"(?:(?:\s+|-)(?:left|right|middle|cent(?:er|re)))?"
)
_PLACE = re.compile(rf"(?<![\w-])(?P<place>{_PLACE_WORDS})(?![\w-])", re.IGNORECASE)
_CLOCK = re.compile(
    r"\b(?:at|on)\s+(?:the\s+)?(?P<hour>\d{1,2})(?:\s*:\s*00)?\s*o[’'`]?\s?clock\b(?!\s*(?:to|until|[-–])\s)(?!\s+(?:in\s+the\s+(?:morning|afternoon|evening)|a\.?m|p\.?m))",
    re.IGNORECASE,
)
_BOWEL = re.compile(r"bowel|intestine", re.IGNORECASE)
_CLOCK_PLACES = {
    12: "top",
    1: "top right",
    2: "top right",
    3: "right",
    4: "bottom right",
    5: "bottom right",
    6: "bottom",
    7: "bottom left",
    8: "bottom left",
    9: "left",
    10: "top left",
    11: "top left",
}


@dataclass(frozen=True)
class Located:
    """Where a sentence puts a finding.

    Attributes:
        span: Its words in the report.
        sides: Left, right or both, as the report says them.
        thirds: Of the lung: upper, middle, lower.
        lobe: A lobe is named, which is no third of the image.
        is_excepted: The finding is not there: "not in the left lung".
        of_image: The sides are those of the image, in the report's own words.
        place: One of the nine places of the image.
    """

    span: Span
    sides: tuple[str, ...] = ()
    thirds: tuple[str, ...] = ()
    lobe: bool = False
    is_excepted: bool = False
    of_image: bool = False
    place: str | None = None


@dataclass(frozen=True)
class Noun:
    """A noun that a place may belong to: the target, or another that the rules know."""

    start: int
    end: int
    is_target: bool


def covers_all(located: Sequence[Located]) -> bool:
    """Return whether a denial holds for both lungs or the whole image: it names no place, or both sides alone."""
    sides = {side for item in located for side in item.sides if not item.thirds and not item.lobe}
    return not located or sides == set(SIDES)


def lung_places(sentence: Sentence, heads: list[Noun], taken: list[Span]) -> list[tuple[Located, list[Noun]]]:
    """Return each group of side and height words with the findings that it belongs to."""
    text, offset = sentence.text, sentence.start
    result = []
    for item, (start, end) in sides_and_heights(text, offset):
        if any(first <= start and end <= last for first, last in taken):
            continue
        owners = [] if _qualifies_unknown(text, start, end, heads) else _owners(text, start, end, heads)
        result.append((item, owners))
    placed = [owners[0] for _, owners in result if len(owners) == 1]
    # "Right basal opacity and atelectasis at the left base": what has a place of its own shares no other.
    shared = [(item, [head for head in owners if head == owners[0] or head not in placed]) for item, owners in result]
    return [(item, [head for head in owners if head.is_target]) for item, owners in shared]


def _qualifies_unknown(text: str, start: int, end: int, heads: list[Noun]) -> bool:
    """Return whether a place stands before a noun that the rules do not know: "and left pleural plaque".

    Behind "in", "of" and the like it says where something is, whatever noun follows: "in the left retrocardiac space".
    """
    if not any(head.is_target and head.end <= start for head in heads) or _WITHIN.search(text, 0, start):
        return False
    noun = _PLACE_NOUN.match(text, end)
    words = _WORDS.match(text, noun.end() if noun else end)
    following = min((head.start for head in heads if head.start >= end), default=len(text))
    return words is not None and words.end() <= following and _NO_NOUN.search(words[0]) is None


def share_sides(located: tuple[Located, ...]) -> tuple[Located, ...]:
    """Give heights without a side the sides of the same finding: "bilateral …, lower zones".

    Where one of its sides has a height of its own, which side the others belong to cannot be told.
    """
    if any(item.sides and (item.thirds or item.lobe) for item in located):
        return located
    bare = [item for item in located if item.sides]
    sides = tuple(side for side in SIDES if any(side in item.sides for item in bare))
    of_image = any(item.of_image for item in bare)
    return tuple(
        replace(item, sides=sides, of_image=of_image) if item.thirds and not item.sides else item for item in located
    )


def sides_and_heights(text: str, offset: int) -> Iterator[tuple[Located, Span]]:
    """Yield the sides and heights of a sentence, grouped: "right mid and lower zones" is one."""
    atoms = list(_ATOM.finditer(text))
    groups: list[list[re.Match[str]]] = []
    for atom in atoms:
        if groups and _LINK.fullmatch(text, groups[-1][-1].end(), atom.start()) and _belongs(groups[-1], atom, text):
            groups[-1].append(atom)
        else:
            groups.append([atom])
    for group in groups:
        sides, thirds, lobe = _meaning(group)
        start, end = group[0].start(), group[-1].end()
        if not any(_is_sided(atom) for atom in group) and _LABEL_END.match(text, end):
            continue  # "Lung bases:" says where is looked, not where something is
        if sides or thirds or lobe:
            of_image = _OF_IMAGE.match(text, end)
            excepted = _EXCEPTED.search(text, 0, start)
            noun = _PLACE_NOUN.match(text, end)
            end = noun.end() if noun else end
            located = Located(
                (start + offset, end + offset),
                sides,
                thirds,
                lobe=lobe,
                is_excepted=excepted is not None,
                of_image=of_image is not None,
            )
            yield located, (start, end)


def _belongs(group: list[re.Match[str]], atom: re.Match[str], text: str) -> bool:
    """Return whether a word goes on with the group before it, or begins another place."""
    has_side = any(_is_sided(item) for item in group)
    has_height = any(
        not _is_sided(item) or item.lastgroup in ("abbreviation", "initials", "bi", "lingula") for item in group
    )
    if _is_sided(atom):
        if not has_side:
            return True  # "base of the right lung"
        between = text[group[-1].end() : atom.start()]
        # "left and right bases" shares the height; "left lung and right base" does not.
        return (
            not has_height and atom.lastgroup == "side" and re.fullmatch(r"\s*(?:and|or|&|/)\s*", between) is not None
        )
    if has_side and has_height and _OF_A_SIDE.match(text, atom.end()):
        return False  # "left base and apex of the right lung"
    if _is_sided(group[-1]) and not text[group[-1].end() : atom.start()].strip():
        return True  # "segment of the right lower lobe"
    is_postfixed = has_side and has_height and not _is_sided(group[0])
    return not is_postfixed


def _is_sided(atom: re.Match[str]) -> bool:
    return atom.lastgroup in ("abbreviation", "initials", "initial", "bi", "lingula", "side", "both")


def _meaning(group: list[re.Match[str]]) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    sides: set[str] = set()
    thirds: set[str] = set()
    lobes: set[str] = set()
    for atom in group:
        word = atom[0].lower()
        kind = atom.lastgroup
        if kind in ("abbreviation", "initials", "initial"):
            sides.add("right" if word[0] == "r" else "left")
            lobes |= {word} if kind == "abbreviation" else set()
            thirds |= {_INITIALS[word[-2]]} if kind == "initials" else set()
        elif kind == "bi":
            sides |= set(SIDES)
            thirds.add("upper" if "apical" in word else "lower")
        elif kind == "lingula":
            sides.add("left")
            lobes.add(word)
        elif kind == "side":
            sides.add("right" if word.lstrip("(")[0] == "r" else "left")
        elif kind == "both":
            sides |= set(SIDES)
        elif kind == "whole":
            thirds |= set(THIRDS)
        elif kind in ("lobe", "segment"):
            lobes.add(word)
        else:
            thirds.add(_HEIGHTS[word])
            sides |= set(SIDES) if word in ("bases", "apices") and not any(_is_sided(item) for item in group) else set()
    if lobes and not sides and lobes <= {"mid", "middle"}:
        sides.add("right")  # only the right lung has a middle lobe
    ordered = tuple(side for side in SIDES if side in sides)
    return ordered, tuple(third for third in THIRDS if third in thirds), bool(lobes)


def _owners(text: str, start: int, end: int, heads: list[Noun], *, shared: bool = True) -> list[Noun]:
    """Return the nouns that a place belongs to, the nearest first.

    The one that it stands before as an adjective ("right effusion"); else, behind a verb, the next ("the right lung
    shows …"); else the ones before it, which are joined by "and" where ``shared``; else the next.
    """
    following = [head for head in heads if head.start >= end]
    preceding = [head for head in heads if head.end <= start]
    if following:
        between = text[end : following[0].start]
        if "," not in between and PHRASE_ENDS.search(between) is None:
            return following[:1]
        if (_SHOWS.match(between) and not _TURNS.search(between)) or _IS.fullmatch(between):
            return following[:1]
        if "," not in between and _FREE.match(text, following[0].start):
            return []
    if preceding:
        owners = [preceding[-1]]
        for head in reversed(preceding[:-1]):
            joint = text[head.end : owners[-1].start]
            if not shared or not re.fullmatch(r"\s*(?:/|\b(?:and|or)\b)\s*(?:[\w-]+\s+){0,2}", joint):
                break
            owners.append(head)
        return owners
    return following[:1]


def image_places(sentence: Sentence, heads: list[Noun], grammar: Grammar) -> list[tuple[Located, list[Noun]]]:
    """Return the places of the image: by words that name the image, by "top" or "bottom", or by the clock."""
    text, offset = sentence.text, sentence.start
    heads = [head for head in heads if not _BOWEL.match(text, head.start)]  # that is where a polyp lies
    result: list[tuple[Located, list[Noun]]] = []
    matches = list(_PLACE.finditer(text))
    for number, match in enumerate(matches):
        joined = _joined_end(text, matches[number:])
        words = match["place"].lower()
        lead = re.search(r"(?:\b(?:in|on|at|occup\w+)\s+(?:the\s+)?|,\s*)$", text[: match.start()], re.IGNORECASE)
        follows = number > 0 and re.fullmatch(
            r"(?:\s+of\s+the\s+\w+)?\s*(?:,|and|,\s*and)\s+(?:one\s+)?(?:in\s+|at\s+)?(?:the\s+)?",
            text[matches[number - 1].end() : match.start()],
            re.IGNORECASE,
        )
        anchored = _OF_IMAGE.match(text, joined) is not None
        named = re.match(r"(?:top|bottom)[\s-]+(?:left|right)$", words) is not None or (
            grammar == "phantom" and words in ("top", "bottom")
        )
        if (lead or follows) and (anchored or named):
            place = _place_name(words)
            span = (match.start() + offset, match.end() + offset)
            owners = _owners(text, match.start(), joined, heads, shared=False)
            result.append((Located(span, of_image=True, place=place), owners))
    for match in _CLOCK.finditer(text):
        hour = int(match["hour"])
        if hour in _CLOCK_PLACES:
            span = (match.start() + offset, match.end() + offset)
            owners = _owners(text, match.start(), match.end(), heads, shared=False)
            result.append((Located(span, of_image=True, place=_CLOCK_PLACES[hour]), owners))
    return [(item, [head for head in owners if head.is_target]) for item, owners in result]


def _joined_end(text: str, matches: list[re.Match[str]]) -> int:
    """Return where a list of places ends: "top left, bottom of the image"."""
    end = matches[0].end()
    for match in matches[1:]:
        if not re.fullmatch(r"\s*(?:,|and|,\s*and)\s+(?:in\s+)?(?:the\s+)?", text[end : match.start()], re.IGNORECASE):
            break
        end = match.end()
    return end


def _place_name(words: str) -> str:
    height = "top" if re.search(r"top|upper", words) else "bottom" if re.search(r"bottom|lower", words) else ""
    side = "left" if "left" in words else "right" if "right" in words else ""
    return f"{height} {side}".strip() or "center"
