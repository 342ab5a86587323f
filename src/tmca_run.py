"""Segment an image by a sentence with a bundle of `tmca export bundle`; needs NumPy and ONNX Runtime 1.18, no torch.

    python tmca_run.py BUNDLE.tmca IMAGE -p "one small polyp, located in right of the image" -o mask.png

PNG files of 8 bits and NPY files of uint8 are read as they are, other pictures by Pillow where it is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import re
import struct
import sys
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
DIGEST, BAD_IMAGE, BAD_BUNDLE = 64, 3, 5  # digits of the SHA-256 at the end of a bundle; exit codes
NAME = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)*", re.ASCII)
PNG, PNG_CHANNELS, MAX_PIXELS = b"\x89PNG\r\n\x1a\n", {0: 1, 2: 3, 4: 2, 6: 4}, 100_000_000
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")  # what else Pillow opens may run a program
ALONE = re.compile("[!-/:-@[-`{-~\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f]")


class RefusedError(Exception):
    """A bundle (exit code 5) or image (3) that cannot be used."""


def read_bundle(path: Path | str) -> dict[str, bytes]:
    """Return the files of a bundle by name; a changed byte, or a file that is missing or too many, is refused."""
    content = Path(path).read_bytes()
    if hashlib.sha256(content[:-DIGEST]).hexdigest().encode() != content[-DIGEST:]:
        raise RefusedError(f"{path} is no bundle, or was changed or cut off: its SHA-256 is another", BAD_BUNDLE)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        packed = any(member.compress_type for member in members)
        if packed or sum(member.file_size for member in members) > len(content) or not all(map(NAME.fullmatch, names)):
            raise RefusedError(f"{path} holds a file that is compressed, too large or of an unusual name", BAD_BUNDLE)
        files = {name: archive.read(name) for name in names}
    manifest = json.loads(files.get("manifest.json", b"{}"))
    if manifest.get("format") != "tmca-bundle":
        raise RefusedError(f"{path} is no bundle", BAD_BUNDLE)
    if manifest.get("format_version") != 1:
        raise RefusedError(f"{path} is of another version of tmca: use the tmca_run.py that is in it", BAD_BUNDLE)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != "manifest.json"}
    if hashes != manifest["files"] or len(names) != len(files):
        raise RefusedError(f"{path} does not hold the files it lists", BAD_BUNDLE)
    return files


def read_image(path: Path | str) -> Array:
    """Return a picture as uint8 (height, width, 3), upright."""
    data = Path(path).read_bytes()
    try:
        pixels = read_png(data) if data.startswith(PNG) else None
        if data.startswith(b"\x93NUMPY"):
            pixels = np.load(io.BytesIO(data), allow_pickle=False)
        elif pixels is None:
            from PIL import Image, ImageOps

            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                frames = getattr(image, "n_frames", 1)
                if frames > 1 and image.format != "MPO":  # a camera's JPEG with previews behind it
                    raise ValueError(f"it holds {frames} frames, expected one")
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"it has {image.width} × {image.height} pixels, expected {MAX_PIXELS} at most")
                wide = image.mode.startswith(("I", "F"))  # refused below, as its numbers are no uint8
                pixels = np.asarray(image if wide else ImageOps.exif_transpose(image).convert("RGBA"))
    except ImportError:
        raise RefusedError(f"{path} is no PNG of 8 bits: convert it, or install Pillow", BAD_IMAGE) from None
    except Exception as error:  # of a damaged file, whatever the readers make of it
        raise RefusedError(f"{path} cannot be read: {error}", BAD_IMAGE) from error
    shaped = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))
    if pixels.dtype != np.uint8 or not pixels.size or not shaped:
        raise RefusedError(f"{path} is {pixels.dtype} {pixels.shape}, expected uint8 (height, width, 3)", BAD_IMAGE)
    pixels = pixels.reshape(*pixels.shape[:2], -1)[:, :, :3]
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def read_png(data: bytes) -> Array | None:
    """Return the pixels of a PNG of 8 bits a channel that is neither interlaced nor turned; None for another PNG."""
    chunks: list[tuple[bytes, bytes]] = []
    position = len(PNG)
    while position < len(data) and (not chunks or chunks[-1][0] != b"IEND"):
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        if zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError("it is damaged")
        chunks.append((data[position + 4 : position + 8], data[position + 8 : end]))
        position = end + 4
    width, height, depth, colour, *_, interlaced = struct.unpack(">IIBBBBB", dict(chunks)[b"IHDR"])
    odd = depth != 8 or colour not in PNG_CHANNELS or interlaced or _may_be_turned(chunks) or b"acTL" in dict(chunks)
    if odd or width * height > MAX_PIXELS:
        return None
    channels = PNG_CHANNELS[colour]
    size = height * (1 + width * channels)
    unpacked = zlib.decompressobj().decompress(b"".join(part for kind, part in chunks if kind == b"IDAT"), size)
    lines = np.frombuffer(unpacked, np.uint8).reshape(height, -1)
    filters, stored = lines[:, 0], lines[:, 1:].reshape(height, width, channels)
    pixels = np.zeros((height + 1, width + 1, channels), np.int16)  # with a border of zeros above and at the left
    for diagonal in range(height + width - 1):  # the pixels of a diagonal depend on those of earlier ones only
        row = np.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
        col = diagonal - row
        left, up, corner = pixels[row + 1, col], pixels[row, col + 1], pixels[row, col]
        distances = np.abs([up - corner, left - corner, left + up - 2 * corner])
        nearest = np.choose(distances.argmin(axis=0), [left, up, corner])
        predicted = np.choose(filters[row, None], [0 * left, left, up, (left + up) // 2, nearest])
        pixels[row + 1, col + 1] = (stored[row, col] + predicted) & 255
    upright = pixels[1:, 1:].astype(np.uint8)
    return upright if channels > 2 else upright[:, :, 0]


def _may_be_turned(chunks: list[tuple[bytes, bytes]]) -> bool:
    """Return whether an orientation may be noted: as EXIF, or in a text, which may be compressed."""
    packed = any(
        kind == b"zTXt" or (kind == b"iTXt" and part.partition(b"\0")[2][:1] == b"\1") for kind, part in chunks
    )
    texts = [part.lower() for kind, part in chunks if kind in (b"iTXt", b"tEXt")]
    noted = any(word in text for text in texts for word in (b"orientation", b"exif"))
    return packed or noted or b"eXIf" in dict(chunks)


def resize(image: Array, size: int) -> Array:
    """Resize to a square, bicubic with antialiasing, in the whole numbers of Pillow and the order of tmca."""
    height, width = image.shape[:2]
    if height > size and height + size > 2 * width:  # down first: the fewer rows, the less to do across
        return _resize_rows(_resize_rows(image, size).swapaxes(0, 1), size).swapaxes(0, 1)
    return _resize_rows(_resize_rows(image.swapaxes(0, 1), size).swapaxes(0, 1), size)


def _resize_rows(image: Array, size: int) -> Array:
    if len(image) == size:
        return image
    scale = len(image) / size
    stretch = max(scale, 1.0)
    centres = (np.arange(size) + 0.5) * scale
    first = np.maximum((centres - 2 * stretch + 0.5).astype(int), 0)
    counts = np.minimum((centres + 2 * stretch + 0.5).astype(int), len(image)) - first
    taps = first[:, None] + np.arange(counts.max())
    x = np.abs((taps - centres[:, None] + 0.5) / stretch)
    near, far = ((1.5 * x - 2.5) * x) * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(x < 1, near, np.where(x < 2, far, 0)) * (taps < (first + counts)[:, None])
    weights = weights / weights.sum(axis=1, keepdims=True) * 2**22
    fixed = np.trunc(weights + np.copysign(0.5, weights)).astype(np.int64)
    total = np.full((size, *image.shape[1:]), 2**21)
    for tap, weight in zip(np.minimum(taps, len(image) - 1).T, fixed.T, strict=True):
        total += image[tap] * weight[:, None, None]
    resized: Array = np.clip(total >> 22, 0, 255).astype(np.uint8)
    return resized


def normalise(image: Array, preprocessing: dict[str, Any]) -> Array:
    """Return float32 (1, 3, height, width) with fixed means and deviations, or with those of each channel."""
    channels = []
    for channel in range(3):
        values = image[:, :, channel].astype(np.int64)
        total, count = int(values.sum()), values.size
        mean, spread = total / count, math.sqrt(int((values**2).sum()) * count - total**2) / count
        if preprocessing["normalisation"] == "fixed":
            mean, spread = 255 * preprocessing["mean"][channel], 255 * preprocessing["std"][channel]
        gain, offset = np.float32(1 / spread if spread else 0), np.float32(mean / spread if spread else 0)
        channels.append(image[:, :, channel] * gain - offset)
    return np.stack(channels)[None]


def restore(values: Array, height: int, width: int) -> Array:
    """Resize a map to the size of the image, bilinear."""
    for axis, length in ((1, width), (0, height)):
        step = np.float32(values.shape[axis]) / np.float32(length)
        places = np.maximum((np.arange(length, dtype=np.float32) + np.float32(0.5)) * step - np.float32(0.5), 0)
        before = places.astype(int)
        share = np.expand_dims(places - before, 1 - axis).astype(np.float32)
        after = np.minimum(before + 1, values.shape[axis] - 1)
        values = np.take(values, before, axis) * (1 - share) + np.take(values, after, axis) * share
    return values


class WordPieces:
    """The tokenizer of a BERT, from its tokenizer.json."""

    def __init__(self, text: bytes) -> None:
        values = json.loads(text)
        self.pieces: dict[str, int] = values["model"]["vocab"]
        self.lowercase = bool(values["normalizer"]["lowercase"])
        self.special = {token["content"]: int(token["id"]) for token in values["added_tokens"]}
        self.pattern = re.compile("(" + ("|".join(map(re.escape, self.special)) or "(?!)") + ")")

    def __call__(self, sentence: str) -> list[int]:
        """Return the ids of a sentence between those of [CLS] and [SEP]."""
        ids = [self.pieces["[CLS]"]]
        for part in self.pattern.split(sentence):
            ids += (
                [self.special[part]] if part in self.special else [i for w in self._words(part) for i in self._spell(w)]
            )
        return [*ids, self.pieces["[SEP]"]]

    def _words(self, text: str) -> list[str]:
        kept = (
            c for c in text if c in "\t\n\r" or (unicodedata.category(c) not in ("Cc", "Cf", "Co") and c != "\ufffd")
        )
        text = "".join(kept)
        if self.lowercase:
            stripped = (c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
            text = "".join(c.lower() for c in stripped)
        return "".join(f" {c} " if ALONE.match(c) or unicodedata.category(c)[0] == "P" else c for c in text).split()

    def _spell(self, word: str) -> list[int]:
        ids, start = [], 0
        while start < len(word) <= 100:
            prefix = "##" if start else ""
            ends = (end for end in range(len(word), start, -1) if prefix + word[start:end] in self.pieces)
            end = next(ends, None)
            if end is None:
                break
            ids.append(self.pieces[prefix + word[start:end]])
            start = end
        return ids if start == len(word) else [self.pieces["[UNK]"]]


class Segmenter:
    """A model that encodes an image once and then answers as many sentences as wanted.

    Args:
        manifest: Of the bundle: how images and sentences are prepared.
        graphs: Name → function from named arrays to named arrays.
        tokenize: Sentence → ids; None for a model that reads none.
    """

    def __init__(
        self,
        manifest: dict[str, Any],
        graphs: dict[str, Callable[[dict[str, Array]], dict[str, Array]]],
        tokenize: Callable[[str], list[int]] | None,
    ) -> None:
        self.manifest, self.graphs, self.tokenize = manifest, graphs, tokenize

    @classmethod
    def from_bundle(cls, path: Path | str) -> Segmenter:
        """Read a bundle and load its graphs."""
        files = read_bundle(path)
        manifest = json.loads(files["manifest.json"])
        graphs = {name: onnx_graph(files[graph["file"]]) for name, graph in manifest["graphs"].items()}
        return cls(manifest, graphs, WordPieces(files["tokenizer.json"]) if manifest["text"] else None)

    def set_image(self, image: Array) -> None:
        """Encode an image, uint8 (height, width, 3)."""
        self.size = image.shape[:2]
        self.features = self.graphs["image_encoder"]({"images": self.prepare_image(image)})

    def logits(self, text: str | None = None) -> Array:
        """Return the logits at the size the network sees; without a sentence it goes by the image alone."""
        tokens = self.prepare_text(text)
        inputs = self.features | (self.graphs["text_encoder"](tokens) if tokens else {})
        side = self.manifest["preprocessing"]["image_size"]
        return self.graphs["decoder"](inputs)["mask_logits"][0, 0, :side, :side]

    def prepare_image(self, image: Array) -> Array:
        """Return float32 (1, 3, height, width): resized, normalised, padded at the right and bottom."""
        preprocessing = self.manifest["preprocessing"]
        side = preprocessing["image_size"]
        padding = (0, -side % preprocessing["multiple"])
        normalised = normalise(resize(image, side), preprocessing)
        return np.pad(normalised, ((0, 0), (0, 0), padding, padding), mode="edge")

    def prepare_text(self, text: str | None) -> dict[str, Array]:
        """Return the ids of a sentence and which of them are real: none where there is no sentence."""
        if self.tokenize is None:
            return {}
        limit = self.manifest["text"]["max_tokens"]
        ids = self.tokenize(text) if text and text.strip() else []
        ids = ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]
        padded = np.array([ids + [0] * (2 - len(ids))], np.int64)
        return {"input_ids": padded, "attention_mask": np.arange(padded.shape[1])[None] < len(ids)}

    def probability(self, text: str | None = None) -> Array:
        """Return the probability of each pixel of the image to belong to what the sentence names."""
        halved = self.logits(text) / np.float32(2 * self.manifest["postprocessing"]["temperature"])
        return restore(0.5 + 0.5 * np.tanh(halved), *self.size)


def onnx_graph(model: bytes | str) -> Callable[[dict[str, Array]], dict[str, Array]]:
    """Return an ONNX graph as a function from named arrays to named arrays."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    except Exception as error:  # of a runtime that is older than the graph, or about a damaged one
        version = onnxruntime.__version__
        raise RefusedError(f"onnxruntime {version} cannot load the graph: {error}", BAD_BUNDLE) from error
    wanted, given = [value.name for value in session.get_outputs()], [value.name for value in session.get_inputs()]
    return lambda inputs: dict(zip(wanted, session.run(wanted, {name: inputs[name] for name in given}), strict=True))


