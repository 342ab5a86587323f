"""The server: one image or many by HTTP, KServe's protocol, and a web page, before one worker process that computes.

``create_app`` gives the application, ``serve`` runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from tmca.errors import ConfigError, StorageError, TMCAError
from tmca.progress import say
from tmca.server import api, kserve, operations
from tmca.server.connections import PatientProtocol
from tmca.server.guard import Guard
from tmca.server.messages import WorkerSettings
from tmca.server.problems import InvalidRequestError, RemoteError, problem
from tmca.server.service import Service
from tmca.server.settings import ServerSettings, read_keys
from tmca.server.uploads import remove_old_files

__all__ = ["ServerSettings", "WorkerSettings", "create_app", "read_keys", "serve"]

CODES = {404: "not_found", 405: "method_not_allowed"}
KEEP_ALIVE_SECONDS = 15
"""How long a connection may stay open without a request."""
PAGE_SECONDS = 3600.0
"""How long the page's images are kept, at most."""
OPEN_FILES = 65_536
"""Files that may be open: each larger image of a job is one while the job arrives."""


def create_app(settings: ServerSettings) -> FastAPI:
    """Return the application; its models are loaded when it starts. ``app.state.service`` holds its parts.

    Raises:
        StorageError: The folder for jobs cannot be written, or is another server's.
    """
    service = Service(settings)
    uploads = service.temporary / "page"

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        # Gradio forgets those whose sender left before they were complete.
        cleaning = asyncio.create_task(remove_old_files(uploads, PAGE_SECONDS))
        yield
        cleaning.cancel()
        await service.stop()

    app: FastAPI = FastAPIOffline(
        title="tmca",
        version=version("tmca"),
        summary="Language-guided medical image segmentation. Research only; not a medical device.",
        lifespan=lifespan,
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    app.state.service = service
    app.state.stopping = asyncio.Event()
    for module in (api, kserve, operations):
        app.include_router(module.router)
    app.add_exception_handler(TMCAError, _explain)
    app.add_exception_handler(RequestValidationError, _explain_field)
    app.add_exception_handler(HTTPException, _explain_status)
    if settings.page:
        from tmca.server.page import mount_page

        app = mount_page(app, service.engine, settings, uploads)
    app.add_middleware(Guard, settings=settings, observe=service.metrics.observe)
    return app


def serve(
    settings: ServerSettings, announce: str = "", *, certificate: str | None = None, key: str | None = None
) -> None:
    """Serve until told to stop; then finish what was begun.

    Args:
        settings: Models, address, limits.
        announce: Address to show when requests are answered.
        certificate: File of a TLS certificate.
        key: File of its key.

    Raises:
        StorageError: The folder for jobs cannot be written, or the address is in use.
        CheckpointError: A model cannot be loaded.
        ConfigError: The certificate or its key is none.
    """
    _allow_open_files()
    with _listen(settings) as listening:
        app = create_app(settings)
        service: Service = app.state.service
        config = uvicorn.Config(
            app,
            http=PatientProtocol,
            ws="none",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(settings.stop_seconds),
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
        try:
            config.load()
        except ssl.SSLError as error:
            raise ConfigError("The TLS certificate and key cannot be used", hint="give PEM files that match") from error

        async def main() -> None:
            try:
                await service.start()
            except BaseException:
                await service.stop()
                raise
            say(f"Ready: {announce}")
            await _Server(config, app.state.stopping).serve(sockets=[listening])

        asyncio.run(main())


class _Server(uvicorn.Server):
    """Says that it stops before it waits for what is being answered: a page that is open asks for as long as it is."""

    def __init__(self, config: uvicorn.Config, stopping: asyncio.Event) -> None:
        super().__init__(config)
        self.stopping = stopping

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Say so, then shut down."""
        self.stopping.set()
        await super().shutdown(sockets)


def _allow_open_files() -> None:
    """Let this process open as many files as it needs, as far as its user may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _listen(settings: ServerSettings) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        return socket.create_server((settings.host, settings.port), family=family, backlog=512)
    except OSError as error:
        raise StorageError(
            f"Cannot listen on {settings.host}, port {settings.port}: {error.strerror or error}",
            hint="choose another --port or --host",
        ) from error


async def _explain(request: Request, error: Exception) -> Response:
    if isinstance(error, StorageError):  # which names a folder of this machine
        error = RemoteError(error.http_status, error.code, "The server cannot store this", error.hint)
    assert isinstance(error, TMCAError)
    return problem(error, request.state.request_id)


async def _explain_field(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or "the request"
    message = f"{where}: {first['msg']}"
    return problem(InvalidRequestError(message[:300], hint="see /docs"), request.state.request_id)


async def _explain_status(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, TMCAError):  # raised while FastAPI read the request, such as one that is too large
        return await _explain(request, error.__cause__)
    code = CODES.get(error.status_code, "invalid_request")
    found = RemoteError(error.status_code, code, str(error.detail), "see /docs")
    response = problem(found, request.state.request_id)
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response
