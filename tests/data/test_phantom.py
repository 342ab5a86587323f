from __future__ import annotations

import errno
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmca.data import phantom as phantom_module
from tmca.data.grammar import COUNT_WORDS, PLACES
from tmca.data.manifest import Manifest
from tmca.data.phantom import NO_LESION, Phantom, draw_phantom, write_phantoms
from tmca.errors import ConfigError, StorageError
from tmca.imaging.raster import read_image, read_mask

GRAMMAR = re.compile(
    r"(?P<count>one|two|three)(?: (?P<size>small|medium|large))?(?: (?P<brightness>bright|dark))?"
    r"(?: (?P<shape>round|oval))? lesions?(?:, located in (?P<places>[a-z, ]+) of the image)?"
)
MANY = [draw_phantom(np.random.default_rng(seed), 64) for seed in range(400)]


def _named(phantom: Phantom) -> list[str]:
    """Return the places of the lesions of the image that fit the sentence."""
    match = GRAMMAR.fullmatch(phantom.text)
    assert match, phantom.text
    places = match["places"].split(", ") if match["places"] else PLACES
    words = {word for word in match.group("size", "brightness", "shape") if word}
    return [lesion.place for lesion in phantom.lesions if lesion.place in places and words <= set(lesion.adjectives)]


@given(seed=st.integers(0, 2**32), size=st.sampled_from([32, 33, 64, 128]))
def test_the_sentence_names_the_targets_and_nothing_else(seed: int, size: int):
    phantom = draw_phantom(np.random.default_rng(seed), size)
    assert phantom.image.shape == (size, size, 3)
    assert phantom.image.dtype == np.uint8
    assert phantom.mask.shape == (size, size)
    assert 2 <= len(phantom.lesions) <= 4
    assert len({lesion.place for lesion in phantom.lesions}) == len(phantom.lesions)
    assert sorted(_named(phantom)) == sorted(lesion.place for lesion in phantom.targets)
    assert phantom.text.split()[0] == COUNT_WORDS[len(phantom.targets)]
    assert ("lesions" in phantom.text) == (len(phantom.targets) > 1)


