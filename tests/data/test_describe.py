from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tmca.data.contradictions import contradictions
from tmca.data.describe import describe, describe_manifest, measure, provenance_notice
from tmca.data.grammar import GRAMMARS, LEVELS, PARAPHRASES, parse, stated
from tmca.data.layouts import open_dataset
from tmca.data.manifest import Manifest, Record
from tmca.data.phantom import draw_phantom
from tmca.errors import ConfigError, DataError
from tmca.imaging.raster import read_mask, write_image, write_mask

SIZE = 90
masks = npst.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40)))
blocks = st.tuples(st.integers(0, 80), st.integers(0, 80), st.integers(1, 60), st.integers(1, 60))


def _mask(*boxes: tuple[int, int, int, int], size: int = SIZE) -> np.ndarray:
    """Rectangles given by top, left, height and width."""
    mask = np.zeros((size, size), dtype=bool)
    for top, left, height, width in boxes:
        mask[top : top + height, left : left + width] = True
    return mask


def _disc(row: float, column: float, down: float, across: float, size: int = 120) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    return ((rows - row) / down) ** 2 + ((columns - column) / across) ** 2 <= 1


@given(
    mask=masks | st.lists(blocks, max_size=5).map(lambda boxes: _mask(*boxes)),
    grammar=st.sampled_from(GRAMMARS),
    level=st.sampled_from(LEVELS),
    paraphrase=st.integers(0, PARAPHRASES - 1),
)
def test_parsing_a_described_mask_returns_its_facts(mask: np.ndarray, grammar: str, level: str, paraphrase: int):
    image = np.full((*mask.shape, 3), 90, dtype=np.uint8)
    image[mask] = (200, 120, 80)
    facts = measure(mask, image, grammar)  # type: ignore[arg-type]
    text = describe(mask, image, grammar, level, paraphrase)  # type: ignore[arg-type]
    assert (parse(text) if text else stated(facts, "p0")) == stated(facts, level)
    assert contradictions(text, mask) == []


@given(mask=masks, grammar=st.sampled_from(["polyp", "phantom"]))
def test_mirroring_a_mask_changes_neither_count_nor_sizes(mask: np.ndarray, grammar: str):
    facts, mirrored = (measure(one, None, grammar) for one in (mask, mask[:, ::-1]))  # type: ignore[arg-type]
    assert (facts.count, facts.sizes) == (mirrored.count, mirrored.sizes)


def test_polyps():
    mask = _mask((10, 10, 9, 9), (40, 40, 31, 45))
    facts = measure(mask)
    assert facts.count == 2
    assert facts.sizes == ("small", "medium")
    assert facts.places == ("top left", "right")
    assert facts.colour is None
    image = np.full((SIZE, SIZE, 3), 60, dtype=np.uint8)
    image[mask] = (235, 205, 200)
    assert describe(mask, image) == "two small, medium white oval polyp, located in top left, right of the image"


@pytest.mark.parametrize(
    ("mask", "shape"),
    [
        (_disc(60, 60, 30, 30), "round"),
        (_disc(60, 60, 15, 40), "oval"),
        (_disc(60, 60, 40, 40) & ~_disc(60, 75, 34, 34), "irregular"),
        (_mask((10, 10, 1, 1)), "round"),
        (_mask((10, 10, 1, 30)), "oval"),
    ],
)
def test_shapes(mask: np.ndarray, shape: str):
    assert measure(mask).shape == shape


@pytest.mark.parametrize(
    ("rgb", "word"),
    [
        ((250, 245, 235), "white"),
        ((20, 20, 25), "black"),
        ((130, 132, 131), "gray"),
        ((200, 40, 40), "red"),
        ((225, 205, 80), "yellow"),
        ((120, 80, 45), "brown"),
        ((230, 125, 60), "orange"),
        ((235, 140, 130), "pink"),
    ],
)
def test_colours(rgb: tuple[int, int, int], word: str):
    mask = _mask((30, 30, 20, 20))
    image = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    image[mask] = rgb
    assert measure(mask, image).colour == word


def test_a_speck_is_no_target_unless_it_is_all_there_is():
    assert measure(_mask((0, 0, 1, 1), (40, 40, 20, 20))).count == 1
    assert measure(_mask((0, 0, 1, 1))).places == ("top left",)


def test_diagonal_neighbours_are_one_part():
    assert measure(_mask((10, 10, 20, 20), (30, 30, 20, 20))).count == 1


