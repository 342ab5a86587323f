"""Nothing but this machine is asked: whatever is done with files that are here opens no connection.

Each test starts a Python of its own, in which, and in whose children, every attempt to leave the machine is recorded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httpx2
import pytest
from safetensors.torch import save_file
from serving import LEFT, image_form, start_server, wait_until
from transformers import ConvNextConfig, ConvNextModel

from tmca.data.manifest import Manifest
from tmca.models import TMCA

GUARD = Path(__file__).with_name("guard")
SOURCE = Path(__file__).parents[2] / "src"
SET_BY_TMCA = (
    "TMCA_OFFLINE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "GRADIO_ANALYTICS_ENABLED",
    "RAY_USAGE_STATS_ENABLED", "RAY_ADDRESS",
)  # fmt: skip
PROMPT = "one small bright round lesion, located in top left of the image"

VERBS = """
import json, sys
from tmca import cli
for command in json.load(sys.stdin):
    code = cli.run(command)
    print(f"exit code {code}: {command}", file=sys.stderr)
"""


class Guarded(NamedTuple):
    attempts: list[str]
    """What would have left this machine."""
    codes: list[int]
    """Exit codes of the commands."""
    err: str


@pytest.fixture
def guarded(tmp_path: Path) -> Callable[..., Guarded]:
    """Return a function that runs a program, or commands of tmca in one process, behind the guard."""

    def run(program: str = VERBS, *, commands: list[list[str]] | None = None, **variables: str) -> Guarded:
        log = tmp_path / "attempts.txt"
        log.write_text("")
        environment = {name: value for name, value in os.environ.items() if name not in SET_BY_TMCA}
        environment |= {"PYTHONPATH": f"{GUARD}{os.pathsep}{SOURCE}", "GUARD_LOG": str(log), "OMP_NUM_THREADS": "1"}
        process = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(commands),
            env=environment | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        said = [line for line in process.stderr.splitlines() if line.startswith("exit code ")]
        codes = [int(line.split()[2].rstrip(":")) for line in said]
        return Guarded(log.read_text("utf-8").splitlines(), codes, process.stderr)

    return run


def test_the_guard_sees_every_way_out(guarded: Callable[..., Guarded]):
    found = guarded("""
import asyncio, socket, subprocess, sys, threading, urllib.request

def tried(attempt, *arguments, **options):
    try:
        attempt(*arguments, **options)
    except OSError as error:
        assert "blocked" in str(error), error

far = ("192.0.2.1", 80)
tried(socket.socket().connect, far)
tried(socket.socket().connect_ex, far)
tried(socket.create_connection, far, timeout=1)
tried(socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto, b"x", far)
tried(socket.getaddrinfo, "example.org", 443)
tried(socket.gethostbyname, "example.org")
tried(urllib.request.urlopen, "http://192.0.2.1", timeout=1)
tried(asyncio.run, asyncio.wait_for(asyncio.open_connection(*far), 1))
thread = threading.Thread(target=tried, args=(socket.create_connection, far))
thread.start(); thread.join()
child = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
assert b"blocked" in subprocess.run([sys.executable, "-c", child], stderr=subprocess.PIPE).stderr

with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname()).close()
    socket.getaddrinfo("localhost", 80)
""")
    assert len(found.attempts) == 10, found.attempts


def test_no_verb_asks_anybody(guarded: Callable[..., Guarded], phantoms: Manifest, tmp_path: Path):
    """Train on an encoder of the Hugging Face cache, score, segment, compare, look: offline mode is off."""
    _cached_encoder(tmp_path / "huggingface" / "hub", "someone/encoder")
    data, images = str(phantoms.root), str(phantoms.image_path(phantoms.records[0]))
    train = ["train", "tiny", "--data", data, "--trainer.max-epochs", "1", "--trainer.num-workers", "1"]
    evaluate = ["evaluate", "-m", "run", "--data", data]
    commands = [
        ["data", "audit", data],
        [*train, "-o", "run", "--model.image-encoder.weights", "someone/encoder"],
        [*evaluate, "-o", "first", "--surface"],
        [*evaluate, "-o", "second", "--seed", "1"],
        ["compare", "first", "second", "-o", "comparison"],
        ["predict", "-i", images, "-o", "masks", "-m", "run", "-p", PROMPT],
        ["export", "bundle", "-m", "run", "-o", "run.tmca", "--images", "4"],
        ["models", "verify", "run.tmca"],
        ["report-to-prompt", "report.txt", "--grammar", "polyp"],
        ["bench", "-m", "run", "--batch-sizes", "1", "--training-batch", "2"],
        ["models", "list"],
        ["info", "--json"],
        ["doctor"],
    ]
    (tmp_path / "report.txt").write_text("Findings: one small polyp in the right of the image.")
    found = guarded(commands=commands, HF_HOME=str(tmp_path / "huggingface"))
    faulty = {"data audit": 3}  # the drawn data have cases of one lesion that look alike
    expected = [faulty.get(" ".join(command[:2]), 0) for command in commands]
    assert found.codes == expected, found.err
    assert found.attempts == []
    for written in ("first/report.html", "comparison/comparison.html", "masks/run_report.json"):
        assert (tmp_path / written).is_file()


def test_the_package_asks_nobody_either(guarded: Callable[..., Guarded]):
    """Without the command line nothing has switched telemetry off."""
    found = guarded("""
