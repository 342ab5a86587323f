"""NIfTI volumes (.nii, .nii.gz) to upright slices and back.

A slice is shown as a radiologist sees it, whatever the order in which the file stores its voxels: axial slices with the
patient's front at the top and the patient's right at the left of the image, numbered from 0 at the feet. A volume of a
single coronal or sagittal slice has the head at the top, and the patient's right (coronal) or front (sagittal) at the
left.
"""

from __future__ import annotations

import functools
import gzip
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tmca.errors import DataError, StorageError
from tmca.files import write_bytes
from tmca.imaging.frames import (
    MAX_VOXELS,
    Frame,
    Frames,
    Geometry,
    Window,
    as_rgb,
    check_window,
    missing_package,
    robust_limits,
    shown_between,
    window_limits,
)
from tmca.imaging.mask_values import foreground
from tmca.imaging.raster import MAX_PIXELS, check_file, damaged, too_large

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Image

NIFTI_SUFFIXES = (".nii", ".nii.gz")
"""Endings of NIfTI files, lower case."""

MAX_VOLUME_BYTES = 4 * MAX_VOXELS
"""Largest volume that is read, in bytes as it is stored, without compression."""

_MILLIMETRES = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
_RIGHT, _FRONT, _HEAD = 0, 1, 2
_COLOURS = ("R", "G", "B")


def read_frames(path: Path | str, *, window: Window | None = None) -> Frames:
    """Read a volume's header; each slice is converted when it is asked for.

    Values are scaled by the header's slope and intercept and shown from the volume's 0.5th to its 99.5th percentile, so
    that slices compare; 8-bit values without a slope are taken as they are, and so are colours.

    Args:
        path: A ``.nii`` or ``.nii.gz`` file of a 3-D volume or a single slice.
        window: Centre and width of the values to show instead.

    Raises:
        DataError: The file is missing, damaged, too large, no image, has a fourth dimension or an affine that is
            singular; on access to a slice also: the voxels are cut off or undefined.
        ConfigError: The window shows nothing.
    """
    check_window(window)
    path = Path(path)
    grid = _read_grid(path)

    def load(number: int) -> Frame:
        volume = _cached_volume(path)
        geometry = grid.geometry(number)
        stored = volume.values[geometry.plane]
        return Frame(_shown(volume, geometry.to_upright(stored), window), geometry, number=number)

    return Frames(path, grid.geometry(0).size, range(grid.count), numbered=grid.count > 1, load=load)


def read_mask(path: Path | str, number: int) -> NDArray[np.bool_]:
    """Read one slice of a mask volume, upright as :func:`read_frames` gives the image's.

    What is foreground is decided for the whole volume, by the rules of :func:`tmca.imaging.raster.read_mask`.

    Args:
        path: A ``.nii`` or ``.nii.gz`` file.
        number: The slice, from 0 at the feet.

    Returns:
        ``(height, width)``, true at foreground.

    Raises:
        DataError: As for :func:`read_frames`, or the file holds grey values or several classes instead of a mask.
    """
    path = Path(path)
    geometry = _read_grid(path).geometry(number)
    marked = _cached_foreground(path, *_version(path))
    return geometry.to_upright(marked[geometry.plane])


def write_masks(path: Path | str, masks: Mapping[int, NDArray[np.bool_]], source: Path | str) -> None:
    """Write upright masks as a label volume (uint8, 0 and 1) on the grid of the volume they were drawn on, in one step.

    Shape, orientation, affine and units are the source's; slices without a mask are empty.

    Args:
        path: File ending in ``.nii`` or ``.nii.gz``.
        masks: Slice number → ``(height, width)``.
        source: The image's file.

    Raises:
        DataError: The source cannot be read, or a mask is of another size or for a slice that is not there.
        StorageError: The name has another ending, or the file could not be written.
    """
    _write_planes(path, masks, source, np.bool_)


def write_probabilities(
    path: Path | str, probabilities: Mapping[int, NDArray[np.floating[Any]]], source: Path | str
) -> None:
    """Write upright probability maps as a float32 volume on the grid of their image's. See :func:`write_masks`."""
    _write_planes(path, probabilities, source, np.float32)


