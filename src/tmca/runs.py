"""Train and score a run whatever its engine: our own training, or a program beside it (nnU-Net)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tmca.calibration import Calibration, read_calibration
from tmca.checkpoints import load_checkpoint, resolve_checkpoint
from tmca.config import Experiment
from tmca.data.manifest import Manifest
from tmca.errors import ConfigError, StorageError
from tmca.evaluation import Evaluation, Space, evaluate
from tmca.evaluation.writing import write_evaluation
from tmca.metrics import EmptyPolicy
from tmca.nnunet import evaluation as nnunet_evaluation
from tmca.nnunet.workspace import is_nnunet_run

if TYPE_CHECKING:
    from tmca.training import RunRecord

NNUNET = "nnunet"
USUAL_THRESHOLD = 0.5


def train_run(
    experiment: Experiment,
    manifest: Manifest,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    devices: int = 1,
    nodes: int = 1,
) -> RunRecord:
    """Train an experiment into a run folder; see :func:`tmca.training.fit` for arguments and errors."""
    from tmca.nnunet import training as nnunet_training  # scoring must not need the training stack
    from tmca.training import fit

    if experiment.model.method == NNUNET:
        if devices * nodes > 1:
            raise ConfigError("nnU-Net trains on one device here", hint="leave --devices and --nodes out")
        return nnunet_training.fit(experiment, manifest, folder, resume=resume, overwrite=overwrite, device=device)
    return fit(
        experiment,
        manifest,
        folder,
        resume=resume,
        overwrite=overwrite,
        device=device,
        devices=devices,
        nodes=nodes,
    )


def can_resume(folder: Path) -> bool:
    """Whether a folder holds a run that :func:`train_run` can continue."""
    from tmca.training.writer import TRAINER_STATE

    return is_nnunet_run(folder) or (folder / "checkpoints" / "last" / TRAINER_STATE).is_file()


def score_run(
    model: str | Path | Sequence[str | Path],
    manifest: Manifest,
    split: str,
    folder: Path,
    *,
    threshold: float = USUAL_THRESHOLD,
    space: Space = "network",
    empty_policy: EmptyPolicy = "one",
    surface_tolerance: float | None = None,
    mirrored: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> Evaluation:
    """Score a model on a split and write ``metrics.csv`` and ``summary.json``.

    Args:
        model: Run folder, checkpoint folder or hub id; of several the probabilities are averaged. Of a calibrated model
            they are the calibrated ones.
        manifest: All splits.
        split: The one to score.
        folder: Where the files go.
        threshold: See :func:`tmca.evaluation.evaluate`, as of the arguments below.
        space: Compare at the network's size or at each mask's own.
        empty_policy: Score of a case that is empty in mask and prediction.
        surface_tolerance: Also measure surface distances, with this tolerance.
        mirrored: Average over the image and its mirror image.
        seed: Decides which other sentence an image gets.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        StorageError: The folder is a run or a checkpoint, whose own ``metrics.csv`` would be lost.
        ConfigError: A threshold was asked of nnU-Net, which gives masks and no probabilities.
        TMCAError: As :func:`tmca.evaluation.evaluate` and :func:`tmca.nnunet.evaluation.evaluate`.
    """
    names = [model] if isinstance(model, str | Path) else list(model)
    if any((folder / name).exists() for name in ("experiment.json", "config.json")):
        raise StorageError(
            f"{folder} holds a model, whose files the scores would replace",
            hint=f"give them a folder of their own, such as {folder / f'evaluation-{split}'}",
        )
    if any(is_nnunet_run(Path(name)) for name in names):
        if len(names) > 1:
            raise ConfigError("nnU-Net gives masks and no probabilities to average", hint="name it alone")
        if threshold != USUAL_THRESHOLD:
            raise ConfigError("nnU-Net's masks have no threshold to choose", hint="leave --threshold out")
        if mirrored:
            raise ConfigError("nnU-Net mirrors by itself", hint="leave --mirrored out")
        evaluation = nnunet_evaluation.evaluate(
            Path(names[0]),
            manifest,
            split,
            space=space,
            empty_policy=empty_policy,
            surface_tolerance=surface_tolerance,
            device=device,
        )
        weights = nnunet_evaluation.weights_hash(Path(names[0]))
        write_evaluation(evaluation, names, manifest, folder, model_sha256=weights)
        return evaluation
    calibrations = [read_calibration(resolve_checkpoint(name)) or Calibration() for name in names]
    evaluation = evaluate(
        [load_checkpoint(name) for name in names],
        manifest,
        split,
        threshold=threshold,
        space=space,
        empty_policy=empty_policy,
        surface_tolerance=surface_tolerance,
        mirrored=mirrored,
        temperatures=[calibration.temperature for calibration in calibrations],
        seed=seed,
        device=device,
    )
    write_evaluation(evaluation, names, manifest, folder)
    return evaluation
