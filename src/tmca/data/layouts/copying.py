"""A copy of a dataset that needs nothing else: images as they are, masks as plain PNG, and a manifest."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from tmca.data.layouts.cases import ending
from tmca.data.manifest import Manifest, Record
from tmca.errors import DataError, StorageError
from tmca.files import replace_folder
from tmca.imaging.raster import write_mask
from tmca.imaging.reading import join_frame, read_mask, split_frame
from tmca.progress import track


def copy_dataset(manifest: Manifest, folder: Path | str) -> Manifest:
    """Copy a dataset's files into one folder: ``images/``, ``masks/`` and ``manifest.csv``.

    Images are copied byte for byte, an image that several cases share once. Masks of any kind that
    :func:`tmca.imaging.raster.read_mask` understands become 8-bit PNG of 0 and 255. Files are named after the cases.
    The folder appears only when it is complete.

    Args:
        manifest: The cases.
        folder: A new or empty folder.

    Returns:
        The manifest that was written, without the hashes of the masks, as those files are new.

    Raises:
        DataError: A file cannot be read.
        StorageError: The folder is not empty or could not be written.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(f"{folder} is there already and not empty", hint="choose a new folder, nothing was changed")
    copied: dict[Path, str] = {}
    names: set[str] = set()
    records: list[Record] = []
    with replace_folder(folder) as new:
        for name in ("images", "masks"):
            (new / name).mkdir()
        for record in track(manifest.records, f"Copying {manifest.name}", len(manifest.records)):
            name = _free_name(record.id, names)
            source, number = split_frame(record.image)
            if source not in copied:
                copied[source] = f"images/{name}{ending(source.name)}"
                _copy(manifest.root / source, new / copied[source])
            image = join_frame(copied[source], number).as_posix()
            mask_path = manifest.mask_path(record)
            if mask_path is not None:
                write_mask(new / "masks" / f"{name}.png", read_mask(mask_path))
            mask = None if mask_path is None else f"masks/{name}.png"
            records.append(replace(record, image=image, mask=mask, mask_sha256=""))
        Manifest(new, tuple(records), manifest.name).write(new / "manifest.csv")
    return Manifest(folder, tuple(records), manifest.name)


def _free_name(case: str, names: set[str]) -> str:
    """Return the case's id, with a number where another differs from it in case only, as some disks do not tell."""
    name, number = case, 1
    while name.lower() in names:
        number += 1
        name = f"{case}-{number}"
    names.add(name.lower())
    return name


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise DataError(f"Image file {source} does not exist", hint="check the path")
    shutil.copyfile(source, target)
