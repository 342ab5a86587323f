"""What a sentence says of a word in it: that it is there, is not, may be, was, or that somebody shall look for it.

Cues stand before or after the word. What a cue reaches ends at words such as "but" and "except"; a cue after the word
means the nearest finding before it. In doubt a finding counts as not stated.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Status = Literal["affirmed", "negated", "resolved", "uncertain", "historical", "sought"]

_STUDY = (
    r"(?:study|studies|exam(?:ination)?s?|radiographs?|films?|x-?rays?|cts?|scans?|images?|imaging|colonoscop\w+|prior)"
)
_EARLIER = r"(?:prior|previous|earlier|last|old|preceding)"
_ADVERBS = r"(?:\w+ly\s+|now\s+|since\s+|almost\s+|quite\s+)*"
_SEEN = (
    r"(?:seen|visible|visuali[sz]ed|identified|present|demonstrated|detected|evident|apparent|appreciated|found|shown"
    r"|noted|suspected)"
)
_REMOVED = r"(?:removed|resected|excised|treated|seen|noted|described|diagnosed|reported|present|visible|documented)"
_WHEN = (
    rf"(?:previously|earlier|before|in\s+(?:\w+\s+)?(?:19|20)\d\d|last\s+\w+|(?:\w+\s+)?(?:years?|months?|weeks?)\s+ago"
    rf"|(?:on|at|in)\s+(?:the\s+|an?\s+)?{_EARLIER}\b(?:\s+{_STUDY})?)"
)

# What only looks like a negation or a history: blanked before any cue is looked for.
_LOOKS_LIKE = re.compile(
    rf"\b(?:no|not|without)\s+(?:\w+\s+){{0,2}}(?:changed?|increased?|decreased?|improved?|improvement|progress(?:ed|ion)?"
    rf"|worsen(?:ed|ing))\b"
    rf"|\bnot\s+(?:yet\s+|fully\s+|completely\s+|entirely\s+)*(?:completely\s+)?(?:resolved|cleared)\b"
    rf"|\b(?:partial(?:ly)?|incomplete(?:ly)?|near(?:ly)?[\s-]*(?:complete(?:ly)?)?|almost(?:\s+complete(?:ly)?)?|some)\s+"
    rf"(?:interval\s+)?(?:resolution|clearing|clearance|regression|resolved|cleared)(?:\s+of)?\b"
    rf"|\b(?:compared|comparison|relative|since|than|versus|vs)\b[^,;]{{0,25}}?\b{_EARLIER}\b(?:\s+{_STUDY})?"
    rf"|\bfrom\s+(?:the\s+|an?\s+)?{_EARLIER}\b(?:\s+{_STUDY})?"
    r"|\b(?:compared|comparison|relative|since|than)\b[^,;]{0,25}?\b(?:ago|yesterday|(?:19|20)\d\d)\b"
    rf"|\bnot\s+{_SEEN}(?:\s+\w+){{0,4}}?\s+(?:on|in)\s+(?:the\s+|an?\s+)?{_EARLIER}\b(?:\s+{_STUDY})?"
    r"|\bnot\s+only\b|\bno\s+doubt\b",
    re.IGNORECASE,
)
_PERSISTS = re.compile(
    r"\b(?:unchanged|stable|persist\w*|remain(?:s|ed)?|again|still|worse\w*|worsen\w*|improv\w*|increase\w*|increasing"
    r"|decrease\w*|decreasing|progress\w*|smaller|larger|resolving|ongoing|current\w*|residual)\b"
    r"|\b(?:partial|incomplete|near)\w*",
    re.IGNORECASE,
)
_ENDS = re.compile(
    r"\b(?:but|however|although|though|except|apart\s+from|aside\s+from|besides|other\s+than|while|whereas|yet"
    r"|with\s+the\s+exception|and\s+(?=there\s+(?:is|are|was|were)\b)|and\s+(?=an?\s)|(?:with|and)\s+(?=(?:new|persist\w+|development)\s)|which|that\s+(?=\w+s\b))",
    re.IGNORECASE,
)
_ENDS_AFTER = re.compile(r"\b(?:but|however|although|though|except|while|whereas)\b", re.IGNORECASE)
_OTHER_CLAUSE = re.compile(rf"{_ENDS_AFTER.pattern}|,\s*and\b|\bwith\b", re.IGNORECASE)
_PART = re.compile(r"\b(?:one|two|three|four|some|others?|another)\b[^,;]*$", re.IGNORECASE)
_SEVERAL = re.compile(r"(?:s|ies)$", re.IGNORECASE)


_OTHER_STUDY = re.compile(
    rf"\b{_STUDY}\s+(?:of|from|dated|on)\s+[^,;]{{1,25}}?\s+(?:showed|demonstrated|revealed|had)\b", re.IGNORECASE
)


@dataclass(frozen=True)
class _Cue:
    status: Status
    pattern: re.Pattern[str]
    to_comma: bool = False


def _cue(status: Status, pattern: str, *, to_comma: bool = False) -> _Cue:
    return _Cue(status, re.compile(pattern, re.IGNORECASE), to_comma)


# In order of precedence.
_BEFORE = (
    _cue(
        "sought",
        r"\b(?:recommend\w*|suggest(?:ed)?\s+(?:repeat|follow)|follow[\s-]?up\s+(?:of|for|until)|to\s+(?:exclude|ensure"
        r"|document|look\s+for|assess|confirm|rule\s+out)|(?:evaluate|assess|look|screen(?:ing)?)\s+for|rule\s+out|r/o"
        r"|surveillance\s+(?:of|for)|in\s+case\s+of|if)\b",
    ),
    _cue(
        "resolved",
        r"\b(?:resolution|clearing|clearance|disappearance|regression)\s+of\b|\bno\s+longer\b"
        r"|\binterval\s+(?:resolution|clearing|clearance|regression)\b",
    ),
    _cue("resolved", r"\b(?:resolved|cleared)\b", to_comma=True),
    _cue(
        "historical",
        rf"^\W*(?:in\s+(?:\w+\s+)?(?:19|20)\d\d|last\s+(?:year|month|week|\w+day)|yesterday|(?:the\s+|an?\s+)?"
        rf"(?:{_EARLIER}|yesterday\S*|last\s+\w+\S*)\s+(?:\w+\s+)?{_STUDY})\b(?!.*\b(?:now|today|currently|since)\b)",
    ),
    _cue(
        "historical",
        r"\b(?:(?:he|she|patient|who)\s+had|mother|father|brother|sister|parents?|family|uncle|aunt|cousin|son|daughter)\b",
    ),
    _cue(
        "uncertain",
        r"\b(?:can\s?not|can't|could\s+not|unable\s+to|difficult\s+to)\s+(?:\w+\s+)?(?:exclude|rule\s+out)\b"
        r"|\b(?:concern(?:ing)?|suspicious|suspicion|question)\s+(?:for|of)\b|\b(?:(?<!\d\s)may(?!\s+\d)|might|could)\b|\bversus\b|\bvs\b"
        r"|\bfavou?r\w*\b[^,;]*\bover\b|\bdifferential\b|\bddx?\b|\bpossibility\s+of\b|\bdoubt\b"
        r"|\bcorrelat(?:e|ion)\b[^,;]*\bfor\b",
    ),
    _cue(
        "uncertain",
        r"\b(?:possibl[ey]|questionable|equivocal|suspected|doubtful|perhaps|potential(?:ly)?|query|question|consider)\b|\?",
        to_comma=True,
    ),
    _cue(
        "negated",
        rf"\b(?:no(?!\s+longer)|without|not(?!\s+(?:be\s+|been\s+)?(?:\w+ly\s+)?{_SEEN})|nor|neither|never|none"
        r"|absence\s+of|absent|negative\s+for|free\s+(?:of|from)|denies|lack\s+of|devoid\s+of|nil"
        r"|(?:is|are|was|were|do|does|did|has|have|had)n['’]t|(?:fail(?:s|ed)?|failure)\s+to|ruled\s+out"
        r"|rather\s+than|unlikely|clear\s+of|excludes?)\b",
    ),
    _cue("negated", r"(?<![\w.,:/-])(?:0|zero)(?=\s)", to_comma=True),
    _cue(
        "historical",
        rf"\b(?:history\s+of|h/o|hx\s+of|status\s+post|s/p|treated(?:\s+for)?|previous(?:ly)?|prior|(?<!-)(?<!years\s)old|former(?:ly)?"
        rf"|remote|past|post-?\s?polypectomy|{_REMOVED}\s+{_WHEN})\b",
        to_comma=True,
    ),
)
_AFTER = (
    _cue(
        "resolved",
        rf"\bno\s+longer\b|\b(?:has|have|had|is|are|was|were)\s+{_ADVERBS}(?:resolved|cleared|disappeared|gone)\b",
    ),
    _cue("resolved", r"^\s*(?:resolved|cleared)\b"),
    _cue(
        "resolved",
        rf"^[^,:;(]{{0,40}}[,:(–-]\s*(?:has\s+|have\s+|completely\s+)?{_ADVERBS}(?:resolved|cleared|gone)(?=\s*(?:$|[.,;)]))",
    ),
    _cue(
        "uncertain",
        r"\bcan\s?not\s+be\s+(?:entirely\s+|completely\s+)?(?:excluded|ruled\s+out)\b"
        r"|\bnot\s+(?:be\s+|been\s+)?(?:entirely\s+)?(?:excluded|ruled\s+out)\b|\bshould\s+be\s+considered\b"
        r"|\bis\s+(?:also\s+)?(?:possible|questioned|suspected|questionable|equivocal)\b|\bnot\s+be\s+confirmed\b"
        r"|\b(?:may|might|could)\s+be\s+present\b|\bless\s+likely\b|\b(?:difficult|hard|impossible)\s+to\s+(?:exclude|rule\s+out)\b|\?",
    ),
    _cue(
        "negated",
        rf"\b(?:is|are|was|were|has|have|could|can|been|be)\s+(?:\w+\s+)?not\s+(?:be\s+|been\s+)?(?:\w+ly\s+)?{_SEEN}\b"
        rf"|\bnot\s+{_SEEN}\b|\b(?:is|are|was|were|(?:has|have|had)\s+been)\s+{_ADVERBS}(?:absent|excluded|ruled\s+out|denied)\b"
        rf"|\b(?:is|are|was|were)\s+(?:\w+\s+)?(?:to\s+be\s+)?unlikely\b|\b(?:is|are|was|were|do|does|did)n['’]t\s+{_SEEN}\b|:\s*(?:none|no|nil|absent|negative|0|zero)\b|\bneither\b|\bnowhere\b"
        r"|^[^,;]{0,40}?\s[–-]\s*(?:none|nil|absent|negative|0)(?=\s*(?:$|[.,;)]))|^\s*\?\s*(?:none|nil)\b"
        r"|^\s*(?:\w+ly\s+)?(?:excluded|ruled\s+out)\b",
    ),
    _cue(
        "historical", rf"\b{_REMOVED}\s+{_WHEN}\b|\bpreviously\s+{_REMOVED}\b|\b(?:was|were)\b[^,;]{{0,40}}?\b{_WHEN}\b"
    ),
    _cue(
        "historical",
        r"\b(?:last\s+(?:year|month|week|winter|spring|summer|autumn|fall)|(?:years?|months?|weeks?)\s+ago)\b",
    ),
    _cue("historical", rf"^[^,;]{{0,40}}?\b(?:on|in)\s+(?:the\s+|an?\s+)?{_EARLIER}\s+(?:\w+\s+)?{_STUDY}\b"),
    _cue("sought", r"\b(?:should\s+be\s+(?:sought|excluded))\b"),
)


@dataclass(frozen=True)
class Reading:
    """What a sentence says of a word.

    Attributes:
        status: Affirmed, negated, resolved since, uncertain, historical, or only sought.
        cue: The words that say so; empty for affirmed.
        span: From the cue to the word or from the word to the cue, in the sentence.
        in_part: The sentence says something else of some of what is counted: "two polyps, one removed previously".
    """

    status: Status
    cue: str = ""
    span: tuple[int, int] = (0, 0)
    in_part: bool = False


@functools.lru_cache(maxsize=16)
def without_lookalikes(sentence: str) -> str:
    """Return a sentence of the same length whose "no change", "since the previous film" and the like are blank."""
    return _LOOKS_LIKE.sub(lambda match: " " * len(match[0]), sentence)


def read_status(sentence: str, start: int, end: int, heads: Sequence[tuple[int, int]] = ()) -> Reading:
    """Return what a sentence says of one of its words.

    Args:
        sentence: The sentence.
        start: First character of the word.
        end: Character after its last.
        heads: Places of all findings in the sentence; a cue after the word belongs to the nearest one before it.
    """
    text = without_lookalikes(sentence)
    found, in_part = _cues_after(text, start, end, heads)
    found += _cues_before(text, start, end)
    if other := _OTHER_STUDY.search(sentence, 0, start):
        found.append(Reading("historical", other[0], (other.start(), end)))
    order: tuple[Status, ...] = ("sought", "resolved", "uncertain", "negated", "historical")
    if _persists(sentence, start, end, heads):
        order = order[:-1]
    for status in order:
        for reading in found:
            if reading.status == status:
                return replace(reading, in_part=in_part)
    return Reading("affirmed", span=(start, end), in_part=in_part)


def _persists(sentence: str, start: int, end: int, heads: Sequence[tuple[int, int]]) -> bool:
    """Return whether the part of the sentence that is about a word says that it is there still."""
    first = max((stop for _, stop in heads if stop <= start), default=0)
    first = max([first, *(match.end() for match in _OTHER_CLAUSE.finditer(sentence, 0, start))])
    last = min((begin for begin, _ in heads if begin >= end), default=len(sentence))
    ending = _OTHER_CLAUSE.search(sentence, end)
    return _PERSISTS.search(sentence, first, min(last, ending.start() if ending else last)) is not None


def _cues_before(text: str, start: int, end: int) -> list[Reading]:
    reach = max((match.end() for match in _ENDS.finditer(text, 0, start)), default=0)
    before = text[reach:start]
    return [
        Reading(cue.status, match[0].strip(), (reach + match.start(), end))
        for cue in _BEFORE
        for match in cue.pattern.finditer(before)
        if not (cue.to_comma and re.search(r"[,:]", before[match.end() :]))
    ]


def _cues_after(text: str, start: int, end: int, heads: Sequence[tuple[int, int]]) -> tuple[list[Reading], bool]:
    """Return the cues that belong to a word before them, and whether one is for some of what is counted only."""
    found: list[Reading] = []
    in_part = False
    for cue in _AFTER:
        match = cue.pattern.search(text[end:])
        if match is None or _other_head_between(text, end, end + match.start(), heads):
            continue
        between = text[end : end + match.start()]
        if _ENDS_AFTER.search(between):
            continue
        if _PART.search(between) and _SEVERAL.search(text[start:end]):
            in_part = True
        else:
            found.append(Reading(cue.status, match[0].strip(), (start, end + match.end())))
    return found, in_part


def _other_head_between(text: str, end: int, position: int, heads: Sequence[tuple[int, int]]) -> bool:
    """Return whether another finding stands between, other than as "X and Y"."""
    last = end
    for start, stop in sorted(heads):
        if end <= start < position:
            if not re.fullmatch(r"[\s,/]*(?:(?:and|or)\s+)?(?:\w+\s+){0,2}", text[last:start]):
                return True
            last = stop
    return False
