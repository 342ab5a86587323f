"""nnU-Net's trainer with a length of our choice, a seed, and checkpoints that an interruption cannot spoil.

nnU-Net finds trainers by their class's name among its own files: a copy of this file is put there, into the environment
that :mod:`tmca.nnunet.engine` makes, and only there it runs. What it needs to know stands in an environment variable.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import nnunetv2
import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

SETTINGS = json.loads(os.environ.get("TMCA_NNUNET", "{}"))

if os.environ.get("OMP_NUM_THREADS", "").isdigit():  # nnU-Net's commands took every core before they import this
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def find_base(name: str) -> Any:  # noqa: ANN401
    """Return a trainer of nnU-Net; among its variants only, for elsewhere lie some that need packages left out here."""
    if name == nnUNetTrainer.__name__:
        return nnUNetTrainer
    package = "nnunetv2.training.nnUNetTrainer.variants"
    folder = Path(nnunetv2.__path__[0]) / "training" / "nnUNetTrainer" / "variants"
    found = recursive_find_python_class(str(folder), name, package)
    if found is None:
        raise ValueError(f"nnU-Net has no trainer {name!r}")
    return found


class TMCATrainer(find_base(SETTINGS.get("trainer", nnUNetTrainer.__name__))):  # type: ignore[misc]
    """A trainer of nnU-Net for one run of ours."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = SETTINGS["epochs"]
        self.num_iterations_per_epoch = SETTINGS["iterations"]
        self.num_val_iterations_per_epoch = max(1, SETTINGS["iterations"] // 5)  # nnU-Net: 250 and 50
        self.save_every = 1
        seed_everything(SETTINGS["seed"])

    def on_train_epoch_start(self) -> None:
        """Seed by (seed, epoch), so that a resumed run draws what an uninterrupted one would."""
        seed_everything(SETTINGS["seed"] + 1 + self.current_epoch)
        super().on_train_epoch_start()

    def on_epoch_end(self) -> None:
        """Write down what was measured, for tmca to read, and say it."""
        super().on_epoch_end()
        names = ("lrs", "train_losses", "val_losses", "mean_fg_dice", "epoch_start_timestamps", "epoch_end_timestamps")
        history = {name: [float(value) for value in self.logger.get_value(name, None)] for name in names}
        _replace(Path(self.output_folder) / "history.json", json.dumps(history).encode())
        train, val, dice = (history[name][-1] for name in ("train_losses", "val_losses", "mean_fg_dice"))
        line = f"tmca: epoch {self.current_epoch:>3} of {self.num_epochs} · train loss {train:.3f}"
        print(f"{line} · validation loss {val:.3f}, pseudo Dice {dice:.3f}", flush=True)  # noqa: T201

    def save_checkpoint(self, filename: str) -> None:
        """Write a checkpoint in one step: interrupted while writing, the one before it is still there."""
        aside = f"{filename}.tmp"
        super().save_checkpoint(aside)
        Path(aside).replace(filename)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Do nothing: it changes nothing about the model, and tmca scores all methods by one code."""


def seed_everything(seed: int) -> None:
    """Seed every generator of this process; the workers that augment for a GPU seed themselves."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def _replace(path: Path, data: bytes) -> None:
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_bytes(data)
    aside.replace(path)
