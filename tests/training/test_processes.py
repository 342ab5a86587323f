from __future__ import annotations

import csv
import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from tmca.config import Experiment
from tmca.data.loading import EpochSampler, Shard
from tmca.data.manifest import Manifest
from tmca.errors import ConfigError
from tmca.losses import ALONE
from tmca.training import fit
from tmca.training.processes import LAUNCHER_VARIABLES, ProcessLayout, current_group, starts_by_slurm

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
def joined(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """Return what each of two processes found: "rank-compiled" → case → values."""
    folder = tmp_path_factory.mktemp("joined")
    command = [sys.executable, str(JOINED)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(rank), "2", str(folder / "store"), str(folder)], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


@pytest.mark.parametrize("compiled", [False, True])
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
    joined: dict[str, dict[str, dict[str, torch.Tensor]]], script: ModuleType, case: str, compiled: bool
):
    alone = script.compute(0, 1, classes=not compiled)[case]
    assert bool(alone["alignment_loss"] > 0) == (case != "one sentence")
    for rank in range(2):
        found = joined[f"{rank}-{compiled}"][case]
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert alone["gradient of image.weight"].any() == (case != "one sentence")


def test_the_cases_above_are_those_of_the_script(script: ModuleType):
    marks = test_two_processes_have_the_loss_and_the_gradients_of_one.pytestmark  # type: ignore[attr-defined]
    (cases,) = (mark.args[1] for mark in marks if mark.args[0] == "case")
    assert set(script.CASES) == set(cases)


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


SRUN = {"SLURM_JOB_NAME": "train.sh", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2"}
SHELL = {"SLURM_JOB_NAME": "interactive", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "expected"),
    [
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, 1, 1, (5, 4, 2)),  # torchrun
        (SRUN | {"SLURM_PROCID": "3"}, 2, 2, (3, 2, 2)),
        (SRUN | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "SLURM_PROCID": "0"}, 1, 1, (1, 2, 1)),
        (SHELL | {"LOCAL_RANK": "1", "NODE_RANK": "0"}, 2, 1, (1, 2, 1)),  # Lightning's launcher in a shell of Slurm
        (SHELL | {"SLURM_JOB_NAME": "bash"}, 2, 1, (0, 2, 1)),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, 2, 1, (1, 2, 1)),  # Lightning's launcher
        ({"LOCAL_RANK": "1", "NODE_RANK": "1"}, 2, 2, (3, 2, 2)),
        (SHELL, 1, 1, (0, 1, 1)),
        (SRUN | {"SLURM_PROCID": "3"}, 1, 1, (0, 1, 1)),  # each task has a run of its own
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


@pytest.mark.parametrize(
    ("changed", "devices", "nodes", "named"),
    [
        ({"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": None}, 2, 1, "SLURM_NTASKS is 1"),  # sbatch without srun
        ({"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": None}, 2, 1, "SLURM_NTASKS_PER_NODE is not set"),
        ({}, 4, 1, "SLURM_NTASKS_PER_NODE is 2"),
        ({"SLURM_NNODES": "1"}, 2, 2, "SLURM_NNODES is 1"),
    ],
)
def test_tasks_of_slurm_that_are_not_the_processes_are_refused(
    changed: dict[str, str | None], devices: int, nodes: int, named: str, monkeypatch: pytest.MonkeyPatch
):
    for name, value in (SRUN | {"SLURM_PROCID": "0"} | changed).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{devices} processes on each of {nodes} nodes: {named}") as caught:
        ProcessLayout.of(devices, nodes)
    assert f"srun --nodes {nodes} --ntasks-per-node {devices} tmca train" in caught.value.hint


@pytest.mark.parametrize("name", [None, "train.sh", "bash", "interactive", "zsh"])
@pytest.mark.parametrize("tasks", [None, "1", "2"])
def test_slurm_is_seen_where_lightning_sees_it(tasks: str | None, name: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SLURMEnvironment, "_validate_srun_used", lambda: None)  # advice where srun is installed
    for variable, value in (("SLURM_NTASKS", tasks), ("SLURM_JOB_NAME", name)):
        if value is not None:
            monkeypatch.setenv(variable, value)
    assert starts_by_slurm() == SLURMEnvironment.detect()


def test_processes_that_lightning_does_not_join_are_refused(
    phantoms: Manifest, tiny_experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(pl.Trainer, "world_size", property(lambda _: 1))
    experiment = replace(tiny_experiment, trainer=replace(tiny_experiment.trainer, batch_size=8))
    with pytest.raises(ConfigError, match="This is process 0 of 2, but Lightning takes it for 0 of 1"):
        fit(experiment, phantoms, tmp_path / "run", device="cpu", devices=2)
    assert not (tmp_path / "run").exists()


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


def _start(
    manifest: Path, folder: Path, *options: str, variables: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tmca", "train", "tiny", "--data", str(manifest), "-o", str(folder)]
    command += ["--trainer.batch-size", "8", "--device", "cpu", *options]
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment |= {"OMP_NUM_THREADS": "2", **variables}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _end(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        out, error = process.communicate(timeout=240)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def _train(manifest: Path, folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return _end(_start(manifest, folder, *options, variables=variables))


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


SLURM_TASK = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NAME": "train.sh",
    "SLURM_NODELIST": "localhost",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


def test_a_slurm_job_without_srun_trains_on_no_half_of_the_data(phantoms: Manifest, tmp_path: Path):
    refused = _train(phantoms.root, tmp_path / "run", "--devices", "2", "--trainer.max-epochs", "1", **SLURM_TASK)
    assert refused.returncode == 2, refused.stderr
    assert "SLURM_NTASKS is 1 (start it with srun --nodes 1 --ntasks-per-node 2 tmca train …)" in refused.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_shell_in_a_slurm_job_starts_its_processes(phantoms: Manifest, tmp_path: Path):
    shell = SLURM_TASK | {"SLURM_JOB_NAME": "bash"}
    done = _train(phantoms.root, tmp_path / "run", "--devices", "2", "--trainer.max-epochs", "1", **shell)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Trained 1 epochs") == 1, done.stdout


@pytest.mark.slow
def test_the_tasks_of_srun_train_together(phantoms: Manifest, tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = SLURM_TASK | {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    options = ("--devices", "2", "--trainer.max-epochs", "1")
    tasks = [
        _start(phantoms.root, tmp_path / "run", *options, variables=job | {"SLURM_PROCID": n, "SLURM_LOCALID": n})
        for n in ("0", "1")
    ]
    first, second = [_end(task) for task in tasks]
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert (first.stdout.count("Trained 1 epochs"), second.stdout) == (1, "")
