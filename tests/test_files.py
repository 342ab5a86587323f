from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from tmca.errors import DataError, StorageError
from tmca.files import (
    held,
    home,
    refill_folder,
    replace_file,
    replace_folder,
    require_writable,
    sha256_of,
    write_bytes,
    write_json,
    write_text,
)


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def _fail_with(number: int):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_write_creates_parents_and_replaces(tmp_path: Path):
    path = tmp_path / "a" / "b" / "note.txt"
    write_text(path, "old")
    write_text(path, "über\r\n")
    assert path.read_bytes() == "über\r\n".encode()
    assert _names(path.parent) == {"note.txt"}


def test_a_written_file_has_ordinary_permissions(tmp_path: Path):
    (tmp_path / "ordinary").write_bytes(b"")
    write_bytes(tmp_path / "written", b"")
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_write_json_is_readable_text(tmp_path: Path):
    write_json(tmp_path / "value.json", {"name": "größe", "values": [1, 2]})
    text = (tmp_path / "value.json").read_text(encoding="utf-8")
    assert "größe" in text
    assert json.loads(text) == {"name": "größe", "values": [1, 2]}


@pytest.mark.parametrize(
    ("number", "hint"),
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "permission"), (errno.EROFS, "permission"), (errno.EIO, "check")],
)
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, hint: str):
    path = tmp_path / "value.bin"
    write_bytes(path, b"old")
    monkeypatch.setattr(Path, "replace", _fail_with(number))
    with pytest.raises(StorageError, match=hint) as caught:
        write_bytes(path, b"new")
    assert str(path) in caught.value.message
    assert path.read_bytes() == b"old"
    assert _names(tmp_path) == {"value.bin"}


def test_an_interrupted_write_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "value.bin", b"new")
    assert _names(tmp_path) == set()


def test_a_parent_that_is_a_file_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/value\.bin"):
        write_bytes(tmp_path / "file" / "value.bin", b"")


def test_replace_folder_replaces_the_whole_folder(tmp_path: Path):
    target = tmp_path / "parent" / "model"
    for name in ("first", "second"):
        with replace_folder(target) as folder:
            assert folder.parent == target.parent
            (folder / name).write_text(name)
    assert _names(target) == {"second"}
    assert _names(target.parent) == {"model"}


def test_replace_folder_keeps_the_old_one_after_an_exception(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("")
    with pytest.raises(ZeroDivisionError), replace_folder(tmp_path / "model") as folder:
        (folder / "new").write_text(str(1 / 0))
    assert _names(tmp_path) == {"model"}
    assert _names(tmp_path / "model") == {"old"}


def test_replace_folder_restores_the_old_one_when_the_exchange_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("")
    rename = Path.rename

    def fail_for_the_new_folder(source: Path, destination: Path) -> Path:
        if (source / "new").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(source, destination)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_folder)
    with pytest.raises(StorageError, match="disk is full"), replace_folder(target) as folder:
        (folder / "new").write_text("")
    assert _names(tmp_path) == {"model"}
    assert _names(target) == {"old"}


def test_replace_folder_explains_a_full_disk_inside_the_block(tmp_path: Path):
    with pytest.raises(StorageError, match="disk is full"), replace_folder(tmp_path / "model"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert _names(tmp_path) == set()


def test_replace_folder_leaves_errors_about_other_files_alone(tmp_path: Path):
    with pytest.raises(FileNotFoundError), replace_folder(tmp_path / "model"):
        (tmp_path / "source").read_bytes()


def test_replace_folder_refuses_a_file(tmp_path: Path):
    (tmp_path / "model").write_text("precious")
    with pytest.raises(StorageError, match="is a file"), replace_folder(tmp_path / "model"):
        pytest.fail("the block must not run")
    assert (tmp_path / "model").read_text() == "precious"


def test_replace_folder_writes_through_a_link(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with replace_folder(tmp_path / "link") as folder:
        (folder / "new").write_text("")
    assert (tmp_path / "link").is_symlink()
    assert _names(tmp_path / "real") == {"new"}


def test_refill_folder_replaces_the_content_and_not_the_folder(tmp_path: Path):
    (tmp_path / "run" / "deep").mkdir(parents=True)
    (tmp_path / "run" / "deep" / "old").write_text("old")
    before = (tmp_path / "run").stat().st_ino
    with refill_folder(tmp_path / "run") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "new").write_text("new")
        assert (tmp_path / "run" / "deep" / "old").exists()
    assert (tmp_path / "run").stat().st_ino == before
    assert _names(tmp_path / "run") == {"deep"}
    assert _names(tmp_path / "run" / "deep") == {"new"}
    assert _names(tmp_path) == {"run"}


@pytest.mark.parametrize("fails", ["in the block", "at the old", "at the new"])
def test_refill_folder_keeps_the_old_content_after_an_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
):
    for name in ("a", "b"):
        (tmp_path / name).write_text("old")
    rename, moves = Path.rename, []

    def fail_in_the_middle(source: Path, destination: Path) -> Path:
        moves.append(source)
        if len(moves) == (2 if fails == "at the old" else 4):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(source, destination)

    monkeypatch.setattr(Path, "rename", fail_in_the_middle)

    def refill() -> None:
        with refill_folder(tmp_path) as folder:
            for name in ("b", "c"):
                (folder / name).write_text("new")
            if fails == "in the block":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError, match="disk is full"):
        refill()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "b": "old"}


