from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tmca import health
from tmca.health import Check, examine, installation, self_test
from tmca.health.installation import describe_installation
from tmca.health.self_test import run_self_test
from tmca.imaging.raster import write_mask

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return describe_installation()


@pytest.fixture
def checks(facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Check]]:
    """Return what is found, by name, where some of the facts are others."""

    def look(*path: str, value: Any) -> dict[str, Check]:
        changed = copy.deepcopy(facts)
        place = changed
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        monkeypatch.setattr(health, "describe_installation", lambda: changed)
        monkeypatch.setattr(health, "run_self_test", lambda _: ([1.0], "cpu"))
        return {check.name: check for check in examine("cpu")}

    return look


def test_every_variable_of_tmca_is_known():
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]
    used = {
        name
        for path in sources
        if path.name != "test_health.py"
        for name in re.findall(r"\bTMCA_[A-Z_]+\b", path.read_text("utf-8"))
    }
    assert used <= set(health.VARIABLES)


@pytest.mark.parametrize(
    ("name", "value"), [("TMCA_OFFLINE", "maybe"), ("TMCA_LOG_LEVEL", "LOUD"), ("TMCA_CACHE_GB", "much")]
)
def test_a_value_that_means_nothing_is_warned_of(name: str, value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, value)
    warnings = [check for check in health._check_environment({"environment": {}}) if check.status == "warning"]
    assert len(warnings) == 1
    assert f"{name} is {value!r}" in warnings[0].message


def test_a_home_that_does_not_exist_is_one_of_the_checks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMCA_HOME", "~nobody-of-this-name")
    (check,) = examine("cpu")
    assert (check.name, check.status) == ("TMCA_HOME", "problem")
    assert "no such user" in check.message


def test_half_a_model_is_warned_of(checks: Callable[..., dict[str, Check]], facts: dict[str, Any]):
    name = next(iter(facts["weights"]))
    broken = {"presets": [], "folder": "/models/x", "problem": "/models/x lacks config.json"}
    found = checks("weights", name, value=broken)["weights"]  # the last of that name
    assert (found.status, found.message) == ("warning", "/models/x lacks config.json")


def test_nothing_is_wrong_here():
    found = list(examine("cpu"))
    assert {check.status for check in found} <= {"ok", "warning"}, found
    assert found[-1].name == "self-test"
    assert "2 masks are as they should be" in found[-1].message


