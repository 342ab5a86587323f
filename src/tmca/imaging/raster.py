"""Ordinary picture files (PNG, JPEG, TIFF, BMP, WebP) to upright arrays and back.

Rows run from top to bottom and columns from left to right as a viewer shows the file: the EXIF orientation is applied,
so that "left" in a sentence is left in the array.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from tmca.errors import DataError, StorageError
from tmca.files import write_bytes
from tmca.imaging.mask_values import foreground, third_value

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
"""Endings of the files that are looked at as images, lower case."""

MAX_PIXELS = 100_000_000
"""Largest image that is decoded."""

_PHOTOMETRIC = 262
_DARK_DEEP = 15
"""Largest value that is left of a picture of 16 bits a colour that uses 12 of them."""
# GIF is opened to be able to say how many frames it holds; what else Pillow knows (EPS runs a program) stays off.
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")
_LOSSY_FORMATS = ("JPEG", "MPO", "WEBP")
_ENCODERS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG", "compress_level": 3},
    ".jpg": {"format": "JPEG", "quality": 95},
    ".jpeg": {"format": "JPEG", "quality": 95},
}


def read_image(path: Path | str) -> NDArray[np.uint8]:
    """Read an image file as upright RGB.

    Grey images get three equal channels; transparency is dropped; grey values of 16 or 32 bits and floats are scaled
    linearly from the image's own minimum and maximum to 0 and 255 (a constant image becomes 0).

    Args:
        path: File in one of the formats of :data:`IMAGE_SUFFIXES`.

    Returns:
        ``(height, width, 3)``, values 0 to 255.

    Raises:
        DataError: The file is missing, empty, damaged, too large, no image, holds several frames or undefined pixels.
    """
    path = Path(path)
    with _opened(path) as image:
        deep = image.format == "PNG" and not _is_wide(image) and _is_deep_colour(image)
        pixels = rgb_from_picture(image, path)
        if deep and pixels.max() <= _DARK_DEEP:
            raise DataError(
                f"{path} has 16 bits a colour, of which only the lower ones are used: it would be read as black",
                hint="save it with 8 bits a colour, scaled to 0 to 255",
            )
        return pixels


def rgb_from_picture(image: Image.Image, name: Path | str = "the image") -> NDArray[np.uint8]:
    """Return an image of Pillow as upright RGB, by the rules of :func:`read_image`.

    Args:
        image: It; its EXIF orientation is applied.
        name: What messages call it.

    Returns:
        ``(height, width, 3)``, values 0 to 255.

    Raises:
        DataError: It holds undefined pixels.
    """
    upright = ImageOps.exif_transpose(image)
    if _is_wide(upright):
        grey = _stretched(_finite(name, upright, negative=_is_negative(image)))
        return np.repeat(grey[:, :, None], 3, axis=2)
    if upright.mode in ("P", "PA"):  # a palette with transparency only converts without a warning via RGBA
        upright = upright.convert("RGBA")
    return np.array(upright.convert("RGB"), dtype=np.uint8)


def rgb_from_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Return an upright array as RGB, by the rules of :func:`read_image`.

    Args:
        array: ``(height, width)`` grey, ``(height, width, 3)`` RGB or ``(height, width, 4)`` RGBA, whose transparency
            is dropped. uint8 is taken as it is, other numbers are scaled from their own minimum and maximum.

    Returns:
        ``(height, width, 3)``, values 0 to 255.

    Raises:
        DataError: The array has another shape, is empty, holds no numbers, or undefined ones.
    """
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if not fits or 0 in array.shape or array.dtype.kind not in "uifb":
        raise DataError(
            f"The image array has shape {array.shape} and type {array.dtype}, expected numbers of shape "
            "(height, width), (height, width, 3) or (height, width, 4)",
            hint="put the channels last, and pass one image at a time",
        )
    if array.size > MAX_PIXELS * 4:
        raise DataError(f"The image array has shape {array.shape}, over the pixel limit", hint="scale it down first")
    array = array if array.ndim == 2 else array[:, :, :3]  # a transparency is no brightness
    if array.dtype != np.uint8:
        values = array.astype(np.float64)
        bad = int((~np.isfinite(values)).sum())
        if bad:
            raise DataError(f"The image array holds {bad} undefined values (NaN or infinite)", hint="fill them first")
        array = _stretched(values)
    if array.ndim == 2:
        array = array[:, :, None]
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def read_mask(path: Path | str) -> NDArray[np.bool_]:
    """Read a mask file as foreground.

    Two values 0 and v (1, 255, a class colour) mean background and foreground; otherwise values above 127 are
    foreground, which drops the noise of a JPEG and the grey edges of a resized mask; a third value that is a class of
    its own is refused. A colour mask is foreground where any channel is.

    Args:
        path: File in one of the formats of :data:`IMAGE_SUFFIXES`.

    Returns:
        ``(height, width)``, true at foreground.

    Raises:
        DataError: As for :func:`read_image`, or the file holds grey values or several classes instead of a mask.
    """
    path = Path(path)
    with _opened(path) as image:
        lossy = image.format in _LOSSY_FORMATS
        upright = ImageOps.exif_transpose(image)
        if _is_wide(upright):
            values = _finite(path, upright, negative=_is_negative(image))
            peak = values.max()
            if peak > 1 or 0 < peak < 1:
                values = values * (255.0 / peak)
            grey_levels: NDArray[Any] = values
        else:
            if upright.mode in ("P", "PA"):
                upright = upright.convert("RGBA")
            _refuse_transparent_shape(path, upright)
            channels = np.asarray(upright.convert("L" if upright.mode in ("1", "L", "LA") else "RGB"))
            grey_levels = channels if channels.ndim == 2 else channels.max(axis=2)
    marked = foreground(path, grey_levels, lossy=lossy)
    third = None if lossy else third_value(grey_levels)
    if third is not None:
        raise DataError(
            f"{path} holds a third value, {third[0]} at {100 * third[1]:.2g} % of its pixels, beside black and white",
            hint="save the class you want to segment as 255 and everything else as 0",
        )
    return marked


