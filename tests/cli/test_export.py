from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import jaxtyping
import pytest

from tmca import cli
from tmca.data.manifest import Manifest
from tmca.models import SegmentationModel


@pytest.fixture(autouse=True)
def _sizes_may_be_symbols(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def model_folder(tiny_model: Callable[..., SegmentationModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of few operations: its graphs are traced in a tenth of the time that TMCA's take."""
    folder = tmp_path_factory.mktemp("export-cli") / "model"
    tiny_model(method="unet").save_pretrained(folder)
    return folder


def test_a_bundle_is_made_and_verified(
    model_folder: Path, phantoms: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bundle = tmp_path / "tiny.tmca"
    command = ["export", "bundle", "-m", str(model_folder), "-o", str(bundle), "--data", str(phantoms.root)]
    assert cli.run([*command, "--images", "2"]) == 0
    said = capsys.readouterr().out
    assert "in pieces: Dice 1.00000 against torch on 2 masks of 2 real images" in said
    digest = said.rpartition("SHA-256: ")[2].strip()
    assert cli.run(["models", "verify", str(bundle)]) == 0
    assert digest in capsys.readouterr().out
    assert cli.run([*command, "--images", "2"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    bundle.write_bytes(bundle.read_bytes()[:-3])
    assert cli.run(["models", "verify", str(bundle)]) == 5
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_drawn_images_are_said_to_be_drawn(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.run(["export", "onnx", "-m", str(model_folder), "-o", str(tmp_path / "onnx"), "--images", "2"]) == 0
    said = capsys.readouterr().out
    assert "Compared on drawn images, which say less than real ones: give --data" in said
    assert sorted(path.name for path in (tmp_path / "onnx" / "graphs").iterdir()) == [
        "decoder.onnx",
        "image_encoder.onnx",
        "model.onnx",
    ]


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.run(["export", "onnx", "-m", str(tmp_path / "no"), "-o", str(tmp_path / "onnx")]) == 5
    assert capsys.readouterr().err.startswith("error: There is no folder")
    assert cli.run(["models", "verify", str(tmp_path / "no")]) == 5


def test_a_missing_package_names_its_extra(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code = cli.run(["export", "onnx", "-m", str(model_folder), "-o", str(tmp_path / "onnx"), "--images", "1"])
    assert code != 0
    assert "pip install 'tmca[export]'" in capsys.readouterr().err
