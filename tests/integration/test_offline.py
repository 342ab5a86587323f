"""Nothing but this machine is asked: training, scoring and predicting open no connection."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tmca import cli
from tmca.config import Experiment
from tmca.data.manifest import Manifest
from tmca.demo import run_demo
from tmca.evaluation import evaluate
from tmca.evaluation.writing import write_evaluation
from tmca.inference import Predictor
from tmca.presets import change
from tmca.report import write_report
from tmca.training import fit

LOOPBACK = ("127.0.0.1", "::1", "localhost", "", None)


@pytest.fixture(autouse=True)
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Block and record every connection that leaves this machine, and every look-up of a name."""
    for name in ("TMCA_OFFLINE", "HF_HUB_OFFLINE"):  # not needed: nothing is asked in the first place
        monkeypatch.delenv(name, raising=False)
    recorded: list[str] = []

    def guarded(function: Callable[..., Any], place: int) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            address = arguments[place]
            host = address[0] if isinstance(address, tuple) else address
            is_path = isinstance(address, str | bytes) and function.__name__.startswith("connect")
            if host not in LOOPBACK and not is_path:
                recorded.append(f"{function.__name__} {address}")
                raise OSError(f"the network is blocked in this test: {address}")
            return function(*arguments, **options)

        return call

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(getattr(socket.socket, name), 1))
    monkeypatch.setattr(socket, "getaddrinfo", guarded(socket.getaddrinfo, 0))
    monkeypatch.setattr(socket, "create_connection", guarded(socket.create_connection, 0))
    return recorded


def test_the_block_works(attempts: list[str]):
    with pytest.raises(OSError, match="blocked"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(OSError, match="blocked"):
        socket.getaddrinfo("example.org", 443)
    with socket.socket() as connection, pytest.raises(OSError, match="blocked"):
        connection.connect(("192.0.2.1", 80))
    assert len(attempts) == 3


def test_fit_evaluate_and_predict_ask_nobody(
    phantoms: Manifest, tiny_experiment: Experiment, tmp_path: Path, attempts: list[str]
):
    experiment = change(tiny_experiment, "tiny", trainer={"max_epochs": 1})
    fit(experiment, phantoms, tmp_path / "run")
    predictor = Predictor.from_pretrained(tmp_path / "run")
    evaluation = evaluate(predictor.model, phantoms)
    write_evaluation(evaluation, tmp_path / "run", phantoms, tmp_path / "out")
    write_report(evaluation, predictor, phantoms, tmp_path / "out", model="tiny", examples=1)
    predictor.set_image(phantoms.image_path(phantoms.records[0]))
    assert predictor.predict(phantoms.records[0].text).shape == (64, 64)
    assert attempts == []


def test_the_demo_asks_nobody(tiny_experiment: Experiment, tmp_path: Path, attempts: list[str]):
    experiment = change(tiny_experiment, "tiny", trainer={"max_epochs": 1})
    run_demo(tmp_path / "demo", counts={"train": 4, "val": 2, "test": 2}, experiment=experiment)
    assert attempts == []


def test_weights_that_are_missing_are_not_asked_for_offline(
    phantoms: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempts: list[str]
):
    for name in ("TMCA_OFFLINE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")  # so that what the command line sets is taken back
    arguments = ["train", "tmca", "--data", str(phantoms.root), "-o", str(tmp_path / "run"), "--offline", "-q"]
    assert cli.run([*arguments, "--model.image-encoder.weights", "nobody/no-such-model"]) == 5
    assert attempts == []
