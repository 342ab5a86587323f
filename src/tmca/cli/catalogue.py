"""What there is: presets and models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tmca.cli.options import Output, show
from tmca.config import to_dict
from tmca.presets import PRESETS, describe_preset, get_preset

NNUNET = "nnunet"


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
        """Print a line each: the method, and the preset that trains it."""
        from tmca.models import list_models
        from tmca.nnunet.engine import status

        described = {get_preset(name).model.method: describe_preset(name) for name in reversed(PRESETS)}
        described[NNUNET] += "" if status().installed else " Not installed: tmca models install nnunet."
        for name in sorted((*list_models(), NNUNET)):
            show(f"{name:16} {described.get(name, '')}".rstrip())


@dataclass(frozen=True)
class ModelsConvert:
    """Convert a checkpoint of the authors' own code into a model folder: `tmca models convert ariadne FILE`."""

    origin: tyro.conf.Positional[Literal["ariadne"]]
    """Whose code wrote it."""
    file: tyro.conf.Positional[Path]
    """Lightning checkpoint; nothing but tensors and plain values is read from it."""
    output: Output
    """The model folder to write; it must not exist."""
    tokenizer: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """Folder or hub id with the tokenizer the checkpoint was trained with, CXR-BERT's."""
    upright: bool = False
    """The checkpoint was trained on upright images, not on the transposed ones of the published code."""

    def run(self) -> None:
        """Convert it and say where the model is."""
        from tmca.conversion import convert_ariadne

        convert_ariadne(self.file, self.output, self.tokenizer, upright=self.upright)
        show(f"{self.output} holds the converted model: give it as -m to evaluate and predict")


@dataclass(frozen=True)
class ModelsVerify:
    """Check that a bundle or model folder is complete and undamaged, and say what it is: `tmca models verify PATH`."""

    path: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="BUNDLE|FOLDER")]]
    """A bundle of `tmca export bundle`, or a run or checkpoint folder."""

    def run(self) -> None:
        """Check it and print a line a fact."""
        from tmca.export.verification import verify

        for line in verify(self.path):
            show(line)


@dataclass(frozen=True)
class ModelsInstall:
    """Install the engine of a method that is a program of its own: `tmca models install nnunet`."""

    name: tyro.conf.Positional[Literal["nnunet"]]
    """The engine."""
    wheels: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Install from the packages in this folder, without a network."""

    def run(self) -> None:
        """Install it unless it is there, and say where it is."""
        from tmca.nnunet.engine import VERSION, install, status

        is_new = install(self.wheels)
        show(f"nnU-Net {VERSION} is installed{'' if is_new else ' already'}: {status().folder}")
