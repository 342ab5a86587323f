from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from tmca import cli
from tmca.errors import ConfigError, DataError


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "report.txt"
    path.write_text("HISTORY: Cough.\nFINDINGS: Opacity in the right lower zone. The left lung is clear.\n", "utf-8")
    return path


def test_a_report_becomes_a_prompt(report: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.run(["report-to-prompt", str(report)]) == 0
    output = capsys.readouterr().out
    assert output.startswith("Unilateral pulmonary infection, lower left lung.\n")
    assert "«right lower zone»" in output


def test_flags_reach_the_rules(report: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.run(["report-to-prompt", str(report), "--sides", "image", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["prompt"] == "Unilateral pulmonary infection, lower right lung."
    assert values["facts"]["right"] == ["lower"]
    assert cli.run(["report-to-prompt", str(report), "--grammar", "polyp", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] is None


def test_standard_input_and_no_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"No polyps were seen.")))
    assert cli.run(["report-to-prompt", "-"]) == 0
    assert "the report names no finding" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "code"), [(b"", DataError.exit_code), (b"\xff\xfe", DataError.exit_code), ("肺".encode(), 3)]
)
def test_what_is_no_report_is_one_line(tmp_path: Path, content: bytes, code: int, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "report.txt"
    path.write_bytes(content)
    assert cli.run(["report-to-prompt", str(path)]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_language_model_that_is_none_is_refused(report: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.run(["report-to-prompt", str(report), "--language-model", "nowhere"]) == ConfigError.exit_code
    assert "neither an http address nor the folder of a model" in capsys.readouterr().err
