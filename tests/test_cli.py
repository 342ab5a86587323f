from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from tmca import cli
from tmca.config import Experiment, from_dict, to_dict
from tmca.data.manifest import Manifest
from tmca.imaging.raster import read_mask
from tmca.models import TMCA
from tmca.presets import NO_ALIGNMENT, NO_ENHANCEMENT, PRESETS, get_preset
from tmca.progress import set_quiet
from tmca.training.task import SegmentationTask

PROMPT = "one small bright round lesion, located in top left of the image"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that explains a failure."""
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return line


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("TMCA_OFFLINE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")  # so that what the command line sets is taken back
    monkeypatch.setenv("COLUMNS", "200")
    yield
    set_quiet(quiet=False)


@pytest.fixture
def tmca(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*arguments: object) -> Outcome:
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def model_folder(tiny_model: Callable[..., TMCA], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


# The whole way ---------------------------------------------------------------------------------------------------


def test_train_evaluate_predict(tmca: Callable[..., Outcome], phantoms: Manifest, tmp_path: Path):
    run, out = tmp_path / "run", tmp_path / "masks"
    trained = tmca("train", "tiny", "--data", phantoms.root, "-o", run, "--trainer.max-epochs", 1)
    assert trained.code == 0, trained.err
    assert f"tmca evaluate -m {run}" in trained.out
    assert json.loads((run / "experiment.json").read_text("utf-8"))["trainer"]["max_epochs"] == 1

    scored = tmca(
        "evaluate", "-m", run, "--data", phantoms.root, "--threshold", 0.4, "--ledger", tmp_path / "results" / "x.json"
    )
    assert scored.code == 0, scored.err
    for name in ("metrics.csv", "summary.json", "report.html", "overlays"):
        assert (run / "evaluation-test" / name).exists()
    assert "pooled Dice" in scored.out
    ledger = json.loads((tmp_path / "results" / "x.json").read_text("utf-8"))
    assert (ledger["name"], ledger["preset"], ledger["epochs"], ledger["n"]) == ("x", "tiny", 1, 8)

    images = [phantoms.image_path(record) for record in phantoms.split("test").records[:2]]
    predicted = tmca("predict", "-i", *images, "-o", out, "-p", PROMPT, "-m", run, "--save-probabilities")
    assert predicted.code == 0, predicted.err
    assert f"2 masks in {out}" in predicted.out
    for path in images:
        assert read_mask(out / path.name).shape == (64, 64)
        assert (out / f"{path.stem}_prob.png").exists()


def test_a_run_is_resumed_by_name(tmca: Callable[..., Outcome], phantoms: Manifest, tmp_path: Path):
    start = ("train", "tiny", "--data", phantoms.root / "manifest.csv", "-o", tmp_path / "run")
    assert tmca(*start, "--trainer.max-epochs", 1).code == 0
    refused = tmca(*start, "--trainer.max-epochs", 2)
    assert refused.code == 1
    assert "--resume last" in refused.error
    resumed = tmca(*start, "--trainer.max-epochs", 2, "--resume", "last")
    assert resumed.code == 0, resumed.err
    assert "Trained 2 epochs" in resumed.out
    assert "note: 2 epochs now, 1 before: the learning rate follows" in resumed.err


def test_a_resumed_run_keeps_the_settings_that_are_not_named_again(
    tmca: Callable[..., Outcome], phantoms: Manifest, tmp_path: Path
):
    start = ("train", "tiny", "--data", phantoms.root / "manifest.csv", "-o", tmp_path / "run")
    assert tmca(*start, "--trainer.max-epochs", 3, "--optimiser.learning-rate", 0.002, "--seed", 7).code == 0
    record = (tmp_path / "run" / "environment.json").read_text()
    resumed = tmca(*start, "--resume", "last")
    assert resumed.code == 0, resumed.err
    assert "Trained 3 epochs" in resumed.out
    assert (tmp_path / "run" / "environment.json").read_text() == record
    for other, said in (("demo", "one of tiny, not of demo"), ("nonsense", "Unknown preset")):
        refused = tmca("train", other, *start[2:], "--resume", "last")
        assert refused.code == 2
        assert said in refused.err
    refused = tmca(*start, "--resume", "last", "--trainer.max-epochs", 2)
    assert refused.code == 2
    assert "has trained 3 epochs already" in refused.err


def test_drawn_data_is_written(tmca: Callable[..., Outcome], tmp_path: Path):
    sizes = ("--train", 2, "--val", 1, "--test", 0, "--size", 32)
    drawn = tmca("data", "phantom", "-o", tmp_path / "data", *sizes)
    assert drawn.code == 0
    assert "3 phantoms" in drawn.out
    assert Manifest.read(tmp_path / "data" / "manifest.csv").splits == {"train": 2, "val": 1}


# Prediction ------------------------------------------------------------------------------------------------------


def test_one_broken_image_among_good_ones(
    tmca: Callable[..., Outcome], model_folder: Path, image: Path, tmp_path: Path
):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    outcome = tmca("predict", "-i", broken, image, "-o", tmp_path / "out", "-m", model_folder)
    assert outcome.code == 4
    assert "1 of 2 cases failed" in outcome.error
    assert str(broken) in outcome.err
    assert (tmp_path / "out" / "image.png").exists()
    (failure,) = json.loads((tmp_path / "out" / "run_report.json").read_text("utf-8"))["failures"]
    assert failure["code"] == "invalid_input"
    assert str(broken) in failure["message"]
    assert failure["hint"]


def test_only_broken_images(tmca: Callable[..., Outcome], model_folder: Path, tmp_path: Path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no image")
    outcome = tmca("predict", "-i", tmp_path / "a.png", tmp_path / "b.png", "-o", tmp_path / "out", "-m", model_folder)
    assert outcome.code == 3
    assert "None of 2 cases" in outcome.error
    assert len(json.loads((tmp_path / "out" / "run_report.json").read_text("utf-8"))["failures"]) == 2


def test_masks_that_are_there_are_kept(tmca: Callable[..., Outcome], model_folder: Path, image: Path, tmp_path: Path):
    arguments = ("predict", "-i", image, "-o", tmp_path / "out", "-m", model_folder)
    assert tmca(*arguments).code == 0
    again = tmca(*arguments)
    assert (again.code, "1 of 1 cases were finished before" in again.err) == (0, True)
    refused = tmca(*arguments, "--threshold", "0.4")
    assert refused.code == 1
    assert "--overwrite" in refused.err
    assert tmca(*arguments, "--threshold", "0.4", "--overwrite").code == 0


def test_sentences_by_image(tmca: Callable[..., Outcome], model_folder: Path, image: Path, tmp_path: Path):
    (tmp_path / "jobs.csv").write_text("image,text\nimage.png,one lesion\nimage.png,two lesions\n")
    outcome = tmca(
        "predict", "-i", image, "-o", tmp_path / "out", "-m", model_folder, "--prompts", tmp_path / "jobs.csv"
    )
    assert outcome.code == 0, outcome.err
    assert len(list((tmp_path / "out").glob("image_*.png"))) == 2
    assert "warning" not in outcome.err


def test_images_without_a_sentence_are_counted(
    tmca: Callable[..., Outcome], model_folder: Path, image: Path, tmp_path: Path
):
    shutil.copy(image, tmp_path / "other.png")
    (tmp_path / "jobs.csv").write_text(f"image,text\n{image.name},one lesion\n")
    outcome = tmca(
        "predict", "-i", image, tmp_path / "other.png", "-o", tmp_path / "out", "-m", model_folder,
        "--prompts", tmp_path / "jobs.csv",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "warning: 1 of 2 images have no line in" in outcome.err


def test_libraries_log_when_asked(tmca: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch):
    levels = []
    monkeypatch.setattr(logging, "basicConfig", lambda **options: levels.append(options["level"]))
    tmca("models", "list")
    tmca("models", "list", "-v")
    monkeypatch.setenv("TMCA_LOG_LEVEL", "debug")
    tmca("models", "list", "--verbose")
    assert levels == [logging.WARNING, logging.INFO, logging.DEBUG]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("-p", "one lesion", "--prompts", "jobs.csv"), "Both --prompt and --prompts"),
        (("-p", "  "), "sentence is blank"),
        (("-p", ""), "sentence is blank"),
        pytest.param(("--threshold", "1"), "threshold"),
        pytest.param(("--threshold", "-0.1"), "threshold"),
        (("-d", "tpu"), "Unknown device 'tpu'"),
        (("-d", "cuda:99"), "not available"),
    ],
)
def test_a_wrong_flag_is_a_usage_error(
    tmca: Callable[..., Outcome], model_folder: Path, image: Path, tmp_path: Path, flags: tuple[str, ...], said: str
):
    outcome = tmca("predict", "-i", image, "-o", tmp_path / "out", "-m", model_folder, *flags)
    assert outcome.code == 2
    assert said in outcome.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, True), (errno.ECONNREFUSED, False)])
def test_a_full_disk_names_the_folder_of_temporary_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, told: bool
):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setenv("TMPDIR", "/a/full/disk")
    monkeypatch.setattr(cli, "_execute", fail)
    assert cli.run(["presets", "list"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {os.strerror(number)}")
    assert ("/a/full/disk" in said) is told


def test_a_cut_sentence_is_warned_of(tmca: Callable[..., Outcome], model_folder: Path, image: Path, tmp_path: Path):
    outcome = tmca("predict", "-i", image, "-o", tmp_path / "out", "-m", model_folder, "-p", "lesion " * 40)
    assert outcome.code == 0
    assert "is cut to the model's 24" in outcome.err


def test_words_that_no_training_sentence_had_are_warned_of(
    tmca: Callable[..., Outcome], tiny_model: Callable[..., TMCA], image: Path, tmp_path: Path
):
    tiny_model(sentences=(PROMPT,)).save_pretrained(tmp_path / "model")
    arguments = ("predict", "-m", tmp_path / "model", "-i", image, "-o")
    outcome = tmca(*arguments, tmp_path / "out", "-p", "kein lesion zyx")
    assert outcome.code == 0
    assert "not in the model's vocabulary, and spelled letter by letter: “kein”, “zyx”" in outcome.err
    report = json.loads((tmp_path / "out" / "run_report.json").read_text("utf-8"))
    assert report["cases"][0]["unknown_words"] == ["kein", "zyx"]
    again = tmca(*arguments, tmp_path / "other", "-p", PROMPT)
    assert "vocabulary" not in again.err


def test_a_model_without_sentences_says_that_it_ignores_them(
    tmca: Callable[..., Outcome], tiny_model: Callable[..., TMCA], image: Path, tmp_path: Path
):
    tiny_model(guidance=False, alignment=NO_ALIGNMENT, enhancement=NO_ENHANCEMENT).save_pretrained(tmp_path / "model")
    outcome = tmca("predict", "-i", image, "-o", tmp_path / "out", "-m", tmp_path / "model", "-p", PROMPT)
    assert outcome.code == 0
    assert "ignores the prompt" in outcome.err
    (case,) = json.loads((tmp_path / "out" / "run_report.json").read_text("utf-8"))["cases"]
    assert case["setting"] == "no text"


def test_a_folder_that_is_no_checkpoint(tmca: Callable[..., Outcome], image: Path, tmp_path: Path, phantoms: Manifest):
    for model in (tmp_path, tmp_path / "nothing"):
        for arguments in (
            ("predict", "-i", image, "-o", tmp_path / "out"),
            ("evaluate", "--data", phantoms.root),
        ):
            outcome = tmca(*arguments, "-m", model)
            assert outcome.code == 5
            assert str(model) in outcome.error
            assert "tmca train" in outcome.error


# Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (("trainn", "tiny"), "'train'"),
        (("data", "fantom"), "'data phantom'"),
        (("presets", "sho", "tiny"), "'presets show'"),
        (("presets", "show", "tinny"), "'tiny'"),
        (("train", "tmca-wihtout-mas", "--data", "x"), "'tmca-without-mas'"),
    ],
)
def test_an_unknown_name_is_answered_by_the_nearest(tmca: Callable[..., Outcome], arguments: tuple, nearest: str):
    outcome = tmca(*arguments)
    assert outcome.code == 2
    assert f"did you mean {nearest}?" in outcome.error


@pytest.mark.parametrize(
    ("flags", "nearest"),
    [
        (("--model.method", "tcma"), "'tmca'"),
        (("--model.image-encoder.architecture", "convnxt"), "'convnext'"),
    ],
)
def test_an_unknown_part_of_a_model_is_answered_by_the_nearest(
    tmca: Callable[..., Outcome], phantoms: Manifest, tmp_path: Path, flags: tuple, nearest: str
):
    outcome = tmca("train", "tiny", "--data", phantoms.root, "-o", tmp_path / "run", *flags)
    assert outcome.code == 2
    assert f"did you mean {nearest}?" in outcome.error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("train",),
        ("data",),
        ("presets", "show"),
        ("predict", "-i", "a.png"),
        ("predict", "--devise", "cpu"),
        ("train", "tiny", "--data", "x", "--trainer.max-epochs", "many"),
        ("train", "tiny", "--data", "x", "--trainer.max-epochs", "0"),
        ("train", "tiny", "--data", "x", "--model.enhancement.mode", "loud"),
        ("train", "tiny", "--data", "x", "--model.no-guidance"),
    ],
)
def test_wrong_usage(tmca: Callable[..., Outcome], arguments: tuple[str, ...]):
    outcome = tmca(*arguments)
    assert outcome.code == 2
    assert outcome.out + outcome.err


def test_missing_data(tmca: Callable[..., Outcome], tmp_path: Path, model_folder: Path):
    for arguments in (("train", "tiny", "-o", tmp_path / "run"), ("evaluate", "-m", model_folder)):
        outcome = tmca(*arguments, "--data", tmp_path / "nothing")
        assert outcome.code == 3
        assert str(tmp_path / "nothing") in outcome.error
    assert not (tmp_path / "run").exists()


# Presets ---------------------------------------------------------------------------------------------------------


def test_presets_are_listed_with_a_line_each(tmca: Callable[..., Outcome]):
    outcome = tmca("presets", "list")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_shown_as_json(tmca: Callable[..., Outcome], name: str):
    outcome = tmca("presets", "show", name)
    assert outcome.code == 0
    assert from_dict(Experiment, json.loads(outcome.out)) == get_preset(name)


def test_models_are_listed(tmca: Callable[..., Outcome]):
    assert "tmca" in tmca("models", "list").out.split()


def _leaves(config: Any, path: str = "") -> dict[str, Any]:
    """Return field path → value of every plain field."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value, where = getattr(config, item.name), f"{path}.{item.name}".removeprefix(".")
        found |= _leaves(value, where) if dataclasses.is_dataclass(value) else {where: value}
    return found


