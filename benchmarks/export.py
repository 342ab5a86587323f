"""How long does a mask take in each form of an export, how large is it, and how far are its masks from torch's?

One image and one sentence that was never seen before, then a further sentence on the same image; pixels in,
probabilities at the image's own size out. Each form has a process of its own; they take turns. The Dice is of its masks
against those of the model in float32, on the images of ``--data``, as the gate of ``tmca export`` measures it.

    python benchmarks/export.py -m RUN --data FOLDER [--images 64] [--rounds 20]

Prints a table and writes ``benchmarks/results/export.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from measuring import isolated, medians, ratios, report

from tmca.devices import keep_freed_memory
from tmca.export import Segmenter, export_bundle, export_openvino
from tmca.export.openvino import openvino_graph
from tmca.inference import Predictor
from tmca_run import WordPieces

TORCH, BFLOAT, ONNX, INT8, OPENVINO = (
    "torch, float32",
    "torch, bfloat16 where masks bear it",
    "bundle, ONNX Runtime",
    "bundle, int8",
    "OpenVINO",
)
HEIGHT, WIDTH = 384, 512


def build(form: str, model: str, folder: Path, further: bool) -> Callable[[], object]:
    """Return what gives a probability map in a form; ``further``: of another sentence on the image already set."""
    keep_freed_memory()
    segmenter: Predictor | Segmenter
    if form in (TORCH, BFLOAT):
        segmenter = Predictor.from_pretrained(model, "cpu", "32" if form == TORCH else "bf16")
    elif form == OPENVINO:
        manifest = json.loads((folder / "openvino" / "manifest.json").read_text("utf-8"))
        files = {name: folder / "openvino" / graph["file"] for name, graph in manifest["graphs"].items()}
        pieces = {n: openvino_graph(f.read_bytes(), f.with_suffix(".bin").read_bytes()) for n, f in files.items()}
        segmenter = Segmenter(manifest, pieces, WordPieces((folder / "openvino" / "tokenizer.json").read_bytes()))
    else:
        segmenter = Segmenter.from_bundle(folder / ("int8.tmca" if form == INT8 else "float32.tmca"))
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    numbers = itertools.count()
    segmenter.set_image(image)

    def work() -> object:
        if not further:
            segmenter.set_image(image)
        return segmenter.probability(f"{next(numbers)} small white round polyps, located in top left of the image")

    return work


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        started = time.perf_counter()
        plain, bundle = export_bundle(given.model, folder / "float32.tmca", given.data, images=given.images)
        spent = time.perf_counter() - started
        small, _ = export_bundle(given.model, folder / "int8.tmca", given.data, images=given.images, int8=True)
        vino = export_openvino(given.model, folder / "openvino", given.data, images=given.images)
        forms = (TORCH, BFLOAT, ONNX, INT8, OPENVINO)
        timed = {}
        for further in (False, True):
            builds = {form: partial(build, form, given.model, folder, further) for form in forms}
            timed[further], _ = isolated(builds, given.rounds, settle=0.3)
        megabytes = {
            ONNX: plain.path.stat().st_size / 1e6,
            INT8: small.path.stat().st_size / 1e6,
            OPENVINO: sum(f.stat().st_size for f in (folder / "openvino").rglob("*") if "model." not in f.name) / 1e6,
        }
    parity = {ONNX: plain.parity, INT8: small.parity, OPENVINO: vino.parity}
    figures = {form: found["in pieces"] for form, found in parity.items()}
    first, second = medians(timed[False]), medians(timed[True])
    gain = ratios(timed[False], TORCH)
    rows = [
        {
            "form": form,
            "first mask, ms": f"{1000 * first[form]:.0f}",
            "× torch": f"{gain[form]:.2f}",
            "further sentence, ms": f"{1000 * second[form]:.0f}",
            "file, MB": f"{megabytes[form]:.1f}" if form in megabytes else "",
            "Dice to torch": f"{figures[form].dice:.5f}" if form in figures else "",
            "largest logit error": f"{figures[form].logit_error:.1e}" if form in figures else "",
        }
        for form in forms
    ]
    report(
        "export",
        __doc__,
        rows,
        data=given.data.name,
        size=bundle.manifest["preprocessing"]["image_size"],
        parameters=bundle.manifest["model"]["parameters"],
        seconds_to_export_and_compare=spent,
        first=first,
        further=second,
        parity={form: found.as_dict() for form, found in figures.items()},
    )


if __name__ == "__main__":
    main()
