"""A reproduced table as terminal table, Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.table import Table as TerminalTable

from tmca.reproduction import Reproduction, RowResult
from tmca.reproduction.tables import DATASETS, NOTES, Printed, paper_dataset

SCORES = (
    ("Jaccard", "pooled", "jaccard"),
    ("Dice", "pooled", "dice"),
    ("accuracy", "pooled", "accuracy"),
    ("per-case Dice", "per_case_mean", "dice"),
)
"""Heading, protocol and name of our columns."""

PROTOCOLS = {"pooled": "pooled", "per_case": "per case"}


@dataclass(frozen=True)
class Line:
    """One line of the table, as text.

    Attributes:
        group: Heading above it.
        label: The method, with the marks of its notes.
        ours: Our scores in percent, mean and spread over seeds, in the order of :data:`SCORES`.
        shuffled: How many points of pooled Dice another image's sentence costs.
        runs: Number of runs.
        paper: The paper's Jaccard and Dice in percent, and their definition.
    """

    group: str
    label: str
    ours: tuple[str, ...]
    shuffled: str
    runs: str
    paper: tuple[str, str, str]


def table_lines(result: Reproduction) -> tuple[list[Line], list[str]]:
    """Return the lines of a table, and the notes below it in the order of their marks."""
    dataset = paper_dataset(result.dataset)
    marks: dict[str, int] = {}
    lines = []
    for row in result.rows:
        printed = row.row.printed.get(dataset)
        notes = [*row.row.notes]
        if printed is None:
            notes = [name for name in notes if name not in ("other_split", "text_encoder")]
        elif printed.protocol == "per_case":
            notes.append("per_case")
        numbers = [str(marks.setdefault(name, len(marks) + 1)) for name in notes]
        label = row.row.label + (f" ({', '.join(numbers)})" if numbers else "")
        lines.append(Line(row.row.group, label, _ours(row), _shuffled(row), str(len(row.entries)), _paper(printed)))
    return lines, [NOTES[name] for name in marks]


def headings(result: Reproduction) -> list[str]:
    """Return the headings of the columns."""
    ours = [name for name, _, _ in SCORES]
    return ["method", *ours, "other sentence", "runs", *_paper_headings(result)]


def _paper_headings(result: Reproduction) -> list[str]:
    return ["paper: Jaccard", "paper: Dice", "paper's definition"] if _in_paper(result) else []


def _in_paper(result: Reproduction) -> bool:
    dataset = paper_dataset(result.dataset)
    return any(dataset in row.row.printed for row in result.rows)


def _values(result: Reproduction, line: Line) -> list[str]:
    return [line.label, *line.ours, line.shuffled, line.runs, *(line.paper if _in_paper(result) else ())]


def caption(result: Reproduction) -> str:
    """Return the title of a table: what, on which data, how large."""
    name = DATASETS.get(paper_dataset(result.dataset), result.dataset)
    return f"{result.table.title}, on {name}, scale {result.scale}, percent"


def terminal_table(result: Reproduction) -> TerminalTable:
    """Return the table for a terminal: as in Markdown, less what a note says already or the paper's table has not."""
    table = TerminalTable(
        title=caption(result), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    left_out = {"paper's definition"} | ({"accuracy"} if result.table.name == "table1" else set())
    names = headings(result)
    shown = [index for index, name in enumerate(names) if name not in left_out]
    lines, _ = table_lines(result)
    rows = [[_values(result, line)[index] for index in shown] for line in lines]
    for index in shown:
        # Two words of a heading stand on two lines: a table as narrow as its numbers.
        heading = names[index].replace(" ", "\n", 1)
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for index, (line, row) in enumerate(zip(lines, rows, strict=True)):
        last = index + 1 == len(lines) or lines[index + 1].group != line.group
        table.add_row(*row, end_section=last)
    return table


def markdown_table(result: Reproduction) -> str:
    """Return the table in Markdown."""
    lines, _ = table_lines(result)
    names = headings(result)
    rows = [names, ["---", *["---:"] * (len(names) - 1)], *(_values(result, line) for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def csv_table(result: Reproduction) -> str:
    """Return one CSV row a run: fractions, not percent."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = [f"{protocol}_{name}" for _, protocol, name in SCORES]
    writer.writerow(["method", "preset", "seed", *names, "shuffled_pooled_dice", "epochs", "seconds", "entry"])
    for row in result.rows:
        for entry in row.entries:
            scores = [f"{entry.score(protocol, name):.6f}" for _, protocol, name in SCORES]
            shuffled = entry.values["text_ablation"].get("shuffled")
            other = f"{shuffled['pooled']['dice']:.6f}" if shuffled else ""
            length = [entry.values["epochs"], entry.values["seconds"], entry.name]
            writer.writerow([row.row.label, row.row.preset, entry.values["seed"], *scores, other, *length])
    return buffer.getvalue()


def latex_table(result: Reproduction) -> str:
    """Return the table as a LaTeX tabular for the booktabs package."""
    lines, notes = table_lines(result)
    names = headings(result)
    rows = [r"\toprule", _latex_row(names), r"\midrule"]
    for index, line in enumerate(lines):
        if index and lines[index - 1].group != line.group:
            rows.append(r"\midrule")
        rows.append(_latex_row(_values(result, line)))
    rows += [r"\bottomrule"]
    described = [f"% ({number}) {note}" for number, note in enumerate(notes, start=1)]
    body = "\n".join(rows)
    return "\n".join([f"% {caption(result)}", *described, rf"\begin{{tabular}}{{l{'r' * (len(names) - 1)}}}", body]) + (
        "\n\\end{tabular}\n"
    )


def _latex_row(values: list[str]) -> str:
    escaped = [value.replace("%", r"\%").replace("±", r"$\pm$").replace("_", r"\_") for value in values]
    return " & ".join(escaped) + r" \\"


def _ours(row: RowResult) -> tuple[str, ...]:
    return tuple(_spread([entry.score(protocol, name) for entry in row.entries]) for _, protocol, name in SCORES)


def _shuffled(row: RowResult) -> str:
    costs = []
    for entry in row.entries:
        shuffled = entry.values["text_ablation"].get("shuffled")
        if shuffled:
            costs.append(shuffled["pooled"]["dice"] - entry.score("pooled", "dice"))
    return _spread(costs, signed=True)


def _spread(values: list[float], *, signed: bool = False) -> str:
    """Return mean and, of several, standard deviation in percent."""
    if not values:
        return "–"
    mean = f"{100 * float(np.mean(values)):{'+' if signed else ''}.2f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * float(np.std(values, ddof=1)):.2f}"


def _paper(printed: Printed | None) -> tuple[str, str, str]:
    if printed is None:
        return "–", "–", "–"
    return f"{100 * printed.jaccard:.2f}", f"{100 * printed.dice:.2f}", PROTOCOLS[printed.protocol]
