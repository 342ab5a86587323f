from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tmca.config import to_dict
from tmca.errors import CheckpointError, ConfigError
from tmca.nnunet.workspace import (
    NnunetOptions,
    Workspace,
    device_flag,
    exported_size,
    is_nnunet_run,
    nnunet_options,
    processes,
    read_nnunet_run,
)
from tmca.presets import change, get_preset


def test_the_options_are_nnunets_own_by_default(experiment: Any):
    assert nnunet_options(experiment()) == NnunetOptions("nnUNetTrainer", 250, None, True)
    assert exported_size(experiment()) == 32
    assert exported_size(experiment(resize=False)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainer": "nnUNetTrainer_5epochs"}, "trainer.max_epochs"),
        ({"trainer": "nnUNetTrainer_1epoch"}, "trainer.max_epochs"),
        ({"trainer": "Trainer"}, "expected a trainer of nnU-Net"),
        ({"iterations": 0}, "iterations is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"iteration": 5}, "did you mean 'iterations'"),
        ({"resize": "no"}, "expected bool"),
    ],
)
def test_impossible_options_are_refused(experiment: Any, options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        nnunet_options(experiment(**options))


def test_it_reads_no_sentences(experiment: Any):
    with pytest.raises(ConfigError, match="sees the image alone"):
        nnunet_options(change(experiment(), "guided", model={"guidance": True}))


def test_everything_lies_in_the_run_folder(tmp_path: Path):
    workspace = Workspace(tmp_path)
    variables = workspace.variables("cpu", seed=3, trainer="a")
    for name in ("raw", "preprocessed", "results"):
        assert variables[f"nnUNet_{name}"] == str(tmp_path / "nnunet" / name)
    assert json.loads(variables["TMCA_NNUNET"]) == {"seed": 3, "trainer": "a"}
    for path in (workspace.plans, workspace.weights, workspace.trained, workspace.log):
        assert path.is_relative_to(tmp_path)


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [("cuda", "", None), ("cuda:1", "", "1"), ("cuda:1", "4,7", "7"), ("cpu", "4,7", None)],
)
def test_the_card_is_named_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, visible: str, expected: str | None
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    variables = Workspace(tmp_path).variables(device)
    assert variables.get("CUDA_VISIBLE_DEVICES") == expected
    assert device_flag(device) == ["-device", device.partition(":")[0]]
    assert variables.get("nnUNet_n_proc_DA") == ("0" if device == "cpu" else None)


@pytest.mark.parametrize(
    ("threads", "most", "expected"), [("3", 8, 3), ("3", 2, 2), ("4,2", 8, 6), ("", 8, 6), ("64", 8, 8)]
)
def test_no_more_processes_than_cores(monkeypatch: pytest.MonkeyPatch, threads: str, most: int, expected: int):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert processes(most) == expected


def test_a_run_of_nnunet_is_told_from_others(experiment: Any, tmp_path: Path):
    with pytest.raises(CheckpointError, match="holds no run"):
        read_nnunet_run(tmp_path)
    (tmp_path / "splits.json").write_text("{}", encoding="utf-8")
    for chosen, is_ours in ((experiment(), True), (get_preset("tiny"), False)):
        (tmp_path / "experiment.json").write_text(json.dumps(to_dict(chosen)), encoding="utf-8")
        assert is_nnunet_run(tmp_path) is is_ours
    with pytest.raises(CheckpointError, match="a run of tmca, not of nnU-Net"):
        read_nnunet_run(tmp_path)
    (tmp_path / "experiment.json").write_text('{"model": {"no_such_field": 1}}', encoding="utf-8")
    assert not is_nnunet_run(tmp_path)
