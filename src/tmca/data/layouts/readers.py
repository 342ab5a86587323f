"""How each published folder layout is recognised and read: the only code that knows a dataset's quirks.

"left" in a sentence is left in the image, in all of them.
"""

from __future__ import annotations

import json
import re
from bisect import bisect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tmca.data.layouts.cases import CaseList, Folder, composed, stem
from tmca.data.manifest import COLUMNS, Manifest, seeded_number
from tmca.data.tables import missing_column, read_rows
from tmca.errors import DataError
from tmca.imaging.nifti import is_nifti, read_frames

OWN_NAMES = ("manifest.csv", "manifest.jsonl", "manifest.parquet")

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<number>\d{4})", re.DOTALL)
_COPY_AGAIN = "copy the dataset again"
_SPLITS = ("train", "val", "test")

_PATIENTS = (
    # BIMCV-COVID19+ in QaTa-COV19: sub-S09312_ses-E23812_run-1_…, and shortened by ProLearn: cxr_s09312-e23812-r1
    re.compile(r"(?:sub-|^cxr_)(?P<upper>s\d+)(?=[_-])", re.IGNORECASE),
    # CheXlocalize: patient64832_study1_view2_lateral, and CAMUS: patient0001_2CH_ED
    re.compile(r"^(?P<lower>patient\d+)_", re.IGNORECASE),
    # MosMedData+, a slice of a volume: Morozov_study_0255_12, Jun_coronacases_case1_33, and
    # Jun_radiopaedia_10_85902_3_case12_40, where 10 is the case, of which there can be several volumes.
    re.compile(r"^(?P<lower>morozov_study_\d+|jun_coronacases_case\d+|jun_radiopaedia_\d+)_", re.IGNORECASE),
)


def patient_of(name: str) -> str:
    """Return whom an image shows, as far as its published name tells, or an empty string."""
    for pattern in _PATIENTS:
        found = pattern.search(name)
        if found:
            groups = found.groupdict()
            return groups["upper"].upper() if "upper" in groups else groups["lower"].lower()
    return ""


# CVC-ClinicDB's published correspondence of frames and sequences: the first frame of each of the 29.
_CLINICDB_STARTS = (
    *(1, 26, 51, 68, 79, 104, 127, 152, 178, 200, 206, 228, 253, 278, 298, 318, 343, 364, 384, 409, 429, 448, 467),
    *(479, 504, 529, 547, 572, 592),
)
_CLINICDB_FRAMES = 612


# medvlsm ----------------------------------------------------------------------------------------------------------


def is_medvlsm(root: Path) -> bool:
    """Return whether there are lists of cases and images as medvlsm keeps them."""
    return (root / "images").is_dir() and any((root / "anns" / f"{split}.json").is_file() for split in _SPLITS)


def read_medvlsm(cases: CaseList, prompt: str, seed: int) -> None:
    """Read Kvasir-SEG, BKAI, ClinicDB and the other datasets of medvlsm."""
    sequences = _sequences(cases.root)
    for split in _SPLITS:
        path = cases.root / "anns" / f"{split}.json"
        if not path.is_file():
            continue
        part = _part(cases.root, split)
        images, masks = cases.images(f"images{part}"), cases.masks(f"masks{part}")
        for position, entry in enumerate(_json_list(path)):
            where = f"{path}, entry {position}"
            try:
                image_name, mask_name, prompts = str(entry["img_name"]), str(entry["mask_name"]), entry["prompts"]
            except (KeyError, TypeError) as error:
                raise DataError(f"{where}: no {error}", hint=_COPY_AGAIN) from error
            patient = sequences.get(stem(image_name).lower()) or patient_of(image_name)
            cases.add(
                images,
                image_name,
                masks,
                (mask_name,),
                text=_prompt(where, prompts, prompt, seeded_number(seed, Path(image_name).stem)),
                split=split,
                # CAMUS counts the patients of its test part from 1 again.
                patient_id=f"test-{patient}" if patient and part == "/test" else patient,
                # The authors derived count, size and place from the masks and asked a model for colour and shape.
                text_provenance="model",
            )


def _part(root: Path, split: str) -> str:
    """Return the subfolder of a split, as CAMUS has them: validation is taken from the images of training."""
    parts = (f"/{split}", "/train") if split == "val" else (f"/{split}",)
    return next((part for part in parts if (root / f"images{part}").is_dir()), "")


