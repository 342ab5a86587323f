from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tmca.config import Experiment
from tmca.data.loading import EpochSampler, Shard
from tmca.data.manifest import Manifest
from tmca.errors import ConfigError
from tmca.losses import ALONE
from tmca.training import fit
from tmca.training.processes import LAUNCHER_VARIABLES, ProcessLayout, current_group

JOINED = Path(__file__).parent / "joined.py"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("joined", JOINED)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Return what each of two processes found."""
    folder = tmp_path_factory.mktemp("joined")
    command = [sys.executable, str(JOINED)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(rank), "2", str(folder / "store"), str(folder)], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(
    "case",
    [
        "every image has a sentence",
        "identity targets",
        "unequally many sentences",
        "no sentence in the second process",
        "one sentence",
        "forms that are no mean over images",
    ],
)
def test_two_processes_have_the_loss_and_the_gradients_of_one(
    joined: list[dict[str, dict[str, torch.Tensor]]], script: ModuleType, case: str
):
    alone = script.compute(0, 1)[case]
    assert bool(alone["alignment_loss"] > 0) == (case != "one sentence")
    for found in joined:
        assert found[case].keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[case][name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert alone["gradient of image.weight"].any() == (case != "one sentence")


def test_the_cases_above_are_those_of_the_script(script: ModuleType):
    marks = test_two_processes_have_the_loss_and_the_gradients_of_one.pytestmark  # type: ignore[attr-defined]
    assert set(script.CASES) == set(marks[0].args[1])


# The share of a process ------------------------------------------------------------------------------------------


def _orders(size: int, processes: int, batch: int, **options: Any) -> list[list[list[int]]]:
    """Return process → batches of one epoch."""
    orders = []
    for rank in range(processes):
        sampler = EpochSampler(size, shuffle=True, seed=3, shard=Shard(rank, processes), **options)
        sampler.set_epoch(2)
        mine = list(sampler)
        assert len(mine) == len(sampler)
        orders.append([mine[start : start + batch] for start in range(0, len(mine), batch)])
    return orders


@pytest.mark.parametrize(("size", "processes", "share"), [(23, 2, 4), (24, 3, 2), (50, 4, 3)])
def test_the_processes_together_see_the_batches_of_one(size: int, processes: int, share: int):
    whole = processes * share
    one = _orders(size, 1, whole, multiple=whole)[0]
    many = _orders(size, processes, share, multiple=whole)
    assert len(one) == size // whole
    for number, batch in enumerate(one):
        assert sorted(case for order in many for case in order[number]) == sorted(batch)


def test_in_evaluation_every_case_is_seen_once():
    seen = [list(EpochSampler(11, shuffle=False, shard=Shard(rank, 4))) for rank in range(4)]
    assert sorted(case for cases in seen for case in cases) == list(range(11))


# Who a process is ------------------------------------------------------------------------------------------------


def test_a_process_alone():
    layout = ProcessLayout.of(1, 1)
    assert (layout.rank, layout.processes, layout.is_first) == (0, 1, True)
    assert current_group() is ALONE


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "expected"),
    [
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, 1, 1, (5, 4, 2)),  # torchrun
        ({"SLURM_PROCID": "3"}, 2, 2, (3, 2, 2)),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, 2, 1, (1, 2, 1)),  # Lightning's launcher
        ({"LOCAL_RANK": "1", "NODE_RANK": "1"}, 2, 2, (3, 2, 2)),
        ({"SLURM_PROCID": "0"}, 1, 1, (0, 1, 1)),  # a shell within a Slurm job
    ],
)
def test_the_launchers_tell_a_process_its_number(
    variables: dict[str, str],
    devices: int,
    nodes: int,
    expected: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    layout = ProcessLayout.of(devices, nodes)
    assert (layout.rank, layout.devices, layout.nodes) == expected


def test_impossible_layouts_are_refused():
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match="0 devices"):
        ProcessLayout.of(0, 1)
    two = ProcessLayout(devices=2)
    with pytest.raises(ConfigError, match="evenly") as caught:
        two.share_of_batch(7)
    assert "multiple of 2" in caught.value.hint
    with pytest.raises(ConfigError, match="do not fill"):
        two.check(cpu, batch_size=8, images=7, validation_images=8)
    with pytest.raises(ConfigError, match="cannot share cuda:1"):
        two.check(torch.device("cuda", 1), 8, 100, 8)
    if torch.cuda.device_count() < 2:
        with pytest.raises(ConfigError, match="devices were asked for"):
            two.check(torch.device("cuda"), 8, 100, 8)
    ProcessLayout().check(torch.device("mps"), 8, 1, 1)


def test_every_process_needs_an_image_to_validate_on():
    four, cpu = ProcessLayout(devices=2, nodes=2), torch.device("cpu")
    with pytest.raises(ConfigError, match="3 validation images cannot be shared out to 4 processes") as caught:
        four.check(cpu, 8, 100, 3)
    assert "--devices 1" in caught.value.hint
    four.check(cpu, 8, 100, 4)
    ProcessLayout().check(cpu, 8, 100, 1)


def test_training_refuses_more_processes_than_validation_images(phantoms: Manifest, tmp_path: Path):
    one = phantoms.with_records([*phantoms.split("train").records, phantoms.split("val").records[0]])
    one.write(tmp_path / "one.csv")
    refused = _train(tmp_path / "one.csv", tmp_path / "run", "--devices", "2", "--trainer.max-epochs", "1")
    assert refused.returncode == 2, refused.stderr
    assert "1 validation images cannot be shared out to 2 processes (use --devices 1, or" in refused.stderr
    assert not (tmp_path / "run").exists()


# The whole run ---------------------------------------------------------------------------------------------------


def _train(manifest: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tmca", "train", "tiny", "--data", str(manifest), "-o", str(folder)]
    command += ["--trainer.batch-size", "8", "--device", "cpu", *options]
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return subprocess.run(
        command, env=environment | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=240, check=False
    )


def _rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as stream:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]


def test_a_run_of_two_processes_is_a_run_and_is_resumed(
    phantoms: Manifest, tiny_experiment: Experiment, tmp_path: Path
):
    together, alone = tmp_path / "together", tmp_path / "alone"
    done = _train(phantoms.root, together, "--devices", "2", "--trainer.max-epochs", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Trained 1 epochs") == 1, done.stdout
    assert done.stderr.count("epoch   1 of 1") == 1, done.stderr
    assert "Warning" not in done.stderr
    trainer = replace(tiny_experiment.trainer, batch_size=8, max_epochs=1)
    fit(replace(tiny_experiment, trainer=trainer), phantoms, alone, device="cpu")
    ours, theirs = _rows(together)[0], _rows(alone)[0]
    assert ours.keys() == theirs.keys()
    # On a CPU each process has its own BatchNorm statistics, so that the runs are alike, not equal.
    for name in ("train_alignment_loss", "train_segmentation_loss", "val_segmentation_loss"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.1), name
    assert json.loads((together / "splits.json").read_text()) == json.loads((alone / "splits.json").read_text())
    resumed = _train(phantoms.root, together, "--devices", "1", "--trainer.max-epochs", "2", "--resume", "last")
    assert resumed.returncode == 0, resumed.stderr
    assert [row["epoch"] for row in _rows(together)] == [1, 2]
