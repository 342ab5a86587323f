"""Which copies of an image does the audit recognise, and does it take distinct images for copies?

    python benchmarks/copy_detection.py [--data FOLDER] [--copies 100]

Each alteration is applied to some images; each altered copy is then looked for among all images of the dataset. Pairs
of the dataset's own images that are called copies are counted too: look at them before calling them false. Draws
phantoms where no data is named. Prints a table and writes ``benchmarks/results/copy_detection.json``.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from tmca.data.audit.similarity import (
    SAME_DETAIL,
    Candidate,
    detail_correlation,
    detail_view,
    find_candidates,
    oriented,
    thumbnail,
)
from tmca.data.layouts import open_dataset
from tmca.data.manifest import Manifest
from tmca.data.phantom import write_phantoms
from tmca.imaging.raster import read_image

RESULT = Path(__file__).parent / "results" / "copy_detection.json"

Pixels = NDArray[np.uint8]
Alteration = Callable[[Image.Image, Generator], Image.Image]


def encoded(image: Image.Image, quality: int) -> Image.Image:
    """Return the image after JPEG."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def resized(image: Image.Image, across: float, down: float) -> Image.Image:
    """Return the image at another size."""
    return image.resize((round(image.width * across), round(image.height * down)), Image.Resampling.BICUBIC)


def cropped(image: Image.Image, left: float, right: float, top: float, bottom: float) -> Image.Image:
    """Return the image without shares of its sides."""
    width, height = image.size
    return image.crop(
        (round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height))
    )


def mapped(image: Image.Image, change: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Image.Image:
    """Return the image with changed values, 0 to 255."""
    return Image.fromarray(np.clip(change(np.asarray(image, dtype=np.float64)), 0, 255).astype(np.uint8))


ALTERATIONS: dict[str, Alteration] = {
    "JPEG, quality 30": lambda image, _: encoded(image, 30),
    "half the size": lambda image, _: resized(image, 0.5, 0.5),
    "1.3 times as wide": lambda image, _: resized(image, 1.3, 1.0),
    "2 % cut off each side": lambda image, _: cropped(image, *[0.02] * 4),
    "5 % cut off each side": lambda image, _: cropped(image, *[0.05] * 4),
    "0 to 5 % cut off each side at random": lambda image, rng: cropped(image, *rng.uniform(0, 0.05, size=4)),
    "5 % cut off the left side": lambda image, _: cropped(image, 0.05, 0, 0, 0),
    "contrast × 1.25, brighter by 10, clipped": lambda image, _: mapped(image, lambda values: 1.25 * values + 10),
    "gamma 0.7": lambda image, _: mapped(image, lambda values: 255 * (values / 255) ** 0.7),
    "noise, standard deviation 8": lambda image, rng: mapped(
        image, lambda values: values + rng.normal(0, 8, values.shape)
    ),
    "mirrored left-right": lambda image, _: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "mirrored, cropped at random, JPEG 50": lambda image, rng: encoded(
        cropped(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), *rng.uniform(0, 0.05, size=4)), 50
    ),
}


def is_copy(candidate: Candidate, first: Pixels, second: Pixels) -> bool:
    """Return whether the audit would call a candidate pair copies."""
    view = oriented(detail_view(second), candidate.orientation)
    return detail_correlation(detail_view(first), view, candidate.crop) >= SAME_DETAIL


def recall(manifest: Manifest, thumbnails: NDArray[np.uint8], copies: int) -> dict[str, float]:
    """Return the share of altered copies that are found, by alteration."""
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(thumbnails), size=min(copies, len(thumbnails)), replace=False)
    shares = {}
    for name, alter in ALTERATIONS.items():
        originals = [read_image(manifest.image_path(manifest.records[number])) for number in chosen]
        altered = [np.asarray(alter(Image.fromarray(image), rng)) for image in originals]
        stack = np.concatenate([thumbnails, np.stack([thumbnail(image) for image in altered])])
        wanted = {frozenset((int(number), len(thumbnails) + place)): place for place, number in enumerate(chosen)}
        found = set()
        for candidate in find_candidates(stack):
            place = wanted.get(frozenset((candidate.first, candidate.second)))
            if place is None:
                continue
            pair = (originals[place], altered[place])
            first, second = pair if candidate.first < len(thumbnails) else pair[::-1]
            if is_copy(candidate, first, second):
                found.add(place)
        shares[name] = len(found) / len(chosen)
        print(f"{name:42s} {100 * shares[name]:5.1f} %", flush=True)
    return shares


def called_copies(manifest: Manifest, thumbnails: NDArray[np.uint8]) -> int:
    """Return how many pairs of the dataset's own images are called copies."""
    images = [manifest.image_path(record) for record in manifest.records]
    pairs = find_candidates(thumbnails)
    return sum(is_copy(pair, read_image(images[pair.first]), read_image(images[pair.second])) for pair in pairs)


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="manifest or dataset folder")
    parser.add_argument("--copies", type=int, default=100, help="images that are altered")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            write_phantoms(Path(folder) / "phantoms", {"train": 1000}, size=224, seed=0)
        manifest = open_dataset(options.data or Path(folder) / "phantoms")
        thumbnails = np.stack([thumbnail(read_image(manifest.image_path(record))) for record in manifest.records])
        shares = recall(manifest, thumbnails, options.copies)
        pairs = called_copies(manifest, thumbnails)
    total = len(thumbnails) * (len(thumbnails) - 1) // 2
    print(f"pairs of the dataset's own images called copies: {pairs} of {total}")
    result = json.loads(RESULT.read_text("utf-8")) if RESULT.is_file() else {}
    result[manifest.name] = {"images": len(thumbnails), "copies": options.copies, "recall": shares, "own_pairs": pairs}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
