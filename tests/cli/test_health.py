from __future__ import annotations

import json
from pathlib import Path

import pytest

from tmca import cli, health

SECRETS = {"TMCA_API_KEYS": "secret", "HTTPS_PROXY": "http://anna:secret@proxy:3128", "HF_TOKEN": "secret"}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMCA_OFFLINE", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", *cli.NO_TELEMETRY):
        monkeypatch.setenv(name, "")  # so that what the command line sets is taken back
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def test_info_is_one_json_object(capsys: pytest.CaptureFixture[str]):
    assert cli.run(["info", "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["schema_version"] == 1
    assert facts["environment"]["HTTPS_PROXY"] == "http://***@proxy:3128"
    assert "secret" not in captured.out
    assert captured.err == ""


def test_info_is_a_table_for_people(capsys: pytest.CaptureFixture[str]):
    assert cli.run(["info"]) == 0
    out = capsys.readouterr().out
    assert "secret" not in out
    for name in ("tmca", "Python", "PyTorch", "extras", "processor", "offline", "pretrained", "folders", "environment"):
        assert any(line.startswith(name) for line in out.splitlines()), name
    assert "microsoft/BiomedVLP-CXR-BERT-specialized: not here" in out
    assert max(map(len, out.splitlines())) < 200


def test_doctor_says_that_tmca_is_ready(capsys: pytest.CaptureFixture[str]):
    assert cli.run(["doctor", "-d", "cpu"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[-1].startswith("tmca is ready.")
    assert any(line.startswith("ok      self-test") for line in lines)
    assert {line[:8].strip() for line in lines[:-1]} <= {"ok", "warning", ""}
    assert "secret" not in captured.out
    assert captured.err == ""


def test_doctor_fails_with_the_next_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TMCA_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(health, "run_self_test", lambda _: ([0.4, 1.0], "cpu"))
    assert cli.run(["doctor"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: 2 problems found")
    lines = captured.out.splitlines()
    for position, line in enumerate(lines):
        if line.startswith("problem"):
            assert lines[position + 1].lstrip().startswith("→ ")


def test_offline_is_said(capsys: pytest.CaptureFixture[str]):
    assert cli.run(["info", "--json", "--offline"]) == 0
    assert json.loads(capsys.readouterr().out)["offline"] is True