OTHER_VALUES: dict[str, Any] = {
    "preprocessing.normalisation": "per_image",
    "model.text_encoder.sentence_pooling": "first",
    "model.text_encoder.attention_heads": 4,
    "model.alignment.strides": (16, 32),
    "model.enhancement.mode": "multiply",
    "model.decoder.channels": (8, 16, 32),
    "objective.targets": "identity",
    "optimiser.schedule_epochs": 7,
    "optimiser.gradient_clip": 0.5,
    "optimiser.average_decay": 0.9,
    "trainer.precision": "bf16",
    "trainer.monitor": "dice",
    "model.alignment.pooling": "mask",
    "model.decoder.positions": "flat",
    "objective.dice_form": "batch",
    "objective.cross_entropy_form": "balanced",
    "optimiser.schedule": "plateau",
    "trainer.train_fraction": 0.5,
    "trainer.max_train_seconds": 60.0,
}
"""Values for the fields where not any value will do."""
COMPANIONS = {
    "model.guidance": "--model.alignment.strides --model.alignment.no-align-global --model.enhancement.mode off",
    "model.text_encoder.freeze": "--model.text-encoder.weights some/folder",
}
"""Flags that a field's other value needs beside it."""


def _other(where: str, value: Any) -> Any:
    if where in OTHER_VALUES:
        return OTHER_VALUES[where]
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return "some/folder"
    if isinstance(value, tuple):
        return tuple(part * 2 for part in value)
    return value + 4 if isinstance(value, int) else value / 2 + 0.0001


