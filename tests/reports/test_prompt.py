from __future__ import annotations

import inspect
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from composed_reports import compose
from hypothesis import given
from hypothesis import strategies as st
from report_to_prompt import COMPOSED, FACTS, compared, differing, expected_facts, items, read_reports, score

from tmca import cli
from tmca.data.grammar import Facts, parse, unknown_words, write_sentence
from tmca.errors import ConfigError, DataError
from tmca.reports.prompt import (
    DEFAULT_SIDES,
    MOST_CHARACTERS,
    NOTHING,
    ReportPrompt,
    grammar_of_report,
    prompt_from_report,
)

DEVELOPMENT, HELD_OUT, INDEPENDENT = (read_reports(name) for name in ("development", "held_out", "independent"))
REPORTS = [*DEVELOPMENT, *HELD_OUT]
IDS = [report["id"] for report in REPORTS]

# Sentences that say nothing of the target.
UNRELATED = {
    "lung": ["The heart is of normal size.", "Left upper extremity PICC line.", "Old fracture of the right clavicle."],
    "polyp": ["Internal haemorrhoids.", "The terminal ileum was intubated.", "Diverticulosis of the left colon."],
    "phantom": ["The background is grey.", "The picture is sharp."],
}


def _read(report: dict[str, Any], **changes: Any) -> ReportPrompt:
    return prompt_from_report(changes.get("text", report["text"]), report["grammar"])


# --- the written reports ------------------------------------------------------------------------------------------


def test_the_written_reports_are_enough_and_of_every_kind():
    assert len(set(IDS)) == len(REPORTS) >= 60
    assert len(HELD_OUT) >= 30
    tags = [tag for report in REPORTS for tag in report["tags"]]
    least = {"negation": 20, "history": 15, "contradiction": 10, "no finding": 5, "trap": 5, "uncertain": 3}
    assert {tag: tags.count(tag) >= count for tag, count in least.items()} == dict.fromkeys(least, True)
    for report in REPORTS:
        assert parse_of(expected_facts(report)) == expected_facts(report), report["id"]


def parse_of(facts: Facts) -> Facts:
    """Return the facts that come back from the sentence that states them."""
    return parse(write_sentence(facts)) if facts.present is not None else facts


@pytest.mark.parametrize("report", DEVELOPMENT, ids=[report["id"] for report in DEVELOPMENT])
def test_every_fact_of_the_development_reports_is_read(report: dict[str, Any]):
    assert _read(report).facts == expected_facts(report)


def test_held_out_reports_keep_their_measured_scores():
    scores = score(HELD_OUT)
    for fact in FACTS:
        assert scores[fact]["wrong"] == 0, fact
    assert scores["all"]["recall"] >= 0.98
    assert scores["present"]["recall"] >= 0.96
    assert scores["side"]["recall"] == scores["third"]["recall"] == scores["bilateral"]["recall"] == 1.0


@pytest.mark.parametrize("grammar", ["lung", "polyp"])
def test_composed_reports_state_nothing_that_is_not_there(grammar: Any):
    reports = [report | {"sides": "image"} for report in compose(300, 7, grammar)]
    scores = score(reports)
    wrong = [(report["text"], result.prompt) for report, result in differing(reports) if states_more(report, result)]
    assert wrong == []
    assert scores["all"]["wrong"] == 0
    assert scores["all"]["recall"] >= 0.95


def states_more(report: dict[str, Any], result: ReportPrompt) -> bool:
    """Return whether a result states a value that the report does not."""
    said, wanted = compared(report, result)
    return any(said[fact] - wanted[fact] for fact in FACTS)


def test_the_score_counts_values():
    report = {
        "id": "one",
        "text": "Two small polyps.",
        "grammar": "polyp",
        "facts": {"present": True, "count": 3, "colour": "red"},
    }
    scores = score([report])
    assert (scores["count"]["right"], scores["count"]["wrong"], scores["count"]["missing"]) == (0, 1, 1)
    assert (scores["size"]["precision"], scores["size"]["recall"]) == (0.0, None)
    assert (scores["colour"]["precision"], scores["colour"]["recall"]) == (None, 0.0)
    assert scores["all"]["precision"] == pytest.approx(1 / 3, abs=1e-4)
    assert len(differing([report])) == 1
    facts = Facts("lung", present=True, sides=("left",), left=("upper", "lower"))
    assert items(facts)["third"] == {"upper left", "lower left"}