def test_a_folder_is_held_by_one(tmp_path: Path):
    refusal = StorageError("held already")
    with held(tmp_path, refusal):
        with pytest.raises(StorageError, match="held already"), held(tmp_path, refusal):
            pytest.fail("the block must not run")
        with refill_folder(tmp_path) as folder:
            (folder / "new").write_text("")
        with pytest.raises(StorageError, match="held already"), held(tmp_path, refusal):
            pytest.fail("the block must not run")
    with held(tmp_path, refusal):
        pass


def test_a_folder_that_was_replaced_before_it_could_be_held_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fcntl = pytest.importorskip("fcntl")
    folder, lock = tmp_path / "run", fcntl.flock
    folder.mkdir()

    def replace_first(descriptor: int, operation: int) -> None:
        if operation != fcntl.LOCK_UN:
            folder.rename(tmp_path / "aside")
            folder.mkdir()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", replace_first)
    with pytest.raises(StorageError, match="held already"), held(folder, StorageError("held already")):
        pytest.fail("the block must not run")


def test_the_home_of_nobody_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMCA_HOME", "~nobody-of-this-name/x")
    with pytest.raises(StorageError, match="there is no such user"):
        home()


def test_the_home_may_be_named_from_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMCA_HOME", "~/models")
    assert home() == tmp_path / "models"


def test_sha256_of(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(DataError, match="missing"):
        sha256_of(tmp_path / "missing")


def test_a_replaced_file_is_the_new_one_or_the_old_one(tmp_path: Path):
    target = tmp_path / "deeper" / "a.bin"
    with replace_file(target) as temporary:
        assert temporary.parent == target.parent
        temporary.write_bytes(b"first")
        assert not target.exists()
    assert target.read_bytes() == b"first"

    def write_half(path: Path) -> None:
        path.write_bytes(b"second")
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"), replace_file(target) as temporary:
        write_half(temporary)
    assert [path.name for path in target.parent.iterdir()] == ["a.bin"]
    assert target.read_bytes() == b"first"
    with pytest.raises(StorageError), replace_file(target / "b.bin"):
        pass


def test_a_place_that_can_be_written_is_left_as_it_is(tmp_path: Path):
    require_writable(tmp_path / "deeper" / "x")
    assert list((tmp_path / "deeper").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Cannot write"):
        require_writable(tmp_path / "file" / "x")


def test_of_two_that_replace_a_folder_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "x").mkdir()
    rename = Path.rename

    def late(path: Path, target: Path) -> Path:
        if target == tmp_path / "x" and not target.exists():  # the other one is faster
            target.mkdir()
            (target / "theirs").touch()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(StorageError, match="Cannot write"), replace_folder(tmp_path / "x") as place:
        (place / "ours").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["theirs"]


def test_a_folder_that_cannot_be_put_back_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious").touch()
    rename, calls = Path.rename, []

    def once(path: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) > 1:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(StorageError, match="Cannot write"), replace_folder(tmp_path / "x"):
        pass
    assert len(list(tmp_path.rglob("precious"))) == 1
