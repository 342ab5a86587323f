"""Write a manifest from a folder of images, a folder of masks with the same stems, and a table of sentences.

The table is a CSV with the columns image (name or stem), text and, if known, patient_id. A patient's cases stay in one
split.

python examples/own_manifest.py data/mine --texts data/mine/texts.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tmca import Manifest
from tmca.data.manifest import Record, read_rows
from tmca.data.splits import split_manifest
from tmca.jobs import find_images


def main(arguments: list[str] | None = None) -> None:
    """Write and check the manifest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds images/ and masks/")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--val", type=float, default=0.1, help="share of the cases")
    parser.add_argument("--test", type=float, default=0.2, help="share of the cases")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    root = options.folder.absolute()
    rows = {Path(row["image"]).stem: row for _, row in read_rows(options.texts, required=("image", "text"))}
    masks = {path.stem: path for path in find_images([root / "masks"])}
    records = []
    for image in find_images([root / "images"]):
        if image.stem not in rows or image.stem not in masks:
            print(f"left out, no sentence or no mask: {image.name}")  # noqa: T201
            continue
        row = rows[image.stem]
        place = {"image": image.relative_to(root).as_posix(), "mask": masks[image.stem].relative_to(root).as_posix()}
        patient = row.get("patient_id", "").strip()
        records.append(Record(image.stem, **place, text=row["text"].strip() or None, patient_id=patient))
    shares = {"train": 1 - options.val - options.test, "val": options.val, "test": options.test}
    manifest = split_manifest(Manifest(root, tuple(records), root.name), shares, options.seed)
    manifest.check(require_text=True, require_mask=True)
    manifest.write(root / "manifest.csv")
    print(f"{root / 'manifest.csv'}: {manifest.splits}")  # noqa: T201


if __name__ == "__main__":
    main()
