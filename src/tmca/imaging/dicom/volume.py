"""Masks and probability maps of DICOM images as NIfTI volumes, which lie where the images lie in the patient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmca.errors import DataError
from tmca.imaging import nifti
from tmca.imaging.dicom.segmentation import check_mask, check_probability
from tmca.imaging.dicom.sources import SourceImages, read_sources


def write_masks(path: Path | str, sources: Sequence[Path | str], masks: Sequence[NDArray[np.bool_]]) -> None:
    """Write the masks of DICOM images as a NIfTI label volume (uint8, 0 and 1), in one step.

    The axes are columns, rows and slices as the images store them, the slices towards the head, the front or the right,
    so that it fits the volume that common converters make of the same images.

    Args:
        path: File ending in ``.nii`` or ``.nii.gz``.
        sources: The images, as :func:`tmca.imaging.dicom.sources.read_sources` takes them.
        masks: ``(height, width)``, upright, one an image.

    Raises:
        DataError: The images do not go together or have no place in the patient, or a mask is of another size.
        StorageError: The name has another ending, or the file could not be written.
    """
    found = read_sources(sources)
    _write(path, found, found.stored([check_mask(mask) for mask in masks], "masks"))


def write_probabilities(
    path: Path | str, sources: Sequence[Path | str], probabilities: Sequence[NDArray[np.floating[Any]]]
) -> None:
    """Write the probability maps of DICOM images as a float32 NIfTI volume. See :func:`write_masks`.

    Raises:
        DataError: As there, or a value is outside [0, 1] or not a number.
        StorageError: As there.
    """
    found = read_sources(sources)
    _write(path, found, found.stored([check_probability(each) for each in probabilities], "probability maps"))


def _write(path: Path | str, sources: SourceImages, stored: NDArray[Any]) -> None:
    bottom = sources.images[sources.order[0]].geometry.affine
    if bottom is None or sources.layout == "sequence":
        raise DataError(
            f"{sources.path} does not say where in the patient it lies, which a NIfTI volume would claim to know",
            hint="write the mask as PNG, JSON or DICOM",
        )
    affine = np.array(bottom)[:, [1, 0, 2, 3]]
    if sources.step is not None:
        affine[:3, 2] = sources.step
    nifti.write_volume(path, stored[list(sources.order)].transpose(2, 1, 0), affine)
