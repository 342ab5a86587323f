"""The list of a dataset's cases: image, mask, sentence, split, patient; read, written, checked and hashed.

A manifest is a CSV, JSON Lines or Parquet file next to its images. Only the column ``image`` is required; paths are
relative to the manifest's folder and use forward slashes.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from tmca.data.tables import read_rows, write_rows
from tmca.errors import ConfigError, DataError
from tmca.files import real_path, recorded_sha256_of
from tmca.imaging.reading import case_name, image_size, split_frame
from tmca.progress import track

_HASHING_THREADS = 8

_NAMED = 3
"""How many offending cases an error message names."""


@dataclass(frozen=True)
class Record:
    """One case of a dataset.

    Attributes:
        id: Name, unique in its manifest; the image's stem where the file gives none.
        image: Path relative to the manifest's root, with forward slashes; ``scan.nii.gz#12`` is one image of a volume.
        mask: Path of the ground truth, or ``None``.
        text: The sentence, or ``None``.
        split: ``train``, ``val``, ``test`` or any other name; empty where there are no splits.
        patient_id: Whom the image shows; cases of one patient must stay in one split.
        modality: Kind of image, e.g. ``endoscopy``.
        language: Language of the sentence.
        text_provenance: ``human``, ``from_mask``, ``model`` or ``llm``.
        spacing: Size of a pixel in millimetres as ``row,column``; empty where unknown.
        image_sha256: SHA-256 of the image file's bytes when it was imported; empty where not computed.
        mask_sha256: The same of the mask file.
    """

    id: str
    image: str
    mask: str | None = None
    text: str | None = None
    split: str = ""
    patient_id: str = ""
    modality: str = ""
    language: str = "en"
    text_provenance: str = "human"
    spacing: str = ""
    image_sha256: str = ""
    mask_sha256: str = ""


COLUMNS = tuple(item.name for item in dataclasses.fields(Record))
"""Columns of a manifest file; others are ignored."""

_OTHER_NAMES = {
    **dict.fromkeys(("patient", "subject", "subjectid", "patientname", "patientnumber"), "patient_id"),
    **dict.fromkeys(("sentence", "caption", "prompt", "sentences", "texts"), "text"),
    **dict.fromkeys(("masks", "segmentation", "maskpath", "groundtruth"), "mask"),
    **dict.fromkeys(("subset", "partition", "splits"), "split"),
}
"""What people call the columns, without case and marks."""

_DEFAULTS = {"language": "en", "text_provenance": "human"}


@dataclass(frozen=True)
class Manifest:
    """The cases of a dataset in order.

    Attributes:
        root: Folder to which the records' paths are relative.
        records: The cases; their ids are distinct.
        name: Name of the dataset, for messages and results.
    """

    root: Path
    records: tuple[Record, ...]
    name: str

    def __post_init__(self) -> None:
        counts = Counter(record.id for record in self.records)
        repeated = [name for name, count in counts.items() if count > 1]
        if repeated:
            raise DataError(
                f"{self.name} names {len(repeated)} ids more than once: {_listed(repeated)}",
                hint="give every row its own id",
            )

    @classmethod
    def read(cls, path: Path | str) -> Manifest:
        """Read a manifest file.

        Args:
            path: A ``.csv`` or ``.jsonl`` file in UTF-8, a ``.parquet`` or an ``.xlsx`` file.

        Returns:
            The manifest, with the file's folder as its root.

        Raises:
            DataError: The file is missing, empty or malformed, or a row has no image or repeats an id.
        """
        path = Path(path).absolute()
        rows = read_rows(path, ("image",), COLUMNS)
        _check_columns(path, {column for _, row in rows for column in row})
        records = tuple(_record(path, line, row) for line, row in rows)
        name = path.parent.name if path.stem == "manifest" else path.stem
        try:
            return cls(path.parent, records, name)
        except DataError as error:
            raise DataError(f"{path}: {error.message}", hint=error.hint) from error

    def write(self, path: Path | str) -> None:
        """Write the manifest in one step, its paths relative to the new place.

        Args:
            path: File ending in ``.csv``, ``.jsonl`` or ``.parquet``.

        Raises:
            StorageError: The ending is unknown or the file could not be written.
        """
        path = Path(path).absolute()
        write_rows(path, COLUMNS, [self._row(record, path.parent) for record in self.records])

    def image_path(self, record: Record) -> Path:
        """Return where a record's image lies."""
        return self.root / record.image

    def mask_path(self, record: Record) -> Path | None:
        """Return where a record's mask lies, or ``None`` where it has none."""
        return None if record.mask is None else self.root / record.mask

    @property
    def splits(self) -> dict[str, int]:
        """Number of cases in each split, in order of appearance."""
        return dict(Counter(record.split for record in self.records))

    @property
    def sentences(self) -> tuple[str, ...]:
        """The distinct sentences, in order of appearance."""
        return tuple(dict.fromkeys(record.text for record in self.records if record.text is not None))

    def split(self, name: str) -> Manifest:
        """Return the cases of one split.

        Raises:
            DataError: No case belongs to it.
        """
        chosen = [record for record in self.records if record.split == name]
        if not chosen:
            known = ", ".join(f"{split or '(none)'} ({count})" for split, count in self.splits.items())
            nearest = difflib.get_close_matches(name, self.splits, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "fill the column split, or run tmca data split"
            if name in ("train", "val"):  # which training looks for, and nobody has typed
                hint = f"name the cases {name!r} in the column split, or run tmca data split"
            raise DataError(f"{self.name} has no split {name!r}; it has {known or 'no cases'}", hint=hint)
        return self.with_records(chosen)

    def select(self, ids: Iterable[str]) -> Manifest:
        """Return the cases with the given ids, in the manifest's order.

        Raises:
            DataError: An id does not exist.
        """
        wanted = set(ids)
        unknown = sorted(wanted - {record.id for record in self.records})
        if unknown:
            raise DataError(f"{self.name} has no case {_listed(unknown)}", hint="see the column id")
        return self.with_records(record for record in self.records if record.id in wanted)

    def with_records(self, records: Iterable[Record]) -> Manifest:
        """Return a manifest of the same root and name with other records."""
        return replace(self, records=tuple(records))

    def fraction(self, share: float, seed: int) -> Manifest:
        """Return a random share of the cases, in the manifest's order.

        The shares of one seed are nested: every case of the 25 % is also in the 50 %.

        Args:
            share: In (0, 1]; at least one case remains.
            seed: Decides which cases.

        Raises:
            ConfigError: The share is not in (0, 1].
        """
        if not 0 < share <= 1:
            raise ConfigError(f"The fraction is {share!r}, expected a share in (0, 1]", hint="0.25 takes a quarter")
        count = max(1, round(share * len(self.records)))
        ranked = sorted(self.records, key=lambda record: seeded_number(seed, record.id))
        return self.select(record.id for record in ranked[:count])

    def content_hash(self) -> str:
        """Return a SHA-256 over ids, splits, sentences and the bytes of images and masks.

        It does not depend on the order of the rows or on where the files lie. The files are read: the hashes of the
        columns may be old.

        Raises:
            DataError: A file cannot be read.
        """
        digest = hashlib.sha256()
        for record in sorted(self.records, key=lambda record: record.id):
            mask_path = self.mask_path(record)
            mask_hash = None if mask_path is None else file_hash(mask_path)
            row = [record.id, record.split, record.text, file_hash(self.image_path(record)), mask_hash]
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()

    def with_hashes(self) -> Manifest:
        """Return the manifest with the hashes of its files as they are now.

        A manifest whose hashes are filled equals this one as long as no file has changed.

        Raises:
            DataError: A file cannot be read.
        """

        def hashed(record: Record) -> Record:
            mask_path = self.mask_path(record)
            return replace(
                record,
                image_sha256=file_hash(self.image_path(record)),
                mask_sha256="" if mask_path is None else file_hash(mask_path),
            )

        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            done = pool.map(hashed, self.records)
            return self.with_records(track(done, f"Hashing {self.name}", len(self.records)))

    def check(self, require_text: bool, require_mask: bool) -> None:
        """Refuse a manifest that cannot be used, before any work starts on it; reads the files' headers only.

        Args:
            require_text: Every case needs a sentence.
            require_mask: Every case needs a mask of its image's size.

        Raises:
            DataError: Names the first cases that lack something and how many do.
        """
        hint = "check the column image and that the files were copied"
        self._refuse("no image file", lambda record: not _is_file(self.image_path(record)), hint)
        if require_text:
            hint = "fill the column text, or allow missing sentences where the method can do without"
            self._refuse("no sentence", lambda record: record.text is None, hint)
        if require_mask:
            hint = "check the column mask and that the files were copied"
            self._refuse("no mask file", lambda record: not self._has_mask(record), hint)
            self._refuse("a mask of another size than its image", self._sizes_differ, "export the masks again")

    def _has_mask(self, record: Record) -> bool:
        mask_path = self.mask_path(record)
        return mask_path is not None and _is_file(mask_path)

    def _sizes_differ(self, record: Record) -> bool:
        mask_path = self.mask_path(record)
        return mask_path is not None and image_size(self.image_path(record)) != image_size(mask_path)

    def _refuse(self, what: str, is_wrong: Callable[[Record], bool], hint: str) -> None:
        wrong = [f"{record.id} ({record.image})" for record in self.records if is_wrong(record)]
        if wrong:
            raise DataError(
                f"{len(wrong)} of {len(self.records)} cases of {self.name} have {what}: {_listed(wrong)}", hint=hint
            )

    def _row(self, record: Record, folder: Path) -> dict[str, str]:
        row = {name: getattr(record, name) or "" for name in COLUMNS}
        if folder != self.root.absolute():
            for name in ("image", "mask"):
                if row[name] and not PurePosixPath(row[name]).is_absolute():
                    # Without links: ".." behind one leads out of where it points to.
                    row[name] = Path(os.path.relpath(real_path(self.root) / row[name], real_path(folder))).as_posix()
        return row


def file_hash(path: Path) -> str:
    """Return the SHA-256 of the bytes of an image or mask file, with ``#12`` behind it for one image of a volume.

    Raises:
        DataError: The file cannot be read.
    """
    file, number = split_frame(path)
    digest = recorded_sha256_of(file)
    return digest if number is None else f"{digest}#{number}"


def _is_file(path: Path) -> bool:
    return split_frame(path)[0].is_file()


def seeded_number(seed: int, name: str) -> int:
    """Return a number that looks random but depends on seed and name only, not on the other names or their order."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest())


def _check_columns(path: Path, columns: set[str]) -> None:
    """Refuse a column that seems to be one of ours under another name: it would be left out without a word."""
    for column in sorted(columns - set(COLUMNS)):
        plain = re.sub(r"[\W_]+", "", column.lower())
        meant = _OTHER_NAMES.get(plain) or next((name for name in COLUMNS if name.replace("_", "") == plain), None)
        if meant is not None and meant not in columns:
            raise DataError(
                f"{path} has a column {column!r} and none called {meant!r}",
                hint=f"rename it to {meant!r}, or to something else if it means another thing",
            )


def _record(path: Path, line: int, row: dict[str, str]) -> Record:
    cells = {name: row.get(name, "") for name in COLUMNS}
    text = cells.pop("text")
    values = {name: value.strip() or _DEFAULTS.get(name, "") for name, value in cells.items()}
    if not values["image"]:
        raise DataError(f"{path}, line {line}: the cell image is blank", hint="every row needs the path of an image")
    if not values["id"] and "\\" in values["image"]:
        raise DataError(
            f"{path}, line {line}: the path {values['image']} has backslashes", hint="write it with forward slashes"
        )
    values["id"] = values["id"] or case_name(values["image"])
    if "/" in values["id"] or "\\" in values["id"]:
        raise DataError(
            f"{path}, line {line}: the id {values['id']!r} holds a slash", hint="ids become the names of written files"
        )
    mask = values.pop("mask")
    return Record(**values, mask=mask or None, text=text if text.strip() else None)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