def write_volume(
    path: Path | str, values: NDArray[np.bool_] | NDArray[np.float32], affine: NDArray[np.float64]
) -> None:
    """Write a mask (as uint8, 0 and 1) or a probability map as a volume, in one step.

    Args:
        path: File ending in ``.nii`` or ``.nii.gz``.
        values: Three axes.
        affine: Index → millimetres, RAS+.

    Raises:
        StorageError: The name has another ending, or the file could not be written.
    """
    import nibabel

    _require_suffix(path)
    image: Any = nibabel.Nifti1Image(_labels(values), affine)  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    if not np.allclose(image.get_qform(), affine, atol=1e-4):  # a qform cannot say that slices are shifted
        image.set_qform(None, code="unknown")
    _write(path, image)


def is_nifti(path: Path | str) -> bool:
    """Return whether a file's name ends as NIfTI files do."""
    return Path(path).name.lower().endswith(NIFTI_SUFFIXES)


def _write_planes(
    path: Path | str,
    planes: Mapping[int, NDArray[Any]],
    source: Path | str,
    dtype: type[np.bool_] | type[np.float32],
) -> None:
    _require_suffix(path)
    source = Path(source)
    grid = _read_grid(source)
    values = np.zeros(grid.shape, dtype=dtype)
    for number, plane in planes.items():
        geometry = grid.geometry(number)
        values[geometry.plane] = geometry.to_stored(np.asarray(plane, dtype=dtype))
    with _opened(source) as image:
        header: Any = image.header
        written: Any = type(image)(_labels(values).reshape(image.shape), image.affine)
        written.header.set_xyzt_units(*_units(header))
        written.set_sform(*header.get_sform(coded=True))
        written.set_qform(*header.get_qform(coded=True))
    _write(path, written)


def _labels(values: NDArray[Any]) -> NDArray[Any]:
    return values.astype(np.uint8) if values.dtype == np.bool_ else values


def _require_suffix(path: Path | str) -> None:
    if not is_nifti(path):
        raise StorageError(f"Cannot write {path}: a volume is NIfTI", hint="let the name end in .nii or .nii.gz")


def _write(path: Path | str, image: Any) -> None:  # noqa: ANN401
    content = image.to_bytes()
    # Level 6 as gzip's own program: level 9 takes many times as long on noise, and saves next to nothing.
    compressed = str(path).lower().endswith(".gz")
    write_bytes(path, gzip.compress(content, compresslevel=6, mtime=0) if compressed else content)


@dataclass(frozen=True)
class _Grid:
    """The voxels of a file as three axes, and which of them are rows, columns and slices.

    Attributes:
        path: The file.
        shape: Lengths of the stored axes; a 2-D image has a third of length 1.
        affine: Stored index → millimetres, RAS+.
        axes: Stored axes that become rows, columns and slices.
        flipped: Whether each of those three is counted against its stored order.
        measured: The file says how large its voxels are.
    """

    path: Path
    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    axes: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]
    measured: bool

    @property
    def count(self) -> int:
        """Number of slices."""
        return self.shape[self.axes[2]]

    def geometry(self, number: int) -> Geometry:
        """Return the geometry of a slice."""
        if not 0 <= number < self.count:
            raise DataError(
                f"{self.path} has no slice {number}", hint=f"its slices are 0 to {self.count - 1}, from the feet up"
            )
        rows, columns, slices = self.axes
        upright = np.zeros((4, 4))  # (row, column, slices onwards, 1) → stored index
        for column, (axis, flipped) in enumerate(zip(self.axes, self.flipped, strict=True)):
            upright[axis, column] = -1 if flipped else 1
            upright[axis, 3] = self.shape[axis] - 1 if flipped else 0
        index = self.count - 1 - number if self.flipped[2] else number
        upright[slices, 3] = index
        upright[3, 3] = 1
        affine = self.affine @ upright
        row_step, column_step, slice_step = (float(step) for step in np.linalg.norm(affine[:3, :3], axis=0))
        first, second = sorted((rows, columns))
        return Geometry(
            stored_size=(self.shape[first], self.shape[second]),
            transposed=rows > columns,
            flip_rows=self.flipped[0],
            flip_columns=self.flipped[1],
            slice_axis=slices,
            slice_index=index,
            spacing=(row_step, column_step) if self.measured else None,
            spacing_from="affine" if self.measured else "",
            slice_spacing=slice_step if self.measured else None,
            affine=tuple(tuple(float(value) for value in row) for row in affine) if self.measured else None,
        )


