"""Lets through what the page needs of Gradio, and nothing that names another host."""

from __future__ import annotations

import re

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PREFIX = "/gradio_api"
OPEN = (
    "/assets/", "/static/", "/svelte/", "/theme.css", "/favicon.ico", f"{PREFIX}/run/", f"{PREFIX}/upload",
    f"{PREFIX}/heartbeat/", f"{PREFIX}/component_server", f"{PREFIX}/reset", f"{PREFIX}/cancel",
    f"{PREFIX}/startup-events", f"{PREFIX}/theme.css", f"{PREFIX}/file=/", f"{PREFIX}/app_id",
)  # fmt: skip
"""How the paths begin that the page asks for; ``/`` and ``/config`` are open as well."""
_FOREIGN = re.compile(
    rb'<meta\s+(?:property="og:|name="twitter:)[^>]*>\s*'
    rb'|<link rel="manifest"[^>]*>\s*'
    rb"|https://(?:github\.com|raw\.githubusercontent\.com)/gradio-app/[^\"]*"  # examples for its documentation
)


class LocalOnly:
    """Hides Gradio's documentation, run history, proxy and monitoring, and strips tags for other sites from the page.

    Args:
        app: Gradio's application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if path in ("/", "/config"):
            await self._cleaned(scope, receive, send)
        elif path.startswith(OPEN):
            await self.app(scope, receive, send)
        else:
            await PlainTextResponse("Not found", 404)(scope, receive, send)

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
