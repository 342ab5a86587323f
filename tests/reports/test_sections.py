from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmca.reports.sections import split_report


def _split(text: str) -> list[tuple[str, str]]:
    return [(sentence.section, sentence.text) for sentence in split_report(text)]


def test_headers_open_sections_on_lines_of_their_own_and_within_a_line():
    text = "INDICATION: Cough.\nFindings\nClear lungs. IMPRESSION: Normal film.\nRecommendation - None."
    assert _split(text) == [
        ("history", "Cough"),
        ("findings", "Clear lungs"),
        ("impression", "Normal film"),
        ("recommendation", "None"),
    ]


def test_two_headers_joined_are_the_second():
    assert _split("Findings/Impression: Clear.") == [("impression", "Clear")]
    assert _split("Findings and impression: Clear.") == [("impression", "Clear")]


def test_text_before_the_first_header_is_findings():
    assert _split("Chest film.\nIMPRESSION: Clear.")[0] == ("findings", "Chest film")


def test_without_a_header_for_findings_they_follow_the_paragraph_of_the_last_header():
    assert _split("EXAM: Chest film\nLungs: Clear.") == [("technique", "Chest film"), ("findings", "Lungs: Clear")]
    assert _split("HISTORY: Pneumonia.\n\nThe lungs are clear.")[1] == ("findings", "The lungs are clear")
    assert _split("HISTORY: Pneumonia.\n\nLast year.\nFINDINGS: Clear.")[1] == ("history", "Last year")


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("A 0.5 cm polyp. Removed.", ["A 0.5 cm polyp", "Removed"]),
        ("Seen by Dr. Smith. Clear.", ["Seen by Dr. Smith", "Clear"]),
        ("1. Left base opacity.\n2. No effusion.", ["Left base opacity", "No effusion"]),
        ("1. Left base opacity. 2. No effusion.", ["Left base opacity", "No effusion"]),
        ("- One polyp\n- No bleeding", ["One polyp", "No bleeding"]),
        ("Cecum: normal\nRectum: one polyp", ["Cecum: normal", "Rectum: one polyp"]),
        ("Right lung clear; left base opacity", ["Right lung clear", "left base opacity"]),
        ("? pneumonia at the right base", ["? pneumonia at the right base"]),
        ("Cecum normal\nSigmoid with two polyps", ["Cecum normal", "Sigmoid with two polyps"]),
    ],
)
def test_sentences(text: str, sentences: list[str]):
    assert [sentence.text for sentence in split_report(text)] == sentences


def test_a_wrapped_line_goes_on():
    first = "There is consolidation in the lower zone of the right lung which is typical of"
    assert len(split_report(f"{first}\nCOVID-19 pneumonia.")) == 1


def test_what_is_too_long_for_a_sentence_is_not_read():
    long = "No effusion, " + "opacity " * 200
    assert [section for section, _ in _split(f"FINDINGS: {long}. Clear.")] == ["other", "findings"]


def test_carriage_returns_and_hard_spaces_are_blanks():
    text = "FINDINGS:\r\nA\xa0polyp.\r\nIMPRESSION:\r\nOne polyp.\r\n"
    assert [(item.section, item.text) for item in split_report(text)] == [
        ("findings", "A polyp"),
        ("impression", "One polyp"),
    ]


@given(st.text(alphabet="aB1.:;\n -?!FINDINGShistory\r\xa0", max_size=200))
def test_sentences_stand_where_they_say_and_do_not_overlap(text: str):
    last = 0
    for sentence in split_report(text):
        end = sentence.start + len(sentence.text)
        assert sentence.start >= last
        assert sentence.text.split() == text[sentence.start : end].split()
        last = end
