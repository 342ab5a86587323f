from __future__ import annotations

import csv
import itertools
import json
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import openpyxl
import pytest
from PIL import Image

from tmca.data.layouts import LAYOUTS, copy_dataset, open_dataset, read_layout, read_levels
from tmca.data.layouts.readers import patient_of
from tmca.data.manifest import Manifest, Record
from tmca.errors import ConfigError, DataError, StorageError
from tmca.imaging.raster import read_mask, write_image, write_mask

DATASETS = Path(__file__).resolve().parents[3] / "shared" / "data"


def _image(path: Path, suffix: str = ".jpg") -> None:
    write_image(path.with_name(path.name + suffix), np.zeros((4, 4, 3), dtype=np.uint8))


def _mask(path: Path, suffix: str = ".png") -> None:
    mask = np.eye(4, dtype=bool)
    if suffix == ".png":
        write_mask(path.with_name(path.name + suffix), mask)
    else:
        write_image(path.with_name(path.name + suffix), np.repeat(mask[:, :, None], 3, axis=2).astype(np.uint8) * 255)


def _csv(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)


def _json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _xlsx(path: Path, rows: list[list[str | None]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)


# One dataset of each layout, without fault --------------------------------------------------------------------------


def _medvlsm(root: Path) -> None:
    for split, count in {"train": 6, "val": 2, "test": 2}.items():
        entries = []
        for number in range(count):
            name = f"{split}{number}"
            _image(root / "images" / name)
            _mask(root / "masks" / name)
            prompts = {"p0": "", "p1": "polyp", "p6": f"one polyp {name}", "p7": [f"{name} v{n}" for n in range(5)]}
            entries.append({"img_name": f"{name}.jpg", "mask_name": f"{name}.jpg", "prompts": prompts})
        _json(root / "anns" / f"{split}.json", entries)


def _qata(root: Path) -> None:
    for part, count in {"Train": 11, "Test": 3}.items():
        rows = [["Image", "Description"]]
        for number in range(count):
            name = f"sub-S0{number}_ses-E{part}" if number % 2 else f"covid_{part}_{number}"
            rows.append([f"mask_{name}.png", f"Bilateral infection, {number}."])
            _image(root / part / "Images" / name.lower())
            _mask(root / part / "GTs" / f"mask_{name.lower()}")
        _csv(root / "prompt" / f"{part.lower()}.csv", rows)


def _lvit(root: Path) -> None:
    names = {
        "Train": ["Morozov_study_0255_12", "Morozov_study_0255_13", "Jun_radiopaedia_10_85902_1_case11_5"],
        "Val": ["Jun_Coronacases_case1_33"],
        "Test": ["bjorke_1"],
    }
    for part, stems in names.items():
        rows: list[list[str | None]] = [["Image", "text"]]
        for name in stems:
            rows.append([f"{name}.png", f"Sentence of {name}."])
            _image(root / f"{part}_Folder" / "img" / name)
            _mask(root / f"{part}_Folder" / "labelcol" / name)
        _xlsx(root / f"{part}_Folder" / f"{part}_text.xlsx", rows)


def _sgseg(root: Path) -> None:
    lists: dict[str, list[dict[str, object]]] = {}
    for part, count in {"train": 3, "valid": 2, "test": 1}.items():
        lists[part] = []
        for number in range(count):
            name = f"sub-S0{number}_ses-{part}"
            row = {"caption": f"infection {part} {number}.", "pulmonary_infection": 2, "pseudo_label": [1, 0]}
            lists[part].append({"image_path": f"mask_{name}.png", **row})
            _image(root / "images" / part / "images" / name.lower(), ".png")
            _mask(root / "images" / part / "masks" / f"mask_{name}")
    _json(root / "prompts" / "annotation.json", lists)


def _prolearn(root: Path) -> None:
    lists = {"train": ["covid_0001", "cxr_s09312-e23812-r1"], "val": ["cxr_s09313-e1-r1"], "test": ["cxr_s09314-e1-r2"]}
    for name in itertools.chain(*lists.values()):
        _image(root / "images" / name, ".png")
        _mask(root / "masks" / name)
        (root / "reports").mkdir(exist_ok=True)
        (root / "reports" / f"{name}.txt").write_text(f"report of {name}.\n")
    _json(root / "split.json", lists)


def _tganet(root: Path) -> None:
    for split, stems in {"train": ["a", "b", "c.1"], "val": ["d"]}.items():
        for name in stems:
            _image(root / "images" / name)
            _mask(root / "masks" / name, ".jpg")
        (root / f"{split}.txt").write_text("\n".join(stems) + "\n")


def _nnunet(root: Path) -> None:
    for name in ("case_001", "case_002", "case_003"):
        _image(root / "imagesTr" / f"{name}_0000", ".png")
        _mask(root / "labelsTr" / name)
    _image(root / "imagesTs" / "case_004_0000", ".png")
    _json(root / "dataset.json", {"channel_names": {"0": "RGB"}, "labels": {"background": 0, "polyp": 1}})


def _own(root: Path) -> None:
    _image(root / "pictures" / "a")
    _mask(root / "masks" / "a")
    Manifest(root, (Record("a", "pictures/a.jpg", "masks/a.png", "one polyp", "train"),), "own").write(
        root / "manifest.parquet"
    )


WRITERS: dict[str, Callable[[Path], None]] = {
    "medvlsm": _medvlsm,
    "qata": _qata,
    "lvit": _lvit,
    "sgseg": _sgseg,
    "prolearn": _prolearn,
    "tganet": _tganet,
    "nnunet": _nnunet,
    "manifest": _own,
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def written(layout: str) -> Path:
        root = tmp_path / layout
        root.mkdir()
        WRITERS[layout](root)
        return root

    return written


@pytest.fixture
def medvlsm(write: Callable[[str], Path]) -> Path:
    return write("medvlsm")


@pytest.fixture
def qata(write: Callable[[str], Path]) -> Path:
    return write("qata")


@pytest.fixture
def lvit(write: Callable[[str], Path]) -> Path:
    return write("lvit")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_recognised_and_read_without_problems(layout: str, write: Callable[[str], Path]):
    root = write(layout)
    imported = read_layout(root)
    assert imported.layout == layout
    assert imported.problems == ()
    assert imported.left_out == 0
    assert imported.counts == {}
    assert imported.manifest.root == root
    assert imported.manifest.name == root.name
    assert read_layout(root, layout) == imported
    assert open_dataset(root) == imported.manifest
    imported.manifest.check(require_text=False, require_mask=False)
    for record in imported.manifest.records:
        mask_path = imported.manifest.mask_path(record)
        if mask_path is not None:
            assert (read_mask(mask_path) == np.eye(4, dtype=bool)).mean() > 0.7  # a JPEG of 4 × 4 pixels blurs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_imported_manifest_reads_back_from_another_place(layout: str, write: Callable[[str], Path], tmp_path: Path):
    manifest = read_layout(write(layout)).manifest.with_hashes()
    path = tmp_path / "elsewhere" / "manifest.csv"
    manifest.write(path)
    back = open_dataset(path)
    assert back.content_hash() == manifest.content_hash()
    assert back.records[0].image.startswith("../")
    assert back.with_hashes() == back


# medvlsm ------------------------------------------------------------------------------------------------------------


def test_medvlsm(medvlsm: Path):
    manifest = open_dataset(medvlsm)
    assert manifest.splits == {"train": 6, "val": 2, "test": 2}
    first = manifest.records[0]
    assert (first.id, first.image, first.mask) == ("train0", "images/train0.jpg", "masks/train0.png")
    assert (first.text, first.text_provenance) == ("one polyp train0", "model")
    manifest.check(require_text=True, require_mask=True)


def test_prompt_levels(medvlsm: Path):
    assert all(record.text is None for record in open_dataset(medvlsm, prompt="p0").records)
    assert read_layout(medvlsm, prompt="p0").problems == ()
    assert open_dataset(medvlsm, prompt="p1").sentences == ("polyp",)
    with pytest.raises(ConfigError, match=r"Unknown prompt level 'p66'; known: p0, .*did you mean 'p6'"):
        open_dataset(medvlsm, prompt="p66")
    with pytest.raises(DataError, match=r"train\.json, entry 0: no prompt level 'p2'; it has p0, p1, p6, p7"):
        open_dataset(medvlsm, prompt="p2")


def test_paraphrases_are_chosen_by_the_seed(medvlsm: Path):
    texts = [open_dataset(medvlsm, prompt="p7", seed=seed).sentences for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert all(
        text.startswith(f"{record.id} v") for record, text in zip(open_dataset(medvlsm).records, texts[0], strict=True)
    )
    assert len({text[-1] for text in texts[0]}) > 1


def test_a_dataset_with_a_test_list_only(medvlsm: Path):
    (medvlsm / "anns" / "train.json").unlink()
    (medvlsm / "anns" / "val.json").unlink()
    imported = read_layout(medvlsm)
    assert imported.manifest.splits == {"test": 2}
    assert imported.counts == {"unused image": 8, "unused mask": 8}


def test_several_masks_of_one_image_get_their_own_ids(tmp_path: Path):
    """As CheXlocalize has them."""
    _image(tmp_path / "images" / "patient64832_study1_view2")
    entries = []
    for finding in ("edema", "atelectasis"):
        name = f"patient64832_study1_view2_{finding}"
        _mask(tmp_path / "masks" / name)
        entry = {"img_name": "patient64832_study1_view2.jpg", "mask_name": f"{name}.png"}
        entries.append({**entry, "prompts": {"p6": f"{finding} in a Chest Xray. "}})
    _json(tmp_path / "anns" / "test.json", entries)
    records = open_dataset(tmp_path).records
    assert [record.id for record in records] == [
        "patient64832_study1_view2_edema",
        "patient64832_study1_view2_atelectasis",
    ]
    assert {record.patient_id for record in records} == {"patient64832"}
    assert len({record.image for record in records}) == 1


def test_parts_in_subfolders(tmp_path: Path):
    """As CAMUS has them: a folder a part, one a class of mask, and a validation list of training images."""
    for part, splits in {"train": ("train", "val"), "test": ("test",)}.items():
        for number, split in enumerate(splits, start=1):
            name = f"patient000{number}_2CH_ED"
            _image(tmp_path / "images" / part / name, ".png")
            entries = []
            for target in ("mask_1", "mask_2"):
                _mask(tmp_path / "masks" / part / target / f"{name}_gt")
                entry = {"img_name": f"{name}.png", "mask_name": f"{target}/{name}_gt.png"}
                entries.append({**entry, "prompts": {"p0": "", "p6": [f"{target} a", f"{target} b"]}})
            _json(tmp_path / "anns" / f"{split}.json", entries)
    imported = read_layout(tmp_path)
    assert imported.problems == ()
    records = imported.manifest.records
    assert [record.mask for record in records[:2]] == [
        f"masks/train/mask_{n}/patient0001_2CH_ED_gt.png" for n in (1, 2)
    ]
    assert [record.id for record in records[2:4]] == [f"mask_{n}_patient0002_2CH_ED_gt" for n in (1, 2)]
    assert records[0].id == "masks_train_mask_1_patient0001_2CH_ED_gt"  # patient 1 of the test part has the same name
    assert records[4].id == "masks_test_mask_1_patient0001_2CH_ED_gt"
    assert [record.patient_id for record in records[::2]] == ["patient0001", "patient0002", "test-patient0001"]


def test_sequences_of_clinicdb(medvlsm: Path):
    rows = [["frame_id", "sequence_id", "png_image_path"], ["1", "7", "PNG/Original/train0.png"], ["2", "", "x.png"]]
    _csv(medvlsm / "metadata.csv", rows)
    records = open_dataset(medvlsm).records
    assert [record.patient_id for record in records[:2]] == ["sequence-7", ""]
    _csv(medvlsm / "metadata.csv", [["image", "device"], ["train0.jpg", "x"]])  # another dataset's table
    assert open_dataset(medvlsm).records[0].patient_id == ""


def test_sequences_of_clinicdb_are_known_by_the_numbers_of_its_frames(medvlsm: Path):
    for file in (medvlsm / "images").iterdir():
        file.unlink()
    for number in range(1, 613):
        (medvlsm / "images" / f"{number}.png").write_bytes(b"x")
        (medvlsm / "masks" / f"{number}.png").write_bytes(b"x")
    entries = [{"img_name": f"{n}.png", "mask_name": f"{n}.png", "prompts": {"p6": "one polyp"}} for n in range(1, 613)]
    (medvlsm / "anns" / "train.json").write_text(json.dumps(entries))
    for split in ("val", "test"):
        (medvlsm / "anns" / f"{split}.json").unlink(missing_ok=True)
    sequence = {int(record.id): record.patient_id for record in open_dataset(medvlsm).records}
    assert len(set(sequence.values())) == 29
    assert [sequence[n] for n in (1, 25, 26, 67, 68, 612)] == [f"sequence-{n}" for n in (1, 1, 2, 3, 4, 29)]
    assert all(sequence[n + 1] in (sequence[n], f"sequence-{int(sequence[n][9:]) + 1}") for n in range(1, 612))
    (medvlsm / "images" / "612.png").rename(medvlsm / "images" / "cover.png")  # no longer those 612 images
    entries[-1]["img_name"] = "cover.png"
    (medvlsm / "anns" / "train.json").write_text(json.dumps(entries))
    assert {record.patient_id for record in open_dataset(medvlsm).records} == {""}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "Cannot read"),
        ("{}", "no list"),
        ("[]", "no list of cases"),
        ('[{"img_name": "a"}]', "no 'mask_name'"),
        ("[3]", "entry 0"),
        ('[{"img_name": "a", "mask_name": "a", "prompts": "polyp"}]', "prompts are no object"),
    ],
)
def test_malformed_annotations_are_named(medvlsm: Path, content: str, message: str):
    (medvlsm / "anns" / "train.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(medvlsm)
    assert "train.json" in caught.value.message


# QaTa ---------------------------------------------------------------------------------------------------------------


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


def test_qata_with_the_publishers_folders(qata: Path):
    before = open_dataset(qata).content_hash()
    for part in ("Train", "Test"):
        (qata / part).rename(qata / f"{part} Set")
        (qata / f"{part} Set" / "GTs").rename(qata / f"{part} Set" / "Ground-truths")
    after = open_dataset(qata)
    assert after.content_hash() == before
    assert after.records[0].mask == "Train Set/Ground-truths/mask_covid_train_0.png"


def test_a_missing_column_is_named(qata: Path):
    (qata / "prompt" / "test.csv").write_text("Image,Descripton\na,b\n")
    with pytest.raises(DataError, match="rename 'Descripton' to 'Description'"):
        open_dataset(qata)


# LViT ---------------------------------------------------------------------------------------------------------------


def test_lvit(lvit: Path):
    manifest = open_dataset(lvit)
    assert manifest.splits == {"train": 3, "val": 1, "test": 1}
    assert [record.patient_id for record in manifest.records] == [
        "morozov_study_0255",
        "morozov_study_0255",
        "jun_radiopaedia_10",
        "jun_coronacases_case1",
        "",
    ]
    first = manifest.records[0]
    assert first.image == "Train_Folder/img/Morozov_study_0255_12.jpg"
    assert first.text == "Sentence of Morozov_study_0255_12."
    manifest.check(require_text=True, require_mask=True)


def test_lvit_tables_may_lie_beside_the_folders(lvit: Path):
    before = open_dataset(lvit)
    for part in ("Train", "Val", "Test"):
        (lvit / f"{part}_Folder" / f"{part}_text.xlsx").rename(lvit / f"{part}_text.xlsx")
    assert open_dataset(lvit) == before


@pytest.mark.parametrize("place", ["", "Train_Folder", "Val_Folder"])
def test_lvit_table_of_training_and_validation_together(lvit: Path, place: str):
    """As QaTa-COV19 has it: names of masks, and the column Description."""
    for part in ("Train", "Val"):
        (lvit / f"{part}_Folder" / f"{part}_text.xlsx").unlink()
        for file in (lvit / f"{part}_Folder" / "labelcol").iterdir():
            file.rename(file.with_name(f"mask_{file.name}"))
    names = ["Jun_Coronacases_case1_33", "Morozov_study_0255_12", "morozov_STUDY_0255_13", "nowhere"]
    rows: list[list[str | None]] = [["Image", "Description"], *([f"mask_{name}.png", name] for name in names)]
    _xlsx(lvit / place / "Train_Val_text.xlsx", rows)
    imported = read_layout(lvit)
    assert imported.manifest.splits == {"val": 1, "train": 2, "test": 1}
    assert imported.left_out == 1
    assert imported.counts == {"missing image": 1, "missing mask": 1, "unused image": 1, "unused mask": 1}
    assert imported.problems[0].file == "Train_Folder/img/nowhere.png"
    assert imported.manifest.records[0].mask == "Val_Folder/labelcol/mask_Jun_Coronacases_case1_33.png"


def test_lvit_without_its_tables_or_columns(lvit: Path):
    _xlsx(lvit / "Test_Folder" / "Test_text.xlsx", [["Image", "Descripton"], ["a", "b"]])
    with pytest.raises(DataError, match=r"Test_text\.xlsx.*rename 'Descripton' to 'Description'"):
        open_dataset(lvit)
    (lvit / "Test_Folder" / "Test_text.xlsx").unlink()
    with pytest.raises(DataError, match=r"has no Test_text\.xlsx \(copy it into Test_Folder"):
        open_dataset(lvit)
    (lvit / "Val_Folder" / "Val_text.xlsx").unlink()
    _xlsx(lvit / "Test_Folder" / "Test_text.xlsx", [["Image", "text"], ["bjorke_1.png", "x"]])
    with pytest.raises(DataError, match=r"has no Val_text\.xlsx or Train_Val_text\.xlsx"):
        open_dataset(lvit)


# SGSeg, ProLearn, TGANet, nnU-Net -----------------------------------------------------------------------------------


def test_sgseg(write: Callable[[str], Path]):
    manifest = open_dataset(write("sgseg"))
    assert manifest.splits == {"train": 3, "val": 2, "test": 1}
    record = manifest.records[3]
    assert record.image == "images/valid/images/sub-s00_ses-valid.png"
    assert record.mask == "images/valid/masks/mask_sub-S00_ses-valid.png"
    assert (record.text, record.patient_id) == ("infection valid 0.", "S00")


@pytest.mark.parametrize(
    ("value", "message"),
    [({}, "no lists of cases"), ({"train": {}}, "under 'train'"), ({"train": [{"caption": ""}]}, "'image_path'")],
)
def test_malformed_list_of_sgseg(write: Callable[[str], Path], value: object, message: str):
    root = write("sgseg")
    _json(root / "prompts" / "annotation.json", value)
    with pytest.raises(DataError, match=rf"annotation\.json.*{message}"):
        open_dataset(root)


def test_prolearn(write: Callable[[str], Path]):
    root = write("prolearn")
    manifest = open_dataset(root)
    assert manifest.splits == {"train": 2, "val": 1, "test": 1}
    assert [record.patient_id for record in manifest.records] == ["", "S09312", "S09313", "S09314"]
    assert manifest.records[0].text == "report of covid_0001."
    (root / "reports" / "covid_0001.txt").unlink()
    imported = read_layout(root)
    assert imported.counts == {"missing sentence": 1}
    assert imported.left_out == 0
    assert imported.manifest.records[0].text is None


def test_a_row_that_is_listed_twice(write: Callable[[str], Path]):
    """ProLearn's published list does that."""
    root = write("prolearn")
    lists = json.loads((root / "split.json").read_text())
    lists["test"] += [lists["test"][0], lists["train"][0]]
    _json(root / "split.json", lists)
    imported = read_layout(root)
    assert imported.manifest.splits == {"train": 2, "val": 1, "test": 1}
    assert [problem.problem for problem in imported.problems] == [
        "images/cxr_s09314-e1-r2.png and its mask are listed twice",
        "images/covid_0001.png and its mask are listed again, with another split",
    ]
    assert imported.left_out == 2
    with pytest.raises(DataError, match=r"2 problems in the lists of .*: repeated row images/cxr"):
        open_dataset(root)


def test_tganet(write: Callable[[str], Path]):
    manifest = open_dataset(write("tganet"))
    assert manifest.splits == {"train": 3, "val": 1}
    assert manifest.sentences == ()
    assert manifest.records[2].image == "images/c.1.jpg"
    assert manifest.records[2].id == "c.1"


def test_nnunet(write: Callable[[str], Path]):
    root = write("nnunet")
    manifest = open_dataset(root)
    assert manifest.splits == {"train": 3, "test": 1}
    first, last = manifest.records[0], manifest.records[-1]
    assert (first.image, first.mask, first.text) == ("imagesTr/case_001_0000.png", "labelsTr/case_001.png", None)
    assert last.mask is None
    _mask(root / "labelsTs" / "case_004")
    assert open_dataset(root).records[-1].mask == "labelsTs/case_004.png"


def test_nnunet_folds_and_texts(write: Callable[[str], Path]):
    root = write("nnunet")
    _json(root / "splits_final.json", [{"train": ["case_001"], "val": ["case_003"]}, {"train": ["case_002"]}])
    rows = [
        ["image", "text"],
        ["case_001", "one polyp"],
        ["CASE_002.png", "two"],
        ["case_004_0000.png", " "],
        ["x", "y"],
    ]
    _csv(root / "texts.csv", rows)
    imported = read_layout(root)
    assert [record.split for record in imported.manifest.records] == ["train", "", "val", "test"]
    assert [record.text for record in imported.manifest.records] == ["one polyp", "two", None, None]
    assert imported.counts == {"missing image": 1, "missing sentence": 2}
    assert imported.left_out == 1
    _csv(root / "texts.csv", [["name", "text"], ["case_001", "x"]])
    with pytest.raises(DataError, match=r"texts\.csv has no column 'image'"):
        open_dataset(root)


def test_further_channels_of_nnunet_are_used_and_those_of_no_case_listed(write: Callable[[str], Path]):
    root = write("nnunet")
    _image(root / "imagesTr" / "case_001_0001", ".png")
    assert read_layout(root).problems == ()
    _image(root / "imagesTr" / "case_009_0001", ".png")
    (root / "labelsTr" / "case_002.png").rename(root / "labelsTr" / "case_2.png")
    imported = read_layout(root)
    assert [(problem.kind, problem.file) for problem in imported.problems] == [
        ("missing mask", "labelsTr/case_002"),
        ("unused image", "imagesTr/case_009_0001.png"),
        ("unused mask", "labelsTr/case_2.png"),
    ]


def test_volumes_of_nnunet_are_refused_and_single_slices_are_not(write: Callable[[str], Path]):
    nibabel = pytest.importorskip("nibabel")
    root = write("nnunet")

    def save(slices: int) -> None:
        for name in ("imagesTr/case_005_0000", "labelsTr/case_005"):
            volume = np.zeros((8, 8, slices), np.uint8)
            nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), root / f"{name}.nii.gz")

    save(1)
    assert open_dataset(root).records[3].image == "imagesTr/case_005_0000.nii.gz"
    save(5)
    with pytest.raises(DataError, match=r"case_005_0000\.nii\.gz is a volume of 5 slices, expected single") as caught:
        read_layout(root)
    assert "case_005_0000.nii.gz#0" in caught.value.hint
    (root / "imagesTr" / "case_005_0000.nii.gz").write_bytes(b"damaged")
    assert len(read_layout(root).manifest.records) == 5  # for the audit to find


