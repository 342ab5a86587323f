"""Fixtures of all tests: the tiny experiment, a tiny model, drawn data, and the folder of published data."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from tmca.config import Experiment
from tmca.data.manifest import Manifest
from tmca.data.phantom import write_phantoms
from tmca.models import TMCA, build_model
from tmca.models.text import build_tokenizer
from tmca.presets import get_preset

SHARED = Path(__file__).resolve().parents[2] / "shared"

SENTENCES = (
    "one small bright round lesion, located in upper left of the image",
    "two large dark lesions, located in centre, lower right of the image",
    "three medium oval lesions, located in left, right, lower centre of the image",
    "no lesion in the image",
)

# Wall-clock limits on one example fail on a busy machine, not on wrong code.
hypothesis.settings.register_profile("tmca", deadline=None, print_blob=True)
hypothesis.settings.load_profile("tmca")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.data)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory):
    """Models and caches of the tests lie apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMCA_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_experiment() -> Experiment:
    return get_preset("tiny")


@pytest.fixture(scope="session")
def tiny_model(tiny_experiment: Experiment) -> Callable[..., TMCA]:
    """Return a factory of tiny models in training mode; keywords replace fields of the tiny ``ModelConfig``.

    Models of the same sentences share one tokenizer, so that weights can be carried from one to the other.
    """
    tokenizer_of = functools.cache(build_tokenizer)

    def build(seed: int = 0, *, sentences: Sequence[str] = SENTENCES, **fields: Any) -> TMCA:
        experiment = dataclasses.replace(tiny_experiment, model=dataclasses.replace(tiny_experiment.model, **fields))
        config = experiment.model
        tokenizer = tokenizer_of(config.text_encoder, tuple(sentences)) if config.guidance else None
        torch.manual_seed(seed)
        model = build_model(config, tokenizer=tokenizer)
        model.experiment = experiment
        return model

    return build


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Return drawn data, 64 pixels: 16 to train, 6 to validate, 8 to test. Shared by all tests: do not write to it."""
    folder = tmp_path_factory.mktemp("data") / "phantoms"
    return write_phantoms(folder, {"train": 16, "val": 6, "test": 8}, size=64, seed=0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of published data and weights beside the checkout; a test that asks for it is marked `data`."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"there is no folder {SHARED}")
    return SHARED
