"""Fixtures of the server's tests: settings, an application in this process, a server in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import MODEL, Running, free_port, is_ready, settings_for, wait_until
from starlette.testclient import TestClient

from tmca.server import ServerSettings, create_app


@pytest.fixture
def make_settings(tmp_path: Path) -> Callable[..., ServerSettings]:
    return lambda **changes: settings_for(tmp_path / "data", **changes)


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """Return a client of one server that all tests share: change nothing in it."""
    settings = settings_for(tmp_path_factory.mktemp("server"))
    with TestClient(create_app(settings), base_url="http://localhost") as client:
        yield client


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Return a function that starts `tmca serve` with flags and waits until it answers."""
    started: list[subprocess.Popen[str]] = []

    def begin(*flags: str, model: str = f"small={MODEL}", port: int = 0, env: dict[str, str] | None = None) -> Running:
        port = port or free_port()
        log = tmp_path / f"server-{len(started)}.log"
        data = () if "--data-dir" in flags else ("--data-dir", str(tmp_path / "data"))
        command = [sys.executable, "-m", "tmca", "serve", "-m", model, "--port", str(port), "--no-page", *data, *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TMCA_OFFLINE": "1"} | (env or {})
        with log.open("w") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=stream, text=True, env=environment)
        started.append(process)
        running = Running(process, f"http://127.0.0.1:{port}", log)
        wait_until(lambda: is_ready(running), 90)
        return running

    yield begin
    for process in started:
        process.kill()
        process.wait()
