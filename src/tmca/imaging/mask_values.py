"""Which values of a mask file mean foreground, whatever the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmca.errors import DataError

GREY_SHARE = 0.05
"""Largest share of a mask's pixels that may be neither near 0 nor near 255, as they are at the edges in a JPEG."""
CLASS_SHARE = 0.0005
"""Share of a mask's pixels from which a grey value that stands out is a class and not an edge."""
CLASS_PIXELS = 16
"""Number of pixels from which it is one."""

_GREY = slice(33, 223)
_STANDS_OUT = 0.3
_NEAR_BLACK = 32
_NEAR_WHITE = 223


def foreground(path: Path, values: NDArray[Any], *, lossy: bool) -> NDArray[np.bool_]:
    """Return where the values of a mask mean foreground, by the rules of :func:`tmca.imaging.raster.read_mask`.

    Args:
        path: Where they come from, for messages.
        values: Numbers of any shape.
        lossy: The file's compression adds noise, so that few dark values are not taken for classes.

    Raises:
        DataError: The values are grey or several classes.
    """
    low, high = values.min(), values.max()
    if low >= 0 and np.all((values == 0) | (values == high)) and (low == 0 or high == 1):
        return np.asarray(values > 0)
    if low >= 0 and 0 < high <= _NEAR_BLACK and lossy:
        raise DataError(
            f"{path} is a JPEG or WebP whose brightest pixel is {high:g} of 255: an empty mask, or one of 0 and 1",
            hint="save it as PNG, or as 0 and 255",
        )
    if low >= 0 and high <= _NEAR_BLACK and not lossy:
        classes = np.unique(values)
        raise DataError(
            f"{path} holds {len(classes)} classes ({', '.join(f'{value:g}' for value in classes[:5])} …), "
            "expected background and foreground",
            hint="save the class you want to segment as 255 and everything else as 0",
        )
    grey = (values > _NEAR_BLACK) & (values < _NEAR_WHITE)
    share = float(grey.mean())
    if share > GREY_SHARE or low < 0:
        raise DataError(
            f"{path} holds grey values: {100 * share:.0f} % of its pixels are neither near 0 nor near 255",
            hint="expected a mask of 0 (background) and 255 or 1 (foreground); is this the image itself?",
        )
    return np.asarray(values > 127)


def third_value(values: NDArray[Any]) -> tuple[int, float] | None:
    """Return the grey value that is a class of its own in a mask of black and white, and its share of the pixels.

    Grey pixels at the edges, of JPEG or of resizing, spread over many values; a class has one.

    Args:
        values: 0 to 255, any shape.
    """
    whole = np.rint(values).astype(np.int64).ravel()
    counts = np.bincount(whole, minlength=256)[_GREY]
    value, count = int(counts.argmax()), int(counts.max())
    if (
        count < max(CLASS_PIXELS, CLASS_SHARE * whole.size)
        or count < _STANDS_OUT * counts.sum()
        or count == np.count_nonzero(whole)
    ):
        return None
    return value + _GREY.start, count / whole.size
