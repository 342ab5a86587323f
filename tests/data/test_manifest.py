from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmca.data.manifest import Manifest, Record
from tmca.errors import ConfigError, DataError, StorageError
from tmca.imaging.raster import write_image, write_mask


def _manifest(root: Path, count: int = 8, **values: str) -> Manifest:
    return Manifest(root, tuple(Record(id=f"c{n}", image=f"images/c{n}.png", **values) for n in range(count)), "toy")


def _drawn(root: Path, count: int = 4) -> Manifest:
    """A manifest whose files exist."""
    records = []
    for number in range(count):
        image, mask = f"images/{number}.png", f"masks/{number}.png"
        write_image(root / image, np.full((6, 8, 3), number, dtype=np.uint8))
        write_mask(root / mask, np.eye(6, 8, number, dtype=bool))
        records.append(Record(id=str(number), image=image, mask=mask, text=f"case {number}", split="train"))
    return Manifest(root, tuple(records), "drawn")


def _read(path: Path, content: str | bytes) -> Manifest:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return Manifest.read(path)


# Reading and writing ---------------------------------------------------------------------------------------------

word = st.text(st.characters(codec="utf-8", exclude_characters="/\\"), max_size=6).filter(
    lambda text: text == text.strip()
)
name = word.filter(lambda text: text not in ("", ".", ".."))
sentence = st.none() | st.text(st.characters(codec="utf-8"), max_size=20).filter(str.strip)


@st.composite
def record_tuples(draw: st.DrawFn) -> tuple[Record, ...]:
    ids = draw(st.lists(name, min_size=1, max_size=4, unique=True))
    return tuple(
        Record(
            id=case,
            image=f"images/{draw(name)}.png",
            mask=draw(st.none() | st.just("masks/a b,c.png")),
            text=draw(sentence),
            split=draw(word),
            patient_id=draw(word),
            modality=draw(word),
            language=draw(st.sampled_from(["en", "de"])),
            text_provenance=draw(st.sampled_from(["human", "llm"])),
            spacing=draw(st.sampled_from(["", "0.5,0.5"])),
            image_sha256=draw(st.sampled_from(["", "0f" * 32])),
        )
        for case in ids
    )


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@given(records=record_tuples())
def test_reading_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, records: tuple[Record, ...]
):
    root = tmp_path_factory.getbasetemp()
    manifest = Manifest(root, records, "toy")
    manifest.write(root / f"toy.{suffix}")
    assert Manifest.read(root / f"toy.{suffix}") == manifest


@pytest.mark.parametrize("place", ["moved.csv", "deeper/down/moved.jsonl", "../moved.parquet"])
def test_paths_are_rewritten_for_the_new_place(tmp_path: Path, place: str):
    manifest = _drawn(tmp_path / "data")
    path = tmp_path / "data" / place
    manifest.write(path)
    moved = Manifest.read(path)
    moved.check(require_text=True, require_mask=True)
    assert moved.content_hash() == manifest.content_hash()
    assert ".." not in moved.records[0].image or "deeper" in place


def test_only_the_image_column_is_needed(tmp_path: Path):
    manifest = _read(tmp_path / "manifest.csv", "image,colour\nimages/cat.png,red\n")
    assert manifest.records == (Record(id="cat", image="images/cat.png"),)
    assert manifest.name == tmp_path.name
    assert manifest.root == tmp_path


def test_blank_cells_take_defaults(tmp_path: Path):
    manifest = _read(tmp_path / "a.csv", "id,image,mask,text,language,split\n , a.png , ,  ,,train\n")
    assert manifest.records == (Record(id="a", image="a.png", mask=None, text=None, language="en", split="train"),)


def test_paths_lead_to_the_files_from_behind_a_link(tmp_path: Path):
    (tmp_path / "deep" / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "a" / "b")
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "x.png").write_bytes(b"x")
    Manifest(tmp_path / "ds", (Record("x", "x.png"),), "ds").write(tmp_path / "link" / "m.csv")
    written = Manifest.read(tmp_path / "link" / "m.csv")
    assert written.image_path(written.records[0]).read_bytes() == b"x"


