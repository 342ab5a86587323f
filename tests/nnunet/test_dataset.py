from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tmca.data.cache import decode
from tmca.data.manifest import Manifest, Record
from tmca.errors import DataError
from tmca.imaging.raster import read_image, read_mask
from tmca.nnunet.dataset import case_names, export, write_cases


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(("image_size", "side"), [(None, 64), (32, 32)])
def test_phantoms_become_a_dataset_of_nnunet(phantoms: Manifest, tmp_path: Path, image_size: int | None, side: int):
    export(phantoms, tmp_path, image_size=image_size)
    raw = tmp_path / "raw" / "Dataset001_tmca"
    description = json.loads((raw / "dataset.json").read_text("utf-8"))
    assert description == {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "target": 1},
        "numTraining": 22,
        "file_ending": ".png",
    }
    mapping = json.loads((raw / "mapping.json").read_text("utf-8"))
    assert sorted(mapping.values()) == sorted(record.id for record in phantoms.records)
    (fold,) = json.loads((tmp_path / "preprocessed" / "Dataset001_tmca" / "splits_final.json").read_text("utf-8"))
    for split in ("train", "val"):
        assert [mapping[case] for case in fold[split]] == [record.id for record in phantoms.split(split).records]
    trained = fold["train"] + fold["val"]
    assert _names(raw / "labelsTr") == {f"{case}.png" for case in trained}
    assert _names(raw / "imagesTr") == {f"{case}_0000.png" for case in trained}
    assert _names(raw / "labelsTs") == {f"{case}.png" for case in mapping if case not in trained}
    records = {record.id: record for record in phantoms.records}
    for case, name in mapping.items():
        kind = "Tr" if case in trained else "Ts"
        image = Image.open(raw / f"images{kind}" / f"{case}_0000.png")
        label = Image.open(raw / f"labels{kind}" / f"{case}.png")
        assert (image.mode, image.size) == ("RGB", (side, side))
        assert (label.mode, label.size) == ("L", (side, side))
        planes = decode(phantoms, records[name], side)
        np.testing.assert_array_equal(np.asarray(image).transpose(2, 0, 1), planes[:3])
        np.testing.assert_array_equal(np.asarray(label), planes[3])


def test_images_of_several_sizes_keep_theirs(phantoms: Manifest, tmp_path: Path):
    record = phantoms.records[0]
    for kind, path in (("image", phantoms.image_path(record)), ("mask", phantoms.mask_path(record))):
        assert path
        Image.open(path).crop((0, 0, 50, 40)).save(tmp_path / f"{kind}.png")
    manifest = Manifest(tmp_path, (replace(record, image="image.png", mask="mask.png"),), "one")
    (case,) = write_cases(manifest, tmp_path / "images", tmp_path / "labels", image_size=None)
    np.testing.assert_array_equal(
        read_image(tmp_path / "images" / f"{case}_0000.png"), read_image(tmp_path / "image.png")
    )
    np.testing.assert_array_equal(read_mask(tmp_path / "labels" / f"{case}.png"), read_mask(tmp_path / "mask.png"))


def test_a_dataset_without_a_test_split_has_no_test_cases(phantoms: Manifest, tmp_path: Path):
    export(phantoms.with_records(record for record in phantoms.records if record.split != "test"), tmp_path)
    assert not (tmp_path / "raw" / "Dataset001_tmca" / "imagesTs").exists()


def test_a_dataset_without_validation_is_refused(phantoms: Manifest, tmp_path: Path):
    with pytest.raises(DataError, match="no split 'val'"):
        export(phantoms.split("train"), tmp_path)


def test_a_missing_image_is_refused(phantoms: Manifest, tmp_path: Path):
    manifest = phantoms.with_records([replace(phantoms.records[0], image="gone.png")])
    with pytest.raises(DataError, match=r"gone\.png"):
        write_cases(manifest, tmp_path, image_size=32)


def test_names_that_would_collide_stay_apart():
    ids = ("scan 1", "scan-1", "Scan.1", "scan_1", "ä", "…", "x" * 300)
    manifest = Manifest(Path(), tuple(Record(name, "a.png", split="train") for name in ids), "names")
    names = case_names(manifest)
    assert list(names.values()) == list(ids)
    assert list(names)[:5] == [
        "train00000_scan-1", "train00001_scan-1", "train00002_Scan-1", "train00003_scan-1", "train00004",
    ]  # fmt: skip
    assert max(map(len, names)) < 100


@given(st.lists(st.text(min_size=1), unique=True), st.sampled_from(["train", "val", "test", "außen"]))
def test_case_names_are_plain_and_distinct_whatever_the_ids(ids: list[str], split: str):
    manifest = Manifest(Path(), tuple(Record(name, "a.png", split=split) for name in ids), "names")
    names = case_names(manifest)
    assert len({name.lower() for name in names}) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in names)
    assert list(names.values()) == ids