# Your own -----------------------------------------------------------------------------------------------------------


def test_own_folder_and_manifest_file(tmp_path: Path):
    (tmp_path / "manifest.jsonl").write_text('{"image": "a.png"}')
    assert open_dataset(tmp_path).records == open_dataset(tmp_path / "manifest.jsonl").records
    (tmp_path / "manifest.csv").write_text("image\nb.png\n")
    assert open_dataset(tmp_path).records[0].id == "b"


def test_missing_files_of_an_own_manifest_are_listed(tmp_path: Path):
    _image(tmp_path / "a")
    (tmp_path / "list.csv").write_text("id,image,mask\n1,a.jpg,\n2,a.jpg,m.png\n3,b.jpg,m.png\n")
    imported = read_layout(tmp_path / "list.csv")
    assert [record.id for record in imported.manifest.records] == ["1"]
    assert (imported.manifest.name, imported.layout, imported.left_out) == ("list", "manifest", 2)
    assert imported.counts == {"missing image": 1, "missing mask": 2}
    with pytest.raises(DataError, match="is a file, expected a folder"):
        read_layout(tmp_path / "list.csv", "qata")


def test_images_of_a_volume_are_found_in_its_file(tmp_path: Path):
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 2), np.int16), np.eye(4)), tmp_path / "scan.nii.gz")
    (tmp_path / "list.csv").write_text("id,image\n0,scan.nii.gz#0\n1,scan.nii.gz#1\n2,other.nii.gz#0\n")
    imported = read_layout(tmp_path / "list.csv")
    assert [record.image for record in imported.manifest.records] == ["scan.nii.gz#0", "scan.nii.gz#1"]
    assert imported.counts == {"missing image": 1}


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "manifest"])
def test_an_own_manifest_wins_over_the_published_lists_beside_it(layout: str, write: Callable[[str], Path]):
    root = write(layout)
    published = open_dataset(root)
    described = published.with_records(replace(record, text="described") for record in published.records)
    described.write(root / "manifest.csv")
    assert open_dataset(root).sentences == ("described",)
    assert open_dataset(root).name == published.name
    assert read_levels(root) == {}
    assert read_layout(root).manifest == published  # an import reads what was published
    assert read_layout(root, "manifest").manifest.sentences == ("described",)


