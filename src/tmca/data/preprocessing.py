"""From decoded images to what a model sees, random changes for training, and the way back to the original size.

One code serves training, evaluation and prediction. Images are decoded upright and converted to RGB by
:mod:`tmca.imaging`; here they are resized (bicubic; masks nearest) and normalised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

from tmca.config import AugmentationConfig, PreprocessingConfig
from tmca.data.opposites import deny, mirror
from tmca.errors import DataError

ImageArray = UInt8[np.ndarray, "height width 3"]
MaskArray = Bool[np.ndarray, "height width"]

LEAST_PART = 0.25
"""Share of an image's height and width that a part of it must have to be shown instead."""


def prepare_image(image: ImageArray, config: PreprocessingConfig) -> Float[Tensor, "3 size size"]:
    """Resize and normalise one upright RGB image.

    Args:
        image: uint8, any size.
        config: Size and normalisation; ``encoder`` normalisation must have been resolved to ``fixed``.
    """
    return normalise(resize_image(image, config.image_size), config)


def resize_image(image: ImageArray, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Resize to a square, bicubic with antialiasing; the aspect ratio is not kept (as in the paper).

    Rows and columns one after the other, each order rounds differently: ours is fixed, Pillow's depends on its version.
    """
    height, width = image.shape[:2]
    down_first = height > size and height + size > 2 * width  # the fewer rows, the less to do across
    between = (width, size) if down_first else (size, height)
    resized = Image.fromarray(image).resize(between, Image.Resampling.BICUBIC)
    return np.asarray(resized.resize((size, size), Image.Resampling.BICUBIC))


def resize_mask(mask: MaskArray, height: int, width: int) -> Bool[np.ndarray, "rows cols"]:
    """Resize a mask, nearest neighbour; of one so small that nothing would be left, the pixel that holds most of it."""
    resized = np.array(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    if mask.any() and not resized.any():
        shares = np.asarray(Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BOX))
        resized[np.unravel_index(shares.argmax(), shares.shape)] = True
    return resized


def normalise(
    image: ImageArray, config: PreprocessingConfig, out: Float[np.ndarray, "3 height width"] | None = None
) -> Float[Tensor, "3 height width"]:
    """Normalise an image, channels first.

    ``per_image`` gives each channel mean 0 and standard deviation 1 (a constant channel becomes 0); ``fixed`` scales to
    [0, 1], subtracts ``config.mean`` and divides by ``config.std``.

    Args:
        image: uint8, any size.
        config: How; ``encoder`` normalisation must have been resolved to ``fixed``.
        out: Where to write the values; a new array by default.
    """
    if out is None:
        out = np.empty((3, *image.shape[:2]), dtype=np.float32)
    for channel in range(3):
        mean, std = _mean_and_std(image[:, :, channel], channel, config)
        np.multiply(image[:, :, channel], np.float32(1 / std), out=out[channel])
        np.subtract(out[channel], np.float32(mean / std), out=out[channel])
    return torch.from_numpy(out)


def _mean_and_std(
    values: UInt8[np.ndarray, "height width"], channel: int, config: PreprocessingConfig
) -> tuple[float, float]:
    """Return what to subtract from a channel's values of 0 to 255, and what to divide them by."""
    if config.normalisation == "encoder":
        raise DataError(
            "normalisation 'encoder' has not been resolved to the encoder's mean and std",
            hint="build the experiment with tmca.training.resolve, or set fixed with mean and std",
        )
    if config.normalisation == "fixed":
        return 255 * config.mean[channel], 255 * config.std[channel]
    levels = np.arange(256)
    counts = np.array(Image.fromarray(values).histogram())  # exact, and the fastest way to both moments
    total = int(counts @ levels)
    spread = int(counts @ levels**2) * values.size - total**2  # in integers: a constant channel has exactly none
    return total / values.size, math.sqrt(spread) / values.size if spread else math.inf


def restore(probability: Float[Tensor, "rows cols"], height: int, width: int) -> Float[np.ndarray, "height width"]:
    """Return a probability map at the size of the original image: the inverse of the resize (bilinear)."""
    resized = torch.nn.functional.interpolate(
        probability[None, None].float(), size=(height, width), mode="bilinear", align_corners=False
    )
    restored: np.ndarray = resized[0, 0].cpu().numpy()
    return restored


@dataclass(frozen=True)
class Drawn:
    """An image with its mask and sentence on the way through the random changes."""

    image: ImageArray
    mask: MaskArray
    text: str | None


def augment(drawn: Drawn, config: AugmentationConfig, rng: np.random.Generator) -> Drawn:
    """Change a training case at random: cut the lesion off, zoom, mirror, turn, tone, text dropout.

    Image and mask change together.

    The same draws are made whatever the settings, so that switching one change off does not alter the others.
    """
    share = rng.random(4)
    factor = float(rng.uniform(*config.zoom_range))
    tone = rng.uniform(-1, 1, size=2)
    turn, angle = rng.random(), rng.uniform(-1, 1) * config.rotation_degrees
    cut = rng.random(2)
    if cut[0] < config.no_lesion_share:
        drawn = without_lesion(drawn, denied=bool(cut[1] < 0.5))
    if share[0] < config.zoom_probability:
        drawn = zoom(drawn, factor)
    if share[1] < config.mirror_probability:
        drawn = mirrored(drawn, horizontally=True)
    if share[2] < config.mirror_probability:
        drawn = mirrored(drawn, horizontally=False)
    if turn < config.rotation_probability:
        drawn = rotate(drawn, angle)
    if config.brightness or config.contrast:
        drawn = Drawn(_retone(drawn.image, tone * (config.brightness, config.contrast)), drawn.mask, drawn.text)
    if share[3] < config.text_dropout:
        drawn = Drawn(drawn.image, drawn.mask, None)
    return drawn


def without_lesion(drawn: Drawn, *, denied: bool) -> Drawn:
    """Cut an image down to its largest part above, below, left or right of the lesion, at the size it had.

    Args:
        drawn: Unchanged if its mask is empty, or no such part has a quarter of the image's height and width.
        denied: Whether the sentence becomes one that says there is none.
    """
    height, width = drawn.mask.shape
    rows, columns = np.nonzero(drawn.mask.any(1))[0], np.nonzero(drawn.mask.any(0))[0]
    if len(rows) == 0:
        return drawn
    parts = [
        (0, 0, width, int(rows[0])),
        (0, int(rows[-1]) + 1, width, height),
        (0, 0, int(columns[0]), height),
        (int(columns[-1]) + 1, 0, width, height),
    ]
    box = max(parts, key=lambda part: (part[2] - part[0]) * (part[3] - part[1]))
    if box[2] - box[0] < width * LEAST_PART or box[3] - box[1] < height * LEAST_PART:
        return drawn
    # Cropped first: resizing a box looks at the pixels around it.
    image = Image.fromarray(drawn.image).crop(box).resize((width, height), Image.Resampling.BICUBIC)
    text = deny(drawn.text) if denied and drawn.text else drawn.text
    return Drawn(np.asarray(image), np.zeros_like(drawn.mask), text)


def zoom(drawn: Drawn, factor: float) -> Drawn:
    """Zoom about the centre, image bicubic and mask nearest; below 1 the border is repeated outwards."""
    height, width = drawn.mask.shape
    image, mask = drawn.image, drawn.mask
    if factor < 1:
        rows, cols = round(height * (1 / factor - 1) / 2), round(width * (1 / factor - 1) / 2)
        image = np.pad(image, ((rows, rows), (cols, cols), (0, 0)), mode="edge")
        mask = np.pad(mask, ((rows, rows), (cols, cols)), mode="edge")
        box = None
    else:
        rows, cols = round(height * (1 - 1 / factor) / 2), round(width * (1 - 1 / factor) / 2)
        box = (cols, rows, width - cols, height - rows)
    zoomed = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box=box)
    zoomed_mask = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST, box=box)
    return Drawn(np.asarray(zoomed), np.asarray(zoomed_mask), drawn.text)


