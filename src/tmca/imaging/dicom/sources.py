"""The DICOM images that a result belongs to: one image, the slices of a stack, or the frames of a sequence."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tmca.errors import DataError
from tmca.imaging.dicom import read_source
from tmca.imaging.dicom.series import Plane, order_planes, plane_of, refuse
from tmca.imaging.dicom.tags import Source
from tmca.imaging.frames import Geometry
from tmca.imaging.reading import split_frame

if TYPE_CHECKING:
    from pydicom import Dataset

Layout = Literal["image", "stack", "sequence"]

_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_UID = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*))*")
_LONGEST_UID = 64
_NOT_DECODED = "\ufffd"
PATIENT_AND_STUDY = (
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "PatientComments",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
    "StudyDescription",
)
"""Tags that a result copies as they are."""

_MAY_BE_EMPTY = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
)
_CARRIED = (
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "Modality",
    "Manufacturer",
    "ManufacturerModelName",
    "DeviceSerialNumber",
    "SoftwareVersions",
    "InstitutionName",
    "StationName",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
)
_POSITIONS = (
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",  # without thickness and place, readers refuse what it would be written as
    "SpacingBetweenSlices",
)


@dataclass(frozen=True)
class SourceImage:
    """One image that a mask was drawn on.

    Attributes:
        source: Its file.
        number: Which of the file's frames, from 0; ``None`` where the file holds a single image.
        geometry: How the upright array maps to the file.
    """

    source: Source
    number: int | None
    geometry: Geometry

    @property
    def uid(self) -> str:
        """SOP Instance UID of the file."""
        return str(self.source.header.SOPInstanceUID)

    @property
    def frame_number(self) -> int | None:
        """The frame as DICOM counts, from 1."""
        return None if self.number is None else self.number + 1

    @property
    def frame_numbers(self) -> list[int] | None:
        """The same as a list, which is how reports refer to frames."""
        return None if self.number is None else [self.number + 1]

    @property
    def plane(self) -> Plane:
        """Where it lies."""
        return plane_of(self.source, self.number or 0)


@dataclass(frozen=True)
class SourceImages:
    """The images of one result, in the order in which they were given.

    Attributes:
        images: At least one.
        layout: ``image``: a single one. ``stack``: slices at equal distances. ``sequence``: frames without positions.
        step: From a slice of a stack to the next in millimetres (RAS+), towards the head, the front or the right.
        order: For a stack, which of the images is first, second … in that direction.
    """

    images: tuple[SourceImage, ...]
    layout: Layout
    step: tuple[float, float, float] | None
    order: tuple[int, ...]

    @property
    def first(self) -> SourceImage:
        """The image that was given first."""
        return self.images[0]

    @property
    def header(self) -> Dataset:
        """Tags of the first file."""
        return self.first.source.header

    @property
    def path(self) -> Path:
        """The first file, for messages."""
        return self.first.source.path

    @cached_property
    def located(self) -> bool:
        """All images have a place and a thickness in a frame of reference."""
        return bool(self.header.get("FrameOfReferenceUID")) and all(
            image.geometry.affine is not None and self.thickness(image) is not None for image in self.images
        )

    @property
    def files(self) -> list[Dataset]:
        """Tags of each file, once."""
        return list({image.uid: image.source.header for image in self.images}.values())

    @property
    def instance_number(self) -> int:
        """Number by which a result is told apart from those of other images of the series: that of its file or frame.

        It is 1 for several files, and where the file has no number.
        """
        if len(self.images) == 1 and self.first.frame_number is not None:
            return self.first.frame_number
        try:
            number = int(self.header.get("InstanceNumber"))
        except (TypeError, ValueError):
            return 1
        return number if number > 0 and len(self.files) == 1 else 1

    @property
    def voxel_volume(self) -> float | None:
        """Volume of a voxel of a stack in mm³: a pixel's area by the distance of the slices."""
        area = self.first.geometry.pixel_area
        directions = self.first.plane.directions
        if self.step is None or area is None or directions is None:
            return None
        return area * abs(float(np.array(self.step) @ directions[:, 2]))

    def thickness(self, image: SourceImage) -> float | None:
        """Return the thickness of a slice in mm as the file says it, or else the distance to the next one."""
        said = image.source.tag("SliceThickness", image.number or 0)
        if said not in (None, "") and float(said) > 0:
            return float(said)
        return image.geometry.slice_spacing if self.step is None else float(np.linalg.norm(self.step))

    def stored(self, upright: Sequence[NDArray[Any]], kind: str) -> NDArray[Any]:
        """Return upright arrays ``(height, width)``, one an image, in the order of the files' pixels, stacked.

        Raises:
            DataError: Their number or a size is another one.
        """
        if len(upright) != len(self.images):
            raise DataError(
                f"There are {len(upright)} {kind} for {len(self.images)} images of {self.path}",
                hint="give one for each image, in the same order",
            )
        return np.stack(
            [image.geometry.to_stored(array) for image, array in zip(self.images, upright, strict=True)], axis=0
        )


