"""Predict with a trained nnU-Net, and score its masks as those of every other method."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from tmca.data.manifest import Manifest
from tmca.errors import CheckpointError, TMCAError
from tmca.evaluation import Evaluation, Space, score_masks
from tmca.files import replace_folder, sha256_of
from tmca.imaging.raster import read_mask
from tmca.metrics import EmptyPolicy
from tmca.nnunet import engine
from tmca.nnunet.dataset import ENDING, write_cases
from tmca.nnunet.workspace import (
    IDENTIFIER,
    PLANS,
    TRAINER,
    Workspace,
    device_flag,
    exported_size,
    nnunet_options,
    processes,
    read_nnunet_run,
)
from tmca.progress import say


def evaluate(
    folder: Path,
    manifest: Manifest,
    split: str = "test",
    *,
    space: Space = "network",
    empty_policy: EmptyPolicy = "one",
    surface_tolerance: float | None = None,
    device: str = "auto",
) -> Evaluation:
    """Score a trained nnU-Net on a split of a manifest.

    Args:
        folder: The run folder.
        manifest: All splits; ``split`` is chosen from it.
        split: The split to score.
        space: See :func:`tmca.evaluation.evaluate`.
        empty_policy: See :data:`tmca.metrics.EmptyPolicy`.
        surface_tolerance: See :func:`tmca.evaluation.evaluate`.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        CheckpointError: The folder holds no finished run of nnU-Net.
        WeightsError: nnU-Net is not installed.
        DataError: The split is empty or its files cannot be used.
        ConfigError: The tolerance or the device is impossible.
        OutOfMemoryError: An image does not fit the device.
        TMCAError: nnU-Net failed; the end of its output says why.
    """
    started = time.monotonic()
    experiment, _ = read_nnunet_run(Path(folder))
    evaluation = score_masks(
        predict(folder, manifest.split(split), device=device),
        manifest,
        split,
        experiment=experiment,
        space=space,
        empty_policy=empty_policy,
        surface_tolerance=surface_tolerance,
    )
    return replace(evaluation, seconds=time.monotonic() - started)


def predict(folder: Path, manifest: Manifest, *, device: str = "auto") -> dict[str, Bool[np.ndarray, "_ _"]]:
    """Segment the cases of one split; the masks also stay in the run's folder ``nnunet/predictions-SPLIT``.

    Returns:
        Record id → mask, at the size of the images that nnU-Net got.

    Raises:
        CheckpointError: The folder holds no finished run of nnU-Net.
        WeightsError: nnU-Net is not installed.
        DataError: A file cannot be used.
        ConfigError: The device is impossible.
        OutOfMemoryError: An image does not fit the device.
        TMCAError: nnU-Net failed; the end of its output says why.
    """
    workspace = Workspace(Path(folder))
    experiment, _ = read_nnunet_run(workspace.run)
    if not workspace.weights.is_file():
        raise CheckpointError(
            f"nnU-Net has not finished its training in {workspace.run}", hint="continue it with --resume last"
        )
    variables = workspace.variables(device, trainer=nnunet_options(experiment).trainer)
    engine.require()
    manifest.check(require_text=False, require_mask=True)
    split = manifest.records[0].split
    images, masks = (workspace.folder / f"{what}-{split}" for what in ("images", "predictions"))
    with replace_folder(images) as place:
        names = write_cases(manifest, place, image_size=exported_size(experiment))
    shutil.rmtree(masks, ignore_errors=True)
    say(f"nnU-Net predicts {len(names)} cases")
    several = str(processes(most=3))
    arguments = ["-i", str(images), "-o", str(masks), "-d", IDENTIFIER, "-c", "2d", "-f", "0", "-tr", TRAINER]
    arguments += ["-p", PLANS, *device_flag(device), "-npp", several, "-nps", several, "--disable_progress_bar"]
    engine.run("predict", arguments, variables, workspace.log)
    missing = [record for name, record in names.items() if not (masks / f"{name}{ENDING}").is_file()]
    if missing:
        raise TMCAError(f"nnU-Net wrote no mask for {missing[0]!r}", hint=f"all of its output is in {workspace.log}")
    return {record: read_mask(masks / f"{name}{ENDING}") for name, record in names.items()}


def weights_hash(folder: Path) -> str:
    """Return the SHA-256 of the weights that predict.

    Raises:
        DataError: They are not there.
    """
    return sha256_of(Workspace(Path(folder)).weights)