def _flag(where: str, value: Any) -> list[str]:
    *sections, name = where.replace("_", "-").split(".")
    if isinstance(value, bool):
        return [f"--{'.'.join([*sections, name if value else f'no-{name}'])}"]
    words = [str(part) for part in value] if isinstance(value, tuple) else [str(value)]
    return [f"--{'.'.join([*sections, name])}", *words]


@pytest.mark.parametrize("section", ["", "preprocessing", "augmentation", "model", "objective", "optimiser", "trainer"])
def test_every_field_of_a_preset_is_a_flag(tmca: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, section: str):
    parsed: list[Experiment] = []
    monkeypatch.setattr(cli.Train, "run", lambda command: parsed.append(command.experiment))
    leaves = _leaves(get_preset("tiny"))
    chosen = {where: value for where, value in leaves.items() if where.rpartition(".")[0].split(".")[0] == section}
    assert chosen
    for where, value in chosen.items():
        if isinstance(value, dict):
            continue  # options of a transformers config, tested below
        other = _other(where, value)
        outcome = tmca("train", "tiny", "--data", "x", *_flag(where, other), *COMPANIONS.get(where, "").split())
        assert outcome.code == 0, (where, outcome.out + outcome.err)
        assert _leaves(parsed[-1])[where] == other, where
        assert other != value, where


