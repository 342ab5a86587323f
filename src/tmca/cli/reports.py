"""Clinical reports: turn one into the prompt of a model."""

from __future__ import annotations

import json as json_format
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from tmca.cli.options import show


@dataclass(frozen=True)
class ReportToPrompt:
    """Turn a clinical report into the short prompt of a model: `tmca report-to-prompt REPORT.txt`."""

    report: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FILE|-")]]
    """Text file with one report in English, or - for standard input."""
    grammar: Literal["auto", "polyp", "phantom", "lung"] = "auto"
    """The sentences that the model was trained on; auto: what the report speaks of most."""
    sides: Literal["auto", "patient", "image"] = "auto"
    """Whose left and right the report means; auto: the patient's for lungs, which an image shows on the other side."""
    language_model: Annotated[str, tyro.conf.arg(metavar="URL|FOLDER")] = ""
    """Let a language model point at the findings: http://HOST:PORT/v1 on your own network, or a model folder."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        """Read the report and print its prompt with the words that state it."""
        from tmca.reports.language_model import open_language_model, prompt_by_language_model
        from tmca.reports.printing import page
        from tmca.reports.prompt import check_report, grammar_of_report, prompt_from_report
        from tmca.reports.reading import read_report

        model = open_language_model(self.language_model) if self.language_model else None
        text = read_report(self.report)
        check_report(text)
        grammar = grammar_of_report(text) if self.grammar == "auto" else self.grammar
        sides = None if self.sides == "auto" else self.sides
        if model is None:
            result = prompt_from_report(text, grammar, sides=sides)
        else:
            result = prompt_by_language_model(text, grammar, model, sides=sides)
        show(json_format.dumps(result.as_dict(), indent=2, ensure_ascii=False) if self.json else page(result))
