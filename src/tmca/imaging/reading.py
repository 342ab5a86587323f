"""The one entrance to image files of every kind: pictures, NIfTI volumes, DICOM images of one or several frames.

One image of a volume or sequence is named by the file, ``#`` and its number from 0: ``scan.nii.gz#12``.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tmca.errors import DataError
from tmca.imaging import dicom, nifti, raster
from tmca.imaging.frames import Frame, Frames, Geometry, Window

IMAGE_SUFFIXES = (*raster.IMAGE_SUFFIXES, *nifti.NIFTI_SUFFIXES, *dicom.DICOM_SUFFIXES)
"""Endings of the files that are looked at as images, lower case; DICOM files without one are found by their content."""

# EXIF orientation → transposed, rows flipped, columns flipped.
_TURNED = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


def read_frames(path: Path | str, *, window: Window | None = None) -> Frames:
    """Read what a file holds; each image is decoded when it is asked for.

    Args:
        path: A file of one of the :data:`IMAGE_SUFFIXES` or a DICOM file of any name, with or without ``#number``.
        window: Centre and width of the grey values to show, in the file's units; for NIfTI and DICOM. ``None`` takes
            the file's own window, or percentiles: see :func:`tmca.imaging.nifti.read_frames` and
            :func:`tmca.imaging.dicom.read_frames`.

    Returns:
        The images in order: slices from the feet up, frames as stored; only one of them if the path has a number.

    Raises:
        DataError: The file is missing, empty, damaged, too large or no image, lacks an optional package to read it, or
            has no image of that number.
        ConfigError: The window shows nothing.
    """
    file, number = split_frame(path)
    if nifti.is_nifti(file):
        frames = nifti.read_frames(file, window=window)
    elif _is_dicom(file):
        frames = dicom.read_frames(file, window=window)
    else:
        frames = Frames(file, raster.image_size(file), range(1), numbered=False, load=lambda _: _read_picture(file))
    return frames if number is None else frames.only(number)


def read_image(path: Path | str, frame: int | None = None, *, window: Window | None = None) -> NDArray[np.uint8]:
    """Read one image of a file as upright RGB.

    Args:
        path: As for :func:`read_frames`.
        frame: Number of the image in a volume or sequence, from 0, if the path does not end in one.
        window: As for :func:`read_frames`.

    Returns:
        ``(height, width, 3)``, values 0 to 255.

    Raises:
        DataError: As for :func:`read_frames`, or the file holds several images and none was chosen.
        ConfigError: The window shows nothing.
    """
    file, number = _chosen(path, frame)
    if number is None and _is_picture(file):  # without reading its header first: this is what training waits for
        return raster.read_image(file)
    return next(iter(read_frames(file, window=window).only(number))).pixels


def read_mask(path: Path | str, frame: int | None = None) -> NDArray[np.bool_]:
    """Read one mask of a picture file or NIfTI label volume as foreground.

    Args:
        path: As for :func:`read_frames`.
        frame: As for :func:`read_image`.

    Returns:
        ``(height, width)``, true at foreground, upright as :func:`read_image` gives the image.

    Raises:
        DataError: As for :func:`read_image`, or the file holds grey values or several classes instead of a mask, or is
            DICOM.
    """
    file, number = _chosen(path, frame)
    if number is None and _is_picture(file):
        return raster.read_mask(file)
    if nifti.is_nifti(file):
        return nifti.read_mask(file, read_frames(file).only(number).numbers[0])
    if _is_dicom(file):
        raise DataError(f"{file} is a DICOM file, expected a mask", hint="save the mask as PNG or NIfTI")
    read_frames(file).only(number)
    return raster.read_mask(file)


def image_size(path: Path | str, frame: int | None = None) -> tuple[int, int]:
    """Return height and width of an image as :func:`read_image` would return it, from the file's header only.

    Raises:
        DataError: As for :func:`read_image`.
    """
    file, number = _chosen(path, frame)
    return read_frames(file).only(number).size


def is_image(path: Path | str) -> bool:
    """Return whether a file found in a folder is looked at as an image.

    It is if its name ends in one of the :data:`IMAGE_SUFFIXES`, or in none or a number and its content is DICOM.
    """
    path = Path(path)
    if path.name.lower().endswith(IMAGE_SUFFIXES):
        return True
    return (path.suffix == "" or path.suffix[1:].isdigit()) and dicom.is_dicom(path)


def is_other_dicom(path: Path | str) -> bool:
    """Return whether a file is DICOM, but of another kind: a report, a mask, a directory."""
    path = Path(path)
    return _is_dicom(path) and not nifti.is_nifti(path) and dicom.is_other_kind(path)


def split_frame(path: Path | str) -> tuple[Path, int | None]:
    """Return the file and the number of ``scan.nii.gz#12``; ``None`` where a path has no number."""
    match = re.fullmatch(r"(.+)#([0-9]+)", str(path), re.DOTALL)
    return (Path(path), None) if match is None else (Path(match[1]), int(match[2]))


def join_frame(path: Path | str, number: int | None) -> Path:
    """Return the path of one image of a file: ``scan.nii.gz`` and 12 give ``scan.nii.gz#12``."""
    return Path(path) if number is None else Path(f"{path}#{number}")


def case_name(path: Path | str) -> str:
    """Return a name for what a path holds, without ending and ``#``: ``scans/scan.nii.gz#12`` gives ``scan_12``."""
    file, number = split_frame(path)
    name = file.name
    for suffix in sorted(IMAGE_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            name = name[: -len(suffix)]
            break
    return name if number is None else f"{name}_{number}"


def _chosen(path: Path | str, frame: int | None) -> tuple[Path, int | None]:
    file, number = split_frame(path)
    if frame is not None and number is not None and frame != number:
        raise DataError(f"{path} names image {number}, but number {frame} was asked for", hint="name one of them")
    return file, frame if number is None else number


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in raster.IMAGE_SUFFIXES


def _is_dicom(path: Path) -> bool:
    return not _is_picture(path) and dicom.is_dicom(path)


def _read_picture(path: Path) -> Frame:
    pixels = raster.read_image(path)
    transposed, flip_rows, flip_columns = _TURNED[raster.stored_orientation(path)]
    height, width = pixels.shape[:2]
    stored_size = (width, height) if transposed else (height, width)
    return Frame(pixels, Geometry(stored_size, transposed, flip_rows, flip_columns))
