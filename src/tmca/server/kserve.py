"""KServe's Open Inference Protocol, version 2 over HTTP: the same model for programs that speak it.

Inputs of ``infer``: ``image``, either BYTES of one file in base64 or UINT8 ``[height, width, 3]`` or
``[height, width]``; ``prompt``, BYTES of any number of sentences (optional). Outputs: ``mask`` UINT8
``[sentences, height, width]`` of 0 and 1, and on request ``probability`` FP32 of the same shape.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Body, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from tmca.errors import ConfigError
from tmca.files import storage_error
from tmca.imaging.raster import MAX_PIXELS, write_image
from tmca.prediction import ALL_EFFECTS, PredictionOptions
from tmca.server import schema
from tmca.server.api import service_of
from tmca.server.messages import Arrays, Ask, Form, ModelState
from tmca.server.problems import InvalidRequestError, NotFoundError, NotReadyError
from tmca.server.service import Service
from tmca.server.uploads import LONGEST_PROMPT, Upload, suffix_of

router = APIRouter(prefix="/v2", tags=["KServe v2"])

Served = Annotated[Service, Depends(service_of)]
PLATFORM = "tmca"
MOST_VALUES = 8_000_000
"""Numbers in an answer: pixels × sentences × outputs. Each takes up to nine bytes and a microsecond."""
CHUNK = 2**15
"""Numbers that are written in one go: while they are, nobody else is answered."""


class InputTensor(BaseModel):
    """One input, its values flat in row-major order."""

    model_config = ConfigDict(extra="ignore")
    name: str = Field(max_length=64)
    shape: list[int] = Field(max_length=4)
    datatype: Literal["BYTES", "UINT8"]
    data: list[Any]


class OutputName(BaseModel):
    """An output that is wanted."""

    model_config = ConfigDict(extra="ignore")
    name: Literal["mask", "probability"]


class InferRequest(BaseModel):
    """What ``infer`` is sent."""

    model_config = ConfigDict(extra="ignore")
    id: str = Field(default="", max_length=200)
    inputs: list[InputTensor] = Field(min_length=1, max_length=2)
    outputs: list[OutputName] = Field(default_factory=lambda: [OutputName(name="mask")], max_length=2)
    parameters: dict[str, Any] = Field(default_factory=dict)


@router.get("/health/live")
async def live() -> dict[str, bool]:
    """Say that the server runs."""
    return {"live": True}


@router.get("/health/ready", responses=schema.problems(503))
async def ready(service: Served) -> dict[str, bool]:
    """Say whether requests are answered."""
    if not service.engine.ready:
        raise NotReadyError("The models are not loaded", hint="try again in a few seconds")
    return {"ready": True}


@router.get("")
async def server() -> dict[str, Any]:
    """Name the server."""
    return {"name": "tmca", "version": version("tmca"), "extensions": []}


@router.get("/models/{model}", responses=schema.problems(404, 422))
async def metadata(model: str, service: Served) -> dict[str, Any]:
    """Say what a model takes and gives."""
    _known(service, model)
    return {
        "name": model,
        "platform": PLATFORM,
        "inputs": [
            {"name": "image", "datatype": "BYTES", "shape": [1]},
            {"name": "prompt", "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [
            {"name": "mask", "datatype": "UINT8", "shape": [-1, -1, -1]},
            {"name": "probability", "datatype": "FP32", "shape": [-1, -1, -1]},
        ],
    }


@router.get("/models/{model}/ready", responses=schema.problems(404, 422, 503))
async def model_ready(model: str, service: Served) -> dict[str, Any]:
    """Say whether a model answers."""
    _known(service, model)
    await ready(service)
    return {"name": model, "ready": True}


@router.post("/models/{model}/infer", responses=schema.problems(400, 404, 408, 413, 415, 422, 429, 503, 504, 507))
async def infer(model: str, request: Request, service: Served, body: Annotated[InferRequest, Body()]) -> Response:
    """Segment one image."""
    _known(service, model)
    inputs = {tensor.name: tensor for tensor in body.inputs}
    if len(inputs) < len(body.inputs) or not inputs.keys() <= {"image", "prompt"}:
        raise InvalidRequestError("The inputs are `image` and `prompt`, each once", hint=f"see GET /v2/models/{model}")
    if "image" not in inputs:
        raise InvalidRequestError("The input `image` is missing", hint=f"see GET /v2/models/{model}")
    threshold = body.parameters.get("threshold", 0.5)
    if not isinstance(threshold, int | float) or not 0 < threshold < 1:
        raise InvalidRequestError("The parameter `threshold` is no number between 0 and 1", hint="leave it out for 0.5")
    options = PredictionOptions(threshold=threshold, effects=ALL_EFFECTS[:1])
    texts = _texts(inputs.get("prompt"), service.settings.max_prompts)
    names: list[str] = list(dict.fromkeys(output.name for output in body.outputs)) or ["mask"]
    most = MOST_VALUES // len(names)
    async with service.folder() as folder:
        upload = await asyncio.to_thread(_write, inputs["image"], folder)
        arrays: Arrays = await service.ask(
            request,
            upload,
            lambda id_, deadline: Ask(
                id_, model, upload.path, upload.digest, None, texts, options, Form.ARRAYS, deadline, most_values=most
            ),
        )
    answer: dict[str, Any] = {"model_name": model} | ({"id": body.id} if body.id else {})
    answer["parameters"] = {
        "region_found": [bool(prediction.regions) for prediction in arrays.predictions],
        "setting": [prediction.setting for prediction in arrays.predictions],
    }
    return Response(await asyncio.to_thread(_rendered, answer, arrays, names), media_type="application/json")


def _known(service: Service, name: str) -> ModelState:
    try:
        return service.model(name)
    except ConfigError as error:
        raise NotFoundError(error.message, hint=error.hint) from None


def _texts(tensor: InputTensor | None, most: int) -> tuple[str | None, ...]:
    if tensor is None or not tensor.data:
        return (None,)
    texts = [text for text in tensor.data if isinstance(text, str) and len(text) <= LONGEST_PROMPT]
    if tensor.datatype != "BYTES" or len(texts) < len(tensor.data) or len(texts) > most:
        raise InvalidRequestError(f"`prompt` is not BYTES of at most {most} sentences", hint="send them as strings")
    return tuple(text.strip() or None for text in texts)


def _write(tensor: InputTensor, folder: Path) -> Upload:
    """Write the image of a request as a file.

    Raises:
        InvalidRequestError: It is none.
        UnsupportedTypeError: It is a file of another kind.
        StorageError: There is no room for it.
    """
    if tensor.datatype == "BYTES":
        if len(tensor.data) != 1 or not isinstance(tensor.data[0], str):
            raise InvalidRequestError("`image` holds not one file", hint="send one string of base64")
        try:
            content = base64.b64decode(tensor.data[0], validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidRequestError("`image` is not base64", hint="send the bytes of a file in base64") from error
        path = folder / f"image{suffix_of(content[: 2**20])}"
        try:
            path.write_bytes(content)
        except OSError as error:
            raise storage_error(path, error) from error
        return Upload(path, hashlib.sha256(content).hexdigest(), "image")
    pixels = _pixels(tensor)
    path = folder / "image.png"
    write_image(path, pixels)
    return Upload(path, hashlib.sha256(pixels.tobytes() + str(pixels.shape).encode()).hexdigest(), "image")


def _pixels(tensor: InputTensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    shape, data = tensor.shape, tensor.data
    is_picture = len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)
    if not is_picture or min(shape) < 1 or math.prod(shape) != len(data) or math.prod(shape[:2]) > MAX_PIXELS:
        raise InvalidRequestError(
            f"`image` has the shape {shape[:4]} and {len(data)} values", hint="send [height, width] or […, …, 3], flat"
        )
    if not all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255 for value in data):
        raise InvalidRequestError("`image` is not of whole numbers from 0 to 255", hint="send UINT8")
    pixels = np.array(data, np.uint8).reshape(shape)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)


def _rendered(answer: dict[str, Any], arrays: Arrays, names: list[str]) -> bytes:
    """Return an answer with its outputs as JSON; others are answered between its pieces."""
    outputs = []
    for name in names:
        maps = np.stack(
            [prediction.mask if name == "mask" else prediction.probability for prediction in arrays.predictions]
        )
        kind = "UINT8" if name == "mask" else "FP32"
        head = json.dumps({"name": name, "datatype": kind, "shape": list(maps.shape)})
        outputs.append(f'{head[:-1]}, "data": [{_numbers(maps.ravel())}]}}')
    return f'{json.dumps(answer)[:-1]}, "outputs": [{", ".join(outputs)}]}}'.encode()


def _numbers(values: np.ndarray[Any, np.dtype[Any]]) -> str:
    """Return numbers as JSON, five places of each."""
    pieces = []
    for start in range(0, len(values), CHUNK):
        piece = values[start : start + CHUNK]
        numbers = piece.astype(np.uint8) if piece.dtype == np.bool_ else piece.astype(np.float64).round(5)
        pieces.append(json.dumps(numbers.tolist(), separators=(",", ":"))[1:-1])
    return ",".join(pieces)
