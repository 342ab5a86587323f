"""Where to compute: the device a user names, whether it computes bfloat16 natively, how memory is kept, and threads."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import torch

from tmca.errors import ConfigError

Item = TypeVar("Item")
Result = TypeVar("Result")

Precision = Literal["auto", "32", "bf16"]
"""auto: bfloat16 for what is mostly multiplication where the device computes it natively, else float32."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Names of glibc's `mallopt`."""


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device called ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    ``auto`` is what the environment variable ``TMCA_DEVICE`` names, else the first CUDA device, else the CPU.

    Raises:
        ConfigError: The name is unknown or the device is not there.
    """
    if name == "auto":
        name = os.environ.get("TMCA_DEVICE", "") or "auto"
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in count or (number and not number.isdigit()):
        raise ConfigError(f"Unknown device {name!r}", hint="use auto, cpu, cuda, cuda:N or mps")
    if int(number or 0) >= count[kind]:
        raise ConfigError(f"Device {name!r} is not available", hint="use --device auto or --device cpu")
    return torch.device(name)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device has bfloat16 arithmetic of its own, rather than emulating it slowly."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return False


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether a precision means bfloat16 on a device."""
    return precision == "bf16" or (precision == "auto" and computes_bfloat16(device))


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, for the next batch.

    glibc returns blocks above 32 MB to the system at once, so that every training step takes and clears the same pages
    anew: a tenth of the time of a step with large batches on a CPU. Other systems have no such limit, and nothing is
    done there.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, -1)  # never
        mallopt(_MMAP_THRESHOLD, 2**30)
        mallopt(_MMAP_MAX, 0)


def by_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return what is made of each item, by as many threads as compute: decoding and resizing hold no lock of Python."""
    threads = min(len(items), torch.get_num_threads())
    if threads <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads, "work") as pool:
        return list(pool.map(work, items))
