from __future__ import annotations

import pytest

from tmca.data.grammar import Grammar
from tmca.reports.findings import Mention, find_mentions, names_one_more, names_other
from tmca.reports.sections import split_report


def _mentions(text: str, grammar: Grammar = "lung") -> list[Mention]:
    return find_mentions(split_report(text), grammar)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Two polyps", 2),
        ("2 polyps", 2),
        ("Two (2) polyps", 2),
        ("Polyps x 3", 3),
        ("Polyps: 4", 4),
        ("Polyp: 4 mm", None),
        ("A polyp", 1),
        ("A 5 mm polyp", 1),
        ("Single polyp", 1),
        ("12 mm polyp", None),
        ("Three 4 to 5 mm polyps", 3),
        ("2-3 polyps", None),
        ("Two or three polyps", None),
        ("At least four polyps", None),
        ("Another polyp", None),
        ("A second polyp", None),
        ("Several polyps", None),
        ("Polyps", None),
        ("Three polyps, two in the cecum and one in the rectum", 3),
    ],
)
def test_counts(text: str, count: int | None):
    (mention,) = _mentions(text, "polyp")
    assert mention.count == count
    assert [item.value for item in mention.stated if item.fact == "count"] == ([str(count)] if count else [])


def test_a_count_of_a_part_is_noticed():
    assert _mentions("Three polyps in the cecum and one in the rectum", "polyp")[0].in_part
    assert not _mentions("Three polyps, two in the cecum and one in the rectum", "polyp")[0].in_part


def test_an_amount_is_not_counted():
    assert _mentions("A small amount of consolidation")[0].count is None


def test_areas_are_counted_rather_than_their_opacity():
    (mention,) = _mentions("Two areas of patchy consolidation")
    assert (mention.count, mention.is_plural) == (2, True)
    (mention,) = _mentions("A focus of consolidation")
    assert (mention.count, mention.is_plural) == (1, False)


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("A small, white, round polyp", {"size": "small", "colour": "white", "shape": "round"}),
        ("The polyp was tan and oval", {"colour": "tan", "shape": "oval"}),
        ("The polyp, pink, was removed", {"colour": "pink"}),
        ("Polyp with a reddish surface", {"colour": "red"}),
        ("Medium-sized grey polyp", {"size": "medium", "colour": "gray"}),
        ("A flat lesion", {"shape": "flat"}),
        ("A polyp was removed with a large snare", {}),
        ("A polyp in the large bowel", {}),
        ("A polyp covered by red blood", {}),
        ("A polyp, red blood around it", {}),
        ("A polyp of the black mucosa", {}),
        ("The larger polyp is white", {}),
    ],
)
def test_adjectives(text: str, stated: dict[str, str]):
    (mention,) = _mentions(text, "polyp")
    assert {item.fact: item.value for item in mention.stated if item.fact != "count"} == stated


def test_it_and_they_mean_the_finding_of_the_sentence_before():
    first, second = _mentions("Two lesions. They lie in the top left and in the bottom of the image.", "phantom")
    assert [place.place for place in second.located] == ["top left", "bottom"]
    assert second.is_known
    assert first.count == 2
    assert len(_mentions("No lesion. It is dark.", "phantom")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "Opacity consistent with scarring",
        "Opacity, likely atelectasis",
        "Opacity is favored to represent edema",
        "Infection of the left arm",
        "Right breast infection",
        "Metallic opacity",
    ],
)
def test_findings_of_another_cause(text: str):
    assert _mentions(text)[0].cause


@pytest.mark.parametrize("text", ["Opacity, atelectasis or pneumonia", "Opacity consistent with infection", "Opacity"])
def test_findings_that_may_be_infections(text: str):
    assert not _mentions(text)[0].cause


@pytest.mark.parametrize(
    "text",
    [
        "The lungs are clear",
        "Lungs: clear bilaterally",
        "Both lungs are well expanded and clear",
        "Normal chest radiograph",
        "The chest film is normal",
        "No acute cardiopulmonary process",
        "No evidence of active lung disease",
    ],
)
def test_normal_lungs_deny_every_finding(text: str):
    (mention,) = _mentions(text)
    assert (mention.status, mention.is_normal, mention.is_everywhere) == ("negated", True, True)


def test_one_normal_lung_denies_its_own_side():
    (mention,) = _mentions("The left lung is clear")
    assert mention.located[0].sides == ("left",)
    assert not mention.is_everywhere


@pytest.mark.parametrize(
    ("text", "everywhere", "typed"),
    [
        ("No polyps", True, False),
        ("No polyps in the colon", True, False),
        ("No polyps in the rectum", False, False),
        ("Rectum: no polyps", False, False),
        ("No large polyps", True, True),
        ("No polyps larger than 5 mm", True, True),
    ],
)
def test_what_a_denial_covers(text: str, everywhere: bool, typed: bool):
    (mention,) = _mentions(text, "polyp")
    assert (mention.status, mention.is_everywhere, mention.is_typed) == ("negated", everywhere, typed)


def test_other_sections_are_not_read():
    assert _mentions("HISTORY: Opacity.\nTECHNIQUE: Opacity.\nCOMPARISON: Opacity.\nFINDINGS: Nothing.") == []


def test_words_that_the_rules_do_not_know_can_be_added():
    text = "FINDINGS: No effusion. Fluffy shadows in the right lower zone."
    start = text.index("Fluffy shadows")
    (mention,) = find_mentions(split_report(text), "lung", [(start, start + len("Fluffy shadows"))])
    assert mention.words == "Fluffy shadows"
    assert mention.located[0].thirds == ("lower",)


def test_other_organs_and_denials_are_known():
    assert names_other("pleural effusion", "lung")
    assert names_other("no shadows", "lung")
    assert not names_other("fluffy shadows", "lung")


def test_one_more_is_noticed():
    assert names_one_more(split_report("A polyp, and another one."))
    assert names_one_more(split_report("A small polyp. A larger one in the rectum."))
    assert not names_one_more(split_report("A polyp. No other."))
    assert not names_one_more(split_report("HISTORY: Another polyp.\nFINDINGS: A polyp."))