# --- laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("report", REPORTS, ids=IDS)
def test_the_prompt_states_its_facts_and_no_others(report: dict[str, Any]):
    result = _read(report)
    if result.prompt is None:
        assert result.notes[0] == NOTHING
        assert result.facts in (Facts(report["grammar"]), Facts(report["grammar"], present=False, count=0))
    else:
        assert parse(result.prompt) == result.facts
        assert result.facts.present
        assert unknown_words(result.prompt) == []


@pytest.mark.parametrize("report", REPORTS, ids=IDS)
def test_every_fact_has_words_of_the_report(report: dict[str, Any]):
    result = _read(report)
    shown: dict[str, set[str]] = {}
    for item in result.evidence:
        assert item.text == report["text"][item.start : item.end] != ""
        shown.setdefault(item.fact, set()).add(item.value.capitalize() if item.fact in BOOLEANS else item.value)
    stated = {fact: values for fact, values in items(result.facts).items() if values}
    assert shown == stated


BOOLEANS = ("present", "bilateral")


@pytest.mark.parametrize("report", REPORTS, ids=IDS)
def test_reading_twice_gives_the_same(report: dict[str, Any]):
    assert _read(report) == _read(report)


WITHOUT_SECTIONS = [report for report in REPORTS if not re.search(r"^[A-Z][\w /]+:", report["text"], re.MULTILINE)]
OF_EITHER_LUNG = [
    report
    for report in REPORTS
    if report["grammar"] == "lung"
    and not re.search(r"middle lobe|lingul|\b[RL][UML]L\b", report["text"], re.IGNORECASE)
]


@pytest.mark.parametrize("report", WITHOUT_SECTIONS, ids=lambda report: report["id"])
def test_unrelated_sentences_change_nothing_wherever_they_stand(report: dict[str, Any]):
    facts = _read(report).facts
    extra = UNRELATED[report["grammar"]]
    for text in (" ".join([*extra, report["text"]]), report["text"].rstrip().rstrip(".") + ". " + " ".join(extra)):
        assert prompt_from_report(text, report["grammar"]).facts == facts


def test_the_order_of_unrelated_sentences_does_not_matter():
    sentences = [
        "There is consolidation in the right lower zone",
        "The left lung is clear",
        "No pleural effusion",
        "Old rib fractures on the left",
    ]
    expected = Facts("lung", present=True, bilateral=False, sides=("left",), left=("lower",))
    for order in itertools.permutations(sentences):
        assert prompt_from_report(". ".join(order) + ".", "lung").facts == expected


@pytest.mark.parametrize("report", OF_EITHER_LUNG, ids=lambda report: report["id"])
def test_exchanging_left_and_right_mirrors_the_facts(report: dict[str, Any]):
    exchanged = re.sub(
        r"\b(left|right)\b",
        lambda match: {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}[match[0]],
        report["text"],
        flags=re.IGNORECASE,
    )
    facts = _read(report).facts
    mirrored = prompt_from_report(exchanged, "lung", sides="image").facts
    assert mirrored == facts  # exchanged twice: once in the text, once by whose sides they are


@given(st.lists(st.sampled_from(sorted({word for report in REPORTS for word in report["text"].split()})), max_size=60))
def test_no_heap_of_words_breaks_the_rules(words: list[str]):
    text = "the " + " ".join(words)
    for grammar in ("lung", "polyp", "phantom"):
        result = prompt_from_report(text, grammar)
        assert result.prompt is None or parse(result.prompt) == result.facts
        assert all(text[item.start : item.end] == item.text for item in result.evidence)


def test_shuffled_sentences_never_state_a_side_that_no_sentence_has():
    rng = random.Random(0)
    sentences = [line for report in REPORTS if report["grammar"] == "lung" for line in report["text"].split(". ")]
    without_left = [
        line for line in sentences if not re.search(r"left|both|bilat|bi-?(?:bas|api)|L[UML]L|lingul|bases", line, re.I)
    ]
    for _ in range(50):
        text = ". ".join(rng.sample(without_left, 5)) + "."
        facts = prompt_from_report(f"The film: {text}", "lung").facts
        assert "right" not in facts.sides, text
        assert not facts.bilateral, text


# --- single rules -------------------------------------------------------------------------------------------------


def test_sides_are_the_patients_in_a_lung_report_unless_told():
    text = "Opacity in the right lower zone."
    assert DEFAULT_SIDES == {"lung": "patient", "polyp": "image", "phantom": "image"}
    by_default = prompt_from_report(text, "lung")
    assert by_default.prompt == "Pulmonary infection, lower left lung."
    assert by_default.sides == "patient"
    assert "the patient's right is the image's left" in " ".join(by_default.notes)
    assert "patient's" in by_default.conversion
    in_image = prompt_from_report(text, "lung", sides="image")
    assert in_image.prompt == "Pulmonary infection, lower right lung."
    assert "taken for the image's" in in_image.conversion


