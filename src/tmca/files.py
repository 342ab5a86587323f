"""Safe writing: a file or folder is either the old one or the new one, never half of it."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tmca.errors import DataError, StorageError

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a file in one step; missing parent folders are created.

    The bytes go to a temporary file in the same folder that then takes the name, so a reader never sees a partial file
    and a failure leaves the old one.

    Args:
        path: File to write or replace.
        data: Its new content.

    Raises:
        StorageError: The file could not be written.
    """
    with replace_file(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replace_file(path: Path | str) -> Iterator[Path]:
    """Write a file that takes the name ``path`` when the block ends without an exception.

    Missing parent folders are created. After an exception the old file is as it was and nothing is left of the new one.

    Args:
        path: File to write or replace.

    Yields:
        Where to write: a name in the same folder.

    Raises:
        StorageError: The file could not be written.
    """
    target = Path(path)
    temporary = sibling(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise storage_error(target, error) from error


def require_writable(path: Path | str) -> None:
    """Refuse a place where no file or folder can be made, before the work that takes long.

    Args:
        path: What will be written there; missing parent folders are created.

    Raises:
        StorageError: It could not be written.
    """
    target = Path(path)
    probe = sibling(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise storage_error(target, error) from error


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file in one step; line ends are written as they are. See :func:`write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path | str, value: Any) -> None:  # noqa: ANN401
    """Write a value as indented JSON in one step. See :func:`write_bytes`."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # File names may hold bytes that are no text; JSON has a way to write them.
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


@contextlib.contextmanager
def replace_folder(path: Path | str) -> Iterator[Path]:
    """Fill a new folder that takes the place of ``path`` when the block ends without an exception.

    The old folder is renamed aside, the new one takes its name, then the old one is deleted; after an exception the old
    folder is as it was.

    Args:
        path: Folder to create or replace.

    Yields:
        An empty temporary folder next to ``path``.

    Raises:
        StorageError: ``path`` is a file, or the folder could not be written.
    """
    target = real_path(path)
    if target.exists() and not target.is_dir():
        raise StorageError(f"{target} is a file, expected a folder", hint="choose another folder")
    temporary = sibling(target)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise storage_error(target, error) from error
    try:
        yield temporary
        _exchange(temporary, target)
    except OSError as error:
        if error.filename is None or str(error.filename).startswith((str(temporary), str(target))):
            raise storage_error(target, error) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def refill_folder(path: Path | str) -> Iterator[Path]:
    """Fill a new folder whose content takes the place of that of ``path`` when the block ends without an exception.

    Unlike with :func:`replace_folder` the folder itself stays, and with it the hold on it: see :func:`held`. After an
    exception the old content is as it was.

    Args:
        path: A folder that exists.

    Yields:
        An empty temporary folder within ``path``.

    Raises:
        StorageError: The folder could not be written.
    """
    target = Path(path)
    fresh, aside = sibling(target / "fresh"), sibling(target / "aside")
    try:
        fresh.mkdir()
        aside.mkdir()
        yield fresh
        _exchange_content(fresh, target, aside)
    except OSError as error:
        if error.filename is None or str(error.filename).startswith(str(target)):
            raise storage_error(target, error) from error
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def held(folder: Path | str, refusal: StorageError) -> Iterator[None]:
    """Hold a folder while the block runs: another process, or block, that asks for it meanwhile is refused.

    The hold ends with the process, however that ends. Where there are no such locks nothing is held.

    Args:
        folder: A folder that exists; the hold is on itself, not on its name, so that it must not be replaced meanwhile.
        refusal: What is raised where somebody holds it already, or has replaced it in this moment.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise refusal from None
        except OSError:  # no locks on this file system
            yield
            return
        try:
            if not _is_open_as(descriptor, folder):
                raise refusal
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # loader processes may have inherited it
    finally:
        os.close(descriptor)


def files_below(folder: Path | str, leave_out: Path | None = None) -> list[Path]:
    """Return the files of a folder and of those below it, sorted; linked folders too, names that begin with a dot not.

    Args:
        folder: Where to look.
        leave_out: A folder below it that is not looked into.
    """
    root, left_out = Path(folder), None if leave_out is None else real_path(leave_out)
    seen: set[Path] = set()
    found = []
    for name, folders, files in os.walk(root, followlinks=True):
        place, real = Path(name), real_path(name)
        if real in seen or (real == left_out and place != root):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        found += [place / each for each in files if not each.startswith(".") and (place / each).is_file()]
    return sorted(found)


def expanded(path: Path | str) -> Path:
    """Return a path that a user named, with ``~`` filled in where there is such a user."""
    with contextlib.suppress(RuntimeError):
        return Path(path).expanduser()
    return Path(path)


def real_path(path: Path | str) -> Path:
    """Return the absolute path without links; a link that leads to itself stays (``Path.resolve`` raises there)."""
    return Path(os.path.realpath(path))


def sha256_of(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal digits.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}", hint="check the path and its permissions") from error


def recorded_sha256_of(path: Path | str) -> str:
    """Return :func:`sha256_of`, computed once in a process as long as the file's size and time stay the same."""
    try:
        status = Path(path).stat()
    except OSError:
        return sha256_of(path)
    return _recorded(str(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1_000_000)
def _recorded(path: str, size: int, changed: int) -> str:  # noqa: ARG001
    return sha256_of(path)


def home() -> Path:
    """Return the folder of models and caches: ``$TMCA_HOME``, or ``~/.cache/tmca``.

    Raises:
        StorageError: ``TMCA_HOME`` lies in the folder of a user who does not exist.
    """
    folder = Path(os.environ.get("TMCA_HOME", "") or Path.home() / ".cache" / "tmca")
    try:
        return folder.expanduser()
    except RuntimeError as error:
        raise StorageError(f"TMCA_HOME is {str(folder)!r}: there is no such user", hint="give a whole path") from error


def sibling(target: Path) -> Path:
    """Return a name beside a file or folder for what will take its place; nobody else has it."""
    return target.parent / f".tmp-{uuid.uuid4().hex}"


def _exchange(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    aside = sibling(target)
    target.rename(aside)
    try:
        new.rename(target)
    except BaseException:
        try:
            aside.rename(target)
        except OSError:
            if target.exists():  # another process was faster, and its folder is the new one
                shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange_content(fresh: Path, target: Path, aside: Path) -> None:
    moved: list[tuple[Path, Path]] = []
    try:
        for source, destination in ((target, aside), (fresh, target)):
            for entry in [each for each in source.iterdir() if each not in (fresh, aside)]:
                entry.rename(destination / entry.name)
                moved.append((entry, destination / entry.name))
    except BaseException:
        for before, after in reversed(moved):
            after.rename(before)
        raise


def _is_open_as(descriptor: int, folder: Path | str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), Path(folder).stat())
    except FileNotFoundError:
        return False


def storage_error(path: Path, error: OSError) -> StorageError:
    """Return what a failed write means to the user."""
    if error.errno in _DISK_FULL:
        hint = "the disk is full: free space or choose another folder"
    elif error.errno in _NO_PERMISSION:
        hint = "no permission to write there: change it or choose another folder"
    elif (blocking := next((each for each in path.parents if each.is_file()), None)) is not None:
        hint = f"{blocking} is a file: choose another folder"
    else:
        hint = "check the path or choose another folder"
    return StorageError(f"Cannot write {path}: {error.strerror or error}", hint=hint)
