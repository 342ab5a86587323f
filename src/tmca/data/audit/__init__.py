"""Faults of a dataset before anyone trains on it: leaks between splits, broken pairs, sentences that do not fit.

Every file is read once; a few kilobytes of each case are kept and compared by the :data:`CHECKS`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tmca.data.audit.case_facts import CaseFacts, examine
from tmca.data.audit.cases import Cases, Copy
from tmca.data.audit.checks import CHECKS, SEVERITIES, Check, Severity
from tmca.data.audit.fingerprint import Fingerprint, fingerprint
from tmca.data.audit.similarity import (
    SAME_DETAIL,
    Candidate,
    detail_correlation,
    detail_view,
    find_candidates,
    oriented,
)
from tmca.data.manifest import Manifest
from tmca.errors import ConfigError, DataError
from tmca.imaging.reading import read_image
from tmca.progress import track

__all__ = ["CHECKS", "SCHEMA_VERSION", "SEVERITIES", "Audit", "Check", "Finding", "Severity", "audit"]

SCHEMA_VERSION = 1
"""Version of :meth:`Audit.as_dict`; raised whenever a field changes its meaning."""


@dataclass(frozen=True)
class Finding:
    """One fault.

    Attributes:
        check: Name of the check, a key of :data:`CHECKS`.
        severity: How bad it is.
        cases: Ids of the cases it is about.
        files: Paths as in the manifest, relative to its root.
        message: What was found, in one sentence.
        details: Numbers and words behind it; JSON values only.
    """

    check: str
    severity: Severity
    cases: tuple[str, ...]
    files: tuple[str, ...]
    message: str
    details: dict[str, Any]


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        dataset: Name of the manifest.
        cases: Number of cases.
        findings: All of them, by check in the order of :data:`CHECKS`.
        fingerprint: What the splits look like.
        token_limit: Tokens to which sentences are cut; ``None`` if none was given.
        seconds: How long it took.
    """

    dataset: str
    cases: int
    findings: tuple[Finding, ...]
    fingerprint: Fingerprint
    token_limit: int | None
    seconds: float

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that make training or scores wrong."""
        return self._of("error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings to look at."""
        return self._of("warning")

    @property
    def notes(self) -> tuple[Finding, ...]:
        """Facts to know."""
        return self._of("note")

    @property
    def by_check(self) -> dict[str, list[Finding]]:
        """Findings of each check that found something, in the order of :data:`CHECKS`."""
        grouped: dict[str, list[Finding]] = {}
        for finding in self.findings:
            grouped.setdefault(finding.check, []).append(finding)
        return grouped

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; the schema is told in ``docs/how-to/audit.md``."""
        grouped = self.by_check
        return {
            "schema_version": SCHEMA_VERSION,
            "dataset": self.dataset,
            "cases": self.cases,
            "seconds": round(self.seconds, 3),
            "token_limit": self.token_limit,
            "counts": {severity: len(self._of(severity)) for severity in SEVERITIES},
            "checks": [
                {
                    "name": check.name,
                    "severity": check.severity,
                    "finds": check.finds,
                    "why": check.why,
                    "advice": check.advice,
                    "findings": len(grouped.get(check.name, [])),
                }
                for check in CHECKS.values()
            ],
            "findings": [_json(dataclasses.asdict(finding)) for finding in self.findings],
            "fingerprint": _json(dataclasses.asdict(self.fingerprint)),
        }

    def _of(self, severity: Severity) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == severity)


def audit(
    manifest: Manifest,
    *,
    count_tokens: Callable[[list[str]], list[int]] | None = None,
    token_limit: int | None = None,
    workers: int = 2,
) -> Audit:
    """Look for the faults of :data:`CHECKS` in a dataset.

    A file that cannot be read is a finding and never the end of the audit. Memory grows by some four kilobytes a case.

    Args:
        manifest: The cases of all splits.
        count_tokens: Returns the number of tokens of each sentence, with the tokenizer that will be used.
        token_limit: Number of tokens to which a sentence will be cut.
        workers: Number of threads that read files.

    Raises:
        ConfigError: A token limit without a way to count tokens, or no worker.
    """
    if token_limit is not None and count_tokens is None:
        raise ConfigError("A token limit was given but no tokenizer", hint="pass count_tokens too")
    if workers < 1:
        raise ConfigError(f"{workers} workers, expected at least 1", hint="workers=2")
    started = time.perf_counter()
    records = manifest.records
    with ThreadPoolExecutor(workers) as pool:
        examined = pool.map(partial(examine, manifest), records)
        facts = list(track(examined, f"Reading {manifest.name}", len(records)))
        copies = _find_copies(manifest, facts, pool)
    token_counts = None
    if count_tokens is not None:
        sentences = list(manifest.sentences)
        token_counts = dict(zip(sentences, count_tokens(sentences), strict=True))
    cases = Cases(manifest, facts, copies, token_counts, token_limit, fingerprint(records, facts, token_counts))
    findings = [
        Finding(check.name, check.severity, hit.cases, hit.files, hit.message, hit.details)
        for check in CHECKS.values()
        for hit in check.run(cases)
    ]
    seconds = time.perf_counter() - started
    return Audit(manifest.name, len(records), tuple(findings), cases.fingerprint, token_limit, seconds)


def _find_copies(manifest: Manifest, facts: Sequence[CaseFacts], pool: ThreadPoolExecutor) -> list[Copy]:
    """Return pairs of cases whose images are copies without having the same pixels."""
    numbers = list(
        {case.pixel_hash: number for number, case in enumerate(facts) if case.thumbnail is not None}.values()
    )
    if len(numbers) < 2:
        return []
    thumbnails = np.stack([thumbnail for number in numbers if (thumbnail := facts[number].thumbnail) is not None])
    found = find_candidates(thumbnails)
    candidates = [dataclasses.replace(one, first=numbers[one.first], second=numbers[one.second]) for one in found]
    correlations = pool.map(partial(_correlate, manifest), candidates)
    tracked = track(correlations, f"Comparing {manifest.name}", len(candidates))
    pairs = zip(candidates, tracked, strict=True)
    return [Copy(candidate, correlation) for candidate, correlation in pairs if correlation >= SAME_DETAIL]


def _correlate(manifest: Manifest, candidate: Candidate) -> float:
    paths = [manifest.image_path(manifest.records[number]) for number in (candidate.first, candidate.second)]
    try:
        first, second = (detail_view(read_image(path)) for path in paths)
    except DataError:  # removed or changed since it was read
        return 0.0
    return detail_correlation(first, oriented(second, candidate.orientation), candidate.crop)


def _json(value: Any) -> Any:  # noqa: ANN401
    """Return tuples as lists, so that what is written is what is read."""
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, list | tuple) else value
