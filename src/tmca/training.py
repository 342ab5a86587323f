"""Training: one shared step, a run folder that can always be resumed, nothing hidden.

A run folder holds ``experiment.json``, ``splits.json``, ``environment.json``, ``metrics.csv`` (a row an epoch),
``curves.png``, ``tensorboard/`` and ``checkpoints/{best,last}``. ``last`` also holds the state of optimiser and loops,
so that a resumed run gives the same numbers as an uninterrupted one.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import logging
import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from rich.progress import TaskID
from torch import Tensor

from tmca.checkpoints import load_checkpoint, write_checkpoint
from tmca.config import Experiment, from_dict, to_dict
from tmca.data.cache import DecodedCache
from tmca.data.describe import provenance_notice
from tmca.data.loading import SegmentationDataset, make_loader
from tmca.data.manifest import Manifest
from tmca.devices import keep_freed_memory, resolve_device, uses_bfloat16
from tmca.environment import describe_environment
from tmca.errors import CheckpointError, ConfigError, DataError, OutOfMemoryError, StorageError, TMCAError
from tmca.files import replace_folder, write_bytes, write_json, write_text
from tmca.losses import objective
from tmca.metrics import Counts, confusion_counts, per_case_mean, pooled_scores
from tmca.models import SegmentationModel, build_model
from tmca.models.text import SentenceTokenizer
from tmca.models.vision import encoder_normalisation
from tmca.presets import differences
from tmca.progress import make_progress, say, track
from tmca.types import Batch

Row = dict[str, float | int]
"""What a run's ``metrics.csv`` says of one epoch."""

