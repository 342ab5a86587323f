"""How do time and memory grow: with predictions, with the size of images, with the size of the data set?

1. Many predictions, each of another image with another sentence, one process: seconds a thousand, and the slope of
   resident memory over the second half.
2. Images of 224 to 1,024 pixels a side, the preset ``kvasir-mobile``: milliseconds of one prediction and peak memory,
   with attention scores written out where they are few (as always here) and with PyTorch's fused attention throughout.
3. Peak memory of training on data sets of different size.
4. A folder of images segmented by ``predict_batch``: images a second and the slope of resident memory over the second
   half.

    python benchmarks/growth.py [--predictions 20000] [--files 10000]

Prints tables and writes ``benchmarks/results/growth.json``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from measuring import peak_gigabytes, report

from tmca.batch import predict_batch
from tmca.data.phantom import write_phantoms
from tmca.devices import keep_freed_memory
from tmca.imaging.raster import write_image
from tmca.inference import Predictor
from tmca.jobs import find_images, make_jobs
from tmca.models import operations
from tmca.presets import demo, get_preset
from tmca.progress import set_quiet
from tmca.speed import random_model
from tmca.training import fit

SIZES = (224, 384, 512, 768, 1024)
DATA_SETS = (200, 800, 3200)
POINTS = 20


def resident_megabytes() -> float:
    """Return the memory this process holds now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def many_predictions(count: int) -> dict[str, object]:
    """Return seconds a thousand and memory along the way."""
    keep_freed_memory()
    predictor = Predictor(random_model(demo()))
    generator = np.random.default_rng(0)
    seconds, memory, numbers = [], [], []
    every = count // POINTS
    started = time.perf_counter()
    for number in range(1, count + 1):
        height, width = generator.integers(80, 160, size=2)
        predictor.set_image(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        predictor.predict(f"one small lesion, number {number}")
        if number % every == 0:
            now = time.perf_counter()
            seconds.append(1e3 * (now - started) / every)
            memory.append(resident_megabytes())
            numbers.append(number)
            started = now
    half = POINTS // 2
    slope = np.polyfit(numbers[half:], memory[half:], 1)[0] * 1e6 / 1e3  # bytes → kB a prediction
    return {
        "predictions": count,
        "seconds_a_thousand": seconds,
        "resident_megabytes": memory,
        "kilobytes_a_prediction": float(slope),
    }


def one_size(size: int, *, fused: bool) -> dict[str, float]:
    """Return milliseconds of a prediction and peak memory at one size."""
    if fused:
        operations.EXPLICIT_SCORES = 0
    preset = get_preset("kvasir-mobile")
    model = random_model(replace(preset, preprocessing=replace(preset.preprocessing, image_size=size)))
    predictor = Predictor(model)
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        predictor.set_image(image)
        predictor.predict("one small polyp, located in top left of the image")
        times.append(1e3 * (time.perf_counter() - started))
    return {"milliseconds": statistics.median(times[1:]), "peak_gigabytes": peak_gigabytes()}


def training_memory(images: int) -> dict[str, float]:
    """Return the peak memory of a short training on a data set."""
    with tempfile.TemporaryDirectory() as temporary:
        manifest = write_phantoms(Path(temporary) / "data", {"train": images, "val": 20}, size=96)
        trainer = replace(demo().trainer, max_epochs=1, min_epochs=1)
        fit(replace(demo(), trainer=trainer), manifest, Path(temporary) / "run", cache=Path(temporary) / "cache")
    return {"peak_gigabytes": peak_gigabytes()}


def many_files(count: int) -> dict[str, float]:
    """Return images a second of a batch and how its memory grows."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        generator = np.random.default_rng(0)
        for number in range(count):
            write_image(root / "in" / f"{number}.png", generator.integers(0, 256, (96, 96, 3), dtype=np.uint8))
        random_model(demo()).save_pretrained(root / "model")
        predictor = Predictor.from_pretrained(root / "model")
        jobs = make_jobs(find_images([root / "in"]), "one small bright lesion, located in top left of the image")
        memory: list[float] = []
        finished = threading.Event()

        def sample() -> None:
            while not finished.wait(0.5):
                memory.append(resident_megabytes())

        sampler = threading.Thread(target=sample)
        sampler.start()
        set_quiet(quiet=True)
        report = predict_batch(predictor, jobs, root / "out")
        finished.set()
        sampler.join()
    later = memory[len(memory) // 2 :]
    slope = np.polyfit(np.linspace(count / 2, count, len(later)), later, 1)[0] * 1e3
    return {
        "files": count,
        "images_per_second": len(report.cases) / report.seconds,
        "resident_megabytes": memory[-1],
        "kilobytes_a_file": float(slope),
    }


def main() -> None:
    """Measure each in a process of its own, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=int, default=20_000)
    parser.add_argument("--files", type=int, default=10_000)
    arguments = parser.parse_args()
    context = get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        apart = partial(pool.apply)
        many = apart(many_predictions, (arguments.predictions,))
        files = apart(many_files, (arguments.files,))
        explicit = {size: apart(one_size, (size,), {"fused": False}) for size in SIZES}
        fused = {size: apart(one_size, (size,), {"fused": True}) for size in SIZES}
        training = {images: apart(training_memory, (images,)) for images in DATA_SETS}
    rows = [
        {
            "pixels a side": str(size),
            "ms": f"{explicit[size]['milliseconds']:.0f}",
            "GB": f"{explicit[size]['peak_gigabytes']:.2f}",
            "ms, fused attention": f"{fused[size]['milliseconds']:.0f}",
            "GB, fused attention": f"{fused[size]['peak_gigabytes']:.2f}",
        }
        for size in SIZES
    ]
    report("growth", __doc__, rows, many=many, size_explicit=explicit, size_fused=fused, training=training, files=files)
    seconds, memory = many["seconds_a_thousand"], many["resident_megabytes"]
    print(f"{many['predictions']} predictions: {seconds[1]:.2f} s a thousand at first, {seconds[-1]:.2f} at last;")
    slope = many["kilobytes_a_prediction"]
    print(f"  resident {memory[0]:.0f} MB at first, {memory[-1]:.0f} at last, {slope:.3f} kB each")
    print(
        f"{files['files']} files: {files['images_per_second']:.0f} a second, {files['resident_megabytes']:.0f} MB at "
        f"last, {files['kilobytes_a_file']:.3f} kB each"
    )
    for images, row in training.items():
        print(f"training on {images} images: {row['peak_gigabytes']:.2f} GB")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
