"""How much of what a report states becomes part of the prompt, and how much of the prompt does the report state?

    python benchmarks/report_to_prompt.py [--language-model URL|FOLDER] [--wrong]

Reads the written reports of ``tests/reports``: the ones on which the rules were tuned, the held-out ones, and those of
a second hand; and composes some thousands of ``composed_reports``. Prints precision and recall of each fact for each
and writes ``benchmarks/results/report_to_prompt.json``; with a language model the figures are printed only. ``--wrong``
lists each report that differs from what was expected.
"""

from __future__ import annotations

import argparse
import operator
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from composed_reports import compose

from tmca.data.grammar import SIDES, Facts
from tmca.files import write_json
from tmca.reports.prompt import ReportPrompt, prompt_from_report

REPORTS = Path(__file__).resolve().parents[1] / "tests" / "reports"
RESULT = Path(__file__).parent / "results" / "report_to_prompt.json"
SETS = ("development", "held_out", "independent", "composed")
COMPOSED = 4000
COMPOSED_SEED = 20
FACTS = ("present", "count", "size", "colour", "shape", "place", "bilateral", "side", "third")

Reader = Callable[[dict[str, Any]], ReportPrompt]


def read_reports(name: str) -> list[dict[str, Any]]:
    """Return the reports of a set."""
    if name == "composed":  # by "image" sides, as the composed facts are
        halves = [compose(COMPOSED // 2, COMPOSED_SEED, grammar) for grammar in ("lung", "polyp")]
        return [report | {"sides": "image"} for half in halves for report in half]
    reports: list[dict[str, Any]] = tomllib.loads((REPORTS / f"{name}.toml").read_text("utf-8"))["report"]
    return reports


def expected_facts(report: dict[str, Any]) -> Facts:
    """Return the facts that a report states, as written down with it."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in report["facts"].items()}
    return Facts(report["grammar"], **values)


def items(facts: Facts) -> dict[str, set[str]]:
    """Return the values of facts by fact; a side, a third and a place are each one value."""
    return {
        "present": set() if facts.present is None else {str(facts.present)},
        "count": {str(facts.count)} if facts.count else set(),
        "size": set(facts.sizes),
        "colour": {facts.colour} if facts.colour else set(),
        "shape": {facts.shape} if facts.shape else set(),
        "place": set(facts.places),
        "bilateral": set() if facts.bilateral is None else {str(facts.bilateral)},
        "side": set(facts.sides),
        "third": {f"{third} {side}" for side in SIDES for third in facts.thirds(side)},
    }


def by_rules(report: dict[str, Any]) -> ReportPrompt:
    """Return what the rules read."""
    return prompt_from_report(report["text"], report["grammar"], sides=report.get("sides"))


def compared(report: dict[str, Any], result: ReportPrompt) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Return what a result states and what the report states."""
    said, wanted = items(result.facts), items(expected_facts(report))
    if report["id"].startswith("composed"):
        said["present"].discard("False")  # whether all is denied is not known of these
    return said, wanted


def score(reports: Sequence[dict[str, Any]], read: Reader = by_rules) -> dict[str, dict[str, Any]]:
    """Return right, wrong and missing values of each fact with precision and recall; ``None`` where there are none."""
    counts = {fact: [0, 0, 0] for fact in FACTS}
    for report in reports:
        said, wanted = compared(report, read(report))
        for fact in FACTS:
            counts[fact][0] += len(said[fact] & wanted[fact])
            counts[fact][1] += len(said[fact] - wanted[fact])
            counts[fact][2] += len(wanted[fact] - said[fact])
    counts["all"] = [sum(numbers) for numbers in zip(*counts.values(), strict=True)]
    return {
        fact: {
            "right": right,
            "wrong": wrong,
            "missing": missing,
            "precision": round(right / (right + wrong), 4) if right + wrong else None,
            "recall": round(right / (right + missing), 4) if right + missing else None,
        }
        for fact, (right, wrong, missing) in counts.items()
    }


def differing(reports: Sequence[dict[str, Any]], read: Reader = by_rules) -> list[tuple[dict[str, Any], ReportPrompt]]:
    """Return the reports of which other facts are stated than expected."""
    pairs = [(report, read(report)) for report in reports]
    return [(report, result) for report, result in pairs if operator.ne(*compared(report, result))]


def main(arguments: list[str]) -> int:
    """Score, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-model", default="")
    parser.add_argument("--wrong", action="store_true")
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    options = parser.parse_args(arguments)
    read: Reader = by_rules
    if options.language_model:
        from tmca.reports.language_model import open_language_model, prompt_by_language_model

        model = open_language_model(options.language_model)

        def read(report: dict[str, Any]) -> ReportPrompt:
            return prompt_by_language_model(report["text"], report["grammar"], model, sides=report.get("sides"))

    result: dict[str, Any] = {}
    for name in options.sets:
        reports = read_reports(name)
        scores = score(reports, read)
        wrong = differing(reports, read)
        result[name] = {"reports": len(reports), "all facts right": len(reports) - len(wrong), "facts": scores}
        print(f"\n{name}: {len(reports)} reports, all facts right in {len(reports) - len(wrong)}")
        print(f"{'fact':12}{'precision':>10}{'recall':>10}{'right':>8}{'wrong':>8}{'missing':>9}")
        for fact, values in scores.items():
            shares = [f"{values[key]:.3f}" if values[key] is not None else "n/a" for key in ("precision", "recall")]
            print(
                f"{fact:12}{shares[0]:>10}{shares[1]:>10}{values['right']:>8}{values['wrong']:>8}{values['missing']:>9}"
            )
        for report, said in wrong if options.wrong else ():
            print(
                f"\n--- {report['id']}\n{report['text'].strip()}\n"
                f"expected {expected_facts(report)}\ngot      {said.facts}"
            )
            print("\n".join(f"  {note}" for note in said.notes))
    if not options.language_model and tuple(options.sets) == SETS:
        write_json(RESULT, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
