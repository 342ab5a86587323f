"""Dataset folders to manifests. A layout is recognised by the files it holds.

A new layout is a function that recognises it and one that reads it (:mod:`tmca.data.layouts.readers`), and a line in
:data:`LAYOUTS`. Whatever the layout, the id of a case is the stem of its image file where that is unique.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tmca.data.layouts import readers
from tmca.data.layouts.cases import LEFT_OUT, CaseList, Imported, Problem
from tmca.data.layouts.copying import copy_dataset
from tmca.data.manifest import Manifest
from tmca.errors import DataError, unknown_name
from tmca.progress import say

__all__ = [
    "LAYOUTS",
    "PROMPT_LEVELS",
    "Imported",
    "Layout",
    "Problem",
    "copy_dataset",
    "open_dataset",
    "read_layout",
    "read_levels",
]

PROMPT_LEVELS = tuple(f"p{level}" for level in range(10))
"""Detail of the medvlsm sentences; p6 is the paper's, p0 is none, p7 to p9 are lists of paraphrases."""

_NAMED = 3
"""How many problems an error message names."""


@dataclass(frozen=True)
class Layout:
    """A folder layout.

    Attributes:
        recognise: Tells from the dataset's folder whether it has this layout.
        read: Adds the folder's cases to a list, given the prompt level and the seed.
        looks_for: What it is recognised by, for messages.
    """

    recognise: Callable[[Path], bool]
    read: Callable[[CaseList, str, int], None]
    looks_for: str


LAYOUTS: dict[str, Layout] = {
    "medvlsm": Layout(readers.is_medvlsm, readers.read_medvlsm, "anns/{train,val,test}.json and images/"),
    "qata": Layout(readers.is_qata, readers.read_qata, "prompt/train.csv and Train/"),
    "lvit": Layout(readers.is_lvit, readers.read_lvit, "{Train,Val,Test}_Folder/img"),
    "sgseg": Layout(readers.is_sgseg, readers.read_sgseg, "prompts/annotation.json"),
    "prolearn": Layout(readers.is_prolearn, readers.read_prolearn, "split.json and reports/"),
    "tganet": Layout(readers.is_tganet, readers.read_tganet, "train.txt, images/ and masks/"),
    "nnunet": Layout(readers.is_nnunet, readers.read_nnunet, "dataset.json, imagesTr/ and labelsTr/"),
    "manifest": Layout(readers.is_own, readers.read_own, ", ".join(readers.OWN_NAMES)),
}
"""The known layouts by name, in order of precedence; but see :func:`open_dataset`."""


def read_layout(path: Path | str, layout: str | None = None, *, prompt: str = "p6", seed: int = 0) -> Imported:
    """Read a dataset, keeping what can be used and listing what cannot.

    Nothing is copied or converted.

    Args:
        path: A folder in one of :data:`LAYOUTS`, or a manifest file.
        layout: Name of the layout; recognised, in the order of :data:`LAYOUTS`, if left out.
        prompt: Level of detail of the sentences, ``p0`` to ``p9``, in the layouts that have levels.
        seed: Decides which paraphrase a case gets where the level has several.

    Returns:
        The cases whose files are there, and the problems.

    Raises:
        ConfigError: The prompt level or layout does not exist.
        DataError: The path does not exist, its layout is another or unknown, its lists are malformed, or no case is
            left.
    """
    if prompt not in PROMPT_LEVELS:
        raise unknown_name("prompt level", prompt, PROMPT_LEVELS)
    if layout is not None and layout not in LAYOUTS:
        raise unknown_name("layout", layout, LAYOUTS)
    path = Path(path).absolute()
    if path.is_file():
        if layout not in (None, "manifest"):
            raise DataError(f"{path} is a file, expected a folder", hint=f"name the folder of the {layout} dataset")
        manifest = Manifest.read(path)
        cases = CaseList(manifest.root, manifest.name)
        for record in manifest.records:
            cases.take(record)
        return cases.finish("manifest")
    _require_folder(path)
    name = layout or _recognised(path)
    if not LAYOUTS[name].recognise(path):
        raise DataError(
            f"{path} has not the layout {name}; looked for {LAYOUTS[name].looks_for}",
            hint="leave the layout out to have it recognised",
        )
    cases = CaseList(path)
    LAYOUTS[name].read(cases, prompt, seed)
    return cases.finish(name)