def _refuse_transparent_shape(path: Path, image: Image.Image) -> None:
    """Refuse a mask whose shape is in its transparency, which is not looked at: it would be read as empty or full."""
    *colours, last = image.getbands()
    if last != "A":
        return
    low, high = image.getchannel("A").getextrema()
    if low != high and all(len(set(image.getchannel(band).getextrema())) == 1 for band in colours):
        raise DataError(f"{path} holds its shape as transparency, expected a mask", hint="save it as 0 and 255, opaque")


def image_size(path: Path | str) -> tuple[int, int]:
    """Return height and width of an image as :func:`read_image` would return it, from the file's header only.

    Raises:
        DataError: The file is missing, empty, too large, no image, or holds several frames.
    """
    path = Path(path)
    with _opened(path) as image:
        width, height = image.size
        return (width, height) if _is_turned(path, image) else (height, width)


def write_mask(path: Path | str, mask: NDArray[np.bool_]) -> None:
    """Write a mask ``(height, width)`` as an 8-bit PNG of 0 and 255, in one step.

    Raises:
        StorageError: The name does not end in .png, or the file could not be written.
    """
    _require_png(path)
    _write(path, np.where(np.asarray(mask, dtype=bool), 255, 0).astype(np.uint8))


def write_image(path: Path | str, image: NDArray[np.uint8]) -> None:
    """Write an image ``(height, width, 3)`` or ``(height, width)`` as PNG or JPEG, by the name's ending, in one step.

    Raises:
        StorageError: The ending is neither .png nor .jpg, or the file could not be written.
    """
    _write(path, np.asarray(image, dtype=np.uint8))


def write_probability(path: Path | str, probability: NDArray[np.floating[Any]]) -> None:
    """Write probabilities ``(height, width)`` in [0, 1] as a 16-bit PNG of round(p · 65535), in one step.

    Raises:
        DataError: A value is outside [0, 1] or not a number.
        StorageError: The name does not end in .png, or the file could not be written.
    """
    _require_png(path)
    values = np.asarray(probability, dtype=np.float64)
    outside = int(np.count_nonzero(~((values >= 0) & (values <= 1))))
    if outside:
        raise DataError(f"{outside} probabilities for {path} are outside [0, 1]", hint="apply the sigmoid first")
    _write(path, np.rint(values * 65535).astype(np.uint16))


def stored_orientation(path: Path | str) -> int:
    """Return the EXIF orientation of an image file: 1 to 8, where 1 is stored as shown; from the header only.

    Raises:
        DataError: As for :func:`image_size`.
    """
    path = Path(path)
    with _opened(path) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if _may_hold_exif(path, image) else 1
        return orientation if orientation in range(1, 9) else 1


