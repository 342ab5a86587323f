"""Fixtures of the server's tests: settings, an application in this process, a server in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Running, settings_for, start_server
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
    """Return a function that starts `tmca serve` with flags, without the page, and waits until it answers."""
    started: list[Running] = []

    def begin(*flags: str, **options: Any) -> Running:
        started.append(start_server(tmp_path, "--no-page", *flags, **options))
        return started[-1]

    yield begin
    for running in started:
        running.kill()
