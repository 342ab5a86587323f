"""The real nnU-Net: installed, planned, trained, predicted with, scored."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tmca.config import Experiment
from tmca.data.manifest import Manifest
from tmca.errors import WeightsError
from tmca.evaluation.writing import write_ledger
from tmca.nnunet import engine
from tmca.nnunet.evaluation import evaluate
from tmca.nnunet.training import fit
from tmca.presets import change, get_preset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def _installed():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        try:
            engine.install()
        except WeightsError as error:
            pytest.skip(str(error))
        yield


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    """Return eight epochs of five batches of eight."""
    options = {"iterations": 5, "batch_size": 8}
    sections = {"model": {"options": options}, "trainer": {"max_epochs": 8}}
    return change(get_preset("nnunet"), "nnunet", preprocessing={"image_size": 64}, **sections)


@pytest.mark.usefixtures("_installed")
def test_nnunet_learns_and_its_score_is_recorded(
    phantoms: Manifest, experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    record = fit(experiment, phantoms, tmp_path / "run", device="cpu")
    assert record.epochs == 8
    assert "epoch   8 of 8" in capsys.readouterr().err
    with (tmp_path / "run" / "metrics.csv").open(encoding="utf-8", newline="") as stream:
        losses = [float(row["train_loss"]) for row in csv.DictReader(stream)]
    assert losses[-1] < losses[0] - 0.3
    evaluation = evaluate(tmp_path / "run", phantoms, device="cpu")
    print(f"pooled {evaluation.pooled()}, per case {evaluation.per_case()}")  # noqa: T201
    assert evaluation.pooled()["dice"] > 0.4
    write_ledger(evaluation, tmp_path / "run", phantoms, "phantoms", tmp_path / "results" / "a.json")
    entry = json.loads((tmp_path / "results" / "a.json").read_text("utf-8"))
    assert entry["experiment"]["model"]["method"] == "nnunet"
    assert entry["metrics"]["space"] == "64"


@pytest.mark.usefixtures("_installed")
def test_an_interrupted_training_gives_the_numbers_of_one_that_was_not(
    phantoms: Manifest, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    short = replace(experiment, trainer=replace(experiment.trainer, max_epochs=3))

    def interrupt(message: str) -> None:
        if "epoch   2" in message:
            raise KeyboardInterrupt

    histories = []
    for is_interrupted in (False, True):
        folder = tmp_path / str(is_interrupted)
        if is_interrupted:
            monkeypatch.setattr(engine, "say", interrupt)
            with pytest.raises(KeyboardInterrupt):
                fit(short, phantoms, folder, device="cpu")
            monkeypatch.undo()
        fit(short, phantoms, folder, device="cpu", resume=is_interrupted)
        with (folder / "metrics.csv").open(encoding="utf-8", newline="") as stream:
            histories.append([row | {"seconds": ""} for row in csv.DictReader(stream)])
    assert len(histories[0]) == 3
    assert histories[0] == histories[1]