def read_sources(paths: Sequence[Path | str]) -> SourceImages:
    """Read the headers of the images that a result belongs to.

    Args:
        paths: What :func:`tmca.imaging.reading.read_frames` was given: files, or frames of a file (``scan.dcm#3``). A
            file of several frames without a number stands for all of them.

    Raises:
        DataError: A file cannot be read or lacks a UID; the images are of several series, or no stack: a slice is
            missing or there twice, or sizes, orientations or spacings differ.
    """
    files: dict[Path, Source] = {}
    images: list[SourceImage] = []
    for name in paths:
        path, number = split_frame(name)
        if path not in files:
            files[path] = read_source(path)
            _require_uids(files[path])
        source = files[path]
        if number is not None and number >= source.count:
            raise DataError(f"{path} has no image number {number}", hint=f"its last is {source.count - 1}")
        chosen = range(source.count) if number is None else (number,)
        images += [SourceImage(source, each if source.count > 1 else None, source.geometry(each)) for each in chosen]
    if not images:
        raise DataError("There is no image that the result could belong to", hint="name at least one DICOM file")
    _require_one_series(images)
    layout, step, order = _layout(images)
    found = SourceImages(tuple(images), layout, step, order)
    if layout == "stack" and not found.located:
        raise DataError(
            f"{found.path} has positions, but no Frame of Reference UID or pixel spacing that they are measured in",
            hint="export the series again, or write one result for each image",
        )
    return found


def stand_ins(sources: SourceImages, count: int | None = None) -> list[Dataset]:
    """Return what highdicom needs of each image as the tags of a plain single image.

    It so meets none of the many ways in which files of several frames, old and private kinds of images and odd values
    of tags depart from what it expects. Each stands under a UID of its own, ``1``, ``2`` …, which :func:`refer` then
    replaces; patient and study are empty, see :func:`copy_patient_and_study`.

    Args:
        sources: The images.
        count: Of the first how many; ``None`` means all.
    """
    from pydicom import Dataset
    from pydicom.uid import CTImageStorage, SecondaryCaptureImageStorage

    kind = CTImageStorage if sources.located else SecondaryCaptureImageStorage
    copied = (*_CARRIED, *_POSITIONS) if sources.located else _CARRIED
    made = []
    for place, image in enumerate(sources.images[:count], start=1):
        stand_in = Dataset()
        stand_in.SOPClassUID = kind
        stand_in.SOPInstanceUID = str(place)
        stand_in.Rows, stand_in.Columns = image.source.size
        for keyword in _MAY_BE_EMPTY:
            setattr(stand_in, keyword, None)
        for keyword in copied:
            value = image.source.tag(keyword, image.number or 0)
            if value not in (None, "") and _NOT_DECODED not in str(value):
                setattr(stand_in, keyword, value)
        if sources.located:
            stand_in.SliceThickness = sources.thickness(image)
        stand_in.Modality = stand_in.get("Modality") or "OT"
        made.append(stand_in)
    return made


def refer(result: Dataset, sources: SourceImages) -> None:
    """Let a result refer to the real files and frames instead of to their stand-ins."""
    for groups in result.PerFrameFunctionalGroupsSequence:
        reference = groups.DerivationImageSequence[0].SourceImageSequence[0]
        image = sources.images[int(reference.ReferencedSOPInstanceUID) - 1]
        reference.ReferencedSOPClassUID = image.source.header.SOPClassUID
        reference.ReferencedSOPInstanceUID = image.uid
        if image.frame_number is not None:
            reference.ReferencedFrameNumber = image.frame_number
    result.SourceImageSequence = [file_reference(header) for header in sources.files]
    add_series_reference(result, sources)


def file_reference(header: Dataset) -> Dataset:
    """Return the item of a sequence that refers to a file."""
    from pydicom import Dataset

    reference = Dataset()
    reference.ReferencedSOPClassUID = header.SOPClassUID
    reference.ReferencedSOPInstanceUID = header.SOPInstanceUID
    return reference


def add_series_reference(result: Dataset, sources: SourceImages) -> None:
    """Name the series and the files that a result refers to (Common Instance Reference)."""
    from pydicom import Dataset

    series = Dataset()
    series.SeriesInstanceUID = sources.header.SeriesInstanceUID
    series.ReferencedInstanceSequence = [file_reference(header) for header in sources.files]
    result.ReferencedSeriesSequence = [series]


