from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from tmca.errors import ConfigError, DataError
from tmca.imaging import raster
from tmca.imaging.frames import Geometry
from tmca.imaging.reading import (
    IMAGE_SUFFIXES,
    case_name,
    image_size,
    is_image,
    join_frame,
    read_frames,
    read_image,
    read_mask,
    split_frame,
)

GREY = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10


def _picture(path: Path, pixels: np.ndarray = GREY) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def _volume(path: Path, slices: int = 3) -> Path:
    """Return slices that are ``GREY`` plus their number."""
    upright = np.stack([GREY + number for number in range(slices)], axis=2)
    nibabel.save(nibabel.Nifti1Image(upright[::-1, ::-1].transpose(1, 0, 2), np.eye(4)), path)
    return path


def _dicom(path: Path, frames: int = 1) -> Path:
    """Return frames that are ``GREY`` plus their number."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    dataset.Rows, dataset.Columns, dataset.NumberOfFrames = 4, 6, frames
    dataset.set_pixel_data(np.stack([GREY + number for number in range(frames)]), "MONOCHROME2", 8)
    dataset.save_as(path, enforce_file_format=True)
    return path


def _message(path: Path | str, frame: int | None = None) -> tuple[str, str]:
    with pytest.raises(DataError) as caught:
        read_image(path, frame)
    return caught.value.message, caught.value.hint


# Every format ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.tif", "A.BMP", "a.nii", "a.NII.GZ", "a.dcm", "a", "1.2.840.7", "a.img"])
def test_one_image_of_every_kind(tmp_path: Path, name: str):
    is_volume, is_picture = "nii" in name.lower(), Path(name).suffix.lower() in raster.IMAGE_SUFFIXES
    write = (lambda path: _volume(path, 1)) if is_volume else _picture if is_picture else _dicom
    path = write(tmp_path / name)
    for form in (path, str(path), f"{path}#0"):
        np.testing.assert_array_equal(read_image(form), np.stack([GREY] * 3, axis=2))
        assert image_size(form) == (4, 6)
        frames = read_frames(form)
        assert (len(frames), frames.size, frames.numbered) == (1, (4, 6), False)
        np.testing.assert_array_equal(frames[0].pixels, read_image(form))
    np.testing.assert_array_equal(read_image(path, 0), read_image(path))
    assert _message(f"{path}#1")[0] == f"{path} has no image number 1"


@pytest.mark.parametrize(("name", "write"), [("a.nii.gz", _volume), ("a.dcm", lambda path: _dicom(path, 3))])
def test_one_of_several_images(tmp_path: Path, name: str, write: object):
    path = write(tmp_path / name)
    assert _message(path) == (
        f"{path} holds 3 images, expected one",
        f"name one of them: {name}#0 to {name}#2",
    )
    with pytest.raises(DataError, match="holds 3 images"):
        image_size(path)
    assert _message(path, 3) == (f"{path} has no image number 3", "it holds numbers 0 to 2")
    assert _message(f"{path}#3")[0] == f"{path} has no image number 3"
    assert _message(f"{path}#1", 2)[0] == f"{path}#1 names image 1, but number 2 was asked for"
    for number in range(3):
        for image in (read_image(f"{path}#{number}"), read_image(path, number), read_image(f"{path}#{number}", number)):
            np.testing.assert_array_equal(image[:, :, 0], GREY + number)
        only = read_frames(f"{path}#{number}")
        assert [frame.number for frame in only] == [number]
        assert image_size(f"{path}#{number}") == image_size(path, number) == (4, 6)
    assert [frame.number for frame in read_frames(path)] == [0, 1, 2]


def test_a_window_is_for_values_with_units(tmp_path: Path):
    for path in (_volume(tmp_path / "a.nii", 1), _dicom(tmp_path / "a.dcm")):
        shown = read_image(path, window=(100.0, 100.0))[:, :, 0]
        assert (shown == 0).sum() == (GREY <= 50).sum()
        assert (shown == 255).sum() == (GREY >= 150).sum()
        with pytest.raises(ConfigError, match="window"):
            read_image(path, window=(0.0, 0.0))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_knows_how_it_is_stored(tmp_path: Path, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for suffix in (".png", ".tif", ".webp"):
        path = tmp_path / f"a{suffix}"
        Image.fromarray(np.stack([GREY] * 3, axis=2)).save(
            path, exif=exif, **({"lossless": True} if "w" in suffix else {})
        )
        frame = read_frames(path)[0]
        assert frame.geometry.stored_size == (4, 6)
        np.testing.assert_array_equal(frame.geometry.to_stored(frame.pixels)[:, :, 0], GREY)
        np.testing.assert_array_equal(frame.geometry.to_upright(GREY), frame.pixels[:, :, 0])
        assert frame.geometry.size == image_size(path)


def test_a_picture_has_no_spacing_and_nobody(tmp_path: Path):
    frame = read_frames(_picture(tmp_path / "a.png"))[0]
    assert frame.geometry == Geometry((4, 6))
    assert frame.identity.modality == ""
    assert frame.number is None


def test_pictures_are_read_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = _picture(tmp_path / "a.png")
    monkeypatch.setattr("tmca.imaging.reading.read_frames", None)  # not even asked: training reads each once
    np.testing.assert_array_equal(read_image(path), raster.read_image(path))


# Masks -----------------------------------------------------------------------------------------------------------


def test_masks_of_pictures_and_volumes(tmp_path: Path):
    picture = _picture(tmp_path / "a.png", (GREY > 100).astype(np.uint8) * 255)
    np.testing.assert_array_equal(read_mask(picture), GREY > 100)
    np.testing.assert_array_equal(read_mask(f"{picture}#0"), GREY > 100)
    with pytest.raises(DataError, match="no image number 1"):
        read_mask(picture, 1)
    labels = np.zeros((3, 4, 2), dtype=np.uint8)
    labels[0, 0, 1] = 1
    volume = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), volume)
    assert [int(read_mask(volume, number).sum()) for number in (0, 1)] == [0, 1]
    assert read_mask(f"{volume}#1")[3, 2]
    with pytest.raises(DataError, match="holds 2 images"):
        read_mask(volume)
    with pytest.raises(DataError, match="no image number 2"):
        read_mask(f"{volume}#2")


def test_a_dicom_file_is_no_mask(tmp_path: Path):
    with pytest.raises(DataError, match="is a DICOM file, expected a mask"):
        read_mask(_dicom(tmp_path / "a.dcm"))


# Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "file", "number"),
    [
        ("scans/scan.nii.gz#12", "scans/scan.nii.gz", 12),
        ("a.dcm#0", "a.dcm", 0),
        ("a#1#002", "a#1", 2),
        ("a.png", "a.png", None),
        ("case#12.png", "case#12.png", None),
        ("a.nii#", "a.nii#", None),
        ("a.nii#-1", "a.nii#-1", None),
        ("a.nii#1.5", "a.nii#1.5", None),
        ("a.nii#٣", "a.nii#٣", None),
        ("#3", "#3", None),
    ],
)
def test_a_number_is_split_off(path: str, file: str, number: int | None):
    assert split_frame(path) == split_frame(Path(path)) == (Path(file), number)


@pytest.mark.parametrize("number", [None, 0, 7])
def test_splitting_undoes_joining(number: int | None):
    assert split_frame(join_frame("a/scan.nii.gz", number)) == (Path("a/scan.nii.gz"), number)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("scans/scan.nii.gz#12", "scan_12"),
        ("scan.NII.GZ", "scan"),
        ("a.dcm", "a"),
        ("1.2.840", "1.2.840"),
        ("a.b.png", "a.b"),
        (".png", ".png"),
        ("IM1#3", "IM1_3"),
    ],
)
def test_names_of_cases(path: str, name: str):
    assert case_name(path) == name


def test_images_in_a_folder_are_recognised(tmp_path: Path):
    assert set(raster.IMAGE_SUFFIXES) | {".nii", ".nii.gz", ".dcm", ".dicom"} == set(IMAGE_SUFFIXES)
    for name in ("a.PNG", "a.nii.gz", "a.Dcm"):
        assert is_image(name)
    assert is_image(_dicom(tmp_path / "IM0001"))
    assert is_image(_dicom(tmp_path / "1.2.840.113619"))
    (tmp_path / "README").write_text("hello " * 100)
    for name in ("README", "a.csv", "a.gz", "missing"):
        assert not is_image(tmp_path / name)
    assert not is_image(_dicom(tmp_path / "a.bak"))
    assert not is_image(tmp_path)


# Files that cannot be used ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.nii", "a.nii.gz", "a.dcm", "a", "a.txt"])
def test_bad_files_of_every_name(tmp_path: Path, name: str):
    path = tmp_path / name
    for read in (read_image, read_mask, image_size):
        for content, expected in ((None, "does not exist"), (b"", "is empty"), (b"hello" * 99, "")):
            if content is not None:
                path.write_bytes(content)
            with pytest.raises(DataError, match=rf"{name} {expected}|is a DICOM file") as caught:
                read(path)
            assert caught.value.hint
            path.unlink(missing_ok=True)
    with pytest.raises(DataError, match="is a folder"):
        read_image(tmp_path)


def test_files_the_system_does_not_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DataError, match="File name too long"):
        read_image(tmp_path / f"{'a' * 300}.png")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    path = _picture(tmp_path / "a.png")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="No permission to read"):
        read_image(path)


def test_the_readers_of_medical_files_are_imported_when_needed():
    code = "import sys, tmca.imaging.reading; print({'nibabel', 'pydicom', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
