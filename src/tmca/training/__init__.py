"""Training: one shared step, a run folder that can always be resumed, nothing hidden.

A run folder holds ``experiment.json``, ``splits.json``, ``environment.json``, ``metrics.csv`` (a row an epoch),
``curves.png``, ``tensorboard/`` and ``checkpoints/{best,last}``. ``last`` also holds the state of optimiser and loops,
so that a resumed run gives the same numbers as an uninterrupted one.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.loggers import TensorBoardLogger
from torch._dynamo.exc import TorchDynamoException

from tmca.checkpoints import load_checkpoint
from tmca.config import Experiment, TrainerConfig, from_dict, to_dict
from tmca.data.cache import DecodedCache
from tmca.data.describe import provenance_notice
from tmca.data.loading import SegmentationDataset, Shard, make_loader
from tmca.data.manifest import Manifest
from tmca.devices import keep_freed_memory, resolve_device, uses_bfloat16
from tmca.environment import describe_environment
from tmca.errors import CheckpointError, ConfigError, DataError, OutOfMemoryError, StorageError, TMCAError
from tmca.files import held, real_path, refill_folder, storage_error, write_json
from tmca.models import SegmentationModel, build_model
from tmca.models.operations import channels_last
from tmca.models.tokenizer import SentenceTokenizer
from tmca.models.vision import encoder_normalisation
from tmca.presets import differences
from tmca.progress import say, set_quiet, track
from tmca.training.compiling import reason_of
from tmca.training.processes import ProcessLayout
from tmca.training.task import SegmentationTask
from tmca.training.writer import TRAINER_STATE, EpochProgress, Patience, RunWriter, finished_epochs

CHANGEABLE_FIELDS = {
    "trainer.max_epochs",
    "trainer.min_epochs",
    "trainer.patience",
    "trainer.max_train_seconds",
    "trainer.num_workers",
    "trainer.compile",
}
"""Fields that may change when a run is resumed."""
MINIMUM_CONTRAST = 8


@dataclass(frozen=True)
class RunRecord:
    """How a training run ended.

    Attributes:
        folder: The run folder.
        epochs: Epochs trained, over all resumes.
        best_epoch: Epoch of the best validation score, from 1.
        best_score: That score: the segmentation loss or the Dice, see ``trainer.monitor``.
        seconds: Spent training, over all resumes.
        stopped: Why it ended.
    """

    folder: Path
    epochs: int
    best_epoch: int
    best_score: float
    seconds: float
    stopped: str


def fit(
    experiment: Experiment,
    manifest: Manifest,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    devices: int = 1,
    nodes: int = 1,
    cache: Path | None = None,
) -> RunRecord:
    """Train a model on the ``train`` split of a manifest, choosing the best epoch on its ``val`` split.

    Args:
        experiment: What to train; see :mod:`tmca.presets`.
        manifest: Cases with splits ``train`` and ``val``.
        folder: The run folder.
        resume: Continue the run in ``folder`` from its last finished epoch.
        overwrite: Replace a run that is there; without it and ``resume`` an existing run is refused.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        devices: Processes on this machine that share each batch, one a GPU; started by torchrun, its number counts.
        nodes: Machines of a Slurm job that do so.
        cache: Folder of decoded images; by default ``$TMCA_HOME/decoded``.

    Returns:
        How the run ended; an interrupted run raises KeyboardInterrupt and can be resumed.

    Raises:
        DataError: The data cannot be trained on.
        ConfigError: The experiment does not fit the data, or not the run to resume.
        CheckpointError: There is nothing to resume.
        WeightsError: Pretrained weights are missing.
        StorageError: The run folder cannot be written, or holds a run already.
        OutOfMemoryError: The batch does not fit the device.
    """
    place = resolve_device(device)
    layout = ProcessLayout.of(devices, nodes)
    if not layout.is_first:
        set_quiet(quiet=True)
    experiment = resolve(experiment)
    training, validation = _splits(experiment, manifest)
    layout.check(place, experiment.trainer.batch_size, len(training.records), len(validation.records))
    batch_sizes = {
        "train": layout.share_of_batch(experiment.trainer.batch_size),
        "val": experiment.trainer.evaluation_batch_size,
    }
    folder = Path(folder)
    last = folder / "checkpoints" / "last"
    data = {"hash": manifest.content_hash(), "train": [r.id for r in training.records]}
    data |= {"val": [r.id for r in validation.records]}
    pl.seed_everything(experiment.seed, verbose=False)
    with ExitStack() as holding:
        if resume:
            # Held before anything is read of it: a training that ends meanwhile leaves another state.
            if layout.is_first and folder.is_dir():
                holding.enter_context(held(folder, already_training(folder)))
            _check_resumed(experiment, folder, data)
            model = load_checkpoint(last)
            model.train()
        else:
            if layout.is_first:
                check_folder(folder, overwrite=overwrite)
            model = build_model(experiment.model, training.sentences)
        model.experiment = experiment
        _report_tokens(model, training, validation)

        loaders = []
        for split, name in ((training, "train"), (validation, "val")):
            augmentation = experiment.augmentation if name == "train" else None
            cached = DecodedCache(split, experiment.preprocessing.image_size, cache)
            for _ in track(cached.fill(), f"Reading {name} images", len(cached)):
                pass
            _check_targets(cached, name)
            dataset = SegmentationDataset(
                split, experiment.preprocessing, augmentation, seed=experiment.seed, cache=cached
            )
            loader = make_loader(
                dataset,
                batch_sizes[name],
                training=name == "train",
                num_workers=experiment.trainer.num_workers,
                shard=Shard(layout.rank, layout.processes),
                epoch=finished_epochs(last / TRAINER_STATE) if resume else 0,
            )
            loaders.append(loader)
        task = SegmentationTask(channels_last(model), experiment)
        writer = RunWriter(task, folder)
        trainer = _make_trainer(experiment, writer, place, layout)
        if layout.is_first:
            if not resume:
                # Only now, when nothing can be wrong with weights and data any more, may an older run be given up.
                holding.enter_context(started(folder, partial(_begin, data), overwrite=overwrite))
            write_json(folder / "experiment.json", to_dict(experiment))  # a resumed run may have become longer
            note_end(folder, None)
        keep_freed_memory()
        with _readable_failures(trainer):
            state = last / TRAINER_STATE if resume else None
            trainer.fit(task, loaders[0], loaders[1], ckpt_path=state, weights_only=True)
        stopped = _reason(writer, experiment.trainer)
        if layout.is_first:
            note_end(folder, stopped)
    return RunRecord(folder, len(writer.history), writer.best_epoch, writer.best_score, writer.seconds, stopped)


def resolve(experiment: Experiment) -> Experiment:
    """Return the experiment with ``encoder`` normalisation replaced by the encoder's own mean and std.

    Raises:
        ConfigError: The image encoder does not say how its images were normalised.
        WeightsError: Its weights cannot be found.
    """
    if experiment.preprocessing.normalisation != "encoder":
        return experiment
    mean, std = encoder_normalisation(experiment.model.image_encoder)
    fixed = replace(
        experiment.preprocessing,
        normalisation="fixed",
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
    )
    return replace(experiment, preprocessing=fixed)


def _reason(writer: RunWriter, config: TrainerConfig) -> str:
    if writer.out_of_time:
        return "time limit reached"
    if writer.history and writer.history[-1]["epoch"] < config.max_epochs:
        return f"no better validation {config.monitor} for {config.patience} epochs"
    return "all epochs done"


def note_end(folder: Path, stopped: str | None) -> None:
    """Write into a run folder's ``environment.json`` why training ended; ``None`` while it has not."""
    path = folder / "environment.json"
    write_json(path, json.loads(path.read_text("utf-8")) | {"stopped": stopped})


