"""Train the small model of `tmca doctor` on phantoms, choose its image, and store the masks that it must find again.

Usage: python docs/train_self_test.py [FOLDER]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from tmca.config import DecoderConfig, ImageEncoderConfig, TextEncoderConfig
from tmca.data.phantom import describe_targets, draw_phantom, write_phantoms
from tmca.files import replace_folder, write_json
from tmca.health.self_test import mask_dice
from tmca.imaging.raster import write_image, write_mask
from tmca.inference import Predictor
from tmca.presets import change, get_preset
from tmca.training import fit

FOLDER = Path(__file__).parents[1] / "src" / "tmca" / "health" / "self_test_data"
COUNTS = {"train": 1600, "val": 50}
IMAGE_SIZE, NETWORK_SIZE = 96, 64
LEAST_TRUE_DICE, LEAST_EQUAL_DICE = 0.9, 0.995
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")

EXPERIMENT = change(
    get_preset("demo"),
    "self-test",
    preprocessing={"image_size": NETWORK_SIZE},
    augmentation={"text_dropout": 0.0},
    model={
        "image_encoder": ImageEncoderConfig(
            weights="none",
            architecture="resnet",
            options={
                "embedding_size": 12,
                "hidden_sizes": [12, 16, 24, 32],
                "depths": [1, 1, 1, 1],
                "layer_type": "basic",
            },
        ),
        "text_encoder": TextEncoderConfig(
            weights="scratch", freeze=False, hidden_size=24, layers=3, attention_heads=2, dropout=0.0
        ),
        "decoder": DecoderConfig(channels=(12, 16, 24), head_channels=8),
    },
    optimiser={"learning_rate": 4e-3},
    trainer={"max_epochs": 30, "min_epochs": 30, "patience": 30},
)


def main(folder: Path) -> None:
    """Train, choose, store."""
    with tempfile.TemporaryDirectory() as place:
        manifest = write_phantoms(Path(place) / "data", COUNTS, size=NETWORK_SIZE, seed=1)
        fit(EXPERIMENT, manifest, Path(place) / "run", cache=Path(place) / "cache")
        best = Path(place) / "run" / "checkpoints" / "best"
        exact, halved = (Predictor.from_pretrained(best, "cpu", precision) for precision in ("32", "bf16"))
        rng = np.random.default_rng(2024)
        while True:
            phantom = draw_phantom(rng, IMAGE_SIZE)
            sentences = [describe_targets([lesion]) for lesion in phantom.lesions[:2]]
            masks = []
            for predictor in (exact, halved):
                predictor.set_image(phantom.image)
                masks.append([predictor.predict(sentence) for sentence in sentences])
            asked = exact.predict(phantom.text)
            true = mask_dice(asked, phantom.mask)
            equal = min(mask_dice(one, other) for one, other in zip(*masks, strict=True))
            apart = mask_dice(*masks[0])
            if true >= LEAST_TRUE_DICE and equal >= LEAST_EQUAL_DICE and apart == 0 and all(map(np.any, masks[0])):
                break
        print(f"Dice with the drawn mask {true:.3f}, in bfloat16 and float32 {equal:.3f}")  # noqa: T201
        with replace_folder(folder) as new:
            (new / "model").mkdir()
            for name in MODEL_FILES:
                shutil.copyfile(best / name, new / "model" / name)
            write_image(new / "image.png", phantom.image)
            files = {f"mask-{number}.png": sentence for number, sentence in enumerate(sentences, 1)}
            for file, mask in zip(files, masks[0], strict=True):
                write_mask(new / file, mask)
            write_json(new / "sentences.json", files)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
