"""Masks as text: run lengths in the COCO format, which annotation tools and pycocotools read.

The mask is read column by column from the top left, and the lengths of its runs are counted, background first. From the
fourth on, a length is written as its difference to the one two before it. Each number is cut into groups of five bits,
the lowest first; a sixth bit says that another group follows, and 48 is added to make a printable character. The last
group's highest bit is the number's sign.

Source:
    The compressed run-length encoding of the COCO dataset's API (https://cocodataset.org), from its description.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmca.errors import DataError
from tmca.files import write_json
from tmca.imaging.raster import MAX_PIXELS

_GROUP = 0b11111
_SIGN = 0b10000
_CONTINUES = 0b100000
_FIRST_CHARACTER = 48
_MOST_GROUPS = 7  # 35 bits: more than any length of a mask needs


def encode_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Return a mask as COCO run lengths.

    Args:
        mask: ``(height, width)``, true at foreground.

    Returns:
        ``size`` (height, width), ``counts`` (the runs as text), ``bbox`` (left, top, width, height in pixels; all 0 for
        an empty mask) and ``area`` (pixels).
    """
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    box = [0, 0, 0, 0]
    if rows.size:
        left, top = int(columns[0]), int(rows[0])
        box = [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
    return {
        "size": [int(mask.shape[0]), int(mask.shape[1])],
        "counts": _as_text(_runs(mask)),
        "bbox": box,
        "area": int(np.count_nonzero(mask)),
    }


def decode_mask(encoded: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Return the mask of COCO run lengths.

    Args:
        encoded: At least ``size`` and ``counts``; the counts as text, or as the list of numbers that COCO's annotation
            files also use. Other keys are ignored.

    Returns:
        ``(height, width)``, true at foreground.

    Raises:
        DataError: A key is missing, or the runs do not fill the size.
    """
    height, width = _size(encoded.get("size"))
    counts = encoded.get("counts")
    if isinstance(counts, str):
        runs = _from_text(counts)
    elif isinstance(counts, list) and all(isinstance(run, int) for run in counts):
        runs = counts
    else:
        raise DataError("The run lengths have no counts", hint="expected text or whole numbers under 'counts'")
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise DataError(
            f"The run lengths count {sum(runs)} pixels, expected {height} × {width} = {height * width}",
            hint="was the text cut off or changed?",
        )
    values = np.arange(len(runs)) % 2 == 1
    return np.ascontiguousarray(np.repeat(values, runs).reshape(width, height).T)


def write_mask(path: Path | str, mask: NDArray[np.bool_]) -> None:
    """Write a mask's run lengths as JSON, in one step; see :func:`encode_mask`.

    Raises:
        StorageError: The file could not be written.
    """
    write_json(path, encode_mask(mask))


def _size(size: Any) -> tuple[int, int]:  # noqa: ANN401
    numbers = size if isinstance(size, list | tuple) and all(isinstance(length, int) for length in size) else ()
    if len(numbers) != 2 or min(numbers) < 1 or numbers[0] * numbers[1] > MAX_PIXELS:
        raise DataError(f"The run lengths have the size {size!r}", hint="expected [height, width], both above 0")
    return numbers[0], numbers[1]


def _runs(mask: NDArray[np.bool_]) -> list[int]:
    """Return the lengths of the runs of equal pixels, column by column; the first is of background and may be 0."""
    pixels = np.asarray(mask, dtype=bool).T.ravel()
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    ends = [0, *changes.tolist(), pixels.size]
    runs = [last - first for first, last in pairwise(ends)]
    return [0, *runs] if pixels.size and pixels[0] else runs


def _as_text(runs: Iterable[int]) -> str:
    characters: list[str] = []
    before: list[int] = []
    for run in runs:
        number = run - before[-2] if len(before) > 2 else run
        before.append(run)
        finished = False
        while not finished:
            group = number & _GROUP
            number >>= 5  # keeps the sign
            finished = number == (-1 if group & _SIGN else 0)
            characters.append(chr(_FIRST_CHARACTER + group + (0 if finished else _CONTINUES)))
    return "".join(characters)


def _from_text(text: str) -> list[int]:
    runs: list[int] = []
    number, groups = 0, 0
    for character in text:
        code = ord(character) - _FIRST_CHARACTER
        if not 0 <= code < 2 * _CONTINUES or groups == _MOST_GROUPS:
            raise DataError(f"The run lengths hold {character!r} where none can be", hint="was the text changed?")
        number |= (code & _GROUP) << 5 * groups
        groups += 1
        if code & _CONTINUES:
            continue
        if code & _SIGN:
            number -= 1 << 5 * groups
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number, groups = 0, 0
    if groups:
        raise DataError("The run lengths end within a number", hint="was the text cut off?")
    return runs
