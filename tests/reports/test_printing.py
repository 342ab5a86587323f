from __future__ import annotations

import io

from rich.console import Console

from tmca.reports.printing import in_words, marked_report, page
from tmca.reports.prompt import prompt_from_report


def _printed(text: str, grammar: str = "lung") -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(page(prompt_from_report(text, grammar)), markup=False)  # type: ignore[arg-type]
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(output, str)
    return output


def test_the_evidence_is_marked_in_the_report():
    text = "Opacity [A] in the right lower zone. No effusion [B]."
    marked = marked_report(prompt_from_report(text, "lung")).plain
    assert marked == "«Opacity» [A] in the «right lower zone». No effusion [B]."


def test_overlapping_evidence_is_marked_once():
    result = prompt_from_report("Unchanged bibasilar opacity. One area.", "lung")
    assert marked_report(result).plain.replace("«", "").replace("»", "") == result.report
    assert marked_report(result).plain.count("«") == marked_report(result).plain.count("»")


def test_the_page_shows_prompt_evidence_and_what_was_left_out():
    output = _printed("A 5 mm polyp.", "polyp")
    assert output.startswith("one polyp\nFound by rules. Places")
    assert "count    1      «A»" in output
    assert "«A» 5 mm «polyp»." in output
    assert "- size: '5 mm' is left out" in output


def test_a_report_without_a_finding_says_so():
    result = prompt_from_report("The lungs are clear.", "lung")
    assert in_words(result).startswith("No prompt: the report names no finding.")
    output = _printed("The lungs are clear.")
    assert output.count("names no finding") == 1
    assert "present  false  «The lungs are clear»" in output
