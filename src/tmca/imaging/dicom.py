"""DICOM images of one or several frames to arrays as a viewer shows them.

Rows and columns stay as they are stored: that is the order in which every viewer shows them, in which radiologists
describe them, and in which a DICOM SEG refers to them. Patient Position and Image Orientation therefore turn nothing;
they go into the geometry's affine.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tmca.errors import DataError
from tmca.imaging.encoded_sizes import is_longer_than, jpeg2000_sizes, jpeg_sizes
from tmca.imaging.frames import (
    Frame,
    Frames,
    Geometry,
    Identity,
    Window,
    as_rgb,
    check_window,
    missing_package,
    robust_limits,
    shown_between,
    window_limits,
)
from tmca.imaging.raster import MAX_PIXELS, check_file, damaged, too_large

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.tag import BaseTag

DICOM_SUFFIXES = (".dcm", ".dicom")
"""Usual endings of DICOM files, lower case; many have none and are known by their content."""

MAX_INFLATED_BYTES = 4 * MAX_PIXELS
"""Largest content of a file that is compressed as a whole (Deflated Explicit VR Little Endian)."""

_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_PALETTE = "PALETTE COLOR"
_NEEDED = ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored")
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
_PARAMETRIC_MAP = "1.2.840.10008.5.1.4.1.1.30"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_ITEM_BYTES = 8  # of what stands before each frame in a compressed file
_RLE = "1.2.840.10008.1.2.5"
_RLE_PADDING = 2  # programs pad rows and segments, never to twice their length
_JPEG_2000 = tuple(f"1.2.840.10008.1.2.4.{last}" for last in (90, 91, 92, 93, 201, 202, 203))
_MOST_SAMPLES = 4
_DECODERS = {  # the packages of tmca[medical] that decode what pydicom and Pillow cannot
    "1.2.840.10008.1.2.4.57": "python-gdcm",
    "1.2.840.10008.1.2.4.70": "python-gdcm",
    "1.2.840.10008.1.2.4.80": "python-gdcm",
    "1.2.840.10008.1.2.4.81": "python-gdcm",
    "1.2.840.10008.1.2.4.201": "pylibjpeg and pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.202": "pylibjpeg and pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg and pylibjpeg-openjpeg",
}
# Where an enhanced multi-frame file keeps what an older one keeps at its top.
_GROUPS = {
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "SpacingBetweenSlices": "PixelMeasuresSequence",
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "WindowCenter": "FrameVOILUTSequence",
    "WindowWidth": "FrameVOILUTSequence",
    "VOILUTFunction": "FrameVOILUTSequence",
}
_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])


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
    with _explained(path):
        identity = _identity(source.header)

    @functools.cache
    def limits() -> tuple[float, float]:
        ends = [_value_limits(source, number) for number in range(source.count)]
        return min(low for low, _ in ends), max(high for _, high in ends)

    def load(number: int) -> Frame:
        with _explained(path):
            stored = _decoded(source, number)
            if source.interpretation in _GREY:
                grey = _grey(source, number, stored, window, limits)
                pixels = as_rgb(255 - grey if source.interpretation == "MONOCHROME1" else grey)
            else:
                pixels = _rgb(source, stored)
            return Frame(pixels, source.geometry(number), identity, number if source.count > 1 else None)

    return Frames(path, source.size, range(source.count), numbered=source.count > 1, load=load)


def read_header(path: Path | str) -> Dataset:
    """Return the tags of a DICOM file of any kind, without its pixels.

    Raises:
        DataError: The file is missing, damaged or not DICOM.
    """
    with _opened(Path(path)) as header:
        return header


def read_source(path: Path | str) -> Source:
    """Read an image file's header, from which its geometry is known and results that belong to it are made.

    Raises:
        DataError: As for :func:`read_frames`.
    """
    path = Path(path)
    with _opened(path) as header:
        return _checked(path, header)


def find_source(path: Path | str) -> Source | None:
    """Return :func:`read_source`, or ``None`` of a DICOM file that holds no image: a report, a mask, a directory.

    Raises:
        DataError: As for :func:`read_frames`.
    """
    path = Path(path)
    with _opened(path) as header:
        if _is_segmentation(header) or not any(header.get(name) for name in _NEEDED):
            return None
        return _checked(path, header)


def is_other_kind(path: Path | str) -> bool:
    """Return whether a DICOM file holds something else than an image, by its class: a report, a mask, a directory.

    One that is damaged or does not say its class may be an image.
    """
    path = Path(path)
    try:
        with _opened(path) as header:
            kind = getattr(header, "file_meta", {}).get("MediaStorageSOPClassUID") or header.get("SOPClassUID")
            has_size = any(header.get(name) for name in _NEEDED)
    except DataError:
        return False
    return bool(kind) and "Image Storage" not in str(kind.name) and (not has_size or kind == _SEGMENTATION)


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


@dataclass(frozen=True)
class Source:
    """A file whose header holds what decoding needs.

    Attributes:
        path: The file.
        header: Its tags, without the pixels; kept out of ``repr`` and so out of logs.
        count: Number of its frames.
        size: Rows and columns.
        interpretation: Photometric Interpretation.
    """

    path: Path
    header: Dataset = field(repr=False)
    count: int
    size: tuple[int, int]
    interpretation: str

    @functools.cached_property
    def step(self) -> NDArray[np.float64] | None:
        """The way from a frame to the next in millimetres (RAS+) if all are equally far apart."""
        return _slice_step(self)

    def geometry(self, number: int = 0) -> Geometry:
        """Return how the upright array of a frame maps to the file and to the patient."""
        with _explained(self.path):
            return _geometry(self, number, self.step)

    def position(self, number: int = 0) -> NDArray[np.float64] | None:
        """Return the centre of a frame's first pixel in millimetres (RAS+); ``None`` where the file does not say."""
        with _explained(self.path):
            return _position(self, number)

    def directions(self, number: int = 0) -> NDArray[np.float64] | None:
        """Return the unit vectors (RAS+) along which rows and columns are counted, and their normal, as columns."""
        with _explained(self.path):
            return _directions(self, number)

    def tag(self, keyword: str, number: int = 0) -> Any:  # noqa: ANN401
        """Return a value for one frame: from its own functional groups, the shared ones, or the file's top."""
        with _explained(self.path):
            return _tag(self, number, keyword)

    @property
    def bits(self) -> int:
        """Number of bits of a stored value."""
        return int(self.header.BitsStored)

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The whole file; its frames are still compressed."""
        # Not by path: pydicom then follows neither deflated files nor those whose encoding is not what they say.
        import pydicom

        return pydicom.dcmread(self.path)


# Opening ---------------------------------------------------------------------------------------------------------


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn every way in which reading or decoding in the block can fail into a DataError."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except AttributeError as error:  # pydicom's word for a tag that is missing
        raise DataError(f"{path} lacks what an image needs: {error}", hint="export it again") from error
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise damaged(path, error) from error


@contextmanager
def _opened(path: Path) -> Iterator[Dataset]:
    """Read a file's header, without its pixels."""
    check_file(path)
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
    except ImportError as error:
        raise missing_package(path, "DICOM", error) from error
    with _explained(path):
        try:
            _refuse_inflation(path, pydicom.filereader.read_file_meta_info(path))
            header = pydicom.dcmread(path, stop_before_pixels=True)
        except InvalidDicomError as error:
            raise DataError(
                f"{path} is not a DICOM file: 'DICM' is not at byte 128", hint="copy or export it again"
            ) from error
        yield header