def _splits(experiment: Experiment, manifest: Manifest) -> tuple[Manifest, Manifest]:
    training, validation = manifest.split("train"), manifest.split("val")
    training = training.fraction(experiment.trainer.train_fraction, experiment.seed)
    notice = provenance_notice(training) if experiment.model.guidance else None
    if notice:
        say(f"note: {notice}")
    for split in (training, validation):
        split.check(require_text=experiment.model.guidance, require_mask=True)
    batch = experiment.trainer.batch_size
    aligned = experiment.model.alignment.strides or experiment.model.alignment.align_global
    if aligned and min(batch, len(training.records)) < MINIMUM_CONTRAST:
        say(
            f"warning: batches of {min(batch, len(training.records))} images give the alignment loss little to "
            f"contrast; {MINIMUM_CONTRAST} or more are better"
        )
    return training, validation


def _check_targets(cases: DecodedCache, name: str) -> None:
    """Refuse a training split without any target; it would look learned at once. Of a validation split, warn."""
    if any(cases[index][-1].any() for index in range(len(cases))):
        return
    if name == "train":
        raise DataError("No mask of the train split marks anything", hint="look at the masks: tmca data audit")
    say(f"warning: no mask of the {name} split marks anything; its scores say nothing")


def _report_tokens(model: SegmentationModel, *splits: Manifest) -> None:
    if model.text_encoder is None:
        return
    tokenizer: SentenceTokenizer = model.text_encoder.tokenizer
    texts = [record.text for split in splits for record in split.records if record.text]
    counts = tokenizer(texts).token_counts
    over = [(count, text) for count, text in zip(counts, texts, strict=True) if count > tokenizer.max_tokens]
    if over:
        longest = max(over)
        say(
            f"warning: {len(over)} of {len(texts)} sentences exceed {tokenizer.max_tokens} tokens and are cut, the "
            f"longest has {longest[0]}: {longest[1]!r}; raise model.text_encoder.max_tokens to keep them whole"
        )


