"""What there is: presets and models."""

from __future__ import annotations

import json
from dataclasses import dataclass

import tyro

from tmca.cli.options import show
from tmca.config import to_dict
from tmca.presets import PRESETS, describe_preset, get_preset


@dataclass(frozen=True)
class PresetsList:
    """List the named experiments."""

    def run(self) -> None:
        """Print a line each."""
        for name in PRESETS:
            show(f"{name:28} {describe_preset(name)}")


@dataclass(frozen=True)
class PresetsShow:
    """Print one experiment as JSON."""

    name: tyro.conf.Positional[str]
    """Name of the preset."""

    def run(self) -> None:
        """Print it."""
        show(json.dumps(to_dict(get_preset(self.name)), indent=2))


@dataclass(frozen=True)
class ModelsList:
    """List the methods that can be trained."""

    def run(self) -> None:
        """Print a line each."""
        from tmca.models import list_models

        for name in list_models():
            show(name)
