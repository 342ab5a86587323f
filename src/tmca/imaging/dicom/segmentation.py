"""DICOM SEG: masks (BINARY) and probability maps (FRACTIONAL) on the rows and columns of the images they belong to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tmca.errors import DataError
from tmca.imaging.dicom.results import (
    INTENDED_USE,
    MANUFACTURER,
    Kind,
    ResultContext,
    building,
    coded,
    finish,
    mismatch,
    uid_of,
    write_checked,
)
from tmca.imaging.dicom.sources import SourceImage, SourceImages, read_sources, refer, stand_ins

if TYPE_CHECKING:
    from pydicom import Dataset

SEGMENTATION_CLASS = "1.2.840.10008.5.1.4.1.1.66.4"
LARGEST_FRACTION = 255
"""What stands for a probability of 1."""

_COLOUR = (255, 200, 0)
_POSITION_TOLERANCE = 1e-3


def write_segmentation(
    path: Path | str, sources: Sequence[Path | str], masks: Sequence[NDArray[np.bool_]], context: ResultContext
) -> str:
    """Write masks as a binary DICOM SEG, in one step; the file is read back and compared.

    Empty masks are written too: "no region found" is a result.

    Args:
        path: File to write or replace.
        sources: The images, as :func:`tmca.imaging.dicom.sources.read_sources` takes them: one image, all slices of a
            series in any order, or frames of one file.
        masks: ``(height, width)``, upright, one an image.
        context: What the file says about itself.

    Returns:
        SOP Instance UID of the file.

    Raises:
        DataError: The images do not go together, lack a UID, or a mask has another size; or the file read back differs.
        StorageError: The file could not be written.
    """
    found = read_sources(sources)
    stored = found.stored([check_mask(mask) for mask in masks], "masks")
    return _write(path, found, stored, context, "segmentation")


def write_fractional(
    path: Path | str,
    sources: Sequence[Path | str],
    probabilities: Sequence[NDArray[np.floating[Any]]],
    context: ResultContext,
) -> str:
    """Write probability maps as a fractional DICOM SEG of type PROBABILITY: 255 is 1. See :func:`write_segmentation`.

    Args:
        path: File to write or replace.
        sources: The images.
        probabilities: ``(height, width)`` in [0, 1], upright, one an image.
        context: What the file says about itself.

    Returns:
        SOP Instance UID of the file.

    Raises:
        DataError: As for :func:`write_segmentation`, or a value is outside [0, 1] or not a number.
        StorageError: The file could not be written.
    """
    found = read_sources(sources)
    stored = found.stored([check_probability(each) for each in probabilities], "probability maps")
    return _write(path, found, stored, context, "probability")


def check_mask(mask: NDArray[Any]) -> NDArray[np.bool_]:
    """Return a mask as true and false.

    Raises:
        DataError: It holds other numbers than 0 and 1, such as probabilities.
    """
    values = np.asarray(mask)
    marked = values.astype(bool)
    if values.dtype != np.bool_ and not np.array_equal(values, marked):
        raise DataError(
            f"The mask holds {values.dtype} values other than 0 and 1",
            hint="compare probabilities with a threshold first: probability > 0.5",
        )
    return marked


def check_probability(probability: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Return a probability map as float32.

    Raises:
        DataError: A value is outside [0, 1] or not a number.
    """
    values = np.asarray(probability, dtype=np.float32)
    if not ((values >= 0) & (values <= 1)).all():
        raise DataError("Probabilities outside [0, 1] or undefined", hint="apply the sigmoid first")
    return values


def source_of_frames(segmentation: Dataset) -> list[tuple[str, int | None]]:
    """Return, for each frame of a segmentation, the SOP Instance UID and frame number (from 1) that it belongs to."""
    found = []
    for groups in segmentation.PerFrameFunctionalGroupsSequence:
        reference = groups.DerivationImageSequence[0].SourceImageSequence[0]
        number = reference.get("ReferencedFrameNumber")
        found.append((str(reference.ReferencedSOPInstanceUID), None if number is None else int(number)))
    return found


def _write(path: Path | str, sources: SourceImages, stored: NDArray[Any], context: ResultContext, kind: Kind) -> str:
    with building(sources):
        result = _build(sources, stored, context, kind)
    write_checked(path, result, sources.header, lambda written: _compare(written, sources, stored))
    return str(result.SOPInstanceUID)


