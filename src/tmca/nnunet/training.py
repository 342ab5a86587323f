"""Train nnU-Net: export, plan, train, and leave a run folder like every other."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tmca.config import Experiment, to_dict
from tmca.data.manifest import Manifest
from tmca.environment import describe_environment
from tmca.errors import ConfigError, DataError
from tmca.files import held, write_json
from tmca.nnunet import engine
from tmca.nnunet.dataset import export
from tmca.nnunet.workspace import (
    IDENTIFIER,
    PLANS,
    TRAINER,
    NnunetOptions,
    Workspace,
    device_flag,
    exported_size,
    nnunet_options,
    processes,
    read_nnunet_run,
)
from tmca.presets import differences
from tmca.progress import say
from tmca.training import RunRecord, already_training, note_end, started
from tmca.training.writer import Row, write_history

COLUMNS = {
    "learning_rate": "lrs",
    "train_loss": "train_losses",
    "val_loss": "val_losses",
    "val_pseudo_dice": "mean_fg_dice",
}
"""Columns of ``metrics.csv`` → what the trainer calls them."""


def fit(
    experiment: Experiment,
    manifest: Manifest,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
) -> RunRecord:
    """Train nnU-Net on the ``train`` split of a manifest; on its ``val`` split it is watched, nothing is chosen.

    Of the experiment count ``model.options`` (see :class:`~tmca.nnunet.workspace.NnunetOptions`), ``seed``,
    ``preprocessing.image_size``, ``trainer.max_epochs`` and ``trainer.train_fraction``; nnU-Net decides the rest.

    Args:
        experiment: Whose ``model.method`` is ``nnunet``.
        manifest: Cases with splits ``train`` and ``val``.
        folder: The run folder.
        resume: Continue the run in ``folder`` where it was interrupted.
        overwrite: Replace a run that is there; without it and ``resume`` an existing run is refused.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Returns:
        How the run ended, with the best epoch of nnU-Net's own validation; an interrupted run raises KeyboardInterrupt
        and can be resumed.

    Raises:
        WeightsError: nnU-Net is not installed.
        DataError: The data cannot be trained on, or is not what the run to resume was started on.
        ConfigError: The experiment or the device is impossible, or the experiment not that of the run to resume.
        CheckpointError: There is nothing to resume.
        StorageError: The run folder cannot be written, or holds a run already.
        OutOfMemoryError: A batch does not fit the device.
        TMCAError: nnU-Net failed; the end of its output says why.
    """
    folder = Path(folder)
    workspace = Workspace(folder)
    options = nnunet_options(experiment)
    device_flag(device)  # an impossible device is refused before anything is written
    versions = engine.require().versions
    training = manifest.split("train").fraction(experiment.trainer.train_fraction, experiment.seed)
    chosen = manifest.with_records((*training.records, *manifest.split("val").records))
    chosen.check(require_text=False, require_mask=True)
    data: dict[str, Any] = {"hash": manifest.content_hash()}
    data |= {split: [record.id for record in chosen.split(split).records] for split in ("train", "val")}

    def begin(place: Path) -> None:
        export(chosen, Workspace(place).folder, image_size=exported_size(experiment))
        write_json(place / "splits.json", data)
        environment = describe_environment()
        environment |= {"packages": environment["packages"] | versions, "stopped": None}
        write_json(place / "environment.json", environment)
        write_json(place / "experiment.json", to_dict(experiment))

    if resume:
        _check_resumed(experiment, folder, data)
    with held(folder, already_training(folder)) if resume else started(folder, begin, overwrite=overwrite):
        if not workspace.trained.is_dir():
            say("nnU-Net plans network, augmentation and optimiser, and prepares the images")
            _plan(workspace, options, device)
        if not workspace.weights.is_file():
            try:
                _train(workspace, experiment, len(data["train"]), device)
            finally:
                _write_history(workspace)
        record = _record(workspace)
        note_end(folder, record.stopped)
    return record


def _plan(workspace: Workspace, options: NnunetOptions, device: str) -> None:
    several = str(processes())
    arguments = ["-d", IDENTIFIER, "-c", "2d", "-np", several, "-npfp", several]
    arguments += ["--verify_dataset_integrity", "--clean", "--no_pbar"]
    # Planning refuses to work with no process for augmentation, though it augments nothing.
    engine.run("plan", arguments, workspace.variables(device) | {"nnUNet_n_proc_DA": "1"}, workspace.log)
    if options.batch_size is not None:
        plans = json.loads(workspace.plans.read_text("utf-8"))
        plans["configurations"]["2d"]["batch_size"] = options.batch_size
        write_json(workspace.plans, plans)


def _train(workspace: Workspace, experiment: Experiment, n_train: int, device: str) -> None:
    options = nnunet_options(experiment)
    batch_size = json.loads(workspace.plans.read_text("utf-8"))["configurations"]["2d"]["batch_size"]
    variables = workspace.variables(
        device,
        trainer=options.trainer,
        epochs=experiment.trainer.max_epochs,
        iterations=options.iterations or max(1, n_train // batch_size),
        seed=experiment.seed,
    )
    # --c: from the last checkpoint, or from the start where there is none
    arguments = [IDENTIFIER, "2d", "0", "-tr", TRAINER, "-p", PLANS, "--c", *device_flag(device)]
    engine.run("train", arguments, variables, workspace.log)


def _check_resumed(experiment: Experiment, folder: Path, data: dict[str, Any]) -> None:
    before, data_before = read_nnunet_run(folder)
    changed = differences(before, experiment)
    if changed:
        name, (old, new) = next(iter(changed.items()))
        raise ConfigError(
            f"The run in {folder} was started with {name} {old!r}, not {new!r}",
            hint="resume with the same settings, or start another run",
        )
    if data_before != data:
        raise DataError(
            f"The data is not what the run in {folder} was started on (data hash or split differs)",
            hint="resume on the same data, or start another run",
        )


def _write_history(workspace: Workspace) -> list[Row]:
    """Write ``metrics.csv`` from what the trainer has written down, if it has got that far."""
    path = workspace.trained / "history.json"
    if not path.is_file():
        return []
    history = json.loads(path.read_text("utf-8"))
    rows: list[Row] = []
    seconds = 0.0
    for index, end in enumerate(history["epoch_end_timestamps"]):
        seconds += end - history["epoch_start_timestamps"][index]
        row: Row = {"epoch": index + 1, "seconds": round(seconds, 1)}
        rows.append(row | {column: history[name][index] for column, name in COLUMNS.items()})
    write_history(rows, workspace.run / "metrics.csv")
    return rows


def _record(workspace: Workspace) -> RunRecord:
    rows = _write_history(workspace)
    scores = [-math.inf if math.isnan(row["val_pseudo_dice"]) else row["val_pseudo_dice"] for row in rows]
    best = scores.index(max(scores))
    seconds = float(rows[-1]["seconds"])
    return RunRecord(workspace.run, len(rows), best + 1, scores[best], seconds, "all epochs done")