def _refuse_inflation(path: Path, meta: Dataset) -> None:
    """Refuse a file that is compressed as a whole if its content is over the limit, before it fills the memory."""
    from pydicom.filereader import read_dataset, read_preamble

    if meta.get("TransferSyntaxUID") != _DEFLATED:
        return
    with path.open("rb") as stream:
        read_preamble(stream, force=False)
        # Where the content begins is where pydicom stops to read tags, whatever the file says of their length.
        for group, implicit in ((0x0002, meta.original_encoding[0] is True), (0x0000, True)):
            read_dataset(stream, implicit, True, stop_when=functools.partial(_is_of_other_group, group))
        content = stream.read()
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflater.decompress(content, MAX_INFLATED_BYTES)
    if inflater.unconsumed_tail:
        raise too_large(path, f"over {MAX_INFLATED_BYTES // 1_000_000} MB when decompressed")


def _is_of_other_group(group: int, tag: BaseTag, _kind: str | None, _length: int) -> bool:
    return tag.group != group


def _checked(path: Path, header: Dataset) -> Source:
    """Refuse a file that is no image or that cannot be decoded here, before anything is decoded."""
    kind = _kind(header)
    if _is_segmentation(header):
        raise DataError(f"{path} holds a segmentation, not an image", hint="name the image that it was drawn on")
    if header.get("SOPClassUID") == _PARAMETRIC_MAP:
        raise DataError(
            f"{path} holds a parametric map, which is not supported", hint="name the image that it was computed from"
        )
    missing = [name for name in _NEEDED if header.get(name) in (None, "")]
    if len(missing) == len(_NEEDED):
        raise DataError(f"{path} holds no image{kind}", hint="expected a CR, DX, CT, MR, endoscopy … image")
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}{kind}", hint="export it again")
    rows, columns = int(header.Rows), int(header.Columns)
    count = int(header.get("NumberOfFrames") or 1)
    if rows < 1 or columns < 1 or count < 1:
        raise DataError(f"{path} says it has {count} frames of {rows} × {columns} pixels", hint="export it again")
    if rows * columns > MAX_PIXELS:
        raise too_large(path, f"{rows} × {columns}")
    interpretation = str(header.PhotometricInterpretation).strip()
    samples = 3 if interpretation in _COLOUR else 1
    known = (*_GREY, *_COLOUR, _PALETTE)
    if interpretation not in known or int(header.SamplesPerPixel) != samples:
        raise DataError(
            f"{path} has pixels of {header.SamplesPerPixel} values in {interpretation!r}",
            hint=f"known are {', '.join(known)}",
        )
    high, stored = header.get("HighBit"), int(header.BitsStored)
    if high is not None and int(high) != stored - 1:
        raise DataError(
            f"{path} stores its values up to bit {high}, expected bit {stored - 1} for values of {stored} bits",
            hint="convert it, e.g. by gdcmconv, or export it again",
        )
    _require_decoder(path, header)
    _require_bytes(path, header, count)
    return Source(path, header, count, (rows, columns), interpretation)


