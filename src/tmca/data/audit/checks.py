"""The checks of an audit: leaks between splits, broken pairs, sentences that do not fit.

Each is one function in :data:`CHECKS`, which also says why it matters and what to do: the documentation and the report
are written from it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from tmca.data.audit.case_facts import CaseFacts
from tmca.data.audit.cases import Cases, Hit
from tmca.data.audit.fingerprint import effective_number
from tmca.data.grammar import unknown_words
from tmca.data.manifest import Record
from tmca.imaging.reading import is_image, split_frame

Severity = Literal["error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""Error: scores or training would be wrong. Warning: have a look. Note: a fact to know."""

FULL_SHARE = 0.99
"""Share of foreground from which a mask is full."""

FEWEST_SENTENCES = 4.0
"""Effective number of sentences below which they hardly tell cases apart."""

FOREIGN_SHARE = 0.5
"""Share of the distinct sentences from which words that are not known mean that the grammar is not."""

SPLITS = ("train", "val", "test")
"""What splits are called."""

SHIFT_DISTANCE = 0.3
"""Distance of two distributions from which a split counts as different from the training split."""

_FEWEST_JUDGED = 20
_SURE = 0.001
_NAMED = 4


def _unreadable(cases: Cases) -> Iterator[Hit]:
    for record, facts in cases:
        for name, error in ((record.image, facts.image_error), (record.mask, facts.mask_error)):
            if name is not None and error is not None:
                yield Hit(f"{record.id}: {error}", (record.id,), (name,), {"error": error})


def _size_mismatch(cases: Cases) -> Iterator[Hit]:
    for record, facts in cases:
        if _sizes_differ(facts) and not _is_transposed(facts):
            yield _sizes_hit(cases, record, facts, "")


def _transposed(cases: Cases) -> Iterator[Hit]:
    for record, facts in cases:
        if _sizes_differ(facts) and _is_transposed(facts):
            yield _sizes_hit(cases, record, facts, ": rows and columns are exchanged")


def _mask_not_binary(cases: Cases) -> Iterator[Hit]:
    for record, facts in cases:
        if facts.mask_problem is not None:
            yield cases.hit(f"{record.id}: {facts.mask_problem}", [record], masks=True, problem=facts.mask_problem)


def _same_image_across_splits(cases: Cases) -> Iterator[Hit]:
    return _same_images(cases, across=True)


def _same_image_within_split(cases: Cases) -> Iterator[Hit]:
    return _same_images(cases, across=False)


def _same_images(cases: Cases, *, across: bool) -> Iterator[Hit]:
    for group in cases.same_images:
        splits = cases.splits_of(group)
        if (len(splits) > 1) != across:
            continue
        records = [cases.manifest.records[number] for number in group]
        same_mask = len({cases.facts[number].mask_hash for number in group}) == 1
        same_text = len({record.text for record in records}) == 1
        differ = " and ".join(["masks"] * (not same_mask) + ["sentences"] * (not same_text))
        message = f"{_named(records)} are the same image" + (f"; their {differ} differ" if differ else "")
        yield cases.hit(message, records, masks=True, splits=splits, same_mask=same_mask, same_text=same_text)


def _copy_across_splits(cases: Cases) -> Iterator[Hit]:
    return _copies(cases, across=True)


def _copy_within_split(cases: Cases) -> Iterator[Hit]:
    return _copies(cases, across=False)


def _copies(cases: Cases, *, across: bool) -> Iterator[Hit]:
    for copy in cases.copies:
        candidate = copy.candidate
        records = [cases.manifest.records[number] for number in sorted((candidate.first, candidate.second))]
        splits = {record.split for record in records}
        if (len(splits) > 1) != across or (across and "" in splits):
            continue
        how = {"same": "", "turned": ", turned by 180°"}.get(
            candidate.orientation, f", mirrored {candidate.orientation}"
        )
        same_text = records[0].text == records[1].text
        differ = "" if same_text else "; their sentences differ"
        yield cases.hit(
            f"{_named(records)} are copies of one image{how}{differ} (correlation {copy.correlation:.2f})",
            records,
            masks=True,
            splits=list(dict.fromkeys(record.split for record in records)),
            same_text=same_text,
            correlation=round(copy.correlation, 3),
            orientation=candidate.orientation,
        )


