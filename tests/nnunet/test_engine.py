from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tmca.errors import ConfigError, OutOfMemoryError, StorageError, TMCAError, WeightsError
from tmca.files import held
from tmca.nnunet import engine
from tmca.nnunet.engine import PINNED, REQUIRED, install, require, run, status

# Installing ------------------------------------------------------------------------------------------------------


def test_an_environment_is_made_once(program: Any):
    assert not status().installed
    assert install() is True
    found = status()
    assert found.installed
    assert found.versions == {"nnunetv2": "2.8.1", "torch": "9.9"}
    assert require() == found
    calls = len(program.calls)
    assert install() is False
    assert len(program.calls) == calls


def test_torch_is_shared_and_neither_it_nor_what_needs_it_twice_is_asked_for(installed: Any):
    (shared,) = (status().folder / "lib").rglob("tmca_shared.pth")
    assert str(Path(torch.__file__).parents[1]) in shared.read_text("utf-8").splitlines()
    first, second = (call["arguments"] for call in installed.calls_of("pip"))
    assert set(PINNED) <= set(first)
    assert "--no-deps" in first
    assert set(REQUIRED) <= set(second)
    assert not {"torch", "torchvision", "timm"} & {package.partition("=")[0] for package in first + second}


def test_two_installations_at_once_do_not_disturb_each_other(program: Any):
    engines = status().folder.parent
    engines.mkdir(parents=True)
    with (
        held(engines, StorageError("held")),
        pytest.raises(StorageError, match="is being installed by another process"),
    ):
        install()
    assert not program.calls
    assert install() is True


