"""The server's own interface: one image at once, folders of them as jobs."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import FileResponse, JSONResponse

from tmca.data.tables import missing_column, read_rows
from tmca.errors import DataError
from tmca.files import sha256_of
from tmca.outputs import OUTPUT_TYPES, OutputOptions
from tmca.prediction import ALL_EFFECTS, PredictionOptions
from tmca.reports.prompt import check_report, grammar_of_report, prompt_from_report
from tmca.server import schema
from tmca.server.job_store import JobRequest, JobState
from tmca.server.messages import Ask, Form
from tmca.server.problems import InvalidRequestError, NotAcceptableError
from tmca.server.service import Service
from tmca.server.uploads import (
    SentNames,
    distinct_names,
    files_of,
    natural,
    read_form,
    remove_folder,
    save,
    texts_of,
    truth,
    value_of,
)

router = APIRouter(prefix="/v1", tags=["segmentation"])

MOST_JOB_FILES = 10_000
JSON, PNG, DICOM, ZIP = "application/json", "image/png", "application/dicom", "application/zip"
PICTURES = {"mask": Form.MASK, "overlay": Form.OVERLAY, "probability": Form.PROBABILITY}


def service_of(request: Request) -> Service:
    """Return the parts of the server that a request came to."""
    service: Service = request.app.state.service
    return service


Served = Annotated[Service, Depends(service_of)]


@router.post("/segment", responses=schema.SEGMENT_RESPONSES, openapi_extra=schema.SEGMENT_REQUEST)
async def segment(request: Request, service: Served) -> Response:
    """Segment one image by one sentence or several, or without any.

    The answer is JSON with masks as run lengths (COCO), or with `Accept: image/png` one picture, or with
    `Accept: application/dicom` a DICOM SEG of a DICOM image. An empty mask is said to be one: `region_found`, or the
    header `X-Region-Found`.
    """
    form_kind = accepted(request.headers.get("accept", "*/*"))
    async with read_form(request, 1, schema.SEGMENT_FIELDS) as form, service.folder() as folder:
        prompts: list[str | None] = [
            text or None for text in texts_of(form, "prompt", most=service.settings.max_prompts)
        ]
        report = (texts_of(form, "report") or [""])[0]
        if report and any(prompts):
            raise InvalidRequestError("Both `prompt` and `report` were sent", hint="send one of them")
        evidence = None
        if report:
            check_report(report)
            evidence = prompt_from_report(report, grammar_of_report(report))
            if evidence.prompt is None:
                raise DataError("The report names no finding", hint="send a `prompt` to segment all the same")
            prompts = [evidence.prompt]
        picture = (texts_of(form, "picture") or ["mask"])[0] or "mask"
        if picture not in PICTURES:
            raise InvalidRequestError(f"Field `picture` is {picture[:40]!r}", hint=f"one of: {', '.join(PICTURES)}")
        options = prediction_options(form)
        frame = value_of(form, "frame", natural, None)
        model = service.model((texts_of(form, "model") or [""])[0]).name
        target = (texts_of(form, "target") or [""])[0]
        OutputOptions(target=target)
        texts = tuple(prompts) or (None,)
        if form_kind is not Form.JSON and len(texts) > 1:
            raise NotAcceptableError("Several sentences make no single file", hint="accept application/json")
        upload = await save(files_of(form, "image", most=1)[0], folder, "image")
        if form_kind is Form.DICOM and upload.path.suffix != ".dcm":
            raise NotAcceptableError("Only a DICOM image has a DICOM SEG", hint="accept image/png or application/json")
        kind = PICTURES[picture] if form_kind is Form.MASK else form_kind
        answer = await service.ask(
            request,
            upload,
            lambda id_, deadline: Ask(
                id_,
                model,
                upload.path,
                upload.digest,
                frame,
                texts,
                options,
                kind,
                deadline,
                name=upload.name,
                target=target,
            ),
        )
    if kind is Form.JSON:
        found = {"report": evidence.as_dict()} if evidence is not None else {}
        return JSONResponse(answer | found | {"request_id": request.state.request_id})
    content, prediction = answer
    ending, media_type = (".dcm", DICOM) if kind is Form.DICOM else (".png", PNG)
    return Response(
        content,
        media_type=media_type,
        headers={
            "Content-Disposition": f'attachment; filename="{_ascii(upload.name)}_{kind.value}{ending}"',
            "X-Region-Found": str(prediction["region_found"]).lower(),
            "X-Setting": str(prediction["setting"]),
        },
    )


@router.post("/jobs", status_code=202, responses=schema.JOB_RESPONSES, openapi_extra=schema.JOB_REQUEST)
async def add_job(
    request: Request,
    service: Served,
    idempotency_key: Annotated[
        str, Header(max_length=200, description="Of two equal requests with one key, one is done.")
    ] = "",
) -> Response:
    """Segment many images, or volumes; the answer says where to ask for the result.

    An accepted job survives a restart of the server.
    """
    store = service.store
    async with read_form(request, MOST_JOB_FILES + 1, schema.JOB_FIELDS) as form:  # + the sentences
        model = service.model((texts_of(form, "model") or [""])[0]).name
        prompt = (texts_of(form, "prompt") or [""])[0] or None
        report = (texts_of(form, "report") or [""])[0] or None
        has_prompts = bool(form.getlist("prompts"))
        if sum((prompt is not None, report is not None, has_prompts)) > 1:
            raise InvalidRequestError("Send one of `prompt`, `report`, `prompts`", hint="leave the others out")
        if report is not None:
            check_report(report)
        options = prediction_options(form)
        types = tuple(texts_of(form, "output_type", most=len(OUTPUT_TYPES)))
        probabilities = value_of(form, "probabilities", truth, default=False)
        target = (texts_of(form, "target") or [""])[0]
        OutputOptions(types, probabilities, target=target)
        files = files_of(form, "image", most=MOST_JOB_FILES)
        id_ = store.new_id()
        try:
            inputs = await asyncio.to_thread(store.make_folder, id_)
            called = [file.filename or "" for file in files]
            uploads = [await save(file, inputs, name) for file, name in zip(files, distinct_names(called), strict=True)]
            names = [upload.path.name for upload in uploads]
            prompts = None
            if has_prompts:
                table = files_of(form, "prompts", most=1)[0]
                prompts = await _save_prompts(table, inputs, list(zip(called, names, strict=True)))
            renamed = {name: sent for sent, name in zip(called, names, strict=True) if Path(name).stem not in sent}
            request_ = JobRequest(
                model=model,
                images=tuple(names),
                prompt=prompt,
                report=report,
                prompts=prompts,
                threshold=options.threshold,
                min_region=options.min_region,
                effects=options.effects,
                types=types,
                probabilities=probabilities,
                target=target,
                renamed=renamed,
            )
            sent = [(file.filename, upload.digest) for file, upload in zip(files, uploads, strict=True)]
            lines = "" if prompts is None else await asyncio.to_thread(sha256_of, inputs / prompts)
            request_ = replace(request_, fingerprint=_fingerprint(request.state.client, request_, sent, lines))
            state = await asyncio.to_thread(
                store.add, id_, request_, len(names), idempotency_key or None, service.settings.max_jobs
            )
        except BaseException:
            await asyncio.to_thread(remove_folder, store.path(id_))
            raise
    if state.id != id_:
        await asyncio.to_thread(remove_folder, store.path(id_))
    service.runner.wake()
    return _told(service, state, 202 if state.id == id_ else 200)


@router.get("/jobs/{id}", responses=schema.JOB_STATE_RESPONSES)
async def job(id: str, service: Served) -> Response:  # noqa: A002
    """Say where a job stands."""
    return _told(service, await asyncio.to_thread(service.store.get, id), 200)


@router.get("/jobs/{id}/result", responses=schema.RESULT_RESPONSES)
async def job_result(id: str, service: Served) -> FileResponse:  # noqa: A002
    """Return the files of a finished job as one archive, with `run_report.json`."""
    path = await asyncio.to_thread(service.store.result, id)
    return FileResponse(path, media_type=ZIP, filename=f"{id}.zip")


@router.post("/jobs/{id}/cancel", responses=schema.JOB_STATE_RESPONSES)
async def cancel_job(id: str, service: Served) -> Response:  # noqa: A002
    """End a job; what it has finished is kept until it is deleted."""
    await asyncio.to_thread(service.store.get, id)
    return _told(service, await service.runner.cancel(id), 200)


@router.delete("/jobs/{id}", status_code=204, responses=schema.DELETE_RESPONSES)
async def delete_job(id: str, service: Served) -> Response:  # noqa: A002
    """Delete the files of a finished job, those that were sent and those that came out."""
    await asyncio.to_thread(service.store.remove, id)
    return Response(status_code=204)


def accepted(accept: str) -> Form:
    """Return what a client accepts of JSON, PNG and DICOM, the best of it first.

    Raises:
        NotAcceptableError: None of them.
    """
    kinds = {JSON: Form.JSON, PNG: Form.MASK, DICOM: Form.DICOM, "*/*": Form.JSON, "application/*": Form.JSON}
    kinds["image/*"] = Form.MASK
    wishes: list[tuple[float, Form]] = []
    for part in accept.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weight = next((parameter[2:] for parameter in parameters if parameter.startswith("q=")), "1")
        try:
            quality = float(weight)
        except ValueError:
            quality = 0.0
        if name in kinds and quality > 0:
            wishes.append((quality, kinds[name]))
    if not wishes:
        raise NotAcceptableError("None of the accepted types is made here", hint=f"accept {JSON}, {PNG} or {DICOM}")
    return max(wishes, key=lambda wish: wish[0])[1]


def prediction_options(form: Any) -> PredictionOptions:  # noqa: ANN401
    """Return how probabilities become masks, from a form's fields.

    Raises:
        ConfigError: A number is out of range.
        InvalidRequestError: A field is no number.
    """
    threshold = value_of(form, "threshold", float, 0.5)
    smallest = value_of(form, "min_region", int, 0)
    effects = ALL_EFFECTS if value_of(form, "prompt_effect", truth, default=False) else ALL_EFFECTS[:1]
    return PredictionOptions(threshold, smallest, effects)


def _fingerprint(client: str, request: JobRequest, images: Sequence[tuple[str | None, str]], table: str) -> str:
    """Return a hash of a request and of who sent it: its images by name and hash, its table of sentences by hash."""
    asked = asdict(request)
    del asked["renamed"]  # which follows from the images
    return hashlib.sha256(json.dumps([client, asked, images, table]).encode()).hexdigest()


def _told(service: Service, state: JobState, status: int) -> Response:
    body = state.as_dict(service.store.done(state.id))
    return JSONResponse(body, status, headers={"Location": f"/v1/jobs/{state.id}"})


async def _save_prompts(file: Any, folder: Path, images: Sequence[tuple[str, str]]) -> str:  # noqa: ANN401
    """Keep the images and sentences of a table, and nothing else: a column of it could name files of this machine.

    Args:
        file: The table.
        folder: Where the images lie.
        images: The name that each image was sent with, and the one that it got here.

    Raises:
        DataError: It is no table of images and sentences.
        InvalidRequestError: It names an image that was not sent, or not clearly, or leaves one out.
    """
    suffix = Path(file.filename or "").suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        raise InvalidRequestError(
            "`prompts` is neither CSV nor JSON Lines", hint="name it prompts.csv or prompts.jsonl"
        )
    sent = folder / f"sent{suffix}"
    content = await file.read()

    def rewrite() -> None:
        sent.write_bytes(content)
        try:
            rows = [row for _, row in read_rows(sent, required=("image",))]
            columns = list(dict.fromkeys(column for row in rows for column in row))
            if not {"text", "prompt"} & set(columns):
                raise missing_column(sent, "text", columns)
        except DataError as error:
            raise DataError(error.message.replace(str(sent), "prompts"), hint=error.hint) from error
        finally:
            sent.unlink()
        lines = []
        names = SentNames(images)
        left = {stored: name for name, stored in images}
        for row in rows:
            stored = names.stored(row["image"])
            left.pop(stored, None)
            lines.append(json.dumps({"image": stored, "text": row.get("text") or row.get("prompt") or ""}))
        if left:
            first = next(iter(left.values()))[:80]
            raise InvalidRequestError(
                f"`prompts` has no line for {len(left)} of {len(images)} images, first {first!r}",
                hint="add a line for each, with a blank text to segment it without a sentence",
            )
        (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", "utf-8")

    await asyncio.to_thread(rewrite)
    return "prompts.jsonl"


def _ascii(name: str) -> str:
    return name.encode("ascii", "replace").decode().replace("?", "_").replace('"', "_")
