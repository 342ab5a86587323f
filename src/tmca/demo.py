"""The whole story on drawn data: draw, train, evaluate, report, in a few minutes on two cores."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tmca.config import Experiment
from tmca.data.phantom import write_phantoms
from tmca.evaluation import Evaluation, evaluate
from tmca.evaluation.writing import write_evaluation
from tmca.files import write_json
from tmca.inference import Predictor
from tmca.presets import get_preset
from tmca.progress import make_progress, say
from tmca.report import write_report
from tmca.training import fit

COUNTS = {"train": 1600, "val": 100, "test": 200}


def run_demo(
    folder: Path, *, seed: int = 1, counts: dict[str, int] | None = None, experiment: Experiment | None = None
) -> tuple[Evaluation, dict[str, Any]]:
    """Draw phantoms, train a small TMCA on them, and score it with right and wrong sentences.

    Writes ``data/``, ``run/``, ``report.html``, ``overlays/``, ``metrics.csv``, ``summary.json`` and ``demo.json``.

    Args:
        folder: Where to; an earlier demo there is replaced.
        seed: Of drawing and training.
        counts: Images of each split.
        experiment: What to train instead of the preset ``demo``.

    Returns:
        The evaluation on the test phantoms, and the content of ``demo.json``.
    """
    counts = counts or COUNTS
    experiment = replace(experiment or get_preset("demo"), seed=seed)
    seconds = {}
    started = time.monotonic()
    total = sum(counts.values())
    say(f"Drawing {total} phantoms …")
    with make_progress() as progress:
        task = progress.add_task("Drawing phantoms", total=total)
        size = experiment.preprocessing.image_size
        manifest = write_phantoms(
            folder / "data", counts, size=size, seed=seed, progress=lambda done: progress.update(task, completed=done)
        )
    seconds["draw"] = time.monotonic() - started

    started = time.monotonic()
    say(f"Training a small TMCA on {counts['train']} of them …")
    run = folder / "run"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as decoded:
        fit(experiment, manifest, run, overwrite=True, cache=Path(decoded))
    seconds["train"] = time.monotonic() - started

    started = time.monotonic()
    say(f"Scoring it on {counts['test']} phantoms it has not seen …")
    predictor = Predictor.from_pretrained(run)
    evaluation = evaluate(predictor.model, manifest, "test", seed=seed)
    write_evaluation(evaluation, run, manifest, folder)
    write_report(evaluation, predictor, manifest, folder, model="TMCA demo")
    seconds["evaluate"] = time.monotonic() - started
    result = {
        "pooled_dice": {variant: evaluation.pooled(variant)["dice"] for variant in evaluation.counts},
        "per_case_dice": {variant: evaluation.per_case(variant)["dice"] for variant in evaluation.counts},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "run": str(run),
    }
    write_json(folder / "demo.json", result)
    return evaluation, result
