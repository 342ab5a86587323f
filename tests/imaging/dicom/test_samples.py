"""Results for the sample images of pydicom, which come from real scanners and odd programs."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from tmca.imaging.dicom import find_source, read_frames
from tmca.imaging.dicom.capture import write_capture
from tmca.imaging.dicom.report import write_report
from tmca.imaging.dicom.results import ResultContext
from tmca.imaging.dicom.segmentation import source_of_frames, write_fractional, write_segmentation
from tmca.imaging.dicom.series import find_series
from tmca.imaging.dicom.volume import write_masks

highdicom = pytest.importorskip("highdicom", reason="DICOM results need highdicom")

SAMPLES = Path(pydicom.__file__).parent / "data" / "test_files"
NAMES = [
    "CT_small.dcm",
    "MR_small.dcm",
    "MR_small_bigendian.dcm",
    "ExplVR_BigEnd.dcm",
    "693_J2KI.dcm",
    "JPEG2000.dcm",
    "SC_rgb_dcmtk_+eb+cy+np.dcm",
    "SC_rgb_rle_2frame.dcm",
    "rtdose.dcm",
    "image_dfl.dcm",
    "examples_palette.dcm",
    "examples_ybr_color.dcm",
    "dicomdirtests/77654033/CR1/6154",
    "dicomdirtests/77654033/CT2/17136",
    "dicomdirtests/98892003/MR1/4919",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom", "ignore:Invalid value for VR", "ignore:The value length")
def test_every_result_is_written(tmp_path: Path, context: ResultContext, name: str):
    path = SAMPLES / name
    if not path.is_file():
        pytest.skip(f"pydicom {pydicom.__version__} comes without {name}")
    source = find_source(path)
    assert source is not None
    masks = list(np.random.default_rng(0).random((source.count, *source.size)) > 0.5)
    write_segmentation(tmp_path / "mask.dcm", [path], masks, context)
    written = pydicom.dcmread(tmp_path / "mask.dcm")
    numbers = [number or 1 for _, number in source_of_frames(written)]
    frames = written.pixel_array.reshape(source.count, *source.size)
    np.testing.assert_array_equal(frames[np.argsort(numbers)], masks)
    write_fractional(tmp_path / "map.dcm", [path], [mask * 0.25 for mask in masks], context)
    write_report(tmp_path / "report.dcm", [path], masks, context, segmentation=tmp_path / "mask.dcm")
    write_capture(tmp_path / "picture.dcm", [path], masks, context)
    for result in tmp_path.iterdir():
        assert str(pydicom.dcmread(result).get("PatientID", "")) == str(source.header.get("PatientID", ""))


def test_the_slices_of_a_scanner(tmp_path: Path, context: ResultContext):
    folder = SAMPLES / "dicomdirtests" / "98892001"
    if not folder.is_dir():
        pytest.skip(f"pydicom {pydicom.__version__} comes without {folder.name}")
    (series,) = [each for each in find_series(folder) if each.is_stack and not each.problems]
    assert (len(series.paths), series.step) == (5, (0, 0, 2.5))
    shown = [read_frames(path, window=(40.0, 400.0))[0].pixels[:, :, 0] for path in series.paths]
    masks = [grey > 127 for grey in shown]
    assert all(mask.any() for mask in masks)
    write_segmentation(tmp_path / "mask.dcm", series.paths, masks, context)
    write_masks(tmp_path / "mask.nii", series.paths, masks)
    read = highdicom.seg.segread(tmp_path / "mask.dcm")
    volume = read.get_volume(combine_segments=True)
    image = nibabel.load(tmp_path / "mask.nii")
    # highdicom and NIfTI find the same voxels at the same places (LPS+ and RAS+).
    to_patient = np.diag([-1, -1, 1, 1]) @ volume.affine
    found = np.argwhere(volume.array > 0)
    places = nibabel.affines.apply_affine(np.linalg.inv(image.affine) @ to_patient, found)
    assert len(found) == sum(int(mask.sum()) for mask in masks)
    np.testing.assert_allclose(places, places.round(), atol=1e-3)
    assert np.asanyarray(image.dataobj)[tuple(places.round().astype(int).T)].all()
