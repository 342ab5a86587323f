"""Does training in bfloat16 follow the loss curve of float32?

The preset ``kvasir-mobile`` for 200 steps on real images, in both precisions and with three seeds each: the same first
weights, batches and random changes for the two of a seed. Curves are means over 20 steps. The noise is how far the
curves of float32 lie apart from each other over seeds; the question is how far bfloat16 lies from float32 of the same
seed.

    python benchmarks/precision.py --data FOLDER [--weights FOLDER] [--steps 200] [--size 128] [--batch 8]

Prints a table, draws ``benchmarks/results/precision.png`` and writes ``benchmarks/results/precision.json``.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from measuring import RESULTS, report

from tmca.config import Experiment
from tmca.data.cache import DecodedCache
from tmca.data.layouts import open_dataset
from tmca.data.loading import SegmentationDataset, make_loader
from tmca.data.manifest import Manifest
from tmca.devices import keep_freed_memory
from tmca.losses import objective
from tmca.models import build_model
from tmca.models.operations import channels_last
from tmca.presets import kvasir_mobile

SEEDS = (1, 2, 3)
WINDOW = 20


def experiment(size: int, weights: str) -> Experiment:
    """Return the preset at another size and from given weights."""
    preset = kvasir_mobile()
    shape = replace(preset.preprocessing, image_size=size, normalisation="fixed", mean=(0.5,) * 3, std=(0.5,) * 3)
    encoder = replace(preset.model.image_encoder, weights=weights)
    return replace(preset, preprocessing=shape, model=replace(preset.model, image_encoder=encoder))


def curve(
    preset: Experiment, manifest: Manifest, cache: Path, seed: int, steps: int, batch: int, *, half: bool
) -> list[float]:
    """Return the loss of each step."""
    torch.manual_seed(seed)
    model = channels_last(build_model(preset.model, manifest.sentences)).train()
    cached = DecodedCache(manifest, preset.preprocessing.image_size, cache)
    for _ in cached.fill():
        pass
    dataset = SegmentationDataset(manifest, preset.preprocessing, preset.augmentation, seed=seed, cache=cached)
    loader = make_loader(dataset, batch, training=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.05, fused=True)
    losses: list[float] = []
    epoch = 0
    while len(losses) < steps:
        loader.sampler.set_epoch(epoch)
        epoch += 1
        for loaded in itertools.islice(loader, steps - len(losses)):
            torch.manual_seed(1000 * seed + len(losses))
            images = loaded.images.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                output = model.segment(model.encode_image(images), model.encode_text(loaded.texts))
                loss = objective(output, loaded.masks, preset.objective)["loss"]
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            losses.append(float(loss.detach()))
    return losses


def smooth(losses: list[float]) -> np.ndarray:
    """Return means over windows that follow each other."""
    return np.array(losses).reshape(-1, WINDOW).mean(axis=1)


def main() -> None:
    """Train, print, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", default="none")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    keep_freed_memory()
    manifest = open_dataset(arguments.data).split("train")
    preset = experiment(arguments.size, arguments.weights)
    curves: dict[str, dict[int, list[float]]] = {"float32": {}, "bfloat16": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for seed, name in itertools.product(SEEDS, curves):
            options = (manifest, Path(temporary), seed, arguments.steps, arguments.batch)
            curves[name][seed] = curve(preset, *options, half=name == "bfloat16")
    smoothed = {name: {seed: smooth(losses) for seed, losses in kind.items()} for name, kind in curves.items()}
    pairs = [abs(smoothed["float32"][a] - smoothed["float32"][b]) for a, b in itertools.combinations(SEEDS, 2)]
    noise = np.mean(pairs, axis=0)
    apart = np.mean([abs(smoothed["bfloat16"][seed] - smoothed["float32"][seed]) for seed in SEEDS], axis=0)
    bias = np.mean([smoothed["bfloat16"][seed] - smoothed["float32"][seed] for seed in SEEDS], axis=0)
    rows = [
        {
            "steps": f"{WINDOW * index}–{WINDOW * (index + 1)}",
            "float32, seeds apart": f"{noise[index]:.3f}",
            "bfloat16 from float32": f"{apart[index]:.3f}",
            "bias": f"{bias[index]:+.3f}",
        }
        for index in range(len(noise))
    ]
    report(
        "precision",
        __doc__,
        rows,
        data=manifest.name,
        size=arguments.size,
        batch=arguments.batch,
        window=WINDOW,
        curves={name: {seed: values.tolist() for seed, values in kind.items()} for name, kind in smoothed.items()},
    )
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    for (name, kind), colour in zip(smoothed.items(), ("tab:blue", "tab:orange"), strict=True):
        for seed, values in kind.items():
            steps = WINDOW * (np.arange(len(values)) + 0.5)
            axis.plot(steps, values, color=colour, label=name if seed == SEEDS[0] else None, alpha=0.8)
    axis.set(xlabel="step", ylabel="training loss")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(RESULTS / "precision.png", dpi=110)


if __name__ == "__main__":
    main()
