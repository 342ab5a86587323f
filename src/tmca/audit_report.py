"""The audit as a page with pictures, in one HTML file that loads nothing from elsewhere, and as a terminal table."""

from __future__ import annotations

import base64
import importlib.metadata
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.table import Table

from tmca.data.audit import CHECKS, SEVERITIES, Audit, Check, Finding, Severity
from tmca.data.audit.case_facts import stray_specks
from tmca.data.audit.fingerprint import Fingerprint, SplitFacts, Spread
from tmca.data.manifest import Manifest, Record
from tmca.errors import DataError
from tmca.files import write_text
from tmca.imaging.overlay import TRUTH_COLOUR, draw_overlay
from tmca.imaging.reading import read_image, read_mask
from tmca.progress import track

EXAMPLES = 12
"""Findings of one check that are drawn."""

LISTED = 200
"""Further findings of one check that are listed in words."""

PANELS = 4
"""Cases of one finding that are drawn."""

WIDEST_PANEL = 300
SPECK_COLOUR = (230, 40, 40)
_RING = 0.025

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Panel:
    """One picture of the page, with its words below it."""

    jpeg: str
    caption: str


@dataclass(frozen=True)
class Drawn:
    """One finding of the page with its pictures."""

    finding: Finding
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Section:
    """The findings of one check."""

    check: Check
    count: int
    drawn: tuple[Drawn, ...]
    listed: tuple[Finding, ...]
    left_out: int


def write_audit_report(audit: Audit, manifest: Manifest, path: Path | str, *, examples: int = EXAMPLES) -> Path:
    """Write the audit as one HTML file with pictures.

    Args:
        audit: What was found.
        manifest: The dataset it was found in, to draw its cases.
        path: The file to write.
        examples: How many findings of each check are drawn; all are in :meth:`tmca.data.audit.Audit.as_dict`.

    Returns:
        The path.

    Raises:
        StorageError: The file could not be written.
    """
    path = Path(path)
    records = {record.id: record for record in manifest.records}
    grouped = audit.by_check
    sections = [
        _section(CHECKS[name], findings, manifest, records, examples)
        for name, findings in track(grouped.items(), "Drawing findings", len(grouped))
    ]
    environment = Environment(loader=PackageLoader("tmca", "templates"), autoescape=True, trim_blocks=True)
    page = environment.get_template("audit.html.j2").render(
        audit=audit,
        verdict=verdict(audit),
        sections=sections,
        silent=[check for name, check in CHECKS.items() if name not in grouped],
        splits=list(audit.fingerprint.splits),
        facts=fingerprint_rows(audit.fingerprint),
        shifts=audit.fingerprint.shifts,
        truth_colour=TRUTH_COLOUR,
        root=manifest.root,
        version=importlib.metadata.version("tmca"),
    )
    write_text(path, page)
    return path


def audit_table(audit: Audit) -> Table:
    """Return how much each check found as a terminal table, the worst first; silent checks are left out."""
    table = Table(title=f"{audit.dataset}: {verdict(audit)}", title_justify="left", title_style="bold")
    table.add_column("check", no_wrap=True)
    table.add_column("severity")
    table.add_column("findings", justify="right")
    table.add_column("what to do")
    styles: dict[Severity, str] = {"error": "red", "warning": "yellow", "note": ""}
    for name, findings in audit.by_check.items():
        check = CHECKS[name]
        table.add_row(name, check.severity, str(len(findings)), check.advice, style=styles[check.severity])
    return table


def verdict(audit: Audit) -> str:
    """Return the outcome in one sentence."""
    counts = dict(zip(SEVERITIES, map(len, (audit.errors, audit.warnings, audit.notes)), strict=True))
    said = ", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items() if count)
    cases = f"{audit.cases} case{'s' * (audit.cases != 1)}"
    return f"{said} in {cases}" if said else f"nothing found in {cases}"


def fingerprint_rows(fingerprint: Fingerprint) -> list[tuple[str, list[str]]]:
    """Return the facts of the splits as rows of a table: what it is, and its value in each split."""
    rows: dict[str, Callable[[SplitFacts], str]] = {
        "cases": lambda facts: str(facts.cases),
        "patients, volumes or sequences": lambda facts: str(facts.patients) if facts.patients else "not named",
        "masks": lambda facts: str(facts.with_mask),
        "empty masks": lambda facts: str(facts.empty_masks),
        "image sizes (height × width)": _sizes,
        "grey values, lowest to highest": lambda facts: (
            "none" if facts.darkest is None else f"{facts.darkest} to {facts.brightest}"
        ),
        "brightness of an image, median": lambda facts: _median(facts.brightness),
        "contrast of an image, median": lambda facts: _median(facts.contrast),
        "foreground, median": lambda facts: _median(facts.foreground, share=True),
        "foreground, largest": lambda facts: (
            "none" if facts.foreground is None else f"{100 * facts.foreground.maximum:.1f} %"
        ),
        "sentences": lambda facts: str(facts.with_text),
        "different sentences": lambda facts: str(facts.distinct_sentences),
        "as many equally frequent ones": lambda facts: f"{facts.effective_sentences:.1f}",
        "cases whose sentence is not in train": lambda facts: (
            "" if facts.unseen_sentences is None else f"{100 * facts.unseen_sentences:.1f} %"
        ),
        "words in a sentence": lambda facts: _range(facts.words),
        "tokens in a sentence": lambda facts: _range(facts.tokens),
        "sources, by the names of the files": lambda facts: ", ".join(
            f"{name} {count}" for name, count in facts.sources.items()
        ),
    }
    return [(name, [cell(facts) for facts in fingerprint.splits.values()]) for name, cell in rows.items()]


