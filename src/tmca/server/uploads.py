"""What a client sends: files of a kind we read under names of ours, and fields of a known type."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import itertools
import re
import secrets
import shutil
import tempfile
import time
import unicodedata
import zlib
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from tmca.errors import TMCAError, unknown_name
from tmca.files import storage_error
from tmca.imaging.reading import case_name
from tmca.server.problems import ClientGoneError, InvalidRequestError, TooLargeError, UnsupportedTypeError

Value = TypeVar("Value")

COPY_BYTES = 2**20
SPOOL_BYTES, JOB_SPOOL_BYTES = 2**20, 2**15
"""Of a file that are kept in memory; a job has thousands of files. A larger one is an open temporary file."""
LONGEST_NAME = 80
LONGEST_PROMPT = 20_000
"""Letters of a sentence; a report may have as many, and no sentence comes near."""
MOST_FIELDS = 64
NIFTI_HEADERS = (b"\x5c\x01\x00\x00", b"\x00\x00\x01\x5c", b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")
_GZIP = b"\x1f\x8b"
_MAGIC = {
    (128, b"DICM"): ".dcm",  # first: what stands before it may look like a TIFF, on purpose
    (0, b"\x89PNG\r\n\x1a\n"): ".png",
    (0, b"\xff\xd8\xff"): ".jpg",
    (0, b"II*\x00"): ".tif",
    (0, b"MM\x00*"): ".tif",
    (8, b"WEBP"): ".webp",
    (0, b"BM"): ".bmp",
}
"""Where a file has which bytes → its ending."""


@dataclass(frozen=True)
class Upload:
    """A file that was sent.

    Attributes:
        path: Where it lies.
        digest: SHA-256 of its bytes.
        name: What its sender calls it, without folders and ending, harmless as a file name.
    """

    path: Path
    digest: str
    name: str


@asynccontextmanager
async def read_form(request: Request, most_files: int, known: Collection[str]) -> AsyncIterator[FormData]:
    """Read a multipart request; what does not fit into memory lies in a temporary file until the block ends.

    Args:
        request: Its body is not read yet.
        most_files: Files that it may hold.
        known: The names of its fields.

    Raises:
        InvalidRequestError: It is no multipart request, holds too much, or a field that is not known.
        UnsupportedTypeError: It has another content type.
        StorageError: There is no room for it.
        TooLargeError: It has more files than can be open.
        ClientGoneError: The client left before it was complete.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise UnsupportedTypeError(
            "The request is no multipart form", hint="curl: -F image=@colon.jpg -F 'prompt=one small polyp'"
        )
    parser = MultiPartParser(
        request.headers,
        request.stream(),
        max_files=most_files,
        max_fields=MOST_FIELDS,
        max_part_size=16 * LONGEST_PROMPT,
    )
    parser.spool_max_size = SPOOL_BYTES if most_files == 1 else JOB_SPOOL_BYTES
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise InvalidRequestError(f"The form cannot be read: {error.message}", hint="check how it was made") from error
    except ClientDisconnect as error:
        raise ClientGoneError("The client has left") from error
    except OSError as error:
        raise _not_stored(Path(tempfile.gettempdir()), error) from error
    except (ValueError, KeyError, OverflowError) as error:
        raise InvalidRequestError("The form cannot be read", hint="check how it was made") from error
    try:
        for name in form:
            if name not in known:  # a misspelt `prompt` must not become a mask without a sentence
                unknown = unknown_name("field", name[:LONGEST_NAME], known)
                raise InvalidRequestError(unknown.message, hint=unknown.hint)
        yield form
    finally:
        await form.close()


def files_of(form: FormData, name: str, *, most: int) -> list[UploadFile]:
    """Return the files of a field.

    Raises:
        InvalidRequestError: There is none, there are too many, or it holds text.
    """
    found = form.getlist(name)
    files = [value for value in found if isinstance(value, UploadFile)]
    if len(files) < len(found):
        raise InvalidRequestError(f"Field `{name}` holds text, expected a file", hint=f"curl: -F {name}=@FILE")
    if not files:
        raise InvalidRequestError(f"Field `{name}` is missing", hint=f"curl: -F {name}=@FILE")
    if len(files) > most:
        raise InvalidRequestError(f"Field `{name}` stands {len(files)} times, at most {most}", hint="send fewer")
    return files