def already_training(folder: Path) -> StorageError:
    """Return the error for a run folder in which another training is at work."""
    return StorageError(f"A training is at work in {folder}", hint="wait for it, or choose another folder")


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse a run folder that may not be filled.

    Raises:
        StorageError: It holds a run and ``overwrite`` is off, files that are no run, or a training that is at work.
    """
    _check_content(folder, overwrite=overwrite)
    if folder.is_dir():
        with held(folder, already_training(folder)):
            pass


def _check_content(folder: Path, *, overwrite: bool) -> None:
    holds_run = (folder / "experiment.json").exists()
    if holds_run and not overwrite:
        message, hint = f"{folder} holds a training run already", "replace it: --overwrite"
        checkpoints = folder / "checkpoints"  # a run of nnU-Net has none and can always be continued
        if checkpoints.is_dir() and not (checkpoints / "last" / TRAINER_STATE).is_file():
            raise StorageError(f"{message}, which has not finished an epoch", hint=hint)
        raise StorageError(message, hint=f"continue it with --resume last, or {hint}")
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} is a file", hint="choose another output folder")
    is_begun = holds_run or (folder / "checkpoints").is_dir()
    if folder.is_dir() and any(folder.iterdir()) and not is_begun:
        raise StorageError(
            f"{folder} holds files that are no training run; they would be lost", hint="choose another output folder"
        )


def _begin(data: dict[str, Any], fresh: Path) -> None:
    (fresh / "checkpoints").mkdir()
    write_json(fresh / "splits.json", data)
    write_json(fresh / "environment.json", describe_environment())


@contextmanager
def started(folder: Path, fill: Callable[[Path], None], *, overwrite: bool) -> Iterator[None]:
    """Hold a run folder while the block runs; it is made, or the run in it given up, by who holds it only.

    Args:
        folder: The run folder.
        fill: Writes what a run begins with into a folder; an old run is there until that is done.
        overwrite: Give up a run that is there.

    Raises:
        StorageError: As for :func:`check_folder`.
    """
    try:
        real_path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error
    with held(folder, already_training(folder)):
        _check_content(folder, overwrite=overwrite)
        with refill_folder(folder) as fresh:
            fill(fresh)
        yield


def _check_resumed(experiment: Experiment, folder: Path, data: dict[str, Any]) -> None:
    try:
        before = from_dict(Experiment, json.loads((folder / "experiment.json").read_text("utf-8")))
        split_before = json.loads((folder / "splits.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no run to resume: {error}", hint="start it without --resume") from error
    if not (folder / "checkpoints" / "last" / TRAINER_STATE).is_file():
        raise CheckpointError(f"The run in {folder} has not finished an epoch yet", hint="start again with --overwrite")
    changed = {
        name: values for name, values in differences(before, experiment).items() if name not in CHANGEABLE_FIELDS
    }
    if changed:
        name, (old, new) = next(iter(changed.items()))
        raise ConfigError(
            f"The run in {folder} was started with {name} {old!r}, not {new!r}",
            hint="resume with the same settings, or start another run",
        )
    if split_before != data:
        raise DataError(
            f"The data is not what the run in {folder} was started on (data hash or split differs)",
            hint="resume on the same data, or start another run",
        )
    length, planned = experiment.trainer.max_epochs, before.trainer.max_epochs
    history = folder / "metrics.csv"
    done = len(history.read_text("utf-8").splitlines()) - 1 if history.is_file() else 0
    if length < done:
        raise ConfigError(
            f"The run in {folder} has trained {done} epochs already, trainer.max_epochs is {length}",
            hint=f"score it as it is, or resume it with at least {done}",
        )
    follows = experiment.optimiser.schedule == "cosine" and experiment.optimiser.schedule_epochs is None
    if length != planned and follows:
        say(f"note: {length} epochs now, {planned} before: the learning rate follows the new length from here on")


def _make_trainer(experiment: Experiment, writer: RunWriter, place: torch.device, layout: ProcessLayout) -> pl.Trainer:
    config = experiment.trainer
    callbacks: list[pl.Callback] = [
        Patience(writer.monitor, patience=config.patience, mode=writer.best_end, check_finite=True)
    ]
    callbacks += [EpochProgress(writer, config.max_epochs), writer] if layout.is_first else [writer]
    several = layout.processes > 1
    if several and place.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // layout.devices))
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    trainer = pl.Trainer(
        accelerator="gpu" if place.type == "cuda" else place.type,
        devices=layout.devices if place.index is None else [place.index],
        num_nodes=layout.nodes,
        plugins=None if several else LightningEnvironment(),  # one process asks no cluster
        strategy="ddp" if several else "auto",
        sync_batchnorm=several and place.type == "cuda",
        use_distributed_sampler=False,
        precision="bf16-mixed" if uses_bfloat16(config.precision, place) else "32-true",
        max_epochs=config.max_epochs,
        min_epochs=min(config.min_epochs, config.max_epochs),
        accumulate_grad_batches=config.accumulate_batches,
        callbacks=callbacks,
        logger=TensorBoardLogger(writer.folder, name="tensorboard", version=""),
        log_every_n_steps=1_000_000_000,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=writer.folder,
    )
    if (trainer.world_size, trainer.global_rank) != (layout.processes, layout.rank):
        raise ConfigError(
            f"This is process {layout.rank} of {layout.processes}, but Lightning takes it for {trainer.global_rank} "
            f"of {trainer.world_size}",
            hint="start the processes with --devices alone, torchrun, or srun",
        )
    return trainer


@contextmanager
def _readable_failures(trainer: pl.Trainer) -> Iterator[None]:
    """Turn Lightning's exit on Ctrl-C and running out of memory into our errors; silence its advice."""
    interrupt_handler = signal.getsignal(signal.SIGINT)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists.*")
        warnings.filterwarnings("ignore", message=".*number of training batches.*")
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # frozen text encoder
        warnings.filterwarnings("ignore", category=FutureWarning, module="lightning.*")
        warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
        try:
            yield
        except SystemExit as error:
            if trainer.interrupted:
                raise KeyboardInterrupt from error
            raise
        except torch.cuda.OutOfMemoryError as error:
            raise OutOfMemoryError("The device ran out of memory", hint="lower trainer.batch_size") from error
        except TorchDynamoException as error:  # of the backward pass, or in one of several processes
            message = f"The training step cannot be compiled: {reason_of(error)}"
            raise TMCAError(message, hint="set trainer.compile=false") from error
        finally:
            # Lightning leaves Ctrl-C switched off behind it.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, interrupt_handler)
    if trainer.interrupted:
        raise KeyboardInterrupt
