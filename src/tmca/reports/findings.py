"""Findings of a report by rules: each mention of the target with what the same sentence says of it.

Where a sentence puts them is read by :mod:`tmca.reports.places`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tmca.data.grammar import COLOURS, COUNT_WORDS, SHAPES, SIZES, Grammar
from tmca.reports.negation import Status, read_status
from tmca.reports.places import (
    PHRASE_ENDS,
    Located,
    Noun,
    Span,
    covers_all,
    image_places,
    lung_places,
    share_sides,
    sides_and_heights,
)
from tmca.reports.sections import CURRENT, Section, Sentence

Adjective = Literal["size", "colour", "shape"]

# --- words --------------------------------------------------------------------------------------------------------

_KIND_OF_LUNG = (
    r"(?:broncho)?pneumonias?|pneumonic\s+(?:change|infiltrat\w+)s?|consolidations?|consolidative\s+changes?|infiltrates?"
    r"|infiltrations?|opacit(?:y|ies)|opacifications?|opacified|consolidated|ground[\s-]?glass(?:\s+(?:opacit(?:y|ies)|opacifications?|changes?"
    r"|attenuation|densit(?:y|ies)|shadowing))?|ggos?|air[\s-]?space\s+(?:disease|opacit(?:y|ies)|shadowing"
    r"|consolidations?|changes?)|(?:pulmonary|lung|chest)\s+infections?|infections?"
)
TARGETS: dict[Grammar, str] = {
    "lung": _KIND_OF_LUNG,
    "polyp": r"polyps?|polypoid\s+(?:lesion|mass|growth)s?|adenomas?|(?:sessile|pedunculated|flat)\s+lesions?",
    "phantom": r"lesions?|nodules?|mass(?:es)?",
}
"""What counts as a target, by grammar, as regular expressions."""

_OTHERS: dict[Grammar, str] = {
    "lung": (
        r"effusions?|pleural\s+fluid|fluid|pneumothora\w+|ptx|haemothorax|hemothorax|nodules?|mass(?:es)?|lesions?|atelecta\w+"
        r"|(?:o?edema)|fractures?|ribs?|clavicles?|shoulders?|(?:hemi)?diaphragms?|heart|cardiac|atri(?:um|al)|ventric\w+"
        r"|picc|catheters?|cannulas?|lines?|tubes?|drains?|pacemakers?|leads?|ports?|arms?|extremit\w+|breasts?|axilla\w*"
        r"|quadrants?|humerus|humeri|humeral|scapula\w*|kidneys?|liver|spleen|stomach|adenopathy|lymphadenopathy|nodes?|scars?|scarring"
        r"|fibro\w+|granulomas?|emphysema|calcifi\w+|thickening|costophrenic|angles?|carina|trachea|shift|arter\w+|veins?"
        r"|spar(?:ing|ed|es)|bronch(?:us|i|iectasis)|aorta|spine|thyroid|markings|congestion|cavit\w+|bulla\w*|blebs?|tuberculosis"
        r"|embol\w+|clips?|hernia|stents?|volume\s+loss|hilar?|hilum|mediastin\w+|volumes|clear|unremarkable|normal|border"
        r"|collapse|abscess\w*|empyema|plaques?|\w+(?:ectomy|otomy)|reticul\w+|lucenc\w+|hyperinflation|deviat\w+|pain"
        r"|views?|projections?|decubitus|rotated|rotation|unaffected|uninvolved|not\s+(?:affected|involved)|aerated|inflated"
    ),
    "polyp": (
        r"scars?|ha?emorrhoids?|diverticul\w+|mass(?:es)?|inflammation|bowel|intestines?|mucosa|folds?|blood|bleeding|stools?"
        r"|views?|tattoos?|ink|ulcers?|lipomas?|snares?|forceps|clips?|needles?|biops\w+|light|imaging|angioectasias?|lesions?"
        r"|erythema|exudates?|cancers?|carcinomas?|fluid|colitis|debris|caps?|hoods?|loops?"
    ),
    "phantom": r"background|borders?|frames?",
}
_OF = r"(?:(?:areas?|foc(?:us|i)|patch(?:es)?|regions?|zones?)\s+of\s+(?:[\w-]+\s+){0,2}?)?"
_ATTRIBUTED = re.compile(
    r"\b(?:consistent|compatible|in\s+keeping)\s+with\b|\brepresent(?:s|ing)?\b|\bdue\s+to\b|\bsuggest(?:s|ing|ive\s+of)\b"
    r"|\blikely\b|\bfavou?r\w*\b|\breflect(?:s|ing)?\b|\brelated\s+to\b|\battributable\s+to\b|\bfrom\b|\bprobably\b|\bmay\s+be\b",
    re.IGNORECASE,
)
_NOT_INFECTED = re.compile(
    r"\b(?:scar\w*|fibro\w+|atelecta\w+|o?edema|effusion|mass|tumou?r|neoplas\w+|malignan\w+|carcinoma|metasta\w+|granuloma"
    r"|contusion|ha?emorrhage|nipple|artefact\w*|artifact\w*|electrodes?|buttons?|clothing|skin\s+fold|overlap\w*|vessel|calcif\w+)\b",
    re.IGNORECASE,
)
_INFECTED = re.compile(r"\b(?:\w*pneumon\w*|infect\w*|covid\S*|aspiration|viral|bacterial)\b", re.IGNORECASE)
_LESS_LIKELY = re.compile(
    r"\b(?:over|rather\s+than|less\s+likely|instead\s+of|though|although|but|however|superimposed)\b", re.IGNORECASE
)
_ORGAN = (
    r"(?:arms?|legs?|feet|foot|hands?|hips?|knees?|skin|wounds?|breasts?|renal|kidneys?|orbit\w*|eyes?|sinus\w*|ears?"
    r"|urinary|bladder|bones?|osseous|hepatic|liver|abdom\w+|dental|soft[\s-]tissue|metallic|metal|radiopaque|nipples?"
    r"|surgical|vascular|cardiac|line|catheter|port|bloodstream)"
)
_OTHER_ORGAN = re.compile(
    rf"\b{_ORGAN}\s+(?:\w+\s+)?$|(?P<after>\s+(?:of|in)\s+(?:the\s+)?(?:(?:left|right|both)\s+)?{_ORGAN}\b)",
    re.IGNORECASE,
)
_NORMAL_LUNGS = re.compile(
    r"\b(?:(?:the|both|remaining|remainder\s+of\s+the|rest\s+of\s+the|visuali[sz]ed)\s+)*(?:(?:left|right|lt|rt|[LR])\s+)?"
    r"(?:lungs?(?:\s+(?:fields?|parenchyma))?|hemithorax)(?:\s+and\s+(?:[\w-]+\s+){0,2}[\w-]+?)?(?:\s+(?:is|are|remains?|was|were|appears?|appear)|\s*:)?"
    r"(?:\s+(?:otherwise|(?:well[\s-]|hyper-?)?(?:expanded|aerated|inflated)(?:,|\s+and)?|grossly|essentially|now|fully|both))*"
    r"\s+(?:clear|unremarkable|normal|spared|unaffected|uninvolved|not\s+(?:affected|involved))\b(?:\s+bilaterally\b)?"
    r"|\bchest\s+(?:is\s+)?clear\b|\bclear\s+lungs?\b"
    r"|\bno\s+(?:\w+\s+)?(?:evidence\s+of\s+)?(?:acute|active)\s+(?:\w+\s+)?(?:cardiopulmonary|pulmonary|lung|chest"
    r"|intrathoracic|airspace|thoracic)\s+\w+"
    r"|\b(?:radiograph|x-?ray|film|cxr)\s+(?:is\s+|was\s+)?(?:otherwise\s+)?(?:normal|unremarkable|clear)\b"
    r"|\bnormal\s+(?:chest|lungs?)(?:\s+(?:radiograph|x-?ray|film|ct))?\b",
    re.IGNORECASE,
)
_ONE_LUNG = re.compile(r"^lung\b(?!\s+(?:fields|parenchyma|disease))", re.IGNORECASE)
_NORMAL_BOWEL = re.compile(
    r"\bnormal\s+colonoscopy\b(?!\s+(?:apart|except|other))|\bcolonoscopy\s+(?:was|is)\s+(?:entirely\s+|completely\s+)?normal\b"
    r"(?!\s+(?:apart|except|other))",
    re.IGNORECASE,
)
_NOT_OF_ALL = re.compile(
    r"\b(?:other|otherwise|further|additional|remaining|remainder|rest|residual|elsewhere|recurrent|more)\b",
    re.IGNORECASE,
)
_EXCEPT = re.compile(
    r"\b(?:except|apart\s+from|aside\s+from|other\s+than|besides|with\s+the\s+exception)\b", re.IGNORECASE
)
_TYPED = re.compile(
    r"\b(?:lobar|dense|confluent|cavit\w+|nodular|large|small|rounded|linear|flat|sessile|pedunculated|new|discrete"
    r"|suspicious|advanced)\b",
    re.IGNORECASE,
)
_LARGER_THAN = re.compile(
    r"\s*(?:\w+\s+){0,2}(?:(?:greater|larger|bigger|smaller|more|less)\s+than|over\s+\d|[<>≤≥])", re.IGNORECASE
)
_WHOLE_ORGAN = re.compile(
    r"\b(?:in|of|within|throughout)\s+(?:the\s+|this\s+|either\s+)?(?:entire\s+|whole\s+|rest\s+of\s+the\s+|remainder\s+of\s+"
    r"the\s+)?(?:colon|large\s+bowel|image|picture|lungs?|chest)\b",
    re.IGNORECASE,
)
_SCOPED = re.compile(r"\b(?:in|of|within|at)\s+(?:the\s+)?\w+", re.IGNORECASE)
_SEGMENT = re.compile(
    r"\b(?:c(?:a?e)cum|cecal|caecal|ascending|transverse|descending|sigmoid|rect\w+|flexure|ileum|anus|anal|appendi\w+"
    r"|(?:left|right)\s+colon)\b",
    re.IGNORECASE,
)
_LABEL = re.compile(r"\s*[A-Z][\w /-]{0,40}:")

# --- numbers and adjectives ---------------------------------------------------------------------------------------

_COUNTS = {word: value for value, word in enumerate(COUNT_WORDS)} | {"single": 1, "solitary": 1}
_NUMBER = re.compile(
    rf"(?<![\w.,/–-])(?P<number>\d{{1,2}}|{'|'.join(COUNT_WORDS[1:])}|single|solitary)(?![\w./+]|[–-]\d)", re.IGNORECASE
)
_NUMBER_IN = re.compile(
    rf"\b(?P<number>\d{{1,2}}|{'|'.join(COUNT_WORDS[1:])})\s+(?:in|at|on|of|within)\b", re.IGNORECASE
)
_LENGTH = re.compile(
    r"\b\d+(?:[.,]\d+)?(?:\s*(?:-|–|to|x|×)\s*\d+(?:[.,]\d+)?)*\s*-?\s*(?:mm|cm|millimet\w+|centimet\w+)\b",
    re.IGNORECASE,
)
_VAGUE = re.compile(
    r"\b(?:about|approximately|circa|roughly|some|at\s+least|at\s+most|(?:more|less|fewer)\s+than|up\s+to|over|under|around"
    r"|nearly|almost|or|to)\s+(?:\d+|\w+)\s*$"
    r"|[<>≤≥~≈±]\s*\d+\s*$"
    r"|\d\s*(?:-|–|to|or)\s*\d+\s*$"
    r"|\b(?:\w+ty|hundred)[\s-]+\w+\s*$"  # thirty-two
    r"|\b(?:day|week|month|year|grade|stage|type|class|score|series|image|frame|slice|level|segment|\w*-?rads)\s+\d+\s*$",
    re.IGNORECASE,
)
"""Words by which a number is no count, up to the number."""
_DOZENS = re.compile(r"\s*(?:dozens?|hundreds?|scores?)\b", re.IGNORECASE)
_SUM = re.compile(
    rf"\b(?:\d{{1,2}}|{'|'.join(COUNT_WORDS[1:])})\s+(?:(?:{'|'.join((*SIZES, *COLOURS))})\s+)?(?:and|or|to)\s*$",
    re.IGNORECASE,
)
"""What stands before a number that is only a part, or an end: "one small and two large polyps", "two to three"."""
_ARTICLE = re.compile(r"\b(?:an?)\b", re.IGNORECASE)
_DEFINITE = re.compile(r"\b(?:the|this|that|these|those|its|both|each|remaining|said|all)\b", re.IGNORECASE)
_FURTHER = re.compile(r"\b(?:another|second|third|fourth|further|additional|other|more)\b", re.IGNORECASE)
_ONE_MORE = re.compile(
    r"(?<!no\s)(?:\banother\b|\ban?\s+(?:further|additional|second|third|fourth)\b|\ban?\s+(?:\w+\s+){0,3}one\b)",
    re.IGNORECASE,
)
_ONE_OF_THEM = re.compile(
    r"\b(?:larger|largest|smaller|smallest|first|second|third|latter|former|other)\b", re.IGNORECASE
)
_TOTAL = re.compile(r"\b(?:total|altogether|in\s+all|overall)\b", re.IGNORECASE)
_TIMES = re.compile(
    r"\s*(?:\(?\s*[x×]\s?|:\s*(?=\d+\s*(?:$|[.;,)])))(?P<number>[1-9]\d?)\b(?!\s*(?:[-–.,]?\s*\d|-|–|to\b|mm|cm))\)?",
    re.IGNORECASE,
)
_NUMBER_AGAIN = re.compile(r"(?<=\w)\s*\(\d{1,2}\)(?=\s)")
_VALUES: dict[str, tuple[Adjective, str]] = {
    **{word: ("size", word) for word in SIZES},
    **{word: ("colour", word) for word in COLOURS},
    **{word: ("shape", word) for word in SHAPES},
    **{f"{word}ish": ("colour", word) for word in ("white", "yellow", "brown", "pink", "gray")},
    "reddish": ("colour", "red"),
    "whitish": ("colour", "white"),
    "greyish": ("colour", "gray"),
    "grey": ("colour", "gray"),
    "ovoid": ("shape", "oval"),
    "circular": ("shape", "round"),
    "rounded": ("shape", "round"),
    "medium-sized": ("size", "medium"),
    "small-sized": ("size", "small"),
}
_NO_ADJECTIVE = {"heart", "kidney", "thumb", "ear", "mouth", "bone", "nail", "toe"}
_WORD = re.compile(r"[^\W\d_]+(?:-sized)?", re.IGNORECASE)
_NEUTRAL = {
    *(
        "and",
        "both",
        "all",
        "each",
        "very",
        "rather",
        "slightly",
        "somewhat",
        "quite",
        "in",
        "colour",
        "color",
        "shape",
    ),
    *("shaped", "sized", "size", "relatively", "about", "of"),
}
_COPULA = {"is", "are", "was", "were", "appears", "appeared", "appear", "looks", "looked", "being"}
_AFTER_ADJECTIVES = sorted(
    _NEUTRAL | _COPULA | set(_VALUES) | {"or", "but", "on", "at", "with", "which", "seen", "removed"}
)
_ENDS_ADJECTIVES = re.compile(rf"\s*(?:$|[,;.()]|(?:{'|'.join(_AFTER_ADJECTIVES)})\b)", re.IGNORECASE)
_NON = re.compile(r"\bno[nt][\s-]$", re.IGNORECASE)
_WITH_SURFACE = re.compile(
    r"\bwith\s+an?\s+(?P<word>[\w-]+)\s+(?:surface|colou?r|hue|shape|appearance)\b", re.IGNORECASE
)
_ANAPHOR = re.compile(
    r"\s*(?P<word>it|they|this|these|both|one)\b(?=\s+(?:is|are|was|were|lies?|lay|measures?|appears?|occup\w+)\b)",
    re.IGNORECASE,
)
_UNILATERAL = re.compile(r"\bunilateral\b", re.IGNORECASE)


@dataclass(frozen=True)
class Stated:
    """A value with the words that state it."""

    fact: Literal["count", "size", "colour", "shape", "bilateral"]
    value: str
    span: Span


@dataclass(frozen=True)
class Mention:
    """The target named in a report, or normal lungs named in its place.

    Attributes:
        section: Where.
        span: Its words in the report.
        words: Them.
        status: What the sentence says of it.
        cue: The words that say so.
        proof: From there to the target, in the report.
        located: Where it is, as far as the sentence says.
        stated: Count, size, colour, shape.
        count: How many, or ``None``.
        is_plural: More than one.
        is_known: A target named before: "the polyp".
        is_further: One more: "a second polyp".
        in_part: The sentence says something else of some of them.
        is_total: The sentence gives a total.
        is_everywhere: It names no place that is less than the whole.
        is_typed: A kind of target only: "no lobar consolidation".
        leaves_rest: A denial of all others, or with an exception.
        is_normal: Not the target is named but normal organs.
        cause: Words by which the finding is no infection.
        lengths: Sizes in millimetres or centimetres.
    """

    section: Section
    span: Span
    words: str
    status: Status
    cue: str = ""
    proof: Span = (0, 0)
    located: tuple[Located, ...] = ()
    stated: tuple[Stated, ...] = ()
    count: int | None = None
    is_plural: bool = False
    is_known: bool = False
    is_further: bool = False
    in_part: bool = False
    is_total: bool = False
    is_everywhere: bool = False
    is_typed: bool = False
    leaves_rest: bool = False
    is_normal: bool = False
    cause: str = ""
    lengths: tuple[Span, ...] = ()


def find_mentions(sentences: Sequence[Sentence], grammar: Grammar, more: Sequence[Span] = ()) -> list[Mention]:
    """Return the mentions of the target in the sections that tell of now, in their order.

    What an addendum says of the target stands in place of what the report said before.

    Args:
        sentences: The report.
        grammar: What the target is.
        more: Further places of the report that name the target, in words that the rules do not know.
    """
    mentions: list[Mention] = []
    for sentence in sentences:
        if sentence.section not in CURRENT:
            continue
        again = _NUMBER_AGAIN.sub(lambda match: " " * len(match[0]), sentence.text)  # "two (2) polyps"
        sentence = replace(sentence, text=again)
        heads = _heads(sentence, grammar, more)
        found = list(_mentions_of(sentence, grammar, heads))
        if not any(head.is_target for head in heads) and mentions:
            found += _about_the_last(sentence, grammar, mentions[-1])
        mentions += found
    added = [replace(mention, section="findings") for mention in mentions if mention.section == "addendum"]
    return added or mentions


def _heads(sentence: Sentence, grammar: Grammar, more: Sequence[Span]) -> list[Noun]:
    text = sentence.text
    targets = [match.span() for match in re.finditer(rf"\b{_OF}(?:{TARGETS[grammar]})\b", text, re.IGNORECASE)]
    for start, end in more:
        first, last = start - sentence.start, end - sentence.start
        if first >= 0 and last <= len(text) and not any(first < b and a < last for a, b in targets):
            targets.append((first, last))
    others = [match.span() for match in re.finditer(rf"\b(?:{_OTHERS[grammar]})\b", text, re.IGNORECASE)]
    heads = [Noun(*span, True) for span in targets]
    heads += [Noun(*span, False) for span in others if not any(span[0] < b and a < span[1] for a, b in targets)]
    return sorted(heads, key=lambda head: head.start)


def _mentions_of(sentence: Sentence, grammar: Grammar, heads: list[Noun]) -> Iterator[Mention]:
    text, offset = sentence.text, sentence.start
    normal = (
        list((_NORMAL_LUNGS if grammar == "lung" else _NORMAL_BOWEL).finditer(text)) if grammar != "phantom" else []
    )
    taken = [match.span() for match in normal]
    located = lung_places(sentence, heads, taken) if grammar == "lung" else image_places(sentence, heads, grammar)
    places = [(head.start, head.end) for head in heads if head.is_target]
    for match in normal:
        inside = tuple(item for item, _ in sides_and_heights(text, offset) if _within(item.span, match.span(), offset))
        yield Mention(
            sentence.section,
            (match.start() + offset, match.end() + offset),
            match[0],
            "negated",
            proof=(match.start() + offset, match.end() + offset),
            located=inside,
            is_everywhere=covers_all(inside) and _ONE_LUNG.search(match[0]) is None,
            leaves_rest=_NOT_OF_ALL.search(match[0]) is not None or _EXCEPT.search(text, match.end()) is not None,
            is_normal=True,
        )
    for head in heads:
        if not head.is_target or any(start <= head.start < end for start, end in taken):
            continue
        reading = read_status(text, head.start, head.end, places)
        mention = Mention(
            sentence.section,
            (head.start + offset, head.end + offset),
            text[head.start : head.end],
            reading.status,
            cue=reading.cue,
            proof=(reading.span[0] + offset, reading.span[1] + offset),
            located=share_sides(
                tuple(
                    item
                    for item, owners in located
                    if head in owners and not (item.is_excepted and reading.status == "affirmed")
                )
            ),
            in_part=reading.in_part,
        )
        yield _described(mention, sentence, grammar, heads, head)


def _described(mention: Mention, sentence: Sentence, grammar: Grammar, heads: list[Noun], head: Noun) -> Mention:
    """Return the mention with count, adjectives and what its denial covers."""
    text, offset = sentence.text, sentence.start
    start = _phrase_start(text, heads, head)
    before = text[start : head.start]
    words = mention.words.split()
    plural = re.match(r"(?:areas|foci|patches|regions|zones)\b", mention.words, re.IGNORECASE) is not None or (
        not re.match(r"(?:area|focus|patch|region|zone)\b", mention.words, re.IGNORECASE)
        and words[-1].lower().endswith(("s", "opacities", "masses"))
        and not words[-1].lower().endswith(("glass", "mass"))
    )
    stated: list[Stated] = []
    count: int | None = None
    counted = _counted(text, start, head, plural)
    if counted is not None:
        count, span = counted
        stated.append(Stated("count", str(count), (span[0] + offset, span[1] + offset)))
    if grammar != "lung" and not _ONE_OF_THEM.search(before):
        stated += _adjectives(text, offset, start, heads, head)
    elif unilateral := _UNILATERAL.search(before):
        span = (unilateral.start() + start + offset, unilateral.end() + start + offset)
        stated.append(Stated("bilateral", "false", span))
    after = text[head.end :]
    next_target = next((other.start for other in heads if other.is_target and other.start > head.end), len(text))
    label = _LABEL.match(text)
    near = re.split(r"[,;]|\b(?:but|while|whereas)\b", after)[0]
    in_a_place = not mention.located and _SCOPED.search(near) is not None and _WHOLE_ORGAN.search(near) is None
    in_a_place |= grammar != "lung" and _SEGMENT.search(text[: head.start].rpartition(",")[2]) is not None
    labelled = label is not None and label.end() <= head.start and grammar != "lung"
    return replace(
        mention,
        stated=tuple(stated),
        count=count,
        is_plural=plural,
        is_known=_DEFINITE.search(before) is not None and _FURTHER.search(before) is None,
        is_further=_FURTHER.search(before) is not None,
        in_part=mention.in_part or (count is not None and not _adds_up(text[head.end : next_target], count)),
        is_total=_TOTAL.search(text) is not None,
        is_everywhere=covers_all(mention.located) and not in_a_place and not labelled,
        is_typed=_TYPED.search(before) is not None
        or any(word.lower() in _VALUES for word in _WORD.findall(before))
        or _LARGER_THAN.match(after) is not None,
        leaves_rest=_NOT_OF_ALL.search(before) is not None or _EXCEPT.search(after) is not None,
        cause=_other_cause(text[: head.start], text[head.end : next_target], text[head.end :])
        if grammar == "lung"
        else "",
        lengths=tuple((match.start() + offset, match.end() + offset) for match in _LENGTH.finditer(text)),
    )


def _adds_up(rest: str, count: int) -> bool:
    """Return whether what is counted place by place is the count: "three, two in … and one in …"."""
    numbers = [match["number"].lower() for match in _NUMBER_IN.finditer(rest)]
    return not numbers or sum(int(word) if word.isdecimal() else _COUNTS[word] for word in numbers) == count


def _other_cause(before: str, near: str, rest: str) -> str:
    """Return the words by which a finding is no infection of the lungs: another organ, or another cause alone."""
    organ = _OTHER_ORGAN.search(before)
    if organ and not organ["after"]:
        return organ[0].strip()
    organ = _OTHER_ORGAN.match(near)
    if organ and organ["after"]:
        return organ[0].strip()
    attributed = _ATTRIBUTED.search(near)
    cause = _NOT_INFECTED.search(near, attributed.end()) if attributed else None
    if attributed is None or cause is None:
        return ""
    infected = _INFECTED.search(_LESS_LIKELY.split(rest)[0])
    return "" if infected else near[attributed.start() : cause.end()]


def _about_the_last(sentence: Sentence, grammar: Grammar, last: Mention) -> list[Mention]:
    """Return what "it is …", "they lie …" says of the finding of the sentence before."""
    pronoun = _ANAPHOR.match(sentence.text)
    if pronoun is None or last.status != "affirmed":
        return []
    head = Noun(pronoun.start("word"), pronoun.end("word"), True)
    heads = sorted([head, *_heads(sentence, grammar, ())], key=lambda item: item.start)
    found = [item for item in _mentions_of(sentence, grammar, heads) if not item.is_normal]
    return [replace(mention, is_known=True, count=None, words=last.words) for mention in found]


def _phrase_start(text: str, heads: list[Noun], head: Noun) -> int:
    """Return where the words before a head that belong to it begin."""
    text = _LENGTH.sub(lambda match: "#" * len(match[0]), text)  # the "to" of "4 to 5 mm" ends no phrase
    start = max((other.end for other in heads if other.end <= head.start), default=0)
    for match in PHRASE_ENDS.finditer(text, start, head.start):
        joins = match[0].lower() in ("and", "or") and _joins_adjectives(text, match, head.start)
        if not joins and match[0].lower() not in ("no", "not"):
            start = match.end()
    return start


def _joins_adjectives(text: str, joint: re.Match[str], end: int) -> bool:
    """Return whether "and" stands between two known adjectives: "a small and a large polyp"."""
    before = _WORD.findall(text[: joint.start()])[-1:]
    after = [word for word in _WORD.findall(text[joint.end() : end]) if word.lower() not in ("a", "an")][:1]
    return all(word.lower() in _VALUES for word in (*before, *after)) and bool(before) and bool(after)


def _counted(text: str, start: int, head: Noun, plural: bool) -> tuple[int, Span] | None:
    """Return the number of targets and its place: a number word or a figure, or "a" before one target."""
    times = _TIMES.match(text, head.end)
    if times:
        return int(times["number"]), (times.start("number"), times.end("number"))
    before = text[start : head.start]
    blank = _LENGTH.sub(lambda match: "#" * len(match[0]), before)
    if _FURTHER.search(before):
        return None
    articles = list(_ARTICLE.finditer(blank))
    for match in _NUMBER.finditer(blank):
        word = match["number"].lower()
        value = int(word) if word.isdecimal() else _COUNTS[word]
        vague = _VAGUE.search(text[: start + match.end()]) or _DOZENS.match(blank, match.end())
        vague = vague or _SUM.search(text[:start]) or _NUMBER.search(blank, match.end())
        if vague or value == 0 or (value == 1 and plural) or (value > 1 and not plural):
            return None
        return value, (start + match.start(), start + match.end())
    if len(articles) == 1 and not plural:
        return 1, (start + articles[0].start(), start + articles[0].end())
    return None


def _adjectives(text: str, offset: int, start: int, heads: list[Noun], head: Noun) -> list[Stated]:
    """Return size, colour and shape: words before the target, or after it behind a comma or "is"."""
    words = list(_WORD.finditer(text, start, head.end))
    following = [other.start for other in heads if other.start >= head.end]
    end = following[0] if following else len(text)
    words += _predicates(text, head.end, end, before_other=bool(following))
    found = [(match[0].lower(), match.span()) for match in words]
    found += [
        (match["word"].lower(), match.span("word"))
        for match in _WITH_SURFACE.finditer(text, head.end, min(end + 20, len(text)))
    ]
    return [
        Stated(_VALUES[word][0], _VALUES[word][1], (first + offset, last + offset))
        for word, (first, last) in found
        if word in _VALUES and word not in _NO_ADJECTIVE and not _NON.search(text, 0, first)
    ]


def _predicates(text: str, start: int, end: int, *, before_other: bool) -> Iterator[re.Match[str]]:
    """Yield the known adjectives after a target: right behind a comma, a bracket or "is", and joined to such."""
    allowed = False
    last = start
    for match in _WORD.finditer(text, start, end):
        word = match[0].lower()
        between = text[last : match.start()]
        if re.search(r"[,(]", between) or word in _COPULA:
            allowed = True
        if re.search(r"\d", between) or word in COUNT_WORDS:
            allowed = False  # of some of them: "two red, three white"
        last = match.end()
        if word in _VALUES:
            # An adjective right before another noun is that one's: "white-light images", "red blood".
            if (
                allowed
                and _ENDS_ADJECTIVES.match(text, match.end())
                and (text[match.end() : end].strip() or not before_other)
            ):
                yield match
        elif word not in _NEUTRAL and word not in _COPULA:
            allowed = False


def _within(span: Span, outer: Span, offset: int) -> bool:
    return outer[0] + offset <= span[0] and span[1] <= outer[1] + offset


def names_other(words: str, grammar: Grammar) -> bool:
    """Return whether words name the target or anything else that the rules know, or deny something."""
    known = rf"\b(?:{TARGETS[grammar]}|{_OTHERS[grammar]}|no|not|without|normal|clear)\b"
    return re.search(known, words, re.IGNORECASE) is not None


def names_one_more(sentences: Sequence[Sentence]) -> bool:
    """Return whether a report speaks of "another one" or "a second", so that what it counts are not all."""
    return any(sentence.section in CURRENT and _ONE_MORE.search(sentence.text) for sentence in sentences)
