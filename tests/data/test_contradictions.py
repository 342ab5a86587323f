from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmca.data.contradictions import Contradiction, contradictions, correct_manifest, corrected
from tmca.data.describe import describe, measure
from tmca.data.grammar import GRAMMARS, LEVELS, parse
from tmca.data.manifest import Manifest, Record
from tmca.data.phantom import draw_phantom
from tmca.errors import DataError
from tmca.imaging.raster import write_image, write_mask

SIZE = 90
blocks = st.tuples(st.integers(0, 80), st.integers(0, 80), st.integers(1, 60), st.integers(1, 60))


def _mask(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    """Rectangles given by top, left, height and width."""
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    for top, left, height, width in boxes:
        mask[top : top + height, left : left + width] = True
    return mask


def test_absent_lesions_contradict_their_mask():
    phantom = draw_phantom(np.random.default_rng(0), 64, absent=True)
    assert [found.kind for found in contradictions(phantom.text, phantom.mask)] == ["presence"]


@pytest.mark.parametrize(
    ("text", "boxes", "kinds"),
    [
        ("no polyp in the image", [(10, 10, 9, 9)], ["presence"]),
        ("one small polyp", [], ["presence"]),
        ("No pulmonary infection, zero infected areas.", [], []),
        ("three small polyp", [(10, 10, 9, 9)], ["count"]),
        ("one small polyp", [(10, 10, 9, 9), (11, 20, 9, 9)], []),  # a gap of one pixel
        ("two small polyp", [(10, 10, 9, 9), (80, 80, 1, 1)], []),  # a speck, or not
        ("one large polyp", [(10, 10, 9, 9)], ["size"]),
        ("one medium polyp", [(10, 10, 24, 25)], []),  # 7.4 %, near 8 %
        ("one small, large polyp", [(10, 10, 9, 9)], ["size"]),
        ("one polyp, located in right of the image", [(40, 3, 9, 9)], ["side"]),
        ("one polyp, located in bottom left of the image", [(3, 3, 9, 9)], ["height"]),
        ("one polyp, located in bottom right of the image", [(3, 3, 9, 9)], ["side", "height"]),
        ("one polyp, located in left of the image", [(40, 26, 14, 11)], []),  # near the border
        ("two polyp, located in top left, right of the image", [(10, 10, 9, 9), (40, 70, 9, 9)], []),
        ("one polyp, located in top left of the image", [(3, 80, 9, 9), (80, 3, 9, 9)], ["count", "side"]),
        ("Unilateral pulmonary infection, one infected area, lower right lung.", [(60, 5, 20, 30)], ["side"]),
        ("Unilateral pulmonary infection.", [(60, 5, 20, 30), (60, 55, 20, 30)], ["side"]),
        ("Bilateral pulmonary infection.", [(60, 5, 20, 30)], ["side"]),
        ("Bilateral pulmonary infection.", [(60, 30, 20, 30)], []),  # across the midline
        ("Bilateral pulmonary infection.", [(0, 13, 1, 33)], []),  # by as little as the measurement counts
        ("Unilateral pulmonary infection, one infected area, upper left lung.", [(60, 5, 20, 30)], ["height"]),
        ("Unilateral pulmonary infection, one infected area, middle left lung.", [(40, 5, 20, 30)], []),
        ("Unilateral pulmonary infection, one infected area, uper right lung.", [(60, 5, 20, 30)], []),
        ("Bilateral pulmonary infection, four infected areas.", [(60, 5, 20, 30), (60, 55, 20, 30)], ["count"]),
        ("a patient with a cough", [(10, 10, 9, 9)], []),
        ("", [(10, 10, 9, 9)], []),
    ],
)
def test_contradictions(text: str, boxes: list[tuple[int, int, int, int]], kinds: list[str]):
    assert [found.kind for found in contradictions(text, _mask(*boxes))] == kinds


def test_contradictions_tell_what_was_said_and_seen():
    lung = "Unilateral pulmonary infection, one infected area, lower right lung."
    assert contradictions(lung, _mask((60, 5, 20, 30))) == [
        Contradiction("side", "unilateral, right", "left (left 100 %, right 0 %)")
    ]
    assert contradictions("two large polyp", _mask((3, 3, 9, 9))) == [
        Contradiction("count", "2", "1"),
        Contradiction("size", "large", "small (1.0 % of the image)"),
    ]


@pytest.mark.parametrize(
    ("text", "boxes", "right"),
    [
        (
            "two large white round polyp, located in top left, bottom of the image",
            [(0, 0, 1, 1), (50, 30, 35, 50)],  # the speck that the published sentences count
            "one medium white round polyp, located in bottom of the image",
        ),
        ("three small pink polyp", [(10, 10, 9, 9)], "one small pink polyp"),
        (
            "one round polyp, located in left of the image",
            [(40, 70, 9, 9)],
            "one round polyp, located in right of the image",
        ),
        ("one small polyp in the top left", [(3, 3, 9, 9)], "one small polyp in the top left"),  # its own wording
        ("one bumpy growth, two or so", [(3, 3, 9, 9)], "one bumpy growth, two or so"),
        ("one small polyp", [], "no polyp in the image"),
        ("no polyp in the image", [(3, 3, 9, 9)], "one small round polyp, located in top left of the image"),
        (
            "Unilateral pulmonary infection, one infected area, lower right lung.",
            [(60, 5, 20, 30)],
            "Unilateral pulmonary infection, one infected area, lower left lung.",
        ),
        ("Unilateral pulmonary infection.", [(60, 5, 20, 30), (60, 55, 20, 30)], "Bilateral pulmonary infection."),
        (
            "Bilateral pulmonary infection, four infected areas.",
            [(60, 5, 20, 30)],
            "Unilateral pulmonary infection, one infected area.",
        ),
    ],
)
def test_corrections(text: str, boxes: list[tuple[int, int, int, int]], right: str):
    assert corrected(text, _mask(*boxes)) == right


def test_unknown_words_are_not_lost_by_a_correction():
    with pytest.raises(DataError, match="spongy would be lost"):
        corrected("three spongy polyp", _mask((10, 10, 9, 9)))
    with pytest.raises(DataError, match="spongy would be lost"):
        corrected("a spongy polyp", _mask())


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("two small pink polyps, left side of the image", "left"),
        ("two polyps in the left of the image, pink and round", "pink, round"),
        ("two red pink polyps", "pink"),
        ("Unilateral infection of the right lung, two infected areas, right lung upper", "right, upper"),
    ],
)
def test_known_words_that_are_not_understood_are_not_lost_by_a_correction(text: str, lost: str):
    with pytest.raises(DataError, match=f"{lost} would be lost"):
        corrected(text, _mask((40, 5, 20, 20)))


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("one infected area in the right lung, no infected area in the left lung", [(40, 60, 20, 20)]),
        ("the lungs are not infected", []),
        ("polyp not seen", []),
        ("without polyp", []),
        ("12 mm polyp in the left of the image", [(40, 5, 20, 20)]),
        ("polyp of 12.5 % of the image", [(40, 5, 20, 20)]),
        ("frame 12: one polyp", [(40, 5, 20, 20)]),
        ("Grade 3 lesion", [(40, 5, 20, 20)]),
    ],
)
def test_what_is_not_told_for_sure_contradicts_nothing(text: str, boxes: list[tuple[int, int, int, int]]):
    assert contradictions(text, _mask(*boxes)) == []