def _patient_across_splits(cases: Cases) -> Iterator[Hit]:
    patients: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in cases.manifest.records:
        if not record.split:
            continue
        file, number = split_frame(record.image)
        if record.patient_id:
            patients["Patient", record.patient_id].append(record)
        elif number is not None:
            patients["Volume", str(file)].append(record)
    for (kind, name), records in patients.items():
        counts = Counter(record.split for record in records)
        if len(counts) > 1:
            spread = ", ".join(f"{count} in {split}" for split, count in counts.items())
            message = f"{kind} {name} has images in several splits: {spread}"
            yield cases.hit(message, records, patient=name, splits=counts)


def _unknown_split(cases: Cases) -> Iterator[Hit]:
    strange: dict[str, list[Record]] = defaultdict(list)
    for record in cases.manifest.records:
        if record.split not in ("", *SPLITS):
            strange[record.split].append(record)
    for split, records in strange.items():
        message = f"{len(records)} of {len(cases.facts)} cases are in a split called {split!r}"
        yield cases.hit(message, records, split=split)


def _contradicted(kind: str, cases: Cases) -> Iterator[Hit]:
    for record, facts in cases:
        for found in facts.contradictions:
            if found.kind == kind:
                message = f"{record.id}: the sentence says {found.said}, the mask shows {found.seen}"
                details: dict[str, Any] = {"text": record.text, "said": found.said, "seen": found.seen}
                yield cases.hit(message, [record], masks=True, **details)


def _missing_mask(cases: Cases) -> Iterator[Hit]:
    without = [record for record in cases.manifest.records if record.mask is None]
    if without and len(without) < len(cases.facts):
        yield cases.hit(f"{len(without)} of {len(cases.facts)} cases have no mask", without)


def _missing_text(cases: Cases) -> Iterator[Hit]:
    without = [record for record in cases.manifest.records if record.text is None]
    if without and len(without) < len(cases.facts):
        yield cases.hit(f"{len(without)} of {len(cases.facts)} cases have no sentence", without)


def _mask_full(cases: Cases) -> Iterator[Hit]:
    for record, facts in cases:
        if facts.foreground is not None and facts.foreground >= FULL_SHARE:
            message = f"{record.id}: the mask covers {100 * facts.foreground:.1f} % of the image"
            yield cases.hit(message, [record], masks=True, foreground=facts.foreground)


def _same_mask(cases: Cases) -> Iterator[Hit]:
    """Yield masks that lie beside several images; copies of an image, and images of one patient, may share theirs."""
    grouped: dict[bytes, dict[bytes, int]] = defaultdict(dict)
    for number, (_, facts) in enumerate(cases):
        if facts.mask_hash and facts.pixel_hash and facts.foreground and facts.foreground < FULL_SHARE:
            grouped[facts.mask_hash].setdefault(facts.pixel_hash, number)
    copies = {frozenset((copy.candidate.first, copy.candidate.second)) for copy in cases.copies}
    for group in grouped.values():
        images: list[int] = []
        for number in group.values():
            if not any(frozenset((number, other)) in copies for other in images):
                images.append(number)
        records = [cases.manifest.records[number] for number in images]
        patients = {record.patient_id or record.id for record in records}
        if len(patients) > 1:
            yield cases.hit(f"{_named(records)} are different images with one mask", records, masks=True)


def _mask_empty(cases: Cases) -> Iterator[Hit]:
    for record, facts in cases:
        if facts.foreground == 0 and facts.mask_problem is None:
            yield cases.hit(f"{record.id}: the mask is empty", [record], masks=True, text=record.text)