def check_file(path: Path) -> None:
    """Refuse what cannot be any image: a missing file, a folder, 0 bytes, a file that may not be read.

    Raises:
        DataError: Says which.
    """
    try:
        if not path.exists():
            raise DataError(f"Image file {path} does not exist", hint="check the path")
        if path.is_dir():
            raise DataError(f"{path} is a folder, expected an image file", hint="name one file in it")
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty (0 bytes)", hint="copy or download it again")
    except OSError as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> DataError:
    """Return the error for a file whose bytes a decoder could not follow, or that may not be read."""
    if isinstance(error, PermissionError):
        return DataError(f"No permission to read {path}", hint="change the file's permissions")
    return DataError(f"{path} is damaged or cut off: {error}", hint="copy or download it again")


def too_large(path: Path, got: str) -> DataError:
    """Return the error for an image of more than :data:`MAX_PIXELS`."""
    return DataError(
        f"{path} is too large: {got}; at most {MAX_PIXELS // 1_000_000} million pixels are read",
        hint="scale it down or cut it into tiles",
    )


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file; every way in which this or decoding it in the block can fail becomes a DataError."""
    check_file(path)
    try:
        # By stream: given a path, Pillow maps uncompressed files, which scrambles a TIFF that is stored on its side.
        with path.open("rb") as stream, Image.open(stream, formats=_FORMATS) as image:
            _require_decodable(path, image)
            yield image
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path} is not an image that can be read", hint=f"expected one of {', '.join(IMAGE_SUFFIXES)}"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise too_large(path, f"{error}") from error
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise damaged(path, error) from error


def _require_decodable(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise too_large(path, f"{width} × {height}")
    # An MPO is a camera's JPEG with previews appended: its first frame is the picture.
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise DataError(f"{path} holds {frames} frames, expected one", hint="save the frame you need as one PNG")


def _is_turned(path: Path, image: Image.Image) -> bool:
    """Return whether the EXIF orientation exchanges rows and columns of the size that Pillow reports."""
    if image.format == "TIFF":  # reported upright
        return False
    return _may_hold_exif(path, image) and bool(image.getexif().get(ExifTags.Base.Orientation, 1) >= 5)


def _may_hold_exif(path: Path, image: Image.Image) -> bool:
    # For a PNG, getexif() decodes the image, as the chunk may come last: look first whether there is any such chunk.
    if image.format != "PNG":
        return True
    with path.open("rb") as stream:
        stream.seek(8)  # behind the signature
        while len(header := stream.read(8)) == 8:
            if header[4:] in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
                return True
            stream.seek(int.from_bytes(header[:4], "big") + 4, io.SEEK_CUR)  # data and checksum
    return False


def _is_wide(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _is_deep_colour(image: Image.Image) -> bool:
    """Return whether a PNG that is not decoded yet has 16 bits a colour, of which Pillow keeps the upper 8."""
    return any(str(tile[3]).endswith(";16B") for tile in getattr(image, "tile", ()))


def _is_negative(image: Image.Image) -> bool:
    """Return whether a TIFF's lowest value is white; Pillow turns that round for 8 bits only."""
    return image.format == "TIFF" and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0


def _finite(path: Path | str, image: Image.Image, *, negative: bool) -> NDArray[np.float64]:
    values = np.asarray(image).astype(np.float64)
    undefined = int(np.count_nonzero(~np.isfinite(values)))
    if undefined:
        raise DataError(
            f"{path} holds {undefined} of {values.size} pixels that are not finite numbers (NaN or infinite)",
            hint="replace them before",
        )
    return values.max() + values.min() - values if negative else values


def _stretched(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    low, high = values.min(), values.max()
    if high == low:
        return np.zeros(values.shape, dtype=np.uint8)
    shares = (values / 2 - low / 2) / (high / 2 - low / 2)  # halves: the difference cannot overflow
    return np.asarray(np.rint(shares * 255), dtype=np.uint8)


def _require_png(path: Path | str) -> None:
    if Path(path).suffix.lower() != ".png":
        raise StorageError(f"Cannot write {path}: masks are written as PNG", hint="let the name end in .png")


def _write(path: Path | str, array: NDArray[Any]) -> None:
    suffix = Path(path).suffix.lower()
    if suffix not in _ENCODERS:
        raise StorageError(
            f"Cannot write {path}: unknown ending {suffix!r}", hint=f"let the name end in {' or '.join(_ENCODERS)}"
        )
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(stream, **_ENCODERS[suffix])
    write_bytes(path, stream.getvalue())
