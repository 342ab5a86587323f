"""DICOM structured report (TID 1500, Comprehensive 3D SR): what a mask measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tmca.errors import DataError
from tmca.imaging.dicom import read_header
from tmca.imaging.dicom.codes import Code
from tmca.imaging.dicom.results import (
    INTENDED_USE,
    MANUFACTURER,
    ResultContext,
    building,
    coded,
    finish,
    mismatch,
    uid_of,
    write_checked,
)
from tmca.imaging.dicom.segmentation import (
    SEGMENTATION_CLASS,
    check_mask,
    check_probability,
    source_of_frames,
    tracking_uid,
)
from tmca.imaging.dicom.sources import SourceImages, read_sources, stand_ins
from tmca.imaging.measurements import Measurements, measure

if TYPE_CHECKING:
    from pydicom import Dataset

OWN_SCHEME = "99TMCA"
"""Coding scheme of the words that no public one has."""

REGIONS = Code(OWN_SCHEME, "regions", "Number of regions")
AREA = Code("SCT", "42798000", "Area")
AREA_AT_DETECTOR = Code(OWN_SCHEME, "area-detector", "Area at the detector")
AREA_ON_FILM = Code(OWN_SCHEME, "area-film", "Area on the scanned film")
VOLUME = Code("SCT", "118565006", "Volume")
PROBABILITY = Code("DCM", "110854", "Fractional Probabilistic Segmentation")
_AREAS = {"patient": AREA, "detector": AREA_AT_DETECTOR, "film": AREA_ON_FILM}
Number = tuple[Code, int | float, Code, Code | None]
"""A measurement: name, value, unit, and how it was derived."""
_MEAN = Code("SCT", "373098007", "Mean")
_SQUARE_MILLIMETRE = Code("UCUM", "mm2", "square millimeter")
_CUBIC_MILLIMETRE = Code("UCUM", "mm3", "cubic millimeter")
_NO_UNIT = Code("UCUM", "1", "no units")


def write_report(
    path: Path | str,
    sources: Sequence[Path | str],
    masks: Sequence[NDArray[np.bool_]],
    context: ResultContext,
    *,
    probabilities: Sequence[NDArray[np.floating[Any]]] | None = None,
    segmentation: Path | str | None = None,
) -> str:
    """Write what masks measure as a structured report, in one step; the file is read back and compared.

    Number of regions always; area in mm² of an image, or volume in mm³ of a stack, where the size of a pixel is known;
    mean probability where it is given. Frames of a sequence are measured one by one. An empty mask measures 0.

    Args:
        path: File to write or replace.
        sources: The images, as for :func:`tmca.imaging.dicom.segmentation.write_segmentation`.
        masks: ``(height, width)``, upright, one an image.
        context: What the file says about itself.
        probabilities: ``(height, width)`` in [0, 1], one an image.
        segmentation: The DICOM SEG that was written of the same masks; the measurements then refer to it.

    Returns:
        SOP Instance UID of the file.

    Raises:
        DataError: The images do not go together, lack a UID, an array has another size, or the segmentation is not one
            of these images; or the file read back differs.
        StorageError: The file could not be written.
    """
    found = read_sources(sources)
    stored = found.stored([check_mask(mask) for mask in masks], "masks")
    maps = None
    if probabilities is not None:
        maps = found.stored([check_probability(each) for each in probabilities], "probability maps")
    measured = measure(found, stored, maps)
    with building(found):
        drawn = None if segmentation is None else _read_segmentation(Path(segmentation), found)
        result, numbers = _build(found, measured, context, drawn)
    write_checked(path, result, found.header, lambda written: _compare(written, numbers, found, drawn))
    return str(result.SOPInstanceUID)


def _read_segmentation(path: Path, sources: SourceImages) -> Dataset:
    header = read_header(path)
    if header.get("SOPClassUID") != SEGMENTATION_CLASS:
        raise DataError(f"{path} is no DICOM SEG", hint="name what write_segmentation wrote")
    meant = sorted(((image.uid, image.frame_number) for image in sources.images), key=str)
    if sorted(source_of_frames(header), key=str) != meant:
        raise DataError(f"{path} belongs to other images than {sources.path}", hint="name the one of these images")
    return header


def _build(
    sources: SourceImages, measured: Sequence[Measurements], context: ResultContext, segmentation: Dataset | None
) -> tuple[Dataset, list[tuple[str, int | float]]]:
    """Return the report and, for the check, the codes and values of its measurements in order."""
    from highdicom.sr import Comprehensive3DSR, MeasurementReport, TextContentItem
    from pydicom import Dataset
    from pydicom.sr.codedict import codes

    series = context.series_uid(sources, "report")
    numbers = [_numbers(each) for each in measured]
    refers_to = "" if segmentation is None else str(segmentation.SOPInstanceUID)
    instance = context.instance_uid(sources, "report", repr(numbers).encode(), refers_to)
    report = MeasurementReport(
        observation_context=_observer(context),
        procedure_reported=coded(context.table.procedure(str(sources.header.get("Modality") or ""))),
        imaging_measurements=[
            _group(sources, context, segmentation, place, values) for place, values in enumerate(numbers)
        ],
        title=codes.DCM.ImagingMeasurementReport,
    )
    report[0].ContentSequence.append(
        TextContentItem(name=codes.DCM.Comment, value=_comment(measured), relationship_type="CONTAINS")
    )
    evidence = [_evidence(sources, header) for header in sources.files]
    if segmentation is not None:
        evidence.append(_evidence(sources, segmentation))
    result = Comprehensive3DSR(
        evidence=evidence,
        content=report[0],
        series_instance_uid=series,
        series_number=context.series_number("report"),
        sop_instance_uid=instance,
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
    )
    for item in _content(result):
        for reference in item.get("ReferencedSOPSequence") or ():
            if "ReferencedFrameNumber" in reference:  # PS3.3 10.3: a frame or a segment, not both
                reference.pop("ReferencedSegmentNumber", None)
    scheme = Dataset()
    scheme.CodingSchemeDesignator = OWN_SCHEME
    scheme.CodingSchemeName = "Words of tmca that no public coding scheme has"
    result.CodingSchemeIdentificationSequence = [scheme]
    finish(result, sources, context, "report")
    return result, [(name.value, value) for values in numbers for name, value, *_ in values]


def _numbers(measured: Measurements) -> list[Number]:
    """Return what is to be reported."""
    found: list[Number] = [(REGIONS, measured.regions, _NO_UNIT, None)]
    if measured.area is not None and measured.area_in:
        found.append((_AREAS[measured.area_in], _rounded(measured.area), _SQUARE_MILLIMETRE, None))
    if measured.volume is not None:
        found.append((VOLUME, _rounded(measured.volume), _CUBIC_MILLIMETRE, None))
    if measured.mean_probability is not None:
        found.append((PROBABILITY, _rounded(measured.mean_probability), _NO_UNIT, _MEAN))
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _comment(measured: Sequence[Measurements]) -> str:
    words = [f"{INTENDED_USE}."]
    if not any(each.regions for each in measured):
        words.append("No region was found.")
    if any(each.area_in == "detector" for each in measured):
        words.append("The area is measured at the detector; in the patient it is smaller.")
    if any(each.area_in == "film" for each in measured):
        words.append("The area is measured on the scanned film.")
    if all(each.area is None and each.volume is None for each in measured):
        words.append("The size of a pixel is unknown.")
    return " ".join(words)


def _observer(context: ResultContext) -> Any:  # noqa: ANN401
    from highdicom.sr import DeviceObserverIdentifyingAttributes, ObservationContext, ObserverContext
    from pydicom.sr.codedict import codes

    device = DeviceObserverIdentifyingAttributes(
        uid=uid_of("device", context.model_hash),
        name=context.model_name,
        manufacturer_name=MANUFACTURER,
        model_name=context.model_name,
        serial_number=context.model_hash,
    )
    return ObservationContext(
        observer_device_context=ObserverContext(observer_type=codes.DCM.Device, observer_identifying_attributes=device)
    )


def _group(
    sources: SourceImages,
    context: ResultContext,
    segmentation: Dataset | None,
    place: int,
    numbers: Sequence[Number],
) -> Any:  # noqa: ANN401
    """Return the measurements of an image, a stack, or one frame of a sequence."""
    import highdicom.sr as sr

    target = context.coded_target
    finding = tracking_uid(sources, context)
    common: dict[str, Any] = {
        "tracking_identifier": sr.TrackingIdentifier(
            uid=finding if sources.layout != "sequence" else uid_of(finding, str(place)), identifier=target.label
        ),
        "finding_category": coded(target.category),
        "finding_type": coded(target.type),
        "finding_sites": None if target.region is None else [sr.FindingSite(coded(target.region))],
        "algorithm_id": sr.AlgorithmIdentification(name=context.model_name, version=context.model_version),
        "measurements": [
            sr.Measurement(
                name=coded(name),
                value=value,
                unit=coded(unit),
                derivation=None if derivation is None else coded(derivation),
            )
            for name, value, unit, derivation in numbers
        ],
    }
    images = sources.images if sources.layout == "stack" else sources.images[place : place + 1]
    if segmentation is None:
        measured_on = [
            sr.SourceImageForMeasurementGroup(image.source.header.SOPClassUID, image.uid, image.frame_numbers)
            for image in images
        ]
        return sr.MeasurementsAndQualitativeEvaluations(source_images=measured_on, **common)
    if sources.layout == "stack":
        return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
            referenced_segment=sr.ReferencedSegment(
                sop_class_uid=segmentation.SOPClassUID,
                sop_instance_uid=segmentation.SOPInstanceUID,
                segment_number=1,
                source_series=sr.SourceSeriesForSegmentation(sources.header.SeriesInstanceUID),
            ),
            **common,
        )
    (image,) = images
    frame = source_of_frames(segmentation).index((image.uid, image.frame_number)) + 1
    return sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        referenced_segment=sr.ReferencedSegmentationFrame(
            sop_class_uid=segmentation.SOPClassUID,
            sop_instance_uid=segmentation.SOPInstanceUID,
            frame_number=frame,
            segment_number=1,
            source_image=sr.SourceImageForSegmentation(image.source.header.SOPClassUID, image.uid, image.frame_numbers),
        ),
        **common,
    )


def _evidence(sources: SourceImages, header: Dataset) -> Dataset:
    evidence = stand_ins(sources, count=1)[0]
    for keyword in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        setattr(evidence, keyword, header.get(keyword))
    return evidence


def _compare(
    written: Dataset, numbers: Sequence[tuple[str, int | float]], sources: SourceImages, segmentation: Dataset | None
) -> None:
    items = list(_content(written))
    found = [
        (str(item.ConceptNameCodeSequence[0].CodeValue), float(item.MeasuredValueSequence[0].NumericValue))
        for item in items
        if item.ValueType == "NUM"
    ]
    if found != list(numbers):
        raise mismatch(f"the measurements {found} instead of {list(numbers)}")
    referred = {
        str(item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID) for item in items if item.ValueType == "IMAGE"
    }
    known = {image.uid for image in sources.images}
    if segmentation is not None:
        known.add(str(segmentation.SOPInstanceUID))
    if not referred or not referred <= known:
        raise mismatch("it refers to other images")


def _content(item: Dataset) -> Iterator[Dataset]:
    for child in item.get("ContentSequence") or ():
        yield child
        yield from _content(child)
