from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tmca.data.audit.case_facts import CaseFacts, examine, stray_specks
from tmca.data.manifest import Manifest, Record
from tmca.imaging.raster import write_image, write_mask

SIZE = 100


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(10, 240, (SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[20:50, 20:60] = True
    return mask


def _facts(folder: Path, image: np.ndarray, mask: np.ndarray | None, **values: str) -> CaseFacts:
    write_image(folder / "image.png", image)
    if mask is not None:
        if mask.dtype == bool:
            write_mask(folder / "mask.png", mask)
        else:
            write_image(folder / "mask.png", mask)
    record = Record("a", "image.png", None if mask is None else "mask.png", **values)
    return examine(Manifest(folder, (record,), "test"), record)


def test_a_sound_case(tmp_path: Path, image: np.ndarray, mask: np.ndarray):
    facts = _facts(tmp_path, image, mask, text="one medium red polyp, located in center of the image")
    assert facts.image_size == facts.mask_size == (SIZE, SIZE)
    assert facts.foreground == pytest.approx(0.12)
    assert facts.brightness == pytest.approx(image.mean(), abs=0.01)
    assert facts.contrast == pytest.approx(image.mean(axis=2).std(), abs=0.01)
    assert (facts.parts, facts.specks, facts.contradictions, facts.changed) == (1, (), (), ())
    assert facts.image_error is facts.mask_error is facts.mask_problem is None
    assert facts.thumbnail is not None
    assert facts.thumbnail.shape == (48, 48)


def test_equal_pixels_have_equal_hashes(tmp_path: Path, image: np.ndarray, mask: np.ndarray):
    first, second = (_facts(tmp_path / name, image, mask) for name in "ab")
    other = image.copy()
    other[0, 0, 0] ^= 1
    assert first.pixel_hash == second.pixel_hash != _facts(tmp_path / "c", other, mask).pixel_hash
    assert first.mask_hash == second.mask_hash != _facts(tmp_path / "d", image, ~mask).mask_hash
    turned = image.reshape(SIZE // 2, SIZE * 2, 3)  # the same bytes in another shape
    assert _facts(tmp_path / "e", turned, None).pixel_hash != first.pixel_hash


@pytest.mark.parametrize("broken", ["missing", "empty", "cut off", "no image"])
@pytest.mark.parametrize("name", ["image.png", "mask.png"])
def test_a_broken_file_is_a_fact(tmp_path: Path, image: np.ndarray, mask: np.ndarray, name: str, broken: str):
    _facts(tmp_path, image, mask)
    path = tmp_path / name
    content = {"empty": b"", "cut off": path.read_bytes()[:-60], "no image": b"text"}
    path.unlink()
    if broken != "missing":
        path.write_bytes(content[broken])
    record = Record("a", "image.png", "mask.png", "one polyp")
    facts = examine(Manifest(tmp_path, (record,), "test"), record)
    error = facts.image_error if name == "image.png" else facts.mask_error
    assert error is not None
    assert name in error
    assert (facts.image_error is None) == (name == "mask.png")


def test_undefined_pixels_are_a_broken_image(tmp_path: Path):
    values = np.full((SIZE, SIZE), 0.5, dtype=np.float32)
    values[3, 4] = np.nan
    Image.fromarray(values).save(tmp_path / "image.tif")
    record = Record("a", "image.tif")
    assert "not finite" in (examine(Manifest(tmp_path, (record,), "test"), record).image_error or "")


@pytest.mark.parametrize(
    ("values", "said"),
    [((0, 1, 2), "classes"), ((0, 128, 255), "128"), ((0, 64, 255), "64")],
)
def test_a_third_class_is_a_problem(
    tmp_path: Path, image: np.ndarray, mask: np.ndarray, values: tuple[int, int, int], said: str
):
    classes = np.where(mask, values[2], values[0]).astype(np.uint8)
    classes[70:74, 70:80] = values[1]  # a small one
    problem = _facts(tmp_path, image, classes).mask_problem
    assert problem is not None
    assert said in problem


def test_an_image_in_place_of_the_mask_is_a_problem(tmp_path: Path, image: np.ndarray):
    facts = _facts(tmp_path, image, image)
    assert "grey values" in (facts.mask_problem or "")
    assert facts.mask_size == (SIZE, SIZE)
    assert facts.foreground is None


@pytest.mark.parametrize("foreground", [1, 100, 255])
def test_any_two_values_are_a_mask(tmp_path: Path, image: np.ndarray, mask: np.ndarray, foreground: int):
    facts = _facts(tmp_path, image, np.where(mask, foreground, 0).astype(np.uint8))
    assert (facts.mask_problem, facts.mask_error) == (None, None)
    assert facts.foreground == pytest.approx(0.12)


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_noise_of_jpeg_and_resizing_is_no_class(tmp_path: Path, image: np.ndarray, mask: np.ndarray, quality: int):
    write_image(tmp_path / "image.png", image)
    Image.fromarray((255 * mask).astype(np.uint8)).save(tmp_path / "mask.jpg", quality=quality)
    smooth = Image.fromarray((255 * mask).astype(np.uint8)).resize((37, 37), Image.Resampling.BICUBIC)
    smooth.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(tmp_path / "mask.png")
    for name in ("mask.jpg", "mask.png"):
        record = Record("a", "image.png", name)
        facts = examine(Manifest(tmp_path, (record,), "test"), record)
        if name == "mask.jpg":
            assert facts.mask_problem is None
        assert "third value" not in (facts.mask_problem or "")


def test_specks(mask: np.ndarray):
    assert not stray_specks(mask).any()
    mask[90, 90] = mask[10, 90] = mask[11, 91] = True
    mask[52, 30] = True  # beside the lesion
    found = stray_specks(mask)
    assert sorted(zip(*map(list, np.nonzero(found)), strict=True)) == [(10, 90), (11, 91), (90, 90)]
    mask[80:90, 10:20] = True  # a small lesion
    assert np.array_equal(stray_specks(mask), found)


def test_specks_alone_are_the_lesion():
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[5, 5] = mask[90, 90] = True
    assert not stray_specks(mask).any()


def test_sentences_are_not_held_against_a_mask_of_another_size(tmp_path: Path, image: np.ndarray, mask: np.ndarray):
    text = "one large red polyp, located in bottom right of the image"
    assert _facts(tmp_path, image, mask, text=text).contradictions
    assert _facts(tmp_path, image[:50], mask, text=text).contradictions == ()


def test_files_are_held_against_their_hashes(tmp_path: Path, image: np.ndarray, mask: np.ndarray):
    _facts(tmp_path, image, mask)
    manifest = Manifest(tmp_path, (Record("a", "image.png", "mask.png"),), "test").with_hashes()
    assert examine(manifest, manifest.records[0]).changed == ()
    altered = dataclasses.replace(manifest.records[0], mask_sha256="0" * 64)
    assert examine(manifest, altered).changed == ("mask.png",)
