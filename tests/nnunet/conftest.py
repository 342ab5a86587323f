"""A program that stands in for Python, pip and nnU-Net, so that what is around them is tested in seconds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tmca.config import Experiment
from tmca.nnunet import engine
from tmca.presets import change, get_preset

PROGRAM = """#!{python}
import json, os, pathlib, re, shutil, subprocess, sys

def stop(word, code=1, signal=None):
    if os.environ.get("FAKE_FAILS") == word:
        print("some advice\\n" + os.environ["FAKE_SAYS"])
        if signal:
            os.kill(os.getpid(), signal)
        sys.exit(code)

def after(flag):
    return sys.argv[sys.argv.index(flag) + 1]

told = {{name: value for name, value in os.environ.items() if name.startswith(("nnUNet", "TMCA", "PYTHON"))}}
with open({calls!r}, "a") as stream:
    stream.write(json.dumps({{"arguments": sys.argv[1:], "environment": told}}) + "\\n")
if sys.argv[1:3] == ["-m", "venv"]:
    stop("venv")
    folder = pathlib.Path(sys.argv[3])
    (folder / "bin").mkdir(parents=True)
    packages = folder / "lib" / "python{major}.{minor}" / "site-packages"
    (packages / "nnunetv2" / "training" / "nnUNetTrainer").mkdir(parents=True)
    shutil.copy(__file__, folder / "bin" / "python")
elif sys.argv[1:3] == ["-m", "pip"]:
    stop("pip")
elif "importlib" in sys.argv[2]:
    stop("start")
    print("a warning")
    print(json.dumps({{"nnunetv2": "{version}", "torch": "9.9"}}))
elif "plan_and_preprocess" in sys.argv[2]:
    stop("plan")
    place = pathlib.Path(os.environ["nnUNet_preprocessed"], "Dataset001_tmca")
    place.joinpath("nnUNetPlans.json").write_text(json.dumps({{"configurations": {{"2d": {{"batch_size": 3}}}}}}))
elif "run_training" in sys.argv[2]:
    place = pathlib.Path(os.environ["nnUNet_results"], "Dataset001_tmca", "TMCATrainer__nnUNetPlans__2d", "fold_0")
    place.mkdir(parents=True, exist_ok=True)
    place.joinpath("history.json").write_text(os.environ["FAKE_HISTORY"])
    print("tmca: epoch 1")
    print("not for the user")
    if os.environ.get("FAKE_FAILS") == "a worker lives on":
        sys.stdout.flush()
        subprocess.run(["sh", "-c", os.environ["FAKE_SAYS"]])
    stop("killed", signal=9)
    stop("train")
    place.joinpath("checkpoint_final.pth").write_bytes(b"weights")
elif "predict_from_raw_data" in sys.argv[2]:
    stop("predict")
    import numpy as np
    from PIL import Image
    pathlib.Path(after("-o")).mkdir()
    for path in sorted(pathlib.Path(after("-i")).iterdir())[int(os.environ.get("FAKE_OMITS", 0)):]:
        red = np.asarray(Image.open(path))[:, :, 0]
        name = re.fullmatch(r"(.+)_0000\\.png", path.name)[1]
        Image.fromarray((red > 127).astype(np.uint8)).save(pathlib.Path(after("-o"), name + ".png"))
"""

HISTORY = {
    "lrs": [0.01, 0.005],
    "train_losses": [0.7, 0.5],
    "val_losses": [0.6, 0.4],
    "mean_fg_dice": [0.75, 0.5],
    "epoch_start_timestamps": [100.0, 200.0],
    "epoch_end_timestamps": [110.5, 204.0],
}


class FakeProgram:
    """What the stand-in was called with, and how it is told to misbehave."""

    history = HISTORY

    def __init__(self, calls: Path, patch: pytest.MonkeyPatch) -> None:
        self._calls = calls
        self._patch = patch

    @property
    def calls(self) -> list[dict[str, Any]]:
        return (
            [json.loads(line) for line in self._calls.read_text("utf-8").splitlines()] if self._calls.exists() else []
        )

    def calls_of(self, word: str) -> list[dict[str, Any]]:
        """Return the calls whose first two arguments hold a word, such as pip or a function of nnU-Net."""
        return [call for call in self.calls if word in " ".join(call["arguments"][:2])]

    def fail(self, at: str, say: str = "RuntimeError: no luck") -> None:
        self._patch.setenv("FAKE_FAILS", at)
        self._patch.setenv("FAKE_SAYS", say)

    def behave(self, **variables: str) -> None:
        self._patch.delenv("FAKE_FAILS", raising=False)
        for name, value in variables.items():
            self._patch.setenv(name, value)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeProgram:
    """Let the stand-in be the Python that makes nnU-Net's environment, and everything in it."""
    fake, calls = tmp_path / "fake" / "python", tmp_path / "fake" / "calls.jsonl"
    fake.parent.mkdir()
    version = {"major": sys.version_info.major, "minor": sys.version_info.minor, "version": engine.VERSION}
    fake.write_text(PROGRAM.format(python=sys.executable, calls=str(calls), **version), encoding="utf-8")
    fake.chmod(0o755)
    monkeypatch.setattr(engine.sys, "executable", str(fake))
    monkeypatch.setenv("TMCA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMCA_OFFLINE", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setenv("FAKE_HISTORY", json.dumps(HISTORY))
    return FakeProgram(calls, monkeypatch)


@pytest.fixture
def installed(program: FakeProgram) -> FakeProgram:
    """Return the stand-in with nnU-Net installed."""
    engine.install()
    return program


@pytest.fixture
def experiment() -> Callable[..., Experiment]:
    """Return a factory of nnU-Net experiments at 32 pixels; keywords are options."""

    def build(*, epochs: int = 2, **options: Any) -> Experiment:
        preset = get_preset("nnunet")
        sections = {"model": {"options": options}, "trainer": {"max_epochs": epochs}}
        return change(preset, "nnunet", preprocessing={"image_size": 32}, **sections)

    return build