def _stray_specks(cases: Cases) -> Iterator[Hit]:
    for record, facts in cases:
        if facts.specks:
            few = len(facts.specks) == 1
            message = (
                f"{record.id}: the mask holds {len(facts.specks)} speck{'' if few else 's'} "
                f"({sum(facts.specks)} pixels) far from the rest"
            )
            yield cases.hit(message, [record], masks=True, specks=list(facts.specks), parts=facts.parts)


def _blank_image(cases: Cases) -> Iterator[Hit]:
    for record, facts in cases:
        if facts.is_blank:
            yield cases.hit(f"{record.id}: the image is one grey value", [record], brightness=facts.brightness)


def _orphan_file(cases: Cases) -> Iterator[Hit]:
    records = cases.manifest.records
    named = [name for record in records for name in (record.image, record.mask) if name is not None]
    known = {split_frame(name)[0].as_posix() for name in named}
    for folder in sorted({str(PurePosixPath(name).parent) for name in named}):
        path = cases.manifest.root / folder
        files = sorted(_files_in(path)) if path.is_dir() else []
        orphans = tuple(name for file in files if (name := str(PurePosixPath(folder) / file)) not in known)
        if orphans:
            shown = ", ".join(orphans[:_NAMED]) + (" …" if len(orphans) > _NAMED else "")
            yield Hit(f"{len(orphans)} of {len(files)} files in {folder} belong to no case: {shown}", (), orphans)


def _changed_file(cases: Cases) -> Iterator[Hit]:
    for record, facts in cases:
        if facts.changed:
            names = " and ".join(facts.changed)
            yield Hit(f"{record.id}: {names} changed since the manifest was written", (record.id,), facts.changed)


def _text_too_long(cases: Cases) -> Iterator[Hit]:
    if cases.token_counts is None or cases.token_limit is None:
        return
    for text, records in cases.by_sentence.items():
        count = cases.token_counts[text]
        if count > cases.token_limit:
            message = f"“{text}” has {count} tokens; the last {count - cases.token_limit} will be cut"
            yield cases.hit(message, records, text=text, tokens=count)


def _text_one_class(cases: Cases) -> Iterator[Hit]:
    texts = [record.text for record in cases.manifest.records if record.text is not None]
    number = effective_number(texts)
    if len(texts) >= _FEWEST_JUDGED and number < FEWEST_SENTENCES:
        text, count = Counter(texts).most_common(1)[0]
        message = (
            f"The sentences hardly tell cases apart: {count} of {len(texts)} are “{text}”; "
            f"effectively there are {number:.1f} sentences"
        )
        details: dict[str, Any] = {"text": text, "share": count / len(texts), "effective": number}
        yield cases.hit(message, cases.by_sentence[text], **details)


def _unknown_words(cases: Cases) -> Iterator[Hit]:
    unknown: dict[str, list[str]] = defaultdict(list)
    for text in cases.by_sentence:
        for word in dict.fromkeys(unknown_words(text)):
            unknown[word].append(text)
    concerned = {text for texts in unknown.values() for text in texts}
    total = len(cases.by_sentence)
    if total and len(concerned) >= FOREIGN_SHARE * total and total >= _FEWEST_JUDGED:
        records = [record for text in concerned for record in cases.by_sentence[text]]
        message = (
            f"{len(concerned)} of {total} distinct sentences follow no known grammar: of them only counts, sizes and "
            "places that can be told for sure were held against masks"
        )
        yield cases.hit(message, records, words=len(unknown))
        return
    for word, texts in unknown.items():
        records = [record for text in texts for record in cases.by_sentence[text]]
        message = f"“{word}” is not known, in {len(records)} sentence{'s' * (len(records) > 1)}, e.g. “{texts[0]}”"
        yield cases.hit(message, records, word=word, text=texts[0])


