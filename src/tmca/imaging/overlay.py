"""Pictures of masks on images: filled prediction, outlined truth, several panels under their captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

Value = TypeVar("Value", bound=np.generic)

PREDICTION_COLOUR = (255, 200, 0)
"""Yellow: what the model marked."""
TRUTH_COLOUR = (0, 220, 255)
"""Cyan: the outline of the reference mask."""
FILL = 0.35
SHORTEST_PANEL = 224
CAPTION_SHARE = 0.05
"""Height of a caption's letters, as a share of the panel's width."""
MARGIN = 6
PAPER = (255, 255, 255)
INK = (30, 30, 30)


@dataclass(frozen=True)
class Panel:
    """One picture of a strip.

    Attributes:
        caption: Words above it.
        prediction: Predicted mask, bool ``(height, width)``; ``None`` shows the image alone.
    """

    caption: str
    prediction: NDArray[np.bool_] | None = None


def draw_overlay(
    image: NDArray[np.uint8], prediction: NDArray[np.bool_] | None, truth: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """Return the image with the prediction filled and outlined in yellow and the truth outlined in cyan.

    Args:
        image: uint8 ``(height, width, 3)``.
        prediction: bool ``(height, width)``.
        truth: bool ``(height, width)``.
    """
    drawn = image.copy()
    thickness = max(1, round(min(image.shape[:2]) / 130))
    if prediction is not None and prediction.any():
        box = _box(prediction)
        marked, part = prediction[box], drawn[box]
        part[marked] = (1 - FILL) * part[marked].astype(np.float32) + FILL * np.array(PREDICTION_COLOUR, np.float32)
        part[outline(marked, thickness)] = PREDICTION_COLOUR
    if truth is not None and truth.any():
        box = _box(truth)
        drawn[box][outline(truth[box], thickness)] = TRUTH_COLOUR
    return drawn


def _box(mask: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Return the rows and columns in which a mask that is not empty lies."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def outline(mask: NDArray[np.bool_], thickness: int = 1) -> NDArray[np.bool_]:
    """Return the pixels of a mask that lie within ``thickness`` of its border."""
    return np.asarray(mask & ~ndimage.binary_erosion(mask, iterations=thickness))


def draw_strip(
    image: NDArray[np.uint8], panels: Sequence[Panel], truth: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """Return the panels side by side, each under its caption, small images enlarged.

    Args:
        image: uint8 ``(height, width, 3)``.
        panels: Captions and predictions.
        truth: Outlined in every panel.
    """
    scale = max(1, round(SHORTEST_PANEL / min(image.shape[:2])))
    if scale > 1:
        image, truth = _enlarged(image, scale), None if truth is None else _enlarged(truth, scale)
    height, width = image.shape[:2]
    size = max(12, round(CAPTION_SHARE * width))
    font = ImageFont.load_default(size=size)
    captions = [wrapped(panel.caption, font, width) for panel in panels]
    top = MARGIN + round(1.25 * size) * max(len(lines) for lines in captions)
    strip = Image.new("RGB", (len(panels) * (width + MARGIN) + MARGIN, top + height + MARGIN), PAPER)
    pen = ImageDraw.Draw(strip)
    for number, (panel, lines) in enumerate(zip(panels, captions, strict=True)):
        left = MARGIN + number * (width + MARGIN)
        for row, line in enumerate(lines):
            pen.text((left, MARGIN / 2 + row * round(1.25 * size)), line, INK, font)
        prediction = panel.prediction
        if prediction is not None and scale > 1:
            prediction = _enlarged(prediction, scale)
        strip.paste(Image.fromarray(draw_overlay(image, prediction, truth)), (left, top))
    return np.asarray(strip)


def _enlarged(array: NDArray[Value], scale: int) -> NDArray[Value]:
    return np.repeat(np.repeat(array, scale, axis=0), scale, axis=1)


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Return the lines of a text that is broken between words to fit a width in pixels; a long word stays whole."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
