"""What the page does when something is pressed; no browser is needed for any of it."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import io
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tmca.errors import ConfigError, DataError, TMCAError
from tmca.imaging import rle
from tmca.imaging.dicom import is_dicom
from tmca.imaging.dicom.results import INTENDED_USE
from tmca.imaging.frames import Frame
from tmca.imaging.reading import IMAGE_SUFFIXES, join_frame
from tmca.jobs import Job
from tmca.outputs import NIFTI, PNG, RLE, SEGMENTATION, CaseWriter, OutputOptions
from tmca.prediction import MaskArray, Prediction, PredictionOptions, find_conflicts, find_regions, make_mask
from tmca.server.engine import forget_path
from tmca.server.messages import Arrays, Ask, Count, Form, Look, Looked, ModelState
from tmca.server.page.pictures import LONGEST_SIDE, PNG_URI, painted, png, reduced, reduced_mask, resized_mask
from tmca.server.problems import RemoteError, UnsupportedTypeError
from tmca.server.settings import ServerSettings
from tmca.server.uploads import LONGEST_PROMPT, safe_name

HALF = 127
"""A pixel of a drawing that is more opaque than this belongs to the mask."""
LONGEST_HISTORY = 50
DOWNLOADS = {PNG: ".png", NIFTI: ".nii.gz", SEGMENTATION: ".dcm", RLE: ".json"}
"""Kind of file → its ending."""


@runtime_checkable
class Asks(Protocol):
    """What the page needs of :class:`tmca.server.engine.Engine`."""

    states: tuple[ModelState, ...]

    async def ask(self, make: Callable[[int], Ask | Look | Count]) -> Any:  # noqa: ANN401
        """Pass a request on and return its answer."""


@dataclass(frozen=True, eq=False)
class Opened:
    """An image that lies before the user.

    Attributes:
        path: The file.
        digest: SHA-256 of its bytes.
        name: What its sender calls it.
        frame: Number of the image in a volume or sequence; ``None`` where the file holds one.
        looked: What the file holds.
    """

    path: Path
    digest: str
    name: str
    frame: int | None
    looked: Looked

    @property
    def title(self) -> str:
        """Name and slice."""
        return self.name if self.frame is None else f"{self.name}, slice {self.frame}"

    @property
    def key(self) -> str:
        """What tells it from every other image, for the page."""
        return f"{self.digest}-{self.frame}"


@dataclass(frozen=True, eq=False)
class Result:
    """Answers about an image.

    Attributes:
        image: The image.
        model: Name of the model that answered.
        asked: The options it was asked with.
        options: The options that the masks are made with now.
        pixels: The image, uint8 RGB.
        predictions: One a sentence, as they are now.
        attention: One map a sentence, or ``None``.
        provenance: What the masks come from.
        originals: The predictions as they were answered.
        corrected: Numbers of the masks that were changed by hand.
    """

    image: Opened
    model: str
    asked: PredictionOptions
    options: PredictionOptions
    pixels: NDArray[np.uint8] = field(repr=False)
    predictions: tuple[Prediction, ...] = field(repr=False)
    attention: tuple[NDArray[np.float32] | None, ...] = field(repr=False)
    provenance: Mapping[str, Any] = field(repr=False)
    originals: tuple[Prediction, ...] = field(repr=False)
    corrected: frozenset[int] = frozenset()

    @property
    def texts(self) -> tuple[str | None, ...]:
        """The sentences."""
        return tuple(prediction.text for prediction in self.predictions)


class Desk:
    """Counts what is laid before a user, so that a late answer about what lay there before can be dropped."""

    def __init__(self) -> None:
        self.turn = 0

    def clear(self) -> int:
        """Lay something else there, and return its number."""
        self.turn += 1
        return self.turn


@dataclass(frozen=True)
class Past:
    """What was asked earlier: enough to ask it again, which is quick.

    ``corrections`` holds the masks that were changed by hand, as number and COCO run lengths in JSON.
    """

    path: Path
    name: str
    frame: int | None
    model: str
    texts: tuple[str | None, ...]
    options: PredictionOptions
    answer: str
    corrections: tuple[tuple[int, str], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Download:
    """A file for the browser."""

    name: str
    content: bytes = field(repr=False)


async def open_image(engine: Asks, settings: ServerSettings, path: Path, frame: int | None = None) -> Opened:
    """Look into a file that was uploaded.

    Args:
        engine: Asks the worker.
        settings: Of the server.
        path: The file, under the name that its sender gave it.
        frame: Number of an image; ``None``: the middle one of several.

    Raises:
        TMCAError: It is no image that is read, or is no longer there.
    """
    if not path.is_file():
        raise DataError("The image is no longer kept by the server", hint="choose it again")
    if not path.name.lower().endswith(IMAGE_SUFFIXES) and not is_dicom(path):
        raise UnsupportedTypeError(
            f"{path.name} is no image of a kind that is read",
            hint="choose PNG, JPEG, TIFF, BMP, WebP, DICOM, or NIfTI with the ending .nii or .nii.gz",
        )
    digest = await asyncio.to_thread(_digest, path)
    looked = await _look(engine, settings, path, digest, frame or 0)
    if looked.frames > 1 and frame is None:
        frame = looked.frames // 2
        looked = await _look(engine, settings, path, digest, frame)
    return Opened(path, digest, safe_name(path.name), frame if looked.frames > 1 else None, looked)


async def segment(
    engine: Asks,
    settings: ServerSettings,
    image: Opened | None,
    model: str,
    texts: tuple[str | None, ...],
    options: PredictionOptions,
) -> Result:
    """Ask sentences about an image.

    Raises:
        TMCAError: There is no image, or no answer.
    """
    if image is None:
        raise DataError("There is no image yet", hint="drop one into the box or choose a file")
    if not image.path.is_file():
        raise DataError("The image is no longer kept by the server", hint="choose it again")
    deadline = time.monotonic() + settings.deadline

    def make(id_: int) -> Ask:
        return Ask(
            id_,
            model,
            image.path,
            image.digest,
            image.frame,
            texts,
            options,
            Form.ARRAYS,
            deadline=deadline,
            name=image.name,
            attention=True,
        )

    answer: Arrays = await _asked(engine, make, image.path)
    found = answer.predictions
    return Result(
        image, model, options, options, answer.pixels, found, answer.attention, answer.provenance, originals=found
    )


async def count_tokens(engine: Asks, model: str, texts: tuple[str | None, ...]) -> list[tuple[int, bool, int]]:
    """Return tokens, whether the end is not read, and the limit, of each sentence."""
    return [await engine.ask(functools.partial(Count, model=model, text=text)) for text in texts if text]


def sentences(prompt: str, most: int) -> tuple[str | None, ...]:
    """Return the sentences of a text, one a line; ``None`` alone where there is none.

    Raises:
        ConfigError: There are too many, or one is too long.
    """
    lines = tuple(line for line in map(str.strip, prompt.replace("\x00", "").splitlines()) if line)
    if len(lines) > most:
        raise ConfigError(f"There are {len(lines)} sentences, expected at most {most}", hint="delete some lines")
    if any(len(line) > LONGEST_PROMPT for line in lines):
        raise ConfigError(f"A sentence has more than {LONGEST_PROMPT} letters", hint="shorten it")
    return lines or (None,)


def redraw(result: Result, options: PredictionOptions) -> Result:
    """Return the result at another threshold, from the probabilities that are there.

    Corrections are lost: they were made on another mask. What was measured at the old threshold only is left out.
    """
    predictions = tuple(_as_the_model_says(result, number, options) for number in range(len(result.predictions)))
    return replace(result, options=options, predictions=predictions, corrected=frozenset())


def restore(result: Result, number: int) -> Result:
    """Return the result with the model's mask instead of a corrected one."""
    predictions = list(result.predictions)
    predictions[number] = _as_the_model_says(result, number, result.options)
    return replace(result, predictions=tuple(predictions), corrected=result.corrected - {number})


