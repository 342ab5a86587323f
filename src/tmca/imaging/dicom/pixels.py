"""Decodes a frame of a DICOM image and turns its stored values into what a display shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tmca.errors import DataError
from tmca.imaging.dicom.encoded_sizes import is_longer_than, jpeg2000_sizes, jpeg_sizes
from tmca.imaging.dicom.opening import GREY, PALETTE
from tmca.imaging.dicom.tags import Source, first_number
from tmca.imaging.frames import Window, as_rgb, robust_limits, shown_between, window_limits

if TYPE_CHECKING:
    from pydicom import Dataset

_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_RLE = "1.2.840.10008.1.2.5"
_RLE_PADDING = 2  # programs pad rows and segments, never to twice their length
_JPEG_2000 = tuple(f"1.2.840.10008.1.2.4.{last}" for last in (90, 91, 92, 93, 201, 202, 203))
_MOST_SAMPLES = 4


def shown(
    source: Source, number: int, window: Window | None, limits: Callable[[], tuple[float, float]]
) -> NDArray[np.uint8]:
    """Return what a display shows of a frame, uint8 ``(height, width, 3)``.

    Args:
        source: The file.
        number: Of the frame.
        window: Centre and width of the grey values to show instead of the file's choice.
        limits: Asked for the values that are black and white where neither the file nor the caller says.
    """
    stored = _decoded(source, number)
    if source.interpretation not in GREY:
        return _rgb(source, stored)
    grey = _grey(source, number, stored, window, limits)
    return as_rgb(255 - grey if source.interpretation == "MONOCHROME1" else grey)


def value_limits(source: Source, number: int) -> tuple[float, float]:
    """Return the robust limits of a frame's values after the modality transformation, without its padding."""
    stored = _decoded(source, number)
    values = _modality_values(source, _view(source, number), stored)
    padding = source.header.get("PixelPaddingValue")
    if padding is not None:
        ends = sorted((int(padding), int(source.header.get("PixelPaddingRangeLimit", padding))))
        inside = (stored < ends[0]) | (stored > ends[1])
        if inside.any():
            values = values[inside]
    return robust_limits(values)


def _decoded(source: Source, number: int) -> NDArray[Any]:
    from pydicom.pixels.utils import pixel_array

    if not any(keyword in source.dataset for keyword in _PIXELS):
        raise DataError(f"{source.path} holds no pixels, or is cut off", hint="copy or export it again")
    _refuse_another_size(source, number)
    try:
        return pixel_array(source.dataset, index=number)
    except RuntimeError as error:  # every decoder that is installed failed
        syntax = source.header.file_meta.TransferSyntaxUID
        reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:]) or str(error)
        raise DataError(
            f"{source.path}: frame {number} cannot be decoded as {syntax.name} ({reasons})",
            hint="if it is not damaged, convert it, e.g. by dcmdjpeg, or install one more decoder, e.g. "
            "pylibjpeg-libjpeg (GPL)",
        ) from error


def _refuse_another_size(source: Source, number: int) -> None:
    """Refuse a compressed frame that is larger or smaller than the header says, before it is decoded."""
    from pydicom.encaps import get_frame

    dataset: Any = source.dataset
    syntax = source.header.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated or "PixelData" not in dataset:
        return
    offsets = None
    if "ExtendedOffsetTable" in dataset and "ExtendedOffsetTableLengths" in dataset:
        tables = (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)
        offsets = tables if len(tables[0]) == len(tables[1]) else None  # as pydicom does
    encoded = get_frame(dataset.PixelData, number, number_of_frames=source.count, extended_offsets=offsets)
    rows, columns = source.size
    if syntax == _RLE:
        if is_longer_than(encoded, _RLE_PADDING * rows * columns + 128):
            raise DataError(
                f"{source.path} is damaged: frame {number} holds far more pixels than {rows} × {columns}, which its "
                "header says",
                hint="copy or export it again",
            )
        return
    sizes = jpeg2000_sizes(encoded) if syntax in _JPEG_2000 else jpeg_sizes(encoded)
    wrong = [size for size in sizes if size[:2] != source.size or size[2] > _MOST_SAMPLES]
    if wrong or not sizes:
        found = f"is encoded as {' × '.join(map(str, wrong[0]))}" if wrong else "does not say its size"
        raise DataError(
            f"{source.path} is damaged: frame {number} {found}, expected {rows} × {columns} pixels as its header says",
            hint="copy or export it again",
        )


