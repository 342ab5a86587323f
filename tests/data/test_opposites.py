from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentences import Fields, anything, lungs, polyp_texts, sentences, targets, wordings

from tmca.data.grammar import LEVELS, PLACES, Facts, parse, stated, write_sentence
from tmca.data.layouts import open_dataset
from tmca.data.opposites import contradict, mirror

DATASETS = Path(__file__).resolve().parents[3] / "shared" / "data"


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