@pytest.mark.parametrize("content", ["image,text,prompt_key\nb.png,x,p6\n", "image,text\nb.png\n", ""])
def test_a_table_of_the_publisher_beside_the_lists_is_passed_over_and_named(
    medvlsm: Path, content: str, capsys: pytest.CaptureFixture[str]
):
    published = open_dataset(medvlsm)
    assert capsys.readouterr().err == ""
    (medvlsm / "manifest.csv").write_text(content)
    assert open_dataset(medvlsm) == published
    assert "was read as medvlsm, not by its manifest.csv" in capsys.readouterr().err.replace("\n", " ")


# Names and problems -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("sub-S09312_ses-E23812_run-1_bp-chest_vp-ap_dx.png", "S09312"),
        ("mask_sub-s09312_ses-e23812.png", "S09312"),
        ("cxr_s09312-e23812-r1", "S09312"),
        ("covid_0001", ""),
        ("patient64832_study1_view2_lateral.jpg", "patient64832"),
        ("Morozov_study_0255_12.png", "morozov_study_0255"),
        ("Jun_Coronacases_case10_33.png", "jun_coronacases_case10"),
        ("Jun_radiopaedia_29_86491_1_case16_4.png", "jun_radiopaedia_29"),
        ("bjorke_1.png", ""),
        ("cju2r11x7sdgx0988o8ule0wl.jpg", ""),
        ("27.png", ""),
    ],
)
def test_patients_in_published_names(name: str, patient: str):
    assert patient_of(name) == patient


