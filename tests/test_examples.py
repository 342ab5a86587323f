"""The examples run, with small numbers, in the order in which somebody would try them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tmca.cli import run
from tmca.data.manifest import Manifest
from tmca.imaging.raster import read_mask

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def _run(name: str, *arguments: str | Path) -> None:
    runpy.run_path(str(EXAMPLES / name))["main"]([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that train_on_phantoms.py leaves."""
    folder = tmp_path_factory.mktemp("examples") / "phantoms"
    small = ("--train", "8", "--val", "4", "--test", "4", "--epochs", "1")
    _run("train_on_phantoms.py", "--output", folder, "--preset", "tiny", *small)
    return folder


def test_train_on_phantoms(trained: Path):
    assert (trained / "run" / "checkpoints" / "best" / "model.safetensors").is_file()
    assert Manifest.read(trained / "data" / "manifest.csv").splits == {"train": 8, "val": 4, "test": 4}


def test_segment_one_image(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    image = trained / "data" / "images" / "test-00000.png"
    sentences = ("one small lesion, located in top left of the image", "two lesions")
    _run("segment_one_image.py", trained / "run", image, *sentences, "--output", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == list(sentences)
    for number in (1, 2):
        assert read_mask(tmp_path / f"test-00000-{number}.png").shape == (64, 64)
        assert (tmp_path / f"test-00000-{number}-overlay.png").is_file()


def test_own_manifest(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("images", "masks"):
        (folder / name).symlink_to(trained / "data" / name)
    lines = ["image,text,patient_id"]
    lines += [
        f'train-{number:05d}.png,"one lesion, located in left of the image",P{number // 2}' for number in range(8)
    ]
    (folder / "texts.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _run("own_manifest.py", folder, "--texts", folder / "texts.csv", "--val", "0.25", "--test", "0.25")
    assert "left out, no sentence or no mask: test-00000.png" in capsys.readouterr().out
    manifest = Manifest.read(folder / "manifest.csv")
    assert len(manifest.records) == 8
    splits: dict[str, set[str]] = {}
    for record in manifest.records:
        splits.setdefault(record.patient_id, set()).add(record.split)
    assert set(splits) == {f"P{number}" for number in range(4)}
    assert manifest.splits == {"train": 4, "val": 2, "test": 2}
    assert all(len(names) == 1 for names in splits.values())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_stay_short(path: Path):
    assert len(path.read_text("utf-8").splitlines()) < 60


def test_add_a_method(added_method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folders = [f"--{name}={tmp_path / name}" for name in ("runs", "ledger")]
    for command in (
        ["models", "list"],
        ["presets", "list"],
        ["reproduce", "table1", "--scale", "smoke", "--only", added_method, "--seeds", "1", *folders],
    ):
        assert run(command) == 0, capsys.readouterr().err
        assert added_method in capsys.readouterr().out.lower()
    assert [path.name for path in (tmp_path / "ledger").glob("*.json")] == ["phantoms-smoke-film-seed1.json"]
