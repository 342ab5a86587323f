"""A comparison as terminal tables, HTML page, LaTeX table, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from rich.table import Table

from tmca.comparison import RESAMPLES, TIE, Column, Comparison, Pair
from tmca.environment import describe_environment
from tmca.files import write_json, write_text
from tmca.metrics import SCORES

MOST_DOTS = 400
"""Cases that a plot shows; of more, every second, third, … in order of their difference."""

RESERVED = ("id", "patient_id", "text")
"""Columns of ``cases.csv`` that a run of the same name must not replace."""

_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "[": "{[}",  # at the start of a row it would be read as an option of the line break before it
}


def write_comparison(comparison: Comparison, folder: Path, *, cases: int = 5) -> None:
    """Write ``comparison.csv`` (a row a pair), ``cases.csv`` (a row a case), and the same as JSON, LaTeX and HTML.

    Args:
        comparison: What to write.
        folder: Where to.
        cases: How many of the most different cases of each pair to list.

    Raises:
        StorageError: The folder cannot be written.
    """
    write_text(folder / "comparison.csv", _csv([pair.row() for pair in comparison.pairs]))
    write_text(folder / "cases.csv", _csv(_case_rows(comparison)))
    write_json(folder / "comparison.json", _values(comparison, cases))
    write_text(folder / "comparison.tex", latex_table(comparison))
    write_text(folder / "comparison.html", _page(comparison, cases))


def _csv(rows: list[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{cell:.6g}" if isinstance(cell, float) else cell for name, cell in row.items()})
    return buffer.getvalue()


def _case_rows(comparison: Comparison) -> list[dict[str, Any]]:
    names = {
        column.name: f"dice_{column.name}" if column.name in RESERVED else column.name for column in comparison.columns
    }
    dice = {names[column.name]: column.cases("dice") for column in comparison.columns}
    first = comparison.first
    return [
        {"id": case, "patient_id": first.patients[index]}
        | {name: float(values[index]) if np.isfinite(values[index]) else "" for name, values in dice.items()}
        | {"text": first.texts[index]}
        for index, case in enumerate(first.ids)
    ]


def _values(comparison: Comparison, cases: int) -> dict[str, Any]:
    protocol = comparison.first.protocol
    return {
        "schema_version": 1,
        **vars(protocol),
        "n": len(comparison.first.ids),
        "n_patients": comparison.n_patients,
        "resamples": RESAMPLES,
        "tie": TIE,
        "runs": [
            {
                "name": column.name,
                "sources": column.sources,
                "seeds": column.seeds,
                "pooled": {score: column.pooled(score) for score in SCORES},
                "per_case_mean": {score: column.per_case(score) for score in SCORES},
                "pooled_dice_by_seed": column.pooled_by_seed("dice"),
            }
            for column in comparison.columns
        ],
        "pairs": [pair.row() | {"cases": _listed(comparison, pair, cases)} for pair in comparison.pairs],
    }


def _listed(comparison: Comparison, pair: Pair, count: int) -> list[dict[str, Any]]:
    dice = {column.name: column.cases("dice") for column in comparison.columns}
    return [
        {
            "id": comparison.first.ids[index],
            "text": comparison.first.texts[index],
            "reference": float(dice[pair.reference][index]),
            "run": float(dice[pair.run][index]),
            "difference": float(pair.differences[index]),
        }
        for index in pair.most_different(count)
    ]


def in_words(comparison: Comparison) -> str:
    """Return what was compared and how, for captions."""
    first = comparison.first
    space = first.protocol.space
    size = "at each image's original size" if space == "original" else f"at {space} × {space} pixels"
    folds = f" of {len(first.sources)} folds" if len(first.sources) > 1 else ""
    patients = "" if comparison.n_patients == len(first.ids) else f" of {comparison.n_patients} patients"
    empty = {"one": "counts as 1", "zero": "counts as 0", "skip": "is left out"}[first.protocol.empty_policy]
    return (
        f"Split {first.protocol.split}, {len(first.ids)} cases{patients}{folds}, compared {size}, threshold "
        f"{first.protocol.threshold:g}; a case that is empty in mask and prediction {empty}."
    )


def method_in_words(comparison: Comparison) -> str:
    """Return how the statistics were computed, for captions."""
    unit = "case" if comparison.n_patients == len(comparison.first.ids) else "patient"
    pairs = len(comparison.pairs)
    return (
        f"Intervals: 95 %, bootstrap over {unit}s, the same {unit}s drawn for both runs. p: Wilcoxon signed-rank, one "
        f"difference a {unit}, two-sided, Holm-corrected for {pairs} pair{'s' if pairs > 1 else ''}. "
        f"Better and worse: the Dice of a case differs by more than {TIE:g}."
    )


def run_table(comparison: Comparison) -> Table:
    """Return the scores of the runs as a terminal table; its numbers name them in the other tables."""
    table = Table()
    table.add_column("", justify="right")
    table.add_column("run", overflow="fold")
    for heading in ("pooled\nDice", "per-case\nDice", "per-case\nJaccard"):
        table.add_column(heading, justify="right")
    for number, column in enumerate(comparison.columns, start=1):
        scores = (_pooled(column), f"{column.per_case('dice'):.3f}", f"{column.per_case('jaccard'):.3f}")
        table.add_row(str(number), column.name, *scores)
    return table


def pair_table(comparison: Comparison) -> Table:
    """Return the differences as a terminal table."""
    number = {column.name: place for place, column in enumerate(comparison.columns, start=1)}
    title = "Differences of Dice; 2 − 1 means: run 2 minus run 1"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("pair", no_wrap=True)
    for heading in ("pooled [95 %]", "mean", "median", "better/\nsame/worse", "p (Holm)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for pair in comparison.pairs:
        row = pair.row()
        table.add_row(
            f"{number[pair.run]} − {number[pair.reference]}",
            difference_in_words(pair),
            f"{row['mean_dice_difference']:+.3f}",
            f"{row['median_dice_difference']:+.3f}",
            f"{pair.wins}/{pair.ties}/{pair.losses}",
            p_in_words(pair.p_holm),
        )
    return table


def case_list(comparison: Comparison, count: int) -> Table:
    """Return the cases on which the runs differ most as a terminal table."""
    table = Table(title="Dice of the cases that differ most", title_justify="left", title_style="bold")
    table.add_column("case", overflow="fold")
    for number in range(1, len(comparison.columns) + 1):
        table.add_column(str(number), justify="right", no_wrap=True)
    texts = comparison.first.texts
    if any(texts):  # a ledger's entries have none
        table.add_column("sentence")
    dice = [column.cases("dice") for column in comparison.columns]
    for index in comparison.most_different(count):
        row = [comparison.first.ids[index], *(f"{values[index]:.3f}" for values in dice)]
        table.add_row(*row, *([texts[index]] if any(texts) else []))
    return table


def _pooled(column: Column) -> str:
    values = column.pooled_by_seed("dice")
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def difference_in_words(pair: Pair) -> str:
    """Return the difference of the pooled Dice and its interval."""
    ends = pair.pooled_dice_interval
    return f"{pair.pooled_dice_difference:+.3f}" + (f" [{ends[0]:+.3f}, {ends[1]:+.3f}]" if ends else "")


def p_in_words(p: float) -> str:
    """Return a p-value with three decimals."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def latex_table(comparison: Comparison) -> str:
    """Return a LaTeX ``tabular``, a row a run; differences and p are against the first row. It needs no package."""
    rows = [["run", "pooled Dice", "per-case Dice", "per-case Jaccard", r"$\Delta$ pooled Dice [95\,\%]", "$p$"]]
    against = {pair.run: pair for pair in comparison.pairs if pair.reference == comparison.columns[0].name}
    for column in comparison.columns:
        pair = against.get(column.name)
        scores = [_pooled(column).replace("±", r"$\pm$"), f"{column.per_case('dice'):.3f}"]
        scores.append(f"{column.per_case('jaccard'):.3f}")
        scores += ["", ""] if pair is None else [f"${difference_in_words(pair)}$", f"${p_in_words(pair.p_holm)}$"]
        rows.append(["".join(_LATEX.get(sign, sign) for sign in column.name), *scores])
    head, *body = (f"{' & '.join(row)} \\\\" for row in rows)
    words = f"{in_words(comparison)}\n{method_in_words(comparison)} Differences and p: against the first row."
    comments = "\n".join(f"% {line}" for line in words.splitlines())
    lines = [r"\begin{tabular}{lrrrrr}", r"\hline", head, r"\hline", *body, r"\hline", r"\end{tabular}"]
    return comments + "\n" + "\n".join(lines) + "\n"