def test_an_exact_name_wins_over_the_stem(medvlsm: Path):
    _mask(medvlsm / "images" / "train0")
    imported = read_layout(medvlsm)
    assert imported.manifest.records[0].image == "images/train0.jpg"
    assert [(problem.kind, problem.file) for problem in imported.problems] == [("unused image", "images/train0.png")]
    assert open_dataset(medvlsm) == imported.manifest  # what no list names does not stand in the way of training


def test_names_match_by_stem_whatever_case_and_ending(medvlsm: Path):
    (medvlsm / "images" / "train0.jpg").rename(medvlsm / "images" / "TRAIN0.JPG")
    (medvlsm / "images" / "train1.jpg").unlink()
    _image(medvlsm / "images" / "Train1", ".png")
    records = open_dataset(medvlsm).records
    assert [record.image for record in records[:2]] == ["images/TRAIN0.JPG", "images/Train1.png"]


@pytest.mark.parametrize(("on_disk", "in_list"), [("NFD", "NFC"), ("NFC", "NFD")])
@pytest.mark.parametrize("layout", ["tganet", "prolearn", "nnunet"])
def test_names_match_however_their_accents_are_stored(
    write: Callable[[str], Path], layout: str, on_disk: str, in_list: str
):
    root = write(layout)
    name = unicodedata.normalize(on_disk, "Müller_1")
    listed = unicodedata.normalize(in_list, "Müller_1")
    if layout == "nnunet":
        _image(root / "imagesTr" / f"{name}_0000", ".png")
        _mask(root / "labelsTr" / unicodedata.normalize(in_list, name))
        _csv(root / "texts.csv", [["image", "text"], [listed, "one polyp"]])
        _json(root / "splits_final.json", [{"train": [], "val": [listed]}])
    else:
        _image(root / "images" / name)
        _mask(root / "masks" / name)
        (root / "reports").mkdir(exist_ok=True)
        (root / "reports" / f"{name}.txt").write_text("one polyp")
        (root / "val.txt").write_text(f"{listed}\n", encoding="utf-8")
        _json(root / "split.json", {"val": [listed]})
    record = read_layout(root, layout).manifest.split("val").records[0]
    assert unicodedata.is_normalized(on_disk, record.image)
    assert (root / record.image).is_file()
    assert record.mask is not None
    assert record.text == (None if layout == "tganet" else "one polyp")


