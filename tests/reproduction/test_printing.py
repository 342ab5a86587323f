from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tmca.reproduction import Reproduction, RowResult
from tmca.reproduction.ledger import Entry, Ledger
from tmca.reproduction.printing import (
    caption,
    csv_table,
    headings,
    latex_table,
    markdown_table,
    table_lines,
    terminal_table,
)
from tmca.reproduction.tables import NOTES, get_table


def _entry(dice: float, seed: int, **fields: object) -> Entry:
    scores = {"dice": dice, "jaccard": dice / (2 - dice), "accuracy": 0.98}
    values = {
        "metrics": {"pooled": scores, "per_case_mean": {"dice": dice - 0.01}},
        "text_ablation": {"shuffled": {"pooled": {"dice": dice - 0.05}}},
        "seed": seed, "epochs": 20, "seconds": 600.0,
    } | fields  # fmt: skip
    return Entry(Path(f"results/run-{seed}.json"), "", "", values)


@pytest.fixture
def result() -> Reproduction:
    table = get_table("table1")
    runs = {"TMCA": (_entry(0.90, 1), _entry(0.92, 2)), "U-Net": (_entry(0.80, 1, text_ablation={}),)}
    rows = tuple(RowResult(row, runs.get(row.label, ())) for row in table.rows)
    return Reproduction(table, "kvasir_polyp", "cpu", rows)


def _cells(markdown: str, label: str) -> list[str]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    (row,) = (row for row in rows if row[0].partition(" (")[0] == label)
    return row


def test_our_numbers_stand_beside_the_papers(result: Reproduction):
    table = markdown_table(result)
    assert _cells(table, "TMCA") == [
        "TMCA", "83.50 ± 2.38", "91.00 ± 1.41", "98.00 ± 0.00", "90.00 ± 1.41", "-5.00 ± 0.00", "2",
        "85.54", "92.20", "pooled",
    ]  # fmt: skip
    assert _cells(table, "U-Net") == [
        "U-Net", "66.67", "80.00", "98.00", "79.00", "–", "1", "69.62", "82.09", "pooled",
    ]  # fmt: skip
    assert _cells(table, "LGA")[1:] == ["–", "–", "–", "–", "–", "0", "–", "–", "–"]
    assert caption(result) == "Table 1: comparison of methods, on Kvasir-SEG, scale cpu, percent"


def test_notes_explain_what_cannot_be_compared(result: Reproduction):
    lines, notes = table_lines(result)
    tganet = next(line for line in lines if line.label.startswith("TGANet"))
    assert tganet.paper == ("83.30", "89.82", "per case")
    marks = [int(mark) for mark in tganet.label.partition("(")[2].rstrip(")").split(", ")]
    assert [notes[mark - 1] for mark in marks] == [NOTES[n] for n in ("no_caption", "other_split", "per_case")]


def test_data_that_the_paper_has_not_gets_no_column_of_the_paper(result: Reproduction):
    phantoms = replace(result, dataset="phantoms")
    assert headings(phantoms)[-1] == "runs"
    assert "other_split" not in str(table_lines(phantoms)[1])
    assert "on phantoms" in caption(phantoms)


def test_csv_has_a_row_a_run_in_fractions(result: Reproduction):
    rows = list(csv.DictReader(io.StringIO(csv_table(result))))
    assert [(row["method"], row["seed"]) for row in rows] == [("U-Net", "1"), ("TMCA", "1"), ("TMCA", "2")]
    assert float(rows[1]["pooled_dice"]) == 0.9
    assert float(rows[1]["shuffled_pooled_dice"]) == pytest.approx(0.85)
    assert rows[0]["shuffled_pooled_dice"] == ""


def test_latex_is_escaped_and_complete(result: Reproduction):
    text = latex_table(result)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert all("±" not in line and "_" not in line.replace(r"\_", "") for line in body)
    rows = [line for line in body if line.endswith(r"\\")]
    assert {line.count(" & ") for line in rows} == {len(headings(result)) - 1}
    assert any(r"$\pm$" in line for line in rows)
    share = Reproduction(get_table("table4"), "kvasir", "cpu", (RowResult(get_table("table4").rows[2], ()),))
    assert r"TMCA, 25 \%" in latex_table(share)


def test_the_terminal_shows_every_row(result: Reproduction):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(terminal_table(result))
    text = console.export_text()
    assert all(row.row.label in text for row in result.rows)
    assert "91.00 ± 1.41" in text


def test_a_ledger_of_the_repository_can_be_printed():
    ledger = Ledger(Path(__file__).resolve().parents[2] / "results")
    assert ledger.entries
    assert all(0 < entry.score("pooled", "dice") < 1 for entry in ledger.entries)
