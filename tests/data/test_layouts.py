from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from tmca.data.layouts import LAYOUTS, open_dataset
from tmca.errors import ConfigError, DataError
from tmca.imaging.raster import write_image, write_mask

DATASETS = Path(__file__).resolve().parents[3] / "shared" / "data"


def _image(path: Path) -> None:
    write_image(path.with_suffix(".jpg"), np.zeros((4, 4, 3), dtype=np.uint8))


def _mask(path: Path) -> None:
    write_mask(path.with_suffix(".png"), np.zeros((4, 4), dtype=bool))


@pytest.fixture
def medvlsm(tmp_path: Path) -> Path:
    root = tmp_path / "polyps"
    (root / "anns").mkdir(parents=True)
    for split, count in {"train": 6, "val": 2, "test": 2}.items():
        entries = []
        for number in range(count):
            name = f"{split}{number}"
            _image(root / "images" / name)
            _mask(root / "masks" / name)
            prompts = {"p0": "", "p1": "polyp", "p6": f"one polyp {name}", "p7": [f"{name} v{n}" for n in range(5)]}
            entries.append({"img_name": f"{name}.jpg", "mask_name": f"{name}.jpg", "prompts": prompts})
        (root / "anns" / f"{split}.json").write_text(json.dumps(entries))
    return root


@pytest.fixture
def qata(tmp_path: Path) -> Path:
    root = tmp_path / "films"
    (root / "prompt").mkdir(parents=True)
    for part, count in {"Train": 11, "Test": 3}.items():
        with (root / "prompt" / f"{part.lower()}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["Image", "Description"])
            for number in range(count):
                name = f"sub-S0{number}_ses-E{part}" if number % 2 else f"covid_{part}_{number}"
                writer.writerow([f"mask_{name}.png", f"Bilateral infection, {number}."])
                _image(root / part / "Images" / name.lower())
                _mask(root / part / "GTs" / f"mask_{name.lower()}")
    return root


def test_medvlsm(medvlsm: Path):
    manifest = open_dataset(medvlsm)
    assert manifest.splits == {"train": 6, "val": 2, "test": 2}
    first = manifest.records[0]
    assert (first.id, first.image, first.mask) == ("train0", "images/train0.jpg", "masks/train0.png")
    assert (first.text, first.text_provenance) == ("one polyp train0", "model")
    manifest.check(require_text=True, require_mask=True)


def test_prompt_levels(medvlsm: Path):
    assert all(record.text is None for record in open_dataset(medvlsm, prompt="p0").records)
    assert open_dataset(medvlsm, prompt="p1").sentences == ("polyp",)
    with pytest.raises(ConfigError, match=r"Unknown prompt level 'p66'; known: p0, .*did you mean 'p6'"):
        open_dataset(medvlsm, prompt="p66")
    with pytest.raises(DataError, match=r"train\.json, entry 0: no 'p2'"):
        open_dataset(medvlsm, prompt="p2")


def test_paraphrases_are_chosen_by_the_seed(medvlsm: Path):
    texts = [open_dataset(medvlsm, prompt="p7", seed=seed).sentences for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert all(
        text.startswith(f"{record.id} v") for record, text in zip(open_dataset(medvlsm).records, texts[0], strict=True)
    )
    assert len({text[-1] for text in texts[0]}) > 1


def test_qata(qata: Path):
    manifest = open_dataset(qata)
    assert manifest.splits == {"train": 8, "val": 3, "test": 3}
    assert [record.split for record in manifest.records[:11]] == ["train"] * 8 + ["val"] * 3
    second = manifest.records[1]
    assert second.image == "Train/Images/sub-s01_ses-etrain.jpg"
    assert second.mask == "Train/GTs/mask_sub-s01_ses-etrain.png"
    assert (second.id, second.patient_id) == ("sub-s01_ses-etrain", "S01")
    assert manifest.records[0].patient_id == ""
    assert second.text == "Bilateral infection, 1."
    manifest.check(require_text=True, require_mask=True)


def test_an_exact_name_wins_over_the_stem(medvlsm: Path):
    _mask(medvlsm / "images" / "train0")
    assert open_dataset(medvlsm).records[0].image == "images/train0.jpg"


def test_own_folder_and_manifest_file(tmp_path: Path):
    (tmp_path / "manifest.jsonl").write_text('{"image": "a.png"}')
    assert open_dataset(tmp_path).records == open_dataset(tmp_path / "manifest.jsonl").records
    (tmp_path / "manifest.csv").write_text("image\nb.png\n")
    assert open_dataset(tmp_path).records[0].id == "b"


def test_a_published_layout_wins_over_a_manifest_beside_it(medvlsm: Path):
    (medvlsm / "manifest.csv").write_text("image\nb.png\n")
    assert len(open_dataset(medvlsm).records) == 10


def test_missing_files_are_counted_and_named(medvlsm: Path, qata: Path):
    for number in range(4):
        (medvlsm / "images" / f"train{number}.jpg").unlink()
    with pytest.raises(DataError, match=r"4 files .* are missing: images/train0\.jpg, images/train1\.jpg, .*, …"):
        open_dataset(medvlsm)
    (qata / "Test/GTs/mask_covid_test_0.png").unlink()
    with pytest.raises(DataError, match=r"1 files .* are missing: Test/GTs/mask_covid_Test_0\.png"):
        open_dataset(qata)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[", "Cannot read"), ("{}", "no list"), ('[{"img_name": "a"}]', "no 'mask_name'"), ("[3]", "entry 0")],
)
def test_malformed_annotations_are_named(medvlsm: Path, content: str, message: str):
    (medvlsm / "anns" / "train.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(medvlsm)
    assert "train.json" in caught.value.message


def test_a_missing_column_is_named(qata: Path):
    (qata / "prompt" / "test.csv").write_text("Image,Descripton\na,b\n")
    with pytest.raises(DataError, match="rename 'Descripton' to 'Description'"):
        open_dataset(qata)


def test_an_unknown_layout_lists_what_was_looked_for(tmp_path: Path):
    with pytest.raises(DataError, match="is not known") as caught:
        open_dataset(tmp_path)
    assert all(name in caught.value.message for name in LAYOUTS)
    with pytest.raises(DataError, match="does not exist"):
        open_dataset(tmp_path / "missing")


def _dataset(name: str) -> Path:
    if not (DATASETS / name).is_dir():
        pytest.skip(f"the dataset {name} is not in {DATASETS}")
    return DATASETS / name


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "splits", "sentences", "patients"),
    [
        ("qata_cov19", {"train": 5716, "val": 1429, "test": 2113}, 395, True),
        ("kvasir_polyp", {"train": 800, "val": 100, "test": 100}, 322, False),
    ],
)
def test_published_datasets(name: str, splits: dict[str, int], sentences: int, patients: bool):
    manifest = open_dataset(_dataset(name))
    assert manifest.splits == splits
    assert len(manifest.sentences) == sentences
    assert any(record.patient_id for record in manifest.records) == patients
    manifest.fraction(0.1, seed=0).check(require_text=True, require_mask=True)
