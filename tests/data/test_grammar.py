from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmca.data.grammar import (
    COLOURS,
    LEVELS,
    PARAPHRASES,
    PLACES,
    SHAPES,
    SIDES,
    SIZES,
    THIRDS,
    Facts,
    contradict,
    grammar_of,
    mirror,
    parse,
    stated,
    unknown_words,
    write_sentence,
)
from tmca.data.layouts import open_dataset
from tmca.errors import ConfigError

DATASETS = Path(__file__).resolve().parents[3] / "shared" / "data"


# The strategies make the fields and the tests the facts: executed annotations draw random numbers, which hypothesis
# does not allow in strategies.
Fields = dict[str, Any]


def _in_order(words: tuple[str, ...], least: int = 0) -> st.SearchStrategy[tuple[str, ...]]:
    """Some of the words, each once, in their order."""
    return st.sets(st.sampled_from(words), min_size=least).map(
        lambda chosen: tuple(word for word in words if word in chosen)
    )


targets = st.fixed_dictionaries(
    {
        "grammar": st.sampled_from(["polyp", "phantom"]),
        "present": st.just(True),
        "sizes": _in_order(SIZES),
        "colour": st.none() | st.sampled_from(COLOURS),
        "shape": st.none() | st.sampled_from(SHAPES),
        "places": st.lists(st.sampled_from(PLACES), min_size=1, max_size=12).map(
            lambda places: tuple(sorted(places, key=PLACES.index))
        ),
    }
).map(lambda fields: {**fields, "count": len(fields["places"])})
lungs = st.fixed_dictionaries(
    {
        "grammar": st.just("lung"),
        "present": st.just(True),
        "count": st.integers(1, 15),
        "sides": _in_order(SIDES, least=1),
        "left": _in_order(THIRDS, least=1),
        "right": _in_order(THIRDS, least=1),
    }
).map(
    lambda fields: {
        **fields,
        "bilateral": len(fields["sides"]) == 2,
        **{side: () for side in SIDES if side not in fields["sides"]},
    }
)
absences = st.fixed_dictionaries(
    {"grammar": st.sampled_from(["polyp", "phantom", "lung"]), "present": st.just(False), "count": st.just(0)}
)
anything = targets | lungs | absences
wordings = st.integers(0, PARAPHRASES - 1)


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


@given(fields=targets, paraphrase=wordings)
def test_mirrored_sentences_state_mirrored_places(fields: Fields, paraphrase: int):
    facts = Facts(**fields)
    text = write_sentence(facts, paraphrase=paraphrase)
    exchange = {"left": "right", "right": "left"}
    expected = [re.sub("left|right", lambda match: exchange[match[0]], place) for place in facts.places]
    assert sorted(parse(mirror(text, "horizontal") or "").places) == sorted(expected)


@given(fields=lungs, paraphrase=wordings)
def test_mirrored_sentences_exchange_the_lungs(fields: Fields, paraphrase: int):
    facts = Facts(**fields)
    mirrored = parse(mirror(write_sentence(facts, paraphrase=paraphrase), "horizontal") or "")
    assert (mirrored.left, mirrored.right) == (facts.right, facts.left)


@given(fields=anything, level=st.sampled_from(LEVELS[1:]), paraphrase=wordings)
def test_contradictions_state_other_facts(fields: Fields, level: str, paraphrase: int):
    facts = Facts(**fields)
    text = write_sentence(facts, level, paraphrase)
    contradiction = contradict(text)
    if contradiction is not None:
        assert parse(contradiction) != parse(text)
    if stated(facts, level).places and len(set(facts.places)) < len(PLACES):
        assert not set(parse(contradiction or "").places) & set(facts.places)


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


polyp_texts = st.builds(
    lambda count, size, colour, shape, places: (
        f"{count} {size} {colour} {shape} polyp, located in {', '.join(places)} of the image"
    ),
    st.sampled_from(["one", "two", "three", "four"]),
    st.sampled_from(["small", "medium", "large"]),
    st.sampled_from(["white", "bright", "dark"]),
    st.sampled_from(["round", "oval"]),
    st.lists(st.sampled_from(PLACES), min_size=1, max_size=4),
)
regions = st.builds(
    lambda heights, side: f"{heights} {side} lung",
    st.sampled_from(["all", "upper", "middle", "lower", "upper lower", "middle lower", "upper middle lower"]),
    st.sampled_from(["left", "right"]),
)
lung_texts = st.builds(
    lambda side, count, areas: f"{side} pulmonary infection, {count}, {' and '.join(areas)}.",
    st.sampled_from(["Bilateral", "Unilateral"]),
    st.sampled_from(["one infected area", "two infected areas", "five infected areas"]),
    st.lists(regions, min_size=1, max_size=2),
)
sentences = polyp_texts | lung_texts


def _places(text: str) -> frozenset[str]:
    """Return the places a sentence of either grammar names."""
    if "located in" in text:
        return frozenset(re.findall(r"located in (.*) of the image", text)[0].split(", "))
    return frozenset(
        f"{height} {side}"
        for heights, side in re.findall(r"((?:(?:all|upper|middle|lower)\s+)*)(left|right)", text)
        for height in (heights.split() if heights and "all" not in heights else ["upper", "middle", "lower"])
    )


