from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from packaging.requirements import Requirement

from tmca.health import installation
from tmca.health.installation import describe_installation, install_command, masked

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "info.md"


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return describe_installation()


def test_the_facts_are_documented_and_plain(facts: dict[str, Any]):
    assert json.loads(json.dumps(facts)) == facts
    top, devices = re.findall(r"^\| key.*?\n\n", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    for table, value in ((top, facts), (devices, facts["devices"])):
        assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(value)
    for part in (facts["tmca"], facts["python"], facts["torch"], facts["devices"]["cpu"], facts["folders"]["home"]):
        for key in part:
            assert f"`{key}`" in top + devices, key


def test_what_tmca_requires_is_found(facts: dict[str, Any]):
    assert facts["packages"]["torch"]["version"] == importlib.metadata.version("torch")
    assert all(package["fits"] for package in facts["packages"].values())
    assert "lightning" not in facts["packages"]
    assert set(facts["extras"]["train"]["packages"]) >= {"lightning", "monai"}
    assert facts["extras"]["train"]["installed"]
    assert facts["torch"]["version"] == torch.__version__
    assert facts["devices"]["cpu"]["usable_cores"] >= 1


def test_requirements_are_told_apart_by_extra(monkeypatch: pytest.MonkeyPatch):
    lines = [
        "numpy>=99",
        "nothing-like-it>=1",
        "torch",
        'lightning>=2; extra == "train"',
        'tmca[train]; extra == "dev"',
        'absent; python_version < "3"',
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: lines)
    required, extras = installation._requirements()
    assert [requirement.name for requirement in required] == ["numpy", "nothing-like-it", "torch"]
    assert [requirement.name for requirement in extras["train"]] == ["lightning"]
    assert extras["dev"] == []
    assert installation._package(Requirement("nothing-like-it>=1")) == {
        "version": None,
        "required": ">=1",
        "fits": False,
    }
    assert installation._package(Requirement("numpy>=99"))["fits"] is False


class Installed(NamedTuple):
    record: str | None

    def read_text(self, _: str) -> str | None:
        return self.record


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (None, "tmca[serve]"),
        ('{"url": "file:///home/anna/tm%20ca", "dir_info": {"editable": true}}', "-e '/home/anna/tm ca[serve]'"),
        ('{"url": "file:///home/anna/tmca", "dir_info": {}}', "/home/anna/tmca[serve]"),
        ('{"url": "file:///home/anna/tmca-1-py3-none-any.whl", "archive_info": {}}', "tmca[serve]"),
    ],
)
def test_an_extra_is_installed_from_where_tmca_came(monkeypatch: pytest.MonkeyPatch, record: str | None, words: str):
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: Installed(record))
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    command = install_command("serve")
    assert command.replace("'tmca[serve]'", "tmca[serve]").replace(
        "'/home/anna/tmca[serve]'", "/home/anna/tmca[serve]"
    ) == (f"/venv/bin/python -m pip install {words}")


def test_tmca_that_is_not_installed_names_its_checkout(monkeypatch: pytest.MonkeyPatch):
    def absent(_: str) -> None:
        raise importlib.metadata.PackageNotFoundError

    for name in ("distribution", "requires", "version", "metadata"):
        monkeypatch.setattr(importlib.metadata, name, absent)
    assert f"{ROOT}[train]" in install_command("train")
    found = describe_installation()
    assert (found["tmca"]["version"], found["packages"], found["extras"]) == (None, {}, {})


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("TMCA_API_KEYS", "secret", "(set)"),
        ("HF_TOKEN", "hf_secret", "(set)"),
        ("HF_TOKEN", "", ""),
        ("HTTPS_PROXY", "http://anna:secret@proxy.hospital:3128", "http://***@proxy.hospital:3128"),
        ("https_proxy", "http://anna:sec@ret/secret@proxy:3128/", "http://***@proxy:3128/"),
        ("ALL_PROXY", "anna:secret@proxy:3128", "***@proxy:3128"),
        ("HTTP_PROXY", "http://secret@proxy", "http://***@proxy"),
        ("HF_ENDPOINT", "https://hub.hospital/mirror?key=secret", "https://hub.hospital/mirror?***"),
        ("HTTP_PROXY", "http://proxy:3128", "http://proxy:3128"),
        ("NO_PROXY", "localhost,.hospital", "localhost,.hospital"),
        ("TMCA_HOME", "/data/anna@home", "/data/anna@home"),
        ("RAY_ADDRESS", "ray://head:10001", "ray://head:10001"),
    ],
)
def test_nothing_secret_is_shown(name: str, value: str, shown: str):
    assert masked(name, value) == shown
    assert "secret" not in masked(name, value)


