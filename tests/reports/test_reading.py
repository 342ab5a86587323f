from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from tmca.errors import DataError
from tmca.reports.reading import MOST_BYTES, read_report


def test_a_file_is_read_with_newlines_and_without_a_mark(tmp_path: Path):
    path = tmp_path / "report.txt"
    path.write_bytes(b"\xef\xbb\xbfOne polyp.\r\nNo other.\rEnd")
    assert read_report(path) == "One polyp.\nNo other.\nEnd"


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"A polyp.")))
    assert read_report("-") == "A polyp."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \r\n", "is empty"),
        (b"A polyp\0", "zero bytes"),
        (b"\xe9t\xe9", "no UTF-8"),
        (b"a" * (MOST_BYTES + 1), "larger than 1 MB"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "report.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        read_report(path)
    assert str(path) in raised.value.message
    assert raised.value.hint


def test_folders_and_missing_files_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="folder"):
        read_report(tmp_path)
    with pytest.raises(DataError, match="Cannot read"):
        read_report(tmp_path / "none.txt")
