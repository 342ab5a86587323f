from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from serving import IMAGE, LEFT, MODEL

from tmca.errors import CheckpointError
from tmca.prediction import PredictionOptions
from tmca.server.engine import Engine, forget_path
from tmca.server.messages import Ask, Form, WorkerSettings
from tmca.server.problems import BusyError, NotReadyError, RemoteError


@asynccontextmanager
async def _started(max_queue: int = 64) -> AsyncIterator[Engine]:
    engine = Engine(WorkerSettings({"small": str(MODEL)}, "cpu"), max_queue)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def _question(id_: int, seconds: float = 60.0, path: Path = IMAGE) -> Ask:
    deadline = time.monotonic() + seconds
    return Ask(id_, "small", path, "d", None, (LEFT,), PredictionOptions(), Form.JSON, deadline)


def _run(test: Callable[[], Awaitable[Any]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 120))  # type: ignore[arg-type]


def _stop_worker(engine: Engine, sign: int) -> None:
    assert engine.worker_pid is not None
    os.kill(engine.worker_pid, sign)


def test_a_killed_worker_is_replaced_and_its_requests_are_answered():
    async def test() -> None:
        async with _started() as engine:
            assert (await engine.ask(_question))["predictions"]
            before = engine.worker_pid
            _stop_worker(engine, signal.SIGSTOP)  # so that the requests are with it when it dies
            asked = [asyncio.create_task(engine.ask(_question)) for _ in range(5)]
            await asyncio.sleep(0.1)
            assert engine.waiting == 5
            _stop_worker(engine, signal.SIGKILL)
            answers = await asyncio.gather(*asked)
            assert all(answer["predictions"] for answer in answers)
            assert engine.worker_pid != before
            assert engine.waiting == 0

    _run(test)


def test_a_request_that_ends_two_workers_is_given_up_and_the_next_is_answered():
    async def test() -> None:
        async with _started() as engine:
            for _ in range(2):
                _stop_worker(engine, signal.SIGSTOP)
                if engine.waiting == 0:
                    asked = asyncio.create_task(engine.ask(_question))
                await asyncio.sleep(0.1)
                _stop_worker(engine, signal.SIGKILL)
                while engine.ready:
                    await asyncio.sleep(0.01)
                while not engine.ready and not asked.done():
                    await asyncio.sleep(0)
            with pytest.raises(RemoteError) as caught:
                await asked
            assert (caught.value.http_status, caught.value.code) == (503, "worker_failed")
            assert (await engine.ask(_question))["predictions"]

    _run(test)


def test_a_full_queue_refuses_and_says_when_to_come_back():
    async def test() -> None:
        async with _started(max_queue=2) as engine:
            _stop_worker(engine, signal.SIGSTOP)
            asked = [asyncio.create_task(engine.ask(_question)) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(BusyError) as caught:
                await engine.ask(_question)
            assert int(caught.value.headers["Retry-After"]) >= 1
            _stop_worker(engine, signal.SIGCONT)
            await asyncio.gather(*asked)
            assert (await engine.ask(_question))["predictions"]

    _run(test)


def test_a_deadline_holds_even_when_the_worker_says_nothing():
    async def test() -> None:
        async with _started() as engine:
            _stop_worker(engine, signal.SIGSTOP)
            with pytest.raises(RemoteError) as caught:
                await engine.ask(lambda id_: _question(id_, seconds=-0.9))
            assert caught.value.code == "deadline_exceeded"
            assert engine.waiting == 0
            _stop_worker(engine, signal.SIGCONT)

    _run(test)


def test_whoever_waits_when_the_server_stops_is_told():
    async def test() -> None:
        async with _started() as engine:
            _stop_worker(engine, signal.SIGSTOP)
            asked = asyncio.create_task(engine.ask(_question))
            await asyncio.sleep(0.05)
            _stop_worker(engine, signal.SIGCONT)
            engine._stopping = True
            await engine.stop()
            with pytest.raises(NotReadyError):
                await asked
            with pytest.raises(NotReadyError):
                await engine.ask(_question)

    _run(test)


def test_a_model_that_is_not_there_ends_the_start(tmp_path: Path):
    async def test() -> None:
        engine = Engine(WorkerSettings({"none": str(tmp_path / "missing")}, "cpu"))
        with pytest.raises(CheckpointError, match="missing"):
            await engine.start()

    _run(test)


def test_an_error_names_a_file_as_its_sender_did():
    error = RemoteError(422, "invalid_input", "/data/x7/image.png is damaged", "look at /data/x7/image.png")
    told = forget_path(error, "/data/x7/image.png", "the image 'colon'")
    assert told.message == "the image 'colon' is damaged"
    assert told.hint == "look at the image 'colon'"