@given(seed=st.integers(0, 2**32), size=st.sampled_from([32, 64]))
def test_the_mask_lies_where_the_sentence_says(seed: int, size: int):
    phantom = draw_phantom(np.random.default_rng(seed), size)
    rows, columns = np.nonzero(phantom.mask)
    cells = {PLACES[cell] for cell in np.unique(3 * (rows * 3 // size) + columns * 3 // size)}
    assert {lesion.place for lesion in phantom.targets} <= cells
    for lesion in phantom.lesions:
        centre = tuple(int(part * size) for part in lesion.centre)
        assert phantom.mask[centre] == (lesion in phantom.targets)
    expected = sum(np.pi * lesion.radii[0] * lesion.radii[1] for lesion in phantom.targets) * size**2
    assert phantom.mask.sum() == pytest.approx(expected, rel=0.15, abs=4 * len(phantom.targets))


def test_lesions_do_not_overlap_or_leave_the_image():
    for phantom in MANY:
        reach = max(lesion.radii[0] for lesion in phantom.lesions)
        assert reach < 0.22
        for number, lesion in enumerate(phantom.lesions):
            assert all(lesion.radii[0] < part < 1 - lesion.radii[0] for part in lesion.centre)
            for other in phantom.lesions[:number]:
                distance = np.hypot(*np.subtract(lesion.centre, other.centre))
                assert distance > lesion.radii[0] + other.radii[0]


def test_bright_and_dark_stand_out_from_the_background():
    for phantom in MANY:
        for lesion in phantom.lesions:
            row, column = (int(part * 64) for part in lesion.centre)
            reach = int(lesion.radii[0] * 64) + 4
            patch = phantom.image[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1]
            around = np.median(np.concatenate([patch[0], patch[-1]]).mean(axis=1))
            difference = phantom.image[row, column].mean() - around
            assert difference > 40 if lesion.brightness == "bright" else difference < -25


def test_sizes_are_clearly_apart():
    areas: dict[str, list[float]] = {"small": [], "medium": [], "large": []}
    for phantom in MANY:
        for lesion in phantom.lesions:
            areas[lesion.size].append(lesion.radii[0] * lesion.radii[1])
    assert max(areas["small"]) * 2 < min(areas["medium"])
    assert max(areas["medium"]) * 2 < min(areas["large"])


def test_shares_of_targets_places_and_properties():
    counts = Counter(len(phantom.targets) for phantom in MANY)
    assert 0.6 < counts[1] / len(MANY) < 0.8
    assert counts[2] > counts[3] > 0
    single = [phantom for phantom in MANY if len(phantom.targets) == 1]
    assert 0.05 < sum("located" not in phantom.text for phantom in single) / len(single) < 0.2
    words = Counter(
        word for phantom in MANY for lesion in phantom.lesions for word in (*lesion.adjectives, lesion.place)
    )
    assert len(words) == 7 + 9
    assert min(words.values()) > 80


def test_the_place_is_always_or_hardly_ever_named():
    always = [draw_phantom(np.random.default_rng(seed), 32, without_place=0.0) for seed in range(50)]
    assert all("located" in phantom.text for phantom in always)
    never = [draw_phantom(np.random.default_rng(seed), 32, without_place=1.0) for seed in range(50)]
    assert any("located" not in phantom.text for phantom in never)
    assert all(sorted(_named(phantom)) == sorted(lesion.place for lesion in phantom.targets) for phantom in never)


def test_the_image_alone_does_not_tell_the_target():
    """The target is as often the largest or the brightest lesion as any other."""
    single = [phantom for phantom in MANY if len(phantom.targets) == 1]
    largest = [phantom.targets[0] == max(phantom.lesions, key=lambda lesion: lesion.radii[1]) for phantom in single]
    chance = np.mean([1 / len(phantom.lesions) for phantom in single])
    assert abs(np.mean(largest) - chance) < 0.12


def test_without_lesions():
    phantom = draw_phantom(np.random.default_rng(0), 64, no_lesion=True)
    assert phantom.text == NO_LESION
    assert not phantom.mask.any()
    assert phantom.lesions == phantom.targets == ()
    assert phantom.image.std() > 3


def test_the_same_generator_gives_the_same_phantom():
    first, second, other = (draw_phantom(np.random.default_rng(seed), 64) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.mask, second.mask)
    assert first.text == second.text
    assert not np.array_equal(first.image, other.image)


def test_too_small_sizes_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="at least 32"):
        draw_phantom(np.random.default_rng(0), 31)
    with pytest.raises(ConfigError, match="at least 32"):
        write_phantoms(tmp_path / "phantoms", {"train": 1}, size=16)
    assert list(tmp_path.iterdir()) == []


# Folders ---------------------------------------------------------------------------------------------------------


def test_a_written_folder_is_a_dataset(tmp_path: Path):
    seen: list[int] = []
    written = write_phantoms(tmp_path / "phantoms", {"train": 5, "val": 2}, size=32, progress=seen.append)
    manifest = Manifest.read(tmp_path / "phantoms" / "manifest.csv")
    assert manifest == written
    assert manifest.splits == {"train": 5, "val": 2}
    assert seen == [1, 2, 3, 4, 5, 6, 7]
    manifest.check(require_text=True, require_mask=True)
    record = manifest.records[0]
    assert read_image(manifest.image_path(record)).shape == (32, 32, 3)
    assert read_mask(tmp_path / "phantoms" / str(record.mask)).any() == (record.text != NO_LESION)


def test_a_larger_count_begins_with_the_same_images(tmp_path: Path):
    few = write_phantoms(tmp_path / "few", {"test": 1, "train": 3}, size=32, seed=3)
    many = write_phantoms(tmp_path / "many", {"train": 5, "test": 2}, size=32, seed=3)
    other = write_phantoms(tmp_path / "other", {"test": 1, "train": 3}, size=32, seed=4)
    assert many.select(record.id for record in few.records).content_hash() == few.content_hash()
    assert other.content_hash() != few.content_hash()


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 6)])
def test_share_without_lesions(tmp_path: Path, share: float, expected: int):
    manifest = write_phantoms(tmp_path / "phantoms", {"train": 6}, size=32, no_lesion_share=share)
    assert sum(record.text == NO_LESION for record in manifest.records) == expected


def test_an_empty_folder_and_old_phantoms_are_replaced(tmp_path: Path):
    write_phantoms(tmp_path, {"train": 3}, size=32)
    write_phantoms(tmp_path, {"train": 2}, size=32)
    assert len(list((tmp_path / "images").iterdir())) == 2


@pytest.mark.parametrize("content", [{"thesis.txt": "x"}, {"manifest.csv": "image\na.png\n"}, {"manifest.csv": ""}])
def test_a_folder_with_anything_else_is_left_alone(tmp_path: Path, content: dict[str, str]):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(StorageError, match="holds no phantoms"):
        write_phantoms(tmp_path, {"train": 1}, size=32)
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == content


def test_runs_kept_beside_phantoms_are_left_alone(tmp_path: Path):
    write_phantoms(tmp_path, {"train": 1}, size=32)
    (tmp_path / "runs").mkdir()
    with pytest.raises(StorageError, match="holds phantoms, but also runs"):
        write_phantoms(tmp_path, {"train": 1}, size=32)
    assert (tmp_path / "runs").is_dir()
    for name in "abc":
        (tmp_path / name).mkdir()
    with pytest.raises(StorageError, match="but also a, b, c and 1 more"):
        write_phantoms(tmp_path, {"train": 1}, size=32)


def test_a_full_disk_leaves_the_old_phantoms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old = write_phantoms(tmp_path / "phantoms", {"train": 2}, size=32)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(phantom_module, "write_mask", fail)
    with pytest.raises(StorageError, match="disk is full"):
        write_phantoms(tmp_path / "phantoms", {"train": 3}, size=32)
    assert Manifest.read(tmp_path / "phantoms" / "manifest.csv") == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["phantoms"]


@pytest.mark.parametrize("counts", [{"train": -1}, {"../train": 1}, {"": 1}])
def test_unfit_counts_are_refused(tmp_path: Path, counts: dict[str, int]):
    with pytest.raises(ConfigError, match="Cannot draw"):
        write_phantoms(tmp_path / "phantoms", counts, size=32)
