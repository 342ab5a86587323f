"""A manifest as a dataset of nnU-Net: RGB pictures and label pictures as PNG, and our split as its fold 0."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8

from tmca.data.cache import decode, drawn
from tmca.data.manifest import Manifest, Record
from tmca.files import write_json
from tmca.imaging.raster import write_image
from tmca.imaging.reading import read_image, read_mask
from tmca.nnunet.workspace import DATASET
from tmca.progress import track

ENDING = ".png"
_LONGEST_NAME = 60


def export(manifest: Manifest, folder: Path, *, image_size: int | None = None) -> None:
    """Write the cases of a manifest as a dataset of nnU-Net.

    ``raw/Dataset001_tmca`` gets the images and labels of ``train`` and ``val`` as training cases, those of ``test`` as
    test cases, ``dataset.json``, and ``mapping.json``: case name → record id. In
    ``preprocessed/Dataset001_tmca/splits_final.json`` our training and validation cases are fold 0.

    Args:
        manifest: Cases with splits ``train`` and ``val``, and ``test`` if wanted.
        folder: Gets the folders ``raw`` and ``preprocessed``.
        image_size: Resize to this many pixels, by the code that does it for the other methods; ``None`` leaves every
            image at its own size.

    Raises:
        DataError: A split is missing, or a file cannot be used.
        StorageError: A file cannot be written.
    """
    raw = folder / "raw" / DATASET
    mapping: dict[str, str] = {}
    fold = {split: list(case_names(manifest.split(split))) for split in ("train", "val")}
    for split, kind in (("train", "Tr"), ("val", "Tr"), ("test", "Ts")):
        if split in manifest.splits:
            places = (raw / f"images{kind}", raw / f"labels{kind}")
            mapping |= write_cases(manifest.split(split), *places, image_size=image_size)
    write_json(raw / "mapping.json", mapping)
    write_json(
        raw / "dataset.json",
        {
            "channel_names": {"0": "R", "1": "G", "2": "B"},
            "labels": {"background": 0, "target": 1},
            "numTraining": len(fold["train"]) + len(fold["val"]),
            "file_ending": ENDING,
        },
    )
    write_json(folder / "preprocessed" / DATASET / "splits_final.json", [fold])


def write_cases(
    manifest: Manifest, images: Path, labels: Path | None = None, *, image_size: int | None
) -> dict[str, str]:
    """Write the images of one split, and their labels where a folder for them is given.

    Args:
        manifest: The cases.
        images: Folder of the images.
        labels: Folder of the labels: 0 and 1.
        image_size: See :func:`export`.

    Returns:
        Case name → record id.

    Raises:
        DataError: A file cannot be used.
        StorageError: A file cannot be written.
    """
    names = case_names(manifest)
    records = zip(names, manifest.records, strict=True)
    for case, record in track(records, f"Exporting {manifest.records[0].split}", len(names)):
        image, mask = _read(manifest, record, image_size)
        write_image(images / f"{case}_0000{ENDING}", image)
        if labels is not None:
            write_image(labels / f"{case}{ENDING}", mask.astype(np.uint8))
    return names


def case_names(manifest: Manifest) -> dict[str, str]:
    """Return case name → record id: ids cut to letters, digits and hyphens, made distinct by split and number."""
    return {
        f"{_safe(record.split)}{number:05d}_{_safe(record.id)}".rstrip("_"): record.id
        for number, record in enumerate(manifest.records)
    }


def _read(
    manifest: Manifest, record: Record, image_size: int | None
) -> tuple[UInt8[np.ndarray, "height width 3"], Bool[np.ndarray, "height width"]]:
    if image_size is not None:
        chosen = drawn(decode(manifest, record, image_size), None)
        return chosen.image, chosen.mask
    mask_path = manifest.mask_path(record)
    image = read_image(manifest.image_path(record))
    return image, np.zeros(image.shape[:2], dtype=np.bool_) if mask_path is None else read_mask(mask_path)


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:_LONGEST_NAME]
