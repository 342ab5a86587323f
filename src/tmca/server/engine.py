"""The server's side of the worker: passes requests on, limits how many wait, and starts a new worker when one dies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import multiprocessing
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol, runtime_checkable

from tmca.errors import CheckpointError, TMCAError
from tmca.server.messages import (
    Ask,
    Cancel,
    Count,
    Failure,
    FromWorker,
    Look,
    Measured,
    Models,
    ModelState,
    ToWorker,
    Work,
    WorkerSettings,
)
from tmca.server.problems import BusyError, NotReadyError, RemoteError

ATTEMPTS = 2
"""How often a request is given to a worker; one that ended two of them is not tried again."""
JOB_ATTEMPTS = 5
"""The same of a job, which goes on where it stopped, and may have had no part in a worker's end."""
LONGEST_PAUSE = 30.0
"""Seconds between two starts of a worker that cannot start."""

log = logging.getLogger("tmca.server")


def _run(connection: Connection, settings: WorkerSettings) -> None:
    """Be the worker; what computes is loaded in its process only."""
    from tmca.server.worker import run_worker

    run_worker(connection, settings)


Request = Ask | Look | Count | Work


@runtime_checkable
class Watcher(Protocol):
    """Hears what happens, for metrics."""

    def measured(self, measured: Measured) -> None:
        """A batch was computed."""

    def restarted(self) -> None:
        """A worker has died, and another one starts."""


@dataclass
class _Pending:
    message: Request
    future: asyncio.Future[Any]
    attempts: int = 0


