from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from tmca.config import (
    AlignmentConfig,
    AugmentationConfig,
    DecoderConfig,
    EnhancementConfig,
    Experiment,
    ImageEncoderConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimiserConfig,
    PreprocessingConfig,
    TextEncoderConfig,
    TrainerConfig,
    config_hash,
    from_dict,
    to_dict,
)
from tmca.errors import ConfigError
from tmca.presets import PRESETS, get_preset


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name: str):
    experiment = get_preset(name)
    values = json.loads(json.dumps(to_dict(experiment)))
    again = from_dict(Experiment, values)
    assert again == experiment
    assert to_dict(again) == values
    assert isinstance(again.model.alignment.strides, tuple)
    assert config_hash(again) == config_hash(experiment)


def test_fields_that_are_left_out_take_their_default():
    assert from_dict(Experiment, {}) == Experiment()
    values = {"model": {"alignment": {"strides": [32]}}, "trainer": {"max_train_seconds": 60.0}}
    experiment = from_dict(Experiment, values)
    assert experiment.model.alignment == AlignmentConfig(strides=(32,), align_global=True)
    assert experiment.trainer == TrainerConfig(max_train_seconds=60.0)


def test_from_dict_leaves_its_input_alone():
    values = to_dict(get_preset("tiny"))
    before = copy.deepcopy(values)
    from_dict(Experiment, values)
    assert values == before


