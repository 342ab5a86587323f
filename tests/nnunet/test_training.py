from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tmca.config import Experiment, config_hash, from_dict
from tmca.data.manifest import Manifest
from tmca.errors import CheckpointError, ConfigError, DataError, StorageError, TMCAError, WeightsError
from tmca.evaluation.writing import read_run
from tmca.nnunet.training import fit


def _settings(program: Any) -> dict[str, Any]:
    """Return what the last training was told."""
    settings: dict[str, Any] = json.loads(program.calls_of("run_training_entry()")[-1]["environment"]["TMCA_NNUNET"])
    return settings


@pytest.mark.usefixtures("installed")
def test_a_run_folder_is_like_every_other(experiment: Any, phantoms: Manifest, tmp_path: Path):
    folder = tmp_path / "run"
    record = fit(experiment(), phantoms, folder, device="cpu")
    assert (record.folder, record.epochs, record.seconds, record.stopped) == (folder, 2, 14.5, "all epochs done")
    assert (record.best_epoch, record.best_score) == (1, 0.75)
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as stream:
        assert list(csv.DictReader(stream)) == [
            {"epoch": "1", "seconds": "10.5", "learning_rate": "0.01", "train_loss": "0.7", "val_loss": "0.6",
             "val_pseudo_dice": "0.75"},
            {"epoch": "2", "seconds": "14.5", "learning_rate": "0.005", "train_loss": "0.5", "val_loss": "0.4",
             "val_pseudo_dice": "0.5"},
        ]  # fmt: skip
    run = read_run(folder)
    assert (run["n_train"], run["epochs"], run["seconds"]) == (16, 2, 14.5)
    assert config_hash(from_dict(Experiment, run["experiment"])) == config_hash(experiment())
    environment = json.loads((folder / "environment.json").read_text("utf-8"))
    assert environment["packages"]["nnunetv2"] == "2.8.1"
    assert "tmca" in environment["packages"]
    splits = json.loads((folder / "splits.json").read_text("utf-8"))
    assert splits["hash"] == phantoms.content_hash()
    assert splits["val"] == [case.id for case in phantoms.split("val").records]


def test_nnunet_is_told_the_schedule(installed: Any, experiment: Any, phantoms: Manifest, tmp_path: Path):
    chosen = replace(experiment(epochs=7, trainer="nnUNetTrainerNoMirroring"), seed=5)
    fit(chosen, phantoms, tmp_path / "run", device="cpu")
    expected = {"trainer": "nnUNetTrainerNoMirroring", "epochs": 7, "iterations": 250, "seed": 5}
    assert _settings(installed) == expected
    (plan,) = installed.calls_of("plan_and_preprocess_entry()")
    assert plan["environment"]["nnUNet_n_proc_DA"] == "1"  # planning refuses to do with less
    (train,) = installed.calls_of("run_training_entry()")
    assert train["environment"]["nnUNet_n_proc_DA"] == "0"
    assert train["arguments"][2:] == [
        "001",
        "2d",
        "0",
        "-tr",
        "TMCATrainer",
        "-p",
        "nnUNetPlans",
        "--c",
        "-device",
        "cpu",
    ]


