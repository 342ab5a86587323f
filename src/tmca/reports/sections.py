"""A report cut into sections and sentences, each with its place in the text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Section = Literal["history", "comparison", "technique", "findings", "impression", "addendum", "recommendation", "other"]

CURRENT: tuple[Section, ...] = ("findings", "impression", "addendum")
"""The sections that tell what is seen now; the others are read for nothing but their place."""

HEADERS: dict[Section, tuple[str, ...]] = {
    "history": (
        *("history", "clinical history", "medical history", "past medical history", "family history", "past history"),
        *(
            "history of present illness",
            "clinical information",
            "clinical details",
            "clinical data",
            "clinical context",
        ),
        *("clinical question", "clinical indication", "indication", "indications", "indication(s)", "clinical"),
        *("reason for examination", "reason for exam", "reason for study", "reason for request", "reason", "request"),
        *("background", "referral", "symptoms", "chief complaint", "presenting complaint", "patient history", "hx"),
        *("clinical hx", "clinical notes", "clinical summary", "pmh", "hpi", "provisional diagnosis"),
        *("admission diagnosis", "referring diagnosis", "working diagnosis", "differential diagnosis"),
    ),
    "comparison": (
        *("comparison", "comparisons", "comparison studies", "prior studies", "previous studies", "priors", "prior"),
        *(f"{when} {what}" for when in ("prior", "previous", "earlier") for what in ("cxr", "ct", "film", "imaging")),
    ),
    "technique": (
        *("technique", "procedure", "protocol", "method", "methods", "medication", "medications", "sedation"),
        *("preparation", "bowel preparation", "consent", "examination", "exam", "study", "views", "contrast", "dose"),
    ),
    "findings": (
        *("findings", "finding", "report", "description", "observations", "results", "endoscopic findings"),
        *("colonoscopy findings", "description of procedure", "procedure description", "procedure in detail"),
        *("findings and procedure", "imaging findings", "radiology report"),
    ),
    "impression": (
        *("impression", "impressions", "conclusion", "conclusions", "summary", "opinion", "assessment", "diagnosis"),
        *("endoscopic diagnosis", "interpretation", "final impression", "overall impression"),
    ),
    "addendum": ("addendum", "addenda", "correction", "corrected report", "amended report"),
    "recommendation": ("recommendation", "recommendations", "plan", "follow-up", "follow up", "advice", "comment"),
    "other": (
        "pathology",
        "histology",
        "histopathology",
        "complications",
        "electronically signed by",
    ),
}
"""Headers by the section that they open."""

_SECTION_OF: dict[str, Section] = {name: section for section, names in HEADERS.items() for name in names}


def _any_of(names: Iterable[str]) -> str:
    return "|".join(re.escape(name).replace(r"\ ", r"[ \t]+") for name in sorted(names, key=len, reverse=True))


_NAMES, _CAPITALS = _any_of(_SECTION_OF), _any_of(name.upper() for name in _SECTION_OF)
_TAG = r"</?\w{1,6}>"
# At the start of a line with a colon, a dash or a bracket, alone on it, or in capitals before other words; or after the
# end of a sentence with a colon.
_HEADER = re.compile(
    rf"^(?:[ \t#*\[]|{_TAG})*(?:(?:{_NAMES})[ \t]*(?:/|&|and)[ \t]*)?(?P<line>{_NAMES})"
    rf"(?:[ \t]+\(?\d[\d:./ ()-]{{0,20}})?[ \t]*(?:(?:\*|\]|{_TAG})+:?|:(?:\*|{_TAG})*|[–-](?=\s)|$)"
    rf"|^[ \t]*(?P<capitals>(?-i:{_CAPITALS}))[ \t]+(?=(?-i:\w*[a-z]))"
    rf"|(?<=[.!?;])[ \t]+(?P<inline>{_NAMES})[ \t]*:",
    re.IGNORECASE | re.MULTILINE,
)
_BOUNDARY = re.compile(
    r"(?:[.!]+|(?<=\w)\?(?!\s*(?i:none|no|nil)\b))(?=\s|$)"  # the end of a sentence; "? pneumonia" asks for one
    r"|;"
    r"|\n[ \t]*(?=\n)"  # a blank line
    r"|\n(?=[ \t]*(?:\d{1,2}[.)]|[-*•])[ \t])"  # an item of a list
    r"|\n(?=[ \t]*[A-Z][\w /-]{0,40}:)"  # a label: "Rectum: …"
    r"|(?<=[^,\s])\n(?=[ \t]*[A-Z])"  # a line of its own, where the line before it is short
)
_NEXT_PARAGRAPH = re.compile(r"\n[ \t]*\n|\n(?=[ \t]*[A-Z][\w /-]{0,40}:)")
_SHORT_LINE = 60
_IN_A_PHRASE = re.compile(
    r"\b(?:NO|NOT|WITHOUT|OF|OR|AND|THE|AN?|HAS|HAVE|HAD|IS|ARE|WAS|WERE|BE|BEEN|IN|ON|AT|TO|FOR|FROM|WITH|THAN|THAT|WHICH"
    r"|ACUTE|FOCAL|LOBAR|PATCHY|DENSE|NEW|SMALL|LARGE|FREE|EVIDENCE|PLEURAL|PULMONARY|PREVIOUS|PRIOR|POSSIBLE|NEW LEFT"
    r"|NEW RIGHT|,)[ \t]*$"
)
_ABBREVIATION = re.compile(
    r"(?:\b(?:dr|approx|vs|e\.g|i\.e|ca|cf|fig|mr|mrs|ms|st|resp|incl)|^\s*\d{1,2})$", re.IGNORECASE
)
_BLANKS = {ord(sign): " " for sign in "\r\f\v\xa0"}
_MARKER = re.compile(r"\s*(?:(?:\d{1,2}[.)]|[-*•])\s+)?\s*")


MOST_IN_SENTENCE = 1000
"""Characters up to which a sentence is read; a longer one is no sentence, and cut anywhere it could lose a "no"."""


@dataclass(frozen=True)
class Sentence:
    """A sentence of a report.

    Attributes:
        section: Where it stands.
        text: Its words, as they are.
        start: Its place in the report, in characters.
    """

    section: Section
    text: str
    start: int


def split_report(text: str) -> tuple[Sentence, ...]:
    """Return the sentences of a report in their order.

    What stands before the first header counts as findings, unless there is a header for these.

    Headers, the numbers of lists and blank space belong to no sentence. A semicolon ends one. One that is longer than
    :data:`MOST_IN_SENTENCE` stands under "other".

    Args:
        text: The report.
    """
    text = text.translate(_BLANKS)
    headers = list(_HEADER.finditer(text))
    has_findings = any(_section_of(header) in CURRENT for header in headers)
    before: Section = "other" if any(_section_of(header) == "findings" for header in headers) else "findings"
    starts = [0, *(header.end() for header in headers)]
    ends = [*(header.start() for header in headers), len(text)]
    sections: list[Section] = [before, *map(_section_of, headers)]
    sentences: list[Sentence] = []
    for section, start, end in zip(sections, starts, ends, strict=True):
        # Without a header of its own, what is found follows the last header's paragraph.
        free = None if has_findings else _NEXT_PARAGRAPH.search(text, start, end)
        until = end if free is None else free.start()
        for place, (first, last) in (
            *((section, piece) for piece in _pieces(text, start, until)),
            *(("findings", piece) for piece in _pieces(text, until, end)),
        ):
            is_sentence = last - first <= MOST_IN_SENTENCE
            sentences.append(Sentence(place if is_sentence else "other", text[first:last], first))
    return tuple(sentences)


def _section_of(header: re.Match[str]) -> Section:
    return _SECTION_OF[re.sub(r"\s+", " ", header["line"] or header["capitals"] or header["inline"]).lower()]


def _pieces(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield first and last place of each sentence between two places."""
    first = start
    for boundary in _BOUNDARY.finditer(text, start, end):
        before = text[first : boundary.start()]
        if boundary[0][0] == "." and _ABBREVIATION.search(before):
            continue
        if boundary[0] == "\n" and _is_wrapped(text, boundary.start(), boundary.end()):
            continue
        yield from _trimmed(text, first, boundary.start())
        first = boundary.end()
    yield from _trimmed(text, first, end)


def _is_wrapped(text: str, position: int, after: int) -> bool:
    """Return whether a line goes on in the next one: it is long, or in capitals and ends in the midst of a phrase.

    No list item, label or blank line must follow.
    """
    line = text[text.rfind("\n", 0, position) + 1 : position]
    rest = text[after : after + 60]
    opens = re.match(r"[ \t]*(?:\n|(?:\d{1,2}[.)]|[-*•])[ \t]|[A-Z][\w /-]{0,40}:)", rest)
    goes_on = len(line) >= _SHORT_LINE or (not re.search(r"[a-z]", line) and _IN_A_PHRASE.search(line) is not None)
    return goes_on and opens is None


def _trimmed(text: str, first: int, last: int) -> Iterator[tuple[int, int]]:
    marker = _MARKER.match(text, first, last)
    first = marker.end() if marker else first
    last = first + len(text[first:last].rstrip())
    if re.search(r"\w", text[first:last]):
        yield first, last