def test_sentences_are_kept_to_the_letter(tmp_path: Path):
    manifest = _read(tmp_path / "a.csv", 'image,text\na.png," two polyps, located in ""top"" "\n')
    assert manifest.records[0].text == ' two polyps, located in "top" '


def test_a_byte_order_mark_is_accepted(tmp_path: Path):
    assert _read(tmp_path / "a.csv", "\ufeffimage\nä.png\n").records[0].id == "ä"


def test_json_lines_accept_null_numbers_and_blank_lines(tmp_path: Path):
    manifest = _read(tmp_path / "a.jsonl", '{"image": "a.png", "id": 7, "mask": null}\n\n{"image": "b.png"}')
    assert [record.id for record in manifest.records] == ["7", "b"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", " \n", "is empty"),
        ("a.csv", "image,text\n", "has no rows"),
        ("a.csv", "images,text\na.png,b\n", r"no column 'image'.*rename 'images'"),
        ("a.csv", "Image\na.png\n", "rename 'Image'"),
        ("a.csv", "image;mask\na.png;b\n", "commas"),
        ("a.csv", "image,text\na.png,x\n ,y\n", "line 3: the cell image is blank"),
        ("a.csv", "image,text\na.png,one polyp, in top\n", r"line 2: 2 cells expected, more.*double quotes"),
        ("a.csv", "image,text,split\na.png,one polyp\n", r"line 2: 3 cells expected, fewer.*leave cells blank"),
        ("a.csv", "id,image\n1,a.png\n1,b.png\n2,c.png\n2,d.png\n", r"a\.csv.* 2 ids more than once: 1, 2"),
        ("a.csv", "image\nx/a.png\ny/a.png\n", "more than once: a"),
        ("a.csv", "id,image\n../a,a.png\n", "line 2: the id '../a' holds a slash"),
        ("a.csv", "image\nimages\\a.png\n", r"line 2: the path images\\a\.png has backslashes.*forward slashes"),
        ("a.csv", b"image\n\xff\xfe.png\n", "not UTF-8"),
        ("a.csv", "image\n" + "a" * 200_000, "field larger than"),
        ("a.jsonl", '{"image": "a.png"}\n{"image"', "line 2: not JSON"),
        ("a.jsonl", "[1]", "line 1: expected a JSON object"),
        ("a.jsonl", '{"img": "a.png"}', "line 1 has no column 'image'"),
        ("a.jsonl", '{"image": ["a.png"]}', "line 1: image holds several values"),
        ("a.parquet", b"PAR1", "not a Parquet file"),
        ("a.xls", b"PK", r"let it be a \.csv, \.jsonl, \.parquet or \.xlsx file"),
    ],
)
def test_malformed_files_are_explained(tmp_path: Path, file: str, content: str | bytes, message: str):
    with pytest.raises(DataError, match=message) as caught:
        _read(tmp_path / file, content)
    assert file in caught.value.message
    assert caught.value.hint


def test_a_missing_file_is_explained(tmp_path: Path):
    with pytest.raises(DataError, match="No such file"):
        Manifest.read(tmp_path / "missing.csv")


def test_unknown_ending_is_refused_for_writing(tmp_path: Path):
    with pytest.raises(StorageError, match=r"\.csv, \.jsonl or \.parquet"):
        _manifest(tmp_path).write(tmp_path / "a.xml")


# Choosing --------------------------------------------------------------------------------------------------------


def test_splits(tmp_path: Path):
    manifest = _manifest(tmp_path, 3).with_records(
        [Record("a", "a", split="train"), Record("b", "b", split="val"), Record("c", "c", split="train")]
    )
    assert manifest.splits == {"train": 2, "val": 1}
    assert [record.id for record in manifest.split("train").records] == ["a", "c"]
    with pytest.raises(DataError, match=r"no split 'test'; it has train \(2\), val \(1\)"):
        manifest.split("test")


