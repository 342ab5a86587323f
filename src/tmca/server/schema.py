"""The parts of the OpenAPI document that a form and its answers need."""

from __future__ import annotations

from typing import Any

from tmca.outputs import OUTPUT_TYPES

_FILE = {"type": "string", "format": "binary"}
_THRESHOLD = {
    "type": "number",
    "exclusiveMinimum": 0,
    "exclusiveMaximum": 1,
    "default": 0.5,
    "description": "Probability above which a pixel belongs to the mask.",
}
_OPTIONS: dict[str, Any] = {
    "model": {"type": "string", "description": "Name of a served model; by default the first."},
    "threshold": _THRESHOLD,
    "min_region": {"type": "integer", "minimum": 0, "default": 0, "description": "Leave out smaller regions (pixels)."},
    "prompt_effect": {"type": "boolean", "default": False, "description": "Compare with further wrong sentences."},
    "target": {"type": "string", "description": "What is segmented, by a name of the table of codes, for DICOM."},
}
_REPORT = {"type": "string", "description": "A clinical report to take the sentence from, instead of `prompt`."}


def _form(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


SEGMENT_REQUEST = _form(
    {
        "image": {**_FILE, "description": "PNG, JPEG, TIFF, BMP, WebP, DICOM or NIfTI."},
        "prompt": {
            "type": "array",
            "items": {"type": "string"},
            "description": "The sentence; may stand several times; left out, the image alone decides.",
        },
        "report": _REPORT,
        "frame": {"type": "integer", "minimum": 0, "description": "Which image of a volume or sequence."},
        "picture": {"type": "string", "enum": ["mask", "overlay", "probability"], "default": "mask"},
        **_OPTIONS,
    },
    ["image"],
)
JOB_REQUEST = _form(
    {
        "image": {
            "type": "array",
            "items": _FILE,
            "minItems": 1,
            "description": "The images; volumes are taken whole.",
        },
        "prompt": {"type": "string", "description": "The sentence for all images."},
        "report": _REPORT,
        "prompts": {**_FILE, "description": "CSV or JSON Lines: `image` (file name) and `text`."},
        "output_type": {"type": "array", "items": {"type": "string", "enum": list(OUTPUT_TYPES)}},
        "probabilities": {"type": "boolean", "default": False},
        **_OPTIONS,
    },
    ["image"],
)


def _fields(request: dict[str, Any]) -> tuple[str, ...]:
    return tuple(request["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"])


SEGMENT_FIELDS, JOB_FIELDS = _fields(SEGMENT_REQUEST), _fields(JOB_REQUEST)
"""What a form may hold; anything else is refused."""

PROBLEM: dict[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "code", "hint"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "What was got and what was expected."},
        "code": {"type": "string", "description": "Stable; for programs."},
        "hint": {"type": "string", "description": "The next thing to do."},
        "instance": {"type": "string"},
    },
}
_REASONS = {
    400: "The request cannot be read",
    401: "A key is needed",
    403: "From another site's page, or to a foreign host name",
    404: "There is no such job or model",
    406: "None of the accepted types is made of this image",
    408: "The request did not arrive in time",
    409: "Not in this state of the job",
    413: "Too many bytes",
    415: "Not a file of a kind that is read",
    422: "A field or the image cannot be used",
    429: "Too much is waiting; `Retry-After` says when to try again",
    500: "A fault of the server",
    503: "The models are not loaded",
    504: "Not ready in time",
    507: "The disk is full",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return how the document describes refusals."""
    content = {"application/problem+json": {"schema": PROBLEM}}
    every = sorted({401, 403, 500, *statuses})
    return {status: {"description": _REASONS[status], "content": content} for status in every}


_PREDICTION = {
    "type": "object",
    "required": ["prompt", "setting", "answer", "region_found", "mask", "regions", "prompt_effect", "conflicts"],
    "properties": {
        "prompt": {"type": ["string", "null"]},
        "setting": {"enum": ["guided", "no text"]},
        "answer": {"type": "string"},
        "region_found": {"type": "boolean"},
        "mask": {"type": "object", "description": "COCO run lengths: size, counts, bbox, area."},
        "regions": {"type": "array", "items": {"type": "object"}},
        "prompt_effect": {"type": "object"},
        "conflicts": {"type": "array", "items": {"type": "object"}},
    },
}
_ANSWER = {
    "type": "object",
    "required": ["model", "image", "predictions", "intended_use", "request_id"],
    "properties": {
        "model": {"type": "object"},
        "image": {"type": "object"},
        "predictions": {"type": "array", "items": _PREDICTION},
        "intended_use": {"type": "string"},
        "request_id": {"type": "string"},
    },
}
SEGMENT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Masks",
        "content": {
            "application/json": {"schema": _ANSWER},
            "image/png": {"schema": _FILE},
            "application/dicom": {"schema": _FILE},
        },
    },
    **problems(400, 406, 408, 413, 415, 422, 429, 503, 504, 507),
}
_JOB = {
    "type": "object",
    "required": ["id", "status", "model", "images", "cases_done", "created", "links"],
    "properties": {
        "id": {"type": "string"},
        "status": {"enum": ["queued", "running", "done", "failed", "cancelled"]},
        "model": {"type": "string"},
        "images": {"type": "integer"},
        "cases_done": {"type": "integer"},
        "created": {"type": "string", "format": "date-time"},
        "renamed": {"type": "object", "additionalProperties": {"type": "string"}},
        "failures": {"type": "array", "items": {"type": "object"}},
        "skipped": {"type": "array", "items": {"type": "object"}},
        "error": {"type": "object"},
        "links": {"type": "object"},
    },
}
_JOB_CONTENT = {"application/json": {"schema": _JOB}}
JOB_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "Accepted before", "content": _JOB_CONTENT},
    202: {"description": "Accepted", "content": _JOB_CONTENT},
    **problems(400, 404, 408, 413, 415, 422, 429, 507),
}
JOB_STATE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "Where the job stands", "content": _JOB_CONTENT},
    **problems(404, 422),
}
RESULT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The files", "content": {"application/zip": {"schema": _FILE}}},
    **problems(404, 409, 422, 507),
}
DELETE_RESPONSES: dict[int | str, dict[str, Any]] = {
    204: {"description": "Deleted"},
    **problems(404, 409, 422),
}
