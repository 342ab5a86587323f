from __future__ import annotations

import copy
import importlib.metadata
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement

from tmca import health
from tmca.health import Check, describe_installation, examine, install_command, mask_dice, masked, run_self_test
from tmca.imaging.raster import read_mask, write_mask
from tmca.inference import Predictor

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "info.md"


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


# What there is ---------------------------------------------------------------------------------------------------


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
    required, extras = health._requirements()
    assert [requirement.name for requirement in required] == ["numpy", "nothing-like-it", "torch"]
    assert [requirement.name for requirement in extras["train"]] == ["lightning"]
    assert extras["dev"] == []
    assert health._package(Requirement("nothing-like-it>=1")) == {"version": None, "required": ">=1", "fits": False}
    assert health._package(Requirement("numpy>=99"))["fits"] is False


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


def test_every_variable_of_tmca_is_known():
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]
    used = {
        name
        for path in sources
        if path.name != "test_health.py"
        for name in re.findall(r"\bTMCA_[A-Z_]+\b", path.read_text("utf-8"))
    }
    assert used <= set(health.VARIABLES)


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


def test_a_container_has_its_own_limits(monkeypatch: pytest.MonkeyPatch):
    files = {"cpu.max": "150000 100000", "memory.max": "2000000000", "memory.current": "500000000"}
    monkeypatch.setattr(health, "_read", lambda path: files.get(path.name, "MemAvailable: 90000000 kB"))
    monkeypatch.setattr(health.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert health._usable_cores() == 2
    assert health._memory() == (2_000_000_000, 1_500_000_000)
    files |= {"cpu.max": "max 100000", "memory.max": "max"}
    assert health._usable_cores() == 64
    assert health._memory()[1] == 90_000_000 * 1024


def test_why_a_card_is_not_used_is_said_by_torch(monkeypatch: pytest.MonkeyPatch):
    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert health._cuda_problem() is None
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    assert health._cuda_problem() == "The NVIDIA driver on your system is too old (found version 11040)."
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert health._cuda_problem() == "there is no card"


@pytest.mark.parametrize(
    ("name", "value"), [("TMCA_OFFLINE", "maybe"), ("TMCA_LOG_LEVEL", "LOUD"), ("TMCA_CACHE_GB", "much")]
)
def test_a_value_that_means_nothing_is_warned_of(name: str, value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, value)
    warnings = [check for check in health._check_environment({"environment": {}}) if check.status == "warning"]
    assert len(warnings) == 1
    assert f"{name} is {value!r}" in warnings[0].message


# What it means ---------------------------------------------------------------------------------------------------


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


def test_a_folder_is_looked_at_without_a_trace(tmp_path: Path):
    folder = health._folder(tmp_path / "not" / "yet")
    assert (folder["exists"], folder["writable"]) == (False, True)
    assert health._check_folder("TMCA_HOME", folder).status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_broken_torchvision_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "torchvision").mkdir()
    source = tmp_path / "torchvision" / "__init__.py"
    source.write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert list(health._check_conflicts()) == []  # it is not installed
    monkeypatch.setattr(health, "_version", lambda _: "0.1")
    (found,) = health._check_conflicts()
    assert found.status == "problem"
    assert "operator torchvision::nms does not exist" in found.message
    assert "pip uninstall torchvision" in found.hint
    source.write_text("")
    assert list(health._check_conflicts()) == []


# The self-test ---------------------------------------------------------------------------------------------------


def test_the_self_test_is_small_and_needs_nothing_else():
    assert sum(path.stat().st_size for path in health.SELF_TEST.rglob("*") if path.is_file()) < 600_000


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_the_masks_do_not_hang_on_the_precision(precision: Any):
    predictor = Predictor.from_pretrained(health.SELF_TEST / "model", "cpu", precision)
    predictor.set_image(health.SELF_TEST / "image.png")
    sentences = json.loads((health.SELF_TEST / "sentences.json").read_text("utf-8"))
    masks = [predictor.predict(sentence) for sentence in sentences.values()]
    for file, mask in zip(sentences, masks, strict=True):
        assert mask.sum() > 50
        assert mask_dice(mask, read_mask(health.SELF_TEST / file)) > 0.99
    assert not (masks[0] & masks[1]).any()  # the sentence decides


def test_small_changes_of_the_weights_do_not_matter_and_large_ones_do():
    """As small as what other processors and versions do to the sums."""
    sentences = json.loads((health.SELF_TEST / "sentences.json").read_text("utf-8"))
    for noise, passes in ((1e-4, True), (0.5, False)):
        predictor = Predictor.from_pretrained(health.SELF_TEST / "model", "cpu", "32")
        with torch.no_grad():
            for parameter in predictor.model.parameters():
                parameter.mul_(1 + noise * torch.randn_like(parameter))
        predictor = Predictor(predictor.model, "cpu", "32")
        predictor.set_image(health.SELF_TEST / "image.png")
        dice = [
            mask_dice(predictor.predict(text), read_mask(health.SELF_TEST / file)) for file, text in sentences.items()
        ]
        assert (min(dice) >= health.LEAST_DICE) is passes, (noise, dice)


@pytest.fixture
def damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(health.SELF_TEST, tmp_path / "self_test"))
    monkeypatch.setattr(health, "SELF_TEST", folder)
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


def test_the_dice_of_masks():
    mask = np.array([[True, True], [False, False]])
    assert mask_dice(mask, mask) == 1
    assert mask_dice(mask, ~mask) == 0
    assert mask_dice(mask, np.array([[True, False], [False, False]])) == pytest.approx(2 / 3)
