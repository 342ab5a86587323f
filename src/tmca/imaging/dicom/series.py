"""The DICOM files of a folder by series, and the slices of a series in their order through the body.

The order is that of positions along the slices' normal, never of file names or instance numbers: towards the head, or,
in coronal and sagittal series, towards the front or the patient's right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tmca.errors import DataError
from tmca.files import files_below
from tmca.imaging.dicom import find_source, is_dicom, read_header
from tmca.imaging.dicom.tags import Source

UNEVENNESS = 0.1
"""Largest departure of a step between two slices from the usual one, as a share of it; beyond, a slice is missing."""

SAME_PLACE = 0.01
"""Millimetres between the positions of two slices below which they lie at one place."""

_TURNED = 1e-3  # of a unit vector
_SPACED = 1e-3  # millimetres
_SHOWN = 3


@dataclass(frozen=True)
class Plane:
    """Where an image lies in the patient.

    Attributes:
        name: File and frame, for messages.
        size: Rows and columns.
        spacing: Millimetres between rows and between columns.
        position: Centre of the first pixel in millimetres (RAS+); ``None`` where the file does not say.
        directions: Unit vectors (RAS+) along which rows and columns are counted, and their normal, as columns; ``None``
            where the file does not say.
    """

    name: str
    size: tuple[int, int]
    spacing: tuple[float, float] | None
    position: NDArray[np.float64] | None
    directions: NDArray[np.float64] | None


@dataclass(frozen=True)
class Stack:
    """Images in their order through the body.

    Attributes:
        order: Which of the given images is first, second …
        step: From a slice to the next in millimetres (RAS+); ``None`` for a single image, or with problems.
        problems: Why they are no stack of slices at equal distances; empty if they are.
    """

    order: tuple[int, ...]
    step: tuple[float, float, float] | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Series:
    """The image files of one series.

    Attributes:
        uid: Series Instance UID.
        description: Series Description.
        modality: ``CT``, ``CR``, ``ES`` …
        paths: The files: slices in their order through the body, other images by their instance numbers.
        step: From a slice to the next in millimetres (RAS+).
        is_stack: The files are slices: several files of one image each, with positions.
        problems: Why the slices are not all there or do not fit each other; empty if they do.
    """

    uid: str
    description: str
    modality: str
    paths: tuple[Path, ...]
    step: tuple[float, float, float] | None
    is_stack: bool
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Unread:
    """A DICOM file of a folder that is no image that can be read.

    Attributes:
        error: Why: it is damaged, or of a kind or in a compression that is not supported.
        series_uid: Series Instance UID that its header names; empty where the header cannot be read or names none, so
            that it may be a slice of any series.
    """

    error: DataError
    series_uid: str


def find_series(folder: Path | str) -> list[Series]:
    """Return the image series of a folder, searched through and through, by their number and UID.

    Files that are not DICOM, and DICOM files without an image, are passed over.

    Raises:
        DataError: The folder does not exist or holds no DICOM image, or a file of it cannot be read.
    """
    found, unread = survey_series(folder)
    for each in unread.values():
        raise each.error
    return found


def survey_series(folder: Path | str, leave_out: Path | None = None) -> tuple[list[Series], dict[Path, Unread]]:
    """Return :func:`find_series` of what can be read, and the files that cannot.

    Args:
        folder: Where to look.
        leave_out: A folder below it that is not looked into.

    Raises:
        DataError: The folder does not exist or holds no DICOM image.
    """
    folder = Path(folder)
    if folder.is_file():
        raise DataError(f"{folder} is a file, expected the folder of a series", hint="name its folder")
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}", hint="check the path")
    sources: list[Source] = []
    unread: dict[Path, Unread] = {}
    for path in filter(is_dicom, files_below(folder, leave_out)):
        try:
            source = find_source(path)
        except DataError as error:
            unread[path] = Unread(error, _series_named_in(path))
            continue
        sources += [] if source is None else [source]
    if not sources and not unread:
        raise DataError(f"Folder {folder} holds no DICOM image", hint="export the series again, or check the path")
    groups: dict[str, list[Source]] = {}
    for source in sources:
        groups.setdefault(str(source.header.get("SeriesInstanceUID") or ""), []).append(source)
    ordered = sorted(groups.items(), key=lambda item: (_number(item[1][0], "SeriesNumber"), item[0]))
    return [_series(uid, members) for uid, members in ordered], unread


def read_stack(folder: Path | str) -> Series:
    """Return the one series of slices in a folder.

    Raises:
        DataError: As for :func:`find_series`, or there are several series, or its slices are not all there, or do not
            fit each other.
    """
    found = find_series(folder)
    if len(found) > 1:
        lines = "; ".join(f"{len(each.paths)} × {each.modality} {each.description!r}" for each in found[: 2 * _SHOWN])
        raise DataError(f"{folder} holds {len(found)} series: {lines}", hint="give each series its own folder")
    (series,) = found
    if not series.is_stack:
        raise DataError(
            f"{folder} holds {len(series.paths)} images without positions, expected the slices of a volume",
            hint="name the files one by one",
        )
    refuse(str(folder), series.problems)
    return series


def refuse(name: str, problems: Sequence[str]) -> None:
    """Refuse slices that are no stack.

    Raises:
        DataError: There are problems.
    """
    problem = problem_of(name, problems)
    if problem is not None:
        raise problem


def problem_of(name: str, problems: Sequence[str]) -> DataError | None:
    """Return the error that slices with problems are no stack, or ``None`` without problems."""
    if not problems:
        return None
    return DataError(
        f"{name} is not one stack of slices: {'; '.join(problems)}",
        hint="send the series again from the archive, or move what does not belong to it into another folder",
    )


def order_planes(planes: Sequence[Plane]) -> Stack:
    """Return the order of images through the body and what keeps them from being one stack of slices.

    Args:
        planes: At least one image.
    """
    given = tuple(range(len(planes)))
    problems = [*_unplaced(planes), *_unlike(planes)]
    if problems:
        return Stack(given, None, tuple(problems))
    normal = _towards(planes[0].directions)
    positions = np.array([plane.position for plane in planes])
    heights = positions @ normal
    order = tuple(int(index) for index in np.argsort(heights, kind="stable"))
    if len(planes) == 1:
        return Stack(order, None, ())
    steps = np.diff(positions[list(order)], axis=0)
    distances = steps @ normal
    problems += _duplicates(planes, order, distances)
    if not problems:
        problems += _gaps(planes, order, steps, distances)
    if problems:
        return Stack(order, None, tuple(problems))
    x, y, z = (float(value) for value in steps.mean(axis=0))
    return Stack(order, (x, y, z), ())


def plane_of(source: Source, number: int = 0) -> Plane:
    """Return where a frame lies."""
    name = source.path.name if source.count == 1 else f"{source.path.name}#{number}"
    spacing = source.geometry(number).spacing
    return Plane(name, source.size, spacing, source.position(number), source.directions(number))


def _series_named_in(path: Path) -> str:
    try:
        return str(read_header(path).get("SeriesInstanceUID") or "")
    except DataError:
        return ""


def _series(uid: str, members: list[Source]) -> Series:
    header = members[0].header
    single = all(source.count == 1 for source in members)
    planes = [plane_of(source) for source in members] if single else []
    placed = any(plane.position is not None for plane in planes)
    is_stack = placed and len(members) > 1
    stack = order_planes(planes) if is_stack else None
    if stack is None or any(plane.position is None for plane in planes):
        members.sort(key=lambda source: (_number(source, "InstanceNumber"), source.path))
        paths = tuple(source.path for source in members)
    else:
        paths = tuple(members[index].path for index in stack.order)
    return Series(
        uid=uid,
        description=str(header.get("SeriesDescription") or ""),
        modality=str(header.get("Modality") or ""),
        paths=paths,
        step=None if stack is None else stack.step,
        is_stack=is_stack,
        problems=() if stack is None else stack.problems,
    )


def _number(source: Source, keyword: str) -> float:
    try:
        return float(source.header.get(keyword))
    except (TypeError, ValueError):
        return float("inf")


def _unplaced(planes: Sequence[Plane]) -> list[str]:
    lost = [plane.name for plane in planes if plane.position is None or plane.directions is None]
    return [f"no position or orientation in {_some(lost)}"] if lost else []


def _unlike(planes: Sequence[Plane]) -> list[str]:
    """Return in what images differ that have to be alike: which of them are not as the middle one is."""
    problems = []
    for kind, values, tolerance in (
        ("sizes", [plane.size for plane in planes], 0.0),
        ("orientations", [np.ravel(plane.directions) for plane in planes if plane.directions is not None], _TURNED),
        ("pixel spacings", [plane.spacing or (0.0, 0.0) for plane in planes], _SPACED),
    ):
        numbers = np.array(values, dtype=np.float64)
        if len(numbers) < len(planes):
            continue
        far = np.abs(numbers - np.sort(numbers, axis=0)[len(numbers) // 2]).max(axis=1) > tolerance
        if far.any():
            problems.append(
                f"several {kind}: {_some([planes[int(place)].name for place in np.flatnonzero(far)])} differ"
            )
    return problems


def _towards(directions: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Return the normal that points to the head, the front or the right, whichever it is nearest to."""
    normal = np.eye(3)[2] if directions is None else directions[:, 2]
    return normal if normal[np.argmax(np.abs(normal))] > 0 else -normal


def _duplicates(planes: Sequence[Plane], order: Sequence[int], distances: NDArray[np.float64]) -> list[str]:
    pairs = [
        f"{planes[order[place]].name} and {planes[order[place + 1]].name}"
        for place in map(int, np.flatnonzero(distances < SAME_PLACE))
    ]
    return [f"{len(pairs) + 1} slices lie at one place: {_some(pairs)}"] if pairs else []


def _gaps(
    planes: Sequence[Plane], order: Sequence[int], steps: NDArray[np.float64], distances: NDArray[np.float64]
) -> list[str]:
    usual = float(np.median(distances))
    uneven = [int(place) for place in np.flatnonzero(np.abs(distances - usual) > UNEVENNESS * usual)]
    if uneven:
        named = [
            f"{distances[place]:.4g} mm between {planes[order[place]].name} and {planes[order[place + 1]].name}"
            for place in uneven
        ]
        return [f"a gap, slices are missing or unevenly spaced: {_some(named)}, usually {usual:.4g} mm"]
    # Slices of a tilted gantry are shifted against each other, but all alike.
    if np.linalg.norm(steps - np.median(steps, axis=0), axis=1).max() > UNEVENNESS * usual:
        return ["slices that are shifted against each other unevenly"]
    return []


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