def _modality_values(source: Source, view: Dataset, stored: NDArray[Any]) -> NDArray[Any]:
    from pydicom.pixels.processing import apply_modality_lut

    with np.errstate(over="ignore"):
        values = apply_modality_lut(stored, view)
    undefined = int(np.count_nonzero(~np.isfinite(values))) if values.dtype.kind == "f" else 0
    if undefined:
        raise DataError(f"{source.path} holds {undefined} pixels that are not finite numbers", hint="export it again")
    return values


def _grey(
    source: Source,
    number: int,
    stored: NDArray[Any],
    window: Window | None,
    limits: Callable[[], tuple[float, float]],
) -> NDArray[np.uint8]:
    """Return what a display shows of stored grey values; 255 is what has the largest value."""
    view = _view(source, number)
    values = _modality_values(source, view, stored)
    if window is not None:
        return shown_between(values, *window_limits(window))
    if view.get("VOILUTSequence"):
        return _looked_up(source, view, values)
    centre, width = first_number(view, "WindowCenter"), first_number(view, "WindowWidth")
    if centre is not None and width is not None and width > 1:  # narrower ones are placeholders
        function = str(view.get("VOILUTFunction") or "LINEAR")
        if function == "SIGMOID":
            # 1 / (1 + exp(−4x)), written so that it cannot overflow.
            return np.asarray(np.rint(127.5 * (1 + np.tanh(2 * (values - centre) / width))), dtype=np.uint8)
        # PS3.3 C.11.2.1.2: LINEAR counts the window in whole values, LINEAR_EXACT in real ones.
        return shown_between(
            values, *window_limits((centre, width) if function == "LINEAR_EXACT" else (centre - 0.5, width - 1))
        )
    if values.dtype.kind == "u" and source.bits <= 8:
        return shown_between(values, 0.0, 2.0**source.bits - 1)
    return shown_between(values, *limits())


def _looked_up(source: Source, view: Dataset, values: NDArray[Any]) -> NDArray[np.uint8]:
    from pydicom.pixels.processing import apply_voi

    entries, read, bits = (int(number) for number in view.VOILUTSequence[0].LUTDescriptor)
    first = read
    if source.header.original_encoding[0]:  # implicit VR: the file does not say whether the number has a sign
        first %= 2**16
        if first >= 2**15 and _lowest_value(source, view) < 0:
            first -= 2**16
    places = np.clip(np.rint(values) - first, 0, (entries or 2**16) - 1).astype(np.int32)
    return shown_between(apply_voi(places + read, view), 0.0, 2.0**bits - 1)


def _lowest_value(source: Source, view: Dataset) -> float:
    """Return the lowest value that a pixel of the file can have after the modality transformation."""
    if view.get("ModalityLUTSequence"):
        return 0.0
    slope, intercept = first_number(view, "RescaleSlope"), first_number(view, "RescaleIntercept")
    half = 2.0 ** (source.bits - 1)
    ends = (-half, half - 1) if source.header.get("PixelRepresentation") == 1 else (0.0, 2 * half - 1)
    if slope is None or intercept is None:
        return ends[0]
    return min(end * slope + intercept for end in ends)


def _rgb(source: Source, stored: NDArray[Any]) -> NDArray[np.uint8]:
    bits = source.bits
    if source.interpretation == PALETTE:
        from pydicom.pixels.processing import apply_color_lut

        stored = apply_color_lut(stored, source.header)[:, :, :3]
        bits = 8 * stored.dtype.itemsize
    if stored.dtype == np.uint8 and bits == 8:
        return stored
    return shown_between(stored, 0.0, 2.0**bits - 1)


def _view(source: Source, number: int) -> Dataset:
    """Return the tags that pydicom's transformations of values look for, for one frame."""
    from pydicom import Dataset

    view = Dataset()
    view.file_meta = source.header.file_meta
    for keyword in ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "VOILUTFunction"):
        value = source.tag(keyword, number)
        if value is not None:
            setattr(view, keyword, value)
    for keyword in ("ModalityLUTSequence", "VOILUTSequence"):
        if source.header.get(keyword):
            view[keyword] = source.header[keyword]
    if first_number(view, "RescaleSlope") == 1 and first_number(view, "RescaleIntercept") == 0:
        del view.RescaleSlope, view.RescaleIntercept  # they change nothing, and would turn whole numbers into real ones
    return view
