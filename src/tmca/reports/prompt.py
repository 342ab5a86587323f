"""A report of many sentences → the short sentence of the model's grammar, with the words that prove it.

Nothing is stated that the report does not state: what is denied, past, uncertain or contradicted is left out and told
of in a note, as is what the grammar has no word for (millimetres, lobes).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from tmca.data.grammar import GRAMMARS, PLACES, SIDES, SIZES, THIRDS, Facts, Grammar, write_sentence
from tmca.errors import DataError, unknown_name
from tmca.reports.findings import TARGETS, Mention, find_mentions, names_one_more
from tmca.reports.places import Span
from tmca.reports.sections import CURRENT, Section, Sentence, split_report

Sides = Literal["patient", "image"]
Method = Literal["rules", "language model"]

MOST_CHARACTERS = 100_000
"""Length up to which a report is read."""

NOTHING = "the report names no finding"
"""What a result without a prompt says first."""

DEFAULT_SIDES: dict[Grammar, Sides] = {"lung": "patient", "polyp": "image", "phantom": "image"}
"""Whose left and right a report's words mean, unless told."""

_COMMON_WORDS = {
    "English": "the of and is are was were with there without from this which has have been not no seen right left "
    "both lung lungs in normal clear at on a an",
    "German": "der das und sind kein keine nicht mit im links rechts ohne eine einen wurde zeigt",
    "French": "le les du est pas aucune avec dans gauche droite une sans au aux",
    "Spanish": "el los las del una izquierda derecha sin se en ningún ninguna hay",
    "Italian": "il della nel nella sinistra destra polmone senza",
    "Dutch": "het een geen niet van naar linker rechter met",
    "Portuguese": "não sem uma esquerda direita do da dos",
}
_ENGLISH = frozenset(_COMMON_WORDS["English"].split())
_FOREIGN = frozenset(word for language in _COMMON_WORDS.values() for word in language.split()) - _ENGLISH
_WORD = re.compile(r"[^\W\d_]+")
_CT = re.compile(r"\b(?:CT|HRCT|computed\s+tomograph\w+|tomogram)\b")
_CT_ELSEWHERE = re.compile(
    r"\b(?:recommend\w*|suggest\w*|advis\w*|prior|previous|earlier|compar\w*|since|further|last|yesterday|ago)\b",
    re.IGNORECASE,
)
_BROAD = re.compile(r"pneumonia|infection|air[\s-]?space|opacit|infiltrat|polyp|adenoma|lesion", re.IGNORECASE)
_ABOUT_LUNGS = re.compile(
    rf"\b(?:lungs?|chest|thorax|pulmonary|pleural?|pneumothorax|hilar|zones?|lobes?|[RL][UML]L|{TARGETS['lung']})\b",
    re.IGNORECASE,
)
_ABOUT_BOWEL = re.compile(
    r"\b(?:polyp\w*|colon\w*|rect\w+|sigmoid|c(?:a?e)cum|endoscop\w+|adenomas?|bowel|ileum)\b", re.IGNORECASE
)
_ABOUT_PHANTOMS = re.compile(r"\b(?:lesions?|bright|dark)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Evidence:
    """Words of the report that state a fact.

    Attributes:
        fact: present, count, size, colour, shape, place, side, third or bilateral.
        value: What is stated; a side, place or third is one of the image.
        text: The words.
        start: Their first character in the report.
        end: The character after their last.
    """

    fact: str
    value: str
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class ReportPrompt:
    """What a report states now, as the sentence for a model.

    Attributes:
        report: The report, to which the evidence points.
        prompt: The sentence; ``None`` where the report names no finding.
        facts: What the sentence states; ``present`` is false where the report denies every finding.
        evidence: The words that state each fact.
        notes: What was left out and why, and how sides were read.
        sides: Whose left and right the report's words were taken for.
        method: How the findings were found.
    """

    report: str
    prompt: str | None
    facts: Facts
    evidence: tuple[Evidence, ...]
    notes: tuple[str, ...]
    sides: Sides
    method: Method = "rules"

    @property
    def conversion(self) -> str:
        """How the report's left and right became the prompt's."""
        if self.facts.grammar != "lung":
            return "Places: only words on the image, and the clock; no side was exchanged."
        if self.sides == "image":
            return "Sides: the report's left and right were taken for the image's."
        return (
            "Sides: the report's left and right were taken for the patient's, which a frontal film and an axial slice "
            "show on the image's right and left; the prompt names the image's."
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON: without the report's text, but with the words of the evidence."""
        facts = {name: value for name, value in asdict(self.facts).items() if value is not None and value != ()}
        return {
            "prompt": self.prompt,
            "facts": facts,
            "evidence": [asdict(item) for item in self.evidence],
            "notes": list(self.notes),
            "sides": self.sides,
            "conversion": self.conversion,
            "method": self.method,
        }


@dataclass
class _Draft:
    """Facts while they are gathered: values by fact and section, each with its evidence."""

    report: str
    values: dict[tuple[str, Section], dict[str, list[Span]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)

    def add(self, fact: str, section: Section, value: str, span: Span) -> None:
        self.values.setdefault((fact, section), {}).setdefault(value, []).append(span)

    def reconciled(self, fact: str, name: str) -> list[str]:
        """Return the values of a fact on which findings and impression agree.

        An impression may say less than the findings; what it adds to them, or says in their place, is contradicted.
        """
        found = self.values.get((fact, "findings"), {})
        concluded = self.values.get((fact, "impression"), {})
        if not found or not concluded:
            return [*found, *concluded]
        agreed = [value for value in found if value in concluded]
        added = [value for value in concluded if value not in found]
        if added:
            self.contradicted(name, ", ".join(found), ", ".join(concluded))
        if added and not agreed:
            return []
        return list(found)

    def contradicted(self, name: str, first: str, second: str) -> None:
        self.notes.append(f"contradiction: {name} is {first} in one place and {second} in another; left out")
        self.refused.add(name)

    def evidence(self, fact: str, values: Iterable[str], shown: str = "") -> list[Evidence]:
        kept = set(values)
        spans = sorted(
            {
                (span, value)
                for (name, _), stated in self.values.items()
                if name == fact
                for value, places in stated.items()
                if value in kept
                for span in places
            }
        )
        return [Evidence(shown or fact, value, self.report[start:end], start, end) for (start, end), value in spans]


def prompt_from_report(text: str, grammar: Grammar, *, sides: Sides | None = None) -> ReportPrompt:
    """Return the sentence of a grammar that says what a report states now, by rules.

    The same report gives the same result. English only.

    Args:
        text: The report.
        grammar: The grammar of the sentences that the model was trained on.
        sides: Whether the report's left and right are the patient's, which a chest film or an axial slice shows on the
            other side, or the image's; by default the patient's for lungs and the image's otherwise.

    Raises:
        ConfigError: The grammar or whose sides does not exist.
        DataError: The report is blank, longer than :data:`MOST_CHARACTERS` or not English.
    """
    if grammar not in GRAMMARS:
        raise unknown_name("grammar", grammar, GRAMMARS)
    if sides not in (None, "patient", "image"):
        raise unknown_name("side", sides, ("patient", "image"))
    check_report(text)
    sentences = split_report(text)
    return state(text, find_mentions(sentences, grammar), grammar, sides or DEFAULT_SIDES[grammar], sentences)


def check_report(text: str) -> None:
    """Refuse what is no English report.

    Raises:
        DataError: The report is blank, too long, binary or not English.
    """
    if not text.strip():
        raise DataError("The report is empty", hint="give a file or a text with the report's sentences")
    if len(text) > MOST_CHARACTERS:
        raise DataError(
            f"The report has {len(text)} characters, at most {MOST_CHARACTERS} are read", hint="give one report alone"
        )
    if "\0" in text:
        raise DataError("The report is no text: it holds zero bytes", hint="save it as a plain UTF-8 text file")
    words = [word.lower() for word in _WORD.findall(text)]
    english, foreign = (sum(word in known for word in words) for known in (_ENGLISH, _FOREIGN))
    named = any(re.search(rf"\b(?:{pattern})\b|\b[RL][UML]L\b", text, re.IGNORECASE) for pattern in TARGETS.values())
    if foreign > english or not (english or named):
        raise DataError("The report does not read as English", hint="the rules read English; translate the report")


def grammar_of_report(text: str) -> Grammar:
    """Return the grammar whose subject a report names most often; polyps where it names none."""
    counts: dict[Grammar, int] = {
        "lung": len(_ABOUT_LUNGS.findall(text)),
        "polyp": len(_ABOUT_BOWEL.findall(text)),
        "phantom": len(_ABOUT_PHANTOMS.findall(text)),
    }
    order: tuple[Grammar, ...] = ("polyp", "lung", "phantom")
    return max(order, key=lambda name: counts[name])


def state(
    text: str,
    mentions: Sequence[Mention],
    grammar: Grammar,
    sides: Sides,
    sentences: Sequence[Sentence],
    method: Method = "rules",
) -> ReportPrompt:
    """Return the sentence for the mentions of a report.

    Args:
        text: The report.
        mentions: What :func:`tmca.reports.findings.find_mentions` found in it.
        grammar: Of the sentence.
        sides: Whose left and right the report's words are.
        sentences: The report's sentences.
        method: How the mentions were chosen.
    """
    draft = _Draft(text)
    affirmed = [mention for mention in mentions if mention.status == "affirmed" and not mention.cause]
    _note_left_out(draft, mentions)
    _note_not_read(draft, sentences, grammar)
    present = _presence(draft, mentions, affirmed)
    if not present:
        facts = Facts(grammar, present=False, count=0) if present is False else Facts(grammar)
        denials = [item.proof for item in mentions if item.status == "negated"] if present is False else []
        evidence = tuple(Evidence("present", "false", text[start:end], start, end) for start, end in denials)
        notes = (NOTHING, *dict.fromkeys(draft.notes))
        return ReportPrompt(text, None, facts, evidence, notes, sides, method)
    for mention in affirmed:
        draft.add("present", mention.section, "true", mention.span)
    facts = Facts(grammar, present=True, count=_count(draft, affirmed, grammar, one_more=names_one_more(sentences)))
    if grammar == "lung":
        facts = _lung_facts(draft, facts, mentions, affirmed, sides, is_slice=_is_slice(sentences))
    else:
        facts = _target_facts(draft, facts, affirmed)
    return ReportPrompt(
        text,
        write_sentence(facts, "p6"),
        facts,
        tuple(_all_evidence(draft, facts)),
        tuple(dict.fromkeys(draft.notes)),
        sides,
        method,
    )


def _note_left_out(draft: _Draft, mentions: Sequence[Mention]) -> None:
    reasons = {
        "negated": "denied",
        "resolved": "resolved",
        "uncertain": "uncertain",
        "historical": "of the past",
        "sought": "only looked for",
    }
    for mention in mentions:
        if mention.cause:
            draft.notes.append(f"not an infection: {mention.words!r}, {mention.cause!r}")
        elif mention.status != "affirmed" and not mention.is_normal:
            cue = f" ({mention.cue!r})" if mention.cue else ""
            draft.notes.append(f"{reasons[mention.status]}: {mention.words!r}{cue}")


def _note_not_read(draft: _Draft, sentences: Sequence[Sentence], grammar: Grammar) -> None:
    for sentence in sentences:
        named = re.search(rf"\b(?:{TARGETS[grammar]})\b", sentence.text, re.IGNORECASE)
        if named and sentence.section == "addendum":
            draft.notes.append("an addendum names the finding: it stands in place of what the report says before")
        if sentence.section not in CURRENT and named:
            draft.notes.append(f"not read: {named[0]!r} under {sentence.section}")


def _presence(draft: _Draft, mentions: Sequence[Mention], affirmed: Sequence[Mention]) -> bool | None:
    """Return whether the report states a finding, denies every one, or does neither."""
    denials = [item for item in mentions if item.status == "negated" and item.is_everywhere]
    if affirmed:
        stems = {_stem(mention) for mention in affirmed}
        for denial in denials:
            if (_is_broad(denial) or _stem(denial) in stems) and not denial.is_typed and not denial.leaves_rest:
                first, second = draft.report[slice(*affirmed[0].span)], draft.report[slice(*denial.span)]
                draft.contradicted("presence", repr(first), f"{second!r} denied")
                return None
        return True
    if any(mention.status == "uncertain" for mention in mentions):
        draft.notes.append("what the report calls possible is not stated")
        return None
    return False if any(not denial.is_typed for denial in denials) else None


def _is_broad(mention: Mention) -> bool:
    """Return whether a denial means any infection or polyp, not one kind of opacity."""
    return mention.is_normal or _BROAD.search(mention.words) is not None


def _stem(mention: Mention) -> str:
    return re.sub(r"(?:ies|y|s)$", "", mention.words.lower().split()[-1])


def _count(draft: _Draft, affirmed: Sequence[Mention], grammar: Grammar, *, one_more: bool) -> int | None:
    """Return how many targets the report states, if it states one number."""
    if any(mention.in_part for mention in affirmed):
        draft.notes.append("no count: the report says something else of some of them")
        return None
    known: set[int] = set()
    least = 1
    for section in CURRENT:
        counts, several = _counts_of([mention for mention in affirmed if mention.section == section])
        if several > 1:
            least = max(least, several)
            if counts or grammar != "lung":
                draft.notes.append(f"no count: the {section} name several findings one by one, and no total")
        elif counts and one_more:
            draft.notes.append("no count: the report speaks of one more")
            return None
        else:
            known |= counts
    for mention in affirmed:
        for item in mention.stated:
            if item.fact == "count":
                draft.add("count", mention.section, item.value, item.span)
    if known == {1} and any(mention.is_plural for mention in affirmed):
        draft.contradicted("count", "one", "more than one")
        return None
    return _agreed_count(draft, known, least)


def _agreed_count(draft: _Draft, known: set[int], least: int) -> int | None:
    """Return the number that all sections give, unless more findings than that are named one by one."""
    if len(known) > 1:
        draft.contradicted("count", str(min(known)), str(max(known)))
        return None
    return next((count for count in known if count >= least), None)


def _counts_of(found: Sequence[Mention]) -> tuple[set[int], int]:
    """Return the numbers that a section gives, and how many findings it names apart from each other."""
    totals = [mention for mention in found if mention.is_total and mention.count is not None]
    if totals:
        return {mention.count for mention in totals if mention.count is not None}, 1
    counted = [mention for mention in found if mention.count is not None]
    others = [
        mention for mention in found if mention.count is None and not mention.is_known and _is_another(mention, counted)
    ]
    numbers = {mention.count for mention in counted if mention.count is not None}
    repeats = len(numbers) == 1 and not others and all(mention.is_known for mention in counted[1:])
    return numbers, 1 if repeats else len(counted) + len(others)


def _is_another(mention: Mention, counted: Sequence[Mention]) -> bool:
    """Return whether an uncounted finding is one more: it lies elsewhere, or cannot be the counted one."""
    if mention.is_further:
        return True
    if not counted:
        return True
    places = {item.sides + item.thirds for other in counted for item in other.located}
    if mention.located:
        return any(item.sides + item.thirds not in places for item in mention.located)
    return False


def _is_slice(sentences: Sequence[Sentence]) -> bool:
    """Return whether the report is on computed tomography, whose slices show no height of the lung."""
    return any(
        _CT.search(sentence.text) and not _CT_ELSEWHERE.search(sentence.text)
        for sentence in sentences
        if sentence.section in ("technique", "findings")
    )


def _lung_facts(
    draft: _Draft,
    facts: Facts,
    mentions: Sequence[Mention],
    affirmed: Sequence[Mention],
    sides: Sides,
    *,
    is_slice: bool,
) -> Facts:
    for mention in affirmed:
        _add_located(draft, mention, sides, is_slice=is_slice)
    kept = draft.reconciled("side", "side")
    denied = _denied_sides(mentions, sides)
    for side in [side for side in kept if side in denied]:
        draft.contradicted("side", f"the image's {side}", "denied there")
        kept.remove(side)
    chosen = tuple(side for side in SIDES if side in kept)
    thirds: dict[str, tuple[str, ...]] = dict.fromkeys(SIDES, ())
    for side in chosen:
        named = draft.reconciled(f"third {side}", f"third of the image's {side} lung")
        thirds[side] = tuple(third for third in THIRDS if third in named)
    bilateral: bool | None = True if len(chosen) == 2 else None
    unilateral = draft.values.get(("unilateral", "findings"), {}) | draft.values.get(("unilateral", "impression"), {})
    if bilateral and unilateral:
        draft.contradicted("bilateral", "both lungs", "unilateral")
        bilateral = None
    elif len(chosen) == 1 and "side" not in draft.refused:
        other = SIDES[1 - SIDES.index(chosen[0])]
        spans = _rest_denied(mentions, other, sides)
        if spans or unilateral:
            bilateral = False
            for span in spans:
                draft.add("bilateral", "findings", "false", span)
    return replace(facts, bilateral=bilateral, sides=chosen, left=thirds["left"], right=thirds["right"])


def _in_image(side: str, sides: Sides, *, of_image: bool) -> str:
    return side if sides == "image" or of_image else SIDES[1 - SIDES.index(side)]


def _add_located(draft: _Draft, mention: Mention, sides: Sides, *, is_slice: bool) -> None:
    for item in mention.stated:
        if item.fact == "bilateral":
            draft.add("unilateral", mention.section, item.value, item.span)
    for place in mention.located:
        words = draft.report[slice(*place.span)]
        for word in place.sides:
            side = _in_image(word, sides, of_image=place.of_image)
            draft.add("side", mention.section, side, place.span)
            if sides == "patient" and not place.of_image and len(place.sides) == 1:
                draft.notes.append(f"sides: the patient's {word} is the image's {side}")
            for third in () if is_slice else place.thirds:
                draft.add(f"third {side}", mention.section, third, place.span)
        if place.lobe:
            draft.notes.append(f"lobe: {words!r} is no third of the image; of it only the side is stated")
        if place.thirds and is_slice:
            draft.notes.append(f"height: {words!r} is left out, as a slice of computed tomography does not show it")
        elif place.thirds and not place.sides:
            draft.notes.append(f"height: {words!r} is left out, as it names no side")


def _denied_sides(mentions: Sequence[Mention], sides: Sides) -> set[str]:
    """Return the sides of the image of which the report says that there is nothing at all."""
    return {
        _in_image(word, sides, of_image=place.of_image)
        for mention in mentions
        if mention.status == "negated" and not mention.leaves_rest and _is_broad(mention)
        for place in mention.located
        if not place.thirds and not place.lobe
        for word in place.sides
    }


def _rest_denied(mentions: Sequence[Mention], other: str, sides: Sides) -> list[Span]:
    """Return the words by which the other lung is free."""
    spans = []
    for mention in mentions:
        if mention.status != "negated":
            continue
        here = {
            _in_image(word, sides, of_image=place.of_image)
            for place in mention.located
            if not place.thirds and not place.lobe
            for word in place.sides
        }
        everywhere = mention.leaves_rest and not mention.located and mention.is_normal
        if other in here or everywhere:
            spans.append(mention.proof)
    return spans


def _target_facts(draft: _Draft, facts: Facts, affirmed: Sequence[Mention]) -> Facts:
    for mention in affirmed:
        for item in mention.stated:
            if item.fact != "count":
                draft.add(item.fact, mention.section, item.value, item.span)
        for place in mention.located:
            if place.place is not None:
                draft.add("place", mention.section, place.place, place.span)
        for start, end in mention.lengths:
            draft.notes.append(
                f"size: {draft.report[start:end]!r} is left out, as the model's sizes are shares of the image, which "
                "millimetres do not give"
            )
    sizes = draft.reconciled("size", "size")
    places = draft.reconciled("place", "place")
    if facts.count == 1 and len(sizes) > 1:
        draft.contradicted("size", sizes[0], sizes[1])
        sizes = []
    if facts.count == 1 and len(places) > 1:
        draft.contradicted("place", places[0], places[1])
        places = []
    return replace(
        facts,
        sizes=tuple(size for size in SIZES if size in sizes),
        colour=_single(draft, "colour"),
        shape=_single(draft, "shape"),
        places=tuple(place for place in PLACES if place in places),
    )


def _single(draft: _Draft, fact: str) -> str | None:
    """Return the one value of a fact of which a sentence states one only."""
    values = draft.reconciled(fact, fact)
    if len(values) > 1:
        draft.notes.append(f"{fact}: the report names {' and '.join(values)}, a sentence can state one; left out")
    return values[0] if len(values) == 1 else None


def _all_evidence(draft: _Draft, facts: Facts) -> Iterable[Evidence]:
    yield from draft.evidence("present", ["true"])
    if facts.count is not None:
        yield from draft.evidence("count", [str(facts.count)])
    yield from draft.evidence("size", facts.sizes)
    yield from draft.evidence("colour", [facts.colour] if facts.colour else [])
    yield from draft.evidence("shape", [facts.shape] if facts.shape else [])
    yield from draft.evidence("place", facts.places)
    yield from draft.evidence("side", facts.sides)
    for side in SIDES:
        for item in draft.evidence(f"third {side}", facts.thirds(side), "third"):
            yield replace(item, value=f"{item.value} {side}")
    if facts.bilateral:
        for item in draft.evidence("side", facts.sides):
            yield replace(item, fact="bilateral", value="true")
    elif facts.bilateral is False:
        yield from draft.evidence("bilateral", ["false"])
        yield from draft.evidence("unilateral", ["false"], "bilateral")
