"""Lets through what the page needs of Gradio, and nothing that names another host, or a file that was not uploaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tmca.files import real_path
from tmca.server.problems import ForbiddenError, InvalidRequestError

PREFIX = "/gradio_api"
RUN = f"{PREFIX}/run/"
OPEN = (
    "/assets/", "/static/", "/svelte/", "/theme.css", "/favicon.ico", f"{PREFIX}/upload",
    f"{PREFIX}/heartbeat/", f"{PREFIX}/reset", f"{PREFIX}/cancel",
    f"{PREFIX}/startup-events", f"{PREFIX}/theme.css", f"{PREFIX}/file=/", f"{PREFIX}/app_id",
)  # fmt: skip
"""How the paths begin that the page asks for; ``/``, ``/config`` and those of ``RUN`` are open as well."""
_FOREIGN = re.compile(
    rb'<meta\s+(?:property="og:|name="twitter:)[^>]*>\s*'
    rb'|<link rel="manifest"[^>]*>\s*'
    rb"|https://(?:github\.com|raw\.githubusercontent\.com)/gradio-app/[^\"]*"  # examples for its documentation
)


class LocalOnly:
    """Hides Gradio's documentation, run history, proxy and monitoring, and strips tags for other sites from the page.

    Args:
        app: Gradio's application.
        uploads: Folder of the files that were uploaded, the only ones a request may name.
    """

    def __init__(self, app: ASGIApp, uploads: Path) -> None:
        self.app = app
        self.uploads = real_path(uploads)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
            ForbiddenError: It names another host, or a file that was not uploaded.
            InvalidRequestError: It is not JSON.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if path in ("/", "/config"):
            await self._cleaned(scope, receive, send)
        elif path.startswith(RUN):
            await self.app(scope, await self._checked(scope, receive), send)
        elif path.startswith(OPEN):
            await self.app(scope, receive, send)
        else:
            await PlainTextResponse("Not found", 404)(scope, receive, send)

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """Read a request, and return a way to read it again."""
        messages = [await receive()]
        while messages[-1].get("more_body", False):
            messages.append(await receive())
        host = Headers(scope=scope).get("host", "")

        def check(value: dict[str, Any]) -> None:
            path, url = value.get("path"), value.get("url")
            if isinstance(path, str) and not self._is_upload(path):
                raise ForbiddenError("The request names a file that was not uploaded", hint="choose it in the page")
            if isinstance(url, str) and not _is_ours(url, host):
                raise ForbiddenError("The request names another host", hint="choose a file in the page")

        if messages[-1]["type"] == "http.request":
            try:
                json.loads(b"".join(message.get("body", b"") for message in messages), object_hook=check)
            except (ValueError, RecursionError) as error:
                raise InvalidRequestError("The request cannot be read as JSON", hint="use the page") from error

        async def again() -> Message:
            return messages.pop(0) if messages else await receive()

        return again

    def _is_upload(self, path: str) -> bool:
        try:
            return real_path(path).is_relative_to(self.uploads)
        except ValueError:  # it holds a zero byte
            return False

    async def _cleaned(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
        start: Message = {}
        body = b""

        async def sending(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            if message["type"] != "http.response.body":
                await send(message)
                return
            body += message.get("body", b"")
            if not message.get("more_body", False):
                cleaned = _FOREIGN.sub(b"", body)
                if scope["method"] != "HEAD":
                    MutableHeaders(scope=start)["Content-Length"] = str(len(cleaned))
                await send(start)
                await send({"type": "http.response.body", "body": cleaned})

        await self.app({**scope, "headers": headers}, receive, sending)


def _is_ours(url: str, host: str) -> bool:
    """Whether this is no address of another host; the page names what it uploaded by its path and an address here."""
    try:
        return urlsplit(url).netloc in ("", host)
    except ValueError:
        return False
