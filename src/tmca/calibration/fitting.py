"""Fit a model's calibration: its logits on validation data, the file in its folder, the picture of what changed."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tmca.calibration import Calibration, LogitCounts, dice_errors, fit_calibration, reliability
from tmca.checkpoints import load_checkpoint, resolve_checkpoint
from tmca.data.loading import SegmentationDataset, make_loader
from tmca.data.manifest import Manifest
from tmca.devices import resolve_device
from tmca.errors import ConfigError
from tmca.files import write_bytes
from tmca.models import SegmentationModel
from tmca.models.operations import channels_last
from tmca.progress import track

DIAGRAM_FILE = "reliability.png"
FEW_CASES = 50


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration changed.

    Attributes:
        calibration: The fit.
        counts: Split → logits of its cases; the first split is the one that was fitted on.
    """

    calibration: Calibration
    counts: dict[str, LogitCounts]

    def rows(self) -> list[dict[str, str]]:
        """Return a row a split: calibration error before and after, and how far the estimated Dice is off.

        The Dice is estimated where something is marked, and only those cases count there. On the split that was fitted
        on each case is left out in turn.
        """
        found = []
        for split, counts in self.counts.items():
            off, spread = self._dice_off(split)
            marked = counts.marked()
            found.append(
                {
                    "split": split,
                    "cases": str(len(marked)),
                    "ECE before": f"{reliability(counts).error:.4f}",
                    "ECE after": f"{reliability(counts, self.calibration.temperature).error:.4f}",
                    "Dice estimate off by": "–" if math.isnan(off) else f"{off:.3f}",
                    "the mean off by": "–" if math.isnan(spread) else f"{spread:.3f}",
                }
            )
        return found

    def warnings(self) -> list[str]:
        """Return what speaks against this calibration, a sentence each."""
        found = []
        if self.calibration.cases < FEW_CASES:
            found.append(f"it was fitted on {self.calibration.cases} cases only")
        for split, counts in self.counts.items():
            before, after = (reliability(counts, by).error for by in (1.0, self.calibration.temperature))
            if round(after, 4) > round(before, 4):
                found.append(f"on {split} the probabilities were better without it")
            off, spread = self._dice_off(split)
            if round(off, 3) > round(spread, 3):
                found.append(f"on {split} the estimated Dice says less than the mean of all cases does")
        return found

    def _dice_off(self, split: str) -> tuple[float, float]:
        """Return how far the estimated Dice, and the mean, is off on average; NaN where nothing is marked."""
        counts = self.counts[split]
        marked = counts.marked()
        dice = counts.dice()[marked]
        if not len(dice):
            return math.nan, math.nan
        spread = float(np.abs(dice - dice.mean()).mean())
        if split == self.calibration.split and len(dice) > 1:
            return self.calibration.dice_error, spread * len(dice) / (len(dice) - 1)  # each left out in turn
        return float(np.abs(dice_errors(counts, self.calibration)[marked]).mean()), spread


def calibrate_model(
    model: str | Path, manifest: Manifest, split: str = "val", *, check: str | None = None, device: str = "auto"
) -> CalibrationReport:
    """Fit a model's calibration on one split, look at it on another, and write it into the model's folder.

    Args:
        model: Run folder or checkpoint folder.
        manifest: All splits.
        split: What to fit on; the model was not trained on it.
        check: What to look at, too; ``None`` takes ``test`` where the data has it.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        DataError: The split is empty, its files cannot be used, or there are too few cases.
        CheckpointError: The folder holds no usable checkpoint.
        StorageError: The calibration cannot be written.
    """
    folder = resolve_checkpoint(model)
    network = load_checkpoint(model)
    check = check or ("test" if "test" in manifest.splits else split)
    splits = dict.fromkeys([split, check])
    counts = {name: _count_logits(network, manifest, name, device) for name in splits}
    calibration = fit_calibration(counts[split], manifest.name, split)
    report = CalibrationReport(calibration, counts)
    draw_reliability(report, folder / DIAGRAM_FILE)
    calibration.write(folder)  # last, for it changes what the model predicts
    return report


@torch.inference_mode()
def _count_logits(model: SegmentationModel, manifest: Manifest, split: str, device: str) -> LogitCounts:
    experiment = model.experiment
    if experiment is None:
        raise ConfigError("This model does not know its preprocessing", hint="load it with from_pretrained")
    chosen = manifest.split(split)
    chosen.check(require_text=model.reads_text, require_mask=True)
    place = resolve_device(device)
    model = channels_last(model.to(place)).eval()
    loader = make_loader(SegmentationDataset(chosen, experiment.preprocessing), 16, training=False)
    parts = []
    for batch in track(loader, f"Looking at {split}", len(loader)):
        features = model.encode_image(batch.images.to(place, memory_format=torch.channels_last))
        logits = model.segment(features, model.encode_text(list(batch.texts))).mask_logits.float().flatten(1)
        parts.append(LogitCounts.of(logits.cpu().numpy(), batch.masks.flatten(1).numpy()))
    return LogitCounts.concatenate(parts)


def draw_reliability(report: CalibrationReport, path: Path) -> None:
    """Draw said against true probabilities, before and after, a panel a split."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(report.counts), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(report.counts), squeeze=False)[0]
    for axes, (split, counts) in zip(panels, report.counts.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=1)
        for name, temperature, style in (("before", 1.0, "o--"), ("after", report.calibration.temperature, "o-")):
            found = reliability(counts, temperature)
            axes.plot(found.said, found.true, style, markersize=4, label=f"{name}: ECE {found.error:.4f}")
        axes.set(title=f"{split}, {len(counts.inside)} cases", xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set(xlabel="probability that the model states", ylabel="share of these pixels that are true")
        axes.legend(loc="upper left", frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    write_bytes(path, stream.getvalue())