def test_the_environment_holds_what_matters(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"TMCA_API_KEYS": "secret", "http_proxy": "http://a:secret@b", "UNRELATED": "secret"}.items():
        monkeypatch.setenv(name, value)
    found = describe_installation()
    assert found["environment"]["TMCA_API_KEYS"] == "(set)"
    assert found["environment"]["http_proxy"] == "http://***@b"
    assert "secret" not in json.dumps(found)


def test_models_are_found_in_both_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    own = tmp_path / "home" / "models" / "hospital" / "model"
    snapshot = tmp_path / "hub" / "models--google--mobilenet_v2_1.0_224" / "snapshots" / ("0" * 40)
    for folder in (own, snapshot):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"x" * 1000)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setenv("TMCA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    found = describe_installation()
    assert [(model["name"], model["place"]) for model in found["models"]] == [
        ("hospital/model", "TMCA_HOME"),
        ("google/mobilenet_v2_1.0_224", "Hugging Face cache"),
    ]
    assert found["models"][0]["bytes"] == 1002
    weights = found["weights"]["google/mobilenet_v2_1.0_224"]
    assert weights["folder"] == str(snapshot)
    assert "kvasir-mobile" in weights["presets"]
    assert found["weights"]["facebook/convnext-tiny-224"]["folder"] is None
    assert not {"none", "scratch"} & set(found["weights"])


def test_a_folder_that_is_no_whole_model_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TMCA_HOME", str(tmp_path))
    folder = tmp_path / "models" / "facebook" / "convnext-tiny-224"
    folder.mkdir(parents=True)
    name = "facebook/convnext-tiny-224"
    assert describe_installation()["weights"][name]["problem"] == f"{folder} lacks config.json"
    (folder / "config.json").write_text("{}")
    said = describe_installation()["weights"][name]["problem"]
    assert said == f"{folder} lacks model.safetensors or pytorch_model.bin"
    (folder / "model.safetensors").touch()
    assert describe_installation()["weights"][name] == {
        "presets": describe_installation()["weights"][name]["presets"],
        "folder": str(folder),
        "problem": None,
    }

    def refuse(name: str) -> Path:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)

    monkeypatch.setattr(installation, "find_local", refuse)
    assert describe_installation()["weights"][name]["problem"] == f"{name} cannot be read: Permission denied"


def test_a_container_has_its_own_limits(monkeypatch: pytest.MonkeyPatch):
    files = {"cpu.max": "150000 100000", "memory.max": "2000000000", "memory.current": "500000000"}
    monkeypatch.setattr(installation, "_read", lambda path: files.get(path.name, "MemAvailable: 90000000 kB"))
    monkeypatch.setattr(installation.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert installation._usable_cores() == 2
    assert installation._memory() == (2_000_000_000, 1_500_000_000)
    files |= {"cpu.max": "max 100000", "memory.max": "max"}
    assert installation._usable_cores() == 64
    assert installation._memory()[1] == 90_000_000 * 1024


def test_why_a_card_is_not_used_is_said_by_torch(monkeypatch: pytest.MonkeyPatch):
    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert installation._cuda_problem() is None
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    assert installation._cuda_problem() == "The NVIDIA driver on your system is too old (found version 11040)."
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert installation._cuda_problem() == "there is no card"