def test_a_side_of_the_image_is_never_exchanged():
    result = prompt_from_report("Opacity on the left of the image.", "lung")
    assert result.facts.sides == ("left",)
    polyp = prompt_from_report("A polyp in the left of the image.", "polyp", sides="patient")
    assert polyp.facts.places == ("left",)
    assert "no side was exchanged" in polyp.conversion


def test_lengths_and_lobes_are_left_out_and_told_of():
    result = prompt_from_report("A 5 mm polyp.", "polyp")
    assert result.facts.sizes == ()
    assert any("'5 mm' is left out" in note for note in result.notes)
    result = prompt_from_report("Consolidation of the right lower lobe.", "lung")
    assert result.facts.left == ()
    assert any("no third of the image" in note for note in result.notes)


def test_computed_tomography_shows_no_heights():
    film = prompt_from_report("Chest film. Consolidation at the right base.", "lung")
    scan = prompt_from_report("CT of the chest. Consolidation at the right base.", "lung")
    elsewhere = prompt_from_report("Consolidation at the right base. A CT is recommended.", "lung")
    assert film.facts.left == elsewhere.facts.left == ("lower",)
    assert scan.facts.left == ()
    assert scan.facts.sides == ("left",)


@pytest.mark.parametrize(
    ("findings", "impression", "facts", "contradicted"),
    [
        ("Right basal opacity.", "Left basal opacity.", {}, "side"),
        ("Right basal opacity.", "Bilateral opacities.", {"sides": ("left",), "left": ("lower",)}, "side"),
        ("Bilateral opacities.", "Right opacity.", {"sides": ("left", "right"), "bilateral": True}, ""),
        ("Right basal opacity.", "Right apical opacity.", {"sides": ("left",)}, "third"),
        ("Two opacities.", "Three opacities.", {}, "count"),
        ("One opacity.", "Opacities.", {}, "count"),
        ("Right opacity. The right lung is clear.", "Follow up.", {}, "side"),
    ],
)
def test_what_findings_and_impression_contradict_is_left_out(
    findings: str, impression: str, facts: dict[str, Any], contradicted: str
):
    result = prompt_from_report(f"FINDINGS: {findings}\nIMPRESSION: {impression}", "lung")
    assert result.facts == Facts("lung", present=True, **facts)
    told = [note for note in result.notes if note.startswith("contradiction")]
    assert bool(told) == bool(contradicted)
    assert all(f"contradiction: {contradicted}" in note for note in told)


@pytest.mark.parametrize(
    ("text", "present"),
    [
        ("FINDINGS: Right opacity.\nIMPRESSION: The lungs are clear.", None),
        ("FINDINGS: Right opacity.\nIMPRESSION: No pneumonia.", None),
        ("Right opacity. No other opacity.", True),
        ("Ground-glass change on the right. No consolidation.", True),
        ("Consolidation on the right. No consolidation.", None),
        ("Consolidation on the right. No new consolidation.", True),
        ("The lungs are clear except for a right opacity.", True),
        ("The lungs are clear.", False),
        ("No consolidation. Possible pneumonia.", None),
        ("The heart is of normal size.", None),
    ],
)
def test_whether_there_is_a_finding(text: str, present: bool | None):
    assert prompt_from_report(text, "lung").facts.present is present


def test_one_count_needs_one_group_or_a_total():
    assert prompt_from_report("A polyp in the cecum. A polyp in the rectum.", "polyp").facts.count is None
    assert prompt_from_report("A polyp in the cecum and another in the rectum.", "polyp").facts.count is None
    assert prompt_from_report("A polyp, two polyps; three polyps in total.", "polyp").facts.count == 3
    assert prompt_from_report("A polyp was seen. The polyp was removed.", "polyp").facts.count == 1
    text = "FINDINGS: A polyp in the cecum. A polyp in the rectum.\nIMPRESSION: Two polyps."
    assert prompt_from_report(text, "polyp").facts.count == 2
    assert prompt_from_report("Two polyps, one removed previously.", "polyp").facts.count is None