def write_mask(path: Path | str, mask: Array) -> None:
    """Write a mask as a PNG of 0 and 255."""
    lines = np.pad(np.where(mask, 255, 0).astype(np.uint8), ((0, 0), (1, 0)))  # each line begins with its filter: none
    header = struct.pack(">IIBBBBB", mask.shape[1], mask.shape[0], 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part)) for kind, part in chunks
    ]
    beside = Path(path).with_name(f".{Path(path).name}.tmp")
    try:
        beside.write_bytes(PNG + b"".join(packed))
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def main() -> None:
    """Segment one image and say how much of it the mask covers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("image", help="a picture, or a NumPy file of uint8 (height, width, 3)")
    parser.add_argument("-p", "--prompt", help="the sentence; left out, the image alone decides")
    parser.add_argument("-o", "--output", default="mask.png", help="PNG to write; mask.png by default")
    parser.add_argument("--threshold", type=float, default=0.5, help="probability above which a pixel is marked")
    given = parser.parse_args()
    if not 0 < given.threshold < 1:
        parser.error(f"--threshold is {given.threshold}, expected a number between 0 and 1")
    if given.prompt is not None and not given.prompt.strip():
        parser.error("--prompt is blank: write a sentence, or leave it out")
    image, output = Path(given.image), Path(given.output)
    if output.suffix.lower() != ".png" or output.resolve() == image.resolve():
        parser.error(f"--output is {output}, expected a .png that is not the image")
    try:
        segmenter = Segmenter.from_bundle(given.bundle)
        count = len(segmenter.tokenize(given.prompt)) if segmenter.tokenize and given.prompt else 0
        if given.prompt and not segmenter.tokenize:
            print("warning: this model reads no sentence", file=sys.stderr)
        elif count and count > (limit := segmenter.manifest["text"]["max_tokens"]):
            print(f"warning: the sentence has {count} tokens, and only {limit} are read", file=sys.stderr)
        segmenter.set_image(read_image(given.image))
        mask = segmenter.probability(given.prompt) > given.threshold
        write_mask(given.output, mask)
    except RefusedError as error:
        print(f"error: {error.args[0]}", file=sys.stderr)
        sys.exit(error.args[1])
    except ImportError as error:
        print(f"error: {error.name} is not installed: pip install numpy onnxruntime", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or given.image}", file=sys.stderr)
        sys.exit(BAD_IMAGE if str(error.filename) == given.image else 1)
    print(f"{given.output}: {mask.mean():.1%} of the image is marked. Research only; not a medical device.")


if __name__ == "__main__":
    main()