def test_offline_nothing_is_tried(program: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMCA_OFFLINE", "1")
    with pytest.raises(WeightsError, match=r"offline mode is on .*--wheels"):
        install()
    assert not program.calls
    assert not status().folder.exists()


def test_offline_it_is_installed_from_a_folder(program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TMCA_OFFLINE", "1")
    with pytest.raises(ConfigError, match="no folder"):
        install(tmp_path / "nowhere")
    assert install(tmp_path) is True
    for call in program.calls_of("pip"):
        assert "--no-index" in call["arguments"]
        assert call["arguments"][call["arguments"].index("--find-links") + 1] == str(tmp_path)


@pytest.mark.parametrize(
    ("at", "kind", "advice"),
    [("venv", TMCAError, "python3-venv"), ("pip", WeightsError, "check the connection"), ("start", TMCAError, "see ")],
)
def test_a_failure_is_explained_and_leaves_nothing_half_made(program: Any, at: str, kind: type[TMCAError], advice: str):
    program.fail(at, "ERROR: first\nERROR: the reason")
    with pytest.raises(kind, match=r"ERROR: first \| ERROR: the reason") as caught:
        install()
    assert advice in caught.value.hint
    assert "advice" not in caught.value.message
    assert not status().folder.exists()
    assert "some advice" in status().folder.with_name("nnunet-install.log").read_text("utf-8")
    program.behave()
    assert install() is True


@pytest.mark.usefixtures("program")
def test_a_half_made_environment_is_replaced():
    rest = status().folder / "bin" / "rest-of-an-interrupted-try"
    rest.parent.mkdir(parents=True)
    rest.touch()
    assert not status().installed
    assert install() is True
    assert not rest.exists()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("marker", ['{"versions": ', "[]", '{"versions": {"nnunetv2": "1.0"}, "shared": []}'])
def test_what_is_not_our_complete_version_is_not_installed(marker: str):
    (status().folder / "engine.json").write_text(marker, encoding="utf-8")
    assert not status().installed
    with pytest.raises(WeightsError, match="tmca models install nnunet"):
        require()


@pytest.mark.usefixtures("installed")
def test_an_environment_that_lost_what_it_shares_is_not_installed(tmp_path: Path):
    path = status().folder / "engine.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"shared": [str(tmp_path / "gone")]}))
    assert not status().installed


# Running ---------------------------------------------------------------------------------------------------------


def test_a_command_gets_its_arguments_and_variables(
    installed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    run("train", ["001", "2d"], {"nnUNet_results": str(tmp_path)}, tmp_path / "log")
    (call,) = installed.calls_of("run_training_entry()")
    assert call["arguments"][2:] == ["001", "2d"]
    assert call["environment"]["nnUNet_results"] == str(tmp_path)
    assert "PYTHONPATH" not in call["environment"]
    assert capsys.readouterr().err == "epoch 1\n"
    assert (tmp_path / "log").read_text("utf-8") == "tmca: epoch 1\nnot for the user\n"


@pytest.mark.parametrize(
    ("at", "says", "kind", "code"),
    [
        ("train", "Traceback\nValueError: no such thing\nlater", TMCAError, 1),
        ("train", "RuntimeError: CUDA out of memory. Tried", OutOfMemoryError, 6),
        ("train", "killed by your OS due to running out of RAM\nRuntimeError: a worker died", OutOfMemoryError, 6),
        ("killed", "", OutOfMemoryError, 6),
    ],
)
def test_a_failed_command_is_explained_by_its_last_words(
    installed: Any, tmp_path: Path, at: str, says: str, kind: type[TMCAError], code: int
):
    installed.fail(at, says)
    with pytest.raises(TMCAError) as caught:
        run("train", [], {"nnUNet_results": str(tmp_path)}, tmp_path / "log")
    assert type(caught.value) is kind
    assert caught.value.exit_code == code
    assert "could not train: " in caught.value.message
    assert str(tmp_path / "log") in caught.value.hint
    if "ValueError" in says:
        assert caught.value.message.endswith("could not train: ValueError: no such thing")


def test_an_interruption_stops_the_command_and_its_workers(
    installed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "say", interrupt)
    installed.fail("a worker lives on", f"sleep 1; touch {tmp_path}/alive")
    with pytest.raises(KeyboardInterrupt):
        run("train", [], {"nnUNet_results": str(tmp_path)}, tmp_path / "log")
    time.sleep(1.5)
    assert not (tmp_path / "alive").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_and_its_workers_end_with_the_process_that_ran_it(tmp_path: Path, number: signal.Signals):
    (tmp_path / "long.py").write_text(
        "import subprocess\n"
        "def work():\n"
        "    print('tmca: working', flush=True)\n"
        f"    subprocess.run(['sh', '-c', 'sleep 2; touch {tmp_path}/alive'])\n"
    )
    command = [sys.executable, "-c", engine._START.format(module="long", function="work")]
    code = (
        "import os, pathlib; from tmca.nnunet import engine; "
        f"engine._follow({command!r}, os.environ, pathlib.Path({str(tmp_path / 'log')!r}))"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(engine.__file__).parents[2])])
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
    ) as parent:
        assert parent.stderr is not None
        assert parent.stderr.readline() == "working\n"
        parent.send_signal(number)
    time.sleep(3)
    assert not (tmp_path / "alive").exists()


def test_a_command_that_dies_does_not_wait_for_its_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(engine, "_SECONDS_TO_STOP", 0.2)
    script = f"(sleep 60; touch {tmp_path}/alive) & echo training; kill -9 $$"
    start = time.monotonic()
    code, last = engine._follow(["bash", "-c", script], dict(os.environ), tmp_path / "log")
    assert time.monotonic() - start < 30
    assert (code, last) == (-signal.SIGKILL, ["training"])


@pytest.mark.usefixtures("installed")
def test_our_trainer_is_among_those_of_nnunet_and_up_to_date(tmp_path: Path):
    run("train", [], {"nnUNet_results": str(tmp_path)}, tmp_path / "log")
    (place,) = status().folder.rglob("tmca_trainer.py")
    assert place.read_text("utf-8") == Path(engine.__file__).with_name("trainer.py").read_text("utf-8")
    before = place.stat()
    run("train", [], {"nnUNet_results": str(tmp_path)}, tmp_path / "log")
    assert place.stat().st_ino == before.st_ino
    place.write_text("an older one", encoding="utf-8")
    run("train", [], {"nnUNet_results": str(tmp_path)}, tmp_path / "log")
    assert "class TMCATrainer" in place.read_text("utf-8")


def test_nothing_runs_that_is_not_installed(program: Any, tmp_path: Path):
    with pytest.raises(WeightsError, match="not installed"):
        run("train", [], {}, tmp_path / "log")
    assert not program.calls
