"""What the tags of a DICOM image say: a value for each frame, whose it is, where it lies in the patient."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tmca.errors import DataError
from tmca.imaging.frames import Geometry, Identity
from tmca.imaging.raster import damaged

if TYPE_CHECKING:
    from pydicom import Dataset

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


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn every way in which reading or decoding in the block can fail into a DataError."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except AttributeError as error:  # pydicom's word for a tag that is missing
        raise DataError(f"{path} lacks what an image needs: {error}", hint="export it again") from error
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise damaged(path, error) from error


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
        with explained(self.path):
            return _geometry(self, number, self.step)

    def position(self, number: int = 0) -> NDArray[np.float64] | None:
        """Return the centre of a frame's first pixel in millimetres (RAS+); ``None`` where the file does not say."""
        with explained(self.path):
            return _position(self, number)

    def directions(self, number: int = 0) -> NDArray[np.float64] | None:
        """Return the unit vectors (RAS+) along which rows and columns are counted, and their normal, as columns."""
        with explained(self.path):
            return _directions(self, number)

    def tag(self, keyword: str, number: int = 0) -> Any:  # noqa: ANN401
        """Return a value for one frame: from its own functional groups, the shared ones, or the file's top."""
        with explained(self.path):
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


def _tag(source: Source, number: int, keyword: str) -> Any:  # noqa: ANN401
    """Return a value for one frame: from its own functional groups, the shared ones, or the file's top."""
    per_frame = source.header.get("PerFrameFunctionalGroupsSequence") or ()
    shared = source.header.get("SharedFunctionalGroupsSequence") or ()
    for groups in (*per_frame[number : number + 1], *shared[:1]):
        items = groups.get(_GROUPS.get(keyword, "")) or ()
        if items and items[0].get(keyword) is not None:
            return items[0][keyword].value
    return source.header.get(keyword)


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:  # noqa: ANN401
    """Return the numbers of a tag, or ``None`` where there are not ``count`` finite ones."""
    if value is None or isinstance(value, str | float | int) or len(value) != count:
        return None
    numbers = tuple(float(number) for number in value)
    return numbers if np.isfinite(numbers).all() else None


def first_number(dataset: Dataset, keyword: str) -> float | None:
    """Return the first number of a tag, or ``None`` where there is none that is finite."""
    value = dataset.get(keyword)
    if value is None or value == "" or (not isinstance(value, float | int) and len(value) == 0):
        return None
    number = float(value if isinstance(value, float | int | str) else value[0])
    return number if np.isfinite(number) else None


def identity_of(header: Dataset) -> Identity:
    """Return whose image it is, and which."""

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