def test_select_keeps_the_order_and_refuses_unknown_ids(tmp_path: Path):
    assert [record.id for record in _manifest(tmp_path).select(["c5", "c2"]).records] == ["c2", "c5"]
    with pytest.raises(DataError, match="no case c9"):
        _manifest(tmp_path).select(["c9"])


def test_sentences_are_distinct_and_in_order(tmp_path: Path):
    texts = ["b", None, "a", "b"]
    manifest = _manifest(tmp_path).with_records(Record(str(n), "x", text=text) for n, text in enumerate(texts))
    assert manifest.sentences == ("b", "a")


@given(seed=st.integers(0, 9), shares=st.lists(st.floats(0.01, 1), min_size=2, max_size=4), shift=st.integers(0, 39))
def test_fractions_are_nested_and_independent_of_the_order(seed: int, shares: list[float], shift: int):
    manifest = _manifest(Path(), 40)
    chosen = [{record.id for record in manifest.fraction(share, seed).records} for share in sorted(shares)]
    assert all(smaller <= larger for smaller, larger in itertools.pairwise(chosen))
    assert [len(ids) for ids in chosen] == [max(1, round(share * 40)) for share in sorted(shares)]
    rotated = manifest.with_records(manifest.records[shift:] + manifest.records[:shift])
    assert {record.id for record in rotated.fraction(min(shares), seed).records} == chosen[0]


def test_fractions_depend_on_the_seed_and_keep_the_order():
    manifest = _manifest(Path(), 40)
    first, second = manifest.fraction(0.5, seed=1), manifest.fraction(0.5, seed=2)
    assert first != second
    assert list(first.records) == sorted(first.records, key=manifest.records.index)
    assert manifest.fraction(1.0, seed=1) == manifest


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_outside_its_range_is_refused(share: float):
    with pytest.raises(ConfigError, match="share in"):
        _manifest(Path()).fraction(share, seed=0)


# Hash and check --------------------------------------------------------------------------------------------------


def test_the_hash_ignores_order_and_names_of_files(tmp_path: Path):
    manifest = _drawn(tmp_path)
    original = manifest.content_hash()
    assert manifest.with_records(reversed(manifest.records)).content_hash() == original
    (tmp_path / "images/0.png").rename(tmp_path / "images/renamed.png")
    renamed = replace(manifest.records[0], image="images/renamed.png")
    assert manifest.with_records([renamed, *manifest.records[1:]]).content_hash() == original


@pytest.mark.parametrize("change", [{"id": "new"}, {"split": "val"}, {"text": "new"}, {"text": None}, {"mask": None}])
def test_the_hash_sees_every_change_of_a_record(tmp_path: Path, change: dict[str, str | None]):
    manifest = _drawn(tmp_path)
    changed = manifest.with_records([replace(manifest.records[0], **change), *manifest.records[1:]])
    assert changed.content_hash() != manifest.content_hash()


@pytest.mark.parametrize("file", ["images/1.png", "masks/1.png"])
def test_the_hash_sees_every_change_of_a_file(tmp_path: Path, file: str):
    manifest = _drawn(tmp_path)
    original = manifest.content_hash()
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes() + b" ")
    assert manifest.content_hash() != original
    (tmp_path / file).unlink()
    with pytest.raises(DataError, match=r"1\.png"):
        manifest.content_hash()