def rotate(drawn: Drawn, degrees: float) -> Drawn:
    """Turn about the centre, counter-clockwise, image bicubic and mask nearest; the border is repeated outwards."""
    height, width = drawn.mask.shape
    margin = math.ceil(math.hypot(height, width) - min(height, width)) // 2 + 1
    box = (margin, margin, margin + width, margin + height)
    around = ((margin, margin), (margin, margin))
    image = Image.fromarray(np.pad(drawn.image, (*around, (0, 0)), mode="edge"))
    mask = Image.fromarray(np.pad(drawn.mask, around, mode="edge"))
    turned = image.rotate(degrees, Image.Resampling.BICUBIC).crop(box)
    turned_mask = mask.rotate(degrees, Image.Resampling.NEAREST).crop(box)
    return Drawn(np.asarray(turned), np.asarray(turned_mask), drawn.text)


def mirrored(drawn: Drawn, *, horizontally: bool) -> Drawn:
    """Mirror image and mask and exchange the sides in the sentence; unchanged if no true sentence can be made."""
    text = drawn.text
    if text is not None:
        text = mirror(text, "horizontal" if horizontally else "vertical")
        if text is None:
            return drawn
    axis = 1 if horizontally else 0
    return Drawn(np.flip(drawn.image, axis), np.flip(drawn.mask, axis), text)


def _retone(image: ImageArray, changes: Float[np.ndarray, " 2"]) -> ImageArray:
    brightness, contrast = 1 + changes
    middle = brightness * image.mean()
    levels = (np.arange(256) * brightness - middle) * contrast + middle
    retoned: ImageArray = np.take(np.clip(levels, 0, 255).astype(np.uint8), image)
    return retoned
