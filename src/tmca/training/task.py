"""Model, losses and optimiser joined for Lightning; the average of the weights."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tmca.config import Experiment, ObjectiveConfig
from tmca.errors import TMCAError
from tmca.losses import ALONE, Group, objective
from tmca.metrics import Counts, confusion_counts, per_case_mean, pooled_scores
from tmca.models import SegmentationModel
from tmca.training.compiling import Compiled
from tmca.training.processes import current_group, join_objects
from tmca.types import Batch, TextFeatures

MONITORS: dict[str, tuple[str, Literal["min", "max"]]] = {
    "loss": ("val_segmentation_loss", "min"),
    "dice": ("val_per_case_dice", "max"),
}
"""``trainer.monitor`` → the column of a run's ``metrics.csv`` that chooses the best epoch, and which end is best."""


def compute_losses(
    model: SegmentationModel,
    images: Float[Tensor, "batch 3 height width"],
    text: TextFeatures | None,
    masks: Bool[Tensor, "batch 1 height width"],
    config: ObjectiveConfig,
    group: Group = ALONE,
) -> tuple[dict[str, Tensor], Float[Tensor, "batch 1 height width"]]:
    """Return the losses by name and the mask logits of a batch whose sentences are encoded: what may be compiled."""
    output = model.segment(model.encode_image(images), text)
    return objective(output, masks, config, group), output.mask_logits


class LossCheck:
    """Whether a loss is a number, asked of a GPU now and read later without waiting for what it was given since.

    Args:
        loss: A scalar without gradient.
    """

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss
        self._finite = torch.isfinite(loss).to("cpu", non_blocking=loss.is_cuda)
        self._copied = torch.cuda.Event() if loss.is_cuda else None  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record()

    def is_finite(self) -> bool:
        """Return the answer, after the loss and its copy are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._finite)


class SegmentationTask(pl.LightningModule):
    """Model, losses and optimiser joined for Lightning; one step serves training and validation."""

    def __init__(self, model: SegmentationModel, experiment: Experiment) -> None:
        super().__init__()
        self.model = model
        self.experiment = experiment
        self.strict_loading = False
        self.average = averaged_copy(model) if experiment.optimiser.average_decay is not None else None
        self._counts: list[Counts] = []
        self._last_loss: LossCheck | None = None
        self._compute_training_losses = Compiled(compute_losses) if experiment.trainer.compile else compute_losses

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:  # noqa: ARG002
        """Copy a batch to a GPU while it computes; Lightning by itself waits for what is no bare tensor."""
        return batch.to(device, non_blocking=device.type == "cuda")

    @property
    def kept(self) -> SegmentationModel:
        """The model that is validated and kept as best: the average of the weights, or the model itself."""
        return self.model if self.average is None else self.average

    def shared_step(
        self, model: SegmentationModel, batch: Batch, group: Group = ALONE
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the losses by name and the mask logits of a batch."""
        images = batch.images.contiguous(memory_format=torch.channels_last)
        # Encoded even if no image of this process has a sentence: every process must take part in the same operations.
        text = None if model.text_encoder is None else model.text_encoder.encode(batch.texts)
        compute = self._compute_training_losses if model.training else compute_losses
        losses, mask_logits = compute(model, images, text, batch.masks, self.experiment.objective, group)
        self._check_last_loss(LossCheck(losses["loss"].detach()))
        return losses, mask_logits

    def _check_last_loss(self, check: LossCheck | None = None) -> None:
        """Stop if the loss of the step before was no number: a step late, so that nobody waits for a GPU's last one."""
        last, self._last_loss = self._last_loss, check
        if last is not None and not last.is_finite():
            raise TMCAError(
                f"The loss became {float(last.loss)} in epoch {self.current_epoch + 1}",
                hint="lower optimiser.learning_rate, set optimiser.gradient_clip, or use trainer.precision=32",
            )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Seed dropout by (seed, epoch, batch), so that a resumed run draws what an uninterrupted one would."""
        others = (self.global_rank,) if self.global_rank else ()
        sequence = np.random.SeedSequence((self.experiment.seed, self.current_epoch, batch_idx, *others))
        torch.manual_seed(int(sequence.generate_state(1)[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the loss of a training batch."""
        losses, _ = self.shared_step(self.model, batch, current_group())
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
        """Check the loss of the epoch's last step and forget the counts of the epoch before."""
        self._check_last_loss()
        self._counts = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Log the losses and count the pixels of a validation batch."""
        losses, mask_logits = self.shared_step(self.kept, batch)
        self._log(losses, "val", batch.batch_size)
        self._counts.append(confusion_counts(mask_logits > 0, batch.masks))

    def on_validation_epoch_end(self) -> None:
        """Log pooled and per-case Dice of the validation split."""
        self._check_last_loss()
        counts = Counts.concatenate(join_objects(self._counts))
        scores = {"pooled": pooled_scores(counts)["dice"], "per_case": per_case_mean(counts)["dice"]}
        self.log_dict({f"val_{name}_dice": value for name, value in scores.items()}, sync_dist=self._is_joined)

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        """Return AdamW and its schedule: by plateau, stepped every epoch, or a cosine, stepped every batch."""
        config = self.experiment.optimiser
        pretrained = self.experiment.model.image_encoder.weights != "none"
        encoder = [value for value in self.model.pretrained_parameters() if value.requires_grad]
        chosen = {id(value) for value in encoder}
        others = [value for value in self.model.parameters() if value.requires_grad and id(value) not in chosen]
        groups = [
            {"params": encoder, "lr": config.learning_rate * (config.encoder_factor if pretrained else 1.0)},
            {"params": others, "lr": config.learning_rate},
        ]
        groups = [group for group in groups if group["params"]]
        optimiser = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
        floor = config.min_learning_rate / config.learning_rate
        scheduler: torch.optim.lr_scheduler.LRScheduler
        if config.schedule == "plateau":
            lowest = [group["lr"] * floor for group in optimiser.param_groups]
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimiser, "min", patience=config.plateau_patience, min_lr=lowest
            )
            return {"optimizer": optimiser, "lr_scheduler": {"scheduler": scheduler, "monitor": MONITORS["loss"][0]}}
        steps = int(self.trainer.estimated_stepping_batches) / self.experiment.trainer.max_epochs
        restarts = config.schedule == "restarts"
        epochs = config.restart_epochs if restarts else config.schedule_epochs or self.experiment.trainer.max_epochs
        total = max(1, int(steps * epochs))

        def factor(step: int) -> float:
            return learning_rate_factor(step, total, config.warmup_steps, floor, restarts=restarts)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:  # noqa: ANN401
        """Leave a plateau to :meth:`on_train_epoch_end`: Lightning comes after the state of the epoch was written."""
        if not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            super().lr_scheduler_step(scheduler, metric)

    def on_train_epoch_end(self) -> None:
        """Let a schedule by plateau see the validation loss; validation has run by now."""
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step(float(self.trainer.callback_metrics[MONITORS["loss"][0]]))

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
        self.log_dict(named, on_step=False, on_epoch=True, batch_size=batch_size, sync_dist=self._is_joined)

    @property
    def _is_joined(self) -> bool:
        return self.trainer.world_size > 1


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
    before = trained_state(average)
    means = {name: value for name, value in before.items() if value.is_floating_point()}
    torch._foreach_lerp_(list(means.values()), [now[name] for name in means], 1 - decay)
    for name, value in before.items():
        if name not in means:
            value.copy_(now[name])


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
