"""Lets through what the page needs of Gradio, and nothing that names another host, or a file that was not uploaded."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tmca.files import real_path
from tmca.server.problems import ForbiddenError, InvalidRequestError, NotFoundError

PREFIX = "/gradio_api"
RUN, HEARTBEAT = f"{PREFIX}/run/", f"{PREFIX}/heartbeat/"
OPEN = (
    "/assets/", "/static/", "/svelte/", "/theme.css", "/favicon.ico", f"{PREFIX}/upload",
    f"{PREFIX}/reset", f"{PREFIX}/cancel",
    f"{PREFIX}/startup-events", f"{PREFIX}/theme.css", f"{PREFIX}/file=/", f"{PREFIX}/app_id",
)  # fmt: skip
"""How the paths begin that the page asks for; ``/``, ``/config``, those of ``RUN`` and ``HEARTBEAT`` are too."""
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
        routes: Those of the server, which answer what is not the page's.
        stopping: Set when the server stops; whoever has the page open is then no reason to wait.
    """

    def __init__(
        self, app: ASGIApp, uploads: Path, routes: Sequence[BaseRoute] = (), stopping: asyncio.Event | None = None
    ) -> None:
        self.app = app
        self.uploads = real_path(uploads)
        self.routes = routes
        self.stopping = stopping or asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
            ForbiddenError: It names another host, or a file that was not uploaded.
            InvalidRequestError: It is not JSON.
            NotFoundError: There is no such page.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if path in ("/", "/config"):
            await self._cleaned(scope, receive, send)
        elif path.startswith(RUN):
            await self.app(scope, await self._checked(scope, receive), send)
        elif path.startswith(HEARTBEAT):
            await self.app(scope, self._until_stopping(receive), send)
        elif path.startswith(OPEN):
            await self.app(scope, receive, send)
        else:
            await self._refuse(scope, receive, send)

    def _until_stopping(self, receive: Receive) -> Receive:
        """Return a way to hear that the client has left, or is to be left."""

        async def receiving() -> Message:
            message, stopping = asyncio.ensure_future(receive()), asyncio.ensure_future(self.stopping.wait())
            try:
                await asyncio.wait((message, stopping), return_when=asyncio.FIRST_COMPLETED)
                return message.result() if message.done() else {"type": "http.disconnect"}
            finally:
                message.cancel()
                stopping.cancel()

        return receiving

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        for route in self.routes:
            match, found = route.matches(scope)
            if match is Match.PARTIAL:  # a path of the server's, which says what methods it answers
                await route.handle({**scope, **found}, receive, send)
                return
        raise NotFoundError("There is nothing of this name", hint="see /docs")

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