def copy_patient_and_study(source: Dataset, result: Dataset) -> None:
    """Give a result the patient and the study of its source, as they are there; empty where they are not.

    Text keeps its bytes where source and result name the same character set, whether or not it fits that.

    Args:
        source: Tags of a file.
        result: The data set; it has its character set already.

    Raises:
        DataError: Text must change to another character set and does not fit the one that the source names.
    """
    from pydicom import DataElement
    from pydicom.datadict import dictionary_VR
    from pydicom.valuerep import PersonName

    for keyword in PATIENT_AND_STUDY:
        if keyword not in source:
            if keyword in _MAY_BE_EMPTY:
                setattr(result, keyword, "")
            continue
        text = _text_bytes(source, keyword) if _same_characters(source, result) else None
        if text is not None:
            kind = dictionary_VR(keyword)
            value = PersonName(text) if kind == "PN" else text
            result[keyword] = DataElement(keyword, kind, value, already_converted=True)
            continue
        result[keyword] = copy.deepcopy(source[keyword])
        if _NOT_DECODED in str(result[keyword]):
            raise DataError(
                f"The source's {keyword} does not fit its own character set "
                f"({source.get('SpecificCharacterSet') or 'none'}), so that it cannot be written in another one",
                hint="correct the source's Specific Character Set, or name model and target in plain letters (ASCII)",
            )


def changed_tags(source: Dataset, written: Dataset) -> list[str]:
    """Return the tags of patient and study in which a result that was read back differs from its source."""
    changed = []
    for keyword in PATIENT_AND_STUDY:
        before, after = _text_bytes(source, keyword), _text_bytes(written, keyword)
        if before is None or after is None or not _same_characters(source, written):
            same = (source.get(keyword) or None) == (written.get(keyword) or None)
        else:
            same = before == after
        if not same:
            changed.append(keyword)
    return changed


def _same_characters(source: Dataset, result: Dataset) -> bool:
    return (source.get("SpecificCharacterSet") or None) == (result.get("SpecificCharacterSet") or None)


def _text_bytes(dataset: Dataset, keyword: str) -> bytes | None:
    """Return text as the file encodes it, without padding; ``None`` of a tag that is no text, or not there."""
    from pydicom.datadict import dictionary_VR
    from pydicom.valuerep import CUSTOMIZABLE_CHARSET_VR

    element = dataset.get_item(keyword)
    if element is None or not element.is_raw or dictionary_VR(keyword) not in CUSTOMIZABLE_CHARSET_VR:
        return None
    if element.VR not in (None, "UN", *CUSTOMIZABLE_CHARSET_VR):
        return None
    return (element.value or b"").rstrip(b"\0 ")


def _require_uids(source: Source) -> None:
    for keyword in _NEEDED:
        uid = str(source.header.get(keyword) or "")
        if not uid:
            raise DataError(
                f"{source.path} lacks {keyword}, without which no result can refer to it",
                hint="export the image from the archive instead of converting it",
            )
        if len(uid) > _LONGEST_UID or not _UID.fullmatch(uid):
            raise DataError(f"{source.path} has the {keyword} {uid!r}, which is no UID", hint="export it again")


def _require_one_series(images: Sequence[SourceImage]) -> None:
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        found = {str(image.source.header.get(keyword) or "") for image in images}
        if len(found) > 1:
            raise DataError(
                f"{images[0].source.path} and others have {len(found)} values of {keyword}, expected one",
                hint="write one result for each series",
            )
    asked = [(image.uid, image.number) for image in images]
    if len(set(asked)) < len(asked):
        twice = next(image for place, image in enumerate(images) if asked[place] in asked[:place])
        raise DataError(
            f"{twice.plane.name} is there twice, by its SOP Instance UID", hint="name each image once, without copies"
        )
    if len({image.uid for image in images}) > 1 and any(image.number is not None for image in images):
        raise DataError(
            f"{images[0].source.path} and others hold several frames each", hint="write one result for each file"
        )


def _layout(images: Sequence[SourceImage]) -> tuple[Layout, tuple[float, float, float] | None, tuple[int, ...]]:
    given = tuple(range(len(images)))
    if len(images) == 1:
        return "image", None, given
    planes = [image.plane for image in images]
    name = str(images[0].source.path)
    if all(plane.position is None for plane in planes):
        if images[0].number is not None:
            return "sequence", None, given
        raise DataError(
            f"{len(images)} images beginning with {name} have no positions, so that they are no stack of slices",
            hint="write one result for each image",
        )
    stack = order_planes(planes)
    refuse(name, stack.problems)
    return "stack", stack.step, stack.order
