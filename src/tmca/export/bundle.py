"""The bundle: one file with everything a machine without torch needs to segment, and proof that it is unchanged.

A bundle is a zip archive whose members are stored, not compressed, in a fixed order and with fixed times, followed by
the SHA-256 of all bytes before it. So equal models give equal files, a changed byte anywhere is noticed, and nothing in
it can unpack to more than it is. ``docs/reference/bundle.md`` has the format; :func:`tmca_run.read_bundle` reads it.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmca.errors import CheckpointError
from tmca.files import sha256_of
from tmca_run import DIGEST, RefusedError, read_bundle

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
FORMAT = "tmca-bundle"
FORMAT_VERSION = 1
ALWAYS = ("README.md", "licences/README.md", "licences/Apache-2.0.txt", "sbom.cdx.json", "tmca_run.py")
"""Members of every bundle besides the manifest, the graphs and the tokenizer."""
_EARLIEST = (1980, 1, 1, 0, 0, 0)
_READABLE = 0o100644 << 16


@dataclass(frozen=True)
class Bundle:
    """A bundle that was found unchanged and complete.

    Attributes:
        path: The file.
        sha256: Of the whole file: what to compare with whom it came from.
        manifest: What it says of itself.
        files: Name → content.
    """

    path: Path
    sha256: str
    manifest: dict[str, Any]
    files: dict[str, bytes]


def pack(manifest: dict[str, Any], files: Mapping[str, bytes]) -> bytes:
    """Return the bytes of a bundle.

    Args:
        manifest: What it says of itself; format, version and the hashes of its files are added.
        files: Name → content.
    """
    names = sorted(files)
    hashes = {name: hashlib.sha256(files[name]).hexdigest() for name in names}
    stated = {"format": FORMAT, "format_version": FORMAT_VERSION, **manifest, "files": hashes}
    described = (json.dumps(stated, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, content in [(MANIFEST, described), *((name, files[name]) for name in names)]:
            member = zipfile.ZipInfo(name, date_time=_EARLIEST)
            member.create_system, member.external_attr = 3, _READABLE
            archive.writestr(member, content)
        archive.comment = b"0" * DIGEST  # the digest's place
    content = stream.getvalue()[:-DIGEST]
    return content + hashlib.sha256(content).hexdigest().encode("ascii")


def open_bundle(path: Path) -> Bundle:
    """Return a bundle after checking every byte of it.

    Raises:
        CheckpointError: It is no bundle, of another version, was changed, or a file is missing, too many, compressed,
            or would be unpacked somewhere else.
        DataError: The file cannot be read.
    """
    digest = sha256_of(path)
    try:
        files = read_bundle(path)
        manifest = json.loads(files[MANIFEST])
        needed = [*ALWAYS, *(graph["file"] for graph in manifest["graphs"].values())]
        needed += [TOKENIZER] if manifest["text"] is not None else []
    except RefusedError as error:
        hint = "copy it again from where it was made; if it is newer than this tmca, upgrade that"
        raise CheckpointError(str(error.args[0]), hint=hint) from error
    except Exception as error:  # whatever zipfile and json make of bytes that were made to look like a bundle
        raise CheckpointError(f"{path} is no bundle: {error}", hint="copy it again from where it was made") from error
    missing = [name for name in needed if name not in files]
    if missing:
        raise CheckpointError(f"{path} lacks {missing[0]}", hint="make it again with `tmca export bundle`")
    return Bundle(path, digest, manifest, files)