@pytest.mark.parametrize(
    ("path", "value", "name", "status", "said", "hint"),
    [
        (("packages", "torch"), {"version": "2.0", "required": ">=2.8", "fits": False}, "packages", "problem",
         "torch is 2.0, needed is >=2.8", "pip install 'torch>=2.8'"),
        (("packages", "rich"), {"version": None, "required": ">=14", "fits": False}, "packages", "problem",
         "rich is missing", "pip install 'rich>=14'"),
        (("tmca", "version"), None, "tmca", "warning", "without being installed", "pip install"),
        (("python", "required"), ">=3.99", "Python", "problem", "", ">=3.99"),
        (("extras", "train"), {"installed": False, "install": "COMMAND", "packages": {"monai": {"version": None,
         "required": "", "fits": False}}}, "extra train", "ok", "not installed, it needs monai", "COMMAND"),
        (("extras", "train"), {"installed": False, "install": "COMMAND", "packages": {"monai": {"version": "1",
         "required": ">=2", "fits": False}}}, "extra train", "warning", "monai is 1, needed is >=2", "COMMAND"),
        (("torch", "threads"), 10_000, "threads", "warning", "10000 threads", "OMP_NUM_THREADS="),
        (("devices", "cuda_problem"), "The driver is too old", "cuda", "warning", "too old", "update the NVIDIA"),
        (("devices", "cuda_problem"), "Found no NVIDIA driver", "cuda", "ok", "Found no NVIDIA driver", ""),
        (("devices", "cuda"), [{"name": "H100", "memory_bytes": 80_000_000_000, "capability": "9.0", "bfloat16": True}],
         "cuda:0", "ok", "H100, 80.0 GB memory, capability 9.0, computes bfloat16", ""),
        (("devices", "auto"), None, "device", "warning", "TMCA_DEVICE", "unset TMCA_DEVICE"),
        (("folders", "home", "free_bytes"), 50_000_000, "TMCA_HOME", "problem", "50.0 MB", "TMCA_HOME=FOLDER"),
        (("folders", "home", "free_bytes"), 1_000_000_000, "TMCA_HOME", "warning", "1.0 GB", "TMCA_HOME=FOLDER"),
        (("folders", "temporary", "free_bytes"), 0, "temporary files", "problem", "0 bytes", "TMPDIR=FOLDER"),
        (("offline",), True, "weights", "ok", "nothing is downloaded", ""),
        (("environment",), {"TMCA_OFLINE": "1"}, "environment", "warning", "TMCA_OFLINE", "did you mean TMCA_OFFLINE?"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_the_next_step(
    checks: Callable[..., dict[str, Check]], monkeypatch: pytest.MonkeyPatch,
    path: tuple[str, ...], value: Any, name: str, status: str, said: str, hint: str,
):  # fmt: skip
    seen: list[Check] = []
    real = health.Check
    monkeypatch.setattr(health, "Check", lambda *fields: seen.append(real(*fields)) or seen[-1])
    checks(*path, value=value)
    found = next(check for check in seen if check.name == name)
    assert found.status == status, found
    assert said in found.message
    assert hint in found.hint
    assert found.hint or found.status == "ok"


def test_offline_mode_that_is_none_is_warned_of(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMCA_OFFLINE", "on")
    found = [check for check in examine("cpu") if check.status == "warning"]
    assert any("'on', which means nothing" in check.message for check in found)


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TMCA_HOME", str(tmp_path / "file" / "home"))
    facts = describe_installation()
    assert facts["folders"]["home"]["writable"] is False
    found = health._check_folder("TMCA_HOME", facts["folders"]["home"])
    assert found.status == "problem"
    assert str(tmp_path / "file" / "home") in found.message
    assert "cannot be written" in found.message
    assert "TMCA_HOME" in found.hint


def test_a_broken_torchvision_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "torchvision").mkdir()
    source = tmp_path / "torchvision" / "__init__.py"
    source.write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert list(health._check_conflicts()) == []  # it is not installed
    monkeypatch.setattr(health, "installed_version", lambda _: "0.1")
    (found,) = health._check_conflicts()
    assert found.status == "problem"
    assert "operator torchvision::nms does not exist" in found.message
    assert "pip uninstall torchvision" in found.hint
    source.write_text("")
    assert list(health._check_conflicts()) == []


def test_a_folder_is_looked_at_without_a_trace(tmp_path: Path):
    folder = installation._folder(tmp_path / "not" / "yet")
    assert (folder["exists"], folder["writable"]) == (False, True)
    assert health._check_folder("TMCA_HOME", folder).status == "ok"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(self_test.SELF_TEST, tmp_path / "self_test"))
    monkeypatch.setattr(self_test, "SELF_TEST", folder)
    return folder


def test_another_mask_is_a_problem(damaged: Path):
    write_mask(damaged / "mask-2.png", np.zeros((96, 96), dtype=bool))
    dice, used = run_self_test("cpu")
    assert dice[1] == 0
    assert used.startswith("cpu in ")
    found = health._check_masks("cpu")
    assert found.status == "problem"
    assert "not those they should be" in found.message
    assert found.hint


@pytest.mark.parametrize("damage", ["model/model.safetensors", "image.png"])
def test_a_self_test_that_cannot_run_is_a_problem(damaged: Path, damage: str):
    (damaged / damage).write_bytes(b"")
    found = health._check_masks("cpu")
    assert found.status == "problem"
    assert str(damaged / damage) in found.message
    assert found.hint


@pytest.mark.parametrize("error", [RuntimeError("no kernel image is available\nmore"), ImportError("libtorch.so")])
def test_whatever_breaks_is_a_problem(monkeypatch: pytest.MonkeyPatch, error: Exception):
    def fail(_: str) -> None:
        raise error

    monkeypatch.setattr(health, "run_self_test", fail)
    found = health._check_masks("auto")
    assert found.status == "problem"
    assert str(error).splitlines()[0] in found.message
    assert found.hint


def test_a_device_that_is_not_here_is_one_problem():
    found = [check for check in examine("cuda:99") if check.status == "problem"]
    assert [check.name for check in found] == ["device"]
    assert "cuda:99" in found[0].message