class Engine:
    """One worker process, and the requests that wait for it.

    Args:
        settings: What the worker is started with.
        max_queue: Requests that may wait; one more is refused.
        watcher: Hears of batches and restarts.
    """

    def __init__(self, settings: WorkerSettings, max_queue: int = 64, watcher: Watcher | None = None) -> None:
        self.settings = settings
        self.max_queue = max_queue
        self.watcher = watcher
        self.problem = ""
        self.states: tuple[ModelState, ...] = ()
        self._ids = itertools.count(1)
        self._pending: dict[int | str, _Pending] = {}
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self._sending = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        self._stopping = False
        self._restarting: asyncio.Task[None] | None = None
        self._has_served = False
        self._deaths = 0
        self._seconds = 0.2

    # --- life ---

    async def start(self) -> None:
        """Start the worker and wait until its models are loaded.

        Raises:
            TMCAError: They cannot be loaded.
        """
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._spawn)
        while not self.ready and not self.problem:
            self._changed.clear()
            await self._changed.wait()
        if self.problem:
            await self.stop()
            raise CheckpointError(self.problem, hint="`tmca models verify` checks a model folder")

    async def stop(self) -> None:
        """End the worker; what it still has to answer is refused."""
        self._stopping = True
        if self._restarting is not None:
            self._restarting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._restarting
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            process = self._process
            process.terminate()
            await asyncio.to_thread(process.join, 10)
            if process.is_alive():
                process.kill()
        for pending in list(self._pending.values()):
            self._fail(pending, NotReadyError("The server is stopping", hint="try again in a minute"))

    @property
    def ready(self) -> bool:
        """Whether requests are answered now."""
        return bool(self.states) and self._process is not None and self._process.is_alive()

    @property
    def waiting(self) -> int:
        """How many requests wait for an answer; jobs are not among them."""
        return sum(isinstance(id_, int) for id_ in self._pending)

    @property
    def default_model(self) -> str:
        """Name of the model that answers if none is named."""
        return next(iter(self.settings.models))

    @property
    def worker_pid(self) -> int | None:
        """Number of the worker's process."""
        return None if self._process is None else self._process.pid

    # --- requests ---

    async def ask(self, make: Callable[[int], Ask | Look | Count]) -> Any:  # noqa: ANN401
        """Pass a request on and return its answer; cancelled, it is taken back.

        Args:
            make: Makes the message of the number it is given.

        Raises:
            BusyError: Too many requests wait.
            NotReadyError: There is no worker now.
            TMCAError: The request has no answer.
        """
        if self.waiting >= self.max_queue:
            seconds = max(1, math.ceil(self.waiting * self._seconds))
            raise BusyError("Too many requests wait for an answer", retry_after=seconds)
        message = make(next(self._ids))
        started = time.monotonic()
        limit = getattr(message, "deadline", started + 30) - started
        try:
            async with asyncio.timeout(max(0.0, limit) + 1):
                answer = await self._passed_on(message)
        except TimeoutError:
            raise RemoteError(
                504, "deadline_exceeded", "The answer was not ready in time", "try again when the server is less busy"
            ) from None
        self._seconds += 0.1 * ((time.monotonic() - started) / max(1, self.waiting + 1) - self._seconds)
        return answer

    async def work(self, job: Work) -> Any:  # noqa: ANN401
        """Have a job done and return its summary; cancelled, it ends.

        Raises:
            TMCAError: It could not be done.
        """
        return await self._passed_on(job)

    def cancel(self, id_: int | str) -> None:
        """Tell the worker that nobody waits for a request or job any more."""
        self._send(Cancel(id_))

    async def _passed_on(self, message: Ask | Look | Count | Work) -> Any:  # noqa: ANN401
        if self._loop is None or self._stopping:
            raise NotReadyError("The server is not running", hint="try again in a minute")
        if self.problem and not isinstance(message, Work):
            raise NotReadyError("The models cannot be loaded", hint="the server's log says why")
        pending = _Pending(message, self._loop.create_future())
        self._pending[message.id] = pending
        try:
            if self.ready:
                self._give(pending)
            return await pending.future
        except asyncio.CancelledError:
            self.cancel(message.id)
            raise
        finally:
            self._pending.pop(message.id, None)

    def _give(self, pending: _Pending) -> None:
        pending.attempts += 1
        self._send(pending.message)

    def _send(self, message: ToWorker) -> None:
        with self._sending, contextlib.suppress(OSError, ValueError):  # it has died; everything is sent again
            if self._connection is not None:
                self._connection.send(message)

    # --- the worker ---

    def _spawn(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_run, args=(theirs, self.settings), name="tmca-worker", daemon=True)
        process.start()
        theirs.close()
        self._process, self._connection = process, ours
        threading.Thread(target=self._listen, args=(ours, process), name="listen", daemon=True).start()

    def _listen(self, connection: Connection, process: SpawnProcess) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._call(self._hear, connection.recv())
        process.join()
        self._call(self._died, process)

    def _call(self, function: Callable[[Any], None], argument: object) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                self._loop.call_soon_threadsafe(function, argument)

    def _hear(self, message: FromWorker) -> None:
        if isinstance(message, Models):
            is_new = not self.states
            self.states, self.problem = message.states, ""
            self._has_served, self._deaths = True, 0
            self._changed.set()
            if is_new:
                for pending in list(self._pending.values()):
                    self._give(pending)
        elif isinstance(message, Measured):
            if self.watcher is not None:
                self.watcher.measured(message)
        elif message.id == 0 and isinstance(message, Failure):
            self.problem = f"{message.message} ({message.hint})" if message.hint else message.message
            self._changed.set()
        elif message.id in self._pending:
            pending = self._pending[message.id]
            if isinstance(message, Failure):
                self._fail(pending, RemoteError.of(message))
            elif not pending.future.done():
                pending.future.set_result(message.value)

    def _died(self, process: SpawnProcess) -> None:
        if self._stopping or process is not self._process:
            return
        self.states = ()
        self._changed.set()
        log.error("the worker ended with code %s%s", process.exitcode, f": {self.problem}" if self.problem else "")
        if not self._has_served:
            self.problem = (
                self.problem or f"The worker ended with code {process.exitcode} before its models were loaded"
            )
            return
        for id_, pending in list(self._pending.items()):
            if pending.attempts >= (ATTEMPTS if isinstance(id_, int) else JOB_ATTEMPTS):
                hint = "its image may be damaged in a way that no check finds; others are not affected"
                self._fail(pending, RemoteError(503, "worker_failed", "This request ended the worker twice", hint))
        self._deaths += 1
        if self.watcher is not None:
            self.watcher.restarted()
        self._restarting = asyncio.get_running_loop().create_task(self._restart())

    async def _restart(self) -> None:
        if self._deaths > 1:
            await asyncio.sleep(min(LONGEST_PAUSE, 2.0**self._deaths))
        await asyncio.to_thread(self._spawn)

    def _fail(self, pending: _Pending, error: TMCAError) -> None:
        if not pending.future.done():
            pending.future.set_exception(error)


def forget_path(error: RemoteError, path: str, name: str) -> RemoteError:
    """Return an error that names a file as its sender did, not where it lies here."""
    return RemoteError(error.http_status, error.code, error.message.replace(path, name), error.hint.replace(path, name))