def _prompt(where: str, prompts: Any, level: str, number: int) -> str | None:  # noqa: ANN401
    if not isinstance(prompts, dict):
        raise DataError(f"{where}: the prompts are no object of levels", hint=_COPY_AGAIN)
    if level not in prompts:
        raise DataError(
            f"{where}: no prompt level {level!r}; it has {', '.join(map(str, prompts))}", hint="choose one of these"
        )
    text = prompts[level]
    if isinstance(text, list):
        text = text[number % len(text)] if text else ""
    return None if level == "p0" else str(text or "")


def _sequences(root: Path) -> dict[str, str]:
    """Return the video sequence of each frame's stem.

    From the table that comes with ClinicDB on Kaggle; without it, a folder of the 612 images 1 to 612 is ClinicDB.
    """
    path = root / "metadata.csv"
    if not path.is_file():
        stems = [file.stem for file in (root / "images").iterdir() if not file.name.startswith(".")]
        if sorted(stems) != sorted(map(str, range(1, _CLINICDB_FRAMES + 1))):
            return {}
        return {name: f"sequence-{bisect(_CLINICDB_STARTS, int(name))}" for name in stems}
    rows = read_rows(path, required=())
    return {
        stem(Path(row["png_image_path"]).name).lower(): f"sequence-{row['sequence_id'].strip()}"
        for _, row in rows
        if row.get("sequence_id", "").strip() and row.get("png_image_path")
    }


# QaTa-COV19-v2 as Ariadne lays it out -----------------------------------------------------------------------------


def is_qata(root: Path) -> bool:
    """Return whether there are Ariadne's list and the images of training."""
    return (root / "prompt" / "train.csv").is_file() and any(
        (root / name).is_dir() for name in ("Train", "Train Set", "train")
    )


def read_qata(cases: CaseList, prompt: str, seed: int) -> None:  # noqa: ARG001
    """Read QaTa-COV19-v2; its lists name the masks."""
    for part in ("Train", "Test"):
        path = cases.root / "prompt" / f"{part.lower()}.csv"
        if not path.is_file():
            continue
        place = _first_folder(cases.root, (part, f"{part} Set", part.lower()))
        images = cases.images(f"{place}/Images")
        masks = cases.masks(_first_folder(cases.root, (f"{place}/GTs", f"{place}/Ground-truths")))
        rows = read_rows(path, required=("Image", "Description"))
        train_count = len(rows) * 4 // 5  # the authors validate on the last 20 % of the rows in file order
        for position, (_, row) in enumerate(rows):
            split = "test" if part == "Test" else "train" if position < train_count else "val"
            _add_by_mask(cases, images, masks, row["Image"], row["Description"], split)


def _add_by_mask(cases: CaseList, images: Folder, masks: Folder, mask_name: str, text: str, split: str) -> None:
    """Add a row whose name is that of the mask: ``mask_x`` with the image ``x``, or the same as the image's."""
    mask_name = mask_name.strip()
    image_name = re.sub(r"^mask_", "", mask_name, flags=re.IGNORECASE)
    mask_names = tuple(dict.fromkeys((mask_name, f"mask_{image_name}", image_name)))
    patient = patient_of(image_name)
    cases.add(images, image_name, masks, mask_names, text=text, split=split, patient_id=patient)


# LViT -------------------------------------------------------------------------------------------------------------


def is_lvit(root: Path) -> bool:
    """Return whether there is a split's folder as LViT has them."""
    return any((root / f"{part}_Folder" / "img").is_dir() for part in ("Train", "Val", "Test"))


def read_lvit(cases: CaseList, prompt: str, seed: int) -> None:  # noqa: ARG001
    """Read MosMedData+, QaTa-COV19 or MoNuSeg as LViT lays them out, with sentences in Excel files."""
    parts = [part for part in ("Train", "Val", "Test") if (cases.root / f"{part}_Folder" / "img").is_dir()]
    tables = {part: _first_file(cases.root, (f"{part}_Folder/{part}_text.xlsx", f"{part}_text.xlsx")) for part in parts}
    shared = [part for part in parts if part != "Test" and tables[part] is None]
    if shared:
        names = ("Train_Val_text.xlsx", "Train_Folder/Train_Val_text.xlsx", "Val_Folder/Train_Val_text.xlsx")
        _read_lvit_table(cases, _first_file(cases.root, names), shared)
    for part in parts:
        if part not in shared:
            _read_lvit_table(cases, tables[part], [part])


