from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tmca.data.cache import decode
from tmca.data.manifest import Manifest
from tmca.errors import CheckpointError, TMCAError
from tmca.evaluation.writing import write_evaluation, write_ledger
from tmca.files import sha256_of
from tmca.nnunet.evaluation import evaluate, predict, weights_hash
from tmca.nnunet.training import fit


@pytest.fixture
def run(installed: Any, experiment: Any, phantoms: Manifest, tmp_path: Path) -> Path:  # noqa: ARG001
    """Return a finished run of the stand-in, whose masks are where red is bright."""
    return fit(experiment(), phantoms, tmp_path / "run", device="cpu").folder


def test_masks_are_those_of_the_records(run: Path, phantoms: Manifest):
    masks = predict(run, phantoms.split("test"), device="cpu")
    assert list(masks) == [record.id for record in phantoms.split("test").records]
    for record in phantoms.split("test").records:
        np.testing.assert_array_equal(masks[record.id], decode(phantoms, record, 32)[0] > 127)


def test_scores_are_in_the_protocol_of_the_others(run: Path, phantoms: Manifest):
    evaluation = evaluate(run, phantoms, device="cpu", surface_tolerance=2.0)
    planes = np.stack([decode(phantoms, record, 32) for record in phantoms.split("test").records])
    predicted, truth = planes[:, 0] > 127, planes[:, 3] > 0
    hits = (predicted & truth).sum((1, 2))
    np.testing.assert_array_equal(evaluation.counts["right"].true_positive, hits)
    assert 0 < hits.sum() < truth.sum()
    assert evaluation.pooled()["dice"] == pytest.approx(2 * hits.sum() / (predicted.sum() + truth.sum()))
    assert (evaluation.compared_at, evaluation.threshold, evaluation.text_ablation()) == ("32", 0.5, {})
    assert evaluation.surface is not None
    assert evaluation.seconds > 0


def test_another_split_and_size_can_be_scored(run: Path, phantoms: Manifest):
    evaluation = evaluate(run, phantoms, "val", space="original", device="cpu")
    assert len(evaluation.ids) == 6
    counts = evaluation.counts["right"]
    pixels = counts.true_positive + counts.false_positive + counts.false_negative + counts.true_negative
    assert set(pixels.tolist()) == {64 * 64}
    assert sorted(path.name for path in (run / "nnunet").glob("predictions-*")) == ["predictions-val"]


def test_a_ledger_entry_is_written_from_the_run_folder(run: Path, phantoms: Manifest, tmp_path: Path):
    evaluation = evaluate(run, phantoms, device="cpu")
    write_evaluation(evaluation, run, phantoms, tmp_path / "scores", model_sha256=weights_hash(run))
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text("utf-8"))
    (weights,) = run.rglob("checkpoint_final.pth")
    assert summary["model_sha256"] == sha256_of(weights)
    assert summary["experiment"]["model"]["method"] == "nnunet"
    write_ledger(evaluation, run, phantoms, "phantoms", tmp_path / "results" / "a.json")
    entry = json.loads((tmp_path / "results" / "a.json").read_text("utf-8"))
    assert (entry["preset"], entry["n"], entry["n_train"], entry["epochs"], entry["seconds"]) == (
        "nnunet", 8, 16, 2, 14.5,
    )  # fmt: skip
    assert entry["metrics"]["pooled"] == evaluation.pooled()
    with (tmp_path / "results" / "a.csv").open(encoding="utf-8", newline="") as stream:
        assert [row["id"] for row in csv.DictReader(stream)] == list(evaluation.ids)


def test_old_predictions_do_not_stay(run: Path, phantoms: Manifest, installed: Any):
    evaluate(run, phantoms, device="cpu")
    installed.behave(FAKE_OMITS="1")
    with pytest.raises(TMCAError, match="wrote no mask for 'test-00000'"):
        evaluate(run, phantoms, device="cpu")


def test_the_trainer_it_was_trained_by_is_named(run: Path, phantoms: Manifest, installed: Any):
    predict(run, phantoms.split("test"), device="cpu")
    (call,) = installed.calls_of("predict_entry_point()")
    assert json.loads(call["environment"]["TMCA_NNUNET"]) == {"trainer": "nnUNetTrainer"}


def test_an_unfinished_run_cannot_predict(run: Path, phantoms: Manifest):
    next(run.rglob("checkpoint_final.pth")).unlink()
    with pytest.raises(CheckpointError, match="not finished its training"):
        evaluate(run, phantoms, device="cpu")
    with pytest.raises(CheckpointError, match="holds no run"):
        evaluate(run / "nnunet", phantoms, device="cpu")