@pytest.mark.parametrize(("batch_size", "iterations"), [(None, 16 // 3), (5, 16 // 5), (100, 1)])
def test_an_epoch_may_be_one_look_at_the_training_images(
    installed: Any, experiment: Any, phantoms: Manifest, tmp_path: Path, batch_size: int | None, iterations: int
):
    fit(experiment(iterations=None, batch_size=batch_size), phantoms, tmp_path / "run", device="cpu")
    assert _settings(installed)["iterations"] == iterations
    (plans,) = (tmp_path / "run").rglob("nnUNetPlans.json")
    planned = json.loads(plans.read_text("utf-8"))["configurations"]["2d"]["batch_size"]
    assert planned == (batch_size or 3)


def test_a_share_of_the_training_images_is_the_share_of_the_other_methods(
    installed: Any, experiment: Any, phantoms: Manifest, tmp_path: Path
):
    chosen = experiment(iterations=None)
    chosen = replace(chosen, trainer=replace(chosen.trainer, train_fraction=0.5))
    fit(chosen, phantoms, tmp_path / "run", device="cpu")
    expected = [case.id for case in phantoms.split("train").fraction(0.5, chosen.seed).records]
    assert json.loads((tmp_path / "run" / "splits.json").read_text("utf-8"))["train"] == expected
    assert _settings(installed)["iterations"] == 8 // 3
    (labels,) = (tmp_path / "run").rglob("labelsTr")
    assert len(list(labels.iterdir())) == 8 + 6


def test_an_interrupted_run_goes_on_where_it_was(installed: Any, experiment: Any, phantoms: Manifest, tmp_path: Path):
    folder = tmp_path / "run"
    installed.fail("plan")
    with pytest.raises(TMCAError, match="could not plan: RuntimeError: no luck"):
        fit(experiment(), phantoms, folder, device="cpu")
    installed.fail("train")
    with pytest.raises(TMCAError, match="could not train"):
        fit(experiment(), phantoms, folder, device="cpu", resume=True)
    assert read_run(folder)["epochs"] == 2  # what was measured is there already
    installed.behave()
    fit(experiment(), phantoms, folder, device="cpu", resume=True)
    assert len(installed.calls_of("plan_and_preprocess_entry()")) == 2  # not again after it succeeded
    assert len(installed.calls_of("run_training_entry()")) == 2
    assert fit(experiment(), phantoms, folder, device="cpu", resume=True).epochs == 2
    assert len(installed.calls_of("run_training_entry()")) == 2  # it was finished


def test_a_run_is_resumed_as_it_was_started_only(installed: Any, experiment: Any, phantoms: Manifest, tmp_path: Path):
    folder = tmp_path / "run"
    with pytest.raises(CheckpointError, match="holds no run"):
        fit(experiment(), phantoms, folder, device="cpu", resume=True)
    fit(experiment(), phantoms, folder, device="cpu")
    with pytest.raises(ConfigError, match=r"model\.options"):
        fit(experiment(iterations=9), phantoms, folder, device="cpu", resume=True)
    with pytest.raises(DataError, match="not what the run"):
        fit(experiment(), phantoms.with_records(phantoms.records[1:]), folder, device="cpu", resume=True)
    assert len(installed.calls_of("run_training_entry()")) == 1


def test_what_is_in_the_folder_is_not_lost(installed: Any, experiment: Any, phantoms: Manifest, tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").touch()
    with pytest.raises(StorageError, match="no training run"):
        fit(experiment(), phantoms, folder, device="cpu", overwrite=True)
    (folder / "thesis.txt").unlink()
    fit(experiment(), phantoms, folder, device="cpu")
    with pytest.raises(StorageError, match="already"):
        fit(experiment(), phantoms, folder, device="cpu")
    damaged = phantoms.with_records(
        replace(case, image="gone.png") if case.split == "val" else case for case in phantoms.records
    )
    with pytest.raises(DataError, match="no image file"):
        fit(experiment(), damaged, folder, device="cpu", overwrite=True)
    assert read_run(folder)["epochs"] == 2
    fit(experiment(epochs=3), phantoms, folder, device="cpu", overwrite=True)
    assert read_run(folder)["experiment"]["trainer"]["max_epochs"] == 3
    assert len(installed.calls_of("run_training_entry()")) == 2


def test_without_an_engine_nothing_is_written(program: Any, experiment: Any, phantoms: Manifest, tmp_path: Path):
    with pytest.raises(WeightsError, match="tmca models install nnunet"):
        fit(experiment(), phantoms, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    assert not program.calls


def test_an_epoch_without_a_score_is_not_the_best(installed: Any, experiment: Any, phantoms: Manifest, tmp_path: Path):
    history = json.loads(json.dumps(installed.history))
    history["mean_fg_dice"] = [float("nan"), 0.25]
    installed.behave(FAKE_HISTORY=json.dumps(history))
    record = fit(experiment(), phantoms, tmp_path / "run", device="cpu")
    assert (record.best_epoch, record.best_score) == (2, 0.25)
