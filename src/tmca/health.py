"""What is installed here, what is missing, and whether a known image gets its known mask.

Nothing is sent, downloaded or changed: to see whether a folder can be written, an empty file is made in it and deleted.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import logging
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.filesize import decimal

from tmca.data.cache import cache_limit
from tmca.devices import computes_bfloat16, resolve_device
from tmca.environment import describe_hardware, source_commit
from tmca.errors import StorageError, TMCAError
from tmca.files import home
from tmca.models.weights import find_local, is_offline
from tmca.nnunet import engine
from tmca.presets import PRESETS, get_preset

SCHEMA_VERSION = 1

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

OTHER_VARIABLES = (
    "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK",
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAY_ADDRESS",
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "NO_COLOR", "TMPDIR",
)  # fmt: skip
SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD")
SET = "(set)"
HIDDEN = "***"

LITTLE_SPACE = 2_000_000_000
"""Free bytes below which a folder is warned of."""
NO_SPACE = 100_000_000
"""Free bytes below which nothing useful can be written."""
SELF_TEST = Path(__file__).with_name("self_test")
"""Model, image, sentences and masks of the self-test."""
LEAST_DICE = 0.98
"""Dice with the stored mask that other processors and versions must reach: only pixels at the outline may differ."""
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


# What there is ---------------------------------------------------------------------------------------------------


def describe_installation() -> dict[str, Any]:
    """Return what is installed, found and set, as plain values; ``docs/reference/info.md`` explains each key."""
    import torch

    required, extras = _requirements()
    hardware = describe_hardware()
    return {
        "schema_version": SCHEMA_VERSION,
        "tmca": {
            "version": _version("tmca"),
            "commit": source_commit() or None,
            "folder": str(Path(__file__).parent),
        },
        "python": {
            "version": platform.python_version(),
            "required": _required_python(),
            "executable": sys.executable,
        },
        "platform": platform.platform(),
        "packages": {requirement.name: _package(requirement) for requirement in required},
        "extras": {name: _extra(name, requirements) for name, requirements in extras.items()},
        "engines": {"nnunet": _engine()},
        "torch": {"version": torch.__version__, "built_for": _built_for(), "threads": hardware["threads"]},
        "devices": _devices(hardware),
        "weights": _weights(),
        "models": _models(),
        "offline": is_offline(),
        "folders": {
            "home": _folder(home()),
            "temporary": _folder(Path(tempfile.gettempdir())),
            "hugging_face": _folder(_hugging_face_cache()),
        },
        "environment": _environment(),
    }


def _requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """Return what tmca requires, and what each of its extras does; nothing if tmca runs without being installed."""
    try:
        lines = importlib.metadata.requires("tmca") or []
        names = importlib.metadata.metadata("tmca").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return [], {}
    every = [requirement for requirement in map(Requirement, lines) if requirement.name != "tmca"]

    def applies(requirement: Requirement, extra: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": extra})

    required = [requirement for requirement in every if applies(requirement, "")]
    extras = {name: [item for item in every if item not in required and applies(item, name)] for name in names}
    return required, extras


def _required_python() -> str:
    try:
        return str(importlib.metadata.metadata("tmca").get("Requires-Python") or "")  # type: ignore[attr-defined]
    except importlib.metadata.PackageNotFoundError:
        return ""


def _package(requirement: Requirement) -> dict[str, Any]:
    version = _version(requirement.name)
    fits = version is not None and requirement.specifier.contains(version, prereleases=True)
    return {"version": version, "required": str(requirement.specifier), "fits": fits}


def _extra(name: str, requirements: list[Requirement]) -> dict[str, Any]:
    packages = {requirement.name: _package(requirement) for requirement in requirements}
    complete = all(package["fits"] for package in packages.values())
    return {"installed": complete, "install": install_command(name), "packages": packages}


def install_command(extra: str) -> str:
    """Return the command that installs an extra into the Python that runs this, from where tmca itself came."""
    source, editable = "tmca", False
    try:
        record = importlib.metadata.distribution("tmca").read_text("direct_url.json")
        origin = json.loads(record) if record else {}
    except (importlib.metadata.PackageNotFoundError, ValueError):
        origin = {"url": Path(__file__).parents[2].as_uri(), "dir_info": {}}
    url = urllib.parse.urlsplit(origin.get("url", ""))
    if url.scheme == "file" and "dir_info" in origin:
        source = urllib.request.url2pathname(url.path)
        editable = bool(origin["dir_info"].get("editable"))
    return _pip("install", *(["-e"] if editable else []), f"{source}[{extra}]")


def _pip(*arguments: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", *arguments])


def _engine() -> dict[str, Any]:
    found = engine.status()
    version = found.versions.get("nnunetv2")
    return {"installed": found.installed, "version": version, "install": "tmca models install nnunet"}


def _built_for() -> str:
    import torch

    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    hip = getattr(torch.version, "hip", None)
    return f"ROCm {hip}" if hip else "CPU"


def _devices(hardware: dict[str, Any]) -> dict[str, Any]:
    import torch

    problem = _cuda_problem()
    cards = []
    for index in range(0 if problem else torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        cards.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "bfloat16": computes_bfloat16(torch.device("cuda", index)),
            }
        )
    total, free = _memory()
    try:
        automatic = str(resolve_device("auto"))
    except TMCAError:
        automatic = None
    return {
        "auto": automatic,
        "cpu": {
            "name": hardware["processor"],
            "cores": hardware["cores"],
            "usable_cores": _usable_cores(),
            "memory_bytes": total,
            "free_bytes": free,
            "bfloat16": computes_bfloat16(torch.device("cpu")),
        },
        "cuda": cards,
        "cuda_problem": problem,
        "mps": torch.backends.mps.is_available(),
    }


def _cuda_problem() -> str | None:
    """Return why a PyTorch that was built for graphics cards finds none, in its own words; ``None`` if it does."""
    import torch

    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return None
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except Exception as error:  # whatever the driver makes of it
            return _first_line(error)
        if torch.cuda.device_count():
            return None
    return str(raised[0].message).splitlines()[0] if raised else "there is no card"


def _usable_cores() -> int:
    """Return how many processors this process may keep busy: fewer than there are in a container or a batch job."""
    able = getattr(os, "sched_getaffinity", None)
    cores = len(able(0)) if able is not None else os.cpu_count() or 1
    quota, _, period = _read(Path("/sys/fs/cgroup/cpu.max")).partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def _memory() -> tuple[int | None, int | None]:
    """Return this machine's memory in bytes, or the container's share of it, and what is free of it."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None, None
    lines = dict(line.split(":", 1) for line in _read(Path("/proc/meminfo")).splitlines() if ":" in line)
    words = lines.get("MemAvailable", "").split()
    free = int(words[0]) * 1024 if words else None
    limit, used = (_read(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit.isdigit() and int(limit) < total:
        total = int(limit)
        left = max(0, total - int(used)) if used.isdigit() else total
        free = left if free is None else min(free, left)
    return total, free


def _weights() -> dict[str, dict[str, Any]]:
    """Return for each pretrained model that a preset starts from: which presets, and where it lies."""
    users: dict[str, list[str]] = {}
    for name in PRESETS:
        model = get_preset(name).model
        encoders = (model.image_encoder.weights, model.text_encoder.weights if model.guidance else "none")
        for weights in encoders:
            if weights not in ("none", "scratch"):
                users.setdefault(weights, []).append(name)
    found = {name: find_local(name) for name in users}
    return {name: {"presets": users[name], "folder": str(path) if path else None} for name, path in found.items()}


def _models() -> list[dict[str, Any]]:
    """Return the model folders in ``TMCA_HOME`` and in the Hugging Face cache, with their sizes."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    folder = home() / "models"
    own = sorted({path.parent for path in folder.rglob("config.json")}) if folder.is_dir() else []
    found = [_model(str(path.relative_to(folder)), "TMCA_HOME", path, _size(path)) for path in own]
    try:
        cached = scan_cache_dir().repos
    except (CacheNotFound, OSError, ValueError):
        cached = frozenset()
    models = sorted(
        (repository for repository in cached if repository.repo_type == "model"), key=lambda one: one.repo_id
    )
    return found + [_model(one.repo_id, "Hugging Face cache", one.repo_path, one.size_on_disk) for one in models]


def _model(name: str, place: str, folder: Path, size: int) -> dict[str, Any]:
    return {"name": name, "place": place, "folder": str(folder), "bytes": size}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _hugging_face_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _folder(path: Path) -> dict[str, Any]:
    existing = _nearest(path)
    usage = shutil.disk_usage(existing)
    return {
        "path": str(path),
        "exists": path.is_dir(),
        "writable": existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        "free_bytes": usage.free,
    }


def _nearest(path: Path) -> Path:
    """Return the folder itself, or the nearest one above it that is there."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _environment() -> dict[str, str]:
    """Return the environment variables that matter here and are set, without anything secret."""
    names = [name for name in os.environ if name.startswith("TMCA_") or name.upper() in OTHER_VARIABLES]
    return {name: masked(name, os.environ[name]) for name in sorted(names)}


def masked(name: str, value: str) -> str:
    """Return the value of an environment variable as it may be shown: no key, token or password in an address.

    >>> masked("HTTPS_PROXY", "http://anna:secret@proxy:3128")
    'http://***@proxy:3128'
    >>> masked("TMCA_API_KEYS", "secret")
    '(set)'
    """
    if any(word in name.upper() for word in SECRET_WORDS):
        return SET if value else ""
    if "://" not in value and "PROXY" not in name.upper():
        return value
    scheme, separator, address = value.rpartition("://")
    address, question, _ = address.partition("?")
    user, at, host = address.rpartition("@")
    shown = f"{HIDDEN}@{host}" if at and user else address
    return f"{scheme}{separator}{shown}{question}{HIDDEN if question else ''}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except (OSError, ValueError):
        return ""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# What it means ---------------------------------------------------------------------------------------------------


def examine(device: str = "auto") -> Iterator[Check]:
    """Yield what is found about each thing that tmca needs, one after the other, the self-test last.

    Args:
        device: Where the self-test computes.
    """
    facts = describe_installation()
    yield from _check_packages(facts)
    yield from _check_extras(facts)
    yield from _check_devices(facts)
    yield _check_weights(facts)
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
        hint = _pip("install", str(Path(own["folder"]).parents[1]))
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
        command = _pip("install", *(f"{name}{package['required']}" for name, package in unfit.items()))
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


def _check_weights(facts: dict[str, Any]) -> Check:
    here = [name for name, weights in facts["weights"].items() if weights["folder"]]
    total = sum(model["bytes"] for model in facts["models"])
    said = f"{len(here)} of the {len(facts['weights'])} pretrained models that presets start from are on this machine"
    said += f" ({', '.join(here)})" if here else ""
    said += f"; {len(facts['models'])} models in all, {decimal(total)}" if facts["models"] else ""
    network = "offline mode is on: nothing is downloaded" if facts["offline"] else "others are downloaded when named"
    return Check("weights", "ok", f"{said}; {network}", "tmca info lists them")


def _check_folder(name: str, folder: dict[str, Any]) -> Check:
    path = Path(folder["path"])
    shown = f"{path}" + ("" if folder["exists"] else " (made when it is needed)")
    elsewhere = "export TMCA_HOME=FOLDER" if name == "TMCA_HOME" else "export TMPDIR=FOLDER"
    nearest = _nearest(path)
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
    if _version("torchvision") is None:
        return
    command = [sys.executable, "-c", "import torchvision"]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return
    if tried.returncode:
        last = (tried.stderr.strip().splitlines() or ["it does not load"])[-1]
        remove = _pip("uninstall", "torchvision")
        message = f"{_version('torchvision')} does not fit this PyTorch, and keeps transformers from loading: {last}"
        yield Check("torchvision", "problem", message, f"tmca does not need it: {remove}")


# The self-test ---------------------------------------------------------------------------------------------------


def _check_masks(device: str) -> Check:
    """Segment the drawn image that comes with tmca and hold the masks against those that come with it."""
    started = time.monotonic()
    try:
        dice, used = run_self_test(device)
    except TMCAError as error:
        return Check("self-test", "problem", error.message, error.hint)
    except ImportError as error:
        hint = "install tmca anew in a fresh environment"
        return Check("self-test", "problem", f"a package does not load: {_first_line(error)}", hint)
    except Exception as error:  # whatever a broken build of PyTorch or a graphics card raises
        message = f"{type(error).__name__}: {_first_line(error)}"
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


def run_self_test(device: str = "auto") -> tuple[list[float], str]:
    """Segment a drawn image by two sentences with the small model that comes with tmca.

    Model, image, sentences and true masks lie in the package. The model was trained on phantoms, so that its masks have
    clear outlines: between processors, versions and precisions only pixels at the outline change.

    Returns:
        The Dice of each mask with the stored one, and where and in what precision it was computed.

    Raises:
        TMCAError: The model cannot be loaded, or the device is not there.
    """
    from tmca.imaging.raster import read_mask
    from tmca.inference import Predictor

    sentences: dict[str, str] = json.loads((SELF_TEST / "sentences.json").read_text("utf-8"))
    predictor = Predictor.from_pretrained(SELF_TEST / "model", device)
    predictor.set_image(SELF_TEST / "image.png")
    dice = []
    for file, sentence in sentences.items():
        dice.append(mask_dice(predictor.predict(sentence), read_mask(SELF_TEST / file)))
    return dice, f"{predictor.device} in {predictor.precision}"


def mask_dice(mask: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Return the Dice of two masks, of which one is not empty."""
    return 2 * int((mask & other).sum()) / max(1, int(mask.sum()) + int(other.sum()))
