"""Copies of an image among thousands: re-encoded, resized, cropped a little, brighter or mirrored.

First every pair is compared by a perceptual hash: the low frequencies of a thumbnail, as they differ from the other
images of the set. What all chest films have in common thus counts for nothing. The few pairs that are alike are then
aligned and correlated in their fine detail, which two films of one patient, or two frames of one film, do not share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Value = TypeVar("Value", bound=np.generic)
Orientation = Literal["same", "left-right", "top-bottom", "turned"]

ORIENTATIONS: tuple[Orientation, ...] = ("same", "left-right", "top-bottom", "turned")
"""How the second image of a pair may be mirrored; "turned" is by 180°."""

THUMBNAIL_SIZE = 48
"""Height and width of the thumbnails that are hashed."""

DETAIL_SIZE = 128
"""Height and width at which pairs are aligned and correlated."""

FREQUENCIES = 12
"""Cosine frequencies of the hash in each direction; all but the mean are used."""

ALIKE = 0.75
"""Correlation of two hashes from which a pair is looked at closely."""

NEIGHBOURS = 8
"""Largest number of pairs that one image brings up for a close look."""

SAME_DETAIL = 0.8
"""Correlation of the fine detail from which two images are copies of each other."""

DETAIL_BAND = (1.0, 4.0)
"""Standard deviations in pixels of the two blurs between which the fine detail lies."""

FLAT = 2.0
"""Standard deviation of a thumbnail, of 255, below which it is blank and resembles nothing."""

Crop = tuple[float, float, float, float]
"""Shares of width and height cut off at left, right, top and bottom."""

_CROPS: tuple[Crop, ...] = (
    *((margin,) * 4 for margin in (0.0, 0.025, 0.05)),
    *((0.025, 0.0, 0.0, 0.0), (0.0, 0.025, 0.0, 0.0), (0.0, 0.0, 0.025, 0.0), (0.0, 0.0, 0.0, 0.025)),
)
_PATCH = 16
_FEWEST_PATCHES = 4
_LEAST_DETAIL = 1.0  # grey values; the noise of JPEG lies below
_START_BLUR = 2.0
_PRIOR_WEIGHT = 50
_BLOCK = 256
_STEPS = 12
_MOST_CUT = 0.12
_SMALLEST_GAIN = 1e-4

Thumbnails = UInt8[np.ndarray, "images 48 48"]
Grey = Float[np.ndarray, "128 128"]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Candidate:
    """Two images whose hashes are alike.

    Attributes:
        first: Number of the image that may hold more.
        second: Number of the image that may be a copy of a part of it.
        orientation: How the second has to be mirrored to look like the first.
        crop: What may have been cut off the first.
        likeness: Correlation of the hashes, in [-1, 1].
    """

    first: int
    second: int
    orientation: Orientation
    crop: Crop
    likeness: float


def thumbnail(image: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "48 48"]:
    """Return the image as a grey square of :data:`THUMBNAIL_SIZE`, whatever its proportions."""
    return np.asarray(_grey_square(image, THUMBNAIL_SIZE))


def detail_view(image: UInt8[np.ndarray, "height width 3"]) -> Grey:
    """Return the image as a grey square of :data:`DETAIL_SIZE`, float32, 0 to 255, for :func:`detail_correlation`."""
    return np.asarray(_grey_square(image, DETAIL_SIZE), dtype=np.float32)


def find_candidates(thumbnails: Thumbnails) -> list[Candidate]:
    """Return the pairs of images that are alike enough to be looked at closely.

    Every pair is compared in four orientations and with up to 5 % cut off each side; time grows with the square of
    the number of images (9,000 take some ten seconds of one core), memory with the number.

    Args:
        thumbnails: From :func:`thumbnail`; blank ones are left out.

    Returns:
        Pairs of distinct numbers, each pair once, in the order of the images.
    """
    used = np.flatnonzero(thumbnails.std(axis=(1, 2)) >= FLAT)
    if len(used) < 2:
        return []
    shown = thumbnails[used]
    plain = _coefficients(shown, _CROPS[0])
    centre, scale = _statistics(plain)
    references = [_hashes(_coefficients(shown, crop), centre, scale) for crop in _CROPS]
    flips = {
        "same": shown,
        "left-right": shown[:, :, ::-1],
        "top-bottom": shown[:, ::-1],
        "turned": shown[:, ::-1, ::-1],
    }
    queries = {name: _hashes(_coefficients(flips[name], _CROPS[0]), centre, scale) for name in ORIENTATIONS}
    best: dict[tuple[int, int], Candidate] = {}
    for start in range(0, len(used), _BLOCK):
        for name, rows in queries.items():
            block = rows[start : start + _BLOCK]
            likeness = block @ references[0].T
            for reference in references[1:]:
                np.maximum(likeness, block @ reference.T, out=likeness)
            np.fill_diagonal(likeness[:, start:], -1)
            for row, column in _nearest(likeness):
                crop = int(np.argmax([block[row] @ reference[column] for reference in references]))
                pair = (int(used[column]), int(used[start + row]))
                found = Candidate(*pair, name, _CROPS[crop], float(likeness[row, column]))
                key = (min(pair), max(pair))
                if key not in best or found.likeness > best[key].likeness:
                    best[key] = found
    return [best[key] for key in sorted(best)]


def oriented(image: Grey, orientation: Orientation) -> Grey:
    """Return the image mirrored as named."""
    rows = -1 if orientation in ("top-bottom", "turned") else 1
    columns = -1 if orientation in ("left-right", "turned") else 1
    return image[::rows, ::columns]


def detail_correlation(first: Grey, second: Grey, crop: Crop = _CROPS[0]) -> float:
    """Return how well the fine detail of two images agrees where the second shows a part of the first.

    The part is found by least squares from the given start: scale and shift of rows and columns, first of blurred
    images. Then the detail is correlated patch by patch, so that neither brightness and contrast nor black frames and
    burnt-in letters decide, and a quarter of the patches may disagree.

    Args:
        first: From :func:`detail_view`.
        second: The same, mirrored already if need be.
        crop: What the second lacks of the first, roughly; see :class:`Candidate`.

    Returns:
        Lower quartile of the patches' correlations, in [-1, 1]; 0 where the two cannot be aligned or hold no detail.
    """
    place = _aligned(ndimage.gaussian_filter(first, _START_BLUR), ndimage.gaussian_filter(second, _START_BLUR), crop)
    if place is None:
        return 0.0
    place = _aligned(first, second, place) or place
    rows, columns = _positions(place)
    part = _sampled(first, rows, columns)
    within = [(line >= 0) & (line <= DETAIL_SIZE - 1) for line in (rows, columns)]
    inside = _patches(np.outer(*within)).all(axis=1)
    ours, theirs = (_patches(_detail(image)) for image in (part, second))
    kept = inside & (ours.std(axis=1) > _LEAST_DETAIL) & (theirs.std(axis=1) > _LEAST_DETAIL)
    if kept.sum() < _FEWEST_PATCHES:
        return 0.0
    ours, theirs = (patches[kept] - patches[kept].mean(axis=1, keepdims=True) for patches in (ours, theirs))
    norms = np.sqrt((ours**2).sum(axis=1) * (theirs**2).sum(axis=1))
    return float(np.quantile((ours * theirs).sum(axis=1) / norms, 0.25))


def _grey_square(image: NDArray[np.uint8], size: int) -> Image.Image:
    return Image.fromarray(image).convert("L").resize((size, size), Image.Resampling.BILINEAR)


def _coefficients(thumbnails: NDArray[np.uint8], crop: Crop) -> Floats:
    """Return the cosine coefficients of the part that a crop leaves, in standard deviations of the image."""
    left, right, top, bottom = crop
    across, down = _cosines(left, right), _cosines(top, bottom)
    coefficients = np.empty((len(thumbnails), FREQUENCIES**2 - 1), dtype=np.float32)
    for start in range(0, len(thumbnails), _BLOCK):
        values = thumbnails[start : start + _BLOCK].astype(np.float32)
        values -= values.mean(axis=(1, 2), keepdims=True)
        values /= values.std(axis=(1, 2), keepdims=True)
        coefficients[start : start + _BLOCK] = (down @ values @ across.T).reshape(len(values), -1)[:, 1:]
    return coefficients


def _cosines(before: float, after: float) -> Floats:
    """Return the integral of each cosine over each pixel, the cosines being those of the part that is left."""
    edges = np.arange(THUMBNAIL_SIZE + 1) / THUMBNAIL_SIZE
    edges = np.clip((edges - before) / (1 - before - after), 0, 1)
    turns = np.pi * np.arange(1, FREQUENCIES)[:, None]
    waves = np.diff(np.sin(turns * edges), axis=1) / turns
    return np.concatenate([np.diff(edges)[None], waves]).astype(np.float32)


def _statistics(coefficients: Floats) -> tuple[Floats, Floats]:
    """Return centre and spread of each coefficient over the images.

    Few images say little about what is usual: until there are many, the spread is that of natural images, which falls
    with the frequency, and the centre 0.
    """
    count = len(coefficients)
    steps = np.arange(FREQUENCIES)
    squares = (steps[:, None] ** 2 + steps[None] ** 2).reshape(-1)[1:]
    usual = (1 / squares) / (1 / squares).sum() * (coefficients**2).sum(axis=1).mean()
    share = count / (count + _PRIOR_WEIGHT)
    variance = share * coefficients.var(axis=0) + (1 - share) * usual
    return share * coefficients.mean(axis=0), np.sqrt(variance).astype(np.float32)


def _hashes(coefficients: Floats, centre: Floats, scale: Floats) -> Floats:
    values = (coefficients - centre) / scale
    values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    return np.asarray(values, dtype=np.float32)


def _nearest(likeness: Floats) -> list[tuple[int, int]]:
    """Return row and column of the pairs that are alike, at most :data:`NEIGHBOURS` a row."""
    pairs: list[tuple[int, int]] = []
    for row in np.flatnonzero(likeness.max(axis=1) >= ALIKE):
        columns = np.flatnonzero(likeness[row] >= ALIKE)
        order = np.argsort(-likeness[row, columns], kind="stable")[:NEIGHBOURS]
        pairs += [(int(row), int(column)) for column in columns[order]]
    return pairs


def _aligned(first: Floats, second: Floats, crop: Crop) -> Crop | None:
    """Return what has to be cut off the first for it to agree with the second, by Gauss–Newton steps from a start.

    Brightness and contrast are free: both images are standardised at every step.
    """
    target = _standardised(second)
    place = np.array(crop, dtype=np.float64)
    share = ((np.arange(DETAIL_SIZE) + 0.5) / DETAIL_SIZE).astype(np.float32)
    slopes: list[Floats] = list(np.gradient(first))
    last = np.inf
    for _ in range(_STEPS):
        rows, columns = _positions(tuple(place))
        part = _sampled(first, rows, columns)
        spread = float(part.std())
        if spread < 1e-6:
            return None
        error = (target - (part - part.mean()) / spread).ravel()
        down, across = (_sampled(slope, rows, columns) / spread for slope in slopes)
        # A position is size · (share · (1 - before - after) + before): its slope is size · (1 - share) in before and
        # -size · share in after.
        steps = np.stack(
            [
                (across * (1 - share)[None, :]).ravel(),
                (across * -share[None, :]).ravel(),
                (down * (1 - share)[:, None]).ravel(),
                (down * -share[:, None]).ravel(),
            ]
        )
        steps *= DETAIL_SIZE
        steps -= steps.mean(axis=1, keepdims=True)
        normal = steps @ steps.T
        try:
            change = np.linalg.solve(normal + 1e-6 * np.trace(normal) * np.eye(4), steps @ error)
        except np.linalg.LinAlgError:
            return None
        place += np.clip(change, -0.03, 0.03)
        if np.abs(place).max() > _MOST_CUT:
            return None
        size = float(np.abs(change).max())
        if size < _SMALLEST_GAIN or size > 2 * last:
            break
        last = size
    left, right, top, bottom = (float(value) for value in place)
    return left, right, top, bottom


def _positions(crop: tuple[float, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the rows and columns of the first image at which the pixels of the second lie."""
    left, right, top, bottom = crop
    share = (np.arange(DETAIL_SIZE) + 0.5) / DETAIL_SIZE
    rows = (share * (1 - top - bottom) + top) * DETAIL_SIZE - 0.5
    columns = (share * (1 - left - right) + left) * DETAIL_SIZE - 0.5
    return rows, columns


def _sampled(image: Floats, rows: NDArray[np.float64], columns: NDArray[np.float64]) -> Floats:
    """Return the image at the crossings of rows and columns, interpolated linearly; outside it, its nearest pixel."""
    for positions in (rows, columns):  # each pass exchanges rows and columns
        before = np.clip(np.floor(positions).astype(np.intp), 0, DETAIL_SIZE - 2)
        weight = np.clip(positions - before, 0, 1).astype(np.float32)[:, None]
        image = ((1 - weight) * image[before] + weight * image[before + 1]).T
    return image


def _standardised(values: Floats) -> Floats:
    return np.asarray((values - values.mean()) / max(float(values.std()), 1e-6), dtype=np.float32)


def _detail(values: Floats) -> Floats:
    fine, coarse = (ndimage.gaussian_filter(values, blur) for blur in DETAIL_BAND)
    return np.asarray(fine - coarse, dtype=np.float32)


def _patches(values: NDArray[Value]) -> NDArray[Value]:
    """Return the square patches of an image as rows."""
    count = DETAIL_SIZE // _PATCH
    return values.reshape(count, _PATCH, count, _PATCH).swapaxes(1, 2).reshape(count**2, _PATCH**2)