def _split_shift(cases: Cases) -> Iterator[Hit]:
    for shift in cases.fingerprint.shifts:
        if shift.distance >= SHIFT_DISTANCE and shift.p_value < _SURE:
            if shift.feature == "source":
                message = f"Other sources in {shift.split} than in train, by the names of the files"
            else:
                message = f"The distribution of {shift.feature} in {shift.split} is not that of train"
            yield Hit(f"{message} (distance {shift.distance:.2f} of 1)", details=dataclasses.asdict(shift))


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: Its name, stable.
        severity: How bad a finding is.
        finds: What it finds.
        why: Why that matters.
        advice: What to do about a finding.
        run: Yields the findings.
    """

    name: str
    severity: Severity
    finds: str
    why: str
    advice: str
    run: Callable[[Cases], Iterable[Hit]] = field(repr=False)


_ALL = (
    Check(
        "unreadable",
        "error",
        "an image or mask that is missing, damaged, cut off, or holds undefined pixels",
        "training stops at it",
        "copy the file again or remove its row",
        _unreadable,
    ),
    Check(
        "size_mismatch",
        "error",
        "an image and a mask of different size",
        "the mask marks other places than it was drawn on",
        "export the mask at the image's size",
        _size_mismatch,
    ),
    Check(
        "transposed",
        "error",
        "a mask whose height and width are those of its image exchanged",
        "the mask lies on its side",
        "exchange rows and columns of the mask, then look at it on the image: it may be mirrored too",
        _transposed,
    ),
    Check(
        "mask_not_binary",
        "error",
        "a mask of grey values, or of more classes than background and foreground",
        "what is foreground is a guess",
        "save the class to segment as 255 and everything else as 0",
        _mask_not_binary,
    ),
    Check(
        "same_image_across_splits",
        "error",
        "the same pixels in two splits, whatever the files are called",
        "the score is too good: the model has seen the answer",
        "keep the case in one split only",
        _same_image_across_splits,
    ),
    Check(
        "copy_across_splits",
        "error",
        "a re-encoded, resized, slightly cropped, brighter or mirrored copy in another split",
        "the score is too good: the model has seen the answer",
        "look at both; keep the copies in one split",
        _copy_across_splits,
    ),
    Check(
        "patient_across_splits",
        "error",
        "a patient, volume or sequence with images in several splits",
        "the score is too good: images of one patient resemble each other",
        "split by patient; if the split is published and must stay, say so beside the score",
        _patient_across_splits,
    ),
    Check(
        "contradicted_presence",
        "error",
        "a sentence that names a target beside an empty mask, or none beside a mask",
        "the model learns to ignore the sentence",
        "correct the sentence or the mask",
        partial(_contradicted, "presence"),
    ),
    Check(
        "contradicted_side",
        "warning",
        "left or right in the sentence, where the mask holds next to nothing",
        "the model learns the wrong side",
        "correct the sentence; check whether it means the patient's left or the image's",
        partial(_contradicted, "side"),
    ),
    Check(
        "contradicted_height",
        "warning",
        "a height in the sentence (top, lower …), where the mask holds next to nothing",
        "the model learns the wrong place",
        "correct the sentence: tmca data correct",
        partial(_contradicted, "height"),
    ),
    Check(
        "contradicted_count",
        "warning",
        "a number of targets that is not that of the mask's connected parts, small gaps and specks allowed for",
        "the sentence or the mask misses a target",
        "look which of them is right; if the mask: tmca data correct",
        partial(_contradicted, "count"),
    ),
    Check(
        "contradicted_size",
        "warning",
        "a size class far from the area in the mask",
        "the model learns sizes that mean nothing",
        "correct the sentence: tmca data correct",
        partial(_contradicted, "size"),
    ),
    Check(
        "unknown_split",
        "warning",
        "a split that is not called train, val or test",
        "training does not find its cases, and scoring only if it is told the name",
        "rename it in the column split, unless it is one of your own",
        _unknown_split,
    ),
    Check(
        "same_image_within_split",
        "warning",
        "the same pixels twice in one split",
        "the case counts twice; where masks or sentences differ, one of them is wrong",
        "remove one; look at the masks and sentences first",
        _same_image_within_split,
    ),
    Check(
        "copy_within_split",
        "warning",
        "a re-encoded, resized, slightly cropped, brighter or mirrored copy in the same split",
        "the case counts twice",
        "remove one unless both are wanted",
        _copy_within_split,
    ),
    Check(
        "missing_mask",
        "warning",
        "cases without a mask beside others with one",
        "they cannot be trained or scored on",
        "fill the column mask or remove the rows",
        _missing_mask,
    ),
    Check(
        "missing_text",
        "warning",
        "cases without a sentence beside others with one",
        "guided training refuses them",
        "fill the column text or remove the rows",
        _missing_text,
    ),
    Check(
        "text_too_long",
        "warning",
        "a sentence over the token limit of the tokenizer in use",
        "its end, often the place, is cut and never read",
        "shorten it or raise the limit",
        _text_too_long,
    ),
    Check(
        "text_one_class",
        "warning",
        "sentences so repeated that effectively fewer than four are left",
        "they tell the model next to nothing",
        "write what differs: place, side, count, size",
        _text_one_class,
    ),
    Check(
        "unknown_words",
        "warning",
        "words outside the known grammar, mostly misspelt",
        "a misspelt side or place is not learnt, and mirroring cannot exchange it",
        "correct the spelling; other wordings are no fault",
        _unknown_words,
    ),
    Check(
        "mask_full",
        "warning",
        "a mask that covers the whole image",
        "it may be inverted or a placeholder",
        "look at it",
        _mask_full,
    ),
    Check(
        "same_mask",
        "warning",
        "one mask beside images of different patients",
        "all but one of them were probably given another image's mask",
        "look at the masks on their images",
        _same_mask,
    ),
    Check(
        "stray_specks",
        "warning",
        "tiny parts of a mask far from the lesion",
        "a slip of the pen moves boxes, counts and surface distances",
        "erase them",
        _stray_specks,
    ),
    Check(
        "blank_image",
        "warning",
        "an image of one grey value",
        "there is nothing to see",
        "export it again",
        _blank_image,
    ),
    Check(
        "changed_file",
        "warning",
        "a file whose bytes are not those the manifest has the hash of",
        "scores cannot be compared with earlier ones",
        "restore the file, or import the dataset again",
        _changed_file,
    ),
    Check(
        "split_shift",
        "warning",
        "a split whose images, masks, sentences or sources are distributed unlike the training split's",
        "validation may then choose the wrong epoch, and its score says little about the test",
        "know it; report it; split by patient at random if the split is yours to choose",
        _split_shift,
    ),
    Check(
        "orphan_file",
        "note",
        "image files in the dataset's folders that no case names",
        "a row may be missing",
        "add a row, or leave it",
        _orphan_file,
    ),
    Check(
        "mask_empty",
        "note",
        "a mask without foreground",
        "right where there is no lesion; metrics treat such cases apart",
        "check that no lesion is there",
        _mask_empty,
    ),
)

CHECKS: dict[str, Check] = {check.name: check for check in _ALL}
"""Every check by its name, the worst first."""


def _sizes_differ(facts: CaseFacts) -> bool:
    return None not in (facts.image_size, facts.mask_size) and facts.image_size != facts.mask_size


def _is_transposed(facts: CaseFacts) -> bool:
    return facts.image_size is not None and facts.mask_size == facts.image_size[::-1]


def _sizes_hit(cases: Cases, record: Record, facts: CaseFacts, remark: str) -> Hit:
    sizes = {"image_size": list(facts.image_size or ()), "mask_size": list(facts.mask_size or ())}
    image, mask = (" × ".join(map(str, size)) for size in sizes.values())
    return cases.hit(f"{record.id}: the image is {image}, its mask {mask}{remark}", [record], masks=True, **sizes)


def _named(records: Sequence[Record]) -> str:
    names = [f"{record.id}{f' ({record.split})' if record.split else ''}" for record in records[:_NAMED]]
    if len(records) > _NAMED:
        return f"{', '.join(names)} and {len(records) - _NAMED} more"
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _files_in(folder: Path) -> Iterator[str]:
    return (file.name for file in folder.iterdir() if file.is_file() and is_image(file))
