"""Images as a caller hands them over: files, arrays, images of Pillow, or frames that were read before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tmca.devices import by_threads
from tmca.errors import DataError
from tmca.imaging.frames import Frame, Geometry
from tmca.imaging.raster import IMAGE_SUFFIXES, rgb_from_array, rgb_from_picture
from tmca.imaging.reading import read_frames

ImageSource = str | Path | NDArray[np.generic] | Image.Image | Frame


def frames_of(images: Sequence[ImageSource]) -> list[Frame]:
    """Return images as frames, picture files read by several threads.

    Not so the others: an image of Pillow may be there twice, and the images of a volume come from one decoding.

    Raises:
        DataError: A file cannot be read, or what was given is no image.
    """
    files = [number for number, image in enumerate(images) if _is_picture_file(image)]
    read = dict(zip(files, by_threads(_frame, [images[number] for number in files]), strict=True))
    return [read[number] if number in read else _frame(image) for number, image in enumerate(images)]


def _is_picture_file(image: ImageSource) -> bool:
    return isinstance(image, str | Path) and Path(image).suffix.lower() in IMAGE_SUFFIXES


def _frame(image: ImageSource) -> Frame:
    if isinstance(image, Frame):
        return image
    if not isinstance(image, str | Path | np.ndarray):
        if not isinstance(image, Image.Image):
            raise DataError(
                f"The image is {type(image).__name__}, expected a file, an array or an image of Pillow",
                hint="turn a tensor into an array, channels last: tensor.permute(1, 2, 0).cpu().numpy()",
            )
        image = rgb_from_picture(image)
    if isinstance(image, np.ndarray):
        pixels = rgb_from_array(image)
        return Frame(pixels, Geometry((pixels.shape[0], pixels.shape[1])))
    return next(iter(read_frames(image).only(None)))
