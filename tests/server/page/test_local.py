"""What of Gradio answers, and that nothing of it names another host."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from serving import IMAGE, running_server, settings_for

from tmca.server import page
from tmca.server.engine import Engine

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
        "/gradio_api/vibe-code", "/dev/reload", "/gradio_api/component_server",
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


def _run(client: httpx2.Client, path: str, **file: Any) -> httpx2.Response:
    data = [None, {"path": path, "meta": {"_type": "gradio.FileData"}, **file}]
    return client.post("/gradio_api/run/predict", json={"fn_index": 0, "data": data})


def test_a_file_that_was_uploaded_is_looked_into(client: httpx2.Client):
    (path,) = client.post("/gradio_api/upload", files={"files": ("image.png", IMAGE.read_bytes())}).json()
    response = _run(client, path, url=f"{client.base_url}/gradio_api/file={path}", orig_name="image.png")
    assert response.status_code == 200
    assert "Picture, 96 × 96 pixels" in response.text


@pytest.mark.parametrize(
    "path",
    [
        str(IMAGE), "/dev/zero", "/proc/self/environ", "image.png", "", "a\0b", "file:///etc/passwd", "~/x.png",
        "http://collector.example/x.png", "HTTPS://collector.example/x.png", "http://127.0.0.1:9/x.png", "http://[x",
    ],
)  # fmt: skip
def test_a_path_that_was_not_uploaded_is_refused(client: httpx2.Client, path: str):
    response = _run(client, path)
    assert (response.status_code, response.json()["code"]) == (403, "forbidden")


def test_a_path_out_of_the_uploads_is_refused(client: httpx2.Client):
    (path,) = client.post("/gradio_api/upload", files={"files": ("image.png", IMAGE.read_bytes())}).json()
    folder = Path(path).parent
    assert _run(client, f"{folder}/../../../../../../..{IMAGE}").status_code == 403


@pytest.mark.parametrize("url", ["http://collector.example/x.png", "//collector.example/x.png", "http://[x"])
def test_an_address_of_another_host_is_refused(client: httpx2.Client, url: str):
    (path,) = client.post("/gradio_api/upload", files={"files": ("image.png", IMAGE.read_bytes())}).json()
    assert _run(client, path, url=url).status_code == 403


def test_gradio_itself_asks_whether_a_file_was_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    blocks = SimpleNamespace(has_launched=False)
    monkeypatch.setattr(page, "build_page", lambda *_: blocks)
    monkeypatch.setattr(page.gr, "mount_gradio_app", lambda app, *_, **__: app)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    settings = settings_for(tmp_path)
    page.mount_page(FastAPI(), Engine(settings.worker), settings, tmp_path)
    assert blocks.has_launched


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 200_000, b"1" * 5000, b"\xff"])
def test_a_request_that_is_not_json_is_refused(client: httpx2.Client, content: bytes):
    response = client.post("/gradio_api/run/predict", content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


def test_the_server_itself_answers_beside_the_page(client: httpx2.Client):
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/v2").json()["name"] == "tmca"
    head = client.head("/")
    assert head.status_code == 200
    assert head.text == ""


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/segment", 405, "method_not_allowed"),
        ("PUT", "/v1/jobs", 405, "method_not_allowed"),
        ("POST", "/healthz", 405, "method_not_allowed"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/nothing", 404, "not_found"),
    ],
)
def test_what_is_not_the_pages_is_explained_as_without_a_page(
    client: httpx2.Client, method: str, path: str, status: int, code: str
):
    response = client.request(method, path)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert response.headers["content-type"] == "application/problem+json"
    assert (status == 405) == ("allow" in response.headers)


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v2/health/live", "/"])
def test_the_head_of_an_answer_can_be_asked_for(client: httpx2.Client, path: str):
    head, answer = client.head(path), client.get(path)
    assert head.status_code == answer.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == answer.headers["content-type"]


def test_a_server_whose_page_is_open_stops_at_once(tmp_path: Path):
    with running_server(tmp_path) as running:
        reading = httpx2.stream("GET", f"{running.url}/gradio_api/heartbeat/abc", timeout=60)
        with reading as response, contextlib.suppress(httpx2.HTTPError):
            beats = response.iter_raw()
            next(beats)
            started = time.monotonic()
            running.process.terminate()
            running.process.wait(60)
            assert time.monotonic() - started < 15
            beats.close()
        assert "Traceback" not in running.log.read_text()
