"""Does a model say "not there" when the lesion is not there, and what does learning to say so cost?

Every test image is cut down to its largest part without lesion and asked with its own sentence, with one that denies
it, and without any; a right answer is an empty mask. Beside it stands the Dice on the whole images. Compare a model
trained with ``augmentation.no_lesion_share`` with one trained without.

    python benchmarks/absent.py --data FOLDER -m RUN RUN

Prints a table and writes ``benchmarks/results/absent-DATASET.json``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from measuring import report

from tmca.data.layouts import open_dataset
from tmca.data.manifest import Manifest
from tmca.data.opposites import deny
from tmca.data.preprocessing import Drawn, without_lesion
from tmca.imaging.reading import read_image, read_mask
from tmca.inference import Predictor
from tmca.prediction import PredictionOptions

SMALLEST = 0.001
"""Share of the image below which a region is no answer."""


def measure(run: Path, manifest: Manifest) -> dict[str, float | int | str]:
    """Return shares of empty answers where nothing is, and the Dice where something is."""
    predictor = Predictor.from_pretrained(run)
    empty: dict[str, list[bool]] = {"own": [], "denied": [], "none": [], "whole": []}
    overlap = total = 0
    for record in manifest.split("test").records:
        text = record.text or ""
        whole = Drawn(read_image(manifest.image_path(record)), read_mask(manifest.root / (record.mask or "")), text)
        options = PredictionOptions(min_region=round(SMALLEST * whole.mask.size), effects=())
        predictor.set_image(whole.image)
        mask = predictor.ask(text, options).mask
        overlap, total = overlap + 2 * int((mask & whole.mask).sum()), total + int(mask.sum() + whole.mask.sum())
        empty["whole"].append(not mask.any())
        part = without_lesion(whole, denied=False)
        if part is whole:
            continue
        predictor.set_image(part.image)
        texts = {"own": text, "denied": deny(text), "none": None}
        for name, answer in zip(texts, predictor.ask_all(list(texts.values()), options), strict=True):
            empty[name].append(not answer.regions)
    return {
        "run": run.name,
        "no_lesion_share": predictor.experiment.augmentation.no_lesion_share,
        "parts": len(empty["own"]),
        "pooled_dice": overlap / total,
        **{f"empty_{name}": float(np.mean(found)) for name, found in empty.items()},
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-m", "--model", type=Path, nargs="+", required=True)
    arguments = parser.parse_args()
    manifest = open_dataset(arguments.data)
    found = [measure(run, manifest) for run in arguments.model]
    rows = [
        {
            "trained with parts without lesion": f"{row['no_lesion_share']:.0%}",
            "nothing there, own sentence": f"{row['empty_own']:.0%}",
            "denying sentence": f"{row['empty_denied']:.0%}",
            "no sentence": f"{row['empty_none']:.0%}",
            "lesion there: missed": f"{row['empty_whole']:.0%}",
            "pooled Dice": f"{row['pooled_dice']:.3f}",
        }
        for row in found
    ]
    report(f"absent-{manifest.name}", __doc__, rows, data=manifest.name, models=found)


if __name__ == "__main__":
    main()