@pytest.mark.parametrize(("text", "count"), [("frame 12: two polyps", 2), ("there are 3 polyps", 3), ("3 polyps", 3)])
def test_figures_that_count_are_told_from_others(text: str, count: int):
    assert parse(text).count == count


@given(
    mask=st.lists(blocks, max_size=4).map(lambda boxes: _mask(*boxes)),
    other=st.lists(blocks, max_size=4).map(lambda boxes: _mask(*boxes)),
    grammar=st.sampled_from(GRAMMARS),
    level=st.sampled_from(LEVELS[1:]),
)
def test_a_corrected_sentence_contradicts_nothing_and_says_as_much(
    mask: np.ndarray, other: np.ndarray, grammar: str, level: str
):
    text = describe(other, None, grammar, level)
    right = corrected(text, mask)
    assert contradictions(right, mask) == []
    assert corrected(right, mask) == right
    said, now = parse(text), parse(right)
    if said.present and now.present:
        assert (said.colour, said.shape) == (now.colour, now.shape)
        assert [fact is None for fact in (said.count, said.bilateral)] == [
            fact is None for fact in (now.count, now.bilateral)
        ]
        assert [bool(facts) for facts in (said.places, said.sides)] == [
            bool(facts) for facts in (now.places, now.sides)
        ]
        # Of phantoms only what all share is stated.
        assert grammar == "phantom" or bool(said.sizes) == bool(now.sizes)
    elif right != text:
        assert now.present == bool(mask.any()) == measure(mask, None, grammar).present


def test_correcting_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_image(tmp_path / "image.png", np.zeros((SIZE, SIZE, 3), dtype=np.uint8))
    write_mask(tmp_path / "mask.png", _mask((3, 3, 9, 9)))
    texts = ["one small polyp", "two small polyp, located in right of the image", "two spongy polyp", None]
    records = [Record(f"{number}", "image.png", mask="mask.png", text=text) for number, text in enumerate(texts)]
    records.append(Record("4", "image.png", text="nine polyp"))
    records.append(Record("5", "image.png", mask="gone.png", text="nine polyp"))
    manifest = Manifest(tmp_path, tuple(records), "drawn")

    right = correct_manifest(manifest)
    assert [record.text for record in right.records] == [
        "one small polyp",
        "one small polyp, located in top left of the image",
        "two spongy polyp",
        None,
        "nine polyp",
        "nine polyp",
    ]
    assert [record.text_provenance for record in right.records] == ["human", "from_mask", *["human"] * 4]
    said = capsys.readouterr().err
    assert "1 of 4 sentences corrected (count 1, side 1, height 1)" in said
    assert "2 could not be judged or corrected and stay as they are" in said
    assert "gone.png does not exist" in said
    assert "2: “two spongy polyp” contradicts its mask, and spongy would be lost" in said
    assert correct_manifest(right).records == right.records


def test_nothing_to_correct(tmp_path: Path):
    write_image(tmp_path / "image.png", np.zeros((SIZE, SIZE, 3), dtype=np.uint8))
    write_mask(tmp_path / "mask.png", _mask((3, 3, 9, 9)))
    records = (Record("0", "image.png", mask="mask.png"), Record("1", "image.png", text="nine polyp"))
    with pytest.raises(DataError, match=r"no case of drawn has both a sentence and a mask .*tmca data describe"):
        correct_manifest(Manifest(tmp_path, records, "drawn"))
