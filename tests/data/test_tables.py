from __future__ import annotations

import importlib
import json
from pathlib import Path

import openpyxl
import pyarrow as pa
import pyarrow.parquet
import pytest

from tmca.data.tables import read_rows, write_rows
from tmca.errors import DataError, StorageError


def _xlsx(path: Path, rows: list[list[object]]) -> Path:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


def test_excel_sheets_are_read_as_strings(tmp_path: Path):
    rows = [["Image ", "text", None, "count"], ["a.png", "one, two", "x", 3], [None] * 4, ["b.png", None, None, 0.5]]
    path = _xlsx(tmp_path / "a.xlsx", rows)
    assert read_rows(path, ("Image",)) == [
        (2, {"Image": "a.png", "text": "one, two", "count": "3"}),
        (4, {"Image": "b.png", "text": "", "count": "0.5"}),
    ]
    with pytest.raises(DataError, match=r"a\.xlsx has no column 'Text'.*rename 'text' to 'Text'"):
        read_rows(path, ("Text",))


@pytest.mark.parametrize(("file", "rows"), [("a.xlsx", [["Image"]]), ("b.xlsx", [[]])])
def test_an_empty_sheet_is_explained(tmp_path: Path, file: str, rows: list[list[object]]):
    with pytest.raises(DataError, match=r"has no rows|no column"):
        read_rows(_xlsx(tmp_path / file, rows), ("Image",))


@pytest.mark.parametrize("file", ["a.xlsx", "a.parquet"])
def test_damaged_binary_tables_are_explained(tmp_path: Path, file: str):
    (tmp_path / file).write_bytes(b"PAR1 or PK, and then nothing")
    with pytest.raises(DataError, match=rf"{file} is not an? \w+ file that can be read") as caught:
        read_rows(tmp_path / file, ("image",))
    assert caught.value.hint


@pytest.mark.parametrize("value", ["[" * 200_000, '{"a":' * 200_000, "1" * 5000])
def test_json_that_python_gives_up_on_is_explained(tmp_path: Path, value: str):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"image": "a.png"}}\n{{"image": {value}}}\n')
    with pytest.raises(DataError, match=r"prompts\.jsonl, line 2: a number is too long, or .* nested") as caught:
        read_rows(path, ("image",))
    assert caught.value.hint == "one JSON object a line"


def test_parquet_of_other_programs(tmp_path: Path):
    table = pa.table({"image": ["a.png", "b.png"], "text": ["x", None], "age": [63, None], "box": [[1, 2], [3]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet", ("image",)) == [
        (1, {"image": "a.png", "text": "x", "age": "63"}),
        (2, {"image": "b.png", "text": "", "age": ""}),
    ]
    with pytest.raises(DataError, match="row 1: box holds several values"):
        read_rows(tmp_path / "a.parquet", ("image",), ("box",))
    with pytest.raises(DataError, match="has no column 'mask'"):
        read_rows(tmp_path / "a.parquet", ("mask",))


def test_blank_cells_of_a_written_parquet_are_null(tmp_path: Path):
    write_rows(tmp_path / "a.parquet", ["image", "text"], [{"image": "a", "text": ""}, {"image": "b", "text": ""}])
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert table.to_pylist() == [{"image": "a", "text": None}, {"image": "b", "text": None}]
    assert set(table.schema.types) == {pa.string()}


@pytest.mark.parametrize(("file", "package"), [("a.xlsx", "openpyxl"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_named(tmp_path: Path, file: str, package: str, monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise ImportError(name=name)

    (tmp_path / file).write_bytes(b"PK")
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(DataError, match=rf"{file}: .* need the package {package} \(pip install 'tmca\[data\]'\)"):
        read_rows(tmp_path / file, ("image",))


def test_only_known_endings_are_written(tmp_path: Path):
    with pytest.raises(StorageError, match=r"\.csv, \.jsonl or \.parquet"):
        write_rows(tmp_path / "a.xlsx", ["image"], [{"image": "a"}])


def test_a_number_that_is_none_is_a_blank_cell(tmp_path: Path):
    nan = float("nan")
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.png", "text": nan, "patient_id": nan}) + "\n")
    pyarrow.parquet.write_table(pa.table({"image": ["a.png"], "text": [nan]}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("image,text\na.png,nan\n")
    assert read_rows(tmp_path / "a.jsonl", ("image",)) == [(1, {"image": "a.png", "text": "", "patient_id": ""})]
    assert read_rows(tmp_path / "a.parquet", ("image",)) == [(1, {"image": "a.png", "text": ""})]
    assert read_rows(tmp_path / "a.csv", ("image",)) == [(2, {"image": "a.png", "text": "nan"})]


def test_a_column_that_stands_twice_is_refused_not_the_last_one_taken(tmp_path: Path):
    (tmp_path / "a.csv").write_text("image,text,note,note,,\na.png,one,x,y,,\n")
    assert read_rows(tmp_path / "a.csv", ("image",))[0][1]["text"] == "one"
    (tmp_path / "a.csv").write_text("image,text,text\na.png,one,two\n")
    with pytest.raises(DataError, match="2 columns 'text'"):
        read_rows(tmp_path / "a.csv", ("image",))
