from __future__ import annotations

import csv
import functools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

from tmca.config import Experiment
from tmca.data.manifest import Manifest
from tmca.errors import TMCAError
from tmca.losses import Group
from tmca.training import compiling, fit
from tmca.training.compiling import Compiled, reason_of
from tmca.training.task import SegmentationTask

FORMS = ("tmca", "mask-pooled", "ariadne", "image-only")


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, float]]:
    """What ``compiled.py`` found."""
    command = [sys.executable, str(Path(__file__).parent / "compiled.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_one_graph_whatever_the_sentences_and_computes_the_same(
    compiled: dict[str, dict[str, float]], form: str
):
    assert compiled[form]["graphs"] == 1
    assert compiled[form]["loss"] < 1e-5
    assert compiled[form]["gradient"] < 1e-5


def _fit(experiment: Experiment, phantoms: Manifest, folder: Path, *, compile_it: bool) -> list[dict[str, float]]:
    trainer = replace(experiment.trainer, max_epochs=1, compile=compile_it)
    fit(replace(experiment, trainer=trainer), phantoms, folder, device="cpu")
    with (folder / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    return [{name: float(value) for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def plain(
    phantoms: Manifest, tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, float]]:
    """The history of a run that is not compiled."""
    return _fit(tiny_experiment, phantoms, tmp_path_factory.mktemp("plain") / "run", compile_it=False)


def test_what_cannot_be_compiled_runs_as_it_is(
    plain: list[dict[str, float]],
    phantoms: Manifest,
    tiny_experiment: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    calls = []

    def compile_nothing(*_: Any, **options: Any) -> Any:
        assert options == {"dynamic": False, "fullgraph": True}

        def fail(*_: Any, **__: Any) -> None:
            calls.append(1)
            raise TorchDynamoException("there is no compiler\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", compile_nothing)
    assert _fit(tiny_experiment, phantoms, tmp_path / "run", compile_it=True) == plain
    assert len(calls) == 1
    said = capsys.readouterr().err
    assert "note: the training step is compiled with the first batch" in said
    assert "warning: the training step cannot be compiled and runs as it is: there is no compiler\n" in said


def test_one_of_several_processes_does_not_go_another_way(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise BackendCompilerFailed("backend", ValueError("there is no compiler"), None)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    monkeypatch.setattr(compiling, "current_group", Group)
    with pytest.raises(TorchDynamoException) as caught:
        Compiled(lambda: None)()
    assert reason_of(caught.value) == "there is no compiler"


def test_what_is_no_single_graph_runs_as_it_is_and_nothing_runs_twice(capsys: pytest.CaptureFixture[str]):
    norm = torch.nn.BatchNorm1d(3)

    def step(values: torch.Tensor) -> torch.Tensor:
        normed = norm(values)
        return normed[normed[:, 0] > 0].sum()

    assert Compiled(step)(torch.randn(8, 3)).ndim == 0
    assert int(norm.num_batches_tracked) == 1
    assert "runs as it is" in capsys.readouterr().err


def test_a_run_may_be_resumed_compiled_or_not(
    phantoms: Manifest, tiny_experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    trainer = replace(tiny_experiment.trainer, max_epochs=1, compile=True)
    fit(replace(tiny_experiment, trainer=trainer), phantoms, tmp_path / "run", device="cpu")
    trainer = replace(trainer, max_epochs=2, compile=False)
    done = fit(replace(tiny_experiment, trainer=trainer), phantoms, tmp_path / "run", device="cpu", resume=True)
    assert done.epochs == 2


def test_a_training_step_is_compiled_and_validation_is_not(
    plain: list[dict[str, float]],
    phantoms: Manifest,
    tiny_experiment: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    modes = []

    def watch(function: Any, **_: Any) -> Any:
        @functools.wraps(function)
        def watched(model: Any, *arguments: Any) -> Any:
            modes.append(model.training)
            return function(model, *arguments)

        return watched

    monkeypatch.setattr(torch, "compile", watch)
    assert _fit(tiny_experiment, phantoms, tmp_path / "run", compile_it=True) == plain
    assert modes == [True] * (len(phantoms.split("train").records) // tiny_experiment.trainer.batch_size)


def test_a_backward_pass_that_cannot_be_compiled_ends_the_run_with_a_hint(
    phantoms: Manifest, tiny_experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise TorchDynamoException("no gradient of this")

    monkeypatch.setattr(SegmentationTask, "backward", fail)
    with pytest.raises(TMCAError, match="cannot be compiled: no gradient of this") as caught:
        fit(tiny_experiment, phantoms, tmp_path / "run", device="cpu")
    assert caught.value.hint == "set trainer.compile=false"
