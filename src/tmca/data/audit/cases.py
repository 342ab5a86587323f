"""What the checks of an audit look at, and what they yield."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tmca.data.audit.case_facts import CaseFacts
from tmca.data.audit.fingerprint import Fingerprint
from tmca.data.audit.similarity import Candidate
from tmca.data.manifest import Manifest, Record


@dataclass(frozen=True)
class Hit:
    """A finding that does not know its check yet."""

    message: str
    cases: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Copy:
    """Two cases whose images are copies, by their numbers, and how well their details correlate."""

    candidate: Candidate
    correlation: float


@dataclass(frozen=True)
class Cases:
    """All that the checks look at."""

    manifest: Manifest
    facts: Sequence[CaseFacts]
    copies: Sequence[Copy]
    token_counts: Mapping[str, int] | None
    token_limit: int | None
    fingerprint: Fingerprint

    def __iter__(self) -> Iterator[tuple[Record, CaseFacts]]:
        return iter(zip(self.manifest.records, self.facts, strict=True))

    @cached_property
    def by_sentence(self) -> dict[str, list[Record]]:
        """The cases of each distinct sentence."""
        grouped: dict[str, list[Record]] = defaultdict(list)
        for record in self.manifest.records:
            if record.text is not None:
                grouped[record.text].append(record)
        return grouped

    @cached_property
    def same_images(self) -> list[list[int]]:
        """Numbers of the cases that show the same pixels, from different files or in different splits.

        A case in no split is no copy of one that is in a split: it is used for nothing.
        """
        grouped: dict[bytes, list[int]] = defaultdict(list)
        for number, facts in enumerate(self.facts):
            if facts.pixel_hash is not None and not facts.is_blank:
                grouped[facts.pixel_hash].append(number)
        groups = [
            [number for number in group if self.manifest.records[number].split] or group for group in grouped.values()
        ]
        return [group for group in groups if len(self._files(group)) > 1 or len(self.splits_of(group)) > 1]

    def splits_of(self, numbers: Iterable[int]) -> list[str]:
        """The splits of some cases, each once, in order of appearance."""
        return list(dict.fromkeys(self.manifest.records[number].split for number in numbers))

    def hit(self, message: str, records: Iterable[Record], *, masks: bool = False, **details: Any) -> Hit:  # noqa: ANN401
        """A finding on some cases with their images, or their images and masks."""
        chosen = list(records)
        names = [name for record in chosen for name in ((record.image, record.mask) if masks else (record.image,))]
        files = tuple(dict.fromkeys(name for name in names if name is not None))
        return Hit(message, tuple(record.id for record in chosen), files, details)

    def _files(self, numbers: Iterable[int]) -> set[str]:
        return {self.manifest.records[number].image for number in numbers}
