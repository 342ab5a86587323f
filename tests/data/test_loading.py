from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tmca.config import AugmentationConfig, PreprocessingConfig
from tmca.data.cache import DecodedCache
from tmca.data.loading import EpochSampler, SegmentationDataset, make_loader
from tmca.data.manifest import Manifest
from tmca.data.preprocessing import prepare_image, resize_mask
from tmca.errors import DataError
from tmca.imaging.raster import read_image, read_mask
from tmca.types import Batch, Sample

CONFIG = PreprocessingConfig(image_size=32, normalisation="fixed")
CHANGES = AugmentationConfig(
    zoom_probability=0.7, mirror_probability=0.5, brightness=0.2, contrast=0.2, text_dropout=0.3
)


@pytest.fixture(scope="module")
def training(phantoms: Manifest) -> Manifest:
    return phantoms.split("train")


@pytest.fixture
def damaged(training: Manifest, tmp_path: Path) -> Manifest:
    """Two cases that a test may damage."""
    records = training.records[:2]
    root = Path(shutil.copytree(training.root, tmp_path / "data"))
    return Manifest(root, records, training.name)


def _equal(first: Sample, second: Sample) -> bool:
    same = torch.equal(first.image, second.image) and torch.equal(first.mask, second.mask)
    return same and (first.id, first.text) == (second.id, second.text)


# Samples ---------------------------------------------------------------------------------------------------------


def test_a_sample_is_its_preprocessed_case(training: Manifest):
    dataset = SegmentationDataset(training, CONFIG)
    assert len(dataset) == len(training.records)
    for index, record in enumerate(training.records[:3]):
        sample = dataset[index]
        assert (sample.id, sample.text) == (record.id, record.text)
        torch.testing.assert_close(sample.image, prepare_image(read_image(training.image_path(record)), CONFIG))
        mask = resize_mask(read_mask(training.root / str(record.mask)), 32, 32)
        assert sample.mask.dtype == torch.bool
        np.testing.assert_array_equal(sample.mask[0].numpy(), mask)


def test_random_changes_are_a_function_of_seed_epoch_and_case(training: Manifest):
    first, second = (SegmentationDataset(training, CONFIG, CHANGES, seed=5) for _ in range(2))
    size = len(first)
    forwards = [first[index] for index in range(2 * size)]
    backwards = [second[index] for index in reversed(range(2 * size))][::-1]
    assert all(_equal(*pair) for pair in zip(forwards, backwards, strict=True))
    assert [sample.id for sample in forwards[:size]] == [sample.id for sample in forwards[size:]]
    assert not all(_equal(*pair) for pair in zip(forwards[:size], forwards[size:], strict=True))
    other = SegmentationDataset(training, CONFIG, CHANGES, seed=6)
    assert not all(_equal(other[index], forwards[index]) for index in range(size))


def test_without_random_changes_every_epoch_is_the_same(training: Manifest):
    dataset = SegmentationDataset(training, CONFIG)
    assert _equal(dataset[1], dataset[1 + 7 * len(dataset)])


# Loaders ---------------------------------------------------------------------------------------------------------


def _batches(training: Manifest, *, workers: int, epoch: int, cache: DecodedCache | None = None) -> list[Batch]:
    dataset = SegmentationDataset(training, CONFIG, CHANGES, seed=3, cache=cache)
    loader = make_loader(dataset, 4, training=True, num_workers=workers)
    assert isinstance(loader.sampler, EpochSampler)
    loader.sampler.set_epoch(epoch)
    return list(loader)


@pytest.mark.parametrize("cached", [False, True], ids=["files", "cache"])
def test_any_number_of_workers_gives_the_same_batches(training: Manifest, cached: bool, tmp_path: Path):
    alone = _batches(training, workers=0, epoch=2)
    cache = DecodedCache(training, CONFIG.image_size, tmp_path) if cached else None
    if cache is not None:
        list(cache.fill())
    together = _batches(training, workers=2, epoch=2, cache=cache)
    assert len(alone) == len(together) == 4
    for batch, other in zip(alone, together, strict=True):
        assert batch.ids == other.ids
        assert batch.texts == other.texts
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.masks, other.masks)


