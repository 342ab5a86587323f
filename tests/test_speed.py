from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tmca import speed
from tmca.cli import run
from tmca.errors import ConfigError
from tmca.models import TMCA
from tmca.presets import get_preset
from tmca.speed import Profile, Stage, in_words, measure_speed, profile_table, random_model


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "MATRIX", 64)
    monkeypatch.setattr(speed, "SOURCE_SIZE", 48)
    monkeypatch.setattr(speed, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(speed, "LEAST_REPEATS", 1)


def test_every_stage_of_prediction_and_training_is_timed(tiny_model: Callable[..., TMCA]):
    found = measure_speed(tiny_model(), device="cpu", batch_sizes=(1, 3), training_batch=2)
    assert (found.preset, found.image_size, found.device) == ("tiny", 64, "cpu")
    assert [profile.batch_size for profile in found.profiles] == [1, 3, 2]
    assert [stage.name for stage in found.profiles[0].stages] == [
        "read, resize, normalise",
        "encode the image",
        "encode the sentence",
        "segment",
        "resize back, write",
    ]
    assert [stage.name for stage in found.profiles[2].stages] == [
        "read, resize, augment",
        "forward, loss",
        "backward",
        "update",
    ]
    assert all(rate > 0 for rate in found.limits.values())
    for profile in found.profiles:
        assert all(stage.milliseconds > 0 for stage in profile.stages)
        assert profile.images_per_second == pytest.approx(1e3 / sum(stage.milliseconds for stage in profile.stages))


def test_arithmetic_is_counted_an_image(tiny_model: Callable[..., TMCA]):
    model = tiny_model()
    one, three = measure_speed(model, device="cpu", batch_sizes=(1, 3), training_batch=0).profiles
    for single, several in zip(one.stages[1:2] + one.stages[3:4], three.stages[1:2] + three.stages[3:4], strict=True):
        assert single.gigaflops > 0
        assert several.gigaflops == pytest.approx(single.gigaflops, rel=0.01)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model.encode_image(torch.zeros(1, 3, 64, 64))
    assert one.stages[1].gigaflops == pytest.approx(counter.get_total_flops() / 1e9)


def test_the_backward_pass_counts_twice(tiny_model: Callable[..., TMCA]):
    (training,) = measure_speed(tiny_model(), device="cpu", batch_sizes=(1,), training_batch=2).profiles[1:]
    forward, backward = training.stages[1:3]
    assert backward.gigaflops == 2 * forward.gigaflops > 0


def test_a_frozen_text_encoder_costs_a_training_step_nothing(tiny_model: Callable[..., TMCA]):
    counts = []
    for freeze in (False, True):
        model = tiny_model()
        model.text_encoder.config = replace(model.text_encoder.config, weights="a folder", freeze=freeze)
        model.text_encoder.requires_grad_(not freeze)
        prediction, training = measure_speed(model, device="cpu", batch_sizes=(2,), training_batch=2).profiles
        of_text = prediction.stages[2].gigaflops
        counts.append(training.stages[1].gigaflops)
    assert counts[0] - counts[1] == pytest.approx(of_text, rel=0.1)
    assert of_text > 0


def test_the_share_of_the_limit():
    assert Stage("segment", milliseconds=10.0, gigaflops=2.0).share_of_limit(400.0) == pytest.approx(0.5)
    assert Stage("write", milliseconds=10.0).share_of_limit(400.0) is None


def test_the_table_names_stages_and_shares():
    table = profile_table(Profile("Prediction", 1, (Stage("a", 15.0, 3.0), Stage("b", 5.0)), "float32", 400.0))
    assert "Prediction, float32: 50.0 images a second" in str(table.title)
    columns = [list(column.cells) for column in table.columns]
    assert columns == [["a", "b"], ["15.00", "5.00"], ["75%", "25%"], ["3.00", "–"], ["50%", "–"]]


@pytest.mark.parametrize("preset", ["kvasir-mobile", "image-only", "unet", "tganet"])
def test_an_untrained_model_needs_no_weights(preset: str):
    model = random_model(get_preset(preset))
    assert model.experiment is not None
    assert model.experiment.preprocessing.normalisation == "fixed"
    assert model.reads_text == (preset == "kvasir-mobile")


@pytest.mark.parametrize(("preset", "image", "text"), [("lga", "sam", "bert"), ("cpam", None, "clip_text_model")])
def test_an_untrained_model_has_the_encoders_of_its_preset(preset: str, image: str | None, text: str):
    with torch.device("meta"):  # they are large
        model = random_model(get_preset(preset))
    assert (model.image_architecture() or {}).get("architecture") == image
    assert model.text_encoder is not None
    assert model.text_encoder.backbone.config.model_type == text


def test_what_is_planned_for_its_data_is_refused():
    with pytest.raises(ConfigError, match="nnU-Net plans its network"):
        random_model(get_preset("nnunet"))


def test_a_method_that_predicts_in_float32_is_timed_in_float32(tiny_model: Callable[..., Any]):
    found = measure_speed(tiny_model(method="unet"), device="cpu", batch_sizes=(1,), training_batch=0)
    assert found.profiles[0].precision == "float32"
    assert found.profiles[0].limit == found.limits["float32"]


@pytest.mark.parametrize("sizes", [{"batch_sizes": ()}, {"batch_sizes": (0,)}, {"training_batch": -1}])
def test_impossible_batch_sizes_are_refused(tiny_model: Callable[..., TMCA], sizes: dict[str, Any]):
    with pytest.raises(ConfigError, match="expected"):
        measure_speed(tiny_model(), device="cpu", **sizes)


def test_a_model_must_know_its_preprocessing(tiny_model: Callable[..., TMCA]):
    model = tiny_model()
    model.experiment = None
    with pytest.raises(ConfigError, match="preprocessing"):
        measure_speed(model)


def test_the_verb_prints_the_tables_and_writes_a_file(
    tiny_model: Callable[..., TMCA], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tiny_model().save_pretrained(tmp_path / "model")
    command = ["bench", "-m", str(tmp_path / "model"), "--batch-sizes", "2", "--training-batch", "2", "-d", "cpu"]
    assert run([*command, "-o", str(tmp_path / "speed.json")]) == 0
    printed = capsys.readouterr().out
    assert "tiny at 64 pixels on cpu" in printed
    assert "Prediction, 2 at a time" in printed
    assert "Training, batches of 2" in printed
    written = json.loads((tmp_path / "speed.json").read_text())
    assert [profile["batch_size"] for profile in written["profiles"]] == [2, 2]
    assert written["environment"]["hardware"]["processor"]


def test_words_say_what_was_timed(tiny_model: Callable[..., TMCA]):
    found = measure_speed(tiny_model(), device="cpu", batch_sizes=(1,), training_batch=0)
    assert "threads" in in_words(found)
    assert "threads" not in in_words(replace(found, device="cuda"))
