"""What is missing here or wrong, and what to do about it."""

from __future__ import annotations

import difflib
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.specifiers import SpecifierSet
from rich.filesize import decimal

from tmca.data.cache import cache_limit
from tmca.devices import resolve_device
from tmca.errors import StorageError, TMCAError
from tmca.health.installation import describe_installation, first_line, installed_version, nearest_folder, pip_command
from tmca.health.self_test import LEAST_DICE, run_self_test

VARIABLES = {
    "TMCA_API_KEYS": "of the server",
    "TMCA_CACHE_GB": "room for decoded images",
    "TMCA_DEVICE": "what the device auto means",
    "TMCA_HOME": "folder of models and caches",
    "TMCA_LANGUAGE_MODEL_KEY": "of the language model that reads reports",
    "TMCA_LOG_LEVEL": "from which level the libraries' log is shown",
    "TMCA_NNUNET": "settings of a training of nnU-Net, set by tmca",
    "TMCA_OFFLINE": "1: no network",
    "TMCA_UPDATE_GOLDEN": "1: tests rewrite their golden files",
}
"""What the variables that begin with ``TMCA_`` mean; any other is taken for a slip."""

LITTLE_SPACE = 2_000_000_000
"""Free bytes below which a folder is warned of."""
NO_SPACE = 100_000_000
"""Free bytes below which nothing useful can be written."""
LONG_SECONDS = 10.0

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    """What was found about one thing.

    Attributes:
        name: The thing.
        status: ``problem``: tmca cannot be used like this; ``warning``: part of it cannot, or not well.
        message: What was found.
        hint: The next thing to do, often a command; empty if there is nothing to do.
    """

    name: str
    status: Status
    message: str
    hint: str = ""


def examine(device: str = "auto") -> Iterator[Check]:
    """Yield what is found about each thing that tmca needs, one after the other, the self-test last.

    Args:
        device: Where the self-test computes.
    """
    try:
        facts = describe_installation()
    except TMCAError as error:
        yield Check("TMCA_HOME", "problem", error.message, error.hint)
        return
    yield from _check_packages(facts)
    yield from _check_extras(facts)
    yield from _check_devices(facts)
    yield from _check_weights(facts)
    yield from (_check_folder(name, facts["folders"][key]) for name, key in _FOLDERS.items())
    yield from _check_environment(facts)
    yield from _check_conflicts()
    try:
        resolve_device(device)
    except TMCAError as error:
        yield Check("device", "problem", error.message, error.hint)
    else:
        yield _check_masks(device)


_FOLDERS = {"TMCA_HOME": "home", "temporary files": "temporary"}


def _check_packages(facts: dict[str, Any]) -> Iterator[Check]:
    own, python = facts["tmca"], facts["python"]
    where = own["folder"] + (f", commit {own['commit'][:12]}" if own["commit"] else "")
    if own["version"] is None:
        hint = pip_command("install", str(Path(own["folder"]).parents[1]))
        yield Check("tmca", "warning", f"runs from {where} without being installed; its packages are not checked", hint)
    else:
        yield Check("tmca", "ok", f"{own['version']}, {where}")
    wanted = python["required"]
    status: Status = "ok" if SpecifierSet(wanted).contains(python["version"], prereleases=True) else "problem"
    hint = "" if status == "ok" else f"install tmca into a Python {wanted}"
    yield Check("Python", status, f"{python['version']}, {python['executable']}", hint)
    unfit = {name: package for name, package in facts["packages"].items() if not package["fits"]}
    if unfit:
        said = ", ".join(_unfit(name, package) for name, package in unfit.items())
        command = pip_command("install", *(f"{name}{package['required']}" for name, package in unfit.items()))
        yield Check("packages", "problem", said, command)
    elif facts["packages"]:
        yield Check("packages", "ok", f"all {len(facts['packages'])} that tmca requires")
    yield Check("PyTorch", "ok", f"{facts['torch']['version']} for {facts['torch']['built_for']}")


