"""What those who run the server ask it: does it live, is it ready, what can it do, how is it doing."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST

from tmca.imaging.dicom.results import INTENDED_USE
from tmca.imaging.raster import MAX_PIXELS
from tmca.imaging.reading import IMAGE_SUFFIXES
from tmca.outputs import OUTPUT_TYPES
from tmca.server import schema
from tmca.server.api import MOST_JOB_FILES, service_of
from tmca.server.guard import LARGEST_TENSORS
from tmca.server.kserve import MOST_VALUES
from tmca.server.messages import MOST_MAPPED
from tmca.server.problems import NotReadyError
from tmca.server.service import Service
from tmca.server.uploads import LONGEST_PROMPT

router = APIRouter(tags=["operation"])

Served = Annotated[Service, Depends(service_of)]


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Say that the server runs; a server that does not answer is to be started again."""
    return {"status": "alive"}


@router.get("/readyz", responses=schema.problems(503))
async def readyz(service: Served) -> dict[str, str]:
    """Say whether requests are answered; while they are not, send none."""
    if not service.engine.ready:
        raise NotReadyError("The models are not loaded", hint="try again in a few seconds")
    return {"status": "ready"}


@router.get("/capabilities")
async def capabilities(service: Served) -> dict[str, Any]:
    """Say what is served and within which limits."""
    settings = service.settings
    return {
        "version": version("tmca"),
        "intended_use": INTENDED_USE.lower(),
        "problem": "The models cannot be loaded; the server's log says why" if service.engine.problem else "",
        "models": [
            {
                "name": state.name,
                "default": state.name == service.engine.default_model,
                "loaded": state.generation,
                "problem": state.problem,
                "max_tokens": state.max_tokens,
                "image_size": state.image_size,
                **state.provenance,
            }
            for state in service.engine.states
        ],
        "inputs": list(IMAGE_SUFFIXES),
        "outputs": OUTPUT_TYPES,
        "limits": {
            "upload_bytes": settings.max_upload,
            "upload_seconds": settings.upload_seconds,
            "job_upload_bytes": settings.max_job_upload,
            "job_images": MOST_JOB_FILES,
            "tensor_bytes": min(LARGEST_TENSORS, settings.max_upload),
            "tensor_values": MOST_VALUES,
            "pixels": MAX_PIXELS,
            "mapped_pixels": MOST_MAPPED,
            "prompts": settings.max_prompts,
            "prompt_characters": LONGEST_PROMPT,
            "waiting_requests": settings.max_queue,
            "waiting_jobs": settings.max_jobs,
            "seconds": settings.deadline,
            "keep_hours": settings.keep_hours,
        },
    }


@router.get("/metrics", response_class=Response)
async def metrics(service: Served) -> Response:
    """Give the figures for Prometheus."""
    counts = await asyncio.to_thread(service.store.counts)
    return Response(service.metrics.text(counts), media_type=CONTENT_TYPE_LATEST)
