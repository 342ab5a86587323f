"""DICOM images and slices of NIfTI volumes on the way through the whole package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

from tmca import cli
from tmca.data.manifest import Manifest, Record
from tmca.data.phantom import write_phantoms
from tmca.files import sha256_of
from tmca.imaging.raster import read_image, read_mask
from tmca.models import TMCA


def _write_dicom(path: Path, grey: np.ndarray) -> None:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    data = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = grey.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    data.PixelData = grey.tobytes()
    data.save_as(path, enforce_file_format=True)


def _write_slices(path: Path, upright: list[np.ndarray]) -> None:
    """Write slices that are read back as they are: an affine of LAS+ shows voxel (column, row) upright."""
    volume = np.stack([plane[::-1].T for plane in upright], axis=2)
    nibabel.Nifti1Image(volume, np.diag([-1.0, 1.0, 1.0, 1.0])).to_filename(path)


@pytest.fixture
def model_folder(tiny_model: Callable[..., TMCA], tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_dicom_and_slices_are_segmented_like_pictures(model_folder: Path, tmp_path: Path):
    grey = np.random.default_rng(0).integers(0, 256, (40, 56), dtype=np.uint8)
    grey[0, :2] = 0, 255  # so that the volume's range is that of the picture
    scans = tmp_path / "scans"
    scans.mkdir()
    Image.fromarray(grey).save(scans / "picture.png")
    _write_dicom(scans / "IM0001", grey)
    arguments = ["predict", "-i", str(scans), "-o", str(tmp_path / "out"), "-m", str(model_folder), "-p", "one lesion"]
    assert cli.run(arguments) == 0
    masks = {name: read_mask(tmp_path / "out" / f"{name}.png") for name in ("picture", "IM0001")}
    np.testing.assert_array_equal(masks["picture"], masks["IM0001"])

    _write_slices(tmp_path / "scan.nii.gz", [grey, np.roll(grey, 7, axis=1)])
    arguments[2], arguments[4] = str(tmp_path / "scan.nii.gz"), str(tmp_path / "volume")
    assert cli.run(arguments) == 0
    (volume,) = json.loads((tmp_path / "volume" / "run_report.json").read_text("utf-8"))["cases"]
    assert volume["outputs"]["nifti"] == "scan.nii.gz"
    assert volume["shape"] == [2, *grey.shape]
    arguments[2] += "#1"
    assert cli.run(arguments) == 0
    (case,) = json.loads((tmp_path / "volume" / "run_report.json").read_text("utf-8"))["cases"]
    assert case["outputs"]["mask"] == "scan_1.png"
    assert case["sha256"] == f"{sha256_of(tmp_path / 'scan.nii.gz')}#1"
    assert read_mask(tmp_path / "volume" / "scan_1.png").shape == grey.shape


def test_slices_are_trained_on(tmp_path: Path):
    drawn = write_phantoms(tmp_path / "drawn", {"train": 8, "val": 4}, size=64, seed=0)
    images = [read_image(drawn.image_path(record))[:, :, 0] for record in drawn.records]
    masks = [read_mask(drawn.root / str(record.mask)).astype(np.uint8) for record in drawn.records]
    _write_slices(tmp_path / "image.nii.gz", images)
    _write_slices(tmp_path / "mask.nii", masks)
    records = tuple(
        Record(f"slice{n}", f"image.nii.gz#{n}", f"mask.nii#{n}", record.text, record.split)
        for n, record in enumerate(drawn.records)
    )
    Manifest(tmp_path, records, "slices").with_hashes().write(tmp_path / "manifest.csv")
    run = tmp_path / "run"
    data = ["--data", str(tmp_path / "manifest.csv")]
    assert cli.run(["train", "tiny", *data, "-o", str(run), "--trainer.max-epochs", "1"]) == 0
    assert cli.run(["evaluate", "-m", str(run), *data, "--split", "val", "--space", "original"]) == 0
    assert json.loads((run / "evaluation-val" / "summary.json").read_text("utf-8"))["n"] == 4
    assert (run / "evaluation-val" / "report.html").is_file()