def _unfit(name: str, package: dict[str, Any]) -> str:
    if package["version"] is None:
        return f"{name} is missing"
    return f"{name} is {package['version']}, needed is {package['required']}"


def _check_extras(facts: dict[str, Any]) -> Iterator[Check]:
    for name, extra in facts["extras"].items():
        missing = [package for package, found in extra["packages"].items() if found["version"] is None]
        unfit = [_unfit(package, found) for package, found in extra["packages"].items() if not found["fits"]]
        if extra["installed"]:
            yield Check(f"extra {name}", "ok", "installed")
        elif missing:
            yield Check(f"extra {name}", "ok", f"not installed, it needs {', '.join(missing)}", extra["install"])
        else:
            yield Check(f"extra {name}", "warning", ", ".join(unfit), extra["install"])
    found = facts["engines"]["nnunet"]
    if found["installed"]:
        yield Check("nnU-Net", "ok", f"{found['version']}, in an environment of its own")
    else:
        yield Check("nnU-Net", "ok", "not installed", found["install"])


def _check_devices(facts: dict[str, Any]) -> Iterator[Check]:
    devices, threads = facts["devices"], facts["torch"]["threads"]
    cpu = devices["cpu"]
    usable = "" if cpu["usable_cores"] == cpu["cores"] else f" ({cpu['usable_cores']} of them usable)"
    cores = f"{cpu['cores']} cores{usable}, {threads} thread{'' if threads == 1 else 's'}"
    yield Check("processor", "ok", f"{cpu['name']}, {cores}, {_memory_of(cpu)}, {_precision_of(cpu)}")
    if threads > cpu["usable_cores"]:
        message = f"PyTorch computes with {threads} threads, but only {cpu['usable_cores']} processors may be used"
        yield Check("threads", "warning", message, f"export OMP_NUM_THREADS={cpu['usable_cores']}")
    for number, card in enumerate(devices["cuda"]):
        said = f"{card['name']}, {_memory_of(card)}, capability {card['capability']}, {_precision_of(card)}"
        yield Check(f"cuda:{number}", "ok", said)
    if devices["cuda_problem"]:
        old = "too old" in devices["cuda_problem"]
        hint = "update the NVIDIA driver, or install the PyTorch built for it: https://pytorch.org/get-started/locally"
        yield Check("cuda", "warning" if old else "ok", f"not used: {devices['cuda_problem']}", hint if old else "")
    if devices["mps"]:
        yield Check("mps", "ok", "Apple's graphics processor; --device mps uses it")
    if devices["auto"]:
        yield Check("device", "ok", f"auto means {devices['auto']}")
    else:
        message = f"TMCA_DEVICE is {os.environ.get('TMCA_DEVICE')!r}, which is not here"
        yield Check("device", "warning", message, "unset TMCA_DEVICE, or use --device cpu")


def _memory_of(device: dict[str, Any]) -> str:
    if device["memory_bytes"] is None:
        return "memory not known"
    free = f" ({decimal(device['free_bytes'])} free)" if device.get("free_bytes") is not None else ""
    return f"{decimal(device['memory_bytes'])} memory{free}"


def _precision_of(device: dict[str, Any]) -> str:
    return "computes bfloat16" if device["bfloat16"] else "no bfloat16 of its own"


def _check_weights(facts: dict[str, Any]) -> Iterator[Check]:
    here = [name for name, weights in facts["weights"].items() if weights["folder"] and not weights["problem"]]
    total = sum(model["bytes"] for model in facts["models"])
    said = f"{len(here)} of the {len(facts['weights'])} pretrained models that presets start from are on this machine"
    said += f" ({', '.join(here)})" if here else ""
    said += f"; {len(facts['models'])} models in all, {decimal(total)}" if facts["models"] else ""
    network = "offline mode is on: nothing is downloaded" if facts["offline"] else "others are downloaded when named"
    yield Check("weights", "ok", f"{said}; {network}", "tmca info lists them")
    for weights in facts["weights"].values():
        if weights["problem"]:
            yield Check("weights", "warning", weights["problem"], "copy the whole folder of the model there again")