def _sizes(facts: SplitFacts) -> str:
    listed = ", ".join(f"{size} ({count})" for size, count in facts.image_sizes.items())
    more = facts.distinct_image_sizes - len(facts.image_sizes)
    return f"{listed} and {more} more" if more else listed or "none"


def _median(spread: Spread | None, *, share: bool = False) -> str:
    if spread is None:
        return "none"
    return f"{100 * spread.median:.1f} %" if share else f"{spread.median:.0f}"


def _range(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.minimum:.0f} to {spread.maximum:.0f}, on average {spread.mean:.1f}"


def _section(
    check: Check, findings: Sequence[Finding], manifest: Manifest, records: dict[str, Record], examples: int
) -> Section:
    draw = _DRAWINGS.get(check.name)
    shown = findings[:examples] if draw else []
    drawn = []
    for finding in shown:
        panels = [
            panel
            for name in finding.cases[:PANELS]
            for panel in (draw(manifest, records[name]) if draw and name in records else ())
        ]
        drawn.append(Drawn(finding, tuple(panels)))
    rest = findings[len(shown) :]
    return Section(check, len(findings), tuple(drawn), tuple(rest[:LISTED]), max(0, len(rest) - LISTED))


def _draw_outlined(manifest: Manifest, record: Record) -> list[Panel]:
    """The image with its mask outlined."""
    image, mask = _image(manifest.image_path(record)), _mask(manifest, record)
    if image is None:
        return []
    fits = mask is not None and mask.shape == image.shape[:2]
    return [_panel(draw_overlay(image, None, mask if fits else None), _caption(record))]


def _draw_both(manifest: Manifest, record: Record) -> list[Panel]:
    """The image, and the same with its mask outlined."""
    image = _image(manifest.image_path(record))
    return [] if image is None else [_panel(image, "image"), *_draw_outlined(manifest, record)]


def _draw_files(manifest: Manifest, record: Record) -> list[Panel]:
    """The image, and the mask as a picture of its own."""
    path = manifest.mask_path(record)
    shown = ((_image(manifest.image_path(record)), record.image), (_image(path) if path else None, record.mask or ""))
    return [_panel(picture, name) for picture, name in shown if picture is not None]


def _draw_specks(manifest: Manifest, record: Record) -> list[Panel]:
    """The image with its mask outlined and every speck in a ring."""
    image, mask = _image(manifest.image_path(record)), _mask(manifest, record)
    if image is None or mask is None or mask.shape != image.shape[:2]:
        return []
    picture = Image.fromarray(draw_overlay(image, None, mask))
    pen = ImageDraw.Draw(picture)
    radius = _RING * max(mask.shape)
    for row, column in zip(*np.nonzero(stray_specks(mask)), strict=True):
        box = (column - radius, row - radius, column + radius, row + radius)
        pen.ellipse(box, outline=SPECK_COLOUR, width=max(1, round(radius / 5)))
    return [_panel(np.asarray(picture), _caption(record))]


def _caption(record: Record) -> str:
    place = f"{record.id}{f' ({record.split})' if record.split else ''}"
    return place if record.text is None else f"{place}: “{record.text}”"


def _panel(picture: Pixels, caption: str) -> Panel:
    image = Image.fromarray(picture)
    image.thumbnail((WIDEST_PANEL, WIDEST_PANEL))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return Panel(base64.b64encode(stream.getvalue()).decode("ascii"), caption)


def _image(path: Path) -> Pixels | None:
    try:
        return read_image(path)
    except DataError:
        return None


def _mask(manifest: Manifest, record: Record) -> NDArray[np.bool_] | None:
    path = manifest.mask_path(record)
    try:
        return None if path is None else read_mask(path)
    except DataError:
        return None


_DRAWINGS: dict[str, Callable[[Manifest, Record], Sequence[Panel]]] = {
    **dict.fromkeys(("size_mismatch", "transposed", "mask_not_binary"), _draw_files),
    **dict.fromkeys(
        (
            *("same_image_across_splits", "copy_across_splits", "patient_across_splits"),
            *("same_image_within_split", "copy_within_split", "blank_image"),
        ),
        _draw_outlined,
    ),
    **dict.fromkeys(
        (
            *(f"contradicted_{kind}" for kind in ("presence", "side", "height", "count", "size")),
            *("mask_full", "same_mask"),
        ),
        _draw_both,
    ),
    "stray_specks": _draw_specks,
    "mask_empty": _draw_outlined,
}
"""How the cases of a check are drawn; the findings of the others are words."""
