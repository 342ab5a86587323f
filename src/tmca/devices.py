"""Where to compute: the device a user names, and whether it computes bfloat16 natively."""

from __future__ import annotations

import os

import torch

from tmca.errors import ConfigError


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
