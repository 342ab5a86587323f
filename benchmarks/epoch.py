"""How long does an epoch take on real files, decoding and augmentation included, beside the plain baseline?

``kvasir-mobile`` (MobileNetV2, 224 pixels, batches of 16) by ``tmca.fit``: the first epoch, which also fills the cache
of decoded images, and later ones, with all that belongs to them here (averaged weights, clipping, checkpoints;
validation on one image). The baseline (``benchmarks/reference``) has the same image encoder and widths of the decoder,
its own text encoder of CXR-BERT's size, MONAI's transforms on two workers, and neither validation nor checkpoints.

    python benchmarks/epoch.py --data FOLDER [--cases 320] [--device cpu] [--workers 0]

Prints a table and writes ``benchmarks/results/epoch.json`` (``-cuda`` on a GPU, with the share of time it was busy).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import torch
from measuring import report
from reference.loops import Trainer, make_loader
from reference.network import Ariadne
from transformers import BertConfig, MobileNetV2Config

from tmca.config import Experiment
from tmca.data.layouts import open_dataset
from tmca.data.manifest import Manifest
from tmca.models.tokenizer import SentenceTokenizer
from tmca.presets import kvasir_mobile
from tmca.training import fit

EPOCHS = 3


def experiment(workers: int) -> Experiment:
    """Return kvasir-mobile from random weights, a few epochs of it."""
    preset = kvasir_mobile()
    encoder = replace(preset.model.image_encoder, weights="none")
    fixed = replace(preset.preprocessing, normalisation="fixed")
    trainer = replace(preset.trainer, max_epochs=EPOCHS, min_epochs=EPOCHS, max_train_seconds=None)
    trainer = replace(trainer, num_workers=workers)
    return replace(preset, preprocessing=fixed, model=replace(preset.model, image_encoder=encoder), trainer=trainer)


def our_epochs(manifest: Manifest, folder: Path, device: str, workers: int) -> list[float]:
    """Return the seconds of each epoch; the first holds all that comes before it, too."""
    started = time.perf_counter()
    fit(experiment(workers), manifest, folder / "run", cache=folder / "decoded", device=device)
    whole = time.perf_counter() - started
    with (folder / "run" / "metrics.csv").open() as stream:
        ends = [float(row["seconds"]) for row in csv.DictReader(stream)]
    later = [after - before for before, after in itertools.pairwise(ends)]
    return [whole - sum(later), *later]


def reference_epochs(manifest: Manifest, device: str) -> list[float]:
    """Return the seconds of each epoch of the baseline."""
    preset = kvasir_mobile()
    texts = [record.text or "" for record in manifest.records]
    words = SentenceTokenizer.learn(texts, vocabulary_size=1000, max_tokens=24)
    widths = preset.model.decoder.channels
    network = Ariadne(MobileNetV2Config(), BertConfig(hidden_dropout_prob=0.25), widths=widths)
    trainer = Trainer(network.to(device))
    loader = make_loader(manifest, words, preset.preprocessing.image_size, preset.trainer.batch_size, workers=2)
    seconds = []
    for _ in range(EPOCHS - 1):
        started = time.perf_counter()
        for batch in loader:
            trainer({name: value.to(device) for name, value in batch.items()})
        seconds.append(time.perf_counter() - started)
    return seconds


@contextmanager
def watched(device: str) -> Iterator[list[tuple[float, int]]]:
    """Give a list that fills with (time, percent of the time that a GPU computed) as long as the block runs."""
    seen: list[tuple[float, int]] = []
    done = Event()

    def watch() -> None:
        while device != "cpu" and not done.wait(0.1):
            seen.append((time.perf_counter(), torch.cuda.utilization(device)))

    thread = Thread(target=watch)
    thread.start()
    yield seen
    done.set()
    thread.join()


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=320)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that load for ours; the baseline has two")
    arguments = parser.parse_args()
    manifest = open_dataset(arguments.data)
    training = manifest.split("train").records[: arguments.cases]
    manifest = manifest.with_records((*training, *manifest.split("val").records[:1]))
    device = arguments.device
    theirs = reference_epochs(manifest.with_records(training), device)
    with tempfile.TemporaryDirectory() as temporary, watched(device) as busy:
        ours = our_epochs(manifest, Path(temporary), device, arguments.workers)
        ended = time.perf_counter()
    again = reference_epochs(manifest.with_records(training), device)
    reference = min(*theirs, *again)
    first, later = reference / ours[0], reference / min(ours[1:])
    rows = [
        {"epoch": "reference, the fastest of four", "seconds": f"{reference:.1f}", "× reference": "1.00"},
        {
            "epoch": "ours, the first, all preparation included",
            "seconds": f"{ours[0]:.1f}",
            "× reference": f"{first:.2f}",
        },
        {"epoch": "ours, later", "seconds": f"{min(ours[1:]):.1f}", "× reference": f"{later:.2f}"},
    ]
    seconds = {"reference": [*theirs, *again], "ours": ours}
    shares = [share for when, share in busy if when > ended - sum(ours[1:])]
    report(
        "epoch" if device == "cpu" else f"epoch-{device}",
        __doc__,
        rows,
        data=manifest.name,
        cases=len(training),
        seconds=seconds,
        workers=arguments.workers,
        busy_in_later_epochs=statistics.median(shares) / 100 if shares else None,
    )
    if shares:
        print(f"The GPU was busy {statistics.median(shares)} % of the time in the later epochs.")


if __name__ == "__main__":
    main()
