"""Masks to facts and sentences.

The words are those of :mod:`tmca.data.grammar`. The size limits of polyps are those of the published sentences; places,
and the sides, thirds and counts of lungs, were fitted on the training splits of Kvasir-SEG and QaTa-COV19-v2
(``benchmarks/describe_agreement.py``). The limits for phantoms, shapes and colours are set by hand. A sentence written
from a mask carries ground truth: see :func:`provenance_notice`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, UInt8
from numpy.typing import NDArray
from scipy import ndimage

from tmca.data.grammar import (
    GRAMMARS,
    LEVELS,
    PARAPHRASES,
    PLACES,
    SIDES,
    SIZES,
    THIRDS,
    Facts,
    Grammar,
    write_sentence,
)
from tmca.data.manifest import Manifest, Record, seeded_number
from tmca.errors import ConfigError, DataError, unknown_name
from tmca.imaging.reading import read_image, read_mask
from tmca.progress import say, track

MaskArray = Bool[np.ndarray, "height width"]
ImageArray = UInt8[np.ndarray, "rows columns 3"]

SPECK_SHARES: dict[Grammar, float] = {"polyp": 0.0005, "phantom": 0.0005, "lung": 0.002}
"""Share of the image below which a connected part is dropped as a speck; the largest part always counts."""

SIZE_LIMITS: dict[Grammar, tuple[float, float, float]] = {
    "polyp": (0.0, 0.08, 0.30),
    "phantom": (0.0, 0.0175, 0.039),
    "lung": (0.0, 0.08, 0.30),
}
"""Shares of the image above which a part is small, medium and large."""

ROUND_RATIO = 0.75
"""Ratio of the shorter to the longer axis from which a part is round; below it is oval."""

IRREGULAR_FILL = 0.9
"""Ratio of a part's area to that of the ellipse with its moments below which the part is irregular."""

SIDE_SHARE = 0.03
"""Share of the mask in one half of the image from which that lung counts as infected."""

LUNG_BANDS = (0.32, 0.38)
"""Heights, as shares of the image, between the upper, the middle and the lower third of a lung."""

THIRD_SHARES = (0.02, 0.05, 0.02)
"""Share of a lung's mask in its upper, middle and lower third from which the third counts as infected."""

REFERENCE_COLOURS: dict[str, tuple[float, float, float]] = {
    "white": (90, 5, 10),
    "yellow": (78, 10, 60),
    "orange": (64, 40, 52),
    "tan": (68, 18, 30),
    "brown": (42, 25, 32),
    "pink": (68, 36, 20),
    "red": (47, 52, 38),
    "gray": (55, 0, 0),
    "black": (12, 0, 0),
}
"""Colour words as CIELAB (D65) values; the nearest to the median colour under the mask is chosen."""


@dataclass(frozen=True)
class _Part:
    """One connected part: its pixels' rows and columns, and its area as a share of the image."""

    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    area: float

    def centre(self, shape: tuple[int, ...]) -> tuple[float, float]:
        """Return the centre of the bounding box as shares of height and width."""
        down = int(self.rows.min()) + int(self.rows.max()) + 1
        across = int(self.columns.min()) + int(self.columns.max()) + 1
        return down / 2 / shape[0], across / 2 / shape[1]