def test_a_stem_of_two_files_is_ambiguous(medvlsm: Path):
    _mask(medvlsm / "masks" / "train0", ".jpeg")  # the list says train0.jpg
    imported = read_layout(medvlsm)
    assert len(imported.manifest.records) == 9
    (problem,) = imported.problems
    assert problem.kind == "ambiguous name"
    assert problem.problem == "masks/train0.jpg can be train0.jpeg or train0.png"
    with pytest.raises(DataError, match=r"1 problems .*: ambiguous name masks/train0\.jpg"):
        open_dataset(medvlsm)


def test_hidden_and_other_files_are_passed_over(medvlsm: Path):
    for name in ("._train0.jpg", ".DS_Store", "notes.txt"):
        (medvlsm / "images" / name).write_bytes(b"x")
    assert read_layout(medvlsm).problems == ()


def test_what_does_not_fit_is_listed_and_the_rest_kept(medvlsm: Path, tmp_path: Path):
    (medvlsm / "images" / "train0.jpg").unlink()
    (medvlsm / "masks" / "val1.png").unlink()
    _image(medvlsm / "images" / "orphan")
    entries = json.loads((medvlsm / "anns" / "test.json").read_text())
    entries[0]["prompts"]["p6"] = "  "
    _json(medvlsm / "anns" / "test.json", entries)
    imported = read_layout(medvlsm)
    assert [record.id for record in imported.manifest.records] == [
        *(f"train{n}" for n in range(1, 6)),
        *("val0", "test0", "test1"),
    ]
    assert [(problem.kind, problem.file) for problem in imported.problems] == [
        ("missing image", "images/train0.jpg"),
        ("missing mask", "masks/val1.jpg"),
        ("missing sentence", "images/test0.jpg"),
        ("unused image", "images/orphan.jpg"),
    ]
    assert imported.left_out == 2
    assert all(problem.file in problem.problem and problem.hint for problem in imported.problems)
    imported.write_problems(tmp_path / "problems.csv")
    with (tmp_path / "problems.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["kind"] for row in rows] == [problem.kind for problem in imported.problems]
    assert set(rows[0]) == {"kind", "file", "problem", "hint"}


def test_training_refuses_missing_files(medvlsm: Path, qata: Path):
    for number in range(4):
        (medvlsm / "images" / f"train{number}.jpg").unlink()
    with pytest.raises(DataError, match=r"4 problems .*: missing image images/train0\.jpg, .*, …") as caught:
        open_dataset(medvlsm)
    assert "tmca data import" in caught.value.hint
    (qata / "Test/GTs/mask_covid_test_0.png").unlink()
    with pytest.raises(DataError, match=r"1 problems .*: missing mask Test/GTs/mask_covid_Test_0\.png"):
        open_dataset(qata)


def test_a_dataset_without_any_file_is_refused(medvlsm: Path):
    for file in (medvlsm / "images").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"read as medvlsm, holds no case: the dataset's lists name images/train0\.jpg"):
        read_layout(medvlsm)