@pytest.mark.parametrize(
    ("text", "horizontal", "vertical"),
    [
        (
            "two small white round polyp, located in top left, bottom of the image",
            "two small white round polyp, located in top right, bottom of the image",
            "two small white round polyp, located in bottom left, top of the image",
        ),
        (
            "Bilateral pulmonary infection, two infected areas, upper left lung and middle right lung.",
            "Bilateral pulmonary infection, two infected areas, upper right lung and middle left lung.",
            None,
        ),
        ("one small pink polyp", "one small pink polyp", "one small pink polyp"),
        ("LEFT-most, Upper (right)!", "RIGHT-most, Upper (left)!", "LEFT-most, Lower (right)!"),
        ("upright stop", "upright stop", "upright stop"),
        ("one polyp in the leftmost part of the image", None, "one polyp in the leftmost part of the image"),
        ("small polyp, lft upper corner", None, "small polyp, lft lower corner"),
        ("polyp at 9 o'clock", None, None),
        ("polyp at 3:00 position", None, None),
        ("RLL consolidation", None, None),
        ("opacity in the lingula", None, None),
        ("polyp in LUQ", None, None),
        ("polyp high in the image", "polyp high in the image", None),
        ("ein kleiner Polyp links", None, "ein kleiner Polyp links"),
        ("a polyp in the uppermost part", "a polyp in the uppermost part", None),
        ("consolidation in the L lower zone", None, None),
        ("opacity in the left upper zone", "opacity in the right upper zone", None),
        ("Unilateral pulmonary infection, one infected area, lower leff lung.", None, None),
        ("on the lEFT", None, "on the lEFT"),
        ("", "", ""),
    ],
)
def test_mirror(text: str, horizontal: str | None, vertical: str | None):
    assert mirror(text, "horizontal") == horizontal
    assert mirror(text, "vertical") == vertical


@given(text=sentences | st.text(max_size=20), axis=st.sampled_from(["horizontal", "vertical"]))
def test_mirroring_twice_gives_the_sentence_back(text: str, axis: str):
    mirrored = mirror(text, axis)  # type: ignore[arg-type]
    assert mirrored is None or mirror(mirrored, axis) == text  # type: ignore[arg-type]


@given(text=sentences)
def test_every_sentence_of_the_grammars_has_a_horizontal_mirror_image(text: str):
    mirrored = mirror(text, "horizontal")
    assert mirrored is not None
    exchange = {"left": "right", "right": "left"}
    expected = {re.sub("left|right", lambda match: exchange[match[0]], place) for place in _places(text)}
    assert _places(mirrored) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one small bright round lesion", "two large dark round lesions"),
        (
            "one small bright round lesion, located in top left of the image",
            "two large dark round lesions, located in bottom right of the image",
        ),
        (
            "two large bright lesions, located in left, center of the image",
            "one small dark lesion, located in right of the image",
        ),
        (
            "three medium white round polyp, located in top left, bottom right, center of the image",
            "three medium white round polyp, located in top right, bottom left, top of the image",
        ),
        (
            "one medium pink polyp, located in center of the image",
            "two medium pink polyp, located in top left of the image",
        ),
        ("no lesion in the image", "one large bright round lesion, located in center of the image"),
        (
            "No pulmonary infection, zero infected areas.",
            "Unilateral pulmonary infection, one infected area, lower left lung.",
        ),
        (
            "Unilateral pulmonary infection, one infected area, lower left lung.",
            "Unilateral pulmonary infection, one infected area, upper right lung.",
        ),
        (
            "Bilateral pulmonary infection, two infected areas, all left lung and all right lung.",
            "Unilateral pulmonary infection, one infected area, all left lung.",
        ),
        (
            "Bilateral pulmonary infection, two infected areas, lower left lung and upper right lung.",
            "Unilateral pulmonary infection, one infected area, upper left lung.",
        ),
        ("the Upper nodule", "the Lower nodule"),
        ("pink polyp", None),
        ("lung", None),
        ("", None),
    ],
)
def test_contradict(text: str, expected: str | None):
    assert contradict(text) == expected


@given(text=sentences)
def test_a_contradiction_never_names_the_same_places(text: str):
    contradiction = contradict(text)
    assert contradiction is not None
    assert _places(contradiction) != _places(text)


@given(text=polyp_texts)
def test_a_contradiction_of_places_names_none_of_them(text: str):
    assert not _places(contradict(text) or "") & _places(text)


@given(text=st.text(max_size=20) | sentences)
def test_a_contradiction_is_never_the_sentence_itself(text: str):
    assert contradict(text) != text


def test_all_nine_places_still_change_something():
    text = f"nine small white polyp, located in {', '.join(PLACES)} of the image"
    assert contradict(text) == "nine large white polyp, located in bottom right of the image"


@pytest.mark.data
@pytest.mark.parametrize(("name", "unmirrored"), [("qata_cov19", 0.01), ("kvasir_polyp", 0.0)])
def test_published_sentences(name: str, unmirrored: float):
    if not (DATASETS / name).is_dir():
        pytest.skip(f"the dataset {name} is not in {DATASETS}")
    manifest = open_dataset(DATASETS / name)
    unknown = {text for text in manifest.sentences if mirror(text, "horizontal") is None}
    assert sum(record.text in unknown for record in manifest.records) <= unmirrored * len(manifest.records)
    for text in manifest.sentences:
        contradiction = contradict(text)
        assert contradiction not in (None, text)
        if text not in unknown:  # misspelled words would hide places from the comparison
            assert _places(contradiction or "") != _places(text)