def _is_segmentation(header: Dataset) -> bool:
    return str(header.get("SOPClassUID", "")) == _SEGMENTATION


def _kind(header: Dataset) -> str:
    uid = header.get("SOPClassUID")
    return f" ({uid.name})" if uid else ""


def _require_decoder(path: Path, header: Dataset) -> None:
    from pydicom.pixels.decoders.base import get_decoder

    syntax = header.file_meta.get("TransferSyntaxUID")
    if not syntax:
        raise DataError(f"{path} does not say how it is compressed: no Transfer Syntax UID", hint="export it again")
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise DataError(
            f"{path} is compressed as {syntax.name} ({syntax}), which is not read",
            hint="convert it, e.g. by gdcmconv --raw; save the frames of a video as PNG, e.g. by ffmpeg",
        ) from error
    if not decoder.is_available:
        package = _DECODERS.get(str(syntax), "another decoder")
        raise DataError(
            f"{path} is compressed as {syntax.name} ({syntax}), for which no decoder is installed",
            hint=f"pip install 'tmca[medical]', which brings {package}",
        )


def _require_bytes(path: Path, header: Dataset, count: int) -> None:
    """Refuse more frames than the file has bytes for, before anything is made for each of them."""
    syntax = header.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        frame_bits = 8 * _ITEM_BYTES
    else:
        samples = 2 if header.PhotometricInterpretation == "YBR_FULL_422" else int(header.SamplesPerPixel)
        frame_bits = int(header.Rows) * int(header.Columns) * samples * int(header.BitsAllocated)
    size = MAX_INFLATED_BYTES if syntax == _DEFLATED else path.stat().st_size
    if count > 1 and count * frame_bits > 8 * size:
        raise DataError(
            f"{path} says it has {count} frames, more than its bytes can hold", hint="copy or export it again"
        )