def _build(sources: SourceImages, stored: NDArray[Any], context: ResultContext, kind: Kind) -> Dataset:
    from highdicom.seg import Segmentation

    count = 1 if sources.layout == "sequence" else len(stored)
    instance = context.instance_uid(sources, kind, stored.tobytes())
    result = Segmentation(
        source_images=stand_ins(sources, count),
        pixel_array=stored[:count],
        segmentation_type="BINARY" if kind == "segmentation" else "FRACTIONAL",
        segment_descriptions=[_describe_segment(sources, context)],
        series_instance_uid=context.series_uid(sources, kind),
        series_number=context.series_number(kind),
        sop_instance_uid=instance,
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=context.model_name,
        software_versions=context.model_version,
        device_serial_number=context.model_hash,
        fractional_type="PROBABILITY",
        max_fractional_value=LARGEST_FRACTION,
        content_label="SEGMENTATION" if kind == "segmentation" else "PROBABILITY",
        content_description=INTENDED_USE,
        omit_empty_frames=False,
        specific_character_set=None,
    )
    if sources.layout == "sequence":
        _extend(result, stored)
    refer(result, sources)
    organisation = uid_of("dimensions", instance)
    for item in (*result.DimensionOrganizationSequence, *result.DimensionIndexSequence):
        item.DimensionOrganizationUID = organisation
    result.SegmentSequence[0].SegmentDescription = context.description
    result.ImageComments = context.description
    if not sources.located:
        result.PatientOrientation = sources.header.get("PatientOrientation") or ""
    finish(result, sources, context, kind)
    return result


def _describe_segment(sources: SourceImages, context: ResultContext) -> Any:  # noqa: ANN401
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription
    from pydicom.sr.codedict import codes

    target = context.coded_target
    algorithm = AlgorithmIdentificationSequence(
        name=context.model_name,
        family=codes.DCM.ArtificialIntelligence,
        version=context.model_version,
        source=MANUFACTURER,
    )
    return SegmentDescription(
        segment_number=1,
        segment_label=target.label,
        segmented_property_category=coded(target.category),
        segmented_property_type=coded(target.type),
        algorithm_type=context.algorithm_type,
        algorithm_identification=algorithm,
        anatomic_regions=None if target.region is None else [coded(target.region)],
        tracking_id=target.label,
        tracking_uid=tracking_uid(sources, context),
        display_color=CIELabColor.from_rgb(*_COLOUR),
    )


def tracking_uid(sources: SourceImages, context: ResultContext) -> str:
    """Return the UID under which the mask, its probability map and its measurements speak of one finding."""
    names = [f"{image.uid}#{image.number}" for image in sources.images]
    return uid_of("finding", context.series_uid(sources, "segmentation"), *names)


def _extend(result: Dataset, stored: NDArray[Any]) -> None:
    """Turn the segmentation of a sequence's first frame into that of all: highdicom makes only the first.

    Frames without positions are told apart by their place in the sequence.
    """
    from pydicom import Dataset

    pixels = np.packbits(stored, bitorder="little") if stored.dtype == bool else np.rint(stored * LARGEST_FRACTION)
    content = pixels.astype(np.uint8).tobytes()
    result.PixelData = content + b"\0" * (len(content) % 2)
    result.NumberOfFrames = len(stored)
    for keyword in ("StackID", "InStackPositionNumber"):
        index = Dataset()
        index.DimensionOrganizationUID = result.DimensionIndexSequence[0].DimensionOrganizationUID
        index.DimensionIndexPointer = keyword
        index.FunctionalGroupPointer = "FrameContentSequence"
        index.DimensionDescriptionLabel = keyword
        result.DimensionIndexSequence.append(index)
    first = result.PerFrameFunctionalGroupsSequence[0]
    groups = [copy.deepcopy(first) for _ in range(len(stored))]
    for place, group in enumerate(groups, start=1):
        frame = group.FrameContentSequence[0]
        frame.StackID = "1"
        frame.InStackPositionNumber = place
        frame.DimensionIndexValues = [1, 1, place]
        group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID = str(place)
    result.PerFrameFunctionalGroupsSequence = groups


def _compare(written: Dataset, sources: SourceImages, stored: NDArray[Any]) -> None:
    """Compare what was read back with what was meant: every frame by the image that it refers to."""
    pixels = written.pixel_array
    frames = pixels[None] if pixels.ndim == 2 else pixels
    references = source_of_frames(written)
    places = {(image.uid, image.frame_number): place for place, image in enumerate(sources.images)}
    if sorted(references, key=str) != sorted(places, key=str) or len(frames) != len(references):
        raise mismatch(f"it has {len(frames)} frames for {len(references)} of {len(places)} images")
    for frame, reference, groups in zip(frames, references, written.PerFrameFunctionalGroupsSequence, strict=True):
        place = places[reference]
        meant = stored[place]
        if frame.shape != meant.shape:
            raise mismatch(
                f"frames of {frame.shape[0]} × {frame.shape[1]} instead of {meant.shape[0]} × {meant.shape[1]}"
            )
        same = frame == meant if meant.dtype == bool else np.abs(frame - meant * float(LARGEST_FRACTION)) < 0.501
        if not same.all():
            raise mismatch(f"{np.count_nonzero(~same)} pixels of the mask of {sources.images[place].plane.name}")
        if sources.located:
            _compare_position(groups, sources.images[place])


def _compare_position(groups: Dataset, image: SourceImage) -> None:
    written = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
    meant = np.array(image.source.tag("ImagePositionPatient", image.number or 0), dtype=float)
    if np.abs(written - meant).max() > _POSITION_TOLERANCE:
        raise mismatch(f"the position of {image.plane.name}")