from pathlib import Path
from tmca.demo import run_demo
from tmca.presets import change, get_preset
experiment = change(get_preset("tiny"), "tiny", trainer={"max_epochs": 1})
run_demo(Path("demo"), counts={"train": 8, "val": 2, "test": 2}, experiment=experiment)
""")
    assert found.attempts == []


def test_the_server_and_its_page_ask_nobody(tmp_path: Path):
    """Neither of its processes does, from the start to the stop."""
    log = tmp_path / "attempts.txt"
    log.write_text("")
    guard = {"PYTHONPATH": f"{GUARD}{os.pathsep}{SOURCE}", "GUARD_LOG": str(log)} | dict.fromkeys(SET_BY_TMCA, "")
    server = start_server(tmp_path, env=guard)
    try:
        assert httpx2.get(server.url).status_code == 200
        with image_form(LEFT) as form:
            assert httpx2.post(f"{server.url}/v1/segment", timeout=60, **form).status_code == 200
        with image_form(LEFT) as form:
            job = httpx2.post(f"{server.url}/v1/jobs", timeout=60, **form).headers["Location"]
        wait_until(lambda: httpx2.get(f"{server.url}{job}").json()["status"] == "done")
        server.process.terminate()
        server.process.wait(60)
    finally:
        server.kill()
    assert log.read_text() == ""


@pytest.mark.slow
def test_ray_asks_nobody(
    guarded: Callable[..., Guarded], tiny_model: Callable[..., TMCA], phantoms: Manifest, tmp_path: Path
):
    """A Ray of this machine only does not even look for its own address, or which cloud it is in."""
    pytest.importorskip("ray.data", reason="needs tmca[ray]")
    tiny_model().save_pretrained(tmp_path / "model")
    images = [str(phantoms.image_path(record)) for record in phantoms.records[:4]]
    command = ["predict", "--engine", "ray", "-i", *images, "-o", "masks", "-m", "model", "-p", PROMPT]
    found = guarded(commands=[command])
    assert found.codes == [0], found.err
    assert found.attempts == []
    assert "WARNING" not in found.err
    assert len(list((tmp_path / "masks").glob("*.png"))) == 4


@pytest.mark.parametrize("variable", ["TMCA_OFFLINE", "HF_HUB_OFFLINE"])
def test_what_is_missing_is_not_asked_for_offline(
    guarded: Callable[..., Guarded], phantoms: Manifest, tmp_path: Path, variable: str
):
    home, data = tmp_path / "home", str(phantoms.root)
    commands = [
        ["train", "tmca", "--data", data, "-o", "run", "--model.image-encoder.weights", "nobody/no-such-model"],
        ["predict", "-i", data, "-o", "masks", "-m", "nobody/no-such-model"],
        ["evaluate", "-m", "nobody/no-such-model", "--data", data],
        ["models", "install", "nnunet"],
    ]
    found = guarded(commands=commands, TMCA_HOME=str(home), HF_HOME=str(tmp_path / "empty"), **{variable: "1"})
    assert found.codes == [5] * 4, found.err
    assert found.attempts == []
    errors = [line for line in found.err.splitlines() if line.startswith("error: ")]
    for line in errors[:3]:
        assert "offline mode is on" in line
        assert f"put them into {home / 'models' / 'nobody' / 'no-such-model'}" in line
    assert "tmca models install nnunet --wheels" in errors[3]
    assert {path.name for path in tmp_path.iterdir()} <= {"attempts.txt", "home", "empty"}


def test_what_is_missing_is_asked_for_otherwise(guarded: Callable[..., Guarded], phantoms: Manifest, tmp_path: Path):
    """The guard would see it if a model were asked for."""
    command = ["train", "tmca", "--data", str(phantoms.root), "-o", "run"]
    found = guarded(commands=[command], HF_HOME=str(tmp_path / "empty"), HF_ENDPOINT="http://192.0.2.1")
    assert found.codes == [5], found.err
    assert found.attempts
    assert all("192.0.2.1" in attempt for attempt in found.attempts)


def _cached_encoder(cache: Path, name: str) -> None:
    """Write an encoder into a Hugging Face cache, as a download leaves it."""
    commit = "0" * 40
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    config = ConvNextConfig(hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1])
    model = ConvNextModel(config)
    (snapshot / "config.json").write_text(config.to_json_string())
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, snapshot / "model.safetensors")
