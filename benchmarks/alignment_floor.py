"""How low can the alignment loss get when the sentences of a batch repeat?

A text embedding is a function of the sentence, so equal sentences share one prediction. The least loss that is possible
then (over all images and sentences, both directions) lies above the entropy of the targets; where the two part, the
targets ask for what no sentence can tell. Batches of 32 random training cases, masks at 112 pixels.

    python benchmarks/alignment_floor.py DATA

DATA holds the folders ``kvasir_polyp`` and ``qata_cov19``. Writes ``benchmarks/results/alignment_floor.json``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tmca.data.layouts import open_dataset
from tmca.files import write_json
from tmca.imaging.reading import read_mask
from tmca.losses import mask_dice_similarity

RESULT = Path(__file__).parent / "results" / "alignment_floor.json"
BATCH, BATCHES, SIZE = 32, 20, 112
TEMPERATURES = (0.05, 0.1, 0.2, 0.3, 0.5)


def attainable_loss(similarity: Tensor, texts: list[str | None], temperature: float) -> float:
    """Return the least contrastive loss of a batch in which equal sentences get equal logits."""
    targets = (similarity / temperature).softmax(dim=1)
    groups = [[row for row, text in enumerate(texts) if text == distinct] for distinct in dict.fromkeys(texts)]
    # Text to image: equal sentences share one distribution over images, best at the mean of their targets.
    shared = torch.stack([targets[group].mean(dim=0) for group in groups])
    text_to_image = sum(len(group) * _entropy(mean) for group, mean in zip(groups, shared, strict=True)) / len(texts)
    # Image to text: the probability of a group is divided evenly among its equal sentences.
    mass = torch.stack([targets[:, group].sum(dim=1) for group in groups], dim=1)
    sizes = torch.tensor([len(group) for group in groups])
    image_to_text = -(mass * (mass / sizes).clamp(min=1e-12).log()).sum(dim=1).mean().item()
    return (text_to_image + image_to_text) / 2


def _entropy(distribution: Tensor) -> float:
    return -(distribution * distribution.clamp(min=1e-12).log()).sum().item()


def measure(folder: Path) -> dict[str, Any]:
    """Return the figures of one dataset."""
    training = open_dataset(folder).split("train")
    chosen = np.random.default_rng(0).choice(len(training.records), BATCH * BATCHES, replace=False)
    rows: dict[float, list[tuple[float, float, float]]] = {temperature: [] for temperature in TEMPERATURES}
    distinct = []
    for start in range(0, len(chosen), BATCH):
        records = [training.records[index] for index in chosen[start : start + BATCH]]
        masks = [Image.fromarray(read_mask(training.mask_path(record))).resize((SIZE, SIZE)) for record in records]
        similarity = mask_dice_similarity(torch.from_numpy(np.stack([np.array(mask) for mask in masks])[:, None]))
        texts = [record.text for record in records]
        distinct.append(len(set(texts)))
        for temperature in TEMPERATURES:
            targets = (similarity / temperature).softmax(dim=1)
            own = targets.diagonal().mean().item()
            entropy = sum(_entropy(row) for row in targets) / len(targets)
            rows[temperature].append((own, entropy, attainable_loss(similarity, texts, temperature)))
    names = ("own_share", "entropy", "attainable")
    means = {
        str(temperature): dict(zip(names, np.round(np.mean(values, axis=0), 3).tolist(), strict=True))
        for temperature, values in rows.items()
    }
    return {"distinct_sentences": float(np.mean(distinct)), "uniform": math.log(BATCH), "by_tau_1": means}


def main() -> None:
    """Measure both datasets, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data
    result = {name: measure(data / name) for name in ("kvasir_polyp", "qata_cov19")}
    for name, figures in result.items():
        print(f"{name}: {figures['distinct_sentences']:.1f} distinct sentences in batches of {BATCH}")
        for temperature, row in figures["by_tau_1"].items():
            print(
                f"  tau_1 {temperature:>4}: {row['own_share']:.2f} of a target on the own pair, entropy "
                f"{row['entropy']:.2f}, attainable {row['attainable']:.2f}, uniform {figures['uniform']:.2f}"
            )
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
