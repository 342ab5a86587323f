"""A report's prompt for the terminal: the facts with their words, and the report with these words marked."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tmca.reports.prompt import NOTHING, ReportPrompt

OPEN, CLOSE = "«", "»"
"""What evidence stands between, so that it shows without colours as well."""


def in_words(result: ReportPrompt) -> str:
    """Return the prompt, or that there is none, and how sides were read."""
    lines = [result.prompt if result.prompt is not None else f"No prompt: {NOTHING}."]
    return "\n".join([*lines, f"Found by {result.method}. {result.conversion}"])


def evidence_table(result: ReportPrompt) -> Table:
    """Return a row for each fact and value, with the report's words."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("fact", "value", "the report's words"):
        table.add_column(heading, overflow="fold")
    words: dict[tuple[str, str], dict[str, None]] = {}
    for item in result.evidence:
        words.setdefault((item.fact, item.value), {})[" ".join(item.text.split())] = None
    for (fact, value), texts in words.items():
        table.add_row(fact, value, Text("; ".join(f"{OPEN}{text}{CLOSE}" for text in texts)))
    return table


def marked_report(result: ReportPrompt) -> Text:
    """Return the report with its evidence between quotation marks and in bold."""
    text, last = Text(), 0
    for start, end in _merged(result):
        text.append(result.report[last:start])
        text.append(f"{OPEN}{result.report[start:end]}{CLOSE}", style="bold green")
        last = end
    text.append(result.report[last:].rstrip())
    return text


def page(result: ReportPrompt) -> RenderableType:
    """Return everything: prompt, evidence, the marked report, and what was left out."""
    parts: list[RenderableType] = [Text(in_words(result)), Text()]
    if result.evidence:
        parts += [evidence_table(result), Text()]
    parts.append(marked_report(result))
    notes = [note for note in result.notes if note != NOTHING]
    if notes:
        parts += [Text(), *(Text(f"- {note}") for note in notes)]
    return Group(*parts)


def _merged(result: ReportPrompt) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted({(item.start, item.end) for item in result.evidence}):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
