"""How many images a second does a predictor segment, beside the plain baseline, and what does a further sentence cost?

Files in, probability maps at their own size out. The architecture is the paper's (ConvNeXt-Tiny, CXR-BERT, 224 pixels;
random weights) or a trained run of ours (``-m``), on whose masks the Dice of bfloat16 against float32 is measured. The
baseline (``benchmarks/reference``) has the same encoders' sizes, runs in float32 and reads files with MONAI. Sentences
are new in every round ("new") or have been read before ("known", which is what a test set with repeated sentences, or a
click on a suggested one, is).

    python benchmarks/prediction.py [--data FOLDER] [--rounds 5] [-m RUN]

Draws phantoms where no data is named. Prints a table and writes ``benchmarks/results/prediction.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from measuring import isolated, medians, ratios, report
from reference.loops import ReferencePredictor
from reference.network import Ariadne
from training_step import TEXTS, TOKENS, tokenizer
from transformers import BertConfig, ConvNextConfig

from tmca.data.layouts import open_dataset
from tmca.data.manifest import Manifest
from tmca.data.phantom import write_phantoms
from tmca.devices import keep_freed_memory
from tmca.inference import Predictor
from tmca.presets import get_preset
from tmca.speed import random_model

SIZE = 224
BATCHES = (1, 8, 64)
SENTENCES = 16
CASES = 64
COLD_START = """
import sys
from tmca import Predictor
predictor = Predictor.from_pretrained(sys.argv[1])
predictor.set_image(sys.argv[2])
print(predictor.predict("one small polyp, located in top left of the image").shape, flush=True)
"""


def new_sentences() -> Callable[[int], list[str]]:
    """Return a function that gives so many sentences it has never given before."""
    numbers = itertools.count()
    return lambda count: [f"{TEXTS[next(numbers) % 16]}, {next(numbers)}" for _ in range(count)]


def files_of(manifest: Manifest) -> list[Path]:
    """Return the first images of a data set."""
    records = (manifest.records * CASES)[:CASES]
    return [manifest.image_path(record) for record in records]


def reference_batch(root: Path, batch: int) -> Callable[[], object]:
    """Return a prediction of the reference."""
    predictor = ReferencePredictor(Ariadne(ConvNextConfig(), BertConfig(), TOKENS), tokenizer(), SIZE)
    files, texts = files_of(open_dataset(root))[:batch], new_sentences()
    return lambda: predictor(files, texts(batch))


def our_predictor(model: Path) -> Predictor:
    """Return a predictor of a model folder."""
    keep_freed_memory()
    return Predictor.from_pretrained(model, precision="auto")


def our_batch(model: Path, root: Path, batch: int, *, known: bool) -> Callable[[], object]:
    """Return a prediction of ours."""
    predictor, texts = our_predictor(model), new_sentences()
    files = files_of(open_dataset(root))[:batch]
    again = texts(batch)
    return lambda: list(predictor.segment(zip(files, again if known else texts(batch), strict=True)))


def further(model: Path, root: Path, count: int, *, known: bool) -> Callable[[], object]:
    """Return so many sentences about an image that has been encoded, decoded together."""
    predictor, texts = our_predictor(model), new_sentences()
    predictor.set_image(files_of(open_dataset(root))[0])
    again = texts(count)
    return lambda: predictor.probabilities(again if known else texts(count), batch_size=count)


def agreement(run: str, manifest: Manifest) -> dict[str, float]:
    """Return the Dice of the masks of bfloat16 against those of float32, over cases and pooled."""
    exact, half = Predictor.from_pretrained(run, precision="32"), Predictor.from_pretrained(run, precision="bf16")
    records = manifest.split("test").records[:CASES]
    dices, overlap, total = [], 0, 0
    for record in records:
        masks = []
        for predictor in (exact, half):
            predictor.set_image(manifest.image_path(record))
            masks.append(predictor.predict(record.text))
        shared, area = int((masks[0] & masks[1]).sum()), int(masks[0].sum() + masks[1].sum())
        overlap, total = overlap + 2 * shared, total + area
        dices.append(2 * shared / area if area else 1.0)
    return {"cases": len(records), "pooled": overlap / total, "mean": float(np.mean(dices)), "least": min(dices)}


def cold_start(run: Path, image: Path, repeats: int = 5) -> dict[str, float]:
    """Return the seconds from the start of a process to its first mask, its import, and its help."""
    times: dict[str, list[float]] = {"first mask": [], "import tmca": [], "tmca --help": []}
    commands = {
        "first mask": [sys.executable, "-c", COLD_START, str(run), str(image)],
        "import tmca": [sys.executable, "-c", "import tmca"],
        "tmca --help": [sys.executable, "-m", "tmca", "--help"],
    }
    for _ in range(repeats):
        for name, command in commands.items():
            started = time.perf_counter()
            quiet = {"stderr": subprocess.DEVNULL, "env": os.environ | {"TMCA_OFFLINE": "1"}}
            with subprocess.Popen(command, stdout=subprocess.PIPE, **quiet) as process:
                process.stdout.read(1)  # the first word, or the end
                times[name].append(time.perf_counter() - started)
                process.stdout.read()
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("-m", "--model", default="")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.data
        if root is None:
            root = Path(temporary) / "data"
            write_phantoms(root, {"train": CASES, "test": CASES}, size=512)
        manifest = open_dataset(root)
        model = Path(temporary) / "model"
        random_model(get_preset("tmca")).save_pretrained(model)
        rows = {}
        for batch in BATCHES:
            builds = {
                "reference": partial(reference_batch, root, batch),
                "ours, new": partial(our_batch, model, root, batch, known=False),
                "ours, known": partial(our_batch, model, root, batch, known=True),
            }
            seconds, memory = isolated(builds, arguments.rounds if batch < 64 else 2)
            rows[batch] = {"images_per_second": {k: batch / v for k, v in medians(seconds).items()}}
            rows[batch] |= {"ratio": ratios(seconds, "reference"), "peak_gigabytes": memory}
        works = {"first": partial(our_batch, model, root, 1, known=False)}
        for count, known in itertools.product((1, SENTENCES), (False, True)):
            name = f"{count} further, {'known' if known else 'new'}"
            works[name] = partial(further, model, root, count, known=known)
        sentences = medians(isolated(works, 3 * arguments.rounds)[0])
        starts = cold_start(model, files_of(manifest)[0])
        agreed = agreement(arguments.model, manifest) if arguments.model else None
    first = sentences["first"]
    table = [
        {
            "files and sentences": f"{batch} at a time, {name}",
            "ms each": f"{1e3 / rate:.1f}",
            "images/s": f"{rate:.2f}",
            "× reference": f"{row['ratio'][name]:.2f}",
            "of the first": "",
        }
        for batch, row in rows.items()
        for name, rate in row["images_per_second"].items()
    ]
    for name, value in sentences.items():
        count = 1 if name == "first" else int(name.split()[0])
        each = value / count
        table.append(
            {
                "files and sentences": "an image and its sentence" if name == "first" else f"{name}, on one image",
                "ms each": f"{1e3 * each:.1f}",
                "images/s": "",
                "× reference": "",
                "of the first": f"{each / first:.0%}",
            }
        )
    report(
        "prediction",
        __doc__,
        table,
        data=manifest.name,
        batches=rows,
        seconds_on_one_image=sentences,
        cold_start_seconds=starts,
        bfloat16_against_float32=agreed,
    )
    print("seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in starts.items()))
    if agreed:
        print("Dice of bfloat16 against float32: " + json.dumps(agreed))


if __name__ == "__main__":
    main()