def _as_the_model_says(result: Result, number: int, options: PredictionOptions) -> Prediction:
    original = result.originals[number]
    if options == result.asked:
        return original
    mask = make_mask(original.probability, options)
    return replace(with_mask(original, mask), threshold=options.threshold, effects={})


def with_mask(prediction: Prediction, mask: MaskArray) -> Prediction:
    """Return a prediction with another mask and what follows from it."""
    regions = find_regions(mask, prediction.probability, prediction.geometry)
    conflicts = find_conflicts(prediction.text, mask)
    return replace(prediction, mask=mask, regions=regions, conflicts=conflicts, expected_dice=None)


def drawing_of(result: Result, number: int) -> str:
    """Return image and mask as the editor takes them, reduced where they are large, and what names the mask."""
    mask = reduced_mask(result.predictions[number].mask, LONGEST_SIDE)
    pictures = {"image": png(reduced(result.pixels, LONGEST_SIDE)), "mask": png(painted(mask))}
    return json.dumps({"of": _name_of(result, number), **pictures})


def is_drawn_on(result: Result, number: int, drawing: str) -> bool:
    """Return whether the editor's drawing was made on this mask, not on one that was there before."""
    try:
        return bool(json.loads(drawing)["of"] == _name_of(result, number))
    except (ValueError, KeyError, TypeError):
        return False