def _read_lvit_table(cases: CaseList, path: Path | None, parts: list[str]) -> None:
    if path is None:
        name = f"{parts[0]}_text.xlsx" + " or Train_Val_text.xlsx" * (parts[0] != "Test")
        raise DataError(f"{cases.root} has no {name}", hint=f"copy it into {parts[0]}_Folder or beside that folder")
    rows = read_rows(path, required=("Image",))
    columns = list(rows[0][1])
    column = next((name for name in ("Description", "text") if name in columns), None)
    if column is None:
        raise missing_column(path, "Description", columns)
    for _, row in rows:
        name = re.sub(r"^mask_", "", row["Image"].strip(), flags=re.IGNORECASE)
        folders = [cases.images(f"{part}_Folder/img") for part in parts]
        place = next((index for index, folder in enumerate(folders) if folder.find(name)), 0)
        masks = cases.masks(f"{parts[place]}_Folder/labelcol")
        _add_by_mask(cases, folders[place], masks, row["Image"], row[column], parts[place].lower())


# SGSeg and ProLearn -----------------------------------------------------------------------------------------------


def is_sgseg(root: Path) -> bool:
    """Return whether there is SGSeg's list of cases."""
    return (root / "prompts" / "annotation.json").is_file()


def read_sgseg(cases: CaseList, prompt: str, seed: int) -> None:  # noqa: ARG001
    """Read QaTa-COV19 as SGSeg cleaned it; its list names the masks."""
    path = cases.root / "prompts" / "annotation.json"
    for part, entries in _json_lists(path).items():
        images, masks = cases.images(f"images/{part}/images"), cases.masks(f"images/{part}/masks")
        for position, entry in enumerate(entries):
            try:
                name, text = str(entry["image_path"]), str(entry["caption"] or "")
            except (KeyError, TypeError) as error:
                raise DataError(f"{path}, {part}, entry {position}: no {error}", hint=_COPY_AGAIN) from error
            _add_by_mask(cases, images, masks, Path(name).name, text, "val" if part == "valid" else part)


def is_prolearn(root: Path) -> bool:
    """Return whether there are ProLearn's list of cases and reports."""
    return (root / "split.json").is_file() and (root / "reports").is_dir()


def read_prolearn(cases: CaseList, prompt: str, seed: int) -> None:  # noqa: ARG001
    """Read a dataset of ProLearn: one name for image, mask and report."""
    path = cases.root / "split.json"
    images, masks = cases.images("images"), cases.masks("masks")
    reports = {composed(file.stem).lower(): file for file in (cases.root / "reports").glob("*.txt")}
    for part, entries in _json_lists(path).items():
        for name in map(str, entries):
            report = reports.get(composed(name).lower())
            cases.add(
                images,
                name,
                masks,
                (name,),
                text="" if report is None else _read(report).strip(),
                split="val" if part == "valid" else part,
                patient_id=patient_of(name),
            )


# TGANet and nnU-Net -----------------------------------------------------------------------------------------------


def is_tganet(root: Path) -> bool:
    """Return whether there are TGANet's list of training and its folders."""
    return (root / "train.txt").is_file() and (root / "images").is_dir() and (root / "masks").is_dir()


def read_tganet(cases: CaseList, prompt: str, seed: int) -> None:  # noqa: ARG001
    """Read a dataset of TGANet: lists of stems, no sentences."""
    images, masks = cases.images("images"), cases.masks("masks")
    sequences = _sequences(cases.root)
    for split in _SPLITS:
        path = cases.root / f"{split}.txt"
        names = _read(path).split("\n") if path.is_file() else []
        for name in filter(None, map(str.strip, names)):
            patient = sequences.get(stem(name).lower()) or patient_of(name)
            cases.add(images, name, masks, (name,), text=None, split=split, patient_id=patient)


def is_nnunet(root: Path) -> bool:
    """Return whether there are nnU-Net's description and folders."""
    return all((root / name).exists() for name in ("dataset.json", "imagesTr", "labelsTr"))


def read_nnunet(cases: CaseList, prompt: str, seed: int) -> None:  # noqa: ARG001
    """Read a dataset of nnU-Net: the first channel of each case, with sentences where there is a ``texts.csv``."""
    texts = _nnunet_texts(cases.root)
    split_of = _nnunet_folds(cases.root)
    named = set()
    for part, split in (("Tr", "train"), ("Ts", "test")):
        images = cases.images(f"images{part}")
        has_masks = part == "Tr" or (cases.root / "labelsTs").is_dir()
        masks = cases.masks(f"labels{part}") if has_masks else None
        channels = {file: _CHANNEL.fullmatch(stem(file)) for file in images.files}
        first = {file: found["case"] for file, found in channels.items() if found and found["number"] == "0000"}
        in_cases = set(first.values())
        images.used.update(file for file, found in channels.items() if found and found["case"] in in_cases)
        for file, name in first.items():
            _refuse_volume(cases.root / images.name / file)
            known = composed(name)
            named.add(known.lower())
            text = None if texts is None else texts.get(known.lower(), "")
            chosen = split_of.get(known, "") if split_of and part == "Tr" else split
            cases.add(images, file, masks, (name,), text=text, split=chosen, patient_id=patient_of(name))
    for name in sorted(set(texts or ()) - named):
        cases.report_row("missing image", f"imagesTr/{name}_0000", f"texts.csv names {name}, but there is no such case")