def texts_of(form: FormData, name: str, *, most: int = 1) -> list[str]:
    """Return the values of a text field, without blank ends.

    Raises:
        InvalidRequestError: There are too many, one is too long, or it is a file.
    """
    values = form.getlist(name)
    if len(values) > most:
        raise InvalidRequestError(f"Field `{name}` stands {len(values)} times, at most {most}", hint="send fewer")
    texts = []
    for value in values:
        if isinstance(value, UploadFile):
            raise InvalidRequestError(f"Field `{name}` is a file, expected text", hint=f"curl: -F {name}=TEXT")
        if len(value) > LONGEST_PROMPT:
            raise InvalidRequestError(
                f"Field `{name}` has {len(value)} characters, at most {LONGEST_PROMPT}", hint="shorten it"
            )
        if "\x00" in value:
            raise InvalidRequestError(f"Field `{name}` holds a zero byte", hint="send text in UTF-8")
        texts.append(value.strip())
    return texts


def value_of(form: FormData, name: str, read: Callable[[str], Value], default: Value) -> Value:
    """Return the value of a field, or the default where it is missing or blank.

    Raises:
        InvalidRequestError: It cannot be read.
    """
    text = (texts_of(form, name) or [""])[0]
    if not text:
        return default
    try:
        return read(text)
    except (ValueError, OverflowError) as error:
        kinds = {float: "a number", int: "a whole number", natural: "a whole number from 0", truth: "true or false"}
        kind = kinds[read]
        raise InvalidRequestError(f"Field `{name}` is {text[:40]!r}, expected {kind}", hint="see /docs") from error


def natural(text: str) -> int:
    """Return the number that a field states.

    Raises:
        ValueError: It states none, or one below 0.
    """
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def truth(text: str) -> bool:
    """Return the truth value that a field states.

    Raises:
        ValueError: It states none.
    """
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]


async def save(file: UploadFile, folder: Path, name: str) -> Upload:
    """Write a file that was sent into a folder, under a name of ours and the ending of what it is.

    Args:
        file: From a form.
        folder: An existing folder.
        name: What to call it; not there yet.

    Raises:
        UnsupportedTypeError: It is not of a kind that is read.
        StorageError: It cannot be written.
        TooLargeError: More files are open than can be.
    """
    head = await file.read(COPY_BYTES)
    await file.seek(0)
    try:
        suffix = suffix_of(head)
    except UnsupportedTypeError as error:
        named = f"{file.filename[:LONGEST_NAME]!r}: " if file.filename else ""
        raise UnsupportedTypeError(f"{named}{error.message}", hint=error.hint) from error
    return await asyncio.to_thread(_copy, file.file, folder / f"{name}{suffix}", safe_name(file.filename or ""))


def distinct_names(filenames: Sequence[str]) -> list[str]:
    """Return harmless names for files that were sent: their own; of two alike the later one gets a number.

    None gets a name that another one was sent with, lest a mask be taken for that image's.
    """
    own = [safe_name(filename) for filename in filenames]
    kept, taken = {name.casefold() for name in own}, set[str]()
    names = list(own)
    changed = [name not in filename for name, filename in zip(own, filenames, strict=True)]
    for place in sorted(range(len(own)), key=changed.__getitem__):  # first those that are called just so
        numbers = itertools.count(2)
        while names[place].casefold() in taken or (names[place] != own[place] and names[place].casefold() in kept):
            names[place] = f"{own[place]}_{next(numbers)}"
        taken.add(names[place].casefold())
    return names