def test_workers_that_are_started_anew_load_the_same(training: Manifest, tmp_path: Path):
    """As on macOS and Windows, where a worker shares no memory with the process that starts it."""
    cache = DecodedCache(training, CONFIG.image_size, tmp_path)
    list(cache.fill())
    dataset = SegmentationDataset(training, CONFIG, CHANGES, seed=3, cache=cache)
    dataset[0]  # maps the file here
    loader = make_loader(dataset, 8, training=False, num_workers=1)
    loader.multiprocessing_context = "spawn"
    for batch, expected in zip(loader, make_loader(dataset, 8, training=False), strict=True):
        assert batch.ids == expected.ids
        assert torch.equal(batch.images, expected.images)


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed: int, epoch: int, *, shuffle: bool = True) -> list[int]:
        sampler = EpochSampler(50, shuffle=shuffle, seed=seed)
        sampler.set_epoch(epoch)
        assert len(sampler) == 50
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert sorted(order(1, 2)) == list(range(100, 150))
    cases = {tuple(index % 50 for index in order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}
    assert len(cases) == 6
    assert order(1, 3, shuffle=False) == list(range(150, 200))


def test_a_training_epoch_drops_what_does_not_fill_a_batch(training: Manifest):
    dataset = SegmentationDataset(training, CONFIG)

    def sizes(batch_size: int, *, train: bool) -> list[int]:
        return [batch.batch_size for batch in make_loader(dataset, batch_size, training=train)]

    assert sizes(5, train=True) == [5, 5, 5]
    assert sizes(5, train=False) == [5, 5, 5, 1]
    assert sizes(16, train=True) == [16]
    assert sizes(32, train=True) == [16]  # rather a small batch than none


def test_validation_keeps_the_order_of_the_manifest(training: Manifest):
    loader = make_loader(SegmentationDataset(training, CONFIG), 5, training=False)
    assert [name for batch in loader for name in batch.ids] == [record.id for record in training.records]


# Batches ---------------------------------------------------------------------------------------------------------


def test_samples_are_stacked_in_order(training: Manifest):
    dataset = SegmentationDataset(training, CONFIG, CHANGES)
    indices = [2, 0, len(dataset) + 1]
    batch = dataset.__getitems__(indices)
    assert batch.batch_size == 3
    assert batch.images.shape == (3, 3, 32, 32)
    assert batch.masks.shape == (3, 1, 32, 32)
    assert (batch.images.dtype, batch.masks.dtype) == (torch.float32, torch.bool)
    for row, index in enumerate(indices):
        sample = dataset[index]
        assert batch.ids[row] == sample.id
        assert batch.texts[row] == sample.text
        assert torch.equal(batch.images[row], sample.image)
        assert torch.equal(batch.masks[row], sample.mask)


def test_a_batch_moves_as_a_whole(training: Manifest):
    batch = SegmentationDataset(training, CONFIG).__getitems__([0])
    moved = batch.to("meta", non_blocking=True)
    assert moved.images.device.type == moved.masks.device.type == "meta"
    assert (moved.ids, moved.texts) == (batch.ids, batch.texts)
    assert batch.images.device.type == "cpu"
    assert torch.equal(batch.to(torch.device("cpu")).images, batch.images)


def test_a_batch_says_briefly_what_it_is(training: Manifest):
    dataset = SegmentationDataset(training, CONFIG)
    words = repr(dataset.__getitems__([0, 1]))
    assert words.startswith("Batch(2 images of (32, 32), train-00000")
    assert len(words) < 100


# Errors ----------------------------------------------------------------------------------------------------------


def test_a_mask_of_another_size_is_named(damaged: Manifest):
    mask = damaged.root / str(damaged.records[1].mask)
    Image.new("L", (50, 40), 255).save(mask)
    dataset = SegmentationDataset(damaged, CONFIG)
    dataset[0]
    with pytest.raises(DataError, match="50×40, its image 64×64") as caught:
        dataset[1]
    assert str(mask) in caught.value.message


def test_a_case_without_a_mask_is_named(damaged: Manifest):
    first, second = damaged.records
    with pytest.raises(DataError, match=f"Case '{second.id}' has no mask"):
        SegmentationDataset(damaged.with_records([first, replace(second, mask=None)]), CONFIG)[1]


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_a_missing_file_is_named(damaged: Manifest, kind: str):
    path = damaged.root / str(getattr(damaged.records[0], kind))
    path.unlink()
    with pytest.raises(DataError, match="does not exist") as caught:
        SegmentationDataset(damaged, CONFIG)[0]
    assert str(path) in caught.value.message


def test_an_error_in_a_worker_names_the_file_too(damaged: Manifest):
    path = damaged.image_path(damaged.records[1])
    path.write_bytes(path.read_bytes()[:500])
    loader = make_loader(SegmentationDataset(damaged, CONFIG), 1, training=False, num_workers=1)
    with pytest.raises(DataError, match=path.name):
        list(loader)
