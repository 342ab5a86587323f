from __future__ import annotations

import pytest

from tmca.reports.negation import read_status, without_lookalikes


def _status(sentence: str, word: str = "opacity") -> str:
    start = sentence.index(word)
    return read_status(sentence, start, start + len(word)).status


@pytest.mark.parametrize(
    ("sentence", "status"),
    [
        ("There is an opacity", "affirmed"),
        ("New opacity", "affirmed"),
        ("No opacity", "negated"),
        ("No effusion or opacity", "negated"),
        ("There is no evidence of effusion, opacity", "negated"),
        ("Without any opacity", "negated"),
        ("The lungs are free of effusion and opacity", "negated"),
        ("An opacity is not seen", "negated"),
        ("An opacity was not clearly identified", "negated"),
        ("An opacity is unlikely", "negated"),
        ("The opacity: none", "negated"),
        ("No effusion, but an opacity", "affirmed"),
        ("No effusion and there is opacity", "affirmed"),
        ("No effusion, although opacity is seen", "affirmed"),
        ("No change in the opacity", "affirmed"),
        ("Without significant change of the opacity", "affirmed"),
        ("The opacity has not resolved", "affirmed"),
        ("Nearly complete resolution of the opacity", "affirmed"),
        ("The opacity is partially resolved", "affirmed"),
        ("The opacity has resolved", "resolved"),
        ("Resolution of the opacity", "resolved"),
        ("The opacity is no longer seen", "resolved"),
        ("Left opacity cleared", "resolved"),
        ("Possible opacity", "uncertain"),
        ("There may be an opacity", "uncertain"),
        ("? opacity", "uncertain"),
        ("Cannot exclude an opacity", "uncertain"),
        ("An opacity cannot be excluded", "uncertain"),
        ("An opacity is difficult to exclude", "uncertain"),
        ("Suspicious for opacity", "uncertain"),
        ("Possible effusion, opacity at the base", "affirmed"),
        ("Old opacity", "historical"),
        ("A 54-year-old man with an opacity", "affirmed"),
        ("History of opacity", "historical"),
        ("Previously seen opacity", "historical"),
        ("Previously seen opacity is unchanged", "affirmed"),
        ("The opacity seen on the prior study", "historical"),
        ("The opacity was removed in 2019", "historical"),
        ("An opacity three years ago", "historical"),
        ("The CT of 4 May showed an opacity", "historical"),
        ("New opacity since the previous film", "affirmed"),
        ("Compared with the prior study, opacity at the base", "affirmed"),
        ("The opacity has increased since the prior study", "affirmed"),
        ("An opacity, not seen on the previous film", "affirmed"),
        ("Her father had an opacity", "historical"),
        ("Rule out opacity", "sought"),
        ("A film is recommended to exclude an opacity", "sought"),
        ("Follow-up of the opacity", "sought"),
        ("The right lower zone no longer shows an opacity", "resolved"),
        ("Failed to show any opacity", "negated"),
        ("Nil focal opacity", "negated"),
        ("An opacity has been ruled out", "negated"),
        ("An opacity is felt to be unlikely", "negated"),
        ("There isn't any opacity", "negated"),
        ("Lungs devoid of opacity", "negated"),
        ("Doubt opacity", "uncertain"),
        ("No doubt an opacity", "affirmed"),
        ("An opacity isn't seen", "negated"),
    ],
)
def test_what_a_sentence_says(sentence: str, status: str):
    assert _status(sentence) == status


def test_a_cue_behind_belongs_to_the_nearest_finding():
    sentence = "The left opacity is stable, the right consolidation has resolved"
    heads = [(9, 16), (38, 51)]
    assert sentence[slice(*heads[1])] == "consolidation"
    assert read_status(sentence, *heads[0], heads).status == "affirmed"
    assert read_status(sentence, *heads[1], heads).status == "resolved"


def test_joined_findings_share_a_cue_behind():
    sentence = "Opacity and consolidation are not seen"
    heads = [(0, 7), (12, 25)]
    assert read_status(sentence, *heads[0], heads).status == "negated"


def test_something_else_is_said_of_a_part():
    sentence = "Two polyps, one removed previously"
    reading = read_status(sentence, 4, 10)
    assert reading.status == "affirmed"
    assert reading.in_part


def test_the_span_goes_from_cue_to_word():
    reading = read_status("Today no effusion or opacity", 21, 28)
    assert "Today no effusion or opacity"[slice(*reading.span)] == "no effusion or opacity"


def test_lookalikes_are_blanked_in_place():
    sentence = "No significant change since the previous film"
    blanked = without_lookalikes(sentence)
    assert len(blanked) == len(sentence)
    assert not blanked.strip()
