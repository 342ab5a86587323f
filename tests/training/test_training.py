from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from tmca import cli, training
from tmca.checkpoints import TEXT_ENCODER_FILE, load_checkpoint
from tmca.config import Experiment, ImageEncoderConfig, from_dict
from tmca.data.cache import DecodedCache
from tmca.data.loading import SegmentationDataset, make_loader
from tmca.data.manifest import Manifest
from tmca.data.phantom import draw_phantom
from tmca.data.preprocessing import prepare_image
from tmca.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    StorageError,
    TMCAError,
    WeightsError,
)
from tmca.evaluation import evaluate
from tmca.files import held
from tmca.losses import objective
from tmca.models import TMCA, build_model
from tmca.models.tokenizer import SentenceTokenizer
from tmca.models.vision import build_image_encoder
from tmca.presets import NO_ALIGNMENT, NO_ENHANCEMENT, change
from tmca.training import already_training, fit, resolve, task, writer
from tmca.training.task import SegmentationTask, averaged_copy, follow, learning_rate_factor
from tmca.types import Batch

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny.json"
IMAGE_ONLY = {"guidance": False, "alignment": NO_ALIGNMENT, "enhancement": NO_ENHANCEMENT}


def _history(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _write_tokenizer(folder: Path, words: Iterable[str]) -> list[str]:
    """Write a ``vocab.txt`` of whole words, independent of how a vocabulary is learned."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return vocabulary


def _with_trainer(experiment: Experiment, **fields: object) -> Experiment:
    return change(experiment, experiment.name, trainer=fields)


@pytest.fixture(autouse=True)
def _keep_interrupts() -> Iterator[None]:
    """Give the test run its Ctrl-C back, whatever a fit made of it."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="module")
def few(phantoms: Manifest) -> Manifest:
    """Four training and two validation phantoms: one step an epoch."""
    records = [r for r in phantoms.records if r.split == "train"][:4] + list(phantoms.split("val").records[:2])
    return phantoms.with_records(records)


@pytest.fixture(scope="module")
def finished(phantoms: Manifest, tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs; tests only read it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    record = fit(tiny_experiment, phantoms, folder)
    assert record.folder == folder
    assert (record.epochs, record.stopped) == (2, "all epochs done")
    assert record.seconds > 0
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def bert_folder(phantoms: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT in the layout of the hub, with every word of the phantoms."""
    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word for text in phantoms.sentences for word in text.replace(",", " ,").split()})
    vocabulary = _write_tokenizer(folder, words)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.3,
        max_position_embeddings=32,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


# The run folder --------------------------------------------------------------------------------------------------


def test_a_run_folder_is_complete(finished: Path):
    assert {entry.name for entry in finished.iterdir()} == {
        "checkpoints",
        "curves.png",
        "environment.json",
        "experiment.json",
        "metrics.csv",
        "splits.json",
        "tensorboard",
    }
    assert {entry.name for entry in (finished / "checkpoints").iterdir()} == {"best", "last"}
    assert any(path.name.startswith("events.") for path in (finished / "tensorboard").rglob("*"))
    with Image.open(finished / "curves.png") as curves:
        assert min(curves.size) > 300


def test_a_run_says_what_it_was_computed_with(finished: Path, tiny_experiment: Experiment, phantoms: Manifest):
    experiment = json.loads((finished / "experiment.json").read_text("utf-8"))
    assert from_dict(Experiment, experiment) == tiny_experiment
    splits = json.loads((finished / "splits.json").read_text("utf-8"))
    assert splits["hash"] == phantoms.content_hash()
    assert splits["train"] == [record.id for record in phantoms.split("train").records]
    assert splits["val"] == [record.id for record in phantoms.split("val").records]
    environment = json.loads((finished / "environment.json").read_text("utf-8"))
    assert {"python", "packages", "commit", "hardware"} <= set(environment)
    assert environment["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_the_history_has_a_row_an_epoch(finished: Path, tiny_experiment: Experiment):
    rows = _history(finished)
    assert [int(row["epoch"]) for row in rows] == [1, 2]
    names = ("loss", "segmentation_loss", "dice_loss", "cross_entropy_loss", "alignment_loss", "alignment_excess")
    expected = {f"{stage}_{name}" for stage in ("train", "val") for name in names}
    expected |= {"val_pooled_dice", "val_per_case_dice", "epoch", "seconds", "learning_rate"}
    assert set(rows[0]) == expected
    for row in rows:
        values = {name: float(value) for name, value in row.items()}
        assert all(math.isfinite(value) for value in values.values())
        for stage in ("train", "val"):
            parts = values[f"{stage}_dice_loss"] + values[f"{stage}_cross_entropy_loss"]
            assert values[f"{stage}_segmentation_loss"] == pytest.approx(parts, rel=1e-5)
            total = values[f"{stage}_segmentation_loss"] + values[f"{stage}_alignment_loss"]
            assert values[f"{stage}_loss"] == pytest.approx(total, rel=1e-5)
            assert values[f"{stage}_alignment_excess"] >= 0
        assert 0 <= values["val_pooled_dice"] <= 1
    assert float(rows[1]["seconds"]) >= float(rows[0]["seconds"])
    assert float(rows[-1]["learning_rate"]) == pytest.approx(tiny_experiment.optimiser.min_learning_rate)


def test_the_best_checkpoint_is_the_epoch_of_the_best_validation_loss(finished: Path, phantoms: Manifest):
    rows = _history(finished)
    best = min(rows, key=lambda row: float(row["val_segmentation_loss"]))
    model = load_checkpoint(finished)
    assert _validation_loss(model, phantoms) == pytest.approx(float(best["val_segmentation_loss"]), rel=1e-4)
    pooled = evaluate(model, phantoms, "val").pooled()["dice"]
    assert pooled == pytest.approx(float(best["val_pooled_dice"]), rel=1e-6)


@torch.inference_mode()
def _validation_loss(model: TMCA, manifest: Manifest) -> float:
    assert model.experiment is not None
    dataset = SegmentationDataset(manifest.split("val"), model.experiment.preprocessing)
    losses = []
    for batch in make_loader(dataset, batch_size=3, training=False):
        output = model.segment(model.encode_image(batch.images), model.encode_text(batch.texts))
        losses.append(float(objective(output, batch.masks, model.experiment.objective)["segmentation_loss"]))
    return float(np.mean(losses))


def test_a_run_is_the_same_twice(finished: Path, phantoms: Manifest, tiny_experiment: Experiment, tmp_path: Path):
    torch.manual_seed(12345)  # whatever was drawn before
    fit(tiny_experiment, phantoms, tmp_path / "run")
    _assert_equal_runs(finished, tmp_path / "run")


def test_a_loss_that_is_no_number_ends_the_run_before_anything_is_kept(
    few: Manifest, tiny_experiment: Experiment, tmp_path: Path
):
    wild = change(tiny_experiment, "tiny", optimiser={"learning_rate": 1e30, "warmup_steps": 0})
    with pytest.raises(TMCAError, match="loss became nan in epoch 1"):
        fit(wild, few, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "checkpoints" / "last").exists()


def test_progress_is_one_line_an_epoch_and_small_batches_are_warned_of(
    few: Manifest, tiny_experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fit(_with_trainer(tiny_experiment, max_epochs=1), few, tmp_path / "run")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert sum(line.startswith("epoch   1 of 1") and "pooled Dice" in line for line in lines) == 1
    assert any("batches of 4 images" in line for line in lines)


def test_sentences_over_the_limit_are_counted(
    few: Manifest, tiny_experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text_encoder = replace(tiny_experiment.model.text_encoder, max_tokens=4)
    experiment = change(tiny_experiment, "tiny", model={"text_encoder": text_encoder}, trainer={"max_epochs": 1})
    fit(experiment, few, tmp_path / "run")
    assert f"{len(few.records)} of {len(few.records)} sentences exceed 4 tokens" in capsys.readouterr().err


# Resuming --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[None, 0.8], ids=["plain", "averaged"])
def varied(request: pytest.FixtureRequest, tiny_experiment: Experiment, bert_folder: Path) -> Experiment:
    """Everything that is drawn at random, switched on, without and with averaged weights."""
    text_encoder = replace(tiny_experiment.model.text_encoder, tokenizer=str(bert_folder), dropout=0.2)
    return change(
        tiny_experiment,
        "tiny",
        model={"text_encoder": text_encoder},
        augmentation={
            "zoom_probability": 0.5,
            "zoom_range": (0.9, 1.3),
            "mirror_probability": 0.5,
            "brightness": 0.1,
            "contrast": 0.1,
            "text_dropout": 0.3,
        },
        optimiser={"warmup_steps": 3, "gradient_clip": 1.0, "average_decay": request.param},
        trainer={"max_epochs": 4, "min_epochs": 4, "patience": 4},
    )


@pytest.fixture(scope="module")
def uninterrupted(phantoms: Manifest, varied: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    fit(varied, phantoms, folder)
    return folder


@pytest.fixture(scope="module")
def interrupted(phantoms: Manifest, varied: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, interrupted by Ctrl-C in the second step of the third epoch; tests only read it."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    step = SegmentationTask.training_step

    def interrupt(task: SegmentationTask, batch: Batch, batch_idx: int) -> torch.Tensor:
        if task.current_epoch == 2 and batch_idx == 1:
            raise KeyboardInterrupt
        return step(task, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentationTask, "training_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(varied, phantoms, folder)
    return folder


def _assert_equal_runs(first: Path, second: Path) -> None:
    rows, others = _history(first), _history(second)
    for row in (*rows, *others):
        del row["seconds"]
    assert rows == others
    for name in ("last", "best"):
        weights, other = (load_file(run / "checkpoints" / name / "model.safetensors") for run in (first, second))
        assert weights.keys() == other.keys()
        for key, value in weights.items():
            assert torch.equal(value, other[key]), f"{name}: {key}"


def test_sentences_written_from_masks_are_said_to_carry_ground_truth(
    few: Manifest, tiny_experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    experiment = _with_trainer(tiny_experiment, max_epochs=1)
    fit(experiment, few, tmp_path / "written")
    assert "carry ground truth" in capsys.readouterr().err
    human = few.with_records(replace(record, text_provenance="human") for record in few.records)
    fit(experiment, human, tmp_path / "human")
    assert "carry ground truth" not in capsys.readouterr().err


def test_an_interrupted_run_keeps_its_finished_epochs(interrupted: Path):
    assert [row["epoch"] for row in _history(interrupted)] == ["1", "2"]
    load_checkpoint(interrupted)
    load_checkpoint(interrupted / "checkpoints" / "last")
    assert not list(interrupted.rglob(".tmp-*"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_equals_an_uninterrupted_one(
    interrupted: Path, uninterrupted: Path, varied: Experiment, phantoms: Manifest, tmp_path: Path, workers: int
):
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))
    torch.manual_seed(99)  # another process starts with another state
    record = fit(_with_trainer(varied, num_workers=workers), phantoms, run, resume=True)
    assert (record.epochs, record.stopped) == (4, "all epochs done")
    best = min(_history(uninterrupted), key=lambda row: float(row["val_segmentation_loss"]))
    assert record.best_epoch == int(best["epoch"])
    assert record.best_score == pytest.approx(float(best["val_segmentation_loss"]), rel=0, abs=0)
    assert float(_history(run)[-1]["seconds"]) == pytest.approx(record.seconds, abs=0.06)
    _assert_equal_runs(uninterrupted, run)


def test_ctrl_c_works_again_after_an_interrupted_run(
    few: Manifest, tiny_experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_: object) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(SegmentationTask, "training_step", interrupt)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_experiment, few, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_run_without_a_finished_epoch_cannot_be_resumed(
    few: Manifest, tiny_experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_: object) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, "training_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(tiny_experiment, few, tmp_path / "run")
    with pytest.raises(CheckpointError, match="not finished an epoch") as caught:
        fit(tiny_experiment, few, tmp_path / "run", resume=True)
    assert "--overwrite" in caught.value.hint
    with pytest.raises(StorageError, match="has not finished an epoch") as refused:
        fit(tiny_experiment, few, tmp_path / "run")
    assert refused.value.hint == "replace it: --overwrite"


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_interrupted_command_says_how_to_go_on(
    phantoms: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], epoch: int
):
    step = SegmentationTask.training_step

    def interrupt(task: SegmentationTask, batch: Batch, batch_idx: int) -> torch.Tensor:
        if task.current_epoch == epoch:
            raise KeyboardInterrupt
        return step(task, batch, batch_idx)

    command = ["train", "tiny", "--data", str(phantoms.root), "-o", str(tmp_path / "run"), "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, "training_step", interrupt)
        assert cli.run(command) == 130
    said = capsys.readouterr().err
    flags = ["--resume", "last"] if epoch else ["--overwrite"]
    assert ("--resume last" in said, "start again with --overwrite" in said) == (epoch > 0, epoch == 0), said
    assert cli.run([*command, *flags]) == 0


@pytest.mark.parametrize(
    ("section", "fields", "named"),
    [
        ("optimiser", {"learning_rate": 2e-3}, "optimiser.learning_rate"),
        ("augmentation", {"zoom_range": (0.8, 1.2)}, "augmentation.zoom_range"),
        ("trainer", {"batch_size": 8}, "trainer.batch_size"),
        ("preprocessing", {"image_size": 96}, "preprocessing.image_size"),
    ],
)
def test_resuming_with_other_settings_names_the_field(
    finished: Path, phantoms: Manifest, tiny_experiment: Experiment, section: str, fields: dict, named: str
):
    before = _content(finished)
    with pytest.raises(ConfigError, match="same settings") as caught:
        fit(change(tiny_experiment, "tiny", **{section: fields}), phantoms, finished, resume=True)
    assert named in caught.value.message
    assert str(finished) in caught.value.message
    assert _content(finished) == before


def test_resuming_with_another_seed_is_refused(finished: Path, phantoms: Manifest, tiny_experiment: Experiment):
    with pytest.raises(ConfigError, match="seed 1, not 2"):
        fit(replace(tiny_experiment, seed=2), phantoms, finished, resume=True)


@pytest.mark.parametrize("what", ["sentence", "pixels", "cases"])
def test_resuming_on_changed_data_is_refused(
    finished: Path, phantoms: Manifest, tiny_experiment: Experiment, tmp_path: Path, what: str
):
    copy = Manifest(Path(shutil.copytree(phantoms.root, tmp_path / "data")), phantoms.records, phantoms.name)
    assert copy.content_hash() == phantoms.content_hash()  # the place does not count
    first, *others = copy.records
    if what == "sentence":
        copy = copy.with_records([replace(first, text="something else"), *others])
    elif what == "cases":
        copy = copy.with_records(others)
    else:
        path = copy.image_path(first)
        pixels = np.array(Image.open(path))
        pixels[0, 0] += 1
        Image.fromarray(pixels).save(path)
    with pytest.raises(DataError, match=r"not what the run in .* was started on"):
        fit(tiny_experiment, copy, finished, resume=True)


def test_resuming_nothing_is_refused(tmp_path: Path, phantoms: Manifest, tiny_experiment: Experiment):
    with pytest.raises(CheckpointError, match="no run to resume") as caught:
        fit(tiny_experiment, phantoms, tmp_path / "nothing", resume=True)
    assert "without --resume" in caught.value.hint
    assert not (tmp_path / "nothing").exists()


def test_a_finished_run_can_be_lengthened(copied: Path, phantoms: Manifest, tiny_experiment: Experiment):
    before = _history(copied)
    record = fit(_with_trainer(tiny_experiment, max_epochs=3), phantoms, copied, resume=True)
    assert record.epochs == 3
    assert _history(copied)[:2] == before
    assert json.loads((copied / "experiment.json").read_text("utf-8"))["trainer"]["max_epochs"] == 3


def test_resuming_a_finished_run_changes_nothing(copied: Path, phantoms: Manifest, tiny_experiment: Experiment):
    before = _content(copied / "checkpoints") | {"metrics.csv": (copied / "metrics.csv").read_bytes()}
    record = fit(_with_trainer(tiny_experiment, max_epochs=2), phantoms, copied, resume=True)
    assert (record.epochs, record.stopped) == (2, "all epochs done")
    assert _content(copied / "checkpoints") | {"metrics.csv": (copied / "metrics.csv").read_bytes()} == before


def test_a_run_is_not_made_shorter_than_it_is(finished: Path, phantoms: Manifest, tiny_experiment: Experiment):
    before = _content(finished)
    with pytest.raises(ConfigError, match=r"has trained 2 epochs already, trainer\.max_epochs is 1"):
        fit(_with_trainer(tiny_experiment, max_epochs=1), phantoms, finished, resume=True)
    assert _content(finished) == before


@pytest.mark.parametrize("how", [{"resume": True}, {"overwrite": True}])
def test_a_folder_in_which_a_training_is_at_work_is_left_alone(
    finished: Path, phantoms: Manifest, tiny_experiment: Experiment, how: dict[str, bool]
):
    before = _content(finished)
    with (
        held(finished, already_training(finished)),
        pytest.raises(StorageError, match="A training is at work in") as caught,
    ):
        fit(tiny_experiment, phantoms, finished, **how)
    assert "another folder" in caught.value.hint
    assert _content(finished) == before


def test_a_training_holds_its_folder(
    copied: Path, phantoms: Manifest, tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
):
    tried: list[str] = []

    def fit_meanwhile(*_: Any, **__: Any) -> None:
        with pytest.raises(StorageError, match="A training is at work in"), held(copied, already_training(copied)):
            pass
        tried.append("held")

    monkeypatch.setattr(pl.Trainer, "fit", fit_meanwhile)
    fit(tiny_experiment, phantoms, copied, overwrite=True)
    assert tried == ["held"]
    with held(copied, already_training(copied)):
        pass  # and gives it back


def test_a_run_is_given_up_by_who_holds_its_folder(
    copied: Path, phantoms: Manifest, tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
):
    """Otherwise another that came first, and holds the folder that was there before, goes on filling the new one."""
    same, tried = copied.stat().st_ino, []
    describe = training.describe_environment

    def start_meanwhile() -> dict[str, Any]:
        assert (copied / "metrics.csv").exists()
        with pytest.raises(StorageError, match="A training is at work in"), held(copied, already_training(copied)):
            pass
        tried.append("held")
        return describe()

    monkeypatch.setattr(training, "describe_environment", start_meanwhile)
    fit(_with_trainer(tiny_experiment, max_epochs=1), phantoms, copied, overwrite=True)
    assert tried == ["held"]
    assert copied.stat().st_ino == same
    assert len(_history(copied)) == 1


def test_of_two_that_start_at_once_one_is_refused(few: Manifest, tiny_experiment: Experiment, tmp_path: Path):
    """Both have found the folder free when the first begins."""
    run = tmp_path / "run"
    experiment = _with_trainer(tiny_experiment, max_epochs=1)
    make, started = training.make_loader, []

    def start_another(*arguments: Any, **options: Any) -> Any:
        if not started:
            started.append("another")
            fit(experiment, few, run)
        return make(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_loader", start_another)
        with pytest.raises(StorageError, match="holds a training run already"):
            fit(experiment, few, run)
    assert len(_history(run)) == 1


def test_a_run_is_resumed_from_what_nobody_changes_meanwhile(
    copied: Path, phantoms: Manifest, tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
):
    tried = []

    def load(folder: Path) -> Any:
        with pytest.raises(StorageError, match="A training is at work in"), held(copied, already_training(copied)):
            pass
        tried.append("held")
        return load_checkpoint(folder)

    monkeypatch.setattr(training, "load_checkpoint", load)
    fit(tiny_experiment, phantoms, copied, resume=True)
    assert tried == ["held"]


# Starting --------------------------------------------------------------------------------------------------------


def test_an_existing_run_is_refused(finished: Path, phantoms: Manifest, tiny_experiment: Experiment):
    before = _content(finished)
    with pytest.raises(StorageError, match="holds a training run already") as caught:
        fit(tiny_experiment, phantoms, finished)
    assert "--resume last" in caught.value.hint
    assert "--overwrite" in caught.value.hint
    assert _content(finished) == before


def test_an_existing_run_is_replaced_on_request(copied: Path, few: Manifest, tiny_experiment: Experiment):
    fit(_with_trainer(tiny_experiment, max_epochs=1), few, copied, overwrite=True)
    assert len(_history(copied)) == 1
    assert len(json.loads((copied / "splits.json").read_text("utf-8"))["train"]) == 4


def test_a_file_in_the_place_of_the_folder_is_refused(few: Manifest, tiny_experiment: Experiment, tmp_path: Path):
    (tmp_path / "run").write_text("precious")
    with pytest.raises(StorageError, match="is a file"):
        fit(tiny_experiment, few, tmp_path / "run")
    assert (tmp_path / "run").read_text() == "precious"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_files_is_not_deleted(
    few: Manifest, tiny_experiment: Experiment, tmp_path: Path, overwrite: bool
):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(StorageError, match="no training run"):
        fit(_with_trainer(tiny_experiment, max_epochs=1), few, tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("obstacle", ["weights", "device", "options", "image"])
def test_a_start_that_fails_keeps_the_run_it_was_to_replace(
    copied: Path, phantoms: Manifest, tiny_experiment: Experiment, tmp_path: Path, obstacle: str
):
    encoder = tiny_experiment.model.image_encoder
    if obstacle == "weights":
        encoder = replace(encoder, weights=str(tmp_path / "missing"))
    elif obstacle == "options":
        encoder = replace(encoder, options={"hidden_sizes": [6, 6, 6, 6], "depths": [1, 1, 1, 1]})
    elif obstacle == "image":
        root = Path(shutil.copytree(phantoms.root, tmp_path / "data"))
        phantoms = Manifest(root, phantoms.records, phantoms.name)
        path = phantoms.image_path(phantoms.records[-9])
        path.write_bytes(path.read_bytes()[:-200])
    before = _content(copied)
    experiment = change(tiny_experiment, "tiny", model={"image_encoder": encoder})
    with pytest.raises((WeightsError, ConfigError, DataError)):
        fit(experiment, phantoms, copied, overwrite=True, device="tpu" if obstacle == "device" else "cpu")
    assert _content(copied) == before


def test_missing_splits_are_listed(phantoms: Manifest, tiny_experiment: Experiment, tmp_path: Path):
    with pytest.raises(DataError, match=r"no split 'val'; it has train \(16\)"):
        fit(tiny_experiment, phantoms.split("train"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_sentences_are_refused_when_they_guide(few: Manifest, tiny_experiment: Experiment, tmp_path: Path):
    silent = few.with_records(replace(record, text=None) for record in few.records)
    with pytest.raises(DataError, match="have no sentence"):
        fit(tiny_experiment, silent, tmp_path / "run")


def test_an_image_only_model_needs_no_sentence(few: Manifest, tiny_experiment: Experiment, tmp_path: Path):
    silent = few.with_records(replace(record, text=None) for record in few.records)
    experiment = change(tiny_experiment, "tiny", model=IMAGE_ONLY, trainer={"max_epochs": 1})
    fit(experiment, silent, tmp_path / "run")
    assert not load_checkpoint(tmp_path / "run").reads_text
    assert not any("alignment" in name for name in _history(tmp_path / "run")[0])


def test_a_share_of_the_training_split_is_trained_on(phantoms: Manifest, tiny_experiment: Experiment, tmp_path: Path):
    fit(_with_trainer(tiny_experiment, max_epochs=1, train_fraction=0.25), phantoms, tmp_path / "run")
    splits = json.loads((tmp_path / "run" / "splits.json").read_text("utf-8"))
    expected = phantoms.split("train").fraction(0.25, tiny_experiment.seed)
    assert splits["train"] == [record.id for record in expected.records]
    assert len(splits["train"]) == 4
    assert len(splits["val"]) == 6


# Encoders --------------------------------------------------------------------------------------------------------


@pytest.fixture
def frozen(tiny_experiment: Experiment, bert_folder: Path) -> Experiment:
    text_encoder = replace(tiny_experiment.model.text_encoder, weights=str(bert_folder), freeze=True)
    return change(tiny_experiment, "tiny", model={"text_encoder": text_encoder})


def test_a_frozen_text_encoder_is_kept_and_encodes_each_sentence_once(
    phantoms: Manifest, frozen: Experiment, bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encoded: list[int] = []
    forward = BertModel.forward

    def counted(bert: BertModel, *arguments: object, **options: object) -> object:
        encoded.append(len(options["input_ids"]))  # type: ignore[arg-type]
        return forward(bert, *arguments, **options)

    monkeypatch.setattr(BertModel, "forward", counted)
    fit(frozen, phantoms, tmp_path / "run")
    used = phantoms.split("train").sentences + phantoms.split("val").sentences
    assert sum(encoded) == len(set(used))

    best, last = (tmp_path / "run" / "checkpoints" / name / TEXT_ENCODER_FILE for name in ("best", "last"))
    assert best.samefile(last)
    original = load_file(bert_folder / "model.safetensors")
    stored = load_file(last)
    assert stored.keys() == {f"text_encoder.backbone.{name}" for name in original}
    for name, value in original.items():
        assert torch.equal(stored[f"text_encoder.backbone.{name}"], value)
    assert not any("text_encoder" in name for name in load_file(last.parent / "model.safetensors"))


def test_a_run_with_a_frozen_text_encoder_resumes_without_its_weights(
    phantoms: Manifest, frozen: Experiment, tmp_path: Path
):
    bert = tmp_path / "bert"
    shutil.copytree(frozen.model.text_encoder.weights, bert)
    text_encoder = replace(frozen.model.text_encoder, weights=str(bert))
    experiment = change(frozen, "tiny", model={"text_encoder": text_encoder}, trainer={"max_epochs": 1})
    fit(experiment, phantoms, tmp_path / "run")
    shutil.rmtree(bert)
    record = fit(_with_trainer(experiment, max_epochs=2), phantoms, tmp_path / "run", resume=True)
    assert record.epochs == 2
    stored = [tmp_path / "run" / "checkpoints" / name / TEXT_ENCODER_FILE for name in ("best", "last")]
    assert stored[0].samefile(stored[1])


def _encoder_folder(folder: Path, values: dict | None) -> Path:
    folder.mkdir()
    if values is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def test_resolve_takes_the_encoders_own_mean_and_std(tiny_experiment: Experiment, tmp_path: Path):
    folder = _encoder_folder(tmp_path / "w", {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.1, 0.3]})
    encoder = replace(tiny_experiment.model.image_encoder, weights=str(folder))
    asked = change(
        tiny_experiment, "tiny", model={"image_encoder": encoder}, preprocessing={"normalisation": "encoder"}
    )
    resolved = resolve(asked).preprocessing
    assert (resolved.normalisation, resolved.mean, resolved.std) == ("fixed", (0.5, 0.4, 0.3), (0.2, 0.1, 0.3))
    assert resolve(asked) == replace(asked, preprocessing=resolved)


def test_resolve_leaves_the_others_alone(tiny_experiment: Experiment):
    for normalisation in ("per_image", "fixed"):
        experiment = change(tiny_experiment, "tiny", preprocessing={"normalisation": normalisation})
        assert resolve(experiment) is experiment


def test_resolve_needs_the_encoder_to_tell(tiny_experiment: Experiment, tmp_path: Path):
    for weights in ("none", str(_encoder_folder(tmp_path / "w", None))):
        encoder = replace(tiny_experiment.model.image_encoder, weights=weights)
        asked = change(
            tiny_experiment, "tiny", model={"image_encoder": encoder}, preprocessing={"normalisation": "encoder"}
        )
        with pytest.raises(ConfigError, match=r"preprocessor_config\.json"):
            resolve(asked)


# Optimisation ----------------------------------------------------------------------------------------------------


def test_learning_rate_factor_by_hand():
    assert [learning_rate_factor(step, 100, 4, 0.1) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate_factor(4, 100, 4, 0.1) == 1.0
    assert learning_rate_factor(52, 100, 4, 0.1) == pytest.approx(0.55)
    assert learning_rate_factor(28, 100, 4, 0.1) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert learning_rate_factor(100, 100, 4, 0.1) == pytest.approx(0.1)
    assert learning_rate_factor(1000, 100, 4, 0.1) == pytest.approx(0.1)
    assert learning_rate_factor(0, 10, 0, 0.0) == 1.0
    assert learning_rate_factor(5, 10, 0, 0.0) == pytest.approx(0.5)


def test_the_learning_rate_falls_after_warm_up():
    factors = [learning_rate_factor(step, 200, 20, 0.01) for step in range(260)]
    assert factors[:20] == sorted(factors[:20])
    assert factors[19:] == sorted(factors[19:], reverse=True)
    assert min(factors) == pytest.approx(0.01)
    assert max(factors) == 1


def test_restarts_begin_again_at_the_peak():
    factors = [learning_rate_factor(step, 10, 2, 0.1, restarts=True) for step in range(32)]
    assert factors[2] == factors[12] == factors[22] == 1.0
    assert factors[2:12] == pytest.approx(factors[12:22])
    assert factors[7] == pytest.approx(0.55)
    assert min(factors[2:]) > 0.1


def test_restarts_follow_epochs(few: Manifest, tiny_experiment: Experiment, tmp_path: Path):
    settings = {"schedule": "restarts", "restart_epochs": 1, "min_learning_rate": 0.0}
    fit(change(tiny_experiment, "tiny", optimiser=settings), few, tmp_path / "run")
    rates = [float(row["learning_rate"]) for row in _history(tmp_path / "run")]
    assert rates == pytest.approx([1e-3, 1e-3])  # each epoch ends where the next cosine begins


def test_a_plateau_lowers_the_learning_rate(few: Manifest, tiny_experiment: Experiment, tmp_path: Path):
    experiment = change(
        tiny_experiment,
        "tiny",
        optimiser={"schedule": "plateau", "plateau_patience": 1, "learning_rate": 1e-12, "min_learning_rate": 0.0},
        trainer={"max_epochs": 4, "patience": 4},
    )
    fit(experiment, few, tmp_path / "run")
    rates = [float(row["learning_rate"]) for row in _history(tmp_path / "run")]
    assert rates[0] == pytest.approx(1e-12)
    assert rates[-1] == pytest.approx(1e-13)  # too small a step for the loss to fall


def test_the_dice_may_choose_the_best_epoch(few: Manifest, tiny_experiment: Experiment, tmp_path: Path):
    experiment = change(tiny_experiment, "tiny", trainer={"max_epochs": 3, "min_epochs": 3, "monitor": "dice"})
    record = fit(experiment, few, tmp_path / "run")
    scores = [float(row["val_per_case_dice"]) for row in _history(tmp_path / "run")]
    assert record.best_score == pytest.approx(max(scores))
    assert record.best_epoch == 1 + scores.index(max(scores))


def test_a_schedule_may_be_longer_than_the_run(few: Manifest, tiny_experiment: Experiment, tmp_path: Path):
    experiment = change(
        tiny_experiment, "tiny", optimiser={"schedule_epochs": 4, "min_learning_rate": 0.0}, trainer={"max_epochs": 2}
    )
    fit(experiment, few, tmp_path / "run")
    rates = [float(row["learning_rate"]) for row in _history(tmp_path / "run")]
    assert rates == pytest.approx([1e-3 * learning_rate_factor(step, 4, 0, 0.0) for step in (1, 2)])


def test_gradients_of_several_batches_make_one_step(
    phantoms: Manifest, tiny_experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    steps: list[int] = []
    monkeypatch.setattr(SegmentationTask, "on_before_optimizer_step", lambda task, _: steps.append(task.global_step))
    experiment = _with_trainer(tiny_experiment, accumulate_batches=2, max_epochs=2)
    fit(experiment, phantoms, tmp_path / "run")
    assert steps == [0, 1, 2, 3]  # 16 images in batches of 4, two batches a step, two epochs
    assert float(_history(tmp_path / "run")[-1]["learning_rate"]) == pytest.approx(1e-6)


@pytest.mark.parametrize("pretrained", [True, False])
def test_every_trained_parameter_is_optimised_once_and_a_pretrained_encoder_at_its_own_rate(
    few: Manifest, tiny_experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrained: bool
):
    seen: list[list[dict]] = []
    configure = SegmentationTask.configure_optimizers

    def spy(task: SegmentationTask) -> object:
        result = configure(task)
        groups = result["optimizer"].param_groups
        optimised = [id(value) for group in groups for value in group["params"]]
        assert sorted(optimised) == sorted(id(value) for value in task.model.parameters() if value.requires_grad)
        encoder = {id(value) for value in task.model.image_encoder.parameters()}
        assert all(id(value) in encoder for value in groups[0]["params"])
        assert not any(id(value) in encoder for value in groups[1]["params"])
        seen.append([{"initial_lr": group["initial_lr"], "decay": group["weight_decay"]} for group in groups])
        return result

    monkeypatch.setattr(SegmentationTask, "configure_optimizers", spy)
    experiment = change(
        tiny_experiment, "tiny", optimiser={"encoder_factor": 0.1, "weight_decay": 0.05}, trainer={"max_epochs": 1}
    )
    encoder = experiment.model.image_encoder
    if pretrained:
        build_image_encoder(encoder, pooled=True).backbone.save_pretrained(tmp_path / "weights")
        encoder = ImageEncoderConfig(weights=str(tmp_path / "weights"))
    experiment = replace(experiment, model=replace(experiment.model, image_encoder=encoder))
    fit(experiment, few, tmp_path / "run")
    (groups,) = seen
    assert [group["initial_lr"] for group in groups] == pytest.approx([1e-4 if pretrained else 1e-3, 1e-3])
    assert [group["decay"] for group in groups] == [0.05, 0.05]


def test_the_gradient_norm_is_clipped(tiny_model: Callable[..., TMCA], tiny_experiment: Experiment):
    model = tiny_model()
    parameters = [value for value in model.parameters() if value.requires_grad]
    for clip, norm in ((0.5, 0.5), (None, None)):
        experiment = change(tiny_experiment, "tiny", optimiser={"gradient_clip": clip})
        for value in parameters:
            value.grad = torch.ones_like(value)
        before = math.sqrt(sum(value.numel() for value in parameters))
        task = SegmentationTask(model, experiment)
        task.on_before_optimizer_step(torch.optim.SGD(parameters, lr=1.0))
        after = math.sqrt(
            sum(float(value.grad.double().square().sum()) for value in parameters if value.grad is not None)
        )
        assert after == pytest.approx(norm or before, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 4], ids=["in validation", "in training"])
def test_a_loss_that_is_not_finite_is_explained(
    few: Manifest, phantoms: Manifest, tiny_experiment: Experiment, tmp_path: Path, steps: int
):
    experiment = change(tiny_experiment, "tiny", optimiser={"learning_rate": 1e30}, trainer={"max_epochs": 4})
    with pytest.raises(TMCAError, match=r"(nan|inf) in epoch \d") as caught:
        fit(experiment, few if steps == 1 else phantoms, tmp_path / "run")
    assert "learning_rate" in caught.value.hint


def test_training_in_bfloat16(few: Manifest, tiny_experiment: Experiment, tmp_path: Path):
    fit(_with_trainer(tiny_experiment, precision="bf16", max_epochs=1), few, tmp_path / "run")
    weights = load_file(tmp_path / "run" / "checkpoints" / "last" / "model.safetensors")
    assert {value.dtype for value in weights.values()} <= {torch.float32, torch.int64}
    assert math.isfinite(float(_history(tmp_path / "run")[0]["val_loss"]))


def test_an_unknown_device_is_refused(few: Manifest, tiny_experiment: Experiment, tmp_path: Path):
    with pytest.raises(ConfigError, match="Unknown device 'tpu'"):
        fit(tiny_experiment, few, tmp_path / "run", device="tpu")


# Averaged weights ------------------------------------------------------------------------------------------------


def test_the_average_follows_by_its_decay(tiny_model: Callable[..., TMCA]):
    average, model = averaged_copy(tiny_model(seed=1)), tiny_model(seed=2)
    before = {name: value.clone() for name, value in average.state_dict().items()}
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                value.fill_(7)
    follow(average, model, 0.75)
    for name, value in average.state_dict().items():
        now = model.state_dict()[name]
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * now, msg=name)
        else:
            assert torch.equal(value, now), name
    assert not any(value.requires_grad for value in average.parameters())


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_average_of_a_run_is_what_is_validated_and_kept(
    phantoms: Manifest, tiny_experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulated: int
):
    steps: list[torch.Tensor] = []
    optimiser_step = SegmentationTask.optimizer_step

    def record(task: SegmentationTask, *arguments: object, **options: object) -> None:
        optimiser_step(task, *arguments, **options)
        steps.append(task.model.head.state_dict()[name].clone())

    name = next(iter(build_model(tiny_experiment.model, phantoms.sentences).head.state_dict()))
    monkeypatch.setattr(SegmentationTask, "optimizer_step", record)
    trainer = {"max_epochs": 1, "accumulate_batches": accumulated}
    experiment = change(tiny_experiment, "tiny", optimiser={"average_decay": 0.3}, trainer=trainer)
    fit(experiment, phantoms, tmp_path / "run")
    stored = {
        kind: load_file(tmp_path / "run" / "checkpoints" / kind / "model.safetensors")[f"head.{name}"]
        for kind in ("last", "best")
    }
    assert torch.equal(stored["last"], steps[-1])
    # The start is forgotten faster: (1 + n) / (10 + n) after n steps, until that exceeds the decay.
    decays = [min(0.3, (1 + number) / (10 + number)) for number in range(1, len(steps) + 1)]
    torch.manual_seed(experiment.seed)
    average = build_model(experiment.model, phantoms.split("train").sentences).head.state_dict()[name]
    for decay, value in zip(decays, steps, strict=True):
        average = decay * average + (1 - decay) * value
    torch.testing.assert_close(stored["best"], average)

    validated = float(_history(tmp_path / "run")[0]["val_segmentation_loss"])
    assert _validation_loss(load_checkpoint(tmp_path / "run"), phantoms) == pytest.approx(validated, rel=1e-4)
    unaveraged = _validation_loss(load_checkpoint(tmp_path / "run" / "checkpoints" / "last"), phantoms)
    assert abs(unaveraged / validated - 1) > 1e-3


def test_a_frozen_text_encoder_is_not_averaged(frozen: Experiment, phantoms: Manifest, tmp_path: Path):
    model = build_model(frozen.model)
    average = averaged_copy(model)
    assert average.text_encoder is model.text_encoder
    assert average.head is not model.head
    fit(change(frozen, "tiny", optimiser={"average_decay": 0.5}, trainer={"max_epochs": 1}), phantoms, tmp_path / "run")
    stored = [tmp_path / "run" / "checkpoints" / name / TEXT_ENCODER_FILE for name in ("best", "last")]
    assert stored[0].samefile(stored[1])
    state = torch.load(tmp_path / "run" / "checkpoints" / "last" / "trainer_state.ckpt", weights_only=True)
    assert not any("text_encoder" in name for name in state["state_dict"])


# Stopping --------------------------------------------------------------------------------------------------------


@pytest.fixture
def worsening(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the segmentation loss grow with every batch, so that the first epoch stays the best."""
    calls = iter(range(1_000_000))

    def grow(*arguments: object) -> dict[str, torch.Tensor]:
        losses = objective(*arguments)  # type: ignore[arg-type]
        return losses | {"segmentation_loss": losses["segmentation_loss"] + next(calls)}

    monkeypatch.setattr(task, "objective", grow)


@pytest.mark.parametrize(("min_epochs", "expected"), [(1, 3), (5, 5)])
@pytest.mark.usefixtures("worsening")
def test_training_stops_when_validation_no_longer_improves(
    few: Manifest, tiny_experiment: Experiment, tmp_path: Path, min_epochs: int, expected: int
):
    experiment = _with_trainer(tiny_experiment, max_epochs=7, min_epochs=min_epochs, patience=2)
    record = fit(experiment, few, tmp_path / "run")
    assert (record.epochs, record.best_epoch) == (expected, 1)
    assert record.stopped == "no better validation loss for 2 epochs"
    assert len(_history(tmp_path / "run")) == expected


@pytest.mark.usefixtures("worsening")
def test_a_resumed_run_remembers_its_best_epoch(few: Manifest, tiny_experiment: Experiment, tmp_path: Path):
    first = fit(_with_trainer(tiny_experiment, max_epochs=1), few, tmp_path / "run")
    before = _content(tmp_path / "run" / "checkpoints" / "best")
    second = fit(_with_trainer(tiny_experiment, max_epochs=2), few, tmp_path / "run", resume=True)
    assert (second.epochs, second.best_epoch, second.best_score) == (2, 1, first.best_score)
    assert _content(tmp_path / "run" / "checkpoints" / "best") == before


@pytest.mark.usefixtures("worsening")
def test_a_stopped_run_goes_on_with_more_patience(few: Manifest, tiny_experiment: Experiment, tmp_path: Path):
    experiment = _with_trainer(tiny_experiment, max_epochs=7, min_epochs=1, patience=1)
    assert fit(experiment, few, tmp_path / "run").epochs == 2
    record = fit(_with_trainer(experiment, patience=4), few, tmp_path / "run", resume=True)
    assert record.epochs == 5


def test_a_run_that_was_started_meanwhile_is_not_replaced(
    few: Manifest, tiny_experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = tmp_path / "run" / "experiment.json"

    def fill(cache: DecodedCache) -> Iterator[int]:
        other.parent.mkdir(exist_ok=True)
        other.write_text("another's")
        yield from original(cache)

    original = DecodedCache.fill
    monkeypatch.setattr(DecodedCache, "fill", fill)
    with pytest.raises(StorageError, match="holds a training run already"):
        fit(tiny_experiment, few, tmp_path / "run")
    assert other.read_text() == "another's"


def test_a_best_epoch_is_kept_before_it_is_taken_for_kept(
    few: Manifest,
    tiny_experiment: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scripted: Callable[[Sequence[float]], None],
):
    scripted([3.0, 1.0, 2.0])
    experiment = _with_trainer(tiny_experiment, max_epochs=3, min_epochs=3, patience=5)
    whole = fit(experiment, few, tmp_path / "whole")
    writes = iter(range(100))

    def fail(*arguments: Any, **options: Any) -> None:
        if next(writes) == 3:  # best and last of the first epoch, best of the second: the disk is full
            raise StorageError("The disk is full", hint="")
        write(*arguments, **options)

    write = writer.write_checkpoint
    monkeypatch.setattr(writer, "write_checkpoint", fail)
    with pytest.raises(StorageError):
        fit(experiment, few, tmp_path / "run")
    again = fit(experiment, few, tmp_path / "run", resume=True)
    assert (again.epochs, again.best_epoch) == (whole.epochs, whole.best_epoch) == (3, 2)
    best = [load_file(tmp_path / name / "checkpoints" / "best" / "model.safetensors") for name in ("whole", "run")]
    assert all(torch.equal(value, best[1][name]) for name, value in best[0].items())


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[float]], None]:
    """Let the validation loss of each epoch, from the first on, be what is asked for."""

    def prescribe(values: Sequence[float]) -> None:
        original = task.SegmentationTask.log_dict

        def log(self: task.SegmentationTask, named: dict[str, Any], **options: Any) -> None:
            if "val_segmentation_loss" in named:
                named = named | {"val_segmentation_loss": torch.tensor(float(values[self.current_epoch]))}
            original(self, named, **options)

        monkeypatch.setattr(task.SegmentationTask, "log_dict", log)

    return prescribe


def test_patience_that_ran_out_before_the_least_epochs_is_forgotten(
    few: Manifest, tiny_experiment: Experiment, tmp_path: Path, scripted: Callable[[Sequence[float]], None]
):
    scripted([5, 6, 7, 4, 3, 2, 3, 3, 1])
    experiment = _with_trainer(tiny_experiment, max_epochs=9, min_epochs=5, patience=2)
    record = fit(experiment, few, tmp_path / "run")
    assert (record.epochs, record.best_epoch) == (8, 6)
    fit(_with_trainer(experiment, max_epochs=4), few, tmp_path / "parts")
    again = fit(experiment, few, tmp_path / "parts", resume=True)
    assert (again.epochs, again.best_epoch, again.stopped) == (8, 6, record.stopped)


def test_a_run_that_has_ended_stays_ended_when_it_is_resumed(
    few: Manifest, tiny_experiment: Experiment, tmp_path: Path, scripted: Callable[[Sequence[float]], None]
):
    scripted([5, 6, 7, 1, 1, 1, 1, 1])
    experiment = _with_trainer(tiny_experiment, max_epochs=8, min_epochs=1, patience=2)
    record = fit(experiment, few, tmp_path / "run")
    assert record.epochs == 3
    assert fit(experiment, few, tmp_path / "run", resume=True) == record
    limited = _with_trainer(tiny_experiment, max_epochs=8, min_epochs=4, patience=9, max_train_seconds=1e-3)
    record = fit(limited, few, tmp_path / "limited")
    assert (record.epochs, record.stopped) == (1, "time limit reached")
    assert fit(limited, few, tmp_path / "limited", resume=True) == record


def test_a_resumed_plateau_counts_on(
    few: Manifest, tiny_experiment: Experiment, tmp_path: Path, scripted: Callable[[Sequence[float]], None]
):
    scripted([1.0] * 6)
    settings = {"schedule": "plateau", "plateau_patience": 1, "min_learning_rate": 0.0}
    trainer = {"max_epochs": 6, "min_epochs": 6, "patience": 9, "monitor": "dice"}
    experiment = change(tiny_experiment, "tiny", optimiser=settings, trainer=trainer)
    fit(experiment, few, tmp_path / "whole")
    for epochs in (2, 3, 6):
        part = _with_trainer(experiment, max_epochs=epochs, min_epochs=epochs)
        fit(part, few, tmp_path / "parts", resume=epochs > 2)
    rates = [[row["learning_rate"] for row in _history(tmp_path / name)] for name in ("whole", "parts")]
    assert rates[0] == rates[1]
    assert float(rates[0][-1]) < float(rates[0][0]) / 50


def test_training_stops_at_the_time_limit(few: Manifest, tiny_experiment: Experiment, tmp_path: Path):
    experiment = _with_trainer(tiny_experiment, max_epochs=5, min_epochs=3, max_train_seconds=1e-3)
    record = fit(experiment, few, tmp_path / "run")
    assert (record.epochs, record.stopped) == (1, "time limit reached")
    load_checkpoint(tmp_path / "run")


# Learning --------------------------------------------------------------------------------------------------------


def test_four_phantoms_are_learned_by_heart(phantoms: Manifest, tiny_experiment: Experiment, tmp_path: Path):
    four = phantoms.split("train").records[:4]
    many = [replace(record, id=f"{record.id}-{copy}") for record in four for copy in range(20)]
    manifest = phantoms.with_records([*many, *(replace(record, split="val") for record in four)])
    experiment = change(
        tiny_experiment,
        "tiny",
        augmentation={"zoom_probability": 0.0},
        optimiser={"learning_rate": 5e-3, "warmup_steps": 5},
        trainer={"max_epochs": 8, "min_epochs": 8, "patience": 8},
    )
    fit(experiment, manifest, tmp_path / "run")
    evaluation = evaluate(load_checkpoint(tmp_path / "run"), manifest, "val")
    assert evaluation.pooled()["dice"] > 0.95
    first, last = _history(tmp_path / "run")[0], _history(tmp_path / "run")[-1]
    assert float(last["train_alignment_excess"]) < float(first["train_alignment_excess"]) / 2


# Golden ----------------------------------------------------------------------------------------------------------


def _golden_values(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Logits, losses and twenty steps of a tiny seeded model on four drawn phantoms, float32 on one thread."""
    drawn = [draw_phantom(np.random.default_rng(number), 64) for number in range(4)]
    texts = tuple(phantom.text for phantom in drawn)
    _write_tokenizer(folder, sorted({word for text in texts for word in text.replace(",", " ,").split()}))
    torch.manual_seed(0)
    model = build_model(experiment.model, tokenizer=SentenceTokenizer.read(folder, 24))
    images = torch.stack([prepare_image(phantom.image, experiment.preprocessing) for phantom in drawn])
    masks = torch.from_numpy(np.stack([phantom.mask for phantom in drawn]))[:, None]
    batch = Batch(("a", "b", "c", "d"), images, masks, texts)
    task = SegmentationTask(model, experiment)

    model.eval()
    with torch.no_grad():
        losses, logits = task.shared_step(model, batch)
    model.train()
    # A small rate: at larger ones the last bits, which differ by processor, grow to a percent within twenty steps.
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    curve = []
    for _ in range(20):
        loss = task.shared_step(model, batch)[0]["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        curve.append(loss.item())
    return {
        "sentences": list(texts),
        "logits": {
            "mean": float(logits.mean()),
            "std": float(logits.std()),
            "smallest": float(logits.min()),
            "largest": float(logits.max()),
            "pixels": logits[:, 0, ::21, ::21].flatten().tolist(),
        },
        "losses": {name: float(value) for name, value in losses.items()},
        "curve": curve,
    }


def test_logits_losses_and_first_steps_are_those_of_the_golden_file(tiny_experiment: Experiment, tmp_path: Path):
    values = _golden_values(tiny_experiment, tmp_path)
    if os.environ.get("TMCA_UPDATE_GOLDEN") == "1":
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text("utf-8"))
    assert values["sentences"] == golden["sentences"]
    for name in ("logits", "losses"):
        assert values[name].keys() == golden[name].keys()
        for key, expected in golden[name].items():
            np.testing.assert_allclose(values[name][key], expected, rtol=1e-3, atol=1e-5, err_msg=f"{name}.{key}")
    np.testing.assert_allclose(values["curve"], golden["curve"], rtol=1e-3, err_msg="loss curve")
