"""What a run writes at the end of every epoch: history, curves, checkpoints; and what it prints."""

from __future__ import annotations

import csv
import io
import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping
from rich.progress import TaskID

from tmca.checkpoints import write_checkpoint
from tmca.files import replace_folder, write_bytes, write_text
from tmca.progress import make_progress, say
from tmca.training.task import MONITORS, SegmentationTask

Row = dict[str, float | int]
"""What a run's ``metrics.csv`` says of one epoch."""

TRAINER_STATE = "trainer_state.ckpt"


def finished_epochs(state: Path) -> int:
    """Return how many epochs a run had finished when it wrote its trainer's state."""
    return int(torch.load(state, map_location="meta", weights_only=True)["epoch"]) + 1


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

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Train no further where the time had run out."""
        self._stop_out_of_time(trainer)

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
        self._stop_out_of_time(trainer)
        self._write(trainer, is_best=is_best)

    def _stop_out_of_time(self, trainer: pl.Trainer) -> None:
        limit = self.task.experiment.trainer.max_train_seconds
        over = limit is not None and self.seconds >= limit
        if trainer.strategy.reduce_boolean_decision(over, all=False):
            self.out_of_time = True
            trainer.fit_loop.min_epochs = None
            trainer.should_stop = True

    def _write(self, trainer: pl.Trainer, *, is_best: bool) -> None:
        checkpoints = self.folder / "checkpoints"
        last, best = checkpoints / "last", checkpoints / "best"
        scores = {name: value for name, value in self.history[-1].items() if name.endswith("_dice")}
        if not trainer.is_global_zero:
            trainer.save_checkpoint(last / TRAINER_STATE)  # takes part, and writes nothing
            return
        # The best first: interrupted between the two, the epoch is repeated, and not taken for kept.
        if is_best:
            with replace_folder(best) as place:
                write_checkpoint(self.task.kept, self.task.experiment, place, metrics=scores, link_from=last)
        with replace_folder(last) as place:
            write_checkpoint(self.task.model, self.task.experiment, place, metrics=scores, link_from=best)
            trainer.save_checkpoint(place / TRAINER_STATE)
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
    """Early stopping whose patience may be changed when a run is resumed.

    Before ``min_epochs`` it only counts. A run that it has ended stays ended when it is resumed, unless the patience
    has become longer.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Train no further where patience had run out."""
        if self.wait_count >= self.patience and trainer.current_epoch >= (trainer.min_epochs or 0):
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count; Lightning would remember a stop of before ``min_epochs`` and stop there whatever came between."""
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.current_epoch + 1 < (trainer.min_epochs or 0):
            trainer.should_stop = False

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
