"""Manifest → dataset → batches.

Order and random changes are functions of (seed, epoch, case) alone: the same in any number of workers and after a
resume. With a :class:`~tmca.data.cache.DecodedCache` a second epoch reads no picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from tmca.config import AugmentationConfig, PreprocessingConfig
from tmca.data.cache import DecodedCache, decode, drawn
from tmca.data.manifest import Manifest, Record
from tmca.data.preprocessing import Drawn, augment, normalise
from tmca.types import Batch, Sample


class SegmentationDataset(Dataset[Sample]):
    """The cases of a manifest as preprocessed samples.

    Args:
        manifest: One split.
        preprocessing: Size and normalisation.
        augmentation: Random changes; ``None`` for validation and test.
        seed: Of the random changes.
        cache: The cases decoded, filled before the first sample is asked for; without it every access reads files.

    Index ``epoch * len(dataset) + i`` is case ``i`` with the random changes of that epoch.
    """

    def __init__(
        self,
        manifest: Manifest,
        preprocessing: PreprocessingConfig,
        augmentation: AugmentationConfig | None = None,
        *,
        seed: int = 0,
        cache: DecodedCache | None = None,
    ) -> None:
        self.manifest = manifest
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.seed = seed
        self.cache = cache

    def __len__(self) -> int:
        return len(self.manifest.records)

    def __getitem__(self, index: int) -> Sample:
        """Return a case.

        Raises:
            DataError: A file is missing or damaged, or image and mask differ in size.
        """
        batch = self.__getitems__([index])
        return Sample(batch.ids[0], batch.images[0], batch.masks[0], batch.texts[0])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return cases as a batch; PyTorch's loader calls this once a batch.

        Raises:
            DataError: As for one case.
        """
        size = self.preprocessing.image_size
        images = np.empty((len(indices), 3, size, size), dtype=np.float32)
        masks = np.empty((len(indices), 1, size, size), dtype=np.bool_)
        ids: list[str] = []
        texts: list[str | None] = []
        for row, index in enumerate(indices):
            epoch, case = divmod(index, len(self))
            record = self.manifest.records[case]
            chosen = self._drawn(case, record, epoch)
            normalise(chosen.image, self.preprocessing, out=images[row])
            masks[row, 0] = chosen.mask
            ids.append(record.id)
            texts.append(chosen.text)
        return Batch(tuple(ids), torch.from_numpy(images), torch.from_numpy(masks), tuple(texts))

    def _drawn(self, case: int, record: Record, epoch: int) -> Drawn:
        if self.cache is None:
            planes = decode(self.manifest, record, self.preprocessing.image_size)
        else:
            planes = self.cache[case]
        chosen = drawn(planes, record.text)
        if self.augmentation is None:
            return chosen
        return augment(chosen, self.augmentation, np.random.default_rng((self.seed, epoch, case)))


@dataclass(frozen=True)
class Shard:
    """Which part of the cases a process loads.

    Attributes:
        rank: Number of the process, from 0.
        processes: How many there are.
    """

    rank: int = 0
    processes: int = 1


class EpochSampler(Sampler[int]):
    """Indices of one epoch, shuffled by (seed, epoch) or in order; see :class:`SegmentationDataset`.

    Args:
        size: Cases of the data set.
        shuffle: Whether in random order.
        seed: Of that order.
        shard: Process p of N gets the p-th case of every N, so that N processes see the batches of one, and each case
            once.
        multiple: The last cases are left out, so that the number of all processes' cases is a multiple of this.
    """

    def __init__(
        self,
        size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        shard: Shard = Shard(),
        multiple: int = 1,
    ) -> None:
        self.size = size
        self.used = size // multiple * multiple
        self.shuffle = shuffle
        self.seed = seed
        self.shard = shard
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(range(self.shard.rank, self.used, self.shard.processes))

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self.size)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        mine = order[self.shard.rank : self.used : self.shard.processes]
        return iter((mine + self.epoch * self.size).tolist())


def make_loader(
    dataset: SegmentationDataset,
    batch_size: int,
    *,
    training: bool,
    num_workers: int = 0,
    shard: Shard = Shard(),
    epoch: int = 0,
) -> DataLoader[Batch]:
    """Return batches of a dataset.

    Args:
        dataset: The cases.
        batch_size: Images a batch.
        training: Shuffle, and drop an incomplete last batch (the alignment loss compares the images of a batch).
        num_workers: Processes that load; 0 loads in this one.
        shard: The part of the cases that this process loads; ``batch_size`` counts its own images.
        epoch: The first to be iterated over. It must be known here: workers load ahead before Lightning names it.
    """
    whole = batch_size * shard.processes
    multiple = whole if training and len(dataset) > whole else 1
    sampler = EpochSampler(len(dataset), shuffle=training, seed=dataset.seed, shard=shard, multiple=multiple)
    sampler.set_epoch(epoch)
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # it makes batches by itself
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=_as_is,  # type: ignore[arg-type]
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def _as_is(batch: Batch) -> Batch:
    """Leave the batch that the dataset has made as it is; a named function, so that worker processes can be sent it."""
    return batch
