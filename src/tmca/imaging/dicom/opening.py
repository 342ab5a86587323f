"""Opens a DICOM file, and refuses before anything is decoded what is no image or cannot be read here."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tmca.errors import DataError
from tmca.imaging.dicom.tags import Source, explained
from tmca.imaging.frames import missing_package
from tmca.imaging.raster import MAX_PIXELS, check_file, too_large

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.tag import BaseTag

MAX_INFLATED_BYTES = 4 * MAX_PIXELS
"""Largest content of a file that is compressed as a whole (Deflated Explicit VR Little Endian)."""

GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
PALETTE = "PALETTE COLOR"
NEEDED = ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored")
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
_PARAMETRIC_MAP = "1.2.840.10008.5.1.4.1.1.30"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_ITEM_BYTES = 8  # of what stands before each frame in a compressed file
_DECODERS = {  # the packages of tmca[medical] that decode what pydicom and Pillow cannot
    "1.2.840.10008.1.2.4.57": "python-gdcm",
    "1.2.840.10008.1.2.4.70": "python-gdcm",
    "1.2.840.10008.1.2.4.80": "python-gdcm",
    "1.2.840.10008.1.2.4.81": "python-gdcm",
    "1.2.840.10008.1.2.4.201": "pylibjpeg and pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.202": "pylibjpeg and pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg and pylibjpeg-openjpeg",
}


@contextmanager
def opened(path: Path) -> Iterator[Dataset]:
    """Read a file's header, without its pixels."""
    check_file(path)
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
    except ImportError as error:
        raise missing_package(path, "DICOM", error) from error
    with explained(path):
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


def checked(path: Path, header: Dataset) -> Source:
    """Refuse a file that is no image or that cannot be decoded here, before anything is decoded."""
    kind = _kind(header)
    if is_segmentation(header):
        raise DataError(f"{path} holds a segmentation, not an image", hint="name the image that it was drawn on")
    if header.get("SOPClassUID") == _PARAMETRIC_MAP:
        raise DataError(
            f"{path} holds a parametric map, which is not supported", hint="name the image that it was computed from"
        )
    missing = [name for name in NEEDED if header.get(name) in (None, "")]
    if len(missing) == len(NEEDED):
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
    known = (*GREY, *_COLOUR, PALETTE)
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


def is_segmentation(header: Dataset) -> bool:
    """Return whether a file's class is that of masks."""
    return str(header.get("SOPClassUID", "")) == SEGMENTATION


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
