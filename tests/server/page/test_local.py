"""What of Gradio answers, and that nothing of it names another host."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx2
import pytest
from serving import running_server

NAMESPACES = ("http://www.w3.org/",)
"""Addresses that are names, and are never asked for."""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    with (
        running_server(tmp_path_factory.mktemp("server")) as running,
        httpx2.Client(base_url=running.url, timeout=30) as client,
    ):
        yield client


@pytest.mark.parametrize("path", ["/", "/config"])
def test_no_other_host_is_named(client: httpx2.Client, path: str):
    text = client.get(path).text
    assert len(text) > 1000
    named = {url for url in re.findall(r"https?://[^\s\"'\\<>)]+", text) if not url.startswith(NAMESPACES)}
    assert {url for url in named if not url.startswith("http://127.0.0.1")} == set()


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/info", "/gradio_api/openapi.json", "/gradio_api/queue/status", "/gradio_api/queue/join",
        "/gradio_api/proxy=https://example.org/", "/gradio_api/file=src/tmca/__init__.py", "/gradio_api/call/x",
        "/gradio_api/mcp", "/monitoring", "/robots.txt", "/manifest.json", "/login", "/token", "/logout", "/pwa_icon",
        "/gradio_api/vibe-code", "/dev/reload",
    ],
)  # fmt: skip
def test_the_rest_of_gradio_is_not_there(client: httpx2.Client, path: str):
    assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "//etc/passwd", "/proc/self/environ", "/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd"],
)
def test_files_of_the_machine_are_not_served(client: httpx2.Client, path: str):
    response = client.get(f"/gradio_api/file={path}")
    assert response.status_code in (403, 404)
    assert "root:" not in response.text


def test_the_server_itself_answers_beside_the_page(client: httpx2.Client):
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/v2").json()["name"] == "tmca"
    head = client.head("/")
    assert head.status_code == 200
    assert head.text == ""