@dataclass(frozen=True)
class _Volume:
    """The voxels of a file.

    Attributes:
        values: As stored, on three axes, and a fourth for colours.
        slope: Stored value → value, with ``intercept``.
        intercept: See ``slope``.
        limits: Values that are shown as black and white; ``None`` where the stored bytes are shown as they are.
    """

    values: NDArray[Any]
    slope: float
    intercept: float
    limits: tuple[float, float] | None


def _shown(volume: _Volume, upright: NDArray[Any], window: Window | None) -> NDArray[np.uint8]:
    if upright.ndim == 3:
        return upright
    limits = volume.limits if window is None else window_limits(window)
    if limits is None:
        return as_rgb(upright)
    return as_rgb(shown_between(_scaled(upright, volume.slope, volume.intercept), *limits))


def _scaled(values: NDArray[Any], slope: float, intercept: float) -> NDArray[np.float64]:
    return values.astype(np.float64) * slope + intercept


@contextmanager
def _opened(path: Path) -> Iterator[Nifti1Image]:
    """Open a file's header; every way in which this or reading voxels in the block can fail becomes a DataError."""
    check_file(path)
    try:
        import nibabel
        from nibabel.filebasedimages import ImageFileError
    except ImportError as error:
        raise missing_package(path, "NIfTI", error) from error
    try:
        image = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Image):
            raise DataError(f"{path} is {type(image).__name__}, not NIfTI", hint="expected a .nii or .nii.gz file")
        yield image
    except (DataError, MemoryError):
        raise
    except ImageFileError as error:
        raise DataError(f"{path} is not a NIfTI image: {error}", hint="copy or download it again") from error
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise damaged(path, error) from error


def _units(header: Any) -> tuple[str, str]:  # noqa: ANN401
    """Return the units of space and time; a code that means nothing is no unit."""
    try:
        space, time = header.get_xyzt_units()
    except KeyError:
        return "unknown", "unknown"
    return space, time


def _read_grid(path: Path) -> _Grid:
    with _opened(path) as image:
        shape = _checked_shape(path, image)
        header: Any = image.header
        unit = _units(header)[0]
        scale = np.diag([*[_MILLIMETRES.get(unit, 1.0)] * 3, 1.0])
        affine = scale @ np.asarray(image.affine, dtype=np.float64)
        measured = unit != "unknown" or bool(header["qform_code"]) or bool(header["sform_code"])
        axes, flipped = _upright_axes(path, shape, affine)
    grid = _Grid(path, shape, affine, axes, flipped, measured)
    height, width = grid.geometry(0).size
    if height * width > MAX_PIXELS:
        raise too_large(path, f"{height} × {width}")
    return grid


def _checked_shape(path: Path, image: Nifti1Image) -> tuple[int, int, int]:
    """Return the lengths of a volume's axes; refuse by its header what is no volume, too large, or of no numbers."""
    stored = tuple(int(length) for length in image.shape)
    if 0 in stored or len(stored) < 2:
        raise DataError(f"{path} has shape {stored}, expected three dimensions", hint="is this an image?")
    further = [length for length in stored[3:] if length > 1]
    if further:
        raise DataError(
            f"{path} has shape {' × '.join(map(str, stored))}: more than three dimensions",
            hint="save one time point or channel as its own file, e.g. nibabel.load(path).slicer[..., 0]",
        )
    if np.prod(stored, dtype=np.float64) > MAX_VOXELS:
        raise DataError(
            f"{path} is too large: {' × '.join(map(str, stored))}; at most {MAX_VOXELS // 1_000_000} million voxels "
            "are read",
            hint="cut it into parts",
        )
    voxel = image.get_data_dtype()  # type: ignore[no-untyped-call]
    if voxel.names is None and voxel.kind not in "uif":
        raise DataError(f"{path} holds voxels of type {voxel}", hint="expected whole or real numbers, or RGB")
    size = math.prod(stored) * voxel.itemsize
    if size > MAX_VOLUME_BYTES:
        raise DataError(
            f"{path} is too large: {size // 1_000_000} MB of voxels; at most {MAX_VOLUME_BYTES // 1_000_000} MB are "
            "read",
            hint="save it in a smaller type of number, such as float32 or int16, or cut it into parts",
        )
    first, second, third = (*stored[:3], 1)[:3]
    return first, second, third


