"""Draw phantoms, train a preset with some fields changed, and compare right with wrong sentences.

python examples/train_on_phantoms.py --output runs/phantoms --epochs 4
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from tmca import Predictor, evaluate, fit, get_preset
from tmca.data.phantom import write_phantoms


def main(arguments: list[str] | None = None) -> None:
    """Draw, train, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/phantoms"))
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--train", type=int, default=800, help="training images")
    parser.add_argument("--val", type=int, default=50, help="validation images")
    parser.add_argument("--test", type=int, default=100, help="test images")
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args(arguments)

    preset = get_preset(options.preset)
    trainer = replace(preset.trainer, max_epochs=options.epochs, min_epochs=1)
    experiment = replace(preset, trainer=trainer)
    counts = {"train": options.train, "val": options.val, "test": options.test}
    manifest = write_phantoms(options.output / "data", counts, size=experiment.preprocessing.image_size)

    record = fit(experiment, manifest, options.output / "run", overwrite=True)
    print(f"{record.epochs} epochs in {record.seconds:.0f} seconds; best: {record.best_epoch}")  # noqa: T201

    evaluation = evaluate(Predictor.from_pretrained(record.folder).model, manifest, "test")
    for sentences in evaluation.counts:
        dice = evaluation.pooled(sentences)["dice"]
        print(f"sentences: {sentences:13} pooled Dice {dice:.3f}")  # noqa: T201


if __name__ == "__main__":
    main()
