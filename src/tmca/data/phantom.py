"""Drawn image–mask–sentence triples: the quickstart, tests and smoke runs need no download.

A phantom is a textured, reddish image with two to four lesions in distinct places. The sentence names one or several of
them and nothing else, so that the image alone cannot tell the target: a method that ignores the sentence fails.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from tmca.data.grammar import COUNT_WORDS, PLACES
from tmca.data.manifest import Manifest, Record, seeded_number
from tmca.errors import ConfigError, DataError, StorageError
from tmca.files import replace_folder
from tmca.imaging.raster import write_image, write_mask

SizeClass = Literal["small", "medium", "large"]
Brightness = Literal["bright", "dark"]
Shape = Literal["round", "oval"]

MIN_SIZE = 32
"""Smallest side of a phantom, in pixels."""

NO_LESION = "no lesion in the image"
"""Sentence of a phantom without lesions."""

_SIZES: tuple[SizeClass, ...] = ("small", "medium", "large")
_BRIGHTNESSES: tuple[Brightness, ...] = ("bright", "dark")
_SHAPES: tuple[Shape, ...] = ("round", "oval")
_RADII: dict[SizeClass, tuple[float, float]] = {
    "small": (0.054, 0.062),
    "medium": (0.088, 0.094),
    "large": (0.134, 0.150),
}
_ASPECTS: dict[Shape, tuple[float, float]] = {"round": (0.93, 1.0), "oval": (0.5, 0.6)}
_CELL_MARGIN = 0.045
_GAP = 0.03
_OUTLINE = 0.07
_FOLDER_CONTENT = {"images", "masks", "manifest.csv"}
_MODALITY = "phantom"
_NAMED = 3

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Lesion:
    """One drawn lesion; lengths are fractions of the image's side.

    Attributes:
        centre: Row and column of its centre.
        radii: Longer and shorter radius of its ellipse.
        angle: Angle of the longer radius to the columns' direction, in radians.
        size: Its size class.
        brightness: Relative to the background.
        shape: Round or oval.
        place: Cell of the 3 × 3 grid that holds its centre.
    """

    centre: tuple[float, float]
    radii: tuple[float, float]
    angle: float
    size: SizeClass
    brightness: Brightness
    shape: Shape
    place: str

    @property
    def adjectives(self) -> tuple[str, str, str]:
        """Size, brightness and shape, in the order of the sentence."""
        return self.size, self.brightness, self.shape


@dataclass(frozen=True)
class Phantom:
    """One drawn triple.

    Attributes:
        image: uint8 ``(size, size, 3)``, RGB.
        mask: bool ``(size, size)``, true at the targets.
        text: The sentence that names the targets.
        lesions: Everything drawn.
        targets: The lesions that the sentence names.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    text: str
    lesions: tuple[Lesion, ...]
    targets: tuple[Lesion, ...]