def _check_folder(name: str, folder: dict[str, Any]) -> Check:
    path = Path(folder["path"])
    shown = f"{path}" + ("" if folder["exists"] else " (made when it is needed)")
    elsewhere = "export TMCA_HOME=FOLDER" if name == "TMCA_HOME" else "export TMPDIR=FOLDER"
    nearest = nearest_folder(path)
    try:
        if not nearest.is_dir():
            raise NotADirectoryError(f"{nearest} is a file")
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        return Check(name, "problem", f"{shown} cannot be written: {error.strerror or error}", elsewhere)
    free = folder["free_bytes"]
    if free < LITTLE_SPACE:
        status: Status = "problem" if free < NO_SPACE else "warning"
        return Check(name, status, f"{shown}: only {decimal(free)} free", f"free some space, or {elsewhere}")
    return Check(name, "ok", f"{shown}, {decimal(free)} free")


def _check_environment(facts: dict[str, Any]) -> Iterator[Check]:
    found = facts["environment"]
    for name in found:
        if name.startswith("TMCA_") and name not in VARIABLES:
            near = difflib.get_close_matches(name, VARIABLES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(VARIABLES)}"
            yield Check("environment", "warning", f"{name} is set, but tmca does not know it", hint)
    offline = os.environ.get("TMCA_OFFLINE", "").lower()
    if offline not in ("", "0", "1", "false", "true", "no", "yes"):
        message = f"TMCA_OFFLINE is {offline!r}, which means nothing: the network may be used"
        yield Check("environment", "warning", message, "export TMCA_OFFLINE=1")
    level = os.environ.get("TMCA_LOG_LEVEL", "")
    if level and level.upper() not in logging.getLevelNamesMapping():
        yield Check("environment", "warning", f"TMCA_LOG_LEVEL is {level!r}, which means nothing", "DEBUG or INFO")
    try:
        cache_limit()
    except StorageError as error:
        yield Check("environment", "warning", error.message, error.hint)
    said = ", ".join(f"{name}={value}" for name, value in found.items() if value)
    yield Check("environment", "ok", said or "nothing is set")


def _check_conflicts() -> Iterator[Check]:
    """Yield what is known to break others when it is there and broken."""
    version = installed_version("torchvision")
    if version is None:
        return
    command = [sys.executable, "-c", "import torchvision"]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return
    if tried.returncode:
        last = (tried.stderr.strip().splitlines() or ["it does not load"])[-1]
        remove = pip_command("uninstall", "torchvision")
        message = f"{version} does not fit this PyTorch, and keeps transformers from loading: {last}"
        yield Check("torchvision", "problem", message, f"tmca does not need it: {remove}")


def _check_masks(device: str) -> Check:
    """Segment the drawn image that comes with tmca and hold the masks against those that come with it."""
    started = time.monotonic()
    try:
        dice, used = run_self_test(device)
    except TMCAError as error:
        return Check("self-test", "problem", error.message, error.hint)
    except ImportError as error:
        hint = "install tmca anew in a fresh environment"
        return Check("self-test", "problem", f"a package does not load: {first_line(error)}", hint)
    except Exception as error:  # whatever a broken build of PyTorch or a graphics card raises
        message = f"{type(error).__name__}: {first_line(error)}"
        hint = "try --device cpu" if device != "cpu" else "tmca doctor --debug shows where"
        return Check("self-test", "problem", message, hint)
    seconds = time.monotonic() - started
    measured = ", ".join(f"{value:.3f}" for value in dice)
    if min(dice) < LEAST_DICE:
        message = f"the masks are not those they should be (Dice {measured}, computed on {used})"
        hint = "do not use this installation: try --device cpu, or install the versions of constraints.txt"
        return Check("self-test", "problem", message, hint)
    said = f"{len(dice)} masks are as they should be (Dice {measured}) on {used}, {seconds:.1f} seconds"
    if seconds > LONG_SECONDS:
        return Check("self-test", "warning", said, "this is slow: is the disk, or are all processors in use?")
    return Check("self-test", "ok", said)
