"""Draw README's figure: phantoms the model has not seen, each segmented by two sentences.

Usage, after ``make demo``: python docs/draw_figure.py [RUN] [PICTURE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from tmca import Predictor
from tmca.data.phantom import describe_targets, draw_phantom
from tmca.imaging.overlay import Panel, draw_strip
from tmca.imaging.raster import write_image

SEED = 2024
COLUMNS = 2
PHANTOMS = 4


def main(run: Path, picture: Path) -> None:
    """Draw the figure."""
    predictor = Predictor.from_pretrained(run)
    size = predictor.experiment.preprocessing.image_size
    rng = np.random.default_rng(SEED)
    strips: list[np.ndarray] = []
    while len(strips) < PHANTOMS:
        phantom = draw_phantom(rng, size)
        predictor.set_image(phantom.image)
        sentences = [describe_targets([lesion]) for lesion in phantom.lesions[:2]]
        panels = [Panel(sentence, predictor.predict(sentence)) for sentence in sentences]
        strips.append(draw_strip(phantom.image, panels))
    height = max(strip.shape[0] for strip in strips)
    padded = [np.pad(strip, ((0, height - len(strip)), (0, 0), (0, 0)), constant_values=255) for strip in strips]
    rows = [np.concatenate(padded[start : start + COLUMNS], axis=1) for start in range(0, PHANTOMS, COLUMNS)]
    write_image(picture, np.concatenate(rows, axis=0))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(
        Path(arguments[0] if arguments else "demo/run"),
        Path(arguments[1] if len(arguments) > 1 else "docs/images/demo.png"),
    )
