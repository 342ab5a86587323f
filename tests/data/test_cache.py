from __future__ import annotations

import os
import pickle
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tmca.data import cache as module
from tmca.data.cache import IN_USE_SECONDS, DecodedCache, decode, drawn, make_room
from tmca.data.manifest import Manifest
from tmca.data.preprocessing import resize_image, resize_mask
from tmca.errors import DataError, StorageError
from tmca.imaging.raster import read_image, read_mask

SIZE = 32
CASE_BYTES = SIZE * SIZE * 4


@pytest.fixture(scope="module")
def training(phantoms: Manifest) -> Manifest:
    return phantoms.split("train")


@pytest.fixture
def copied(training: Manifest, tmp_path: Path) -> Manifest:
    """A dataset that a test may change."""
    root = Path(shutil.copytree(training.root, tmp_path / "data"))
    return Manifest(root, training.records[:3], training.name)


def _filled(manifest: Manifest, folder: Path) -> DecodedCache:
    cache = DecodedCache(manifest, SIZE, folder)
    list(cache.fill())
    return cache


def test_a_case_is_its_resized_image_and_mask(training: Manifest, tmp_path: Path):
    cache = _filled(training, tmp_path)
    assert len(cache) == len(training.records)
    for case, record in enumerate(training.records):
        seen = drawn(cache[case], record.text)
        image = read_image(training.image_path(record))
        mask = read_mask(training.root / str(record.mask))
        np.testing.assert_array_equal(seen.image, resize_image(image, SIZE))
        np.testing.assert_array_equal(seen.mask, resize_mask(mask, SIZE, SIZE))
        assert (seen.mask.dtype, seen.text) == (np.bool_, record.text)
        np.testing.assert_array_equal(cache[case], decode(training, record, SIZE))


def test_every_case_is_told(training: Manifest, tmp_path: Path):
    cache = DecodedCache(training, SIZE, tmp_path)
    assert not cache.is_full
    assert list(cache.fill()) == list(range(len(training.records)))
    assert cache.is_full
    assert list(cache.fill()) == []


def test_a_second_run_decodes_nothing(training: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _filled(training, tmp_path)
    monkeypatch.setattr(module, "read_image", None)
    again = _filled(training, tmp_path)
    assert again[0].shape == (4, SIZE, SIZE)


def test_a_case_cannot_be_changed(training: Manifest, tmp_path: Path):
    cache = _filled(training, tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        cache[0][0, 0, 0] = 1


def test_another_process_maps_the_file_itself(training: Manifest, tmp_path: Path):
    cache = _filled(training, tmp_path)
    cache[0]
    sent = pickle.dumps(cache)
    assert len(sent) < 100 * len(training.records) + 10_000
    np.testing.assert_array_equal(pickle.loads(sent)[3], cache[3])


def test_the_name_follows_the_content_of_the_files(copied: Manifest, tmp_path: Path):
    def name(manifest: Manifest, size: int = SIZE) -> str:
        return DecodedCache(manifest, size, tmp_path / "cache").path.name

    before = name(copied)
    assert name(copied) == before
    moved = Path(shutil.copytree(copied.root, tmp_path / "moved"))
    assert name(replace(copied, root=moved)) == before
    assert name(copied, 64) != before
    assert name(copied.with_records(copied.records[::-1])) != before
    assert name(copied.with_records(copied.records[:2])) != before
    other_text = copied.with_records(replace(record, text="other") for record in copied.records)
    assert name(other_text) == before  # sentences are not in it
    path = copied.image_path(copied.records[1])
    Image.fromarray(255 - read_image(path)).save(path)
    assert name(copied) != before


def test_a_damaged_image_leaves_nothing_behind(copied: Manifest, tmp_path: Path):
    path = copied.image_path(copied.records[2])
    path.write_bytes(path.read_bytes()[:300])
    cache = DecodedCache(copied, SIZE, tmp_path / "cache")
    with pytest.raises(DataError, match=path.name):
        list(cache.fill())
    assert not cache.is_full
    assert not list((tmp_path / "cache").iterdir())


def test_an_interruption_leaves_nothing_behind(training: Manifest, tmp_path: Path):
    cache = DecodedCache(training, SIZE, tmp_path)
    filling = cache.fill()
    next(filling)
    filling.close()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_before_anything_is_written(
    training: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StorageError, match="Decoded images need 0") as caught:
        _filled(training, tmp_path)
    assert "TMCA_HOME" in caught.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_disk_that_fills_up_ends_the_filling_in_one_line(
    training: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cache = DecodedCache(training, SIZE, tmp_path)
    aside = tmp_path / ".tmp-x"
    aside.symlink_to("/dev/full")
    monkeypatch.setattr(module, "make_room", lambda *_: None)
    monkeypatch.setattr(module.uuid, "uuid4", lambda: type("Fixed", (), {"hex": "x"}))
    with pytest.raises(StorageError, match="No space left"):
        list(cache.fill())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(training: Manifest, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        _filled(training, tmp_path / "file" / "cache")


def test_what_was_used_longest_ago_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMCA_CACHE_GB", "0.00001")  # 10,000 bytes
    now = time.time()
    for number, name in enumerate(("old.npy", "middle.npy", "new.npy", "notes.txt")):
        (tmp_path / name).write_bytes(bytes(3000))
        os.utime(tmp_path / name, (now - IN_USE_SECONDS - 100 + number,) * 2)
    for name, age in (("abandoned", 48 * 3600), ("current", 60)):
        (tmp_path / f".tmp-{name}").write_bytes(b"")
        os.utime(tmp_path / f".tmp-{name}", (now - age,) * 2)
    make_room(tmp_path, 3500)
    assert {path.name for path in tmp_path.iterdir()} == {"new.npy", "notes.txt", ".tmp-current"}
    monkeypatch.setenv("TMCA_CACHE_GB", "much")
    with pytest.raises(StorageError, match="TMCA_CACHE_GB is 'much'"):
        make_room(tmp_path, 1)


def test_what_is_in_use_is_not_given_up(training: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMCA_CACHE_GB", "0.000001")
    first = _filled(training, tmp_path)
    _filled(training.with_records(training.records[1:]), tmp_path)
    assert first.path.exists()
    first.path.unlink()  # as another program might
    assert first[0].shape == (4, SIZE, SIZE)


def test_a_file_that_is_used_again_counts_as_new(training: Manifest, tmp_path: Path):
    cache = _filled(training, tmp_path)
    os.utime(cache.path, (1, 1))
    list(cache.fill())
    assert cache.path.stat().st_mtime > time.time() - 60


def test_the_file_holds_nothing_else(training: Manifest, tmp_path: Path):
    cache = _filled(training, tmp_path)
    stored = np.load(cache.path, mmap_mode="r")
    assert (stored.shape, stored.dtype) == ((len(training.records), 4, SIZE, SIZE), np.uint8)
    assert cache.path.stat().st_size - len(training.records) * CASE_BYTES <= 256