MONITORS: dict[str, tuple[str, Literal["min", "max"]]] = {
    "loss": ("val_segmentation_loss", "min"),
    "dice": ("val_per_case_dice", "max"),
}
"""``trainer.monitor`` → the column of a run's ``metrics.csv`` that chooses the best epoch, and which end is best."""
TRAINER_STATE = "trainer_state.ckpt"
LENGTH_FIELDS = {
    "trainer.max_epochs",
    "trainer.min_epochs",
    "trainer.patience",
    "trainer.max_train_seconds",
    "trainer.num_workers",
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


class SegmentationTask(pl.LightningModule):
    """Model, losses and optimiser joined for Lightning; one step serves training and validation."""

    def __init__(self, model: SegmentationModel, experiment: Experiment) -> None:
        super().__init__()
        self.model = model
        self.experiment = experiment
        self.strict_loading = False
        self.average = averaged_copy(model) if experiment.optimiser.average_decay is not None else None
        self._counts: list[Counts] = []

    @property
    def kept(self) -> SegmentationModel:
        """The model that is validated and kept as best: the average of the weights, or the model itself."""
        return self.model if self.average is None else self.average

    def shared_step(self, model: SegmentationModel, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Return the losses by name and the mask logits of a batch."""
        images = batch.images.contiguous(memory_format=torch.channels_last)
        output = model.segment(model.encode_image(images), model.encode_text(batch.texts))
        losses = objective(output, batch.masks, self.experiment.objective)
        if not torch.isfinite(losses["loss"]):
            raise TMCAError(
                f"The loss became {float(losses['loss'].detach())} in epoch {self.current_epoch + 1}",
                hint="lower optimiser.learning_rate, set optimiser.gradient_clip, or use trainer.precision=32",
            )
        return losses, output.mask_logits

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Seed dropout by (seed, epoch, batch), so that a resumed run draws what an uninterrupted one would."""
        sequence = np.random.SeedSequence((self.experiment.seed, self.current_epoch, batch_idx))
        torch.manual_seed(int(sequence.generate_state(1)[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the loss of a training batch."""
        losses, _ = self.shared_step(self.model, batch)
        self._log(losses, "train", batch.batch_size)
        return losses["loss"]

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401
        """Step, then let the averaged weights follow; early on faster, so that they forget the random start."""
        super().optimizer_step(*arguments, **options)
        decay = self.experiment.optimiser.average_decay
        if self.average is not None and decay is not None:
            step = self.global_step + 1
            follow(self.average, self.model, min(decay, (1 + step) / (10 + step)))

    def on_validation_epoch_start(self) -> None:
        """Forget the counts of the epoch before."""
        self._counts = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Log the losses and count the pixels of a validation batch."""
        losses, mask_logits = self.shared_step(self.kept, batch)
        self._log(losses, "val", batch.batch_size)
        self._counts.append(confusion_counts(mask_logits > 0, batch.masks))

    def on_validation_epoch_end(self) -> None:
        """Log pooled and per-case Dice of the validation split."""
        counts = Counts.concatenate(self._counts)
        self.log("val_pooled_dice", pooled_scores(counts)["dice"])
        self.log("val_per_case_dice", per_case_mean(counts)["dice"])

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        """Return AdamW and a cosine schedule with linear warm-up, stepped every batch."""
        config = self.experiment.optimiser
        encoder = [value for value in self.model.pretrained_parameters() if value.requires_grad]
        chosen = {id(value) for value in encoder}
        others = [value for value in self.model.parameters() if value.requires_grad and id(value) not in chosen]
        groups = [
            {"params": encoder, "lr": config.learning_rate * config.encoder_factor},
            {"params": others, "lr": config.learning_rate},
        ]
        groups = [group for group in groups if group["params"]]
        optimiser = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
        floor = config.min_learning_rate / config.learning_rate
        scheduler: torch.optim.lr_scheduler.LRScheduler
        if config.schedule == "plateau":
            name, mode = MONITORS[self.experiment.trainer.monitor]
            lowest = [group["lr"] * floor for group in optimiser.param_groups]
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimiser, mode, patience=config.plateau_patience, min_lr=lowest
            )
            return {"optimizer": optimiser, "lr_scheduler": {"scheduler": scheduler, "monitor": name}}
        steps = int(self.trainer.estimated_stepping_batches) / self.experiment.trainer.max_epochs
        restarts = config.schedule == "restarts"
        epochs = config.restart_epochs if restarts else config.schedule_epochs or self.experiment.trainer.max_epochs
        total = max(1, int(steps * epochs))

        def factor(step: int) -> float:
            return learning_rate_factor(step, total, config.warmup_steps, floor, restarts=restarts)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: ARG002
        """Clip the gradient norm; Lightning's own clipping refuses the fused AdamW."""
        if self.experiment.optimiser.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.experiment.optimiser.gradient_clip)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the weights out of the trainer's state: they lie beside it as safetensors."""
        average = {} if self.average is None else trained_state(self.average)
        checkpoint["state_dict"] = {f"average.{name}": value for name, value in average.items()}

    def _log(self, losses: dict[str, Tensor], stage: str, batch_size: int) -> None:
        named = {f"{stage}_{name}": value.detach() for name, value in losses.items()}
        self.log_dict(named, on_step=False, on_epoch=True, batch_size=batch_size)


def averaged_copy(model: SegmentationModel) -> SegmentationModel:
    """Return a copy of a model that carries no gradient; a frozen text encoder is shared, not copied."""
    shared = {}
    if model.text_encoder is not None and model.text_encoder.config.freeze:
        shared = {id(model.text_encoder): model.text_encoder}
    return copy.deepcopy(model, memo=shared).requires_grad_(requires_grad=False)


def trained_state(model: SegmentationModel) -> dict[str, Tensor]:
    """Return the state of a model without that of a frozen text encoder."""
    frozen = model.text_encoder is not None and model.text_encoder.config.freeze
    return {
        name: value for name, value in model.state_dict().items() if not (frozen and name.startswith("text_encoder."))
    }


@torch.no_grad()
def follow(average: SegmentationModel, model: SegmentationModel, decay: float) -> None:
    """Move averaged weights and BatchNorm statistics towards a model's; counters are copied."""
    now = trained_state(model)
    for name, value in trained_state(average).items():
        if value.is_floating_point():
            value.lerp_(now[name], 1 - decay)
        else:
            value.copy_(now[name])


def channels_last(model: SegmentationModel) -> SegmentationModel:
    """Lay convolution weights out with the channels last, which is faster on CPUs and GPUs and changes no value."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def learning_rate_factor(step: int, total: int, warmup: int, floor: float, *, restarts: bool = False) -> float:
    """Return the factor on the peak learning rate: linear warm-up, then a cosine down to ``floor``.

    Args:
        step: Optimiser step, from 0.
        total: Step at which the cosine, warm-up included, reaches ``floor``; with ``restarts`` the steps of a cosine.
        warmup: Steps of warm-up.
        floor: Least factor.
        restarts: Start again at the peak after every ``total`` steps instead of staying at ``floor``.
    """
    if step < warmup:
        return (step + 1) / warmup
    after = step - warmup
    progress = after % total / total if restarts else min(1.0, after / max(1, total - warmup))
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


class RunWriter(Checkpoint):
    """Writes history, curves and checkpoints at the end of every epoch, and stops at the time limit."""

    def __init__(self, task: SegmentationTask, folder: Path) -> None:
        self.task = task
        self.folder = folder
        self.history: list[Row] = []
        self.monitor, self.best_end = MONITORS[task.experiment.trainer.monitor]
        self.best_score = math.inf if self.best_end == "min" else -math.inf
        self.best_epoch = 0
        self.seconds = 0.0
        self.out_of_time = False
        self._started = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Start the epoch's clock."""
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Record the epoch; validation has run by now."""
        now = time.monotonic()
        # After a resume the first epoch's start hook may have been skipped by the loop.
        self.seconds += now - (self._started or now)
        self._started = now
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        rate = float(trainer.optimizers[0].param_groups[-1]["lr"])
        row: Row = {"epoch": trainer.current_epoch + 1, "seconds": round(self.seconds, 1), "learning_rate": rate}
        self.history.append(row | {name: metrics[name] for name in sorted(metrics)})
        score = metrics[self.monitor]
        is_best = score < self.best_score if self.best_end == "min" else score > self.best_score
        if is_best:
            self.best_score, self.best_epoch = score, trainer.current_epoch + 1
        limit = self.task.experiment.trainer.max_train_seconds
        if limit is not None and self.seconds >= limit:
            self.out_of_time = True
            trainer.fit_loop.min_epochs = None
            trainer.should_stop = True
        self._write(trainer, is_best=is_best)

    def _write(self, trainer: pl.Trainer, *, is_best: bool) -> None:
        checkpoints = self.folder / "checkpoints"
        last, best = checkpoints / "last", checkpoints / "best"
        scores = {name: value for name, value in self.history[-1].items() if name.endswith("_dice")}
        with replace_folder(last) as place:
            write_checkpoint(self.task.model, self.task.experiment, place, metrics=scores, link_from=last)
            trainer.save_checkpoint(place / TRAINER_STATE)
        if is_best:
            with replace_folder(best) as place:
                write_checkpoint(self.task.kept, self.task.experiment, place, metrics=scores, link_from=last)
        write_history(self.history, self.folder / "metrics.csv")
        draw_curves(self.history, self.best_epoch, self.folder / "curves.png")

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know."""
        names = ("history", "best_score", "best_epoch", "seconds")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from another run's state."""
        for name, value in state_dict.items():
            setattr(self, name, value)


class Patience(EarlyStopping):
    """Early stopping whose patience may be changed when a run is resumed."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what was seen, not the patience."""
        super().load_state_dict(state_dict | {"patience": self.patience})


class EpochProgress(Callback):
    """A bar within the epoch on a terminal, and one line after each epoch everywhere."""

    def __init__(self, writer: RunWriter, epochs: int) -> None:
        self.writer = writer
        self.epochs = epochs
        self._progress = make_progress()
        self._task: TaskID | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Show the bar."""
        self._progress.start()
        self._task = self._progress.add_task("Training", total=trainer.num_training_batches)

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any, **options: Any) -> None:  # noqa: ANN401, ARG002
        """Move the bar."""
        if self._task is not None:
            description = f"Epoch {trainer.current_epoch + 1} of {self.epochs}"
            self._progress.update(self._task, completed=arguments[-1] + 1, description=description)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Print the epoch's line."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        line = f"epoch {trainer.current_epoch + 1:>3} of {self.epochs}"
        line += f" · train loss {metrics['train_loss']:.3f} · validation loss {metrics['val_segmentation_loss']:.3f}"
        line += f", pooled Dice {metrics['val_pooled_dice']:.3f}"
        if self._progress.disable:
            say(line)
        else:
            self._progress.console.print(line, highlight=False)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Remove the bar."""
        self._progress.stop()

    def on_exception(self, *arguments: Any) -> None:  # noqa: ANN401, ARG002
        """Remove the bar."""
        self._progress.stop()


def fit(
    experiment: Experiment,
    manifest: Manifest,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
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
    resolve_device(device)
    experiment = resolve(experiment)
    training, validation = _splits(experiment, manifest)
    folder = Path(folder)
    last = folder / "checkpoints" / "last"
    data = {"hash": manifest.content_hash(), "train": [r.id for r in training.records]}
    data |= {"val": [r.id for r in validation.records]}
    pl.seed_everything(experiment.seed, verbose=False)
    if resume:
        experiment = _resumed(experiment, folder, data)
        model = load_checkpoint(last)
        model.train()
    else:
        _check_folder(folder, overwrite=overwrite)
        model = build_model(experiment.model, training.sentences)
    model.experiment = experiment
    _report_tokens(model, training, validation)

    loaders = []
    for split, name in ((training, "train"), (validation, "val")):
        augmentation = experiment.augmentation if name == "train" else None
        cached = DecodedCache(split, experiment.preprocessing.image_size, cache)
        for _ in track(cached.fill(), f"Reading {name} images", len(cached)):
            pass
        dataset = SegmentationDataset(split, experiment.preprocessing, augmentation, seed=experiment.seed, cache=cached)
        config = experiment.trainer
        size = config.batch_size if name == "train" else config.evaluation_batch_size
        loaders.append(make_loader(dataset, size, training=name == "train", num_workers=config.num_workers))
    if not resume:
        # Only now, when nothing can be wrong with weights and data any more, may an older run be given up.
        with replace_folder(folder) as place:
            (place / "checkpoints").mkdir()
        write_json(folder / "splits.json", data)
        write_json(folder / "environment.json", describe_environment())
    write_json(folder / "experiment.json", to_dict(experiment))  # a resumed run may have become longer

    task = SegmentationTask(channels_last(model), experiment)
    writer = RunWriter(task, folder)
    trainer = _make_trainer(experiment, writer, device)
    keep_freed_memory()
    with _readable_failures(trainer):
        state = last / TRAINER_STATE if resume else None
        trainer.fit(task, loaders[0], loaders[1], ckpt_path=state, weights_only=True)
    stopped = "all epochs done"
    if writer.out_of_time:
        stopped = "time limit reached"
    elif writer.history and writer.history[-1]["epoch"] < experiment.trainer.max_epochs:
        stopped = f"no better validation {experiment.trainer.monitor} for {experiment.trainer.patience} epochs"
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


def _check_folder(folder: Path, *, overwrite: bool) -> None:
    if (folder / "experiment.json").exists() and not overwrite:
        raise StorageError(
            f"{folder} holds a training run already", hint="continue it with --resume last, or replace it: --overwrite"
        )
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} is a file", hint="choose another output folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "checkpoints").is_dir():
        raise StorageError(
            f"{folder} holds files that are no training run; they would be lost", hint="choose another output folder"
        )


def _resumed(experiment: Experiment, folder: Path, data: dict[str, Any]) -> Experiment:
    try:
        before = from_dict(Experiment, json.loads((folder / "experiment.json").read_text("utf-8")))
        split_before = json.loads((folder / "splits.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no run to resume: {error}", hint="start it without --resume") from error
    if not (folder / "checkpoints" / "last" / TRAINER_STATE).is_file():
        raise CheckpointError(f"The run in {folder} has not finished an epoch yet", hint="start again with --overwrite")
    changed = {name: values for name, values in differences(before, experiment).items() if name not in LENGTH_FIELDS}
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
    return experiment


def _make_trainer(experiment: Experiment, writer: RunWriter, device: str) -> pl.Trainer:
    config = experiment.trainer
    place = resolve_device(device)
    callbacks = [
        Patience(writer.monitor, patience=config.patience, mode=writer.best_end, check_finite=True),
        EpochProgress(writer, config.max_epochs),
        writer,
    ]
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return pl.Trainer(
        accelerator="gpu" if place.type == "cuda" else place.type,
        devices=1 if place.index is None else [place.index],
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
        finally:
            # Lightning leaves Ctrl-C switched off behind it.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, interrupt_handler)
    if trainer.interrupted:
        raise KeyboardInterrupt


def write_history(history: list[Row], path: Path) -> None:
    """Write one CSV row an epoch; columns are the union over epochs."""
    columns = list(dict.fromkeys(name for row in history for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_text(path, buffer.getvalue())


def draw_curves(history: list[Row], best_epoch: int, path: Path) -> None:
    """Draw losses and validation Dice over epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    names = {
        "train_segmentation_loss": "training: segmentation",
        "val_segmentation_loss": "validation: segmentation",
        "train_alignment_excess": "training: alignment above its floor",
        "val_alignment_excess": "validation: alignment above its floor",
    }
    for name, label in names.items():
        if any(name in row for row in history):
            style = "--" if name.startswith("val") else "-"
            color = "tab:blue" if "segmentation" in name else "tab:orange"
            left.plot(epochs, [row.get(name, math.nan) for row in history], style, color=color, label=label)
    left.set(xlabel="epoch", ylabel="loss")
    for name, label in {"val_pooled_dice": "pooled", "val_per_case_dice": "per case"}.items():
        right.plot(epochs, [row[name] for row in history], label=label)
    right.axvline(best_epoch, color="0.7", zorder=0, label=f"best epoch: {best_epoch}")
    right.set(xlabel="epoch", ylabel="validation Dice", ylim=(0, 1))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_bytes(path, buffer.getvalue())
