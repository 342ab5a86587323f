"""What every kind of image file is read into: upright pixels, how they map to the stored ones, and whose they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tmca.errors import ConfigError, DataError

Value = TypeVar("Value", bound=np.generic)
Window = tuple[float, float]
"""Centre and width of the grey values that are shown, in the file's units (Hounsfield units for CT)."""

MAX_VOXELS = 500_000_000
"""Largest volume that is read, all slices together: 1,900 slices of 512 × 512."""

PERCENTILES = (0.5, 99.5)
"""Shares of the values, in percent, that become black and white where nothing says which do."""


@dataclass(frozen=True)
class Identity:
    """Whom and what a file says it shows; empty strings where it does not.

    Attributes:
        patient_id: DICOM Patient ID; kept out of ``repr`` and so out of logs.
        study_instance_uid: Of the examination.
        series_instance_uid: Of the series.
        sop_instance_uid: Of this file.
        sop_class_uid: Kind of DICOM object.
        modality: DICOM code: ``CT``, ``CR``, ``DX``, ``ES`` …
    """

    patient_id: str = field(default="", repr=False)
    study_instance_uid: str = ""
    series_instance_uid: str = ""
    sop_instance_uid: str = ""
    sop_class_uid: str = ""
    modality: str = ""


@dataclass(frozen=True)
class Geometry:
    """How an upright array maps to the pixels the file stores, and to millimetres where the file knows them.

    The upright array is the stored plane, first transposed, then flipped.

    Attributes:
        stored_size: Lengths of the stored plane's two axes, in stored order.
        transposed: The rows of the upright array run along the second stored axis.
        flip_rows: The upright array's first row is stored last.
        flip_columns: The upright array's first column is stored last.
        slice_axis: Axis of the stored volume across which slices or frames are counted; ``None`` for a single plane.
        slice_index: Place of this plane on that axis.
        spacing: Millimetres between neighbouring rows and between neighbouring columns of the upright array.
        spacing_from: Where the spacing was found: ``affine``, ``PixelSpacing``, ``ImagerPixelSpacing`` (measured at
            the detector, larger than in the patient; also where ``PixelSpacing`` repeats it uncalibrated) or
            ``NominalScannedPixelSpacing``; empty where unknown.
        slice_spacing: Millimetres between neighbouring slices, or the slice's thickness.
        affine: 4×4 in rows: from (row, column, slices onwards, 1) of the upright array to millimetres towards the
            patient's right, front and head (RAS+, as in NIfTI).
    """

    stored_size: tuple[int, int]
    transposed: bool = False
    flip_rows: bool = False
    flip_columns: bool = False
    slice_axis: int | None = None
    slice_index: int | None = None
    spacing: tuple[float, float] | None = None
    spacing_from: str = ""
    slice_spacing: float | None = None
    affine: tuple[tuple[float, ...], ...] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the upright array."""
        first, second = self.stored_size
        return (second, first) if self.transposed else (first, second)

    @property
    def plane(self) -> tuple[int | slice, ...]:
        """Index of this plane in the stored array: ``volume[geometry.plane] = geometry.to_stored(mask)``."""
        if self.slice_axis is None or self.slice_index is None:
            return (slice(None), slice(None))
        index: list[int | slice] = [slice(None)] * 3
        index[self.slice_axis] = self.slice_index
        return tuple(index)

    @property
    def pixel_area(self) -> float | None:
        """Area of a pixel in mm², or ``None`` where the spacing is unknown."""
        if self.affine is not None:
            row_step, column_step = np.array(self.affine)[:3, :2].T
            return float(np.linalg.norm(np.cross(row_step, column_step)))
        return None if self.spacing is None else self.spacing[0] * self.spacing[1]

    @property
    def voxel_volume(self) -> float | None:
        """Volume of a voxel in mm³, or ``None`` where the spacing is unknown; of slices that are sheared as well."""
        if self.pixel_area is None or self.slice_spacing is None:
            return None
        if self.affine is not None:
            return abs(float(np.linalg.det(np.array(self.affine)[:3, :3])))
        return self.pixel_area * self.slice_spacing

    def to_stored(self, upright: NDArray[Value]) -> NDArray[Value]:
        """Return an upright mask or image ``(height, width, …)`` in the order in which the file stores its pixels.

        Raises:
            DataError: It is not of this geometry's size.
        """
        if upright.shape[:2] != self.size:
            raise DataError(
                f"The array is {upright.shape[0]} × {upright.shape[1]}, expected {self.size[0]} × {self.size[1]}",
                hint="resize it to the image it belongs to",
            )
        flipped = upright[self._flips]
        return np.ascontiguousarray(np.swapaxes(flipped, 0, 1) if self.transposed else flipped)

    def to_upright(self, stored: NDArray[Value]) -> NDArray[Value]:
        """Return a stored plane ``(first axis, second axis, …)`` upright; the inverse of :meth:`to_stored`."""
        turned = np.swapaxes(stored, 0, 1) if self.transposed else stored
        return np.ascontiguousarray(turned[self._flips])

    @property
    def _flips(self) -> tuple[slice, slice]:
        return slice(None, None, -1 if self.flip_rows else 1), slice(None, None, -1 if self.flip_columns else 1)


@dataclass(frozen=True, eq=False)
class Frame:
    """One image of a file.

    Attributes:
        pixels: uint8 ``(height, width, 3)``, upright.
        geometry: How the array maps to the file.
        identity: Whose it is.
        number: Which of the file's frames, from 0; ``None`` where the file holds a single image.
    """

    pixels: NDArray[np.uint8] = field(repr=False)
    geometry: Geometry
    identity: Identity = Identity()
    number: int | None = None


@dataclass(frozen=True)
class Frames:
    """The images of a file in order, each decoded when it is asked for.

    Attributes:
        path: The file.
        size: Height and width of each.
        numbers: Which of the file's frames these are, from 0.
        numbered: The file is a volume or a sequence, so that one of its images needs a number to be named.
        load: Decodes the frame of a number.
    """

    path: Path
    size: tuple[int, int]
    numbers: range
    numbered: bool
    load: Callable[[int], Frame] = field(repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Frame]:
        return map(self.load, self.numbers)

    def __getitem__(self, number: int) -> Frame:
        return self.load(self._checked(number))

    def only(self, number: int | None) -> Frames:
        """Return one frame.

        Args:
            number: Which, from 0; ``None`` is enough where there is only one.

        Raises:
            DataError: There is no such frame, or there are several and no number was given.
        """
        if number is None:
            if len(self) != 1:
                raise DataError(
                    f"{self.path} holds {len(self)} images, expected one",
                    hint=f"name one of them: {self.path.name}#0 to {self.path.name}#{self.numbers[-1]}",
                )
            number = self.numbers[0]
        number = self._checked(number)
        return Frames(self.path, self.size, range(number, number + 1), self.numbered, self.load)

    def _checked(self, number: int) -> int:
        if number not in self.numbers:
            last = self.numbers[-1]
            raise DataError(
                f"{self.path} has no image number {number}",
                hint=f"it holds numbers {self.numbers[0]} to {last}" if len(self) > 1 else f"it holds number {last}",
            )
        return number


def check_window(window: Window | None) -> None:
    """Refuse a window that shows nothing.

    Raises:
        ConfigError: Its width is not positive, or a number is not finite.
    """
    if window is not None and not (np.isfinite(window).all() and window[1] > 0):
        raise ConfigError(
            f"The window is {window[0]:g},{window[1]:g}, expected a centre and a width above 0",
            hint="-600,1500 shows lungs in CT, 40,400 soft tissue",
        )


def window_limits(window: Window) -> tuple[float, float]:
    """Return the values that a window shows as black and as white."""
    centre, width = window
    return centre - width / 2, centre + width / 2


def robust_limits(values: NDArray[Any]) -> tuple[float, float]:
    """Return the :data:`PERCENTILES` of values; their minimum and maximum where nearly all of them are equal."""
    low, high = np.percentile(values, PERCENTILES)
    return (float(low), float(high)) if low < high else (float(values.min()), float(values.max()))


def shown_between(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Return values scaled linearly from ``low``–``high`` to 0–255 and clipped; 0 where the two are equal."""
    if not low < high:
        return np.zeros(values.shape, dtype=np.uint8)
    # Halves: the difference cannot overflow.
    shares = (values.astype(np.float64) / 2 - low / 2) / (high / 2 - low / 2)
    return np.asarray(np.rint(np.clip(shares, 0, 1) * 255), dtype=np.uint8)


def as_rgb(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a grey image ``(height, width)`` as three equal channels."""
    return np.repeat(grey[:, :, None], 3, axis=2)


def missing_package(path: Path, kind: str, error: ImportError) -> DataError:
    """Return the error for a file whose reader is an optional package that is not installed."""
    return DataError(f"Cannot read {path}: {kind} files need {error.name}", hint="pip install 'tmca[medical]'")
