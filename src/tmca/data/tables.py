"""Tables as rows of strings, whatever they are kept in: CSV, JSON Lines, Parquet or Excel."""

from __future__ import annotations

import csv
import difflib
import importlib
import io
import itertools
import json
import math
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tmca.errors import DataError, StorageError
from tmca.files import write_bytes, write_text

Row = tuple[int, dict[str, str]]
"""Line number in the file, and the cells by column."""

_WRITABLE = (".csv", ".jsonl", ".parquet")


def read_rows(path: Path, required: Iterable[str], single: Iterable[str] = ("image", "text", "prompt")) -> list[Row]:
    """Read a table as rows of strings.

    Args:
        path: A ``.csv`` or ``.jsonl`` file in UTF-8, with or without byte order mark, a ``.parquet`` file, or the first
            sheet of an ``.xlsx`` file. The last two need the extra ``data``.
        required: Columns that must be there.
        single: Columns whose cells must hold one value; a list or object in another column is left out.

    Returns:
        Line number and cells of each row; a null cell is an empty string, and so is a number that is not one (NaN), as
        pandas writes blank cells.

    Raises:
        DataError: Names the file and the line.
    """
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows, ".xlsx": _xlsx_rows}
    if path.suffix not in readers:
        raise DataError(f"{path} is not a table that can be read", hint=f"let it be a {_one_of(readers)} file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}", hint="check the path and its permissions") from error
    if not content.strip():
        raise DataError(f"{path} is empty", hint="expected a header line and one row an image")
    rows = list(readers[path.suffix](path, content, tuple(required), frozenset(single)))
    if not rows:
        raise DataError(f"{path} has no rows", hint="expected one row an image")
    return rows


