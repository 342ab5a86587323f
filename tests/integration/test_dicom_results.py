"""The guide for giving masks back to an archive, run on drawn images with a tiny model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from tmca.models import TMCA

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "dicom.md"


def _write(path: Path, pixels: np.ndarray, place: int, **tags: object) -> None:
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    values = {
        "SOPInstanceUID": f"1.2.{len(path.parts)}.{place + 1}",
        "StudyInstanceUID": "1.2.3",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelRepresentation": 0,
        "PixelData": pixels.tobytes(),
        **tags,
    }
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    dataset["PixelData"].VR = "OB"
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def test_the_guide_does_what_it_says(
    tiny_model: Callable[..., TMCA], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("highdicom", reason="DICOM results need highdicom")
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained(Path("runs/mine"))
    random = np.random.default_rng(0)
    _write(
        Path("thorax.dcm"),
        random.integers(0, 256, (40, 56), dtype=np.uint8),
        0,
        SOPClassUID="1.2.840.10008.5.1.4.1.1.1",
        SeriesInstanceUID="1.2.4",
        Modality="CR",
    )
    for place in range(3):
        for folder in ("ct/series-4", "study/a"):
            _write(
                Path(f"{folder}/{place}.dcm"),
                random.integers(0, 256, (40, 56), dtype=np.uint8),
                place,
                SOPClassUID="1.2.840.10008.5.1.4.1.1.2",
                SeriesInstanceUID="1.2.5",
                SeriesDescription="lung",
                Modality="CT",
                FrameOfReferenceUID="1.2.6",
                PixelSpacing=[0.7, 0.7],
                SliceThickness=2,
                ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
                ImagePositionPatient=[0, 0, 2 * place],
            )
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks[:2]:
        exec(block, names)
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "mask.dcm",
        "picture.dcm",
        "probability.dcm",
        "report.dcm",
    ]
    np.testing.assert_array_equal(pydicom.dcmread("out/mask.dcm").pixel_array, names["mask"])
    for block in blocks[2:4]:
        exec(block, names)
    assert pydicom.dcmread("out/mask.dcm").NumberOfFrames == 3
    volume = np.asanyarray(nibabel.load("out/mask.nii.gz").dataobj)
    np.testing.assert_array_equal(volume.transpose(2, 1, 0), np.stack(names["masks"]))
    assert capsys.readouterr().out == "CT lung 3 ()\n"
    target, _, meant = blocks[4].strip().splitlines()[-1].partition("  # ")
    exec(blocks[4].rpartition("\n\n")[0], names)
    assert eval(target, names) == eval(meant)
