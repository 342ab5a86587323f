"""What a result was computed with: versions, commit, device. Stored beside every run and report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("tmca", "torch", "transformers", "tokenizers", "safetensors", "lightning", "numpy", "pillow")


def describe_environment() -> dict[str, Any]:
    """Return versions, commit of the source checkout (empty for an installed package), and hardware."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": source_commit(),
        "hardware": describe_hardware(),
    }


def describe_hardware() -> dict[str, Any]:
    """Return processor, cores and graphics cards."""
    import torch

    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": cards}


def source_commit() -> str:
    """Return the commit of the checkout this package runs from, with ``+changes`` if it has uncommitted ones."""
    folder = Path(__file__).parent
    if not (folder.parents[1] / ".git").exists():
        return ""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
