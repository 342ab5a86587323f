"""The paper's Fig. 2: cases by methods, what a method marked wrongly boxed red, what it missed boxed blue."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, UInt8
from scipy import ndimage

from tmca.data.manifest import Manifest, Record
from tmca.errors import DataError
from tmca.files import write_bytes
from tmca.imaging.overlay import draw_overlay
from tmca.imaging.reading import read_image, read_mask
from tmca.inference import Predictor
from tmca.progress import track

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FALSE_POSITIVE, FALSE_NEGATIVE = "#e8112d", "#1f6fff"
CELL_INCHES, SENTENCE_INCHES = 2.1, 0.65
"""Width of a column, and height of what stands under an image."""
SMALLEST_BOX = 0.002
"""Share of the image from which a wrong region gets a box: thinner ones are differences of the outline."""

MaskArray = Bool[np.ndarray, "height width"]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Compared:
    """One case under every method.

    Attributes:
        record: The case.
        image: uint8 RGB.
        truth: Reference mask.
        predicted: Method → its mask.
    """

    record: Record
    image: UInt8[np.ndarray, "height width 3"]
    truth: MaskArray
    predicted: dict[str, MaskArray]

    @property
    def spread(self) -> float:
        """How far apart the methods' Dice are: the cases that tell most about them."""
        scores = [dice(mask, self.truth) for mask in self.predicted.values()]
        return max(scores) - min(scores)


def compare_cases(
    folders: Mapping[str, Path], manifest: Manifest, *, cases: Sequence[str] = (), count: int = 6, device: str = "auto"
) -> list[Compared]:
    """Segment the test cases with every method and return those to show.

    Args:
        folders: Method → run folder.
        manifest: The data.
        cases: Names of the cases; empty: the ``count`` cases in which the methods differ most.
        count: Number of cases to choose.
        device: Where to compute.

    Raises:
        DataError: There is no method, or no such case.
    """
    if not folders:
        raise DataError("There is no trained model to show", hint="run `tmca reproduce table1` first")
    chosen = manifest.split("test")
    chosen = chosen.select(list(cases)) if cases else chosen
    compared = [_read(chosen, record) for record in chosen.records]
    for label, folder in folders.items():
        predictor = Predictor.from_pretrained(folder, device)
        for case in track(compared, label, len(compared)):
            predictor.set_image(case.image)
            case.predicted[label] = predictor.predict(case.record.text)
    if cases:
        return compared
    return sorted(compared, key=lambda case: case.spread, reverse=True)[:count]


def draw_comparison(compared: Sequence[Compared], path: Path) -> None:
    """Write the grid as PNG: a row a case with its sentence, a column a method with its Dice."""
    from matplotlib.figure import Figure

    labels = list(compared[0].predicted)
    columns = 2 + len(labels)
    height = CELL_INCHES * float(np.median([case.image.shape[0] / case.image.shape[1] for case in compared]))
    size = (CELL_INCHES * columns, (height + SENTENCE_INCHES) * len(compared) + SENTENCE_INCHES)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    grid = figure.subplots(len(compared), columns, squeeze=False)
    for axes, case in zip(grid, compared, strict=True):
        _show(axes[0], case.image, None)
        _show(axes[1], case.image, case.truth)
        sentence = "\n".join(textwrap.wrap(case.record.text or "no sentence", 30)[:4])
        axes[0].set_xlabel(sentence, fontsize=7)
        for axis, label in zip(axes[2:], labels, strict=True):
            mask = case.predicted[label]
            _show(axis, case.image, mask)
            _draw_boxes(axis, boxes(mask & ~case.truth), FALSE_POSITIVE)
            _draw_boxes(axis, boxes(case.truth & ~mask), FALSE_NEGATIVE)
            axis.set_xlabel(f"Dice {dice(mask, case.truth):.2f}", fontsize=8)
    for axis, title in zip(grid[0], ("image", "reference", *labels), strict=True):
        axis.set_title(title, fontsize=9)
    figure.supxlabel("red: marked wrongly   blue: missed", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_bytes(path, buffer.getvalue())


def boxes(wrong: MaskArray) -> list[Box]:
    """Return (left, top, right, bottom) in pixels of the wrong regions that are more than a displaced outline.

    A region counts if something of it is left when two pixels, or a hundredth of the image, are taken off its border.
    """
    size = min(wrong.shape)
    inner = ndimage.binary_erosion(wrong, iterations=max(2, size // 100))
    regions, _ = ndimage.label(wrong, structure=np.ones((3, 3)))
    found = []
    for number, (rows, cols) in enumerate(ndimage.find_objects(regions), start=1):
        region = regions == number
        if region.sum() >= SMALLEST_BOX * wrong.size and (region & inner).any():
            found.append((cols.start, rows.start, cols.stop, rows.stop))
    return found


def dice(mask: MaskArray, truth: MaskArray) -> float:
    """Return the Dice of two masks; 1 for two empty ones."""
    total = int(mask.sum()) + int(truth.sum())
    return 2 * int((mask & truth).sum()) / total if total else 1.0


def _read(manifest: Manifest, record: Record) -> Compared:
    image = read_image(manifest.image_path(record))
    path = manifest.mask_path(record)
    truth = read_mask(path) if path is not None else np.zeros(image.shape[:2], dtype=bool)
    return Compared(record, image, truth, {})


def _show(axis: Axes, image: np.ndarray, mask: np.ndarray | None) -> None:
    axis.imshow(draw_overlay(image, mask))
    axis.set(xticks=[], yticks=[])


def _draw_boxes(axis: Axes, found: Sequence[Box], colour: str) -> None:
    from matplotlib.patches import Rectangle

    for left, top, right, bottom in found:
        corner = (left - 0.5, top - 0.5)
        axis.add_patch(Rectangle(corner, right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.5))
