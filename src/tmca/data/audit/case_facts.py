"""What an audit keeps of one case: a few kilobytes instead of its image and mask."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from numpy.typing import NDArray
from scipy import ndimage

from tmca.data.audit.similarity import thumbnail
from tmca.data.contradictions import Contradiction, contradictions
from tmca.data.manifest import Manifest, Record, file_hash
from tmca.errors import DataError
from tmca.imaging.mask_values import third_value
from tmca.imaging.reading import image_size, read_image, read_mask

MaskArray = Bool[np.ndarray, "height width"]

BLANK_CONTRAST = 1.0
"""Standard deviation of the grey values, of 255, below which an image is blank."""

SPECK_SHARE = 0.0001
"""Share of the image up to which a connected part of a mask may be a speck: 5 pixels of 224 × 224.

Larger ones were lesions as often as slips in the CT slices that were looked at.
"""

SPECK_PIXELS = 4
"""Number of pixels up to which a connected part may be a speck in any image."""

SPECK_RATIO = 0.02
"""Share of the mask's largest part up to which a part may be a speck."""

SPECK_DISTANCE = 0.05
"""Distance of a stray speck from the nearest larger part, as a share of the image's longer side."""


@dataclass(frozen=True)
class CaseFacts:
    """Summary of one case; ``None`` where there is nothing or it could not be read.

    Attributes:
        image_error: Why the image cannot be read.
        image_size: Height and width.
        pixel_hash: Hash of the decoded pixels and their size.
        thumbnail: uint8 ``(48, 48)``, grey.
        brightness: Mean grey value, 0 to 255.
        contrast: Standard deviation of the grey values.
        darkest: Smallest grey value.
        brightest: Largest grey value.
        mask_error: Why the mask cannot be read.
        mask_problem: Why the mask, which can be read, is no mask of foreground and background.
        mask_size: Height and width.
        mask_hash: Hash of the foreground.
        foreground: Share of the pixels.
        parts: Number of connected parts; diagonal neighbours connect.
        specks: Pixels of each stray speck.
        contradictions: What the sentence says against the mask.
        changed: Files whose bytes are not those that the manifest has the hash of.
    """

    image_error: str | None = None
    image_size: tuple[int, int] | None = None
    pixel_hash: bytes | None = None
    thumbnail: UInt8[np.ndarray, "48 48"] | None = field(default=None, repr=False)
    brightness: float | None = None
    contrast: float | None = None
    darkest: int | None = None
    brightest: int | None = None
    mask_error: str | None = None
    mask_problem: str | None = None
    mask_size: tuple[int, int] | None = None
    mask_hash: bytes | None = None
    foreground: float | None = None
    parts: int | None = None
    specks: tuple[int, ...] = ()
    contradictions: tuple[Contradiction, ...] = ()
    changed: tuple[str, ...] = ()

    @property
    def is_blank(self) -> bool:
        """Whether the image shows nothing."""
        return self.contrast is not None and self.contrast < BLANK_CONTRAST


def examine(manifest: Manifest, record: Record) -> CaseFacts:
    """Read image and mask once and return what an audit needs of them; a broken file is a fact, not an error."""
    facts, image = _examine_image(manifest.image_path(record))
    mask_path = manifest.mask_path(record)
    if mask_path is not None:
        facts = _examine_mask(facts, mask_path, record.text, image)
    written = {record.image: record.image_sha256, record.mask or "": record.mask_sha256}
    changed = tuple(name for name, hashed in written.items() if name and hashed and _differs(manifest, name, hashed))
    return replace(facts, changed=changed)


def stray_specks(mask: MaskArray) -> NDArray[np.bool_]:
    """Return the stray specks of a mask: connected parts that are tiny and far from every larger one.

    See :data:`SPECK_SHARE`, :data:`SPECK_PIXELS`, :data:`SPECK_RATIO` and :data:`SPECK_DISTANCE`.
    """
    return _examine_parts(mask)[1]


def _examine_image(path: Path) -> tuple[CaseFacts, NDArray[np.uint8] | None]:
    try:
        image = read_image(path)
    except DataError as error:
        return CaseFacts(image_error=str(error)), None
    red, green, blue = np.moveaxis(image, 2, 0)  # plane by plane: numpy reduces a short last axis slowly
    grey = (red.astype(np.float32) + green + blue) / 3
    facts = CaseFacts(
        image_size=(image.shape[0], image.shape[1]),
        pixel_hash=_hash(image),
        thumbnail=thumbnail(image),
        brightness=float(grey.mean()),
        contrast=float(grey.std()),
        darkest=round(float(grey.min())),
        brightest=round(float(grey.max())),
    )
    return facts, image


def _examine_mask(facts: CaseFacts, path: Path, text: str | None, image: NDArray[np.uint8] | None) -> CaseFacts:
    try:
        mask = read_mask(path)
    except DataError as error:
        return _unusable_mask(facts, path, error)
    count, specks = _examine_parts(mask)
    fits = image is not None and image.shape[:2] == mask.shape
    return replace(
        facts,
        mask_problem=_hidden_class(path),
        mask_size=(mask.shape[0], mask.shape[1]),
        mask_hash=_hash(mask),
        foreground=float(mask.mean()),
        parts=count,
        specks=_sizes(specks),
        contradictions=tuple(contradictions(text, mask)) if text is not None and fits else (),
    )


def _unusable_mask(facts: CaseFacts, path: Path, error: DataError) -> CaseFacts:
    """Tell a picture that is no mask from a file that cannot be decoded."""
    try:
        read_image(path)
        return replace(facts, mask_problem=str(error), mask_size=image_size(path))
    except DataError:
        return replace(facts, mask_error=str(error))


def _hidden_class(path: Path) -> str | None:
    """Return why a JPEG mask, which can be thresholded, holds more than two classes."""
    third = third_value(read_image(path).max(axis=2))
    if third is None:
        return None
    return f"{path} holds a third value, {third[0]} at {100 * third[1]:.2g} % of its pixels, beside black and white"


def _examine_parts(mask: NDArray[np.bool_]) -> tuple[int, NDArray[np.bool_]]:
    """Return the number of connected parts, and the stray specks among them."""
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    nothing = np.zeros(mask.shape, dtype=bool)
    if count < 2:
        return int(count), nothing
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    tiny = (sizes > 0) & (sizes <= min(max(SPECK_PIXELS, SPECK_SHARE * mask.size), SPECK_RATIO * sizes.max()))
    if not tiny.any():
        return int(count), nothing
    distance = ndimage.distance_transform_edt(~(mask & ~tiny[labels]))
    nearest = ndimage.minimum(distance, labels, np.arange(count + 1))
    stray = tiny & (np.asarray(nearest) >= SPECK_DISTANCE * max(mask.shape))
    return int(count), np.asarray(stray[labels])


def _sizes(specks: NDArray[np.bool_]) -> tuple[int, ...]:
    if not specks.any():
        return ()
    labels, _ = ndimage.label(specks, np.ones((3, 3)))
    return tuple(int(size) for size in np.bincount(labels.ravel())[1:])


def _hash(values: NDArray[np.uint8] | NDArray[np.bool_]) -> bytes:
    digest = hashlib.blake2b(f"{values.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(values).data)
    return digest.digest()


def _differs(manifest: Manifest, name: str, hashed: str) -> bool:
    try:
        return file_hash(manifest.root / name) != hashed
    except DataError:
        return False
