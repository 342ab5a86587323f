from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import os
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import FormData, UploadFile

from tmca.server.problems import InvalidRequestError, UnsupportedTypeError
from tmca.server.uploads import (
    distinct_names,
    files_of,
    remove_old_files,
    safe_name,
    suffix_of,
    texts_of,
    truth,
    value_of,
)

NIFTI = b"\x5c\x01\x00\x00" + bytes(400)


@pytest.mark.parametrize(
    ("head", "suffix"),
    [
        (b"\x89PNG\r\n\x1a\n", ".png"),
        (b"\xff\xd8\xff\xe0", ".jpg"),
        (b"II*\x00", ".tif"),
        (b"RIFF1234WEBP", ".webp"),
        (bytes(128) + b"DICM", ".dcm"),
        (b"II*\x00" + bytes(124) + b"DICM", ".dcm"),  # a preamble for readers of TIFF, which the standard allows
        (NIFTI, ".nii"),
        (gzip.compress(NIFTI, mtime=0), ".nii.gz"),
    ],
)
def test_a_file_is_known_by_its_first_bytes(head: bytes, suffix: str):
    assert suffix_of(head) == suffix


@pytest.mark.parametrize(
    "head", [b"", b"<svg", b"PK\x03\x04", b"%PDF-1.7", gzip.compress(b"text", mtime=0), b"\x1f\x8bbroken", bytes(200)]
)
def test_other_files_are_refused(head: bytes):
    with pytest.raises(UnsupportedTypeError) as caught:
        suffix_of(head)
    assert caught.value.hint


def test_a_bomb_is_not_unpacked():
    bomb = gzip.compress(NIFTI + bytes(300_000_000), compresslevel=1)
    assert suffix_of(bomb[: 2**20]) == ".nii.gz"


@given(st.text(max_size=300))
def test_any_file_name_becomes_a_harmless_one(filename: str):
    name = safe_name(filename)
    assert name
    assert len(name) <= 80
    assert name not in (".", "..")
    assert not set(name) & set("/\\\x00\n\r\t\"'<>|:*?")
    assert not name.startswith((".", " "))
    assert os.path.basename(name) == name  # noqa: PTH119 (what the system makes of it)


@pytest.mark.parametrize(
    ("filename", "name"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\pictures\\colon 1.JPG", "colon 1"),
        ("scan.nii.gz", "scan"),
        ("..", "image"),
        ("Müller.png", "Müller"),
        ("\u202egnp.png", "gnp"),
    ],
)
def test_names_without_folders(filename: str, name: str):
    assert safe_name(filename) == name


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ([], "missing"),
        ([("image", "text")], "holds text"),
        ([("image", UploadFile(io.BytesIO(b"1"))), ("image", UploadFile(io.BytesIO(b"2")))], "stands 2 times"),
    ],
)
def test_a_form_without_the_one_image_is_refused(fields: list[tuple[str, str | UploadFile]], reason: str):
    with pytest.raises(InvalidRequestError, match=reason):
        files_of(FormData(fields), "image", most=1)


@pytest.mark.parametrize(
    ("value", "reason"),
    [("a" * 20_001, "20001 characters"), ("a\x00b", "zero byte"), (UploadFile(io.BytesIO(b"1")), "is a file")],
)
def test_a_sentence_that_is_none_is_refused(value: str | UploadFile, reason: str):
    with pytest.raises(InvalidRequestError, match=reason):
        texts_of(FormData([("prompt", value)]), "prompt")


def test_fields_are_read_or_explained():
    form = FormData([("threshold", "0.3"), ("effect", "Yes"), ("blank", " ")])
    assert value_of(form, "threshold", float, 0.5) == 0.3
    assert value_of(form, "effect", truth, default=False) is True
    assert value_of(form, "blank", int, 7) == value_of(form, "absent", int, 7) == 7
    for name, read, kind in (
        ("effect", float, "a number"),
        ("threshold", int, "a whole"),
        ("threshold", truth, "true"),
    ):
        with pytest.raises(InvalidRequestError, match=kind):
            value_of(form, name, read, None)


@pytest.mark.parametrize(
    ("sent", "names"),
    [
        (["a.png", "b.png"], ["a", "b"]),
        (["ward1/scan.jpg", "ward2/scan.jpg", "ward3/scan_2.jpg"], ["scan", "scan_3", "scan_2"]),
        (["P#1.jpg", "P_1.jpg"], ["P_1_2", "P_1"]),
        (["scan_2.png", "Scan.png", "scan.png"], ["scan_2", "Scan", "scan_3"]),
        (["", ""], ["image", "image_2"]),
        (["a.png", "a.dcm"], ["a", "a_2"]),
    ],
)
def test_no_file_gets_the_name_of_another_one(sent: list[str], names: list[str]):
    assert distinct_names(sent) == names


def test_files_are_removed_before_they_are_too_old(tmp_path: Path):
    old, new = tmp_path / "page" / "hash" / "old.png", tmp_path / "page" / "tmp-interrupted"
    old.parent.mkdir(parents=True)
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 95, time.time() - 95))

    async def clean() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(remove_old_files(tmp_path / "page", 100.0, every=10.0), 0.5)

    asyncio.run(clean())
    assert not old.exists()
    assert new.exists()
    os.utime(new, (0, 0))
    asyncio.run(clean())
    assert not new.exists()
    shutil.rmtree(tmp_path / "page")
    asyncio.run(clean())
