"""Does the jobs that wait, one after the other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from tmca.errors import TMCAError
from tmca.server.engine import Engine
from tmca.server.job_store import CANCELLED, DONE, FAILED, JobState, JobStore, own_names

log = logging.getLogger("tmca.server")


class JobRunner:
    """Gives the jobs to the worker, one after the other.

    Args:
        store: The jobs.
        engine: The worker.
        keep_hours: How long a finished job is kept.
    """

    def __init__(self, store: JobStore, engine: Engine, keep_hours: float) -> None:
        self.store = store
        self.engine = engine
        self.keep_hours = keep_hours
        self._running: tuple[str, asyncio.Task[Any]] | None = None
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Take up what is queued, and what comes."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Stop; what is running waits for the next server."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def wake(self) -> None:
        """Look at the queue again: a job arrived."""
        self._arrived.set()

    async def cancel(self, id_: str) -> JobState:
        """End a job, if it has not ended; what runs is ended even where that cannot be noted yet.

        Raises:
            NotFoundError: There is none of that id.
        """
        await asyncio.to_thread(self.store.finish, id_, CANCELLED, {})
        if self._running is not None and self._running[0] == id_:
            self._running[1].cancel()
        return await asyncio.to_thread(self.store.get, id_)

    async def _run(self) -> None:
        while True:
            self._arrived.clear()
            try:
                await asyncio.to_thread(self.store.remove_old, 3600 * self.keep_hours)
                job = await asyncio.to_thread(self.store.next)
            except TMCAError as error:  # the disk is full: nothing is begun, nothing is lost, what is old goes
                log.error("jobs wait: %s", error.code)
                job = None
            if job is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._arrived.wait(), 10)
                continue
            await self._do(job)

    async def _do(self, job: JobState) -> None:
        work = asyncio.get_running_loop().create_task(self._outcome(job))
        self._running = (job.id, work)
        try:
            status, outcome = await work
        except asyncio.CancelledError:
            this = asyncio.current_task()
            if this is not None and this.cancelling():  # the server stops
                with contextlib.suppress(TMCAError):  # it is put back at the next start
                    self.store.put_back(job.id)
                raise
            return  # the job was cancelled
        finally:
            self._running = None
        await asyncio.to_thread(self.store.finish, job.id, status, outcome)

    async def _outcome(self, job: JobState) -> tuple[str, dict[str, Any]]:
        folder = self.store.path(job.id)
        try:
            value = await self.engine.work(job.request.work(job.id, folder))
        except TMCAError as error:
            message, hint = own_names(error.message, folder), own_names(error.hint, folder)
            return FAILED, {"error": {"code": error.code, "message": message, "hint": hint}}
        failures, skipped = (
            [{name: own_names(text, folder) for name, text in each.items()} for each in value[kind]]
            for kind in ("failures", "skipped")
        )
        if failures and not value["cases"]:
            error_ = {"code": "no_case_done", "message": "None of the images could be segmented", "hint": ""}
            return FAILED, {"error": error_, "failures": failures}
        return DONE, {"cases_done": value["cases"], "failures": failures, "skipped": skipped}
