from __future__ import annotations

import pytest

from tmca import cli
from tmca.nnunet import engine


def test_an_engine_is_installed_and_then_is_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    answers = iter([True, False])
    monkeypatch.setattr(engine, "install", lambda wheels: next(answers))  # noqa: ARG005
    assert cli.run(["models", "install", "nnunet"]) == 0
    assert f"nnU-Net {engine.VERSION} is installed: {engine.status().folder}" in capsys.readouterr().out
    assert cli.run(["models", "install", "nnunet"]) == 0
    assert f"nnU-Net {engine.VERSION} is installed already: " in capsys.readouterr().out


def test_an_engine_cannot_be_installed_offline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name in ("TMCA_OFFLINE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")  # so that what the command line sets is taken back
    assert cli.run(["models", "install", "nnunet", "--offline"]) == 5
    error = capsys.readouterr().err
    assert error.startswith("error: nnU-Net is not installed and offline mode is on")
    assert "--wheels FOLDER" in error


def test_an_unknown_engine_is_a_usage_error(capsys: pytest.CaptureFixture[str]):
    assert cli.run(["models", "install", "unet"]) == 2
    assert "nnunet" in capsys.readouterr().err