def _name_of(result: Result, number: int) -> str:
    mask = result.predictions[number].mask
    facts = f"{result.image.digest} {result.image.frame} {number} {mask.shape}"
    return hashlib.sha256(facts.encode() + np.packbits(mask).tobytes()).hexdigest()


def correct(result: Result, number: int, drawing: str) -> Result:
    """Return the result with what was drawn in the editor; pixels that were not touched stay as they are.

    Args:
        result: Whose mask was put into the editor.
        number: Of the mask.
        drawing: From the editor: the name of the mask, and the drawing as a PNG in a data URI, opaque where it is.

    Raises:
        DataError: Nothing was changed, or it is no drawing on this mask.
    """
    prediction = result.predictions[number]
    before = reduced_mask(prediction.mask, LONGEST_SIDE)
    drawn = _read_drawing(result, number, drawing, before.shape)
    changed = drawn != before
    if not changed.any():
        raise DataError("The mask was not changed", hint="draw with the brush or the eraser first")
    shape = prediction.mask.shape
    mask = np.where(resized_mask(changed, shape), resized_mask(drawn, shape), prediction.mask)
    predictions = list(result.predictions)
    predictions[number] = replace(with_mask(prediction, mask), effects={})
    return replace(result, predictions=tuple(predictions), corrected=result.corrected | {number})


def _read_drawing(result: Result, number: int, drawing: str, size: tuple[int, ...]) -> NDArray[np.bool_]:
    try:
        made_here = is_drawn_on(result, number, drawing)
        content = base64.b64decode(json.loads(drawing)["drawn"].removeprefix(PNG_URI) if made_here else "")
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            if (image.height, image.width) == size:  # before anything is decoded
                return np.asarray(image.convert("RGBA"))[:, :, 3] > HALF
    except (ValueError, KeyError, AttributeError, OSError, SyntaxError):
        pass
    raise DataError("There is no drawing on this mask", hint="open Correct, draw, then press the button again")


def download_kinds(result: Result | None, number: int = 0) -> tuple[str, ...]:
    """Return the kinds of files that a mask can be saved as."""
    if result is None:
        return ()
    looked = result.image.looked
    kinds = [PNG]
    if looked.kind == "NIfTI" or (looked.kind == "DICOM" and result.predictions[number].geometry.affine is not None):
        kinds.append(NIFTI)
    if looked.kind == "DICOM" and looked.frames == 1:
        kinds.append(SEGMENTATION)
    return (*kinds, RLE)


