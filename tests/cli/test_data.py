from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from tmca import cli
from tmca.data.grammar import parse
from tmca.data.manifest import Manifest
from tmca.data.phantom import write_phantoms
from tmca.models import TMCA


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def tmca(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> Outcome:
        code = cli.run(["data", *map(str, arguments)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A folder in TGANet's layout, one of whose masks is missing and one of whose images is in no list."""
    root = tmp_path / "dataset"
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for number in range(8):
        pixels = np.full((20, 30), 40 * (number % 2), np.uint8)
        pixels[4:9, 2 : 8 + number] = 255
        Image.fromarray(pixels).convert("RGB").save(root / "images" / f"{number}.jpg")
        if number != 5:
            Image.fromarray(pixels > 127).save(root / "masks" / f"{number}.png")
    (root / "train.txt").write_text("0\n1\n2\n3\n5\n")
    (root / "val.txt").write_text("4\n6\n")
    return root


def test_importing_lists_what_does_not_fit(tmca: Callable[..., Outcome], dataset: Path, tmp_path: Path):
    outcome = tmca("import", dataset, "-o", tmp_path / "m.csv")
    assert outcome.code == 4
    assert "tganet: 4 train, 2 val; 0 distinct sentences" in outcome.out
    manifest = Manifest.read(tmp_path / "m.csv")
    assert [record.id for record in manifest.records] == ["0", "1", "2", "3", "4", "6"]
    assert all(len(record.image_sha256) == len(record.mask_sha256) == 64 for record in manifest.records)
    assert manifest.image_path(manifest.records[0]).is_file()
    with (tmp_path / "m.problems.csv").open() as stream:
        problems = {(row["kind"], Path(row["file"]).stem) for row in csv.DictReader(stream)}
    assert {("missing mask", "5"), ("unused image", "7"), ("unused mask", "7")} <= problems
    assert "1 rows of" in outcome.err


def test_the_problems_of_an_earlier_import_do_not_outlast_it(
    tmca: Callable[..., Outcome], dataset: Path, tmp_path: Path
):
    assert tmca("import", dataset, "-o", tmp_path / "m.csv").code == 4
    assert (tmp_path / "m.problems.csv").is_file()
    for name in ("images/5.jpg", "images/7.jpg", "masks/7.png"):
        (dataset / name).unlink()
    (dataset / "train.txt").write_text("0\n1\n2\n3\n")
    assert tmca("import", dataset, "-o", tmp_path / "m.csv", "--overwrite").code == 0
    assert not (tmp_path / "m.problems.csv").exists()


def test_sentences_written_into_a_published_folder_are_used(tmca: Callable[..., Outcome], dataset: Path):
    (dataset / "train.txt").write_text("0\n1\n2\n3\n")
    assert tmca("describe", dataset, "-o", dataset / "manifest.csv", "--grammar", "polyp", "--level", "p1").code == 0
    outcome = tmca("split", dataset, "-o", dataset / "again.csv", "--resplit")
    assert outcome.code == 0, outcome.err
    assert set(Manifest.read(dataset / "again.csv").sentences) <= {"polyp", "polyps"}
    assert Manifest.read(dataset / "again.csv").sentences


def test_importing_a_whole_folder_says_nothing_else(tmca: Callable[..., Outcome], dataset: Path, tmp_path: Path):
    for name in ("images/5.jpg", "images/7.jpg", "masks/7.png"):
        (dataset / name).unlink()
    (dataset / "train.txt").write_text("0\n1\n2\n3\n")
    outcome = tmca("import", "tganet", dataset, "-o", tmp_path / "m.jsonl", "--copy", tmp_path / "copy")
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "m.problems.csv").exists()
    copied = Manifest.read(tmp_path / "copy" / "manifest.csv")
    assert {path.name for path in (tmp_path / "copy" / "masks").iterdir()} == {f"{n}.png" for n in (0, 1, 2, 3, 4, 6)}
    assert Manifest.read(tmp_path / "m.jsonl").content_hash() == copied.content_hash()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("import", "-o", "m.csv"), 2, "needs a folder"),
        (("import", "a", "b", "c", "-o", "m.csv"), 2, "needs a folder"),
        (("import", "tgannet", ".", "-o", "m.csv"), 2, "did you mean 'tganet'?"),
        (("import", "nowhere", "-o", "m.csv"), 3, "does not exist"),
    ],
)
def test_a_wrong_import_is_explained(
    tmca: Callable[..., Outcome], arguments: tuple[str, ...], code: int, said: str, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    outcome = tmca(*arguments)
    assert outcome.code == code
    assert said in outcome.err
    assert not (tmp_path / "m.csv").exists()


def test_no_manifest_is_overwritten_by_accident(tmca: Callable[..., Outcome], phantoms: Manifest, tmp_path: Path):
    (tmp_path / "m.csv").write_text("mine")
    data = phantoms.root / "manifest.csv"
    for arguments in (
        ("import", data, "-o", tmp_path / "m.csv"),
        ("correct", data, "-o", tmp_path / "m.csv"),
        ("describe", data, "-o", tmp_path / "m.csv", "--grammar", "phantom"),
        ("split", data, "-o", tmp_path / "m.csv", "--resplit"),
    ):
        outcome = tmca(*arguments)
        assert outcome.code == 1
        assert "--overwrite" in outcome.err
        assert (tmp_path / "m.csv").read_text() == "mine"
        assert tmca(*arguments, "--overwrite").code == 0
        (tmp_path / "m.csv").write_text("mine")


@pytest.mark.parametrize("arguments", [("correct",), ("describe", "--grammar", "phantom"), ("import",)])
def test_the_name_of_a_manifest_is_checked_before_the_work(
    tmca: Callable[..., Outcome], tmp_path: Path, arguments: tuple[str, ...]
):
    outcome = tmca(*arguments, tmp_path / "nowhere", "-o", tmp_path / "m.txt")
    assert outcome.code == 1
    assert ".csv, .jsonl or .parquet" in outcome.err


def test_an_audit_tells_a_sound_dataset_from_a_faulty_one(tmca: Callable[..., Outcome], tmp_path: Path):
    sizes = {"size": 64, "seed": 3, "no_lesion_share": 0.0, "absent_share": 0.0}
    write_phantoms(tmp_path / "data", {"train": 10, "val": 4, "test": 4}, **sizes)
    data = tmp_path / "data" / "manifest.csv"
    sound = tmca("audit", data)
    assert sound.code == 0, sound.err + sound.out
    assert "0 errors" not in sound.out

    rows = Manifest.read(data)
    shutil.copy(rows.image_path(rows.records[0]), rows.image_path(rows.records[-1]))
    shutil.copy(rows.root / str(rows.records[0].mask), rows.root / str(rows.records[-1].mask))
    faulty = tmca("audit", data, "--report", tmp_path / "audit.html", "--preset", "tiny")
    assert faulty.code == 3
    assert "same_image_across_splits" in faulty.out
    assert rows.records[-1].id in (tmp_path / "audit.html").read_text("utf-8")
    printed = tmca("audit", data, "--json", "-q")
    assert printed.code == 3
    found = {finding["check"] for finding in json.loads(printed.out)["findings"]}
    assert "same_image_across_splits" in found


def test_an_audit_counts_tokens_with_the_tokenizer_that_is_named(
    tmca: Callable[..., Outcome], phantoms: Manifest, tiny_model: Callable[..., TMCA], tmp_path: Path
):
    tiny_model().save_pretrained(tmp_path / "model")
    data = phantoms.root / "manifest.csv"
    printed = json.loads(tmca("audit", data, "--json", "--tokenizer", tmp_path / "model").out)
    assert printed["token_limit"] == 24
    wrong = tmca("audit", data, "--tokenizer", "nowhere/at-all", "--offline")
    assert wrong.code == 5


def test_masks_become_sentences(tmca: Callable[..., Outcome], phantoms: Manifest, tmp_path: Path):
    data = Path(shutil.copytree(phantoms.root, tmp_path / "data"))
    bare = Manifest.read(data / "manifest.csv")
    arguments = ("describe", data, "-o", tmp_path / "d.csv", "--grammar", "phantom", "--level", "p1")
    outcome = tmca(*arguments)
    assert outcome.code == 0, outcome.err
    assert "note: " in outcome.err
    assert "carry ground truth" in outcome.err
    described = Manifest.read(tmp_path / "d.csv")
    assert len(described.records) == len(bare.records)
    assert {record.text for record in described.records} <= {"lesion", "lesions", "no lesion in the image"}
    assert {record.text_provenance for record in described.records} == {"from_mask"}


def test_where_nothing_was_described_nothing_is_written(
    tmca: Callable[..., Outcome], phantoms: Manifest, tmp_path: Path
):
    data = Path(shutil.copytree(phantoms.root, tmp_path / "data"))
    bare = Manifest.read(data / "manifest.csv")
    human = [replace(record, text_provenance="human") for record in bare.records]
    bare.with_records(human).write(data / "manifest.csv")
    outcome = tmca("describe", data, "-o", tmp_path / "d.csv", "--grammar", "phantom")
    assert outcome.code == 3
    assert f"{len(human)} keep the sentence they had (--replace-sentences replaces it)" in outcome.err
    assert "holds nothing to describe, and nothing was written" in outcome.err
    assert outcome.out == ""
    assert not (tmp_path / "d.csv").exists()


def test_wrong_sentences_are_corrected(tmca: Callable[..., Outcome], tmp_path: Path):
    sizes = {"size": 64, "seed": 3, "no_lesion_share": 0.0, "absent_share": 0.0}
    write_phantoms(tmp_path / "data", {"train": 4, "test": 2}, **sizes)
    data = Manifest.read(tmp_path / "data" / "manifest.csv")
    first, *others = data.records
    wrong = replace(first, text="nine lesions")
    data.with_records([wrong, *others]).write(tmp_path / "data" / "wrong.csv")
    outcome = tmca("correct", tmp_path / "data" / "wrong.csv", "-o", tmp_path / "data" / "right.csv")
    assert outcome.code == 0, outcome.err
    assert "1 of 6 sentences corrected (count 1)" in outcome.err
    assert "carry ground truth" in outcome.err
    assert f"{first.id}: nine lesions → " in outcome.out
    right = Manifest.read(tmp_path / "data" / "right.csv")
    assert right.records[1:] == data.records[1:]
    assert parse(right.records[0].text or "").count == parse(first.text or "").count


def test_splits_and_fractions_are_written(tmca: Callable[..., Outcome], phantoms: Manifest, tmp_path: Path):
    data = phantoms.root / "manifest.csv"
    refused = tmca("split", data, "-o", tmp_path / "s.csv")
    assert refused.code == 3
    assert "--resplit" in refused.err
    outcome = tmca(
        "split", data, "-o", tmp_path / "s.csv", "--train", "0.5", "--val", "0", "--test", "0.5", "--resplit"
    )
    assert outcome.code == 0, outcome.err
    total = len(phantoms.records)
    assert Manifest.read(tmp_path / "s.csv").splits == pytest.approx({"train": total / 2, "test": total / 2}, abs=1)
    outcome = tmca("split", data, "-o", tmp_path / "f.csv", "--fractions", "0.25", "0.5")
    assert outcome.code == 0, outcome.err
    quarter, half = (Manifest.read(tmp_path / f"f-{share}.csv") for share in (25, 50))
    assert {record.id for record in quarter.records} < {record.id for record in half.records}
    assert quarter.splits["val"] == half.splits["val"] == phantoms.splits["val"]
    outcome = tmca("split", data, "-o", tmp_path / "g.csv", "--fractions", "0.5", "--within", "train")
    assert outcome.code == 2
    assert "--within and --resplit do not go with it" in outcome.err
    outcome = tmca("split", data, "-o", tmp_path / "g.csv", "--fractions", "0.5", "--train", "0.9", "--test", "0")
    assert outcome.code == 2
    assert "--train, --val and --test do not go with it" in outcome.err
    assert not list(tmp_path.glob("g*.csv"))


def test_folds_are_written(tmca: Callable[..., Outcome], phantoms: Manifest, tmp_path: Path):
    data, output = phantoms.root / "manifest.csv", tmp_path / "cases.csv"
    outcome = tmca("split", data, "-o", output, "--folds", "3")
    assert outcome.code == 3
    assert "--resplit" in outcome.err
    outcome = tmca("split", data, "-o", output, "--folds", "3", "--resplit", "--val", "0.2")
    assert outcome.code == 0, outcome.err
    folds = [Manifest.read(tmp_path / f"cases-fold{number}.csv") for number in (1, 2, 3)]
    assert sum(fold.splits["test"] for fold in folds) == len(phantoms.records)
    assert not output.exists()
    for flags, words in (
        (("--fractions", "0.5"), "do not go together"),
        (("--within", "train"), "--within, --train and --test do not go with it"),
        (("--test", "0.5"), "--within, --train and --test do not go with it"),
    ):
        outcome = tmca("split", data, "-o", tmp_path / "g.csv", "--folds", "3", *flags)
        assert outcome.code == 2
        assert words in outcome.err
    outcome = tmca("split", data, "-o", output, "--folds", "3", "--resplit")
    assert outcome.code != 0
    assert "--overwrite" in outcome.err
    assert not list(tmp_path.glob("g*.csv"))


def test_a_validation_split_is_taken_from_training_as_the_refusal_says(
    tmca: Callable[..., Outcome], phantoms: Manifest, tmp_path: Path
):
    bare = [record for record in phantoms.records if record.split != "val"]
    phantoms.with_records(bare).write(tmp_path / "bare.csv")
    arguments = ("split", tmp_path / "bare.csv", "-o", tmp_path / "s.csv", "--within", "train")
    refused = tmca(*arguments)
    assert refused.code == 2
    assert "--test 0" in refused.err
    outcome = tmca(*arguments, "--train", "0.75", "--val", "0.25", "--test", "0")
    assert outcome.code == 0, outcome.err
    found = Manifest.read(tmp_path / "s.csv").splits
    assert found["test"] == phantoms.splits["test"]
    assert found["val"] == pytest.approx(phantoms.splits["train"] / 4, abs=1)
