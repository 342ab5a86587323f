"""DICOM images of one or several frames to arrays as a viewer shows them.

Rows and columns stay as they are stored: that is the order in which every viewer shows them, in which radiologists
describe them, and in which a DICOM SEG refers to them. Patient Position and Image Orientation therefore turn nothing;
they go into the geometry's affine.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from tmca.errors import DataError
from tmca.imaging.dicom.opening import NEEDED, SEGMENTATION, checked, is_segmentation, opened
from tmca.imaging.dicom.pixels import shown, value_limits
from tmca.imaging.dicom.tags import Source, explained, identity_of
from tmca.imaging.frames import Frame, Frames, Window, check_window

if TYPE_CHECKING:
    from pydicom import Dataset

DICOM_SUFFIXES = (".dcm", ".dicom")
"""Usual endings of DICOM files, lower case; many have none and are known by their content."""


def read_frames(path: Path | str, *, window: Window | None = None) -> Frames:
    """Read a file's header; each frame is decoded when it is asked for.

    Grey values pass the file's modality transformation (lookup table, or rescale slope and intercept) and its first
    display transformation (lookup table, or window); MONOCHROME1 is inverted as viewers do. Without a display
    transformation, unsigned values of up to 8 bits are shown in their full range; others from the 0.5th to the 99.5th
    percentile of a frame, the widest over the file's frames, padding left out. Colours become RGB.

    Args:
        path: A DICOM file.
        window: Centre and width of the values to show instead of the file's choice, after the modality
            transformation; without effect on colours.

    Raises:
        DataError: The file is missing, damaged, not DICOM, too large, holds no image, lacks a tag, or is compressed
            in a way for which no decoder is installed; on access to a frame also: its pixels are missing or cut off.
        ConfigError: The window shows nothing.
    """
    check_window(window)
    path = Path(path)
    source = read_source(path)
    with explained(path):
        identity = identity_of(source.header)

    @functools.cache
    def limits() -> tuple[float, float]:
        ends = [value_limits(source, number) for number in range(source.count)]
        return min(low for low, _ in ends), max(high for _, high in ends)

    def load(number: int) -> Frame:
        with explained(path):
            pixels = shown(source, number, window, limits)
            return Frame(pixels, source.geometry(number), identity, number if source.count > 1 else None)

    return Frames(path, source.size, range(source.count), numbered=source.count > 1, load=load)


def read_header(path: Path | str) -> Dataset:
    """Return the tags of a DICOM file of any kind, without its pixels.

    Raises:
        DataError: The file is missing, damaged or not DICOM.
    """
    with opened(Path(path)) as header:
        return header


def read_source(path: Path | str) -> Source:
    """Read an image file's header, from which its geometry is known and results that belong to it are made.

    Raises:
        DataError: As for :func:`read_frames`.
    """
    path = Path(path)
    with opened(path) as header:
        return checked(path, header)


def find_source(path: Path | str) -> Source | None:
    """Return :func:`read_source`, or ``None`` of a DICOM file that holds no image: a report, a mask, a directory.

    Raises:
        DataError: As for :func:`read_frames`.
    """
    path = Path(path)
    with opened(path) as header:
        if is_segmentation(header) or not any(header.get(name) for name in NEEDED):
            return None
        return checked(path, header)


def is_other_kind(path: Path | str) -> bool:
    """Return whether a DICOM file holds something else than an image, by its class: a report, a mask, a directory.

    One that is damaged or does not say its class may be an image.
    """
    path = Path(path)
    try:
        with opened(path) as header:
            kind = getattr(header, "file_meta", {}).get("MediaStorageSOPClassUID") or header.get("SOPClassUID")
            has_size = any(header.get(name) for name in NEEDED)
    except DataError:
        return False
    return bool(kind) and "Image Storage" not in str(kind.name) and (not has_size or kind == SEGMENTATION)


def is_dicom(path: Path | str) -> bool:
    """Return whether a file's name ends as DICOM files do, or its content begins as theirs (``DICM`` at byte 128)."""
    path = Path(path)
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False
