"""Published folder layouts to manifests: the only code that knows a dataset's quirks.

A layout is recognised by the files it holds. A new one is a function that recognises it, one that reads it, and a line
in :data:`LAYOUTS`. Whatever the layout, the id of a case is the stem of its image file, and "left" in a sentence is
left in the image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmca.data.manifest import Manifest, Record, read_rows, seeded_number
from tmca.errors import DataError, unknown_name
from tmca.imaging.raster import IMAGE_SUFFIXES

PROMPT_LEVELS = tuple(f"p{level}" for level in range(10))
"""Detail of the medvlsm sentences; p6 is the paper's, p0 is none, p7 to p9 are lists of paraphrases."""

_OWN_NAMES = ("manifest.csv", "manifest.jsonl")


def open_dataset(path: Path | str, *, prompt: str = "p6", seed: int = 0) -> Manifest:
    """Open a dataset: a manifest file, or a folder whose layout is recognised by itself.

    Args:
        path: A ``.csv`` or ``.jsonl`` manifest, or a folder in one of :data:`LAYOUTS`, tried in that order.
        prompt: Level of detail of the sentences, ``p0`` to ``p9``, in the layouts that have levels.
        seed: Decides which paraphrase a case gets where the level has several.

    Returns:
        The manifest of all splits.

    Raises:
        ConfigError: The prompt level does not exist.
        DataError: The path does not exist, the layout is unknown, or files are missing or malformed.
    """
    if prompt not in PROMPT_LEVELS:
        raise unknown_name("prompt level", prompt, PROMPT_LEVELS)
    path = Path(path).absolute()
    if path.is_file():
        return Manifest.read(path)
    if not path.is_dir():
        raise DataError(f"Dataset {path} does not exist", hint="name a manifest file or a dataset folder")
    for layout in LAYOUTS.values():
        if layout.recognise(path):
            return layout.read(path, prompt, seed)
    looked_for = "; ".join(f"{name}: {layout.looks_for}" for name, layout in LAYOUTS.items())
    raise DataError(
        f"The layout of {path} is not known; looked for {looked_for}",
        hint="write a manifest.csv with the columns image, mask, text, split",
    )


class _Folder:
    """The image files of a folder, found by name or else by stem, whatever the case and the ending."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        folder = root / name
        files = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
        self._names = {file for file in files if Path(file).suffix.lower() in IMAGE_SUFFIXES}
        self._by_stem = {Path(file).stem.lower(): file for file in files if file in self._names}

    def find(self, file: str) -> str | None:
        found = file if file in self._names else self._by_stem.get(Path(file).stem.lower())
        return None if found is None else f"{self.name}/{found}"


class _Builder:
    """Collects the records of a layout and the files that it names but lacks."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._records: list[Record] = []
        self._missing: list[str] = []

    def add(self, images: _Folder, image_name: str, masks: _Folder, mask_name: str, **values: str | None) -> None:
        image, mask = images.find(image_name), masks.find(mask_name)
        self._missing += [f"{images.name}/{image_name}"] if image is None else []
        self._missing += [f"{masks.name}/{mask_name}"] if mask is None else []
        if image is not None:
            self._records.append(Record(id=Path(image).stem, image=image, mask=mask, **values))  # type: ignore[arg-type]

    def manifest(self) -> Manifest:
        if self._missing:
            named = ", ".join(self._missing[:3]) + (", …" if len(self._missing) > 3 else "")
            raise DataError(
                f"{len(self._missing)} files that {self._root} names are missing: {named}",
                hint="copy the dataset again",
            )
        return Manifest(self._root, tuple(self._records), self._root.name)


def _is_medvlsm(root: Path) -> bool:
    return (root / "anns" / "train.json").is_file() and (root / "images").is_dir()


def _read_medvlsm(root: Path, prompt: str, seed: int) -> Manifest:
    builder = _Builder(root)
    images, masks = _Folder(root, "images"), _Folder(root, "masks")
    for split in ("train", "val", "test"):
        path = root / "anns" / f"{split}.json"
        if not path.is_file():
            continue
        for position, entry in enumerate(_json_list(path)):
            try:
                image_name, mask_name = str(entry["img_name"]), str(entry["mask_name"])
                text = entry["prompts"][prompt]
            except (KeyError, TypeError) as error:
                raise DataError(f"{path}, entry {position}: no {error}", hint="copy the dataset again") from error
            if isinstance(text, list):
                text = text[seeded_number(seed, Path(image_name).stem) % len(text)] if text else None
            text = text if text and text.strip() else None
            # The authors derived count, size and place from the masks and asked a model for colour and shape.
            builder.add(images, image_name, masks, mask_name, text=text, split=split, text_provenance="model")
    return builder.manifest()


def _json_list(path: Path) -> list[Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise DataError(f"Cannot read {path}: {error}", hint="copy the dataset again") from error
    if not isinstance(entries, list):
        raise DataError(f"{path} holds no list of cases", hint="copy the dataset again")
    return entries


def _is_qata(root: Path) -> bool:
    return (root / "prompt" / "train.csv").is_file() and (root / "Train").is_dir()


def _read_qata(root: Path, prompt: str, seed: int) -> Manifest:  # noqa: ARG001
    builder = _Builder(root)
    for part in ("Train", "Test"):
        path = root / "prompt" / f"{part.lower()}.csv"
        if not path.is_file():
            continue
        images, masks = _Folder(root, f"{part}/Images"), _Folder(root, f"{part}/GTs")
        rows = read_rows(path, required=("Image", "Description"))
        train_count = len(rows) * 4 // 5  # the authors validate on the last 20 % of the rows in file order
        for position, (_, row) in enumerate(rows):
            split = "test" if part == "Test" else "train" if position < train_count else "val"
            mask_name = row["Image"].strip()
            image_name = re.sub(r"^mask_", "", mask_name, flags=re.IGNORECASE)
            patient = re.search(r"sub-(s\d+)", image_name, flags=re.IGNORECASE)
            text = row["Description"] if row["Description"].strip() else None
            patient_id = patient[1].upper() if patient else ""
            builder.add(images, image_name, masks, mask_name, text=text, split=split, patient_id=patient_id)
    return builder.manifest()


def _is_own(root: Path) -> bool:
    return any((root / name).is_file() for name in _OWN_NAMES)


def _read_own(root: Path, prompt: str, seed: int) -> Manifest:  # noqa: ARG001
    return Manifest.read(next(root / name for name in _OWN_NAMES if (root / name).is_file()))


@dataclass(frozen=True)
class Layout:
    """How a folder layout is told from others, described in an error message, and read."""

    recognise: Callable[[Path], bool]
    read: Callable[[Path, str, int], Manifest]
    looks_for: str


LAYOUTS: dict[str, Layout] = {
    "medvlsm": Layout(_is_medvlsm, _read_medvlsm, "anns/train.json and images/"),
    "qata": Layout(_is_qata, _read_qata, "prompt/train.csv and Train/"),
    "manifest": Layout(_is_own, _read_own, "manifest.csv or manifest.jsonl"),
}
"""The known layouts by name, in order of precedence."""