def test_hashes_of_the_files_are_written_and_tell_changes(tmp_path: Path):
    manifest = _drawn(tmp_path)
    manifest = manifest.with_records([*manifest.records[:3], replace(manifest.records[3], mask=None)])
    hashed = manifest.with_hashes()
    first, last = hashed.records[0], hashed.records[3]
    assert first.image_sha256 == hashlib.sha256((tmp_path / first.image).read_bytes()).hexdigest()
    assert first.mask_sha256 == hashlib.sha256((tmp_path / "masks/0.png").read_bytes()).hexdigest()
    assert len(last.image_sha256) == 64
    assert last.mask_sha256 == ""
    assert hashed.content_hash() == manifest.content_hash()
    hashed.write(tmp_path / "manifest.csv")
    read = Manifest.read(tmp_path / "manifest.csv")
    assert read.records == hashed.records
    assert read.with_hashes() == read
    (tmp_path / "masks/1.png").write_bytes(b"other")
    assert [a.id for a, b in zip(read.records, read.with_hashes().records, strict=True) if a != b] == ["1"]
    (tmp_path / "masks/1.png").unlink()
    with pytest.raises(DataError, match=r"1\.png"):
        read.with_hashes()


def test_check_accepts_what_is_complete(tmp_path: Path):
    _drawn(tmp_path).check(require_text=True, require_mask=True)
    _drawn(tmp_path).check(True, True)


def test_check_names_the_first_cases_and_how_many(tmp_path: Path):
    manifest = _drawn(tmp_path, 6)
    for number in range(1, 6):
        (tmp_path / f"images/{number}.png").unlink()
    with pytest.raises(
        DataError, match=r"5 of 6 cases of drawn have no image file: 1 \(images/1\.png\), 2 .*, 3 .*, …"
    ):
        manifest.check(require_text=False, require_mask=False)


def test_check_asks_for_text_and_mask_only_where_they_are_required(tmp_path: Path):
    manifest = _drawn(tmp_path)
    silent = manifest.with_records(replace(record, text=None) for record in manifest.records)
    silent.check(require_text=False, require_mask=True)
    with pytest.raises(DataError, match="4 of 4 cases of drawn have no sentence"):
        silent.check(require_text=True, require_mask=True)
    unmasked = manifest.with_records(replace(record, mask=None) for record in manifest.records)
    unmasked.check(require_text=True, require_mask=False)
    with pytest.raises(DataError, match="no mask file"):
        unmasked.check(require_text=True, require_mask=True)
    (tmp_path / "masks/2.png").unlink()
    with pytest.raises(DataError, match="1 of 4 cases of drawn have no mask file: 2"):
        manifest.check(require_text=True, require_mask=True)


def test_check_compares_sizes(tmp_path: Path):
    manifest = _drawn(tmp_path)
    write_mask(tmp_path / "masks/3.png", np.zeros((8, 6), dtype=bool))
    with pytest.raises(DataError, match="another size than its image: 3"):
        manifest.check(require_text=True, require_mask=True)


def test_json_lines_are_plain(tmp_path: Path):
    _manifest(tmp_path, 1, text="a").write(tmp_path / "a.jsonl")
    row = json.loads((tmp_path / "a.jsonl").read_text())
    assert row == {
        "id": "c0",
        "image": "images/c0.png",
        "text": "a",
        "language": "en",
        "text_provenance": "human",
    }


@pytest.mark.parametrize(
    ("column", "meant"),
    [("Patient_ID", "patient_id"), ("patient", "patient_id"), ("Text", "text"), ("sentence", "text"), ("Mask", "mask"),
     ("Subset", "split"), ("ID", "id")],
)  # fmt: skip
def test_a_column_that_is_nearly_ours_is_refused_not_left_out(tmp_path: Path, column: str, meant: str):
    (tmp_path / "manifest.csv").write_text(f"image,age,{column}\na.png,70,x\n")
    with pytest.raises(DataError, match=f"none called '{meant}'") as caught:
        Manifest.read(tmp_path / "manifest.csv")
    assert f"rename it to '{meant}'" in caught.value.hint


def test_a_column_beside_the_one_that_is_meant_is_left_out(tmp_path: Path):
    (tmp_path / "manifest.csv").write_text("image,text,sentence,patient_id,patient\na.png,one,two,P1,Anna\n")
    (record,) = Manifest.read(tmp_path / "manifest.csv").records
    assert (record.text, record.patient_id) == ("one", "P1")
