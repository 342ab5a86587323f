"""What training and prediction share: the options of an experiment, nnU-Net's folders, how its commands are called."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmca.config import Experiment, from_dict
from tmca.devices import resolve_device
from tmca.errors import CheckpointError, ConfigError, TMCAError
from tmca.models.base import read_options

METHOD = "nnunet"
"""``model.method`` of the experiments that nnU-Net runs."""
IDENTIFIER = "001"
DATASET = f"Dataset{IDENTIFIER}_tmca"
PLANS = "nnUNetPlans"
TRAINER = "TMCATrainer"
LOG = "nnunet.log"
MOST_PROCESSES = 8


@dataclass(frozen=True)
class NnunetOptions:
    """``model.options`` of an nnU-Net experiment. Its epochs are ``trainer.max_epochs``; nnU-Net's own are 1000."""

    trainer: str = "nnUNetTrainer"
    """The trainer of nnU-Net to build on; others are called, for example, nnUNetTrainerNoMirroring."""
    iterations: int | None = 250
    """Batches an epoch; none: as many as the training images fill."""
    batch_size: int | None = None
    """Images a batch; none: as nnU-Net plans for a graphics card of 8 GB."""
    resize: bool = True
    """Give nnU-Net all images at preprocessing.image_size, as the other methods see them; off: each at its own size."""

    def __post_init__(self) -> None:
        if not self.trainer.startswith("nnUNetTrainer") or re.search(r"_\d+epochs?", self.trainer):
            raise ConfigError(
                f"model.options.trainer is {self.trainer!r}, expected a trainer of nnU-Net without a number of epochs",
                hint="nnUNetTrainer is the usual one; set the epochs with trainer.max_epochs",
            )
        for name in ("iterations", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"model.options.{name} is {value}, expected at least 1", hint="or leave it out")


@dataclass(frozen=True)
class Workspace:
    """The place of nnU-Net in a run folder."""

    run: Path

    @property
    def folder(self) -> Path:
        """Everything that nnU-Net reads and writes."""
        return self.run / "nnunet"

    @property
    def log(self) -> Path:
        """What it said."""
        return self.run / LOG

    @property
    def plans(self) -> Path:
        """What it planned."""
        return self.folder / "preprocessed" / DATASET / f"{PLANS}.json"

    @property
    def trained(self) -> Path:
        """Where its trainer writes; there as soon as training has begun."""
        return self.folder / "results" / DATASET / f"{TRAINER}__{PLANS}__2d" / "fold_0"

    @property
    def weights(self) -> Path:
        """The weights at the end of training: those that predict."""
        return self.trained / "checkpoint_final.pth"

    def variables(self, device: str, **settings: str | int) -> dict[str, str]:
        """Return the environment variables of a command.

        Args:
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
            **settings: For :mod:`tmca.nnunet.trainer`.

        Raises:
            ConfigError: The device is not there.
        """
        place = resolve_device(device)
        names = ("raw", "preprocessed", "results")
        variables = {f"nnUNet_{name}": str(self.folder.absolute() / name) for name in names}
        variables |= {"nnUNet_def_n_proc": str(processes()), "TMCA_NNUNET": json.dumps(settings)}
        if place.type == "cpu":  # augment in the process that trains: it needs all cores, and it has the seed
            variables["nnUNet_n_proc_DA"] = "0"
        if place.type == "cuda" and place.index is not None:
            visible = [number for number in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if number]
            variables["CUDA_VISIBLE_DEVICES"] = visible[place.index] if visible else str(place.index)
        return variables


def nnunet_options(experiment: Experiment) -> NnunetOptions:
    """Return the options of an nnU-Net experiment.

    Raises:
        ConfigError: One is unknown or impossible, or the experiment has guidance on.
    """
    if experiment.model.guidance:
        raise ConfigError(
            f"Method {METHOD!r} sees the image alone, but guidance is on",
            hint="set model.guidance, and with it alignment and enhancement, off, as the preset of that name does",
        )
    return read_options(NnunetOptions, experiment.model)


def processes(most: int = MOST_PROCESSES) -> int:
    """Return how many processes may work beside each other."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return min(most, int(threads) if threads.isdigit() else os.cpu_count() or 1)


def device_flag(device: str) -> list[str]:
    """Return the arguments that name the device to nnU-Net; which card it is, the environment says."""
    return ["-device", resolve_device(device).type]


def exported_size(experiment: Experiment) -> int | None:
    """Return the side of the images that nnU-Net gets, or ``None`` where each keeps its size."""
    return experiment.preprocessing.image_size if nnunet_options(experiment).resize else None


def read_nnunet_run(folder: Path) -> tuple[Experiment, dict[str, Any]]:
    """Return the experiment of a run of nnU-Net, and what it says of its data.

    Raises:
        CheckpointError: The folder is no such run.
    """
    try:
        experiment = from_dict(Experiment, json.loads((folder / "experiment.json").read_text("utf-8")))
        data: dict[str, Any] = json.loads((folder / "splits.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds no run: {error}", hint="give the folder that `tmca train` wrote"
        ) from error
    if experiment.model.method != METHOD:
        raise CheckpointError(
            f"{folder} holds a run of {experiment.model.method}, not of nnU-Net", hint="check its name"
        )
    return experiment, data


def is_nnunet_run(folder: Path) -> bool:
    """Return whether a folder holds a run of nnU-Net, finished or not."""
    try:
        read_nnunet_run(folder)
    except TMCAError:
        return False
    return True
