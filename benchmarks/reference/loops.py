"""The baseline's data pipeline, training step and prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader, Dataset
from monai.losses import DiceCELoss
from monai.transforms import (
    AsDiscreted,
    Compose,
    EnsureChannelFirstd,
    Lambdad,
    LoadImaged,
    NormalizeIntensityd,
    RandZoomd,
    Resized,
)
from PIL import Image
from torch import Tensor

from reference.network import Ariadne
from tmca.data.manifest import Manifest
from tmca.models.tokenizer import SentenceTokenizer

KEYS = ("image", "mask")


def transforms(size: int, *, training: bool, keys: Sequence[str] = KEYS) -> Compose:
    """Return what happens to every case in every epoch."""
    modes = ["bicubic", "nearest"][: len(keys)]
    steps: list[Callable[..., Any]] = [
        LoadImaged(keys, reader="PILReader", reverse_indexing=False, image_only=True),
        EnsureChannelFirstd(keys),
        Lambdad("image", _three_channels),
        Resized(keys, (size, size), mode=modes),
    ]
    if "mask" in keys:
        steps += [Lambdad("mask", _one_channel), AsDiscreted("mask", threshold=128)]
    if training:
        steps.append(RandZoomd(keys, prob=0.1, min_zoom=0.95, max_zoom=1.2, mode=modes))
    return Compose([*steps, NormalizeIntensityd("image", channel_wise=True)])


def _three_channels(image: Tensor) -> Tensor:
    return image.expand(3, -1, -1) if len(image) == 1 else image[:3]


def _one_channel(mask: Tensor) -> Tensor:
    return mask[:1]


def make_loader(manifest: Manifest, tokenizer: SentenceTokenizer, size: int, batch: int, workers: int) -> DataLoader:
    """Return batches of ``image``, ``mask``, ``input_ids`` and ``attention_mask`` for training."""
    tokens = tokenizer([record.text for record in manifest.records])
    cases = [
        {
            "image": str(manifest.image_path(record)),
            "mask": str(manifest.mask_path(record)),
            "input_ids": tokens.input_ids[row],
            "attention_mask": tokens.attention_mask[row].long(),
        }
        for row, record in enumerate(manifest.records)
    ]
    dataset = Dataset(cases, transforms(size, training=True))
    return DataLoader(dataset, batch_size=batch, shuffle=True, drop_last=True, num_workers=workers)


class Trainer:
    """Network, loss and optimiser; calling it takes one step."""

    def __init__(self, network: Ariadne) -> None:
        self.network = network.train()
        self.loss = DiceCELoss(sigmoid=True)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=3e-4)

    def __call__(self, batch: dict[str, Tensor]) -> float:
        """Take a step and return its loss."""
        self.optimiser.zero_grad()
        logits = self.network(batch["image"], batch["input_ids"], batch["attention_mask"])
        loss = self.loss(logits, batch["mask"])
        loss.backward()
        self.optimiser.step()
        return float(loss.detach())


class ReferencePredictor:
    """Files and sentences → probability maps at the size of each file."""

    def __init__(self, network: Ariadne, tokenizer: SentenceTokenizer, size: int) -> None:
        self.network = network.eval()
        self.tokenizer = tokenizer
        self.transforms = transforms(size, training=False, keys=("image",))

    @torch.no_grad()
    def __call__(self, files: Sequence[Path], texts: Sequence[str]) -> list[np.ndarray]:
        """Return a map for each file and its sentence; all are computed as one batch."""
        images = torch.stack([self.transforms({"image": str(file)})["image"] for file in files])
        tokens = self.tokenizer(texts)
        logits = self.network(images, tokens.input_ids, tokens.attention_mask.long())
        maps = []
        for file, row in zip(files, logits.sigmoid(), strict=True):
            with Image.open(file) as image:
                width, height = image.size
            resized = torch.nn.functional.interpolate(row[None], (height, width), mode="bilinear", align_corners=False)
            maps.append(resized[0, 0].numpy())
        return maps
