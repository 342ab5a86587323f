"""Manifest → dataset → batches.

Decoded and resized images are kept in memory as uint8 up to a limit, so that a second epoch reads no file. Order and
random changes are functions of (seed, epoch, case) alone: the same in any number of workers and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from tmca.config import AugmentationConfig, PreprocessingConfig
from tmca.data.manifest import Manifest
from tmca.data.preprocessing import Drawn, augment, normalise, resize_image, resize_mask, to_tensor
from tmca.errors import DataError
from tmca.imaging.raster import read_image, read_mask
from tmca.types import Batch, Sample

CACHE_BYTES = 4 * 2**30


class SegmentationDataset(Dataset[Sample]):
    """The cases of a manifest as preprocessed samples.

    Args:
        manifest: One split.
        preprocessing: Size and normalisation.
        augmentation: Random changes; ``None`` for validation and test.
        seed: Of the random changes.
        cache_bytes: Memory for decoded images; cases beyond it are decoded every time.

    Index ``epoch * len(dataset) + i`` is case ``i`` with the random changes of that epoch.
    """

    def __init__(
        self,
        manifest: Manifest,
        preprocessing: PreprocessingConfig,
        augmentation: AugmentationConfig | None = None,
        *,
        seed: int = 0,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.manifest = manifest
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.seed = seed
        self._room = cache_bytes
        self._cache: dict[int, Drawn] = {}

    def __len__(self) -> int:
        return len(self.manifest.records)

    def __getitem__(self, index: int) -> Sample:
        epoch, case = divmod(index, len(self))
        record = self.manifest.records[case]
        drawn = self.decoded(case)
        if self.augmentation is not None:
            drawn = augment(drawn, self.augmentation, np.random.default_rng((self.seed, epoch, case)))
        mask = torch.from_numpy(np.array(drawn.mask))[None]
        return Sample(record.id, normalise(to_tensor(drawn.image), self.preprocessing), mask, drawn.text)

    def decoded(self, case: int) -> Drawn:
        """Return a case resized but not normalised, from the cache or from its files.

        Raises:
            DataError: A file is missing or damaged, or image and mask differ in size.
        """
        if case in self._cache:
            return self._cache[case]
        record = self.manifest.records[case]
        image_path, mask_path = self.manifest.image_path(record), self.manifest.mask_path(record)
        if mask_path is None:
            raise DataError(f"Case {record.id!r} has no mask", hint="fill its mask in the manifest or leave it out")
        image, mask = read_image(image_path), read_mask(mask_path)
        if image.shape[:2] != mask.shape:
            raise DataError(
                f"Mask {mask_path} is {mask.shape[1]}×{mask.shape[0]}, its image {image.shape[1]}×{image.shape[0]}",
                hint="export the mask at the image's size",
            )
        size = self.preprocessing.image_size
        drawn = Drawn(resize_image(image, size), resize_mask(mask, size, size), record.text)
        needed = drawn.image.nbytes + drawn.mask.nbytes
        if needed <= self._room:
            self._room -= needed
            self._cache[case] = drawn
        return drawn

    def warm(self, threads: int = 2) -> Iterator[int]:
        """Decode every case into the cache on several threads, yielding after each.

        Raises:
            DataError: The first case that cannot be read.
        """
        with ThreadPoolExecutor(threads) as pool:
            for case, _ in enumerate(pool.map(self.decoded, range(len(self)))):
                yield case


class EpochSampler(Sampler[int]):
    """Indices of one epoch, shuffled by (seed, epoch) or in order; see :class:`SegmentationDataset`."""

    def __init__(self, size: int, *, shuffle: bool, seed: int = 0) -> None:
        self.size = size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self.size)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        return iter((order + self.epoch * self.size).tolist())


def make_loader(
    dataset: SegmentationDataset, batch_size: int, *, training: bool, num_workers: int = 0
) -> DataLoader[Batch]:
    """Return batches of a dataset.

    Args:
        dataset: The cases.
        batch_size: Images a batch.
        training: Shuffle, and drop an incomplete last batch (the alignment loss compares the images of a batch).
        num_workers: Processes that load; 0 loads in this one.
    """
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # collating turns its samples into batches
        batch_size=batch_size,
        sampler=EpochSampler(len(dataset), shuffle=training, seed=dataset.seed),
        collate_fn=Batch.collate,
        drop_last=training and len(dataset) > batch_size,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
