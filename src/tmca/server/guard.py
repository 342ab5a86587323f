"""What every request passes before anything of it is read: who asks, from where, how much, how slowly."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import secrets
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tmca.errors import TMCAError
from tmca.server.messages import failure_of
from tmca.server.problems import (
    BusyError,
    ForbiddenError,
    RemoteError,
    SlowClientError,
    TooLargeError,
    UnauthorizedError,
    problem,
)
from tmca.server.settings import MEGABYTE, ServerSettings

OPEN_PATHS = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
"""What a load balancer may ask without a key."""
JOBS_PATH = "/v1/jobs"
TENSORS_PATH = "/v2/"
LARGEST_TENSORS = 32 * MEGABYTE
"""Bytes of a request in JSON: it is read in one go, and nobody else is answered meanwhile."""
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
LONGEST_ID = 64

SECURITY_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; media-src 'self' data: blob:; "
        "connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

log = logging.getLogger("tmca.server")
Observe = Callable[[str, str, int, float], None]


class Guard:
    """Refuses what must not get in, and gives every answer its number and headers.

    Logs method, route, status and duration; never a path, a sentence or a pixel, for they may tell of a patient.

    Args:
        app: The application.
        settings: Keys and limits.
        observe: Told method, route, status and seconds of every request.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, observe: Observe) -> None:
        self.app = app
        self.settings = settings
        self.observe = observe
        self._most = 4 * settings.max_queue + 64
        self._answering = 0
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {}).update(request_id=request_id, client="")
        started = time.perf_counter()
        status = 500
        has_started = False

        async def sending(message: Message) -> None:
            nonlocal status, has_started
            if message["type"] == "http.response.start":
                status, has_started = message["status"], True
                answer = MutableHeaders(scope=message)
                answer["X-Request-ID"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    answer.setdefault(name, value)
            await send(message)

        counts = scope["path"] not in OPEN_PATHS
        self._answering += counts
        # What answers GET answers HEAD, of which the body is left out on its way.
        asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            self._check(scope, headers)
            if counts and self._answering > self._most:
                raise BusyError("Too many requests are being answered", retry_after=5)
            await self.app(asked, self._limited(scope, headers, receive), sending)
        except Exception as error:
            response = _explained(error, request_id, headers)
            if not has_started:  # else uvicorn closes the connection: the answer is not complete
                await response(scope, receive, sending)
        finally:
            self._answering -= counts
            seconds = time.perf_counter() - started
            route = _route(asked)
            self.observe(scope["method"], route, status, seconds)
            log.info("%s %s %s %d %.1f ms", request_id, scope["method"], route, status, 1000 * seconds)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Refuse who has no key, and what another site's page sends through the browser of somebody who has."""
        try:
            host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        except ValueError:
            raise ForbiddenError("The header `Host` is no host name", hint="call the server by its name") from None
        if self.settings.is_local and host not in (*LOCAL_HOSTS, *self.settings.allowed_hosts):
            raise ForbiddenError(f"This server is not called {host[:100]!r}", hint="add the name with --allowed-host")
        origin = headers.get("origin")
        if origin is not None and not _is_at(origin, headers.get("host", "")):
            raise ForbiddenError("Pages of other sites may not ask this server", hint="open the server's own page")
        if self._keys and scope["path"] not in OPEN_PATHS:
            digest = _digest_of_key(headers.get("authorization", ""))
            if sum(hmac.compare_digest(digest, key) for key in self._keys) == 0:  # all of them, in the same time
                raise UnauthorizedError("A key is needed", hint="send it as `Authorization: Bearer KEY`")
            scope["state"]["client"] = digest.hex()

    def _limited(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """Return a way to read the request that gives up when it is too large or too slow."""
        settings = self.settings
        limit = settings.max_job_upload if scope["path"] == JOBS_PATH else settings.max_upload
        if scope["path"].startswith(TENSORS_PATH):
            limit = min(limit, LARGEST_TENSORS)
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        seconds = settings.upload_seconds * (limit / settings.max_upload)
        deadline = time.monotonic() + seconds
        received = 0
        is_complete = False

        async def receiving() -> Message:
            nonlocal received, is_complete
            if is_complete:
                return await receive()  # until the client leaves
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                raise SlowClientError(
                    f"The request had not arrived after {seconds:.0f} seconds", hint="check the network, send less"
                ) from None
            received += len(message.get("body", b""))
            if received > limit:
                raise _too_large(limit)
            is_complete = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        return receiving


def _is_at(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc == host
    except ValueError:
        return False


def _digest_of_key(authorization: str) -> bytes:
    """Return the hash of the key in a header: a bearer token, or the password a browser asks for; empty if none."""
    scheme, _, credentials = authorization.partition(" ")
    given = credentials.strip()
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode("utf-8").partition(":")[2]
        except ValueError:
            return b""
    elif scheme.lower() != "bearer":
        return b""
    return hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()


def _explained(error: Exception, request_id: str, headers: Headers) -> Response:
    if not isinstance(error, TMCAError):  # a fault of ours: where it lies is logged, never what it was about
        last = traceback.extract_tb(error.__traceback__)[-1]
        log.error("%s %s in %s, line %d", request_id, type(error).__name__, Path(last.filename).name, last.lineno or 0)
        return problem(RemoteError.of(failure_of(0, error)), request_id)
    response = problem(error, request_id)
    if isinstance(error, UnauthorizedError):
        asks_for_page = "text/html" in headers.get("accept", "")
        response.headers["WWW-Authenticate"] = f'{"Basic" if asks_for_page else "Bearer"} realm="tmca"'
    if isinstance(error, TooLargeError | SlowClientError):
        response.headers["Connection"] = "close"
    return response


def _too_large(limit: int) -> TooLargeError:
    return TooLargeError(f"The request has more than {limit // 2**20} MB", hint="send a smaller file, or a job")


def _request_id(headers: Headers) -> str:
    """Return the number a client gave its request, if it is harmless, else a new one."""
    given = headers.get("x-request-id", "")
    harmless = given.isascii() and given.replace("-", "").replace("_", "").isalnum() and len(given) <= LONGEST_ID
    return given if harmless else secrets.token_hex(8)


def _route(scope: Scope) -> str:
    """Return the pattern that the path matched, which tells nothing of what was asked."""
    route = scope.get("route")
    return str(getattr(route, "path", "")) or ("page" if scope.get("app_root_path") is not None else "other")