class SentNames:
    """Under which name an image lies here, by the name that it was sent with.

    A table may name it by the whole name that was sent, else by its last part, else by that without its ending.

    Args:
        sent: The name that each image was sent with, and the one that it got here.
    """

    def __init__(self, sent: Sequence[tuple[str, str]]) -> None:
        self._places: tuple[dict[str, list[str]], ...] = ({}, {}, {})
        self._meant: dict[str, str] = {}
        for name, stored in sent:
            for key, places in zip(self._keys(name), self._places, strict=True):
                places.setdefault(key, []).append(stored)

    @staticmethod
    def _keys(name: str) -> tuple[str, str, str]:
        path = PurePosixPath(unicodedata.normalize("NFC", name).replace("\\", "/"))
        return str(path), path.name, path.stem

    def stored(self, image: str) -> str:
        """Return where the image lies that a line of a table names.

        Raises:
            InvalidRequestError: No image was sent with that name, or several were, or another name meant it already.
        """
        hint = "send each under a name of its own, and name it so; with curl: -F 'image=@FILE;filename=NAME'"
        for key, places in zip(self._keys(image), self._places, strict=True):
            found = places.get(key, [])
            if len(found) > 1:
                raise InvalidRequestError(
                    f"`prompts` names {image[:80]!r}, and {len(found)} images were sent with that name", hint=hint
                )
            if found:
                before = self._meant.setdefault(found[0], self._keys(image)[0])
                if before != self._keys(image)[0]:
                    raise InvalidRequestError(
                        f"`prompts` names {before[:80]!r} and {image[:80]!r}, which would be the same image", hint=hint
                    )
                return found[0]
        raise InvalidRequestError(f"`prompts` names {image[:80]!r}, and no image was sent with that name", hint=hint)


def suffix_of(head: bytes) -> str:
    """Return the ending of a file by its first bytes, whatever its sender calls it.

    Raises:
        UnsupportedTypeError: It is not of a kind that is read.
    """
    if not head:
        raise UnsupportedTypeError("The file is empty", hint="send an image")
    content = _unpacked(head) if head.startswith(_GZIP) else head
    if content.startswith(NIFTI_HEADERS):
        return ".nii.gz" if head.startswith(_GZIP) else ".nii"
    for (start, magic), suffix in _MAGIC.items():
        if head[start : start + len(magic)] == magic:
            return suffix
    raise UnsupportedTypeError(
        "The file is no image of a kind that is read", hint="send PNG, JPEG, TIFF, BMP, WebP, DICOM or NIfTI"
    )


def safe_name(filename: str) -> str:
    """Return the last part of a sender's file name as a harmless name without ending."""
    last = re.split(r"[\\/]", unicodedata.normalize("NFC", filename))[-1]
    name = re.sub(r"[^\w .()-]+", "_", case_name(last)).strip(" ._")[:LONGEST_NAME]
    return name or "image"


def new_folder(parent: Path) -> Path:
    """Make a folder with a name nobody can guess.

    Raises:
        StorageError: It cannot be made.
    """
    folder = parent / secrets.token_urlsafe(12)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise storage_error(folder, error) from error
    return folder


def remove_folder(folder: Path) -> None:
    """Remove a folder and what is in it, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


async def remove_old_files(folder: Path, seconds: float, every: float = 60.0) -> None:
    """Remove files from a folder, for as long as this runs, before they are older than ``seconds``."""
    while True:
        await asyncio.to_thread(_remove_older, folder, seconds - every)
        await asyncio.sleep(every)


def _remove_older(folder: Path, seconds: float) -> None:
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and time.time() - path.stat().st_mtime > seconds:
                path.unlink()


def _not_stored(path: Path, error: OSError) -> TMCAError:
    """Return what a failed write means to the client."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return TooLargeError(
            "The request has more files than the server can keep open",
            hint="send fewer images at once; who runs the server can let it open more (`ulimit -n`)",
        )
    return storage_error(path, error)


def _unpacked(head: bytes) -> bytes:
    """Return the first bytes in a gzip stream; however much it holds, no more is unpacked."""
    try:
        return zlib.decompressobj(wbits=31).decompress(head, 4096)
    except zlib.error:
        return b""


def _copy(source: BinaryIO, path: Path, name: str) -> Upload:
    digest = hashlib.sha256()
    try:
        with path.open("xb") as stream:
            while block := source.read(COPY_BYTES):
                digest.update(block)
                stream.write(block)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise _not_stored(path, error) from error
    return Upload(path, digest.hexdigest(), name)
