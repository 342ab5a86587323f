"""How long does an epoch take on real files, decoding and augmentation included, beside the plain baseline?

``kvasir-mobile`` (MobileNetV2, 224 pixels, batches of 16) by ``tmca.fit``: the first epoch, which also fills the cache
of decoded images, and later ones, with all that belongs to them here (averaged weights, clipping, checkpoints;
validation on one image). The baseline (``benchmarks/reference``) has the same image encoder and widths of the decoder,
its own text encoder of CXR-BERT's size, MONAI's transforms on two workers, and neither validation nor checkpoints.

    python benchmarks/epoch.py --data FOLDER [--cases 320]

Prints a table and writes ``benchmarks/results/epoch.json``.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from measuring import report
from reference.loops import Trainer, make_loader
from reference.network import Ariadne
from transformers import BertConfig, MobileNetV2Config

from tmca.config import Experiment
from tmca.data.layouts import open_dataset
from tmca.data.manifest import Manifest
from tmca.models.text import SentenceTokenizer
from tmca.presets import kvasir_mobile
from tmca.training import fit

EPOCHS = 3


def experiment() -> Experiment:
    """Return kvasir-mobile from random weights, a few epochs of it."""
    preset = kvasir_mobile()
    encoder = replace(preset.model.image_encoder, weights="none")
    fixed = replace(preset.preprocessing, normalisation="fixed")
    trainer = replace(preset.trainer, max_epochs=EPOCHS, min_epochs=EPOCHS, max_train_seconds=None)
    return replace(preset, preprocessing=fixed, model=replace(preset.model, image_encoder=encoder), trainer=trainer)


def our_epochs(manifest: Manifest, folder: Path) -> list[float]:
    """Return the seconds of each epoch; the first holds all that comes before it, too."""
    started = time.perf_counter()
    fit(experiment(), manifest, folder / "run", cache=folder / "decoded", device="cpu")
    whole = time.perf_counter() - started
    with (folder / "run" / "metrics.csv").open() as stream:
        ends = [float(row["seconds"]) for row in csv.DictReader(stream)]
    later = [after - before for before, after in itertools.pairwise(ends)]
    return [whole - sum(later), *later]


def reference_epochs(manifest: Manifest) -> list[float]:
    """Return the seconds of each epoch of the baseline."""
    preset = kvasir_mobile()
    texts = [record.text or "" for record in manifest.records]
    words = SentenceTokenizer.learn(texts, vocabulary_size=1000, max_tokens=24)
    trainer = Trainer(
        Ariadne(MobileNetV2Config(), BertConfig(hidden_dropout_prob=0.25), widths=preset.model.decoder.channels)
    )
    loader = make_loader(manifest, words, preset.preprocessing.image_size, preset.trainer.batch_size, workers=2)
    seconds = []
    for _ in range(EPOCHS - 1):
        started = time.perf_counter()
        for batch in loader:
            trainer(batch)
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=320)
    arguments = parser.parse_args()
    manifest = open_dataset(arguments.data)
    training = manifest.split("train").records[: arguments.cases]
    manifest = manifest.with_records((*training, *manifest.split("val").records[:1]))
    theirs = reference_epochs(manifest.with_records(training))
    with tempfile.TemporaryDirectory() as temporary:
        ours = our_epochs(manifest, Path(temporary))
    again = reference_epochs(manifest.with_records(training))
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
    report("epoch", __doc__, rows, data=manifest.name, cases=len(training), seconds=seconds)


if __name__ == "__main__":
    main()