def _upright_axes(
    path: Path, shape: tuple[int, int, int], affine: NDArray[np.float64]
) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Return which stored axes are rows, columns and slices, and which are counted against their stored order."""
    import nibabel

    steps = affine[:3, :3] if np.isfinite(affine).all() else np.zeros((3, 3))
    lengths = np.linalg.norm(steps, axis=0)
    directions = steps / np.where(lengths > 0, lengths, 1)
    if abs(np.linalg.det(directions)) < 1e-6:
        raise DataError(
            f"{path} has an affine that is singular: its axes do not span space", hint="export the volume again"
        )
    orientation = nibabel.orientations.io_orientation(affine)  # type: ignore[no-untyped-call]
    towards = [int(axis) for axis in orientation[:, 0]]  # per stored axis: right, front or head
    grows = [bool(sign > 0) for sign in orientation[:, 1]]
    single = [axis for axis, length in enumerate(shape) if length == 1]
    slices = single[0] if len(single) == 1 else towards.index(_HEAD)
    if towards[slices] == _HEAD:
        row_direction, column_direction = _FRONT, _RIGHT
    else:
        row_direction, column_direction = _HEAD, _RIGHT if towards[slices] == _FRONT else _FRONT
    rows, columns = towards.index(row_direction), towards.index(column_direction)
    # Rows go to the back or the feet, columns to the left or the back: against RAS+. Slices go to the head: along it.
    return (rows, columns, slices), (grows[rows], grows[columns], not grows[slices])


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _cached_volume(path: Path) -> _Volume:
    check_file(path)
    return _read_volume(path, *_version(path))


@functools.lru_cache(maxsize=1)  # the slices of a volume are asked for one after the other
def _read_volume(path: Path, _modified: int, _bytes: int) -> _Volume:
    with _opened(path) as image:
        shape = _checked_shape(path, image)
        if path.name.lower().endswith(".gz"):
            with gzip.open(path) as stream:
                proxy: Any = type(image).from_stream(stream).dataobj
                values = np.asanyarray(proxy.get_unscaled())
                stream.read(1)  # the checksum is compared at the end of the file, where nibabel does not go
        else:
            proxy = image.dataobj
            values = np.asanyarray(proxy.get_unscaled())
        slope, intercept = float(proxy.slope), float(proxy.inter)
    if values.dtype.names is not None:  # RGB24 or RGBA32
        return _Volume(np.stack([values[name].reshape(shape) for name in _COLOURS], axis=-1), 1.0, 0.0, None)
    values = values.reshape(shape)
    if values.dtype.kind == "f":
        undefined = int(np.count_nonzero(~np.isfinite(values)))
        if undefined:
            raise DataError(
                f"{path} holds {undefined} of {values.size} voxels that are not finite numbers (NaN or infinite)",
                hint="replace them before, e.g. by numpy.nan_to_num",
            )
    if values.dtype == np.uint8 and (slope, intercept) == (1.0, 0.0):
        return _Volume(values, slope, intercept, None)
    low, high = sorted(limit * slope + intercept for limit in robust_limits(values))
    return _Volume(values, slope, intercept, (low, high))


@functools.lru_cache(maxsize=1)
def _cached_foreground(path: Path, _modified: int, _bytes: int) -> NDArray[np.bool_]:
    volume = _cached_volume(path)
    if volume.values.ndim == 4:
        return foreground(path, volume.values.max(axis=3), lossy=False)
    if (volume.slope, volume.intercept) == (1.0, 0.0):
        return foreground(path, volume.values, lossy=False)
    return foreground(path, _scaled(volume.values, volume.slope, volume.intercept), lossy=False)