def test_one_name_in_two_splits_keeps_both_cases(lvit: Path):
    _image(lvit / "Test_Folder" / "img" / "Morozov_study_0255_12")
    _mask(lvit / "Test_Folder" / "labelcol" / "Morozov_study_0255_12")
    rows: list[list[str | None]] = [["Image", "text"], ["bjorke_1", "x"], ["Morozov_study_0255_12.png", "x"]]
    _xlsx(lvit / "Test_Folder" / "Test_text.xlsx", rows)
    ids = [record.id for record in open_dataset(lvit).records]
    assert ids[0] == "Train_Folder_img_Morozov_study_0255_12"
    assert ids[1] == "Morozov_study_0255_13"
    assert ids[-1] == "Test_Folder_img_Morozov_study_0255_12"


def test_unknown_layouts(tmp_path: Path, medvlsm: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is not known") as caught:
        open_dataset(tmp_path / "empty")
    assert all(name in caught.value.message for name in LAYOUTS)
    with pytest.raises(DataError, match=rf"name the folder inside it: {medvlsm}"):
        read_layout(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        open_dataset(tmp_path / "missing")
    with pytest.raises(DataError, match="does not exist"):
        read_layout(tmp_path / "missing", "qata")
    with pytest.raises(ConfigError, match=r"Unknown layout 'medvlms'.*did you mean 'medvlsm'"):
        read_layout(medvlsm, "medvlms")
    with pytest.raises(DataError, match=r"has not the layout qata; looked for prompt/train\.csv"):
        read_layout(medvlsm, "qata")


# Copying ------------------------------------------------------------------------------------------------------------


def test_a_copy_needs_nothing_else(write: Callable[[str], Path], tmp_path: Path):
    original = read_layout(write("tganet")).manifest.with_hashes()
    copy = copy_dataset(original, tmp_path / "copy")
    assert Manifest.read(tmp_path / "copy" / "manifest.csv").records == copy.records
    assert copy.root == tmp_path / "copy"
    for before, after in zip(original.records, copy.records, strict=True):
        assert copy.image_path(after).read_bytes() == original.image_path(before).read_bytes()
        mask_path, old_path = copy.mask_path(after), original.mask_path(before)
        assert mask_path is not None
        assert old_path is not None
        assert (read_mask(mask_path) == read_mask(old_path)).all()
        with Image.open(mask_path) as mask:
            assert mask.format == "PNG"
            assert set(np.unique(np.asarray(mask))) <= {0, 255}
    hashed = copy.with_hashes()
    assert [record.image_sha256 for record in hashed.records] == [record.image_sha256 for record in original.records]
    assert copy.records[0].mask_sha256 == ""
    copy.check(require_text=False, require_mask=True)


def test_copied_names_are_unique_and_images_shared(tmp_path: Path):
    _image(tmp_path / "x" / "a")
    _image(tmp_path / "y" / "a", ".PNG")
    _mask(tmp_path / "x" / "m")
    records = (
        Record("a", "x/a.jpg", "x/m.png"),
        Record("A", "y/a.PNG"),
        Record("a2", "x/a.jpg", None, "another sentence"),
    )
    copy = copy_dataset(Manifest(tmp_path, records, "toy"), tmp_path / "copy")
    assert [record.image for record in copy.records] == ["images/a.jpg", "images/A-2.png", "images/a.jpg"]
    assert [record.mask for record in copy.records] == ["masks/a.png", None, None]
    assert len(list((tmp_path / "copy" / "images").iterdir())) == 2


def test_a_copy_does_not_touch_other_files_and_is_complete_or_not_there(tmp_path: Path):
    _image(tmp_path / "a")
    manifest = Manifest(tmp_path, (Record("a", "a.jpg"),), "toy")
    with pytest.raises(StorageError, match="not empty"):
        copy_dataset(manifest, tmp_path)
    broken = manifest.with_records([*manifest.records, Record("b", "b.jpg")])
    with pytest.raises(DataError, match=r"b\.jpg does not exist"):
        copy_dataset(broken, tmp_path / "copy")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jpg"]
    (tmp_path / "copy").mkdir()
    assert len(copy_dataset(manifest, tmp_path / "copy").records) == 1


# Published data -----------------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "layout", "splits", "sentences", "patients"),
    [
        ("qata_cov19", "qata", {"train": 5716, "val": 1429, "test": 2113}, 395, 2130),
        ("kvasir_polyp", "medvlsm", {"train": 800, "val": 100, "test": 100}, 322, 0),
        ("mosmed_plus", "lvit", {"train": 78, "val": 10, "test": 10}, 48, 0),
    ],
)
def test_published_datasets(name: str, layout: str, splits: dict[str, int], sentences: int, patients: int):
    if not (DATASETS / name).is_dir():
        pytest.skip(f"the dataset {name} is not in {DATASETS}")
    imported = read_layout(DATASETS / name)
    manifest = imported.manifest
    assert imported.layout == layout
    assert imported.problems == ()
    assert manifest.splits == splits
    assert len(manifest.sentences) == sentences
    assert len({record.patient_id for record in manifest.records} - {""}) == patients
    manifest.fraction(0.1, seed=0).check(require_text=True, require_mask=True)