def test_configs_are_frozen():
    with pytest.raises(FrozenInstanceError):
        Experiment().seed = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message", "hint"),
    [
        ({"sed": 2}, "Unknown field of Experiment 'sed'; known: augmentation, model,", "did you mean 'seed'?"),
        (
            {"trainer": {"batchsize": 2}},
            "Unknown field of trainer 'batchsize'; known: accumulate_batches,",
            "did you mean 'batch_size'?",
        ),
        (
            {"model": {"text_encoder": {"frozen": True}}},
            "Unknown field of model.text_encoder 'frozen'; known: ",
            "did you mean 'freeze'?",
        ),
        (
            {"model": {"enhancement": {"mode": "gate"}}},
            "Unknown model.enhancement.mode 'gate'; known: gated, multiply, off",
            "did you mean 'gated'?",
        ),
        (
            {"preprocessing": {"normalisation": None}},
            "Unknown preprocessing.normalisation 'None'; known: encoder, fixed, per_image",
            "choose one of the known names",
        ),
    ],
)
def test_an_unknown_name_lists_the_known_ones(values: dict[str, Any], message: str, hint: str):
    with pytest.raises(ConfigError) as caught:
        from_dict(Experiment, values)
    assert caught.value.message.startswith(message)
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": "1"}, "seed is '1', expected int"),
        ({"seed": 1.5}, "seed is 1.5, expected int"),
        ({"seed": True}, "seed is True, expected int"),
        ({"seed": None}, "seed is None, expected int"),
        ({"name": 3}, "name is 3, expected str"),
        ({"optimiser": {"learning_rate": "fast"}}, "optimiser.learning_rate is 'fast', expected float"),
        ({"optimiser": {"learning_rate": False}}, "optimiser.learning_rate is False, expected float"),
        ({"optimiser": {"gradient_clip": "no"}}, "optimiser.gradient_clip is 'no', expected float"),
        ({"optimiser": {"schedule_epochs": 2.5}}, "optimiser.schedule_epochs is 2.5, expected int"),
        ({"model": {"guidance": 1}}, "model.guidance is 1, expected bool"),
        ({"model": {"guidance": "yes"}}, "model.guidance is 'yes', expected bool"),
        ({"model": {"decoder": 4}}, "model.decoder is 4, expected an object"),
        ({"trainer": []}, "trainer is [], expected an object"),
        ({"trainer": None}, "trainer is None, expected an object"),
    ],
)
def test_a_value_of_another_type_is_refused(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        from_dict(Experiment, values)
    assert caught.value.message == message
    assert caught.value.hint == "see `tmca presets show NAME`"


def test_null_serves_as_none():
    config = from_dict(OptimiserConfig, {"schedule_epochs": None, "gradient_clip": None})
    assert config == OptimiserConfig(schedule_epochs=None, gradient_clip=None)
    assert from_dict(DecoderConfig, {"channels": None}).channels is None
    assert from_dict(DecoderConfig, {"channels": [8, 16, 24]}).channels == (8, 16, 24)


def test_a_whole_number_in_json_is_read_as_a_float():
    config = from_dict(OptimiserConfig, {"weight_decay": 1, "gradient_clip": 2})
    assert isinstance(config.weight_decay, float)
    assert isinstance(config.gradient_clip, float)
    assert config == OptimiserConfig(weight_decay=1.0, gradient_clip=2.0)


NO_ALIGNMENT = AlignmentConfig(strides=(), align_global=False)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PreprocessingConfig(image_size=31), "preprocessing.image_size is 31, expected at least 32"),
        (lambda: PreprocessingConfig(std=(0.1, 0.0, 0.1)), "preprocessing.std is (0.1, 0.0, 0.1), expected positive"),
        (lambda: AugmentationConfig(zoom_probability=1.1), "augmentation.zoom_probability is 1.1, expected a share"),
        (
            lambda: AugmentationConfig(mirror_probability=-1.0),
            "augmentation.mirror_probability is -1.0, expected a share",
        ),
        (lambda: AugmentationConfig(text_dropout=2.0), "augmentation.text_dropout is 2.0, expected a share in [0, 1]"),
        (lambda: AugmentationConfig(zoom_range=(1.2, 0.9)), "augmentation.zoom_range is (1.2, 0.9), expected 0 < low"),
        (lambda: AugmentationConfig(zoom_range=(0.0, 1.0)), "augmentation.zoom_range is (0.0, 1.0), expected 0 < low"),
        (lambda: AugmentationConfig(brightness=1.0), "augmentation.brightness is 1.0, expected a value in [0, 1)"),
        (lambda: AugmentationConfig(contrast=-0.1), "augmentation.contrast is -0.1, expected a value in [0, 1)"),
        (lambda: TextEncoderConfig(max_tokens=3), "text_encoder.max_tokens is 3, expected a number from 4 to 512"),
        (lambda: TextEncoderConfig(max_tokens=513), "text_encoder.max_tokens is 513, expected a number from 4 to 512"),
        (lambda: TextEncoderConfig(word_layers=0), "text_encoder.word_layers is 0, expected at least 1"),
        (
            lambda: TextEncoderConfig(hidden_size=30),
            "text_encoder.hidden_size is 30, expected a multiple of attention_heads (4)",
        ),
        (lambda: TextEncoderConfig(weights="scratch"), "A scratch text encoder cannot be frozen"),
        (lambda: AlignmentConfig(strides=(4,)), "alignment.strides is (4,), expected a subset of (8, 16, 32)"),
        (lambda: AlignmentConfig(strides=(32, 16)), "alignment.strides is (32, 16), expected ascending order"),
        (lambda: AlignmentConfig(strides=(8, 8)), "alignment.strides is (8, 8), expected ascending order"),
        (
            lambda: EnhancementConfig(attention_temperature=0.0),
            "enhancement.attention_temperature is 0.0, expected a positive value",
        ),
        (lambda: ModelConfig(guidance=False), "guidance is off but alignment or enhancement is on"),
        (
            lambda: ModelConfig(guidance=False, alignment=NO_ALIGNMENT),
            "guidance is off but alignment or enhancement is on",
        ),
        (
            lambda: ModelConfig(guidance=False, enhancement=EnhancementConfig(mode="off")),
            "guidance is off but alignment or enhancement is on",
        ),
        (lambda: ObjectiveConfig(target_temperature=0.0), "objective.target_temperature is 0.0, expected a positive"),
        (lambda: ObjectiveConfig(logit_temperature=-1.0), "objective.logit_temperature is -1.0, expected a positive"),
        (
            lambda: ObjectiveConfig(logit_temperature=math.nan),
            "objective.logit_temperature is nan, expected a positive",
        ),
        (lambda: ObjectiveConfig(alignment_weight=-1.0), "objective.alignment_weight is -1.0, expected zero or more"),
        (lambda: ObjectiveConfig(dice_weight=-1.0), "objective.dice_weight is -1.0, expected zero or more"),
        (
            lambda: ObjectiveConfig(dice_weight=0.0, cross_entropy_weight=0.0),
            "objective.dice_weight + cross_entropy_weight is 0, expected a positive sum",
        ),
        (lambda: OptimiserConfig(learning_rate=0.0), "optimiser.learning_rate is 0.0, expected a positive value"),
        (
            lambda: OptimiserConfig(min_learning_rate=1.0),
            "optimiser.min_learning_rate is 1.0, expected a value from 0 to",
        ),
        (lambda: TrainerConfig(batch_size=0), "trainer.batch_size is 0, expected at least 1"),
        (lambda: TrainerConfig(evaluation_batch_size=0), "trainer.evaluation_batch_size is 0, expected at least 1"),
        (lambda: TrainerConfig(accumulate_batches=0), "trainer.accumulate_batches is 0, expected at least 1"),
        (lambda: TrainerConfig(max_epochs=0), "trainer.max_epochs is 0, expected at least 1"),
        (lambda: TrainerConfig(patience=0), "trainer.patience is 0, expected at least 1"),
        (lambda: TrainerConfig(num_workers=-1), "trainer.num_workers is -1, expected zero or more"),
        (lambda: TrainerConfig(train_fraction=0.0), "trainer.train_fraction is 0.0, expected a share in (0, 1]"),
        (lambda: TrainerConfig(train_fraction=1.5), "trainer.train_fraction is 1.5, expected a share in (0, 1]"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(build: Callable[[], object], message: str):
    with pytest.raises(ConfigError) as caught:
        build()
    assert caught.value.message.startswith(message)
    assert caught.value.hint


def test_a_value_is_validated_wherever_it_comes_from():
    with pytest.raises(ConfigError, match=r"alignment\.strides"):
        from_dict(Experiment, {"model": {"alignment": {"strides": [4]}}})
    with pytest.raises(ConfigError, match="guidance is off"):
        from_dict(Experiment, {"model": {"guidance": False}})


@pytest.mark.parametrize(
    "build",
    [
        lambda: PreprocessingConfig(image_size=32),
        lambda: AugmentationConfig(zoom_probability=1.0, zoom_range=(1.0, 1.0), text_dropout=1.0, brightness=0.99),
        lambda: TextEncoderConfig(max_tokens=4),
        lambda: TextEncoderConfig(max_tokens=512, word_layers=1),
        lambda: TextEncoderConfig(weights="scratch", freeze=False),
        lambda: AlignmentConfig(strides=()),
        lambda: ModelConfig(guidance=False, alignment=NO_ALIGNMENT, enhancement=EnhancementConfig(mode="off")),
        lambda: ObjectiveConfig(alignment_weight=0.0, cross_entropy_weight=0.0),
        lambda: OptimiserConfig(min_learning_rate=0.0),
        lambda: TrainerConfig(batch_size=1, num_workers=0, train_fraction=1.0, max_train_seconds=None),
    ],
)
def test_the_edges_of_what_makes_sense_are_accepted(build: Callable[[], object]):
    assert build() == build()


def test_the_hash_is_a_function_of_the_values():
    assert config_hash(Experiment()) == "44136fa355b3678a"  # nothing differs from the defaults: the hash of {}
    hashes = {config_hash(get_preset(name)) for name in PRESETS}
    assert len(hashes) == len(PRESETS)
    assert config_hash(replace(Experiment(), seed=2)) != config_hash(Experiment())
    first, second = ({"depths": [1], "hidden_sizes": [2]}, {"hidden_sizes": [2], "depths": [1]})
    assert _hash_with(options=first) == _hash_with(options=second) != _hash_with(options={"depths": [1]})


def test_what_changes_no_result_is_not_hashed():
    trainer = TrainerConfig(evaluation_batch_size=3, num_workers=2)
    assert config_hash(replace(Experiment(), name="renamed", trainer=trainer)) == config_hash(Experiment())
    assert config_hash(replace(Experiment(), trainer=TrainerConfig(batch_size=3))) != config_hash(Experiment())


@pytest.mark.parametrize("form", [{"dice_form": "batch"}, {"cross_entropy_form": "balanced"}])
def test_the_size_of_validation_batches_counts_where_their_pixels_are_joined(form: dict[str, Any]):
    joined = replace(Experiment(), objective=ObjectiveConfig(**form))
    trainer = TrainerConfig(evaluation_batch_size=3)
    assert config_hash(replace(joined, trainer=trainer)) != config_hash(joined)


def test_options_are_what_json_gives_back():
    options = {"widths": (4, 8), "inner": {"depths": ((1, 2), 3)}}
    plain = {"widths": [4, 8], "inner": {"depths": [[1, 2], 3]}}
    assert ModelConfig(options=options).options == ImageEncoderConfig(options=options).options == plain


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_generator_takes_is_refused(seed: int):
    with pytest.raises(ConfigError, match=f"seed is {seed}, expected a number from 0 to 4294967295"):
        Experiment(seed=seed)


def _hash_with(**image_encoder: Any) -> str:
    model = ModelConfig(image_encoder=ImageEncoderConfig(**image_encoder))
    return config_hash(replace(Experiment(), model=model))


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"preprocessing": {"mean": 0.5}}, "preprocessing.mean"),
        ({"preprocessing": {"std": 0.5}}, "preprocessing.std"),
        ({"preprocessing": {"mean": [0.5, 0.5]}}, "preprocessing.mean"),
        ({"preprocessing": {"mean": ["a", "b", "c"]}}, "preprocessing.mean"),
        ({"augmentation": {"zoom_range": ["a", "b"]}}, "augmentation.zoom_range"),
        ({"augmentation": {"zoom_range": [0.9, 1.0, 1.1]}}, "augmentation.zoom_range"),
        ({"model": {"decoder": {"text_tokens": [9, 12]}}}, "model.decoder.text_tokens"),
        ({"model": {"decoder": {"channels": "96"}}}, "model.decoder.channels"),
        ({"model": {"alignment": {"strides": 8}}}, "model.alignment.strides"),
        ({"model": {"image_encoder": {"options": [1]}}}, "model.image_encoder.options"),
    ],
)
def test_a_tuple_or_object_of_another_shape_is_refused(values: dict[str, Any], field: str):
    with pytest.raises(ConfigError) as caught:
        from_dict(Experiment, values)
    assert field.split(".")[-1] in caught.value.message


@pytest.mark.parametrize(
    "build",
    [
        lambda: TextEncoderConfig(attention_heads=0),
        lambda: TextEncoderConfig(layers=0, weights="scratch", freeze=False),
        lambda: TextEncoderConfig(dropout=1.5),
        lambda: DecoderConfig(text_tokens=(0, 12, 24)),
        lambda: DecoderConfig(attention_heads=0),
        lambda: DecoderConfig(head_channels=0),
        lambda: DecoderConfig(channels=(0, 64, 96)),
        lambda: OptimiserConfig(schedule_epochs=0),
        lambda: OptimiserConfig(warmup_steps=-1),
        lambda: OptimiserConfig(weight_decay=-0.1),
        lambda: OptimiserConfig(encoder_factor=-1.0),
        lambda: OptimiserConfig(gradient_clip=-1.0),
        lambda: TrainerConfig(max_train_seconds=-1.0),
        lambda: PreprocessingConfig(mean=(math.nan, 0.0, 0.0)),
    ],
)
def test_more_values_that_make_no_sense_are_refused(build: Callable[[], object]):
    with pytest.raises(ConfigError):
        build()
