"""Results as HTML: pictures with words for those who do not see them. Nothing is written to disk."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tmca.imaging.overlay import PREDICTION_COLOUR, outline

LONGEST_SIDE = 1024
"""Of a picture in the page, in pixels; larger ones are reduced."""
LONGEST_PANEL = 560
"""The same of one among several."""
HEAT = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))
"""Colours of 0 to 1, each lighter than the one before."""
HEAT_SHARE = 0.6
PNG_URI = "data:image/png;base64,"


def figures(panels: Sequence[str]) -> str:
    """Return figures side by side."""
    return f'<div class="panels panels-{min(len(panels), 3)}">{"".join(panels)}</div>'


def mask_figure(pixels: NDArray[np.uint8], mask: NDArray[np.bool_] | None, caption: str, alt: str, side: int) -> str:
    """Return an image with a mask on it, whose opacity is the page's own matter.

    Args:
        pixels: uint8 ``(height, width, 3)``.
        mask: bool ``(height, width)``; ``None`` shows the image alone.
        caption: Words below it.
        alt: What it shows, in words.
        side: Longest side in pixels.
    """
    layers = [f'<img src="{png(reduced(pixels, side))}" alt="{html.escape(alt)}">']
    if mask is not None:
        shown = reduced_mask(mask, side)
        thickness = max(1, round(min(shown.shape) / 130))
        layers += [
            f'<img class="{name}" src="{png(painted(part))}" alt="" aria-hidden="true">'
            for name, part in (("fill", shown), ("outline", outline(shown, thickness)))
        ]
    return _figure("".join(layers), caption)


def heat_figure(pixels: NDArray[np.uint8], values: NDArray[np.floating[Any]], caption: str, alt: str, side: int) -> str:
    """Return an image under the colours of values in [0, 1]."""
    shown = reduced(pixels, side).astype(np.float32)
    levels = reduced(np.rint(255 * np.clip(values, 0, 1)).astype(np.uint8), side)
    blended = (1 - HEAT_SHARE) * shown + HEAT_SHARE * _heat_table()[levels]
    return _figure(f'<img src="{png(blended.astype(np.uint8))}" alt="{html.escape(alt)}">', caption)


def legend(low: str, high: str) -> str:
    """Return the colours of 0 to 1 with words at both ends."""
    colours = ", ".join(f"rgb{colour}" for colour in HEAT)
    return (
        f'<p class="legend"><span>{html.escape(low)}</span><span class="bar" aria-hidden="true" '
        f'style="background: linear-gradient(to right, {colours})"></span><span>{html.escape(high)}</span></p>'
    )


def painted(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return a mask in the prediction's colour, uint8 ``(height, width, 4)``, transparent elsewhere."""
    layer = np.zeros((*mask.shape, 4), dtype=np.uint8)
    layer[mask] = (*PREDICTION_COLOUR, 255)
    return layer


def reduced(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return an image that is not larger than a side; a smaller one stays as it is."""
    size = reduced_size(pixels.shape[:2], side)
    if size == pixels.shape[:2]:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR, reducing_gap=2.0))


def reduced_mask(mask: NDArray[np.bool_], side: int) -> NDArray[np.bool_]:
    """Return a mask that is not larger than a side."""
    return resized_mask(mask, reduced_size(mask.shape, side))


def resized_mask(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return a mask at another size, every pixel the nearest of the old ones."""
    rows, columns = (
        np.minimum((np.arange(new) + 0.5) * old / new, old - 1).astype(np.intp)
        for new, old in zip(size, mask.shape, strict=True)
    )
    found: NDArray[np.bool_] = mask[rows[:, None], columns[None, :]]
    return found


def reduced_size(size: tuple[int, ...], side: int) -> tuple[int, int]:
    """Return height and width of an image that is not larger than a side."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def png(array: NDArray[np.uint8]) -> str:
    """Return an image as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", compress_level=1)
    return f"{PNG_URI}{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _figure(layers: str, caption: str) -> str:
    words = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure><div class="layers">{layers}</div>{words}</figure>'


def _heat_table() -> NDArray[np.float32]:
    places = np.linspace(0, 255, len(HEAT))
    channels = [np.interp(np.arange(256), places, [colour[index] for colour in HEAT]) for index in range(3)]
    return np.stack(channels, axis=1).astype(np.float32)
