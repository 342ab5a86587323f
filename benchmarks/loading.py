"""How many training samples a second does the loader deliver, beside MONAI's dictionary transforms doing the same work?

Work a sample: a decoded image and its mask resized to 224 × 224, zoomed with probability 0.1 (bicubic, nearest), each
channel normalised to mean 0 and standard deviation 1, stacked into batches of 32. "cold" decodes the files, "warm" is a
later epoch: from the memory-mapped cache here, from ``CacheDataset`` in memory there.

    python benchmarks/loading.py [--data FOLDER] [--cases 1600] [--repeats 3]

Draws phantoms where no data is named. Prints a table and writes ``benchmarks/results/loading.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from monai.data import CacheDataset, DataLoader, Dataset
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    NormalizeIntensityd,
    RandZoomd,
    RepeatChanneld,
    Resized,
    ScaleIntensityd,
)
from PIL import Image

from tmca.config import AugmentationConfig, PreprocessingConfig
from tmca.data.cache import DecodedCache
from tmca.data.layouts import open_dataset
from tmca.data.loading import SegmentationDataset, make_loader
from tmca.data.manifest import Manifest
from tmca.data.phantom import write_phantoms
from tmca.environment import describe_environment

SIZE, BATCH = 224, 32
RESULT = Path(__file__).parent / "results" / "loading.json"


def rate(batches: Iterable[Any]) -> float:
    """Return samples a second of one pass."""
    started = time.perf_counter()
    count = sum(1 for _ in batches)
    return count * BATCH / (time.perf_counter() - started)


def warm_rate(batches: Iterable[Any], repeats: int) -> float:
    """Return the median of samples a second of passes after the first."""
    return statistics.median([rate(batches) for _ in range(repeats + 1)][1:])


def tmca_rates(manifest: Manifest, folder: Path, workers: int, repeats: int) -> dict[str, float]:
    """Return our rates: decoding into the cache, then later epochs."""
    cache = DecodedCache(manifest, SIZE, folder)
    started = time.perf_counter()
    for _ in cache.fill():
        pass
    cold = len(cache) / (time.perf_counter() - started)
    dataset = SegmentationDataset(manifest, PreprocessingConfig(), AugmentationConfig(), cache=cache)
    loader = make_loader(dataset, BATCH, training=True, num_workers=workers)
    return {"cold": cold, "warm": warm_rate(loader, repeats)}


def monai_rates(manifest: Manifest, workers: int, repeats: int) -> dict[str, float]:
    """Return MONAI's rates: decoding in every epoch, and with its cache of the deterministic transforms."""
    grey = _channels(manifest) == 1
    keys = ["image", "mask"]
    fixed = [
        LoadImaged(keys, reader="PILReader", reverse_indexing=False, image_only=True),
        EnsureChannelFirstd(keys),
        *([RepeatChanneld("image", 3)] if grey else []),
        Resized(keys, (SIZE, SIZE), mode=["bicubic", "nearest"]),
        ScaleIntensityd("mask"),
    ]
    random = [
        RandZoomd(keys, prob=0.1, min_zoom=0.95, max_zoom=1.2, mode=["bicubic", "nearest"]),
        NormalizeIntensityd("image", channel_wise=True),
    ]
    files = [
        {"image": str(manifest.image_path(record)), "mask": str(manifest.mask_path(record))}
        for record in manifest.records
    ]
    options = {"batch_size": BATCH, "shuffle": True, "drop_last": True, "num_workers": workers}
    every = DataLoader(Dataset(files, Compose([*fixed, *random])), **options)
    cold = rate(every)
    cached = DataLoader(CacheDataset(files, Compose([*fixed, *random]), num_workers=2, progress=False), **options)
    return {"cold": cold, "warm": warm_rate(cached, repeats)}


def _channels(manifest: Manifest) -> int:
    with Image.open(manifest.image_path(manifest.records[0])) as image:
        return len(image.getbands())


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="dataset folder or manifest; phantoms by default")
    parser.add_argument("--cases", type=int, default=1600)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.data is None:
            manifest = write_phantoms(folder / "data", {"train": arguments.cases}, size=SIZE, seed=0)
        else:
            manifest = open_dataset(arguments.data).split("train")
        manifest = manifest.with_records(manifest.records[: arguments.cases // BATCH * BATCH])
        rows = {}
        for workers in (0, 2):
            ours = tmca_rates(manifest, folder / f"decoded-{workers}", workers, arguments.repeats)
            theirs = monai_rates(manifest, workers, arguments.repeats)
            rows[f"{workers} workers"] = {
                kind: {"tmca": ours[kind], "monai": theirs[kind], "ratio": ours[kind] / theirs[kind]} for kind in ours
            }
    print(f"{manifest.name}, {len(manifest.records)} cases, {torch.get_num_threads()} threads; samples a second")
    print(f"{'':22}{'tmca':>10}{'MONAI':>10}{'ratio':>8}")
    for workers, kinds in rows.items():
        for kind, row in kinds.items():
            name = f"{kind}, {workers}"
            print(f"{name:22}{row['tmca']:>10.0f}{row['monai']:>10.0f}{row['ratio']:>8.1f}")
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "data": manifest.name,
        "cases": len(manifest.records),
        "size": SIZE,
        "batch": BATCH,
        "samples_per_second": rows,
        "environment": describe_environment(),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
