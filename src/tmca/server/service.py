"""What the routes share: the engine, the jobs, the settings, and a folder for what is sent."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request

from tmca.errors import TMCAError, unknown_name
from tmca.files import storage_error
from tmca.server.engine import Engine, forget_path
from tmca.server.job_store import JobStore
from tmca.server.jobs import JobRunner
from tmca.server.messages import Ask, Look, ModelState
from tmca.server.metrics import Metrics
from tmca.server.problems import ClientGoneError, RemoteError
from tmca.server.settings import ServerSettings
from tmca.server.uploads import Upload, new_folder, remove_folder

Value = TypeVar("Value")
TEMPORARY_PREFIX = "tmca-server-"


class Service:
    """A server's parts.

    Args:
        settings: What it is started with.

    Raises:
        StorageError: The folder for jobs cannot be written, or is another server's.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.engine = Engine(settings.worker, settings.max_queue)
        self.metrics = Metrics(lambda: self.engine.waiting, lambda: self.engine.ready)
        self.engine.watcher = self.metrics
        self.store = JobStore(settings.data)
        self.runner = JobRunner(self.store, self.engine, settings.keep_hours)
        self._started = False
        self.temporary = self.store.at_any_rate(lambda: _temporary_folder(settings.data))
        """For what is sent, until it is answered."""

    async def start(self) -> None:
        """Load the models and take up the jobs, if that has not been done.

        Raises:
            TMCAError: A model cannot be loaded.
        """
        if self._started:
            return
        self._started = True
        await asyncio.to_thread(self.store.recover)
        await self.engine.start()
        self.runner.start()

    async def stop(self) -> None:
        """Stop; jobs wait for the next start."""
        await self.runner.stop()
        await self.engine.stop()
        self.store.close()
        remove_folder(self.temporary)

    @asynccontextmanager
    async def folder(self) -> AsyncIterator[Path]:
        """Give a folder for what a request sends; it is removed with it."""
        folder = await asyncio.to_thread(new_folder, self.temporary)
        try:
            yield folder
        finally:
            await asyncio.to_thread(remove_folder, folder)

    def model(self, name: str) -> ModelState:
        """Return a served model; the default one of an empty name.

        Raises:
            ConfigError: There is none of that name.
        """
        states = {state.name: state for state in self.engine.states}
        chosen = name or self.engine.default_model
        if chosen not in self.settings.worker.models:
            raise unknown_name("model", name, self.settings.worker.models)
        return states.get(chosen) or ModelState(chosen, "", 0, {}, 0, 0, attention=False)

    async def ask(self, request: Request, upload: Upload, make: Callable[[int, float], Ask | Look]) -> Any:  # noqa: ANN401
        """Have the worker answer; nobody waits for it when the client has left.

        Args:
            request: Of the client.
            upload: What it sent; errors call it by its sender's name.
            make: Makes the message of its number and deadline.

        Raises:
            TMCAError: There is no answer.
        """
        deadline = time.monotonic() + self.settings.deadline
        try:
            return await while_connected(request, self.engine.ask(lambda id_: make(id_, deadline)))
        except RemoteError as error:
            raise forget_path(error, str(upload.path), f"the image {upload.name!r}") from None


def _temporary_folder(data: Path) -> Path:
    """Make a temporary folder that only this user reads; one that a killed server left behind is removed.

    Raises:
        StorageError: It cannot be made.
    """
    note = data / "temporary"
    try:
        left = Path(note.read_text("utf-8", "replace")) if note.exists() else None
        if left is not None and left.name.startswith(TEMPORARY_PREFIX):
            remove_folder(left)
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX))
    except OSError as error:
        raise storage_error(note, error) from error
    try:
        note.write_text(str(folder), "utf-8")
    except OSError as error:
        remove_folder(folder)
        raise storage_error(note, error) from error
    return folder


async def while_connected(request: Request, work: Coroutine[Any, Any, Value]) -> Value:
    """Return what some work returns; it is cancelled when the client leaves.

    Raises:
        ClientGoneError: The client has left.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError("The client has left")
    finally:
        for each in (task, leaving):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, TMCAError):
                await each


async def _left(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
