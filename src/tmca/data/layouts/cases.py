"""From the names that a dataset's lists give to files, records, and a list of what does not fit."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

from tmca.data.manifest import Manifest, Record
from tmca.data.tables import write_rows
from tmca.errors import DataError
from tmca.imaging.reading import IMAGE_SUFFIXES, split_frame

SUFFIXES = tuple(sorted(IMAGE_SUFFIXES, key=len, reverse=True))
"""Endings of the files that can be images or masks, lower case, the longest first."""

ProblemKind = Literal[
    "missing image",
    "missing mask",
    "ambiguous name",
    "repeated row",
    "missing sentence",
    "unused image",
    "unused mask",
]
"""What can be wrong with a row or a file."""

KINDS: tuple[ProblemKind, ...] = get_args(ProblemKind)

LEFT_OUT: tuple[ProblemKind, ...] = ("missing image", "missing mask", "ambiguous name", "repeated row")
"""Kinds whose row does not become a case."""

_HINTS: dict[ProblemKind, str] = {
    "missing image": "copy the image into the dataset, or correct the name; the row was left out",
    "missing mask": "copy the mask into the dataset, or correct the name; the row was left out",
    "ambiguous name": "write the name with its ending in the list, or remove the other file; the row was left out",
    "repeated row": "remove it from the list; only the first of the rows was taken",
    "missing sentence": "write it, or train with a method that can do without; the case was kept",
    "unused image": "add it to the dataset's lists if it belongs there; it is in no case",
    "unused mask": "add it to the dataset's lists if it belongs there; it is in no case",
}


@dataclass(frozen=True)
class Problem:
    """A row or file that did not become a case as it should have.

    Attributes:
        kind: What is wrong, in two words.
        file: The file that is missing, unused or unclear, relative to the dataset.
        problem: What is wrong, as a sentence that names the file.
        hint: The next thing to do, and what became of the row.
    """

    kind: ProblemKind
    file: str
    problem: str
    hint: str


@dataclass(frozen=True)
class Imported:
    """What was read of a dataset folder.

    Attributes:
        manifest: The cases whose files are there.
        layout: Name of the folder's layout.
        problems: What was left out, is incomplete or belongs to no case.
        left_out: Number of rows that did not become a case.
    """

    manifest: Manifest
    layout: str
    problems: tuple[Problem, ...]
    left_out: int

    @property
    def counts(self) -> dict[ProblemKind, int]:
        """Number of problems of each kind, of the kinds that there are."""
        counted = Counter(problem.kind for problem in self.problems)
        return {kind: counted[kind] for kind in KINDS if counted[kind]}

    def write_problems(self, path: Path | str) -> None:
        """Write the problems as a table, CSV by the name's ending, in one step.

        Raises:
            StorageError: The ending is unknown or the file could not be written.
        """
        columns = [item.name for item in fields(Problem)]
        write_rows(Path(path), columns, [{name: getattr(row, name) for name in columns} for row in self.problems])


class Folder:
    """The image files of a folder and its subfolders, found by name or else by stem, whatever the case and the ending.

    Accented letters match whether they are one character or a letter and its accent, as macOS may write file names.

    Args:
        root: The dataset.
        name: The folder relative to it, with forward slashes. It need not exist.
        holds: Whether its files are images or masks.
    """

    def __init__(self, root: Path, name: str, holds: Literal["image", "mask"]) -> None:
        self.name = name
        self.holds = holds
        self.files = _files(root / name)
        self.used: set[str] = set()
        self._names = set(self.files)
        self._by_name, self._by_lower, self._by_stem = defaultdict(list), defaultdict(list), defaultdict(list)
        for file in self.files:
            self._by_name[composed(file)].append(file)
            self._by_lower[composed(file).lower()].append(file)
            self._by_stem[composed(stem(file)).lower()].append(file)

    def find(self, name: str) -> list[str]:
        """Return the files that a name can mean: one where it is clear, none where it is missing."""
        name = name.strip().replace("\\", "/")
        if name in self._names:
            found = [name]
        else:
            name = composed(name)
            # A name without an ending may hold dots: the whole of it is tried before the part before the last dot.
            stems = dict.fromkeys((stem(name).lower(), name.lower(), name.rpartition(".")[0].lower()))
            found = (
                self._by_name.get(name)
                or self._by_lower.get(name.lower())
                or next((self._by_stem[each] for each in stems if each in self._by_stem), [])
            )
        self.used.update(found)
        return found


@dataclass(frozen=True)
class _Case:
    record: Record
    mask_name: str


class CaseList:
    """Collects the cases of a dataset, and what is wrong with its rows and files.

    Args:
        root: The dataset's folder.
        name: Name of the dataset; the folder's if left out.
    """

    def __init__(self, root: Path, name: str = "") -> None:
        self.root = root
        self.name = name or root.name
        self._folders: dict[str, Folder] = {}
        self._cases: dict[tuple[str | None, ...], _Case] = {}
        self._problems: list[Problem] = []
        self._rows = 0

    def images(self, name: str) -> Folder:
        """Return a folder of images; the same one for the same name."""
        return self._folder(name, "image")

    def masks(self, name: str) -> Folder:
        """Return a folder of masks; the same one for the same name."""
        return self._folder(name, "mask")

    def add(
        self,
        images: Folder,
        image_name: str,
        masks: Folder | None,
        mask_names: Sequence[str],
        *,
        text: str | None,
        split: str,
        patient_id: str = "",
        text_provenance: str = "human",
    ) -> None:
        """Add the case of one row, if its files are there.

        Args:
            images: Where its image lies.
            image_name: The image's file name or stem.
            masks: Where its mask lies; ``None`` where no mask is to be expected.
            mask_names: The names its mask can have, the likeliest first.
            text: Its sentence; a blank one is a problem, ``None`` is not.
            split: Its split.
            patient_id: Whom it shows.
            text_provenance: Where the sentence comes from.
        """
        self._rows += 1
        image = self._file(images, (image_name,))
        mask = None if masks is None else self._file(masks, mask_names)
        if image is None or (masks is not None and mask is None):
            return
        record = Record("", image, mask, text, split, patient_id, text_provenance=text_provenance)
        if (image, mask) in self._cases:
            first = self._cases[image, mask].record
            differs = [name for name in ("split", "text") if getattr(first, name) != getattr(record, name)]
            again = f"again, with another {' and '.join(differs)}" if differs else "twice"
            self.report("repeated row", image, f"{image} and its mask are listed {again}")
            return
        if text is not None and not text.strip():
            self.report("missing sentence", image, f"the sentence of {image} is blank or missing")
            record = replace(record, text=None)
        mask_name = "" if mask is None or masks is None else mask.removeprefix(f"{masks.name}/")
        self._cases[image, mask] = _Case(record, mask_name)

    def take(self, record: Record) -> None:
        """Add a case whose record is complete, if its files are there."""
        self._rows += 1
        is_complete = True
        named: tuple[tuple[ProblemKind, str | None], ...] = (
            ("missing image", record.image),
            ("missing mask", record.mask),
        )
        for kind, file in named:
            if file is not None and not split_frame(self.root / file)[0].is_file():
                self.report(kind, file, f"case {record.id} names {file}, but there is no such file")
                is_complete = False
        if is_complete:
            self._cases[record.id,] = _Case(record, "")

    def report(self, kind: ProblemKind, file: str, problem: str) -> None:
        """Note that something is wrong with a file."""
        self._problems.append(Problem(kind, file, problem, _HINTS[kind]))

    def report_row(self, kind: ProblemKind, file: str, problem: str) -> None:
        """Note a row that becomes no case."""
        self._rows += 1
        self.report(kind, file, problem)

    def finish(self, layout: str) -> Imported:
        """Return the cases and problems, among them the files that belong to no case.

        Raises:
            DataError: There is no case.
        """
        for folder in self._folders.values():
            for file in folder.files:
                if file not in folder.used:
                    path = f"{folder.name}/{file}"
                    kind: ProblemKind = "unused image" if folder.holds == "image" else "unused mask"
                    self.report(kind, path, f"no row of the dataset's lists names {path}")
        if not self._cases:
            first = f": {self._problems[0].problem}" if self._problems else ""
            raise DataError(
                f"{self.root}, read as {layout}, holds no case{first}",
                hint=f"check that images and masks were copied; known endings: {', '.join(IMAGE_SUFFIXES)}",
            )
        manifest = Manifest(self.root, _with_ids(list(self._cases.values())), self.name)
        return Imported(manifest, layout, tuple(self._problems), self._rows - len(self._cases))

    def _folder(self, name: str, holds: Literal["image", "mask"]) -> Folder:
        if name not in self._folders:
            self._folders[name] = Folder(self.root, name, holds)
        return self._folders[name]

    def _file(self, folder: Folder, names: Sequence[str]) -> str | None:
        found = next((files for files in map(folder.find, names) if files), [])
        if len(found) == 1:
            return f"{folder.name}/{found[0]}"
        path = f"{folder.name}/{names[0]}"
        if found:
            self.report("ambiguous name", path, f"{path} can be {' or '.join(found)}")
        else:
            kind: ProblemKind = "missing image" if folder.holds == "image" else "missing mask"
            self.report(kind, path, f"the dataset's lists name {path}, but there is no such file")
        return None


def stem(name: str) -> str:
    """Return a file's name without its ending, if that is one of :data:`SUFFIXES`."""
    return name[: len(name) - len(ending(name))]