# Pixels ----------------------------------------------------------------------------------------------------------


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
    centre, width = _first_number(view, "WindowCenter"), _first_number(view, "WindowWidth")
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
    slope, intercept = _first_number(view, "RescaleSlope"), _first_number(view, "RescaleIntercept")
    half = 2.0 ** (source.bits - 1)
    ends = (-half, half - 1) if source.header.get("PixelRepresentation") == 1 else (0.0, 2 * half - 1)
    if slope is None or intercept is None:
        return ends[0]
    return min(end * slope + intercept for end in ends)


def _value_limits(source: Source, number: int) -> tuple[float, float]:
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


def _rgb(source: Source, stored: NDArray[Any]) -> NDArray[np.uint8]:
    bits = source.bits
    if source.interpretation == _PALETTE:
        from pydicom.pixels.processing import apply_color_lut

        stored = apply_color_lut(stored, source.header)[:, :, :3]
        bits = 8 * stored.dtype.itemsize
    if stored.dtype == np.uint8 and bits == 8:
        return stored
    return shown_between(stored, 0.0, 2.0**bits - 1)


# Tags ------------------------------------------------------------------------------------------------------------


def _tag(source: Source, number: int, keyword: str) -> Any:  # noqa: ANN401
    """Return a value for one frame: from its own functional groups, the shared ones, or the file's top."""
    per_frame = source.header.get("PerFrameFunctionalGroupsSequence") or ()
    shared = source.header.get("SharedFunctionalGroupsSequence") or ()
    for groups in (*per_frame[number : number + 1], *shared[:1]):
        items = groups.get(_GROUPS.get(keyword, "")) or ()
        if items and items[0].get(keyword) is not None:
            return items[0][keyword].value
    return source.header.get(keyword)


def _view(source: Source, number: int) -> Dataset:
    """Return the tags that pydicom's transformations of values look for, for one frame."""
    from pydicom import Dataset

    view = Dataset()
    view.file_meta = source.header.file_meta
    for keyword in ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "VOILUTFunction"):
        value = _tag(source, number, keyword)
        if value is not None:
            setattr(view, keyword, value)
    for keyword in ("ModalityLUTSequence", "VOILUTSequence"):
        if source.header.get(keyword):
            view[keyword] = source.header[keyword]
    if _first_number(view, "RescaleSlope") == 1 and _first_number(view, "RescaleIntercept") == 0:
        del view.RescaleSlope, view.RescaleIntercept  # they change nothing, and would turn whole numbers into real ones
    return view


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:  # noqa: ANN401
    """Return the numbers of a tag, or ``None`` where there are not ``count`` finite ones."""
    if value is None or isinstance(value, str | float | int) or len(value) != count:
        return None
    numbers = tuple(float(number) for number in value)
    return numbers if np.isfinite(numbers).all() else None


def _first_number(dataset: Dataset, keyword: str) -> float | None:
    value = dataset.get(keyword)
    if value is None or value == "" or (not isinstance(value, float | int) and len(value) == 0):
        return None
    number = float(value if isinstance(value, float | int | str) else value[0])
    return number if np.isfinite(number) else None


def _identity(header: Dataset) -> Identity:
    def text(keyword: str) -> str:
        return str(header.get(keyword) or "")

    return Identity(
        patient_id=text("PatientID"),
        study_instance_uid=text("StudyInstanceUID"),
        series_instance_uid=text("SeriesInstanceUID"),
        sop_instance_uid=text("SOPInstanceUID"),
        sop_class_uid=text("SOPClassUID"),
        modality=text("Modality"),
    )