def measure(mask: MaskArray, image: ImageArray | None = None, grammar: Grammar = "polyp") -> Facts:
    """Return the facts that a mask shows.

    Targets are the connected parts (diagonal neighbours connect), less specks. Polyps and phantoms: sizes are shares of
    the image, a part's place is the cell of a 3 × 3 grid that holds the centre of its box, shape and colour are those
    of the largest part; of several phantoms only what all share is stated. Lungs: the image's halves stand for the
    lungs and its height for theirs, as their outline is not known.

    Args:
        mask: Ground truth, upright.
        image: The image, for the colour; without it no colour is stated.
        grammar: What the mask shows.

    Raises:
        ConfigError: The grammar does not exist.
        DataError: Image and mask differ in size.
    """
    if grammar not in GRAMMARS:
        raise unknown_name("grammar", grammar, GRAMMARS)
    if image is not None and image.shape[:2] != mask.shape:
        raise DataError(
            f"The mask is {mask.shape[1]}×{mask.shape[0]}, its image {image.shape[1]}×{image.shape[0]}",
            hint="export the mask at the image's size",
        )
    parts = parts_of(mask, SPECK_SHARES[grammar])
    if not parts:
        return Facts(grammar, present=False, count=0)
    if grammar == "lung":
        return _measure_lungs(mask, len(parts))
    sizes = [_size_class(part.area, grammar) for part in parts]
    shapes = [_shape_word(part) for part in parts]
    places = sorted((_place_of(*part.centre(mask.shape)) for part in parts), key=PLACES.index)
    if grammar == "polyp":
        named = tuple(size for size in SIZES if size in sizes)
        shape, colour = shapes[:1], [] if image is None else [_colour_word(image, parts[0])]
    else:
        named = tuple(sizes[:1]) if len(set(sizes)) == 1 else ()
        shape, colour = shapes, [] if image is None else [_brightness(image, mask, part) for part in parts]
    return Facts(
        grammar,
        present=True,
        count=len(parts),
        sizes=named,
        colour=colour[0] if len(set(colour)) == 1 else None,
        shape=shape[0] if len(set(shape)) == 1 else None,
        places=tuple(places),
    )


def describe(
    mask: MaskArray,
    image: ImageArray | None = None,
    grammar: Grammar = "polyp",
    level: str = "p6",
    paraphrase: int = 0,
) -> str:
    """Return a sentence that describes a mask.

    Args:
        mask: Ground truth, upright.
        image: The image, for the colour; without it no colour is named.
        grammar: What the mask shows.
        level: Detail, ``p0`` (an empty sentence) to ``p6`` (everything); see
            :func:`tmca.data.grammar.write_sentence`.
        paraphrase: Which wording; 0 is that of the published sentences.

    Raises:
        ConfigError: The grammar or the level does not exist.
        DataError: Image and mask differ in size.
    """
    return write_sentence(measure(mask, image, grammar), level, paraphrase)


def describe_manifest(
    manifest: Manifest,
    grammar: Grammar,
    level: str = "p6",
    *,
    paraphrases: int = 0,
    seed: int = 0,
    overwrite: bool = False,
) -> Manifest:
    """Return the manifest with sentences written from its masks, ``text_provenance`` being ``from_mask``.

    Cases without a mask stay as they are. So do cases whose sentence was not written from a mask, unless ``overwrite``.
    One line to stderr says how many of each there were.

    Args:
        manifest: The cases; one at a time is read.
        grammar: What the masks show.
        level: Detail of the sentences; ``p0`` removes them.
        paraphrases: Number of wordings beside the published one, 0 to 3; each case gets one of them at random.
        seed: Decides which wording a case gets.
        overwrite: Replace sentences of other provenance too.

    Raises:
        ConfigError: Grammar, level or number of paraphrases does not exist.
        DataError: A file cannot be read, or image and mask differ in size.
    """
    if grammar not in GRAMMARS:
        raise unknown_name("grammar", grammar, GRAMMARS)
    if level not in LEVELS:
        raise unknown_name("level", level, LEVELS)
    if not 0 <= paraphrases < PARAPHRASES:
        raise ConfigError(
            f"{paraphrases} paraphrases asked for, there are {PARAPHRASES - 1}", hint=f"choose 0 to {PARAPHRASES - 1}"
        )

    def described() -> Iterator[Record]:
        for record in manifest.records:
            mask_path = manifest.mask_path(record)
            if mask_path is None or (_is_foreign(record) and not overwrite):
                yield record
                continue
            image = read_image(manifest.image_path(record)) if grammar != "lung" else None
            wording = seeded_number(seed, record.id) % (paraphrases + 1)
            try:
                text = describe(read_mask(mask_path), image, grammar, level, wording)
            except DataError as error:
                raise DataError(f"Case {record.id!r}: {error.message}", hint=error.hint) from error
            yield replace(record, text=text or None, text_provenance="from_mask")

    total = len(manifest.records)
    records = tuple(track(described(), f"Describing {manifest.name}", total))
    without = sum(record.mask is None for record in manifest.records)
    kept = 0 if overwrite else sum(record.mask is not None and _is_foreign(record) for record in manifest.records)
    note = f"{total - without - kept} of {total} cases described"
    note += f"; {without} have no mask" * bool(without)
    note += f"; {kept} keep the sentence they had (--replace-sentences replaces it)" * bool(kept)
    say(note)
    return manifest.with_records(records)


