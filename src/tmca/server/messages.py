"""What the server and its worker tell each other; nothing here loads a model.

The server speaks HTTP and holds no model; one worker process computes. A decoder that crashes on a malicious file, or a
process that the system kills for its memory, takes the worker with it, never the server.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmca.errors import TMCAError
from tmca.outputs import OutputOptions
from tmca.prediction import Prediction, PredictionOptions


class Form(Enum):
    """What an answer is made into."""

    JSON = "json"
    MASK = "mask"
    OVERLAY = "overlay"
    PROBABILITY = "probability"
    DICOM = "dicom"
    ARRAYS = "arrays"


MOST_MAPPED = 400_000_000
"""Pixels × sentences, the wrong ones that are compared included, of one request: their maps lie in memory together."""


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is started with.

    Attributes:
        models: Name → run folder, checkpoint folder or hub id; the first is the default.
        device: Where to compute.
        precision: ``32``, ``bf16`` or ``auto``.
        max_batch: Sentences that are decoded together.
        cache_bytes: For images and their encodings that may be asked again.
        reload_seconds: How often the model folders are looked at.
    """

    models: dict[str, str]
    device: str = "auto"
    precision: str = "auto"
    max_batch: int = 8
    cache_bytes: int = 512 * 2**20
    reload_seconds: float = 2.0


@dataclass(frozen=True)
class Ask:
    """Sentences about one image of a file.

    Attributes:
        id: Of this request.
        model: Name of a served model.
        path: The file, which stays where it is until the answer came.
        digest: SHA-256 of its bytes: what was encoded before is not encoded again.
        frame: Number of the image in a volume or sequence.
        texts: The sentences; ``None`` or blank for none.
        options: How probabilities become masks.
        form: What the answer is made into.
        deadline: Seconds on the machine's monotonic clock after which nobody waits any more.
        name: What the result is called.
        target: What is segmented, for DICOM; empty: what the sentence names.
        attention: Also say where each sentence points; for :attr:`Form.ARRAYS`.
        most_values: Pixels of all masks together, at most; 0: as many as there are.
    """

    id: int
    model: str
    path: Path
    digest: str
    frame: int | None
    texts: tuple[str | None, ...]
    options: PredictionOptions
    form: Form
    deadline: float
    name: str = "image"
    target: str = ""
    attention: bool = False
    most_values: int = 0


@dataclass(frozen=True)
class Look:
    """What does this file hold? Answered by :class:`Looked`."""

    id: int
    path: Path
    digest: str
    frame: int | None
    deadline: float


@dataclass(frozen=True)
class Count:
    """How many tokens does this sentence have for this model? Answered by ``(count, truncated, limit)``."""

    id: int
    model: str
    text: str


@dataclass(frozen=True)
class Work:
    """Segment a folder of images into another, until it is done or cancelled.

    Attributes:
        id: Of the job.
        model: Name of a served model.
        images: Files.
        prompt: Sentence for all images.
        report: A clinical report to take the sentence from.
        prompts: A file with a sentence an image.
        folder: Where the results go; what an earlier worker finished there is kept.
        prediction: How probabilities become masks.
        outputs: What is written.
    """

    id: str
    model: str
    images: tuple[Path, ...]
    prompt: str | None
    report: str | None
    prompts: Path | None
    folder: Path
    prediction: PredictionOptions
    outputs: OutputOptions


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for this request or job any more."""

    id: int | str


@dataclass(frozen=True)
class Answered:
    """What a request or job asked for."""

    id: int | str
    value: Any


@dataclass(frozen=True)
class Failure:
    """Why a request or job has no answer.

    Attributes:
        id: Of the request or job.
        status: HTTP status.
        code: Stable code.
        message: What was got and what was expected.
        hint: The next thing to do.
    """

    id: int | str
    status: int
    code: str
    message: str
    hint: str


@dataclass(frozen=True)
class ModelState:
    """A served model.

    Attributes:
        name: By which it is asked.
        source: Where it was loaded from, without its folder.
        generation: How often it has been loaded, from 1.
        provenance: See :meth:`tmca.inference.Predictor.provenance`.
        max_tokens: What a sentence is cut to; 0 of a model that reads none.
        image_size: Height and width the model sees, in pixels.
        attention: Whether it can say where a sentence points.
        problem: Why its folder, which changed, could not be loaded again; the model before goes on.
    """

    name: str
    source: str
    generation: int
    provenance: dict[str, Any]
    max_tokens: int
    image_size: int
    attention: bool
    problem: str = ""


@dataclass(frozen=True)
class Models:
    """All served models, after one was loaded."""

    states: tuple[ModelState, ...]


@dataclass(frozen=True)
class Measured:
    """What became of a batch.

    Attributes:
        questions: Sentences answered together.
        encoded: Images encoded for it.
        remembered: Images that were encoded before.
        seconds: How long it took.
    """

    questions: int
    encoded: int
    remembered: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Looked:
    """What a file holds.

    Attributes:
        frames: How many images.
        size: Height and width of the one that was asked for.
        kind: ``picture``, ``NIfTI`` or ``DICOM``.
        modality: DICOM code; empty of other files.
        pixels: The image, uint8 RGB.
    """

    frames: int
    size: tuple[int, int]
    kind: str
    modality: str
    pixels: NDArray[np.uint8] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Arrays:
    """Answers with their arrays, for the page.

    Attributes:
        pixels: The image, uint8 RGB.
        predictions: One a sentence.
        attention: One map a sentence; ``None`` where there is none.
        provenance: What the masks come from.
    """

    pixels: NDArray[np.uint8] = field(repr=False)
    predictions: tuple[Prediction, ...]
    attention: tuple[NDArray[np.float32] | None, ...]
    provenance: dict[str, Any]


ToWorker = Ask | Look | Count | Work | Cancel
FromWorker = Answered | Failure | Models | Measured


def failure_of(id_: int | str, error: Exception) -> Failure:
    """Return what is said of an exception; of one that is a fault of ours nothing but its kind."""
    if isinstance(error, TMCAError):
        return Failure(id_, error.http_status, error.code, error.message, error.hint)
    hint = "this is a fault of tmca; please report it"
    return Failure(id_, TMCAError.http_status, TMCAError.code, f"The server failed ({type(error).__name__})", hint)
