"""How large what a mask marks is: in millimetres where the images know them, else only counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tmca.imaging.dicom.sources import SourceImage, SourceImages

MeasuredIn = Literal["patient", "detector", "film", ""]


@dataclass(frozen=True)
class Measurements:
    """Of one mask, or of the masks of all slices of a stack.

    Attributes:
        regions: Number of regions that do not touch, corners included; in a stack across slices.
        pixels: Number of marked pixels.
        area: mm², of a single image; ``None`` where the size of its pixels is unknown.
        area_in: Where the area holds: in the ``patient``, at the ``detector``, behind the patient, where the beam has
            widened, or on a scanned ``film``; empty where the area is unknown.
        volume: mm³, of a stack.
        mean_probability: Over the marked pixels; ``None`` where nothing is marked or no probability is known.
    """

    regions: int
    pixels: int
    area: float | None = None
    area_in: MeasuredIn = ""
    volume: float | None = None
    mean_probability: float | None = None


def measure(
    sources: SourceImages, masks: NDArray[np.bool_], probabilities: NDArray[np.floating[Any]] | None = None
) -> list[Measurements]:
    """Return what the masks of a result measure: one entry for an image or a stack, one a frame for a sequence.

    Args:
        sources: The images.
        masks: ``(images, rows, columns)`` in the order of the images.
        probabilities: The same of the probability maps.
    """
    if sources.layout == "stack":
        order = list(sources.order)
        pixels = int(np.count_nonzero(masks))
        volume = sources.voxel_volume
        return [
            Measurements(
                regions=_regions(masks[order]),
                pixels=pixels,
                volume=None if volume is None else pixels * volume,
                mean_probability=_mean(masks, probabilities),
            )
        ]
    return [
        _measure_image(image, masks[place], None if probabilities is None else probabilities[place])
        for place, image in enumerate(sources.images)
    ]


def in_words(measured: Sequence[Measurements]) -> str:
    """Return a line about measurements: how many regions, how large."""
    regions = sum(each.regions for each in measured)
    if not regions:
        return "no region found"
    words = "1 region" if regions == 1 else f"{regions} regions"
    if len(measured) > 1:
        return f"{words} in {sum(each.regions > 0 for each in measured)} of {len(measured)} frames"
    (only,) = measured
    if only.volume is not None:
        words += f", {only.volume / 1000:.3g} ml"
    if only.area is not None:
        words += f", {only.area / 100:.3g} square cm" + ("" if only.area_in == "patient" else f" at the {only.area_in}")
    return words


def _measure_image(
    image: SourceImage, mask: NDArray[np.bool_], probability: NDArray[np.floating[Any]] | None
) -> Measurements:
    pixels = int(np.count_nonzero(mask))
    area = image.geometry.pixel_area
    return Measurements(
        regions=_regions(mask),
        pixels=pixels,
        area=None if area is None else pixels * area,
        area_in="" if area is None else _measured_in(image),
        mean_probability=_mean(mask, probability),
    )


def _measured_in(image: SourceImage) -> MeasuredIn:
    named = image.geometry.spacing_from
    if named == "NominalScannedPixelSpacing":
        return "film"
    return "detector" if named == "ImagerPixelSpacing" else "patient"


def _regions(mask: NDArray[np.bool_]) -> int:
    _, count = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
    return int(count)


def _mean(mask: NDArray[np.bool_], probability: NDArray[np.floating[Any]] | None) -> float | None:
    if probability is None or not mask.any():
        return None
    return float(probability[mask].mean(dtype=np.float64))