async def download(result: Result | None, number: int, kind: str) -> Download:
    """Make a file of a mask.

    Raises:
        TMCAError: There is none, or it cannot be of this kind.
    """
    if result is None:
        raise DataError("There is no mask yet", hint="press Segment first")
    if kind not in download_kinds(result, number):
        raise ConfigError("This mask cannot be saved as that kind of file", hint="choose another kind")
    base = result.image.name if result.image.frame is None else f"{result.image.name}_{result.image.frame}"
    mark = "_corrected" if number in result.corrected else ""
    name = f"{base}_mask{mark}{DOWNLOADS[kind]}"
    if kind == RLE:
        return Download(name, json.dumps(as_json(result), indent=2).encode("utf-8"))
    try:
        return Download(name, await asyncio.to_thread(_written, result, number, kind))
    except TMCAError as error:
        raise _forgotten(error, result.image.path) from None


def as_json(result: Result) -> dict[str, Any]:
    """Return all masks as run lengths with what is known of them."""
    image = result.image
    predictions = []
    for number, prediction in enumerate(result.predictions):
        by_hand = number in result.corrected
        predictions.append(
            prediction.as_dict()
            | {
                "mask": rle.encode_mask(prediction.mask),
                "algorithm_type": "SEMIAUTOMATIC" if by_hand or prediction.text else "AUTOMATIC",
                "corrected_by_hand": by_hand,
            }
        )
    return {
        "model": {"name": result.model, **result.provenance},
        "image": {
            "name": image.name,
            "sha256": image.digest,
            "frame": image.frame,
            "size": list(result.pixels.shape[:2]),
        },
        "predictions": predictions,
        "intended_use": INTENDED_USE.lower(),
    }


def remembered(history: tuple[Past, ...], result: Result, answer: str) -> tuple[Past, ...]:
    """Return the history with a result at its head."""
    image = result.image
    corrections = tuple(
        (number, json.dumps(rle.encode_mask(result.predictions[number].mask))) for number in sorted(result.corrected)
    )
    past = Past(image.path, image.title, image.frame, result.model, result.texts, result.asked, answer, corrections)
    return (past, *(each for each in history if each != past))[:LONGEST_HISTORY]


def with_corrections(result: Result, past: Past) -> Result:
    """Return a result that was asked again with the masks that had been corrected."""
    predictions = list(result.predictions)
    for number, mask in past.corrections:
        changed = with_mask(predictions[number], rle.decode_mask(json.loads(mask)))
        predictions[number] = replace(changed, effects={})
    corrected = frozenset(number for number, _ in past.corrections)
    return replace(result, predictions=tuple(predictions), corrected=corrected)


def _written(result: Result, number: int, kind: str) -> bytes:
    image, prediction = result.image, result.predictions[number]
    with tempfile.TemporaryDirectory(prefix="tmca-", dir=image.path.parent) as folder:
        job = Job(join_frame(image.path, image.frame), prediction.text, "mask")
        options = OutputOptions((kind,), overlays=False, corrected=number in result.corrected)
        writer = CaseWriter(Path(folder), job, options, dict(result.provenance), several=False)
        writer.add(Frame(result.pixels, prediction.geometry, number=image.frame), prediction)
        (path,) = writer.close().values()
        return (Path(folder) / path).read_bytes()


async def _look(engine: Asks, settings: ServerSettings, path: Path, digest: str, frame: int) -> Looked:
    deadline = time.monotonic() + settings.deadline
    looked: Looked = await _asked(engine, lambda id_: Look(id_, path, digest, frame, deadline), path)
    return looked


async def _asked(engine: Asks, make: Callable[[int], Ask | Look | Count], path: Path) -> Any:  # noqa: ANN401
    try:
        return await engine.ask(make)
    except TMCAError as error:
        raise _forgotten(error, path) from None


def _forgotten(error: TMCAError, path: Path) -> RemoteError:
    """Return an error that names the file as its sender does."""
    return forget_path(RemoteError(error.http_status, error.code, error.message, error.hint), str(path), path.name)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
