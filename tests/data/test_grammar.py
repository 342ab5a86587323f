from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentences import Fields, anything, wordings

from tmca.data.grammar import (
    LEVELS,
    PARAPHRASES,
    SIDES,
    THIRDS,
    Facts,
    grammar_of,
    parse,
    stated,
    unknown_words,
    write_sentence,
)
from tmca.errors import ConfigError


@given(fields=anything, level=st.sampled_from(LEVELS), paraphrase=wordings)
def test_parsing_a_written_sentence_returns_its_facts(fields: Fields, level: str, paraphrase: int):
    facts = Facts(**fields)
    text = write_sentence(facts, level, paraphrase)
    expected = stated(facts, level)
    if text:
        assert parse(text) == expected
        assert grammar_of(text) == facts.grammar
        assert unknown_words(text) == []
    else:
        assert level == "p0"
        assert expected == Facts(facts.grammar)


@given(fields=anything)
def test_paraphrases_differ_and_repeat_after_the_last(fields: Fields):
    facts = Facts(**fields)
    texts = [write_sentence(facts, paraphrase=number) for number in range(PARAPHRASES)]
    assert len(set(texts)) == PARAPHRASES
    assert write_sentence(facts, paraphrase=PARAPHRASES) == texts[0]


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("", Facts("polyp")),
        ("what is this?", Facts("polyp")),
        ("polyp", Facts("polyp", present=True)),
        (
            "one small white circle polyp, located in top left, right of the image",
            Facts(
                "polyp",
                present=True,
                count=1,
                sizes=("small",),
                colour="white",
                shape="round",
                places=("top left", "right"),
            ),
        ),
        (
            "three small, medium white round polyp, located in center, center of the image",
            Facts(
                "polyp",
                present=True,
                count=3,
                sizes=("small", "medium"),
                colour="white",
                shape="round",
                places=("center", "center"),
            ),
        ),
        ("polyp which is a small lump in the lining of colon", Facts("polyp", present=True)),
        ("one medium brown middle of round polyp", parse("one medium brown round polyp")),
        ("pink polyp on the right", Facts("polyp", present=True, colour="pink", places=("right",))),
        ("12 polyps in the upper left and the middle", parse("12 polyps, located in top left, center of the image")),
        ("no lesion in the image", Facts("phantom", present=False, count=0)),
        ("no polyp on the left side", Facts("polyp")),
        ("two large lesions", Facts("phantom", present=True, count=2, sizes=("large",))),
        (
            "Bilateral pulmonary infection, two infected areas, higher left lung and all right lung.",
            Facts("lung", True, 2, bilateral=True, sides=SIDES, left=("upper",), right=THIRDS),
        ),
        (
            "Bilateral pulmonary infection,two infected areas,lower middle left and lower right lung.",
            Facts("lung", True, 2, bilateral=True, sides=SIDES, left=("middle", "lower"), right=("lower",)),
        ),
        (
            "Unilateral pulmonary infection, one infected areas, left lung and middle right lung.",
            Facts("lung", True, 1, bilateral=False, sides=("right",), right=("middle",)),
        ),
        ("No pulmonary infection, zero infected areas.", Facts("lung", present=False, count=0)),
        ("both lungs", Facts("lung", bilateral=True)),
    ],
)
def test_parse(text: str, facts: Facts):
    assert parse(text) == facts


@pytest.mark.parametrize(
    "regions",
    ["lower leff lung", "middle right left lung", "upper lung and lower right lung", "left lung upper"],
)
def test_sides_that_cannot_be_told_for_sure_are_not_stated(regions: str):
    facts = parse(f"Bilateral pulmonary infection, two one infected area, {regions}.")
    assert facts == Facts("lung", present=True, bilateral=True)


@pytest.mark.parametrize(
    ("text", "present", "count"),
    [
        ("12-mm polyp", True, None),
        ("5 to 6 mm polyp", True, None),
        ("70-year-old man, polyp", True, None),
        ("0-IIa polyp", None, None),
        ("no bleeding, one polyp", True, 1),
        ("There is no bleeding. A small polyp is visible.", None, None),
        ("no ulcer; small polyp", None, None),
        ("no visible polyp", None, None),
        ("no small polyp in the image", False, 0),
        ("one sessile polyp", True, 1),
        ("two biopsies of one polyp", True, 1),
    ],
)
def test_a_number_counts_only_what_it_surely_stands_before(text: str, present: bool | None, count: int | None):
    facts = parse(text)
    assert (facts.present, facts.count) == (present, count)


def test_unknown_words():
    assert unknown_words("Bilateral pulmonary infection, 2 infected areas, Midle left lunge and midle right lung.") == [
        "midle",
        "lunge",
    ]
    assert unknown_words("one small pink polyp, located in top of the image") == []
    assert unknown_words("ein kleiner Polyp") == ["ein", "kleiner"]


def test_unknown_level():
    with pytest.raises(ConfigError, match="Unknown level 'p7'"):
        write_sentence(Facts("polyp", present=True), "p7")