def test_options_of_an_encoder_are_flags(tmca: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch):
    parsed: list[Experiment] = []
    monkeypatch.setattr(cli.Train, "run", lambda command: parsed.append(command.experiment))
    flags = ("--model.image-encoder.options.depths", 1, 2, 3, 1)
    assert tmca("train", "tiny", "--data", "somewhere", *flags).code == 0
    assert to_dict(parsed[-1])["model"]["image_encoder"]["options"]["depths"] == [1, 2, 3, 1]


# Output ----------------------------------------------------------------------------------------------------------


def test_quiet_is_silent_on_stderr(
    tmca: Callable[..., Outcome], model_folder: Path, phantoms: Manifest, image: Path, tmp_path: Path
):
    trained = tmca(
        "train", "tiny", "--data", phantoms.root, "-o", tmp_path / "run", "--trainer.max-epochs", 1, "--quiet"
    )
    assert (trained.code, trained.err) == (0, "")
    predicted = tmca("predict", "-q", "-i", image, "-o", tmp_path / "out", "-m", model_folder, "-p", "lesion " * 40)
    assert (predicted.code, predicted.err) == (0, "")
    failed = tmca("predict", "-q", "-i", image, "-o", tmp_path / "out", "-m", model_folder)
    assert failed.code == 1
    assert failed.err.strip() == failed.error


