"""What is installed, found and set on this machine.

Nothing is sent, downloaded or changed: to see whether a folder can be written, an empty file is made in it and deleted.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import sys
import tempfile
import urllib.parse
import urllib.request
import warnings
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from tmca.devices import computes_bfloat16, resolve_device
from tmca.environment import describe_hardware, source_commit
from tmca.errors import TMCAError
from tmca.files import home
from tmca.models.weights import WEIGHT_FILES, find_local, is_offline
from tmca.nnunet import engine
from tmca.presets import PRESETS, get_preset

SCHEMA_VERSION = 1

OTHER_VARIABLES = (
    "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK",
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAY_ADDRESS",
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "NO_COLOR", "TMPDIR",
)  # fmt: skip
SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD")
SET = "(set)"
HIDDEN = "***"


def describe_installation() -> dict[str, Any]:
    """Return what is installed, found and set, as plain values; ``docs/reference/info.md`` explains each key."""
    import torch

    required, extras = _requirements()
    hardware = describe_hardware()
    return {
        "schema_version": SCHEMA_VERSION,
        "tmca": {
            "version": installed_version("tmca"),
            "commit": source_commit() or None,
            "folder": str(Path(__file__).parents[1]),
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
    version = installed_version(requirement.name)
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
        origin = {"url": Path(__file__).parents[3].as_uri(), "dir_info": {}}
    url = urllib.parse.urlsplit(origin.get("url", ""))
    if url.scheme == "file" and "dir_info" in origin:
        source = urllib.request.url2pathname(url.path)
        editable = bool(origin["dir_info"].get("editable"))
    return pip_command("install", *(["-e"] if editable else []), f"{source}[{extra}]")


def pip_command(*arguments: str) -> str:
    """Return the command that runs the pip of this Python."""
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
            return first_line(error)
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
    """Return for each pretrained model that a preset starts from: which presets, where it lies, what is wrong there."""
    users: dict[str, list[str]] = {}
    for name in PRESETS:
        model = get_preset(name).model
        encoders = (model.image_encoder.weights, model.text_encoder.weights if model.guidance else "none")
        for weights in encoders:
            if weights not in ("none", "scratch"):
                users.setdefault(weights, []).append(name)
    return {name: {"presets": presets, **_place(name)} for name, presets in users.items()}


def _place(name: str) -> dict[str, str | None]:
    try:
        folder = find_local(name)
        if folder is None:
            return {"folder": None, "problem": None}
        lacks = "" if (folder / "config.json").is_file() else "config.json"
        if not lacks and not any((folder / file).is_file() for file in WEIGHT_FILES):
            lacks = " or ".join(WEIGHT_FILES)
        return {"folder": str(folder), "problem": f"{folder} lacks {lacks}" if lacks else None}
    except OSError as error:
        return {"folder": None, "problem": f"{error.filename} cannot be read: {error.strerror}"}


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
    existing = nearest_folder(path)
    usage = shutil.disk_usage(existing)
    return {
        "path": str(path),
        "exists": path.is_dir(),
        "writable": existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        "free_bytes": usage.free,
    }


def nearest_folder(path: Path) -> Path:
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


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, ``None`` if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except (OSError, ValueError):
        return ""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, its class if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