def ending(name: str) -> str:
    """Return the one of :data:`SUFFIXES` with which a file's name ends, in lower case; empty where it has none."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")


def composed(name: str) -> str:
    """Return a name with each accented letter as one character (NFC)."""
    return unicodedata.normalize("NFC", name)


def _files(folder: Path) -> list[str]:
    found = []
    for place, _, names in os.walk(folder):
        inside = Path(place).relative_to(folder)
        found += [
            (inside / name).as_posix()
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")  # as macOS leaves them beside every file
        ]
    return sorted(found)


def _with_ids(cases: list[_Case]) -> tuple[Record, ...]:
    """Name each case that has no id by its image's stem or, where several would share that, by the next longer name."""
    ways: list[Callable[[_Case], str]] = [
        lambda case: stem(Path(case.record.image).name),
        lambda case: stem(case.mask_name),
        lambda case: stem(case.record.image),
        lambda case: stem(case.record.mask or case.record.image),
    ]
    names = [case.record.id for case in cases]
    unnamed = [index for index, name in enumerate(names) if not name]
    for way in ways:
        proposed = {index: way(cases[index]).replace("/", "_") for index in unnamed}
        counts = Counter(proposed.values())
        for index, name in proposed.items():
            if name and counts[name] == 1:
                names[index] = name
        unnamed = [index for index in unnamed if not names[index]]
    return tuple(replace(case.record, id=name) for case, name in zip(cases, names, strict=True))