def _geometry(source: Source, number: int, step: NDArray[np.float64] | None) -> Geometry:
    spacing, spacing_from = _spacing(source, number)
    several = source.count > 1
    if step is not None:
        thickness: float | None = float(np.linalg.norm(step))
    elif several and _position(source, number) is not None:
        thickness = None  # frames with gaps, or at one place
    else:
        thickness = _thickness(source, number)
    return Geometry(
        stored_size=source.size,
        slice_axis=0 if several else None,
        slice_index=number if several else None,
        spacing=spacing,
        spacing_from=spacing_from,
        slice_spacing=thickness,
        affine=_affine(source, number, spacing, thickness, step),
    )


def _spacing(source: Source, number: int) -> tuple[tuple[float, float] | None, str]:
    for keyword in _SPACINGS:
        numbers = _numbers(_tag(source, number, keyword), 2)
        if numbers is not None and min(numbers) > 0:
            # PS3.3 10.7.1.3: equal to the spacing at the detector and not called calibrated, it is that.
            same = keyword == "PixelSpacing" and numbers == _numbers(_tag(source, number, "ImagerPixelSpacing"), 2)
            if same and not _tag(source, number, "PixelSpacingCalibrationType"):
                keyword = "ImagerPixelSpacing"
            return (numbers[0], numbers[1]), keyword
    return None, ""


def _thickness(source: Source, number: int) -> float | None:
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        value = _tag(source, number, keyword)
        if value is not None and value != "" and abs(float(value)) > 0:
            return abs(float(value))
    return None


def _directions(source: Source, number: int) -> NDArray[np.float64] | None:
    """Return the directions (RAS+) in which rows and columns are counted, and their normal, as a matrix's columns."""
    cosines = _numbers(_tag(source, number, "ImageOrientationPatient"), 6)
    if cosines is None:
        return None
    along_row, along_column = np.reshape(cosines, (2, 3)) * _LPS_TO_RAS
    normal = np.cross(along_row, along_column)
    if abs(np.linalg.norm(normal) - 1) > 0.01:  # not two unit vectors at a right angle
        return None
    return np.stack([along_column, along_row, normal], axis=1)


def _position(source: Source, number: int) -> NDArray[np.float64] | None:
    """Return the centre of the first stored pixel in millimetres (RAS+)."""
    if source.count > 1 and not source.header.get("PerFrameFunctionalGroupsSequence"):
        return None  # one position at the top cannot be that of all frames
    position = _numbers(_tag(source, number, "ImagePositionPatient"), 3)
    return None if position is None else np.array(position) * _LPS_TO_RAS


def _slice_step(source: Source) -> NDArray[np.float64] | None:
    """Return the way from a frame to the next in millimetres (RAS+) if all are equally far apart, else ``None``."""
    own = source.header.get("PerFrameFunctionalGroupsSequence") or ()
    if source.count < 2 or len(own) < source.count:
        return None
    positions = [_position(source, number) for number in range(source.count)]
    known = [position for position in positions if position is not None]
    if len(known) < source.count:
        return None
    steps = np.diff(known, axis=0)
    mean = steps.mean(axis=0)
    length = float(np.linalg.norm(mean))
    even = length > 0 and np.abs(steps - mean).max() <= 0.01 * length
    return mean if even else None


def _affine(
    source: Source,
    number: int,
    spacing: tuple[float, float] | None,
    thickness: float | None,
    step: NDArray[np.float64] | None,
) -> tuple[tuple[float, ...], ...] | None:
    directions, position = _directions(source, number), _position(source, number)
    if directions is None or position is None or spacing is None:
        return None
    affine = np.eye(4)
    affine[:3, 0] = directions[:, 0] * spacing[0]
    affine[:3, 1] = directions[:, 1] * spacing[1]
    affine[:3, 2] = directions[:, 2] * (thickness or 1.0) if step is None else step
    affine[:3, 3] = position
    return tuple(tuple(float(value) for value in row) for row in affine)
