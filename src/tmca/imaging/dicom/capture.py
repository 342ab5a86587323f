"""DICOM secondary capture: the image as it is shown, with outlines, for viewers that do not show a DICOM SEG of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from tmca.imaging.dicom import read_frames
from tmca.imaging.dicom.results import (
    INTENDED_USE,
    ResultContext,
    building,
    finish,
    mismatch,
    plain_file,
    write_checked,
)
from tmca.imaging.dicom.segmentation import check_mask
from tmca.imaging.dicom.sources import SourceImages, add_series_reference, file_reference, read_sources
from tmca.imaging.frames import Window
from tmca.imaging.measurements import in_words, measure
from tmca.imaging.overlay import PREDICTION_COLOUR, wrapped

if TYPE_CHECKING:
    from pydicom import Dataset

LINE_SHARE = 1 / 250
"""Thickness of an outline, as a share of the image's shorter side."""
LETTER_SHARE = 0.032
"""Height of the letters, as a share of the image's width."""
_THINNEST = 2
_SMALLEST_LETTERS = 13
_INK = (235, 235, 235)
_SINGLE = "1.2.840.10008.5.1.4.1.1.7"
_SEVERAL = "1.2.840.10008.5.1.4.1.1.7.4"


def write_capture(
    path: Path | str,
    sources: Sequence[Path | str],
    masks: Sequence[NDArray[np.bool_]],
    context: ResultContext,
    *,
    window: Window | None = None,
) -> str:
    """Write the images with outlined masks as an RGB secondary capture, in one step; it is read back and compared.

    The outline lies around the region, so that nothing of it is covered; target, measurements, model and intended use
    stand in a band under the image. Several images become a file of several frames, a stack from the feet up.

    Args:
        path: File to write or replace.
        sources: The images, as for :func:`tmca.imaging.dicom.segmentation.write_segmentation`.
        masks: ``(height, width)``, upright, one an image.
        context: What the file says about itself.
        window: Centre and width of the grey values to show, as for :func:`tmca.imaging.dicom.read_frames`.

    Returns:
        SOP Instance UID of the file.

    Raises:
        DataError: The images do not go together, lack a UID, cannot be decoded, or an array has another size; or the
            file read back differs.
        StorageError: The file could not be written.
    """
    found = read_sources(sources)
    upright = [check_mask(mask) for mask in masks]
    lines = _lines(in_words(measure(found, found.stored(upright, "masks"))), context)
    files = {image.source.path: read_frames(image.source.path, window=window) for image in found.images}
    pictures = np.stack(
        [
            draw_capture(files[found.images[place].source.path][found.images[place].number or 0].pixels, mask, lines)
            for place, mask in ((place, upright[place]) for place in found.order)
        ]
    )
    with building(found):
        result = _build(found, pictures, context)

    def compare(written: Dataset) -> None:
        if not np.array_equal(written.pixel_array.reshape(pictures.shape), pictures):
            raise mismatch("pixels of the picture")

    write_checked(path, result, found.header, compare)
    return str(result.SOPInstanceUID)


def draw_capture(image: NDArray[np.uint8], mask: NDArray[np.bool_], lines: Sequence[str]) -> NDArray[np.uint8]:
    """Return an image with a mask outlined in yellow, dark outside, above a black band with lines of text.

    Args:
        image: uint8 ``(height, width, 3)``; its pixels stay where they are.
        mask: bool ``(height, width)``.
        lines: Text, the first in yellow; long lines are wrapped.

    Returns:
        uint8 ``(height + band, width, 3)``.
    """
    drawn = image.copy()
    thickness = max(_THINNEST, round(min(mask.shape) * LINE_SHARE))
    line = ndimage.binary_dilation(mask, iterations=thickness) & ~mask if mask.any() else mask
    edge = ndimage.binary_dilation(line, iterations=max(1, thickness // 2)) & ~mask if mask.any() else mask
    drawn[edge] = 0
    drawn[line] = PREDICTION_COLOUR
    height, width = mask.shape
    size = max(_SMALLEST_LETTERS, round(LETTER_SHARE * width))
    font = ImageFont.load_default(size=size)
    margin = size // 2
    rows = [
        (row, PREDICTION_COLOUR if text == lines[0] else _INK)
        for text in lines
        for row in wrapped(text, font, width - 2 * margin)
    ]
    step = round(1.35 * size)
    picture = Image.new("RGB", (width, height + step * len(rows) + 2 * margin))
    picture.paste(Image.fromarray(drawn), (0, 0))
    pen = ImageDraw.Draw(picture)
    for place, (row, ink) in enumerate(rows):
        pen.text((margin, height + margin + place * step), row, ink, font)
    return np.asarray(picture)


def _lines(measured: str, context: ResultContext) -> list[str]:
    """Return what stands under the image. Never the sentence: it may hold patient data."""
    return [
        f"{context.coded_target.label}: {measured}",
        INTENDED_USE,
        f"Drawn by a program: {context.model_name} {context.model_version}",
    ]


def _build(sources: SourceImages, pictures: NDArray[np.uint8], context: ResultContext) -> Dataset:
    from pydicom import Dataset

    header = sources.header
    count, rows, columns, _ = pictures.shape
    result = Dataset()
    instance = context.instance_uid(sources, "capture", pictures.tobytes())
    plain_file(result, _SINGLE if count == 1 else _SEVERAL, instance)
    values: dict[str, Any] = {
        "ImageType": ["DERIVED", "SECONDARY"],
        "Modality": "OT",
        "ConversionType": "WSD",
        "SeriesInstanceUID": context.series_uid(sources, "capture"),
        "Laterality": header.get("Laterality") or "",
        "PatientOrientation": header.get("PatientOrientation") or "",
        "DateOfSecondaryCapture": context.time.strftime("%Y%m%d"),
        "TimeOfSecondaryCapture": context.time.strftime("%H%M%S"),
        "ImageComments": context.description,
        "DerivationDescription": "Image as shown, segmentation outlined, text added below",
        "SourceImageSequence": [file_reference(file) for file in sources.files],
        "SamplesPerPixel": 3,
        "PhotometricInterpretation": "RGB",
        "PlanarConfiguration": 0,
        "Rows": rows,
        "Columns": columns,
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelRepresentation": 0,
        # Nothing here names the patient; whether the source's pixels do, only the source knows.
        "BurnedInAnnotation": "NO" if header.get("BurnedInAnnotation") == "NO" else "YES",
    }
    if count > 1:
        values |= {
            "NumberOfFrames": count,
            "FrameIncrementPointer": 0x00182001,
            "PageNumberVector": list(range(1, count + 1)),
        }
    for keyword in ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"):
        if header.get(keyword) not in (None, ""):
            values[keyword] = header.get(keyword)
    for keyword, value in values.items():
        setattr(result, keyword, value)
    content = pictures.tobytes()
    result.PixelData = content + b"\0" * (len(content) % 2)
    result["PixelData"].VR = "OB"
    add_series_reference(result, sources)
    finish(result, sources, context, "capture")
    return result
