"""Connections that do not stay open for nothing."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 15.0
"""In which the header of a request must have arrived, after the connection was made or the answer before it ended."""


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that closes a connection whose next request does not come: its sender may trickle it for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock."""
        super().connection_made(transport)
        self._header_timer: Any = self.loop.call_later(HEADER_SECONDS, self._close_if_silent)

    def on_response_complete(self) -> None:
        """Start the clock again; what the client still sends of an answered request does not stop it."""
        self._header_timer.cancel()
        if not self.transport.is_closing():
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self._close_if_silent)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._header_timer.cancel()
        super().connection_lost(exc)

    def _close_if_silent(self) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if not is_answering and not self.transport.is_closing():
            self.transport.close()
