from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from tmca.errors import ConfigError, DataError
from tmca.imaging.dicom.capture import write_capture
from tmca.imaging.dicom.report import write_report
from tmca.imaging.dicom.results import INTENDED_USE, ResultContext, quiet, uid_of, write_checked
from tmca.imaging.dicom.segmentation import write_segmentation


def test_the_sentence_is_not_shown(context: ResultContext):
    assert "John Smith" not in repr(context)
    assert context.description == f"{INTENDED_USE}."


@pytest.mark.parametrize(
    ("prompt", "source", "algorithm"),
    [("one polyp", "human", "SEMIAUTOMATIC"), ("one polyp", "report", "AUTOMATIC"), ("", "none", "AUTOMATIC")],
)
def test_a_typed_target_makes_it_semiautomatic(context: ResultContext, prompt: str, source: Any, algorithm: str):
    asked = dataclasses.replace(context, prompt=prompt, prompt_source=source)
    assert asked.algorithm_type == algorithm
    corrected = dataclasses.replace(asked, corrected=True)
    assert corrected.algorithm_type == "SEMIAUTOMATIC"
    assert corrected.description == f"{INTENDED_USE}. Corrected by hand."


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"target": "nothing known"}, "Unknown target"),
        ({"model_name": ""}, "model_name is ''"),
        ({"model_version": "1" * 65}, "model_version is"),
        ({"model_hash": "a\\b"}, "model_hash is"),
        ({"model_name": "a\nb"}, "model_name is"),
        ({"prompt": " "}, "prompt_source is 'human', but there is no prompt"),
        ({"prompt_source": "none"}, "prompt_source is 'none', but there is a prompt"),
        ({"prompt": "x" * 1000, "prompt_in_description": True}, "too long for a description"),
        ({"codes": Path("missing.toml")}, "Cannot read the codes"),
    ],
)
def test_what_cannot_be_said(context: ResultContext, changes: dict[str, Any], reason: str):
    with pytest.raises(ConfigError, match=reason) as caught:
        dataclasses.replace(context, **changes)
    assert caught.value.hint


def test_descriptions_of_series_fit(context: ResultContext, tmp_path: Path):
    codes = tmp_path / "codes.toml"
    codes.write_text(
        '[[targets]]\nnames = ["x"]\nlabel = "'
        + "x" * 64
        + '"\ncategory = ["SCT", "1", "a"]\ntype = ["SCT", "2", "b"]\n'
        '[procedures]\nother = ["SCT", "3", "c"]\n',
        "utf-8",
    )
    long = dataclasses.replace(context, target="x", codes=codes)
    for kind in ("segmentation", "probability", "report", "capture"):
        assert len(long.series_description(kind)) == 64
        assert long.series_description(kind).endswith("research only, not a medical device")


def test_uids():
    uid = uid_of("a", "b")
    assert pydicom.uid.UID(uid).is_valid
    assert len(uid) <= 64
    assert uid == uid_of("a", "b") != uid_of("a", "c")


def test_results_of_one_series_agree_in_what_they_say_of_it(
    tmp_path: Path, draw_dicom: Callable, context: ResultContext
):
    mask = np.zeros((8, 9), bool)
    writers: dict[str, Callable] = {"seg": write_segmentation, "sr": write_report, "sc": write_capture}
    series = set()
    for kind, write in writers.items():
        films = []
        for number in (1, 2):
            film = draw_dicom(tmp_path / f"film{number}.dcm", mask.astype(np.uint8), InstanceNumber=number)
            made = dataclasses.replace(context, created=datetime(2026, 1, 2, 3, 4, number))
            write(tmp_path / f"{kind}{number}.dcm", [film], [mask], made)
            films.append(pydicom.dcmread(tmp_path / f"{kind}{number}.dcm"))
        assert [film.InstanceNumber for film in films] == [1, 2]
        for keyword in ("SeriesInstanceUID", "SeriesDescription", "SeriesDate", "SeriesTime", "SeriesNumber"):
            assert films[0].get(keyword) == films[1].get(keyword), keyword
        write(tmp_path / "lesion.dcm", [film], [mask], dataclasses.replace(context, target="lesion"))
        lesion = pydicom.dcmread(tmp_path / "lesion.dcm")
        assert lesion.SeriesDescription != films[0].SeriesDescription
        series |= {lesion.SeriesInstanceUID, films[0].SeriesInstanceUID}
    assert len(series) == 6


def test_a_failed_check_leaves_nothing(tmp_path: Path):
    result = pydicom.Dataset()
    result.SOPClassUID, result.SOPInstanceUID = "1.2", "1.3"
    result.file_meta = pydicom.FileMetaDataset()
    result.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    for error, raised in (
        (DataError("differs"), DataError),
        (ValueError("odd"), DataError),
        (MemoryError(), MemoryError),
    ):

        def check(_: pydicom.Dataset, error: Exception = error) -> None:
            raise error

        with pytest.raises(raised):
            write_checked(tmp_path / "out" / "a.dcm", result, result, check)
        assert list((tmp_path / "out").iterdir()) == []
    write_checked(tmp_path / "out" / "a.dcm", result, result, lambda _: None)
    assert pydicom.dcmread(tmp_path / "out" / "a.dcm").SOPInstanceUID == "1.3"


def test_warnings_of_libraries_stay_inside():

    with quiet():
        warnings.warn("odd value", UserWarning, stacklevel=1)
    with pytest.warns(UserWarning, match="after"):
        warnings.warn("after", UserWarning, stacklevel=1)


def test_highdicom_is_loaded_by_what_writes_only():
    program = (
        "import sys, tmca, tmca.imaging.dicom.results, tmca.imaging.dicom.segmentation, tmca.imaging.dicom.report\n"
    )
    program += "import tmca.imaging.dicom.capture, tmca.imaging.dicom.volume\n"
    program += "print([name for name in ('highdicom', 'pydicom', 'nibabel', 'torch') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
