"""Short reports in which a rule once read more than is written: each with the prompt, or with what is known instead.

Left and right are taken for the image's, so that prompt and report name the same.
"""

from __future__ import annotations

import pytest

from tmca.data.grammar import Grammar
from tmca.reports.prompt import prompt_from_report

DENIED = "every finding is denied"
NOTHING = "nothing is known"

LUNG = [
    ("FINDINGS:\nTHERE IS NO EVIDENCE OF FOCAL\nCONSOLIDATION OR PLEURAL EFFUSION.", DENIED),
    ("NO FOCAL\nCONSOLIDATION IS SEEN.", DENIED),
    ("RIGHT BASAL OPACITY HAS\nRESOLVED. NEW LEFT\nBASAL OPACITY.", "Pulmonary infection, lower left lung."),
    ("Left lower lobe collapse and right basal consolidation.", "Pulmonary infection, lower right lung."),
    ("Right basal consolidation and left lung abscess", "Pulmonary infection, lower right lung."),
    ("Right basal consolidation and left pleural empyema", "Pulmonary infection, lower right lung."),
    ("Right basal consolidation and left pleural plaque", "Pulmonary infection, lower right lung."),
    ("Right basal consolidation after left lobectomy", "Pulmonary infection, lower right lung."),
    ("Right basal consolidation and left upper zone reticulation", "Pulmonary infection, lower right lung."),
    ("Right basal consolidation with tracheal deviation to left", "Pulmonary infection, lower right lung."),
    ("Right basal consolidation, patient rotated to the left", "Pulmonary infection, lower right lung."),
    ("Right basal consolidation seen best on left lateral view", "Pulmonary infection, lower right lung."),
    ("Right lateral decubitus film: left basal consolidation", "Pulmonary infection, lower left lung."),
    ("Right basal opacity and atelectasis at the left base.", "Pulmonary infection, lower right lung."),
    ("Consolidation on the right, none on the left.", "Pulmonary infection, right lung."),
    ("Consolidation on the right but nothing on the left", "Pulmonary infection, right lung."),
    ("Consolidation on the right, absent on the left", "Pulmonary infection, right lung."),
    ("Consolidation at the right base, no involvement of the left lung", "Pulmonary infection, lower right lung."),
    ("Consolidation at the right base without involvement of the left lung", "Pulmonary infection, lower right lung."),
    ("Consolidation on the right, the left lung is unaffected", "Unilateral pulmonary infection, right lung."),
    ("Consolidation on the right, the left lung is not affected", "Unilateral pulmonary infection, right lung."),
    ("Consolidation on the right, left lung uninvolved", "Unilateral pulmonary infection, right lung."),
    ("Consolidation on the right, left lung well aerated", "Pulmonary infection, right lung."),
    (
        "Consolidation at Lt base and right upper zone.",
        "Bilateral pulmonary infection, lower left lung and upper right lung.",
    ),
    (
        "Consolidation at (L) base and right upper zone.",
        "Bilateral pulmonary infection, lower left lung and upper right lung.",
    ),
    ("Opacity in Rt mid zone and left base.", "Bilateral pulmonary infection, lower left lung and middle right lung."),
    (
        "Opacities at the left base and apex of the right lung.",
        "Bilateral pulmonary infection, lower left lung and upper right lung.",
    ),
    (
        "Opacity in right lung: upper and mid zones; left lung: lower zone.",
        "Pulmonary infection, upper middle right lung.",
    ),
    ("There are zero opacities in the lungs.", DENIED),
    ("Opacities: 0", DENIED),
    ("Consolidation: Nil.", DENIED),
    ("Consolidation - none.", DENIED),
    ("In 2019 there was right basal opacity. Today left basal opacity.", "Pulmonary infection, lower left lung."),
    ("Last year right basal opacity. Today left basal opacity.", "Pulmonary infection, lower left lung."),
    (
        "Yesterday's film showed right basal opacity. Today: left basal opacity.",
        "Pulmonary infection, lower left lung.",
    ),
    ("Right basal opacity: resolved.", NOTHING),
    ("Right basal opacity (resolved)", NOTHING),
    ("Right basal opacity, now cleared", NOTHING),
    ("Interval resolution right basal opacity.", NOTHING),
    ("Prior CT: right basal opacity.", NOTHING),
    ("Right basal opacity on prior CT.", NOTHING),
    ("Resolution of left basal opacity with new right basal opacity.", "Pulmonary infection, lower right lung."),
    (
        "HISTORY Right lower zone pneumonia\nFINDINGS Left upper zone consolidation",
        "Pulmonary infection, upper left lung.",
    ),
    (
        "<b>History:</b> Right lower zone pneumonia.\n<b>Findings:</b> Left upper zone consolidation.",
        "Pulmonary infection, upper left lung.",
    ),
    (
        "[History] Right lower zone pneumonia.\n[Findings] Left upper zone consolidation.",
        "Pulmonary infection, upper left lung.",
    ),
    (
        "FINDINGS: right lower zone consolidation.\nADDENDUM: Correction: left upper zone consolidation.",
        "Pulmonary infection, upper left lung.",
    ),
    ("Query right basal consolidation.", NOTHING),
    ("Question right basal opacity.", NOTHING),
    ("Consider right basal pneumonia.", NOTHING),
    ("Potential right basal pneumonia.", NOTHING),
    ("Correlate clinically for right basal pneumonia.", NOTHING),
    ("DDx: right basal pneumonia vs atelectasis.", NOTHING),
    ("Right basal pneumonia not ruled out.", NOTHING),
    ("Right basal pneumonia should be considered.", NOTHING),
    ("Consolidation excluded.", DENIED),
    ("Day 3 opacities", "Pulmonary infection."),
    ("CO-RADS 5 opacities", "Pulmonary infection."),
    ("Opacity in the left perihilar region.", "Pulmonary infection, left lung."),
    ("Consolidation in the left retrocardiac area.", "Pulmonary infection, left lung."),
    ("Right basal consolidation, more than left.", "Bilateral pulmonary infection, left lung and lower right lung."),
    ("Opacity overlying the left heart border", "Pulmonary infection."),
    ("Right basal consolidation with small left effusion.", "Pulmonary infection, lower right lung."),
    (
        "Consolidation in the right lower zone and left mid zone.",
        "Bilateral pulmonary infection, middle left lung and lower right lung.",
    ),
    (
        "Right upper and left lower zone opacities.",
        "Bilateral pulmonary infection, lower left lung and upper right lung.",
    ),
    ("Bilateral lower zone opacities.", "Bilateral pulmonary infection, lower left lung and lower right lung."),
    ("Right basal consolidation. Left lung is clear.", "Unilateral pulmonary infection, lower right lung."),
    (
        "Consolidation right lower zone, left mid zone.",
        "Bilateral pulmonary infection, middle left lung and lower right lung.",
    ),
]
HEADERS = (
    *("PMH", "Hx", "Clinical Hx", "Clinical notes", "Patient history", "Reason for request", "Indication(s)", "HPI"),
    *("Provisional diagnosis", "Prior", "Prior CXR", "Previous imaging", "Chief complaint", "Clinical", "Request"),
    *("Presenting complaint", "Admission diagnosis", "Referring diagnosis", "A header nobody knows"),
)
POLYP = [
    ("0 polyps.", DENIED),
    ("Number of polyps: 0", DENIED),
    ("Polyps - none.", DENIED),
    ("Polyps? None.", NOTHING),
    ("Two to three small polyps.", "small polyp"),
    ("2–3 small polyps", "small polyp"),
    ("> 10 small polyps", "small polyp"),
    ("≥5 small polyps", "small polyp"),
    ("~5 small polyps", "small polyp"),
    ("5+ small polyps", "small polyp"),
    ("Fewer than 5 small polyps", "small polyp"),
    ("roughly 5 small polyps", "small polyp"),
    ("One small and two large polyps.", "large polyp"),
    ("There were 5 polyps: 3 small ones and 2 large ones.", "five polyp"),
    ("Five polyps: 2 red, 3 white", "five polyp"),
    ("two dozen polyps", "polyp"),
    ("thirty two polyps", "polyp"),
    ("A non-red polyp", "one polyp"),
]
CASES = [*(("lung", *case) for case in LUNG), *(("polyp", *case) for case in POLYP)]


@pytest.mark.parametrize(("grammar", "text", "prompt"), CASES, ids=[text[:40] for _, text, _ in CASES])
def test_no_more_is_read_than_is_written(grammar: Grammar, text: str, prompt: str):
    result = prompt_from_report(text, grammar, sides="image")
    assert (result.prompt or (DENIED if result.facts.present is False else NOTHING)) == prompt


@pytest.mark.parametrize("header", HEADERS)
def test_what_stands_before_the_findings_is_not_read(header: str):
    text = f"{header}: Right lower zone pneumonia.\nFINDINGS: Left upper zone consolidation."
    result = prompt_from_report(text, "lung", sides="image")
    assert result.prompt == "Pulmonary infection, upper left lung."
    assert any(note.startswith("not read: 'pneumonia'") for note in result.notes)