def test_an_interrupted_training_says_how_to_go_on(
    tmca: Callable[..., Outcome], phantoms: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    step = SegmentationTask.training_step

    def interrupt(task: SegmentationTask, *arguments: Any) -> torch.Tensor:
        if task.current_epoch:
            raise KeyboardInterrupt
        return step(task, *arguments)

    monkeypatch.setattr(SegmentationTask, "training_step", interrupt)
    for name, preset in (("tiny", "tiny"), ("mine", "PRESET")):
        outcome = tmca("train", "tiny", "--data", phantoms.root, "-o", tmp_path / name, "--name", name)
        assert outcome.code == 130
        go_on = f"tmca train {preset} --data {phantoms.root} -o {tmp_path / name} --resume last"
        assert go_on in outcome.err.replace("\n", "")


def test_ctrl_c_anywhere_is_exit_130(tmca: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch):
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.PresetsList, "run", interrupt)
    assert tmca("presets", "list").code == 130


def test_a_fault_of_the_program_is_one_line_too(
    tmca: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(_: object) -> None:
        raise ZeroDivisionError("on purpose\nin two lines")

    monkeypatch.setattr(cli.PresetsList, "run", fail)
    outcome = tmca("presets", "list")
    assert outcome.code == 1
    assert "on purpose" in outcome.error
    assert "--debug" in outcome.error
    assert cli.run(["presets", "list", "--debug"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err.partition("error: ")[0]


def test_help_and_version(tmca: Callable[..., Outcome]):
    for verb in cli.VERBS:
        assert verb in tmca("--help").out
        words = [*verb.split(), *(["tiny"] if verb == "train" else [])]
        outcome = tmca(*words, "--help")
        assert outcome.code == 0
        assert "usage: tmca" in outcome.out
    assert tmca("--version").out.startswith("tmca ")
    assert "not a medical device" in tmca("-h").out


def test_offline_is_passed_on(tmca: Callable[..., Outcome]):
    assert tmca("presets", "list", "--offline").code == 0
    assert os.environ["TMCA_OFFLINE"] == os.environ["HF_HUB_OFFLINE"] == "1"


# Start-up --------------------------------------------------------------------------------------------------------

HEAVY = ("torch", "transformers", "lightning", "monai", "matplotlib", "numpy", "PIL", "huggingface_hub")


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    "code",
    [
        "import tmca",
        "import tmca; tmca.get_preset; dir(tmca)",
        "from tmca import cli; assert cli.run(['--help']) == 0",
        "from tmca import cli; assert cli.run(['train', 'tiny', '--help']) == 0",
        "from tmca import cli; assert cli.run(['presets', 'show', 'tmca']) == 0",
        "from tmca import cli; assert cli.run(['nonsense']) == 2",
    ],
)
def test_nothing_heavy_is_imported_for_help(code: str):
    process = _python(f"import sys; {code}; print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)")
    assert process.returncode == 0, process.stderr
    assert process.stderr.splitlines()[-1] == ""


@pytest.mark.parametrize("code", ["import tmca", "from tmca import cli; cli.run(['--help'])"])
def test_help_answers_at_once(code: str):
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        _python(code)
        seconds.append(time.monotonic() - started)
    is_loaded = os.getloadavg()[0] > (os.cpu_count() or 1) / 2
    assert sorted(seconds)[1] < 0.5 * (3 if is_loaded else 1)


def test_the_installed_program_exits_with_the_code(tmp_path: Path):
    program = shutil.which("tmca", path=Path(sys.executable).parent)
    if program is None:
        pytest.skip("tmca is not installed as a program")
    process = subprocess.run(
        [program, "evaluate", "-m", str(tmp_path), "--data", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert process.returncode == 5
    assert process.stderr.startswith("error: ")
    assert len(process.stderr.splitlines()) == 1
    assert process.stdout == ""
