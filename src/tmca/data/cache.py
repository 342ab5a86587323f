"""Decoded and resized cases in one memory-mapped file, so that a second epoch, and a second run, decode no picture.

The file's name is a hash of the bytes of all images and masks and of the size they are resized to: it can never be out
of date, and may be deleted at any time. Processes share its pages; what is mapped is not copied into their memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy.lib import format as npy

from tmca.data.manifest import Manifest, Record, file_hash
from tmca.data.preprocessing import Drawn, resize_image, resize_mask
from tmca.errors import DataError, StorageError
from tmca.files import home, storage_error
from tmca.imaging.reading import read_image, read_mask

FORMAT = 2
"""Raised whenever a decoded case would come out differently."""
GIGABYTES = 20.0
"""Room for decoded cases unless ``TMCA_CACHE_GB`` says otherwise."""
STALE_SECONDS = 24 * 3600
_CHUNK = 128

Planes = UInt8[np.ndarray, "4 size size"]


def decode(manifest: Manifest, record: Record, size: int) -> Planes:
    """Return a case resized: red, green, blue, and the mask as 0 and 1.

    Raises:
        DataError: A file is missing or damaged, or image and mask differ in size.
    """
    image_path, mask_path = manifest.image_path(record), manifest.mask_path(record)
    if mask_path is None:
        raise DataError(f"Case {record.id!r} has no mask", hint="fill its mask in the manifest or leave it out")
    image, mask = read_image(image_path), read_mask(mask_path)
    if image.shape[:2] != mask.shape:
        raise DataError(
            f"Mask {mask_path} is {mask.shape[1]}×{mask.shape[0]}, its image {image.shape[1]}×{image.shape[0]}",
            hint="export the mask at the image's size",
        )
    planes: Planes = np.empty((4, size, size), dtype=np.uint8)
    planes[:3] = resize_image(image, size).transpose(2, 0, 1)
    planes[3] = resize_mask(mask, size, size)
    return planes


def drawn(planes: Planes, text: str | None) -> Drawn:
    """Return views of the image and the mask of a decoded case."""
    return Drawn(planes[:3].transpose(1, 2, 0), planes[3].view(np.bool_), text)


class DecodedCache(Sequence[Planes]):
    """The cases of a manifest, decoded; see :func:`decode`.

    Args:
        manifest: The cases, in the order in which they are looked up.
        size: Height and width to which they are resized, in pixels.
        folder: Where the file lies; by default ``$TMCA_HOME/decoded``.

    It has no cases before :meth:`fill`.
    """

    def __init__(self, manifest: Manifest, size: int, folder: Path | None = None) -> None:
        self.manifest = manifest
        self.size = size
        self.path = (folder or home() / "decoded") / f"{_key(manifest, size)}.npy"
        self._cases: np.ndarray[Any, Any] | None = None

    def __len__(self) -> int:
        return len(self.manifest.records)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401
        return self._map()[index]

    def _map(self) -> Any:  # noqa: ANN401
        """Return the mapped file, which stays readable then even if it is deleted, and count it as used now."""
        if self._cases is None:
            with contextlib.suppress(OSError):
                os.utime(self.path)
            self._cases = np.load(self.path, mmap_mode="r")
        return self._cases

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapping behind: a worker process maps the file itself."""
        return self.__dict__ | {"_cases": None}

    @property
    def is_full(self) -> bool:
        """Whether the file is there; it is written aside and renamed, so it is complete then."""
        return self.path.exists()

    def fill(self, threads: int = 2) -> Iterator[int]:
        """Decode every case on several threads, yielding after each; nothing is left to do if the file is there.

        Raises:
            DataError: The first case that cannot be read; nothing is kept.
            StorageError: The file cannot be written.
        """
        if self.is_full:
            self._cases = None
            self._map()
            return
        shape = (len(self), 4, self.size, self.size)
        aside = self.path.with_name(f".tmp-{uuid.uuid4().hex}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            make_room(self.path.parent, int(np.prod(shape)))
            # Written, not mapped: on a full disk a write fails, while a mapped page kills the process.
            with aside.open("wb") as stream, ThreadPoolExecutor(threads) as pool:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                npy.write_array_header_1_0(stream, header)
                for first in range(0, len(self), _CHUNK):
                    records = self.manifest.records[first : first + _CHUNK]
                    decoded = pool.map(partial(decode, self.manifest, size=self.size), records)
                    for case, planes in enumerate(decoded, start=first):
                        stream.write(planes.data)
                        yield case
            _settle(aside, self.path)
            self._map()
        except OSError as error:
            raise storage_error(self.path, error) from error
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)


IN_USE_SECONDS = 3600.0


def make_room(folder: Path, needed: int) -> None:
    """Delete the files of decoded cases that were used longest ago, so that ``needed`` bytes fit into the limit.

    What was used within :data:`IN_USE_SECONDS` stays: this training's other split, or another training's.

    Raises:
        StorageError: The disk has too little room.
    """
    ages = {}
    for file in folder.iterdir():
        with contextlib.suppress(OSError):
            status = file.stat()
            ages[file] = (status.st_mtime, status.st_size)
    limit = cache_limit()
    kept = sum(size for _, size in ages.values())
    for file, (used, size) in sorted(ages.items(), key=lambda item: item[1]):
        if file.name.startswith(".tmp-"):
            spare = time.time() - used > STALE_SECONDS  # else another process is writing it
        else:
            spare = file.suffix == ".npy" and kept + needed > limit and time.time() - used > IN_USE_SECONDS
        if spare:
            with contextlib.suppress(OSError):  # on Windows a mapped file stays
                file.unlink()
                kept -= size
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"Decoded images need {needed / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free",
            hint="free space, or let TMCA_HOME name a folder on another disk",
        )


def cache_limit() -> float:
    """Return the room for decoded images in bytes.

    Raises:
        StorageError: ``TMCA_CACHE_GB`` is no number.
    """
    text = os.environ.get("TMCA_CACHE_GB", "")
    try:
        return float(text or GIGABYTES) * 1e9
    except ValueError as error:
        raise StorageError(f"TMCA_CACHE_GB is {text!r}", hint="expected a number of gigabytes, such as 20") from error


def _key(manifest: Manifest, size: int) -> str:
    paths = itertools.chain.from_iterable(
        (manifest.image_path(record), manifest.mask_path(record)) for record in manifest.records
    )
    hashes = [None if path is None else file_hash(path) for path in paths]
    return hashlib.sha256(json.dumps([FORMAT, size, hashes]).encode()).hexdigest()


def _settle(aside: Path, target: Path) -> None:
    try:
        aside.replace(target)
    except PermissionError:
        # On Windows a file that another process has mapped cannot be replaced; its content is the same.
        if not target.exists():
            raise
