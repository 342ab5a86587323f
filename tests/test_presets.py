from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tmca.config import AlignmentConfig, Experiment
from tmca.errors import ConfigError
from tmca.presets import PRESETS, TABLE_2, TABLE_3, change, describe_preset, differences, get_preset


def _differences(first: str, second: str) -> dict[str, tuple[Any, Any]]:
    found = differences(get_preset(first), get_preset(second))
    assert found.pop("name") == (first, second)
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_knows_its_name(name: str):
    experiment = get_preset(name)
    assert isinstance(experiment, Experiment)
    assert experiment.name == name
    assert get_preset(name) == experiment
    assert describe_preset(name).endswith((".", ","))


def test_presets_are_distinct():
    values = [dataclasses.replace(get_preset(name), name="") for name in PRESETS]
    assert all(first != second for index, first in enumerate(values) for second in values[:index])


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="Unknown preset 'ariadnee'") as caught:
        get_preset("ariadnee")
    assert all(name in caught.value.message for name in PRESETS)
    assert caught.value.hint == "did you mean 'ariadne'?"
    with pytest.raises(ConfigError, match="Unknown preset 'nothing'"):
        describe_preset("nothing")


def test_the_settings_of_the_paper():
    experiment = get_preset("tmca")
    assert (experiment.preprocessing.image_size, experiment.trainer.batch_size) == (224, 32)
    assert (experiment.optimiser.learning_rate, experiment.optimiser.min_learning_rate) == (3e-4, 1e-6)
    assert experiment.augmentation.zoom_probability == 0.1
    assert experiment.model.image_encoder.weights == "facebook/convnext-tiny-224"
    assert experiment.model.text_encoder.weights == "microsoft/BiomedVLP-CXR-BERT-specialized"
    assert experiment.model.text_encoder.freeze
    assert experiment.model.text_encoder.word_layers == 3
    assert experiment.model.alignment == AlignmentConfig(strides=(8, 16, 32), align_global=True)
    assert experiment.objective.targets == "mask_dice"
    assert experiment.objective.alignment_weight == 1


TABLE_2_STEPS = [
    {"objective.targets": ("mask_dice", "identity")},
    {"model.enhancement.mode": ("gated", "off")},
    {"model.alignment.strides": ((8, 16, 32), ())},
    # Without an aligned level the targets say nothing; the baseline keeps their default.
    {"model.alignment.align_global": (True, False), "objective.targets": ("identity", "mask_dice")},
]
TABLE_3_STEPS = [
    {"model.alignment.align_global": (False, True), "model.enhancement.mode": ("off", "gated")},
    {"model.alignment.strides": ((), (32,))},
    {"model.alignment.strides": ((32,), (16, 32))},
    {"model.alignment.strides": ((16, 32), (8, 16, 32))},
]


@pytest.mark.parametrize(
    ("row", "above", "expected"),
    [
        *zip(TABLE_2[1:], TABLE_2[:-1], TABLE_2_STEPS, strict=True),
        *zip(TABLE_3[1:], TABLE_3[:-1], TABLE_3_STEPS, strict=True),
    ],
)
def test_a_row_of_a_table_differs_from_the_row_above_in_one_thing(row: str, above: str, expected: dict[str, Any]):
    assert _differences(above, row) == expected


def test_the_tables_begin_and_end_with_the_model_and_the_baseline():
    assert TABLE_2[0] == TABLE_3[-1] == "tmca"
    assert TABLE_2[-1] == TABLE_3[0] == "ariadne"


@pytest.mark.parametrize(
    ("guided", "blind"), [("ariadne", "image-only"), ("kvasir-mobile-ariadne", "kvasir-mobile-image-only")]
)
def test_the_image_only_model_is_the_baseline_without_guidance(guided: str, blind: str):
    assert _differences(guided, blind) == {"model.guidance": (True, False)}


def test_the_mobile_baseline_keeps_the_recipe():
    assert _differences("kvasir-mobile", "kvasir-mobile-ariadne") == {
        "model.alignment.strides": ((8, 16, 32), ()),
        "model.alignment.align_global": (True, False),
        "model.enhancement.mode": ("gated", "off"),
    }


def test_change_replaces_fields_and_nothing_else():
    first = get_preset("tiny")
    second = change(first, "other", trainer={"max_epochs": 7}, objective={"targets": "identity"})
    assert differences(first, second) == {
        "name": ("tiny", "other"),
        "trainer.max_epochs": (2, 7),
        "objective.targets": ("mask_dice", "identity"),
    }
    assert first == get_preset("tiny")
    assert differences(first, first) == {}
    with pytest.raises(ConfigError, match=r"trainer\.max_epochs is 0"):
        change(first, "other", trainer={"max_epochs": 0})