@pytest.mark.parametrize(
    ("boxes", "text"),
    [
        ([(5, 5, 20, 30)], "Unilateral pulmonary infection, one infected area, upper left lung."),
        (
            [(5, 5, 75, 30), (60, 55, 20, 30)],
            "Bilateral pulmonary infection, two infected areas, all left lung and lower right lung.",
        ),
        ([], "No pulmonary infection, zero infected areas."),
    ],
)
def test_lungs(boxes: list[tuple[int, int, int, int]], text: str):
    assert describe(_mask(*boxes), None, "lung") == text


@given(seed=st.integers(0, 10_000))
def test_phantoms_are_described_as_drawn(seed: int):
    phantom = draw_phantom(np.random.default_rng(seed), 128, without_place=0.0)
    assert contradictions(phantom.text, phantom.mask) == []
    drawn, seen = parse(phantom.text), measure(phantom.mask, phantom.image, "phantom")
    assert (seen.count, seen.sizes, seen.colour) == (drawn.count, drawn.sizes, drawn.colour)


def test_wrong_arguments():
    with pytest.raises(DataError, match="90×90, its image 10×20"):
        measure(_mask(), np.zeros((20, 10, 3), dtype=np.uint8))
    with pytest.raises(ConfigError, match="Unknown level"):
        describe(_mask((1, 1, 9, 9)), level="p9")


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    records = []
    for number in range(8):
        write_image(tmp_path / f"{number}.png", np.zeros((SIZE, SIZE, 3), dtype=np.uint8))
        write_mask(tmp_path / f"{number}_mask.png", _mask((10 * number, 10, 9, 9)))
        records.append(Record(f"{number}", f"{number}.png", mask=f"{number}_mask.png"))
    records[1] = replace(records[1], text="a person's sentence")
    records[2] = replace(records[2], text="an older description", text_provenance="from_mask")
    records[3] = replace(records[3], mask=None)
    return Manifest(tmp_path, tuple(records), "drawn")


def test_describing_a_manifest(manifest: Manifest, capsys: pytest.CaptureFixture[str]):
    described = describe_manifest(manifest, "polyp", "p6")
    texts = [record.text for record in described.records]
    assert texts[0] == "one small black round polyp, located in top left of the image"
    assert texts[2] == texts[0]  # an older description is renewed
    assert texts[1] == "a person's sentence"
    assert texts[3] is None
    assert [record.text_provenance == "from_mask" for record in described.records] == [True, False, True, False] + 4 * [
        True
    ]
    assert capsys.readouterr().err == (
        "6 of 8 cases described; 1 have no mask; 1 keep the sentence they had (--replace-sentences replaces it)\n"
    )
    again = describe_manifest(described, "polyp", "p1", overwrite=True)
    assert [record.text for record in again.records] == ["polyp"] * 3 + [None] + ["polyp"] * 4
    assert [record.text for record in describe_manifest(described, "polyp", "p0", overwrite=True).records] == [None] * 8


def test_wordings_depend_on_seed_and_case_only(manifest: Manifest):
    texts = {
        record.id: record.text for record in describe_manifest(manifest, "lung", paraphrases=3, overwrite=True).records
    }
    assert len({text.split()[0] for text in texts.values() if text}) > 1
    some = manifest.select(["5", "6", "7"])
    part = describe_manifest(some, "lung", paraphrases=3, overwrite=True)
    assert [record.text for record in part.records] == [texts[name] for name in ("5", "6", "7")]
    other = describe_manifest(manifest, "lung", paraphrases=3, seed=1, overwrite=True)
    assert [record.text for record in other.records] != list(texts.values())


def test_describing_a_manifest_refuses(manifest: Manifest, tmp_path: Path):
    with pytest.raises(ConfigError, match="4 paraphrases"):
        describe_manifest(manifest, "polyp", paraphrases=4)
    with pytest.raises(ConfigError, match="Unknown level"):
        describe_manifest(manifest, "polyp", "p9")
    write_mask(tmp_path / "5_mask.png", _mask(size=60))
    with pytest.raises(DataError, match="Case '5': The mask is 60×60"):
        describe_manifest(manifest, "polyp")


def test_provenance_notice(manifest: Manifest):
    notice = provenance_notice(manifest)
    assert notice is not None
    assert notice.startswith("1 of 2 sentences were written from the masks")
    assert provenance_notice(manifest.with_records(manifest.records[:2])) is None
    assert provenance_notice(manifest.with_records(())) is None


def test_agreement_with_published_sentences(shared: Path):
    manifest = open_dataset(shared / "data" / "kvasir_polyp").split("test")
    pairs = [
        (parse(record.text or ""), measure(read_mask(manifest.root / (record.mask or ""))))
        for record in manifest.records
    ]
    assert sum(said.count == seen.count for said, seen in pairs) == 86
    assert sum(said.sizes == seen.sizes for said, seen in pairs) >= 95
