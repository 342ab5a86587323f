from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Callable
from typing import Any

import pytest
from serving import KEY
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from tmca.errors import ConfigError, DataError
from tmca.server.guard import OPEN_PATHS, Guard
from tmca.server.settings import ServerSettings, read_keys


async def _echo(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] == "/broken":
        raise ValueError("John Smith has a polyp")
    body = await Request(scope, receive).body()
    await JSONResponse({"bytes": len(body)})(scope, receive, send)


@pytest.fixture
def behind(make_settings: Callable[..., ServerSettings]) -> Callable[..., TestClient]:
    def build(**changes: Any) -> TestClient:
        guard = Guard(_echo, make_settings(**changes), lambda *_: None)
        return TestClient(guard, base_url="http://localhost", raise_server_exceptions=False)

    return build


def _basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()


@pytest.mark.parametrize("given", [f"Bearer {KEY}", f"bearer {KEY}", _basic(KEY), "Bearer second-key-of-sixteen"])
def test_who_knows_a_key_gets_in(behind: Callable[..., TestClient], given: str):
    client = behind(keys=(KEY, "second-key-of-sixteen"), host="10.0.0.1")
    assert client.get("/v1", headers={"Authorization": given}).status_code == 200


@pytest.mark.parametrize(
    "given",
    ["", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY, f"Token {KEY}", _basic("no"), "Basic §§§"],
)
def test_who_knows_none_does_not(behind: Callable[..., TestClient], given: str):
    headers = {"Authorization": given.encode("latin-1")} if given else {}
    response = behind(keys=(KEY,), host="10.0.0.1").get("/v1", headers=headers)
    assert response.status_code == 401
    assert response.json()["code"] == "unauthorized"
    assert response.headers["WWW-Authenticate"] == 'Bearer realm="tmca"'


def test_a_browser_is_asked_for_the_key(behind: Callable[..., TestClient]):
    response = behind(keys=(KEY,)).get("/", headers={"Accept": "text/html"})
    assert response.headers["WWW-Authenticate"] == 'Basic realm="tmca"'


@pytest.mark.parametrize("path", OPEN_PATHS)
def test_a_load_balancer_needs_no_key(behind: Callable[..., TestClient], path: str):
    assert behind(keys=(KEY,)).get(path).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", ""])
def test_a_page_that_calls_itself_localhost_is_refused(behind: Callable[..., TestClient], host: str):
    """DNS rebinding: the browser of somebody on this machine sends what a foreign page wants."""
    assert behind().get("/v1", headers={"Host": host}).json()["code"] == "forbidden"


def test_further_names_are_allowed_by_hand(behind: Callable[..., TestClient]):
    client = behind(allowed_hosts=("ward.example",))
    assert client.get("/v1", headers={"Host": "ward.example:8000"}).status_code == 200


def test_pages_of_other_sites_are_refused(behind: Callable[..., TestClient]):
    client = behind()
    assert client.post("/v1", headers={"Origin": "https://evil.example"}).status_code == 403
    assert client.post("/v1", headers={"Origin": "null"}).status_code == 403
    same = client.post("/v1", headers={"Origin": "http://localhost"})
    assert same.status_code == 200
    assert "Access-Control-Allow-Origin" not in same.headers


@pytest.mark.parametrize("headers", [{"Host": "[::1"}, {"Host": "[x]:80"}, {"Origin": "http://[x"}])
@pytest.mark.parametrize("changes", [{}, {"keys": (KEY,), "host": "10.0.0.1"}])
def test_a_name_that_is_none_is_refused(
    behind: Callable[..., TestClient], headers: dict[str, str], changes: dict[str, Any]
):
    response = behind(**changes).get("/v1", headers=headers | {"Authorization": f"Bearer {KEY}"})
    assert (response.status_code, response.json()["code"]) == (403, "forbidden")


def test_a_request_that_says_it_is_too_large_is_not_read(behind: Callable[..., TestClient]):
    response = behind(max_upload=1000).post("/v1", content=bytes(1001))
    assert (response.status_code, response.json()["code"]) == (413, "too_large")
    assert response.headers["Connection"] == "close"


def test_a_request_that_does_not_say_it_is_read_up_to_the_limit(behind: Callable[..., TestClient]):
    client = behind(max_upload=1000, max_job_upload=2000)
    assert client.post("/v1", content=iter([bytes(600), bytes(600)])).status_code == 413
    assert client.post("/v1/jobs", content=iter([bytes(600), bytes(600)])).json() == {"bytes": 1200}


def test_a_request_that_never_ends_is_given_up(make_settings: Callable[..., ServerSettings]):
    guard = Guard(_echo, make_settings(upload_seconds=0.05), lambda *_: None)
    scope = {"type": "http", "method": "POST", "path": "/v1", "headers": [(b"host", b"localhost")], "query_string": b""}
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(0.03)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(asyncio.wait_for(guard(scope, receive, send), 5))
    assert sent[0]["status"] == 408


def test_answers_carry_a_number_and_may_not_be_framed_or_kept(behind: Callable[..., TestClient]):
    client = behind()
    headers = client.get("/v1", headers={"X-Request-ID": "ward-7"}).headers
    assert headers["X-Request-ID"] == "ward-7"
    assert headers["Cache-Control"] == "no-store"
    assert "frame-ancestors 'self'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    forged = client.get("/v1", headers={"X-Request-ID": "a b\u00e9".encode()}).headers["X-Request-ID"]
    assert forged.isalnum()


def test_a_fault_tells_and_logs_nothing_of_the_patient(
    behind: Callable[..., TestClient], caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, "tmca.server"):
        response = behind().get("/broken", headers={"X-Request-ID": "42"})
    assert response.status_code == 500
    assert response.json()["code"] == "runtime_error"
    assert "42 ValueError in test_guard.py" in caplog.text
    assert "Smith" not in response.text + caplog.text


def test_the_log_names_no_path(behind: Callable[..., TestClient], caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "tmca.server"):
        behind().get("/v1/jobs/of-john-smith?prompt=polyp")
    assert "GET other 200" in caplog.text
    assert "smith" not in caplog.text
    assert "polyp" not in caplog.text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "ward.example"])
def test_other_machines_need_a_key(make_settings: Callable[..., ServerSettings], host: str):
    with pytest.raises(ConfigError, match="Without a key") as caught:
        make_settings(host=host)
    assert "--api-key-file" in caught.value.hint
    assert make_settings(host=host, keys=(KEY,)).is_local is False


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.2", "::1"])
def test_this_machine_needs_none(make_settings: Callable[..., ServerSettings], host: str):
    assert make_settings(host=host).is_local


def test_a_short_key_is_refused_and_none_is_shown(make_settings: Callable[..., ServerSettings]):
    with pytest.raises(ConfigError, match="fewer than 16"):
        make_settings(keys=("short",))
    assert KEY not in repr(make_settings(keys=(KEY,)))


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "keys"
    file.write_text("# of the ward\nfirst\n\n  second \n", "utf-8")
    monkeypatch.setenv("TMCA_API_KEYS", "third, fourth,")
    assert read_keys(file) == ("third", "fourth", "first", "second")
    file.write_text("# none\n", "utf-8")
    with pytest.raises(DataError, match="holds no key"):
        read_keys(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_keys(tmp_path / "missing")
