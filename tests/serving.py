"""A server to test: the small model that comes with tmca behind `tmca serve`, and how to ask it."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tmca.health.self_test import SELF_TEST
from tmca.server import ServerSettings, WorkerSettings
from tmca.server.messages import Answered, Failure, FromWorker
from tmca.server.problems import RemoteError
from tmca.server.worker import Worker

MODEL = SELF_TEST / "model"
IMAGE = SELF_TEST / "image.png"
LEFT, BOTTOM = json.loads((SELF_TEST / "sentences.json").read_text("utf-8")).values()
KEY = "a-key-that-nobody-guesses"


def settings_for(data: Path, **changes: Any) -> ServerSettings:
    worker = {"models": {"small": str(MODEL)}, "device": "cpu", "reload_seconds": 0.2} | changes.pop("worker", {})
    return ServerSettings(WorkerSettings(**worker), data, **({"page": False} | changes))


class WorkerHere:
    """Asks a worker in this process."""

    def __init__(self) -> None:
        self.states = ()
        self._numbers = itertools.count(1)
        self._answers: dict[int | str, asyncio.Future[Any]] = {}
        self._worker = Worker(WorkerSettings({"small": str(MODEL)}, "cpu"), self._tell)
        threading.Thread(target=self._worker.compute, daemon=True).start()

    async def ask(self, make: Callable[[int], Any]) -> Any:
        self._loop = asyncio.get_running_loop()
        id_ = next(self._numbers)
        self._answers[id_] = self._loop.create_future()
        self._worker.receive(make(id_))
        return await asyncio.wait_for(self._answers[id_], 30)

    def _tell(self, message: FromWorker) -> None:
        if isinstance(message, Answered):
            self._loop.call_soon_threadsafe(self._answers[message.id].set_result, message.value)
        elif isinstance(message, Failure):
            self._loop.call_soon_threadsafe(self._answers[message.id].set_exception, RemoteError.of(message))


@dataclass
class Running:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def workers(self) -> list[int]:
        """Return the numbers of the processes that compute: one, or none while it is replaced."""
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        children = [int(pid) for thread in threads for pid in thread.read_text().split()]
        return [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def worker(self) -> int:
        """Return the number of the process that computes."""
        (worker,) = self.workers()
        return worker

    def kill(self) -> None:
        """End it like a machine that loses power."""
        workers = self.workers() if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


def start_server(
    folder: Path,
    *flags: str,
    model: str = f"small={MODEL}",
    port: int = 0,
    env: dict[str, str] | None = None,
    ulimit: str = "",
) -> Running:
    """Start `tmca serve` and wait until it answers; its jobs and its log lie in the folder.

    Args:
        folder: An existing folder.
        flags: Of `tmca serve`.
        model: The model to serve.
        port: Where to listen; 0: on a free port.
        env: Further environment variables.
        ulimit: Options of the shell's `ulimit` to start it under.
    """
    port = port or free_port()
    log = folder / f"server-{len(list(folder.glob('server-*.log')))}.log"
    data = () if "--data-dir" in flags else ("--data-dir", str(folder / "data"))
    command = [sys.executable, "-m", "tmca", "serve", "-m", model, "--port", str(port), *data, *flags]
    if ulimit:
        command = ["sh", "-c", f'ulimit {ulimit} && exec "$@"', "sh", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMCA_OFFLINE": "1"} | (env or {})
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, text=True, env=environment)
    running = Running(process, port, log)
    wait_until(lambda: is_ready(running), 90)
    return running


@contextmanager
def running_server(folder: Path, *flags: str) -> Iterator[Running]:
    """Give a server that is ended with the block."""
    running = start_server(folder, *flags)
    try:
        yield running
    finally:
        running.kill()


def is_ready(running: Running) -> bool:
    if running.process.poll() is not None:
        pytest.fail(f"the server ended: {running.log.read_text()}")
    try:
        return httpx2.get(f"{running.url}/readyz", timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False


def wait_until(is_so: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextmanager
def image_form(*prompts: str, path: Path = IMAGE, **fields: Any) -> Iterator[dict[str, Any]]:
    """Give the arguments of a request about one image."""
    with path.open("rb") as stream:
        yield {"files": {"image": (path.name, stream)}, "data": {"prompt": list(prompts)} | fields}
