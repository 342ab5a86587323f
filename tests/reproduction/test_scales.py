from __future__ import annotations

from dataclasses import replace

import pytest

from tmca.config import Experiment, from_dict, to_dict
from tmca.models import list_models
from tmca.presets import get_preset
from tmca.reproduction.scales import CPU_SIZES, SMOKE_SIZES, at_scale
from tmca.reproduction.tables import TABLES

PRESETS = sorted({row.preset for table in TABLES.values() for row in table.rows})


def _share(experiment: Experiment, share: float) -> Experiment:
    return replace(experiment, trainer=replace(experiment.trainer, train_fraction=share))


@pytest.mark.parametrize("name", PRESETS)
def test_the_scale_of_the_paper_changes_nothing(name: str):
    assert at_scale(get_preset(name), "paper", 800) == get_preset(name)


@pytest.mark.parametrize("scale", ["smoke", "cpu"])
@pytest.mark.parametrize("n_train", [800, 5716])
def test_methods_differ_in_the_model_only(scale: str, n_train: int):
    first, *others = (at_scale(get_preset(name), scale, n_train) for name in PRESETS)
    for other in others:
        assert replace(other, name=first.name, model=first.model, objective=first.objective) == first


@pytest.mark.parametrize("scale", ["smoke", "cpu"])
def test_an_ablation_keeps_what_it_ablates(scale: str):
    for name in ("tmca", "ariadne", "tmca-without-mas", "tmca-levels-g-32"):
        before, after = get_preset(name), at_scale(get_preset(name), scale, 800)
        assert after.model.alignment == before.model.alignment
        assert after.model.enhancement == before.model.enhancement
        assert after.objective == before.objective
        assert after.name == before.name
        assert after.seed == before.seed


@pytest.mark.parametrize("scale", ["smoke", "cpu", "paper"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_row_is_what_its_run_has_stored(name: str, scale: str):
    experiment = at_scale(get_preset(name), scale, 800)
    assert from_dict(Experiment, to_dict(experiment)) == experiment  # else the run could not be resumed


def test_the_schedule_of_a_laptop():
    small, large = (at_scale(get_preset("tmca"), "cpu", n) for n in (800, 5716))
    assert (small.trainer.max_epochs, small.trainer.batch_size) == (20, 16)
    assert (large.trainer.max_epochs, large.trainer.batch_size) == (8, 32)
    assert small.preprocessing.image_size == 160
    assert small.trainer.min_epochs == small.trainer.patience == 20


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
def test_a_share_of_the_data_is_trained_for_as_many_steps(share: float):
    trainer = at_scale(_share(get_preset("tmca"), share), "cpu", 800).trainer
    assert trainer.train_fraction == share
    assert trainer.max_epochs * share == pytest.approx(20, abs=0.5)


def test_sizes_are_given_for_methods_that_exist():
    assert set(CPU_SIZES) == set(SMOKE_SIZES)
    assert set(CPU_SIZES) <= {*list_models(), "nnunet"}