def _page(comparison: Comparison, cases: int) -> str:
    facts = describe_environment()
    environment = Environment(loader=PackageLoader("tmca", "templates"), autoescape=True)
    protocol = comparison.first.protocol
    return environment.get_template("comparison.html.j2").render(
        title=f"Comparison of {len(comparison.columns)} runs",
        lead=in_words(comparison),
        method=method_in_words(comparison),
        runs=[{"column": column, "pooled": _pooled(column)} for column in comparison.columns],
        pairs=[
            {
                "pair": pair,
                "row": pair.row(),
                "difference": difference_in_words(pair),
                "p": p_in_words(pair.p),
                "p_holm": p_in_words(pair.p_holm),
                "plot": _dots(pair, comparison.first.ids),
                "cases": _listed(comparison, pair, cases),
            }
            for pair in comparison.pairs
        ],
        facts={
            **{column.name: ", ".join(column.sources) for column in comparison.columns},
            "data hash": protocol.data_hash,
            "bootstrap draws": RESAMPLES,
        },
        version=facts["packages"]["tmca"],
    )


def _dots(pair: Pair, ids: Sequence[str]) -> dict[str, Any]:
    """Return where the dots of the cases lie in a plot: across in order of their difference, up by its size."""
    order = [index for index in np.argsort(pair.differences).tolist() if np.isfinite(pair.differences[index])]
    shown = order[:: -(-len(order) // MOST_DOTS)]
    width, height, left, margin = 960, 240, 44, 10
    lowest, highest = float(np.nanmin(pair.differences)), float(np.nanmax(pair.differences))
    # Neither side of zero gets so little room that the labels of the axis meet.
    low, high = min(-0.01, lowest, -highest / 8), max(0.01, highest, -lowest / 8)

    def y(value: float) -> float:
        return round(margin + (high - value) / (high - low) * (height - 2 * margin), 1)

    step = (width - left - 2 * margin) / max(1, len(shown) - 1)
    dots = [
        {
            "x": round(left + margin + place * step, 1),
            "y": y(value),
            "kind": "better" if value > TIE else "worse" if value < -TIE else "same",
            "title": f"{ids[index]}: {value:+.3f}",
        }
        for place, index in enumerate(shown)
        for value in [float(pair.differences[index])]
    ]
    ticks = [{"y": y(value), "label": f"{value:+.2f}" if value else "0"} for value in (high, 0.0, low)]
    mean = y(float(np.nanmean(pair.differences)))
    return {"width": width, "height": height, "left": left, "dots": dots, "ticks": ticks, "zero": y(0.0), "mean": mean}
