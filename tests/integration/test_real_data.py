"""From published images and sentences to masks, small; skipped where the datasets are not there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tmca.config import Experiment
from tmca.data.layouts import open_dataset
from tmca.data.manifest import Manifest
from tmca.evaluation import evaluate
from tmca.evaluation.writing import write_evaluation
from tmca.imaging.raster import image_size
from tmca.inference import Predictor
from tmca.presets import change, get_preset
from tmca.training import fit


def _part(manifest: Manifest, **counts: int) -> Manifest:
    """The first cases of each split."""
    chosen = [record for split, count in counts.items() for record in manifest.split(split).records[:count]]
    return manifest.with_records(chosen)


def _mobile(weights: Path) -> Experiment:
    preset = get_preset("kvasir-mobile")
    encoder = preset.model.image_encoder
    return change(
        preset,
        "kvasir-mobile-small",
        preprocessing={"image_size": 96},
        model={"image_encoder": type(encoder)(weights=str(weights), architecture=encoder.architecture)},
        trainer={"batch_size": 8, "max_epochs": 1, "min_epochs": 1},
    )


def test_polyps_with_a_pretrained_encoder(shared: Path, tmp_path: Path):
    weights = shared / "weights" / "mobilenet-v2-imagenet"
    if not (weights / "model.safetensors").is_file():
        pytest.skip(f"there are no weights in {weights}")
    data = _part(open_dataset(shared / "data" / "kvasir_polyp"), train=24, val=8, test=8)
    record = fit(_mobile(weights), data, tmp_path / "run")
    assert (record.epochs, record.best_epoch) == (1, 1)
    assert math.isfinite(record.best_score)
    preprocessing = json.loads((tmp_path / "run" / "experiment.json").read_text("utf-8"))["preprocessing"]
    assert preprocessing["normalisation"] == "fixed"  # resolved from the encoder's own
    expected = json.loads((weights / "preprocessor_config.json").read_text("utf-8"))
    assert preprocessing["mean"] == pytest.approx(expected["image_mean"])

    predictor = Predictor.from_pretrained(tmp_path / "run", "cpu")
    evaluation = evaluate(predictor.model, data, space="original", threshold=0.3)
    assert len(evaluation.ids) == 8
    assert list(evaluation.counts) == ["right", "shuffled", "contradictory", "none"]
    write_evaluation(evaluation, tmp_path / "run", data, tmp_path / "out")
    case = data.split("test").records[0]
    predictor.set_image(data.image_path(case))
    probability = predictor.probability(case.text)
    assert probability.shape == image_size(data.image_path(case))
    assert np.isfinite(probability).all()
    predicted = predictor.predict(case.text, threshold=0.3)
    counts = evaluation.counts["right"]
    assert predicted.sum() == counts.true_positive[0] + counts.false_positive[0]


def test_chest_films(shared: Path, tmp_path: Path):
    data = _part(open_dataset(shared / "data" / "qata_cov19"), train=120, val=40, test=40)
    assert len(data.records) == 200
    assert all(record.text for record in data.records)
    experiment = change(
        get_preset("tiny"),
        "qata-small",
        augmentation={"mirror_probability": 0.5},
        trainer={"batch_size": 8, "evaluation_batch_size": 8, "max_epochs": 2},
    )
    record = fit(experiment, data, tmp_path / "run")
    rows = (tmp_path / "run" / "metrics.csv").read_text("utf-8").splitlines()
    assert len(rows) == 3
    names = rows[0].split(",")
    losses = [float(row.split(",")[names.index("train_segmentation_loss")]) for row in rows[1:]]
    assert losses[1] < losses[0]
    predictor = Predictor.from_pretrained(record.folder, "cpu")
    evaluation = evaluate(predictor.model, data, threshold=0.3)
    assert evaluation.pooled()["dice"] > 0.1
    assert len(evaluation.cases["contradictory"]) > 30
    assert evaluation.over_limit == ()