def provenance_notice(manifest: Manifest) -> str | None:
    """Return what training and scoring on sentences written from masks mean, or ``None`` where there are none."""
    texts = [record for record in manifest.records if record.text is not None]
    count = sum(record.text_provenance == "from_mask" for record in texts)
    if not count:
        return None
    return (
        f"{count} of {len(texts)} sentences were written from the masks (text_provenance from_mask): they carry ground "
        "truth. Scores with them tell what a perfect description is worth, not what a person's sentence is; "
        "do not compare them with scores on human sentences."
    )


def _is_foreign(record: Record) -> bool:
    return record.text is not None and record.text_provenance != "from_mask"


def parts_of(mask: MaskArray, speck_share: float) -> list[_Part]:
    """Return the connected parts, the largest first, without specks."""
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    parts = []
    for number, box in enumerate(ndimage.find_objects(labels, count), start=1):
        rows, columns = np.nonzero(labels[box] == number)
        parts.append(_Part(rows + box[0].start, columns + box[1].start, len(rows) / mask.size))
    parts.sort(key=lambda part: -part.area)
    return [part for number, part in enumerate(parts) if number == 0 or part.area >= speck_share]


def _size_class(area: float, grammar: Grammar) -> str:
    return ("small", "medium", "large")[sum(area > limit for limit in SIZE_LIMITS[grammar][1:])]


def _place_of(down: float, across: float) -> str:
    return PLACES[3 * min(int(3 * down), 2) + min(int(3 * across), 2)]


def _shape_word(part: _Part) -> str:
    if len(part.rows) < 2:
        return "round"
    # A pixel is a square, not a point: its own spread of 1/12 keeps thin parts from having no area.
    covariance = np.cov(np.stack([part.rows, part.columns]), bias=True) + np.eye(2) / 12
    shorter, longer = np.sqrt(np.linalg.eigvalsh(covariance))
    if len(part.rows) / (4 * np.pi * shorter * longer) < IRREGULAR_FILL:
        return "irregular"
    return "round" if shorter / longer >= ROUND_RATIO else "oval"


def _colour_word(image: ImageArray, part: _Part) -> str:
    colour = _lab(np.median(image[part.rows, part.columns], axis=0))
    names = list(REFERENCE_COLOURS)
    references = np.array([REFERENCE_COLOURS[name] for name in names])
    return names[int(((references - colour) ** 2).sum(axis=1).argmin())]


def _brightness(image: ImageArray, mask: MaskArray, part: _Part) -> str:
    grey = image.mean(axis=2)
    outside = grey[~mask] if not mask.all() else grey
    return "bright" if np.median(grey[part.rows, part.columns]) > np.median(outside) else "dark"


def _lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return an sRGB colour of 0 to 255 as CIELAB under D65."""
    shares = rgb / 255
    linear = np.where(shares > 0.04045, ((shares + 0.055) / 1.055) ** 2.4, shares / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ linear / (0.9505, 1.0, 1.089)
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def _measure_lungs(mask: MaskArray, count: int) -> Facts:
    halves = half_profiles(mask)
    total = mask.sum()
    sides = tuple(side for side in SIDES if halves[side].sum() >= SIDE_SHARE * total)
    thirds = {side: _thirds_of(halves[side]) if side in sides else () for side in SIDES}
    return Facts(
        "lung",
        present=True,
        count=count,
        bilateral=len(sides) == 2,
        sides=sides,
        left=thirds["left"],
        right=thirds["right"],
    )


def half_profiles(mask: MaskArray) -> dict[str, NDArray[np.intp]]:
    """Return the number of true pixels in each row of the image's left and right half."""
    middle = mask.shape[1] // 2
    return {"left": mask[:, :middle].sum(axis=1), "right": mask[:, middle:].sum(axis=1)}


def _thirds_of(profile: NDArray[np.intp]) -> tuple[str, ...]:
    edges = [0, *(round(band * len(profile)) for band in LUNG_BANDS), len(profile)]
    amounts = [int(profile[start:end].sum()) for start, end in itertools.pairwise(edges)]
    limits = [share * sum(amounts) for share in THIRD_SHARES]
    return tuple(third for third, amount, limit in zip(THIRDS, amounts, limits, strict=True) if amount >= limit)