def open_dataset(path: Path | str, *, prompt: str = "p6", seed: int = 0) -> Manifest:
    """Open a dataset for training or scoring: a manifest file, or a folder whose layout is recognised by itself.

    Unlike :func:`read_layout` it takes an own manifest before the published lists beside it, and refuses a folder whose
    lists name files that are not there. The files that an own manifest names are looked at by
    :meth:`tmca.data.manifest.Manifest.check`. A table of that name with further columns may be the publisher's: beside
    published lists it is passed over, and that is said.

    Args:
        path: A ``.csv``, ``.jsonl`` or ``.parquet`` manifest, or a folder in one of :data:`LAYOUTS`, tried in that
            order after an own manifest.
        prompt: Level of detail of the sentences, ``p0`` to ``p9``, in the layouts that have levels.
        seed: Decides which paraphrase a case gets where the level has several.

    Returns:
        The manifest of all splits.

    Raises:
        ConfigError: The prompt level does not exist.
        DataError: The path does not exist, the layout is unknown, or files are missing, unclear or malformed.
    """
    if prompt not in PROMPT_LEVELS:
        raise unknown_name("prompt level", prompt, PROMPT_LEVELS)
    path = Path(path).absolute()
    if path.is_file():
        return Manifest.read(path)
    _require_folder(path)
    name = _opened_as(path)
    if name == "manifest":
        return readers.own_manifest(path)
    if readers.is_own(path):
        passed_over = readers.own_path(path)
        say(f"note: {path} was read as {name}, not by its {passed_over.name}; to use that: {passed_over}")
    return _open_published(path, name, prompt, seed)


def _open_published(path: Path, name: str, prompt: str, seed: int) -> Manifest:
    imported = read_layout(path, name, prompt=prompt, seed=seed)
    wrong = [f"{problem.kind} {problem.file}" for problem in imported.problems if problem.kind in LEFT_OUT]
    if wrong:
        named = ", ".join(wrong[:_NAMED]) + (", …" if len(wrong) > _NAMED else "")
        raise DataError(
            f"{len(wrong)} problems in the lists of {path}: {named}",
            hint=f"copy the dataset again, or keep the other cases: tmca data import {path} -o manifest.csv",
        )
    return imported.manifest


def read_levels(path: Path | str) -> dict[str, Manifest]:
    """Return a dataset with its sentences of each level of detail, p1 to p9; empty where it has no levels."""
    path = Path(path).absolute()
    if not path.is_dir() or _opened_as(path) != "medvlsm":
        return {}
    return {level: _open_published(path, "medvlsm", level, 0) for level in PROMPT_LEVELS[1:]}


def _require_folder(path: Path) -> None:
    if not path.is_dir():
        raise DataError(f"Dataset {path} does not exist", hint="name a manifest file or a dataset folder")


def _opened_as(path: Path) -> str:
    """Return the layout by which a folder is opened: an own manifest comes before the lists beside it."""
    name = _recognised(path)
    return "manifest" if name != "manifest" and readers.is_plain_own(path) else name


def _recognised(path: Path) -> str:
    name = _layout_of(path)
    if name is not None:
        return name
    inside = next((folder for folder in sorted(path.iterdir()) if folder.is_dir() and _layout_of(folder)), None)
    looked_for = "; ".join(f"{name}: {layout.looks_for}" for name, layout in LAYOUTS.items())
    raise DataError(
        f"The layout of {path} is not known; looked for {looked_for}",
        hint="write a manifest.csv with the columns image, mask, text, split"
        if inside is None
        else f"name the folder inside it: {inside}",
    )


def _layout_of(path: Path) -> str | None:
    return next((name for name, layout in LAYOUTS.items() if layout.recognise(path)), None)