def _refuse_volume(path: Path) -> None:
    if not is_nifti(path):
        return
    try:
        count = len(read_frames(path))
    except DataError:  # a damaged file is for the audit to find
        return
    if count > 1:
        raise DataError(
            f"{path} is a volume of {count} slices, expected single images",
            hint=f"list the slices in a manifest, with their masks and sentences: {path.parent.name}/{path.name}#0 …",
        )


def _nnunet_texts(root: Path) -> dict[str, str] | None:
    path = root / "texts.csv"
    if not path.is_file():
        return None
    rows = read_rows(path, required=("text",))
    columns = list(rows[0][1])
    column = next((name for name in ("id", "image") if name in columns), None)
    if column is None:
        raise missing_column(path, "image", columns)
    names = (stem(Path(composed(row[column]).strip()).name).removesuffix("_0000").lower() for _, row in rows)
    return {name: row["text"] for name, (_, row) in zip(names, rows, strict=True)}


def _nnunet_folds(root: Path) -> dict[str, str]:
    """Return the split of each case of training in the first fold, if the folds were copied beside ``dataset.json``."""
    path = root / "splits_final.json"
    if not path.is_file():
        return {}
    first = _json_list(path)[0]
    if not isinstance(first, dict) or not all(isinstance(first.get(split), list) for split in ("train", "val")):
        raise DataError(f"{path} holds no folds", hint="copy it from nnUNet_preprocessed again")
    return {composed(str(name)): split for split in ("train", "val") for name in first[split]}


# Your own ---------------------------------------------------------------------------------------------------------


def is_own(root: Path) -> bool:
    """Return whether there is a manifest."""
    return any((root / name).is_file() for name in OWN_NAMES)


def read_own(cases: CaseList, prompt: str, seed: int) -> None:  # noqa: ARG001
    """Read the manifest in a folder."""
    for record in own_manifest(cases.root).records:
        cases.take(record)


def own_manifest(root: Path) -> Manifest:
    """Return the manifest in a folder."""
    return Manifest.read(own_path(root))


def own_path(root: Path) -> Path:
    """Return where the manifest in a folder lies; see :func:`is_own`."""
    return next(root / name for name in OWN_NAMES if (root / name).is_file())


def is_plain_own(root: Path) -> bool:
    """Return whether there is a manifest with no columns but its own, as tmca writes it.

    Publishers put tables of that name beside their lists too, with columns that mean something to them.
    """
    if not is_own(root):
        return False
    try:
        rows = read_rows(own_path(root), required=("image",))
    except DataError:
        return False
    return all(row.keys() <= set(COLUMNS) for _, row in rows)


# Files ------------------------------------------------------------------------------------------------------------


def _first_folder(root: Path, names: Iterable[str]) -> str:
    """Return the first of the folders that exists, or else the first."""
    names = list(names)
    return next((name for name in names if (root / name).is_dir()), names[0])


def _first_file(root: Path, names: Iterable[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_file()), None)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (ValueError, OSError) as error:
        raise DataError(f"Cannot read {path}: {error}", hint=_COPY_AGAIN) from error


def _json_list(path: Path) -> list[Any]:
    value = _json(path)
    if not isinstance(value, list) or not value:
        raise DataError(f"{path} holds no list of cases", hint=_COPY_AGAIN)
    return value


def _json_lists(path: Path) -> dict[str, list[Any]]:
    value = _json(path)
    if not isinstance(value, dict) or not value:
        raise DataError(f"{path} holds no lists of cases by split", hint=_COPY_AGAIN)
    for split, entries in value.items():
        if not isinstance(entries, list):
            raise DataError(f"{path} holds no list of cases under {split!r}", hint=_COPY_AGAIN)
    return value


def _json(path: Path) -> Any:  # noqa: ANN401
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"Cannot read {path}: {error}", hint=_COPY_AGAIN) from error
