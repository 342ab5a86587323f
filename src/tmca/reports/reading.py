"""A report from a file or standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from tmca.errors import DataError

MOST_BYTES = 1_000_000
"""Size up to which a file is taken for one report."""

STANDARD_INPUT = "-"


def read_report(source: str | Path) -> str:
    """Return the text of a report; line ends become newlines.

    Args:
        source: A UTF-8 text file, or ``-`` for standard input.

    Raises:
        DataError: It cannot be read, is larger than :data:`MOST_BYTES`, is no text, or is empty.
    """
    name = "Standard input" if str(source) == STANDARD_INPUT else str(source)
    content = _content(source, name)
    if len(content) > MOST_BYTES:
        raise DataError(f"{name} is larger than {MOST_BYTES // 1_000_000} MB", hint="give one report a file")
    hint = "give the report as a plain UTF-8 text file"
    if b"\0" in content:
        raise DataError(f"{name} is no text: it holds zero bytes", hint=hint)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is no UTF-8 text (byte {error.start} does not fit)", hint=hint) from error
    if not text.strip():
        raise DataError(f"{name} is empty", hint="give a file with the report's sentences")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _content(source: str | Path, name: str) -> bytes:
    if str(source) == STANDARD_INPUT:
        return sys.stdin.buffer.read(MOST_BYTES + 1)
    if Path(source).is_dir():
        raise DataError(f"{name} is a folder, expected a text file", hint="name one report")
    try:
        with Path(source).open("rb") as stream:
            return stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise DataError(
            f"Cannot read {name}: {error.strerror}", hint="check the path; - reads standard input"
        ) from error