def require_writable(path: Path) -> None:
    """Check by its name that :func:`write_rows` can write a file, before the work that fills it.

    Raises:
        StorageError: The ending is none of ``.csv``, ``.jsonl`` and ``.parquet``.
        DataError: The ending is ``.parquet`` and the extra ``data`` is not installed.
    """
    if path.suffix not in _WRITABLE:
        raise StorageError(
            f"Cannot write {path}: a table is CSV, JSON Lines or Parquet",
            hint=f"let the name end in {_one_of(_WRITABLE)}",
        )
    if path.suffix == ".parquet":
        _optional("pyarrow.parquet", path)


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Write a table in one step.

    Args:
        path: File ending in ``.csv``, ``.jsonl`` or ``.parquet`` (which needs the extra ``data``).
        columns: The columns in order.
        rows: The cells of each row, all columns. JSON Lines leave blank cells out, Parquet makes them null.

    Raises:
        StorageError: The ending is unknown or the file could not be written.
    """
    require_writable(path)
    if path.suffix == ".csv":
        # The csv module leaves a lone carriage return unquoted and would then read it as the end of the row.
        fragile = any("\r" in value for row in rows for value in row.values())
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(
            stream, columns, lineterminator="\n", quoting=csv.QUOTE_ALL if fragile else csv.QUOTE_MINIMAL
        )
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, stream.getvalue())
    elif path.suffix == ".jsonl":
        lines = (json.dumps({name: row[name] for name in columns if row[name]}) for row in rows)
        write_text(path, "".join(line + "\n" for line in lines))
    else:
        arrow = _optional("pyarrow", path)
        schema = arrow.schema([(name, arrow.string()) for name in columns])
        table = arrow.table({name: [row[name] or None for row in rows] for name in columns}, schema=schema)
        buffer = io.BytesIO()
        _optional("pyarrow.parquet", path).write_table(table, buffer)
        write_bytes(path, buffer.getvalue())


def missing_column(where: Path | str, name: str, columns: Sequence[str]) -> DataError:
    """Return the error for a column that a table lacks: it proposes which one to rename."""
    if len(columns) == 1 and any(mark in columns[0] for mark in ";\t"):
        return DataError(f"{where} has one column {columns[0]!r}", hint="separate the cells by commas")
    nearest = difflib.get_close_matches(name.lower(), [column.lower() for column in columns], n=1, cutoff=0.5)
    hint = "add it to the first line"
    if nearest:
        original = next(column for column in columns if column.lower() == nearest[0])
        hint = f"rename {original!r} to {name!r}"
    return DataError(f"{where} has no column {name!r}; it has {', '.join(map(repr, columns))}", hint=hint)


def _csv_rows(path: Path, content: bytes, required: tuple[str, ...], single: frozenset[str]) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(_decoded(path, content), newline=""))
    try:
        header = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = header
        _require(path, required, header)
        _refuse_repeated(path, header, {*required, *single})
        for row in reader:
            if None in row or None in row.values():
                found = "more" if None in row else "fewer"
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(header)} cells expected, {found} were found",
                    hint='put a sentence that holds commas in double quotes: "one polyp, located in top"; leave cells '
                    "blank, not out",
                )
            yield reader.line_num, dict(row)
    except csv.Error as error:
        is_long = "field larger" in str(error)
        hint = "check the quotes around the cells" + ", or use JSON Lines for so long a text" * is_long
        raise DataError(f"{path}, line {reader.line_num}: {error}", hint=hint) from error


def _jsonl_rows(path: Path, content: bytes, required: tuple[str, ...], single: frozenset[str]) -> Iterator[Row]:
    # Not splitlines(): JSON strings may hold the other line ends of Unicode.
    for line, text in enumerate(_decoded(path, content).split("\n"), start=1):
        if not text.strip():
            continue
        where = f"{path}, line {line}"
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON: {error}", hint="one JSON object a line") from error
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: a number is too long, or the values are nested too deeply", hint="one JSON object a line"
            ) from error
        if not isinstance(values, dict):
            raise DataError(f"{where}: expected a JSON object", hint='e.g. {"image": "images/1.png"}')
        _require(where, required, list(values))
        yield line, _cells(where, values, single)


def _parquet_rows(path: Path, content: bytes, required: tuple[str, ...], single: frozenset[str]) -> Iterator[Row]:
    arrow, parquet = _optional("pyarrow", path), _optional("pyarrow.parquet", path)
    try:
        table = parquet.read_table(io.BytesIO(content))
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file that can be read: {error}", hint="write it again") from error
    _require(path, required, table.column_names)
    for line, row in enumerate(table.to_pylist(), start=1):
        yield line, _cells(f"{path}, row {line}", row, single)


def _xlsx_rows(path: Path, content: bytes, required: tuple[str, ...], single: frozenset[str]) -> Iterator[Row]:
    openpyxl = _optional("openpyxl", path)
    try:
        with warnings.catch_warnings():  # about styles and validation rules of the sheet, which do not matter here
            warnings.simplefilter("ignore")
            book = openpyxl.load_workbook(io.BytesIO(content), read_only=True, data_only=True)
            lines = list(book.worksheets[0].iter_rows(values_only=True))
    except (zipfile.BadZipFile, OSError, KeyError, ValueError, IndexError) as error:
        raise DataError(f"{path} is not an Excel file that can be read: {error}", hint="save it as .xlsx") from error
    header = ["" if name is None else str(name).strip() for name in (lines[0] if lines else ())]
    _require(path, required, [name for name in header if name])
    _refuse_repeated(path, header, {*required, *single})
    for line, cells in enumerate(lines[1:], start=2):
        if any(cell is not None for cell in cells):
            padded = itertools.zip_longest(header, cells[: len(header)])
            yield line, _cells(f"{path}, line {line}", {name: cell for name, cell in padded if name}, single)


def _cells(where: str, values: Mapping[str, Any], single: frozenset[str]) -> dict[str, str]:
    cells = {}
    for name, value in values.items():
        if isinstance(value, dict | list):
            if name in single:
                raise DataError(f"{where}: {name} holds several values", hint="expected one string")
            continue
        is_whole = isinstance(value, float) and value.is_integer()  # Excel keeps every number as a float
        is_blank = value is None or (isinstance(value, float) and math.isnan(value))
        cells[name] = "" if is_blank else str(int(value) if is_whole else value)
    return cells


def _refuse_repeated(where: Path, columns: Sequence[str], meant: set[str]) -> None:
    for name in columns:
        if name in meant and columns.count(name) > 1:
            raise DataError(f"{where} has {columns.count(name)} columns {name!r}", hint="rename all but one")


def _require(where: Path | str, required: tuple[str, ...], columns: Sequence[str]) -> None:
    for name in required:
        if name not in columns:
            raise missing_column(where, name, columns)


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x})",
            hint="save it as UTF-8, in Excel: 'CSV UTF-8'",
        ) from error


def _optional(module: str, path: Path) -> Any:  # noqa: ANN401
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(
            f"{path}: {path.suffix} files need the package {package}", hint="pip install 'tmca[data]'"
        ) from error


def _one_of(endings: Iterable[str]) -> str:
    *first, last = endings
    return f"{', '.join(first)} or {last}"
