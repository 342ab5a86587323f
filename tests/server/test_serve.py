"""`tmca serve` as a process: how it starts, what it survives, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from serving import IMAGE, KEY, LEFT, MODEL, Running, free_port, image_form, wait_until

from tmca.server import connections, uploads


def _segment(server: Running, *prompts: str, **options: Any) -> httpx2.Response:
    with image_form(*(prompts or (LEFT,))) as form:
        return httpx2.post(f"{server.url}/v1/segment", timeout=60, **form, **options)


def _post_job(server: Running, images: int) -> str:
    content = IMAGE.read_bytes()
    files = [("image", (f"{number}.png", content)) for number in range(images)]
    response = httpx2.post(f"{server.url}/v1/jobs", files=files, data={"prompt": LEFT}, timeout=60)
    assert response.status_code == 202, response.text
    return f"{server.url}{response.headers['Location']}"


def _is_done(job: str) -> bool:
    status = httpx2.get(job).json()["status"]
    assert status not in ("failed", "cancelled")
    return bool(status == "done")


def test_a_killed_server_finishes_its_job_when_it_is_back(start: Callable[..., Running]):
    server = start()
    job = _post_job(server, 60)
    wait_until(lambda: httpx2.get(job).json()["cases_done"] > 5)
    left = Path((server.log.parent / "data" / "temporary").read_text())
    assert left.stat().st_mode & 0o077 == 0  # nobody else reads what is sent
    server.kill()
    killed = time.time()
    again = start(port=server.port)
    assert not left.exists()
    wait_until(lambda: _is_done(job))
    state = httpx2.get(job).json()
    assert (state["cases_done"], state["attempts"]) == (60, 2)
    folder = next((again.log.parent / "data" / "jobs").iterdir())
    kept = [path for path in (folder / "output").glob("*.png") if path.stat().st_mtime < killed + 0.5]
    assert len(kept) > 5  # nothing is done twice
    assert len(list((folder / "output").glob("*.png"))) == 60


def test_a_killed_worker_costs_neither_a_request_nor_a_job(start: Callable[..., Running]):
    server = start()
    job = _post_job(server, 60)
    wait_until(lambda: httpx2.get(job).json()["cases_done"] > 5)
    os.kill(server.worker(), signal.SIGKILL)
    assert _segment(server).status_code == 200
    wait_until(lambda: _is_done(job))
    assert httpx2.get(job).json()["cases_done"] == 60
    assert "tmca_worker_restarts_total 1.0" in httpx2.get(f"{server.url}/metrics").text


def test_a_server_told_to_stop_finishes_what_it_took(start: Callable[..., Running]):
    server = start()
    os.kill(server.worker(), signal.SIGSTOP)
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(_segment, server) for _ in range(6)]
        wait_until(lambda: "tmca_requests_waiting 6.0" in httpx2.get(f"{server.url}/metrics").text)
        server.process.terminate()
        time.sleep(0.3)
        os.kill(server.worker(), signal.SIGCONT)
        assert [answer.result().status_code for answer in asked] == [200] * 6
    assert server.process.wait(30) in (0, -signal.SIGTERM)  # uvicorn passes the signal on when all is done
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(server.url)


def test_a_new_model_replaces_the_old_one_without_a_lost_request(start: Callable[..., Running], tmp_path: Path):
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    server = start(model=f"small={folder}")
    statuses: list[int] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            statuses.append(_segment(server).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    shutil.copytree(MODEL, tmp_path / "new")
    os.utime(tmp_path / "new" / "model.safetensors")
    folder.rename(tmp_path / "old")
    (tmp_path / "new").rename(folder)
    try:
        wait_until(lambda: httpx2.get(f"{server.url}/capabilities").json()["models"][0]["loaded"] == 2)
    finally:
        done.set()
        thread.join()
    assert set(statuses) == {200}
    assert len(statuses) > 5


def test_slow_clients_do_not_keep_others_waiting(start: Callable[..., Running]):
    server = start()
    address = ("127.0.0.1", server.port)
    half = b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    slow = [socket.create_connection(address) for _ in range(100)]
    for number, connection in enumerate(slow):
        connection.sendall(half if number % 2 else half + b"Content-Length: 100000\r\n\r\n--x\r\n")
    started = time.monotonic()
    assert _segment(server).status_code == 200
    assert time.monotonic() - started < 10
    for connection in slow:
        connection.close()
    assert _segment(server).status_code == 200


@pytest.fixture
def patient_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Return the port of a server that waits 0.3 seconds for a header and 0.6 before it answers."""
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)

    async def app(_: Any, __: Any, send: Any) -> None:
        await asyncio.sleep(0.6)  # an answer may take longer than that
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    port = free_port()
    config = uvicorn.Config(app, port=port, http=connections.PatientProtocol, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    yield port
    server.should_exit = True
    thread.join()


def _trickle(connection: socket.socket, content: bytes) -> None:
    """Send a byte now and then until the other side closes the connection."""
    connection.settimeout(0.05)
    for number in range(100):
        connection.sendall(content[number : number + 1] or b"x")
        with contextlib.suppress(TimeoutError):
            assert connection.recv(1) == b""
            return
    pytest.fail("the connection was not closed")


def test_a_silent_connection_is_closed(patient_port: int):
    with socket.create_connection(("127.0.0.1", patient_port)) as silent:
        silent.settimeout(5)
        silent.sendall(b"GET / HTTP/1.1\r\n")
        assert silent.recv(1) == b""
    assert httpx2.get(f"http://127.0.0.1:{patient_port}").status_code == 204


@pytest.mark.parametrize("length", [0, 1000])
def test_a_connection_that_trickles_after_an_answer_is_closed(patient_port: int, length: int):
    header = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % length
    with socket.create_connection(("127.0.0.1", patient_port)) as slow:
        slow.settimeout(5)
        slow.sendall(header)
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += slow.recv(4096)
        assert answer.startswith(b"HTTP/1.1 204")
        with contextlib.suppress(ConnectionError):
            _trickle(slow, b"GET / HTTP/1.1\r\nX: ")


def test_a_connection_is_used_again(patient_port: int):
    with socket.create_connection(("127.0.0.1", patient_port)) as connection:
        connection.settimeout(5)
        for _ in range(3):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 204")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a disk of three megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(4096))


def test_a_full_disk_is_told_and_jobs_are_taken_again_when_there_is_room(
    start: Callable[..., Running], small_disk: Path
):
    server = start("--data-dir", str(small_disk))
    filler = small_disk / "filler"
    _fill(filler)
    response = httpx2.post(
        f"{server.url}/v1/jobs", files={"image": ("a.png", IMAGE.read_bytes())}, data={"prompt": LEFT}
    )
    assert (response.status_code, response.json()["code"]) == (507, "cannot_write")
    assert str(small_disk) not in response.text
    assert _segment(server).status_code == 200  # which needs no room there
    filler.unlink()
    job = _post_job(server, 1)
    wait_until(lambda: _is_done(job))


def test_a_full_temporary_disk_is_told(start: Callable[..., Running], small_disk: Path):
    server = start(env={"TMPDIR": str(small_disk)})
    large = IMAGE.read_bytes() + bytes(4_000_000)
    response = httpx2.post(f"{server.url}/v1/segment", files={"image": ("a.png", large)})
    assert (response.status_code, response.json()["code"]) == (507, "cannot_write")
    assert _segment(server).status_code == 200


@pytest.mark.parametrize(("ulimit", "status"), [("-Sn 200", 202), ("-n 200", 413)])
def test_a_job_of_many_files_is_taken_or_told_to_have_too_many(start: Callable[..., Running], ulimit: str, status: int):
    server = start(ulimit=ulimit)
    content = IMAGE.read_bytes() + bytes(uploads.JOB_SPOOL_BYTES)
    files = [("image", (f"{number}.png", content)) for number in range(300)]
    response = httpx2.post(f"{server.url}/v1/jobs", files=files, data={"prompt": LEFT}, timeout=60)
    assert response.status_code == status
    if status == 413:
        assert response.json()["code"] == "too_large"
        assert "more files than the server can keep open" in response.json()["detail"]
        assert _segment(server).status_code == 200


def test_connections_that_ask_nothing_do_not_make_it_look_dead(start: Callable[..., Running]):
    server = start("--max-queue", "1")
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
    try:
        assert httpx2.get(f"{server.url}/healthz").status_code == 200
        assert _segment(server, LEFT).status_code == 200
    finally:
        for connection in idle:
            connection.close()


def test_tensors_that_turn_out_too_large_are_refused_as_such(start: Callable[..., Running]):
    server = start()
    chunks = (b" " * 2**20 for _ in range(33))
    response = httpx2.post(
        f"{server.url}/v2/models/small/infer", content=chunks, headers={"Content-Type": "application/json"}
    )
    assert (response.status_code, response.json()["code"]) == (413, "too_large")


def test_a_worker_that_cannot_start_again_is_told_and_logged(start: Callable[..., Running], tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    server = start(model=f"small={model}")
    (model / "model.safetensors").write_bytes(b"cut off")
    os.kill(server.worker(), signal.SIGKILL)
    wait_until(lambda: httpx2.get(f"{server.url}/capabilities").json()["problem"] != "", 60)
    response = _segment(server, LEFT)
    assert (response.status_code, response.json()["code"]) == (503, "not_ready")
    assert "the worker ended with code -9" in server.log.read_text()
    wait_until(lambda: re.search(r"the worker ended with code \d+: .*model.safetensors", server.log.read_text()), 30)


def test_other_machines_need_the_key(start: Callable[..., Running], tmp_path: Path):
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n", "utf-8")
    server = start("--host", "0.0.0.0", "--api-key-file", str(keys))
    assert _segment(server).status_code == 401
    assert _segment(server, headers={"Authorization": "Bearer another-key-of-somebody"}).status_code == 401
    assert _segment(server, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    assert httpx2.get(f"{server.url}/docs").status_code == 401
    assert KEY not in server.log.read_text()


def test_the_log_holds_neither_sentence_nor_file(start: Callable[..., Running]):
    server = start()
    assert _segment(server, "John Smith has one polyp").status_code == 200
    httpx2.get(f"{server.url}/v1/jobs/john-smith")
    server.process.terminate()
    server.process.wait(30)
    log = server.log.read_text().lower()
    assert "post /v1/segment 200" in log
    assert "smith" not in log
    assert "image.png" not in log


@pytest.mark.parametrize(
    ("flags", "code", "reason"),
    [
        (("--host", "0.0.0.0"), 2, "Without a key"),
        (("--api-key", "short"), 2, "fewer than 16"),
        (("--port", "80000"), 2, "There is no port 80000"),
        (("--api-key-file", "missing"), 3, "cannot be read"),
        (("--tls-certificate", "missing.pem"), 2, "certificate and its key"),
        (("--tls-certificate", "missing.pem", "--tls-key", "missing.pem"), 2, "no file missing.pem"),
        (("--host", "203.0.113.7", "--api-key", KEY), 1, "Cannot listen on"),
        (("-m", "a/run", "b/run"), 2, "Two models are called"),
        (("-m", "x y=run"), 2, "cannot be called"),
    ],
)
def test_a_server_that_cannot_start_says_why(flags: tuple[str, ...], code: int, reason: str, tmp_path: Path):
    command = [sys.executable, "-m", "tmca", "serve", "-m", str(MODEL), "--no-page", "--data-dir", str(tmp_path)]
    if "-m" in flags:
        command = [*command[:4], *command[6:]]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60)
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == code


def test_a_model_that_cannot_be_loaded_ends_the_start(tmp_path: Path):
    command = [sys.executable, "-m", "tmca", "serve", "-m", str(tmp_path), "--data-dir", str(tmp_path / "data")]
    done = subprocess.run([*command, "--port", str(free_port())], capture_output=True, text=True, timeout=120)
    assert done.returncode == 5
    assert "Traceback" not in done.stderr
    assert str(tmp_path) in done.stderr


def test_a_port_in_use_is_said(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        command = [sys.executable, "-m", "tmca", "serve", "-m", str(MODEL), "--port", port, "--data-dir", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, f"port {port}" in done.stderr) == (1, True)
