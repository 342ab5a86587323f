"""Which form of the alignment helps, told by validation data? The test split is not touched.

On a large dataset (QaTa-COV19-v2) each form is trained for 6 epochs of a quarter of the images at 128 pixels with the
recipe of the scale ``cpu`` and scored on every third validation image. A small one (Kvasir-SEG) has too few of them:
each form is trained as ``tmca reproduce --scale cpu`` does, on two thirds of the training and validation images, and
scored on the last third. The numbers choose between forms; they are no results.

    python benchmarks/alignment_sweep.py DATA --runs FOLDER [--seeds 1 2] [--only NAME …]

DATA is a dataset in a known layout; the MobileNetV2 weights must be where ``tmca`` finds them. Five to twenty minutes a
run on one core. What ``benchmarks/results/alignment_sweep.json`` holds is not computed again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tmca.checkpoints import load_checkpoint
from tmca.config import Experiment
from tmca.data.layouts import open_dataset
from tmca.data.manifest import Manifest
from tmca.evaluation import evaluate
from tmca.files import write_json
from tmca.presets import change, get_preset
from tmca.reproduction.scales import at_scale
from tmca.training import fit

RESULT = Path(__file__).parent / "results" / "alignment_sweep.json"

FORMS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "image only": ("image-only", {}),
    "no alignment (Ariadne)": ("ariadne", {}),
    "mean, weight 1": ("tmca", {}),
    "mean, weight 0.2": ("tmca", {"objective": {"alignment_weight": 0.2}}),
    "mask, weight 1": ("tmca", {"alignment": {"pooling": "mask"}}),
    "mask, weight 0.2": ("tmca", {"alignment": {"pooling": "mask"}, "objective": {"alignment_weight": 0.2}}),
    "mask, weight 0.05": ("tmca", {"alignment": {"pooling": "mask"}, "objective": {"alignment_weight": 0.05}}),
    "mask, weight 0.2, tau_1 0.2": (
        "tmca",
        {"alignment": {"pooling": "mask"}, "objective": {"alignment_weight": 0.2, "target_temperature": 0.2}},
    ),
    "mask, image encoder left alone": ("tmca", {"alignment": {"pooling": "mask", "train_image_encoder": False}}),
    "mask, image encoder left alone, weight 0.2": (
        "tmca",
        {"alignment": {"pooling": "mask", "train_image_encoder": False}, "objective": {"alignment_weight": 0.2}},
    ),
    "mask, image encoder left alone, weight 0": (
        "tmca",
        {"alignment": {"pooling": "mask", "train_image_encoder": False}, "objective": {"alignment_weight": 0.0}},
    ),
    "mask, tau_1 0.5": ("tmca", {"alignment": {"pooling": "mask"}, "objective": {"target_temperature": 0.5}}),
}
"""Name → preset, and the fields that are changed; ``alignment`` is a section of the model."""

LARGE = 2000
"""Training images above which a part of them is used."""


def experiment_of(name: str, seed: int, n_train: int) -> Experiment:
    """Return a form's experiment: the scale ``cpu``, for a large dataset smaller."""
    preset, changes = FORMS[name]
    experiment = at_scale(replace(get_preset(preset), seed=seed), "cpu", n_train)
    model = experiment.model
    if "alignment" in changes:
        model = replace(model, alignment=replace(model.alignment, **changes["alignment"]))
    if n_train > LARGE:
        small = {"max_epochs": 6, "min_epochs": 6, "patience": 6}
        experiment = change(experiment, preset, preprocessing={"image_size": 128}, trainer=small)
    return replace(experiment, model=model, objective=replace(experiment.objective, **changes.get("objective", {})))


def part_of(manifest: Manifest) -> Manifest:
    """Return a quarter of a large training split and every third validation case; of a small one, thirds of both."""
    if len(manifest.split("train").records) <= LARGE:
        cases = (*manifest.split("train").records, *manifest.split("val").records)
        by_name = sorted(cases, key=lambda record: record.id)
        return manifest.with_records(
            replace(record, split="val" if number % 3 == 0 else "train") for number, record in enumerate(by_name)
        )
    training, validation = manifest.split("train").fraction(0.25, 0), manifest.split("val")
    keep = {record.id for record in (*training.records, *validation.records[::3])}
    return replace(manifest, records=tuple(record for record in manifest.records if record.id in keep))


def main(arguments: list[str] | None = None) -> None:
    """Train and score what is missing, and print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", choices=FORMS, default=list(FORMS))
    options = parser.parse_args(arguments)

    manifest = open_dataset(options.data)
    n_train = len(manifest.split("train").records)
    manifest = part_of(manifest)
    for name in options.only:
        for seed in options.seeds:
            run = {"data": manifest.name, "form": name, "seed": seed}
            if any(run.items() <= other.items() for other in known()):
                continue
            folder = options.runs / f"{manifest.name}-{name.replace(' ', '-').replace(',', '')}-{seed}"
            fit(experiment_of(name, seed, n_train), manifest, folder, overwrite=True)
            scores = evaluate(load_checkpoint(folder), manifest, "val")
            run["pooled"] = {variant: round(scores.pooled(variant)["dice"], 4) for variant in scores.counts}
            run["per_case"] = round(scores.per_case()["dice"], 4)
            write_json(RESULT, [*known(), run])
    for run in known():
        pooled = "  ".join(f"{variant} {value:.3f}" for variant, value in run["pooled"].items())
        name = f"{run['data']:12} {run['form']:42}"
        print(f"{name} seed {run['seed']}  per case {run['per_case']:.3f}  pooled: {pooled}")


def known() -> list[dict[str, Any]]:
    """Return the runs that are recorded."""
    runs: list[dict[str, Any]] = json.loads(RESULT.read_text("utf-8")) if RESULT.is_file() else []
    return runs


if __name__ == "__main__":
    main()
