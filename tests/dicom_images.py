"""Drawn DICOM images of every kind that a result may belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from tmca.imaging.dicom.results import ResultContext

CLASSES = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
    "ES": "1.2.840.10008.5.1.4.1.1.77.1.1",
    "OT": "1.2.840.10008.5.1.4.1.1.7",
    "enhanced CT": "1.2.840.10008.5.1.4.1.1.2.1",
    "US sequence": "1.2.840.10008.5.1.4.1.1.3.1",
}
PATIENT = {
    "PatientName": "Müller^Änne",
    "PatientID": "P-17",
    "PatientBirthDate": "19500312",
    "PatientSex": "F",
    "StudyInstanceUID": "1.2.826.0.1.1",
    "StudyDate": "20260102",
    "StudyTime": "030405",
    "StudyID": "S1",
    "StudyDescription": "Thorax",
    "AccessionNumber": "A1",
    "ReferringPhysicianName": "Doe^Jane",
    "SpecificCharacterSet": "ISO_IR 100",
}


def item(**tags: Any) -> Dataset:
    """Return an item of a sequence."""
    made = Dataset()
    for keyword, value in tags.items():
        setattr(made, keyword, value)
    return made


def _draw(path: Path, pixels: np.ndarray, kind: str = "CR", **tags: Any) -> Path:
    colours = pixels.shape[-1] == 3 and pixels.ndim > 2
    several = pixels.ndim - colours > 2
    values = {
        **PATIENT,
        "SOPClassUID": CLASSES[kind],
        "SOPInstanceUID": f"1.2.826.0.1.3.{int.from_bytes(path.name.encode()[:12], 'big')}",
        "SeriesInstanceUID": "1.2.826.0.1.2",
        "SeriesNumber": 3,
        "InstanceNumber": 1,
        "Modality": kind.split()[-1] if kind.startswith("enhanced") else kind.split()[0],
        "Manufacturer": "drawn",
        "Rows": pixels.shape[-3 if colours else -2],
        "Columns": pixels.shape[-2 if colours else -1],
        "SamplesPerPixel": 3 if colours else 1,
        "PhotometricInterpretation": "RGB" if colours else "MONOCHROME2",
        "PlanarConfiguration": 0 if colours else None,
        "BitsAllocated": 8 * pixels.dtype.itemsize,
        "BitsStored": 8 * pixels.dtype.itemsize,
        "HighBit": 8 * pixels.dtype.itemsize - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "NumberOfFrames": len(pixels) if several else None,
        "PixelData": pixels.tobytes() + b"\0" * (pixels.nbytes % 2),
        **tags,
    }
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    dataset["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture(scope="session")
def draw_dicom() -> Callable[..., Path]:
    """Return a function that writes an image (``CR``, ``DX``, ``ES``, ``OT``, ``CT``, …) of given pixels and tags."""
    return _draw


@pytest.fixture(scope="session")
def draw_slices() -> Callable[..., list[Path]]:
    """Return a function that writes a volume ``(slices, rows, columns)`` as a CT series of single files."""

    def draw(
        folder: Path,
        volume: np.ndarray,
        orientation: Sequence[float] = (1, 0, 0, 0, 1, 0),
        spacing: Sequence[float] = (0.5, 0.25),
        step: Sequence[float] = (0, 0, 2.5),
        **tags: Any,
    ) -> list[Path]:
        return [
            _draw(
                folder / f"{place:03}.dcm",
                plane,
                "CT",
                **{
                    "FrameOfReferenceUID": "1.2.826.0.1.4",
                    "ImageOrientationPatient": [float(value) for value in orientation],
                    "ImagePositionPatient": [round(place * float(value) - 100, 8) for value in step],
                    "PixelSpacing": [float(value) for value in spacing],
                    "SliceThickness": 2.5,
                    "InstanceNumber": place + 1,
                    **tags,
                },
            )
            for place, plane in enumerate(volume)
        ]

    return draw


@pytest.fixture(scope="session")
def draw_enhanced() -> Callable[..., Path]:
    """Return a function that writes a volume ``(slices, rows, columns)`` as an enhanced CT image of one file."""

    def draw(path: Path, volume: np.ndarray, heights: Sequence[float] | None = None, **tags: Any) -> Path:
        shared = item(
            PixelMeasuresSequence=[item(PixelSpacing=[0.5, 0.25], SliceThickness=2.5)],
            PlaneOrientationSequence=[item(ImageOrientationPatient=[1.0, 0, 0, 0, 1, 0])],
        )
        places = [2.5 * place for place in range(len(volume))] if heights is None else heights
        own = [
            item(
                FrameContentSequence=[item(StackID="1", InStackPositionNumber=place)],
                PlanePositionSequence=[item(ImagePositionPatient=[10.0, 20.0, float(height)])],
            )
            for place, height in enumerate(places, start=1)
        ]
        return _draw(
            path,
            volume,
            "enhanced CT",
            **{
                "FrameOfReferenceUID": "1.2.826.0.1.4",
                "SharedFunctionalGroupsSequence": [shared],
                "PerFrameFunctionalGroupsSequence": own,
                **tags,
            },
        )

    return draw


@pytest.fixture(scope="session")
def context() -> ResultContext:
    """Return what the drawn results say about themselves."""
    return ResultContext(
        target="polyp",
        model_name="tmca-test",
        model_version="1.2.3",
        model_hash="0123456789abcdef",
        prompt="one small pink polyp, seen by John Smith",
        prompt_source="human",
        created=datetime(2026, 1, 2, 3, 4, 5),
    )
