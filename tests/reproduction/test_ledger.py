from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tmca.config import Experiment, ImageEncoderConfig, config_hash, to_dict
from tmca.presets import get_preset
from tmca.reproduction.ledger import Ledger

USUAL = {"threshold": 0.5, "space": str(get_preset("tiny").preprocessing.image_size)}


def write_entry(folder: Path, name: str, experiment: Experiment, **fields: Any) -> Path:
    """Write a ledger entry with made-up scores."""
    scores = {"dice": 0.9, "jaccard": 0.9 / 1.1, "accuracy": 0.98}
    values = {
        "name": name, "preset": experiment.name, "experiment": to_dict(experiment), "dataset": "kvasir_polyp",
        "split": "test", "data_hash": "a" * 64, "seed": experiment.seed, "seconds": 60.0, "epochs": 2,
        "metrics": USUAL | {"pooled": scores, "per_case_mean": scores | {"empty_policy": "one"}},
        "text_ablation": {"shuffled": {"pooled": {"dice": 0.85}}},
    } | fields  # fmt: skip
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def test_an_entry_is_found_by_what_decides_its_result(tmp_path: Path):
    experiment = get_preset("tiny")
    path = write_entry(tmp_path, "any-name", experiment)
    ledger = Ledger(tmp_path)
    found = ledger.find(experiment, "a" * 64, "test")
    assert found is not None
    assert found.path == path
    assert found.score("pooled", "dice") == 0.9
    assert ledger.find(replace(experiment, name="renamed"), "a" * 64, "test") == found
    assert ledger.find(replace(experiment, seed=2), "a" * 64, "test") is None
    assert ledger.find(experiment, "b" * 64, "test") is None
    assert ledger.find(experiment, "a" * 64, "val") is None


def test_an_entry_on_other_data_is_noticed(tmp_path: Path):
    experiment = get_preset("tiny")
    path = write_entry(tmp_path, "run", experiment)
    ledger = Ledger(tmp_path)
    other = ledger.on_other_data(experiment, "b" * 64, "kvasir_polyp")
    assert other is not None
    assert other.path == path
    assert ledger.on_other_data(experiment, "a" * 64, "kvasir_polyp") is None
    assert ledger.on_other_data(experiment, "b" * 64, "phantoms") is None
    assert ledger.on_other_data(replace(experiment, seed=2), "b" * 64, "kvasir_polyp") is None


def test_a_taken_name_is_not_overwritten(tmp_path: Path):
    ledger = Ledger(tmp_path)
    assert ledger.free_path("run", "b" * 64) == tmp_path / "run.json"
    write_entry(tmp_path, "run", get_preset("tiny"))
    assert ledger.free_path("run", "b" * 64) == tmp_path / "run-bbbbbbbb.json"
    write_entry(tmp_path, "run-bbbbbbbb", get_preset("tiny"))
    assert ledger.free_path("run", "b" * 64) == tmp_path / "run-bbbbbbbb-2.json"


@pytest.mark.parametrize(
    "fields",
    [
        {"train_data_hash": "b" * 64},
        {"stopped": None},
        {"metrics": {"threshold": 0.3}},
        {"metrics": {"space": "original"}},
        {"metrics": {"per_case_mean": {"dice": 0.9, "empty_policy": "skip"}}},
        {"metrics": {"mirrored": True}},
        {"metrics": {"models": 2}},
    ],
    ids=lambda fields: str(fields),
)
def test_what_was_trained_or_scored_in_another_way_is_not_the_run_that_a_table_needs(
    tmp_path: Path, fields: dict[str, Any]
):
    experiment = get_preset("tiny")
    usual = json.loads(write_entry(tmp_path, "run", experiment).read_text("utf-8"))
    for name, value in fields.items():
        usual[name] = usual[name] | value if isinstance(value, dict) else value
    (tmp_path / "run.json").write_text(json.dumps(usual), encoding="utf-8")
    ledger = Ledger(tmp_path)
    assert [entry.name for entry in ledger.entries] == ["run"]
    assert ledger.find(experiment, "a" * 64, "test") is None
    ended = {"train_data_hash": "a" * 64, "stopped": "all epochs done"}
    write_entry(tmp_path, "whole", experiment, **ended)
    found = Ledger(tmp_path).find(experiment, "a" * 64, "test")
    assert found is not None
    assert found.name == "whole"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"experiment": {"nothing": 1}}',
        '{"experiment": null, "metrics": {"pooled": {"dice": 1}}}',
        "\x00",
    ],
)
def test_a_file_that_is_no_entry_is_named_and_left_out(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]):
    write_entry(tmp_path, "good", get_preset("tiny"))
    (tmp_path / "bad.json").write_text(text, encoding="utf-8")
    assert [entry.name for entry in Ledger(tmp_path).entries] == ["good"]
    assert f"{tmp_path / 'bad.json'} is no entry of a results ledger" in capsys.readouterr().err


def test_a_ledger_need_not_exist(tmp_path: Path):
    assert Ledger(tmp_path / "nothing").entries == ()


def test_the_hash_does_not_depend_on_where_the_weights_lie():
    def of(weights: str) -> str:
        model = replace(get_preset("tmca").model, image_encoder=ImageEncoderConfig(weights=weights))
        return config_hash(replace(get_preset("tmca"), model=model))

    assert of("google/mobilenet_v2_1.0_224") == of("mobilenet_v2_1.0_224") == of("/data/mobilenet_v2_1.0_224/")
    assert of("google/mobilenet_v2_1.0_224") != of("google/mobilenet_v2_1.4_224")


def test_an_entry_written_before_a_field_existed_is_found(tmp_path: Path):
    experiment = get_preset("tiny")
    values = to_dict(experiment)
    del values["objective"]["dice_form"], values["model"]["options"], values["trainer"]["monitor"]
    path = write_entry(tmp_path, "old", experiment)
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"experiment": values}), encoding="utf-8")
    assert Ledger(tmp_path).find(experiment, "a" * 64, "test") is not None