def test_one_target_has_one_size_colour_shape_and_place():
    result = prompt_from_report("A small polyp. The polyp is large.", "polyp")
    assert result.facts == Facts("polyp", present=True, count=1)
    result = prompt_from_report("A white polyp; a red polyp.", "polyp")
    assert result.facts.colour is None
    assert any("white and red" in note for note in result.notes)
    result = prompt_from_report("A small and a large polyp.", "polyp")
    assert result.facts.sizes == ("small", "large")


def test_what_was_left_out_is_told():
    text = "HISTORY: Polyps.\nFINDINGS: No polyps. Possible polyp. Previously removed polyp. The polyp has resolved."
    notes = " ".join(prompt_from_report(text, "polyp").notes)
    for word in (NOTHING, "not read: 'Polyps' under history", "denied", "uncertain", "of the past", "resolved"):
        assert word in notes


def test_the_result_as_json():
    result = prompt_from_report("Opacity in the right lower zone. The left lung is clear.", "lung")
    values = result.as_dict()
    assert values["prompt"] == "Unilateral pulmonary infection, lower left lung."
    assert values["facts"] == {
        "grammar": "lung",
        "present": True,
        "bilateral": False,
        "sides": ("left",),
        "left": ("lower",),
    }
    assert values["method"] == "rules"
    assert values["evidence"][0] == {"fact": "present", "value": "true", "text": "Opacity", "start": 0, "end": 7}
    assert "report" not in values


@pytest.mark.parametrize(
    ("text", "grammar"),
    [
        ("RLL consolidation.", "lung"),
        ("Clear lungs.", "lung"),
        ("Polyp of the sigmoid colon.", "polyp"),
        ("Two bright lesions.", "phantom"),
        ("Nothing.", "polyp"),
    ],
)
def test_the_grammar_of_a_report(text: str, grammar: str):
    assert grammar_of_report(text) == grammar


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" \n", "empty"),
        ("a" * (MOST_CHARACTERS + 1), "at most"),
        ("The lungs\0are clear", "zero bytes"),
        ("Kein Polyp im Rektum nachweisbar.", "English"),
        ("Pas d'opacité, le poumon droit est normal.", "English"),
        ("肺野清晰", "English"),
        ("xyzzy", "English"),
    ],
)
def test_what_is_no_report_is_refused(text: str, words: str):
    with pytest.raises(DataError, match=words) as raised:
        prompt_from_report(text, "polyp")
    assert raised.value.hint


def test_unknown_settings_are_refused():
    unchecked: Any = inspect.unwrap(prompt_from_report)  # the tests' type checks would refuse them first
    with pytest.raises(ConfigError, match="grammar"):
        unchecked("A polyp.", "polyps")
    with pytest.raises(ConfigError, match="side"):
        unchecked("A polyp.", "polyp", sides="left")


# --- documentation ------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]


def test_the_recorded_scores_are_those_of_the_rules():
    recorded = json.loads((ROOT / "benchmarks" / "results" / "report_to_prompt.json").read_text("utf-8"))
    for name, reports in (("development", DEVELOPMENT), ("held_out", HELD_OUT), ("independent", INDEPENDENT)):
        assert recorded[name]["facts"] == score(reports)
        assert recorded[name]["all facts right"] == len(reports) - len(differing(reports))


def test_the_scores_of_the_page_are_those_recorded():
    recorded = json.loads((ROOT / "benchmarks" / "results" / "report_to_prompt.json").read_text("utf-8"))
    text = " ".join((ROOT / "docs" / "concepts" / "reports.md").read_text("utf-8").split())
    assert f"{len(DEVELOPMENT)} on which" in text
    assert f"{len(HELD_OUT)} that were finished" in text
    assert f"{len(INDEPENDENT)} of a second hand" in text
    assert f"of {COMPOSED:,} is composed" in text
    for fact in (*FACTS, "all"):
        cells = []
        for name in ("independent", "held_out", "development", "composed"):
            values = recorded[name]["facts"][fact]
            stated = values["right"] + values["missing"]
            cells.append(f"{values['precision']:.3f} / {values['recall']:.3f} ({stated})")
        assert f"| {fact} | {' | '.join(cells)} |" in text


def test_the_example_of_the_guide_is_what_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    guide = (ROOT / "docs" / "how-to" / "reports.md").read_text("utf-8")
    report, shown = re.findall(r"^```text\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)
    (tmp_path / "report.txt").write_text(report, "utf-8")
    monkeypatch.setenv("COLUMNS", "98")
    assert cli.run(["report-to-prompt", str(tmp_path / "report.txt")]) == 0
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert printed.strip() == shown.strip()