def draw_phantom(
    rng: Generator, size: int = 128, *, no_lesion: bool = False, absent: bool = False, without_place: float = 0.15
) -> Phantom:
    """Draw one image with its mask and sentence.

    Args:
        rng: Source of every random choice.
        size: Height and width in pixels, at least :data:`MIN_SIZE`.
        no_lesion: Draw the background only, with :data:`NO_LESION` and an empty mask.
        absent: Let the sentence name a lesion in a place where there is none; the mask is empty.
        without_place: Share of the single targets whose place is left out of the sentence, where size, brightness and
            shape tell the target from the other lesions.

    Returns:
        The triple. The same generator state and arguments give the same one.

    Raises:
        ConfigError: The size is too small.
    """
    if size < MIN_SIZE:
        raise ConfigError(f"The size is {size}, expected at least {MIN_SIZE} pixels", hint="lesions would vanish")
    image = _background(rng, size)
    mask = np.zeros((size, size), dtype=bool)
    if no_lesion:
        return Phantom(_quantised(image), mask, NO_LESION, (), ())
    lesions = _place_lesions(rng, count=int(rng.choice([2, 3, 4])))
    if absent:
        texture = _smooth_noise(rng, size, cells=size // 4)
        for lesion in lesions:
            _draw_lesion(rng, image, None, lesion, texture)
        return Phantom(_quantised(image), mask, describe_targets([_absent_lesion(rng, lesions)]), tuple(lesions), ())
    target_count = min(int(rng.choice([1, 2, 3], p=[0.7, 0.24, 0.06])), len(lesions))
    chosen = set(rng.choice(len(lesions), size=target_count, replace=False).tolist())
    texture = _smooth_noise(rng, size, cells=size // 4)
    for number, lesion in enumerate(lesions):
        _draw_lesion(rng, image, mask if number in chosen else None, lesion, texture)
    targets = sorted((lesions[number] for number in chosen), key=lambda lesion: PLACES.index(lesion.place))
    text = describe_targets(targets, with_place=not (_is_distinct(targets, lesions) and rng.random() < without_place))
    return Phantom(_quantised(image), mask, text, tuple(lesions), tuple(targets))


def describe_targets(targets: list[Lesion], *, with_place: bool = True) -> str:
    """Return the sentence for one or several lesions: their count, the adjectives that all share, and their places."""
    first, *others = [lesion.adjectives for lesion in targets]
    shared = [word for position, word in enumerate(first) if all(other[position] == word for other in others)]
    noun = "lesion" if len(targets) == 1 else "lesions"
    what = " ".join([COUNT_WORDS[len(targets)], *shared, noun])
    places = ", ".join(lesion.place for lesion in targets)
    return f"{what}, located in {places} of the image" if with_place else what


def write_phantoms(
    folder: Path | str,
    counts: Mapping[str, int],
    *,
    size: int = 128,
    seed: int = 0,
    no_lesion_share: float = 0.05,
    absent_share: float = 0.08,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Draw a dataset: ``images/``, ``masks/`` and ``manifest.csv``.

    Every image depends on seed, split and its number only: a larger count begins with the same images.

    Args:
        folder: Where to; a folder of phantoms that is there is replaced as a whole.
        counts: Images of each split.
        size: Height and width in pixels.
        seed: Decides every image.
        no_lesion_share: Share of images without a lesion.
        absent_share: Share of images whose sentence names a lesion that is not there.
        progress: Called with the number of images written so far.

    Returns:
        The manifest that was written.

    Raises:
        ConfigError: A count is negative, a split's name is unfit for a file name, or the size is too small.
        StorageError: The folder holds something else, or could not be written.
    """
    for split, count in counts.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", split) or count < 0:
            raise ConfigError(f"Cannot draw {count} images for split {split!r}", hint="e.g. train: 200, val: 50")
    folder = Path(folder).resolve()
    _refuse_foreign(folder)
    records: list[Record] = []
    with replace_folder(folder) as new:
        for split, count in counts.items():
            for index in range(count):
                name = f"{split}-{index:05d}"
                rng = np.random.default_rng(seeded_number(seed, name))
                kind = rng.random()
                empty, absent = kind < no_lesion_share, kind < no_lesion_share + absent_share
                phantom = draw_phantom(rng, size, no_lesion=bool(empty), absent=bool(absent))
                record = Record(
                    id=name,
                    image=f"images/{name}.png",
                    mask=f"masks/{name}.png",
                    text=phantom.text,
                    split=split,
                    modality=_MODALITY,
                    text_provenance="from_mask",
                )
                write_image(new / record.image, phantom.image)
                write_mask(new / f"masks/{name}.png", phantom.mask)
                records.append(record)
                if progress is not None:
                    progress(len(records))
        Manifest(new, tuple(records), folder.name).write(new / "manifest.csv")
    return Manifest(folder, tuple(records), folder.name)


def _refuse_foreign(folder: Path) -> None:
    """Keep a user's folder from being replaced: only what :func:`write_phantoms` wrote, or nothing, may be there."""
    if not folder.is_dir():
        return
    names = {entry.name for entry in folder.iterdir()}
    if not names:
        return
    try:
        records = Manifest.read(folder / "manifest.csv").records
    except DataError:
        records = ()
    if not records or any(record.modality != _MODALITY for record in records):
        raise StorageError(
            f"{folder} is not empty and holds no phantoms", hint="choose a new folder, nothing was changed"
        )
    others = sorted(names - _FOLDER_CONTENT)
    if others:
        listed = ", ".join(others[:_NAMED]) + (f" and {len(others) - _NAMED} more" if len(others) > _NAMED else "")
        raise StorageError(
            f"{folder} holds phantoms, but also {listed}",
            hint="move that away, or choose a new folder; nothing was changed",
        )


def _is_distinct(targets: list[Lesion], lesions: list[Lesion]) -> bool:
    return len(targets) == 1 and sum(lesion.adjectives == targets[0].adjectives for lesion in lesions) == 1


def _place_lesions(rng: Generator, count: int) -> list[Lesion]:
    lesions: list[Lesion] = []
    while len(lesions) < count:
        lesion = _random_lesion(rng)
        apart = all(
            other.place != lesion.place
            and math.dist(other.centre, lesion.centre) > (other.radii[0] + lesion.radii[0]) * (1 + _OUTLINE) + _GAP
            for other in lesions
        )
        if apart:
            lesions.append(lesion)
    return lesions


def _absent_lesion(rng: Generator, lesions: list[Lesion]) -> Lesion:
    occupied = {lesion.place for lesion in lesions}
    while (lesion := _random_lesion(rng)).place in occupied:
        pass
    return lesion


def _random_lesion(rng: Generator) -> Lesion:
    size = _SIZES[rng.integers(3)]
    brightness = _BRIGHTNESSES[rng.integers(2)]
    shape = _SHAPES[rng.integers(2)]
    cell = int(rng.integers(9))
    radius = rng.uniform(*_RADII[size])
    aspect = math.sqrt(rng.uniform(*_ASPECTS[shape]))
    longer = radius / aspect
    centre = []
    for position in divmod(cell, 3):
        low = max(position / 3 + _CELL_MARGIN, longer * (1 + _OUTLINE) + 0.01)
        high = min((position + 1) / 3 - _CELL_MARGIN, 1 - longer * (1 + _OUTLINE) - 0.01)
        centre.append(float(rng.uniform(low, high)))
    return Lesion(
        centre=(centre[0], centre[1]),
        radii=(longer, radius * aspect),
        angle=float(rng.uniform(0, math.pi)),
        size=size,
        brightness=brightness,
        shape=shape,
        place=PLACES[cell],
    )


def _background(rng: Generator, size: int) -> Floats:
    """Return float RGB in [0, 1]: a tinted gradient with folds, mottling, grain and a vignette."""
    rows, columns, distance = _grid(size)
    coarse, middle, fine = (_smooth_noise(rng, size, cells) for cells in (3, 6, 14))
    slope = rng.uniform(-0.06, 0.06, size=2)
    light = 0.56 + rng.uniform(-0.03, 0.03) + slope[0] * rows + slope[1] * columns
    folds = np.sin(rng.uniform(5, 9) * (rows * rng.uniform(-1, 1) + columns * rng.uniform(-1, 1)) + 3 * coarse)
    grain = rng.standard_normal((size, size), dtype=np.float32)
    light = light + 0.045 * coarse + 0.025 * middle + 0.015 * fine + 0.02 * folds + 0.008 * grain
    light = light * (1 - rng.uniform(0.12, 0.28) * distance)
    tint = np.array([1.34, 0.72, 0.56]) + rng.uniform(-1, 1, size=3) * (0.08, 0.09, 0.08)
    hue = 0.05 * middle + 0.03 * fine  # patches that are redder than others
    image = np.empty((size, size, 3), dtype=np.float32)
    for channel, change in enumerate((0.3, -1.0, -0.7)):
        image[:, :, channel] = light * (tint[channel] + change * hue)
    return image


def _draw_lesion(
    rng: Generator, image: Floats, mask: NDArray[np.bool_] | None, lesion: Lesion, texture: Floats
) -> None:
    """Draw a lesion into the image, and into the mask where it is a target."""
    size = image.shape[0]
    reach = lesion.radii[0] * (1 + _OUTLINE) + 0.05
    top, left = (max(0, math.floor((middle - reach) * size)) for middle in lesion.centre)
    bottom, right = (min(size, math.ceil((middle + reach) * size)) for middle in lesion.centre)
    area = (slice(top, bottom), slice(left, right))
    down = (np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5) / size - lesion.centre[0]
    across = (np.arange(left, right, dtype=np.float32)[None, :] + 0.5) / size - lesion.centre[1]
    cosine, sine = math.cos(lesion.angle), math.sin(lesion.angle)
    along = (across * cosine + down * sine) / lesion.radii[0]
    aside = (down * cosine - across * sine) / lesion.radii[1]
    radius = np.hypot(along, aside)
    bearing = np.arctan2(aside, along)
    phases = rng.uniform(0, 2 * math.pi, size=3)
    waves = [np.sin(turns * bearing + phase) for turns, phase in zip((2, 3, 5), phases, strict=True)]
    outline = 1 + _OUTLINE * (0.3 * waves[0] + 0.4 * waves[1] + 0.3 * waves[2])
    depth = (outline - radius) * math.sqrt(lesion.radii[0] * lesion.radii[1]) * size  # pixels inside the outline
    softness = max(0.6, 0.008 * size)
    opacity = 1 / (1 + np.exp(-np.clip(depth / (0.5 * softness), -30, 30)))
    dome = np.clip(1 - radius**2, 0, 1) * (1 - 0.25 * (along + aside))
    grain = texture[area]
    if lesion.brightness == "bright":
        shade = 0.74 + rng.uniform(-0.02, 0.04) + 0.10 * dome + 0.035 * grain
        colour = np.array([1.12, 0.98, 0.84]) + rng.uniform(-0.03, 0.03, size=3)
    else:
        shade = 0.2 + rng.uniform(-0.03, 0.02) + 0.03 * dome + 0.015 * grain
        colour = np.array([1.45, 0.66, 0.62]) + rng.uniform(-0.06, 0.06, size=3)
    drawn = shade[:, :, None] * colour.astype(np.float32)
    image[area] += opacity[:, :, None] * (drawn - image[area])
    if mask is not None:
        mask[area] |= depth > 0


def _quantised(image: Floats) -> NDArray[np.uint8]:
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _smooth_noise(rng: Generator, size: int, cells: int) -> Floats:
    """Return noise of about unit variance that varies over ``size / cells`` pixels."""
    knots = rng.standard_normal((cells + 1, cells + 1), dtype=np.float32)
    first, before, after = _interpolation(size, cells)
    # Not as matrix products: their threads cost more than such small products, and their last bits vary by machine.
    rows = knots[first] * before[:, None] + knots[first + 1] * after[:, None]
    return np.asarray(rows[:, first] * before + rows[:, first + 1] * after, dtype=np.float32)


@functools.lru_cache(maxsize=64)
def _interpolation(size: int, cells: int) -> tuple[NDArray[np.intp], Floats, Floats]:
    """Return each pixel's first knot and the weights of this and the next one, which keep the noise's variance."""
    position = (np.arange(size) + 0.5) * cells / size
    knot = position.astype(np.intp)
    weight = position - knot
    weight = weight * weight * (3 - 2 * weight)
    norm = np.hypot(1 - weight, weight)
    return knot, ((1 - weight) / norm).astype(np.float32), (weight / norm).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Floats, Floats, Floats]:
    """Return row and column from -1 to 1, and the squared distance from the centre, 1 at the corners."""
    line = ((np.arange(size) + 0.5) * 2 / size - 1).astype(np.float32)
    rows, columns = line[:, None], line[None, :]
    return rows, columns, np.asarray((rows**2 + columns**2) / 2, dtype=np.float32)
