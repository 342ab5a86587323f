"""Every row of every table of the paper, at the smoke scale. ``slow``: about ten minutes on two cores."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tmca.cli import run
from tmca.errors import PartialFailureError
from tmca.nnunet.engine import status
from tmca.reproduction.ledger import Ledger
from tmca.reproduction.tables import TABLES


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_row_of_every_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folders = [f"--{name}={tmp_path / name}" for name in ("runs", "ledger")]
    code = run(["reproduce", *TABLES, "figure2", "--scale", "smoke", "--seeds", "1", *folders])
    printed = capsys.readouterr()
    presets = {row.preset for table in TABLES.values() for row in table.rows}
    if status().installed:
        assert code == 0, printed.err
    else:
        assert code == PartialFailureError.exit_code
        assert "tmca models install nnunet" in printed.err
        presets.remove("nnunet")
    trained = {entry.values["preset"] for entry in Ledger(tmp_path / "ledger").entries}
    assert trained == presets
    assert all(table.title in printed.out for table in TABLES.values())
    with Image.open(tmp_path / "runs" / "phantoms-smoke-figure2.png") as figure:
        assert figure.width > figure.height > 500
