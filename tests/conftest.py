"""Fixtures of all tests: the tiny experiment, a tiny model, drawn data, and the folder of published data."""

from __future__ import annotations

import dataclasses
import functools
import random
import runpy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import jaxtyping
import numpy as np
import pytest
import torch

from tmca.config import Experiment, ImageEncoderConfig
from tmca.data.manifest import Manifest
from tmca.data.phantom import write_phantoms
from tmca.models import _METHODS, SegmentationModel, build_model
from tmca.models.tokenizer import build_tokenizer
from tmca.presets import NO_ALIGNMENT, NO_ENHANCEMENT, PRESETS, get_preset
from tmca.reproduction.tables import TABLES

pytest_plugins = ["dicom_images"]

SHARED = Path(__file__).resolve().parents[2] / "shared"
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

SENTENCES = (
    "one small bright round lesion, located in upper left of the image",
    "two large dark lesions, located in centre, lower right of the image",
    "three medium oval lesions, located in left, right, lower centre of the image",
    "no lesion in the image",
)

IMAGE_ONLY: dict[str, Any] = {"guidance": False, "alignment": NO_ALIGNMENT, "enhancement": NO_ENHANCEMENT}

TINY: dict[str, dict[str, Any]] = {
    "attention-unet": IMAGE_ONLY | {"options": {"widths": [4, 8, 8, 8, 8]}},
    "cpam": {
        "alignment": NO_ALIGNMENT,
        "enhancement": NO_ENHANCEMENT,
        "options": {"width": 8, "grid": 4},
    },
    "film": {"alignment": NO_ALIGNMENT, "enhancement": NO_ENHANCEMENT},
    "lga": {
        "image_encoder": ImageEncoderConfig(
            weights="none",
            architecture="sam",
            options={
                "vision_config": {
                    "hidden_size": 32,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 2,
                    "output_channels": 16,
                    "image_size": 128,
                    "window_size": 2,
                    "global_attn_indexes": [1],
                    "num_pos_feats": 8,
                    "initializer_range": 0.2,
                },
                "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2},
                "prompt_encoder_config": {"hidden_size": 16, "image_size": 128},
                "initializer_range": 0.35,
            },
        ),
        "options": {"fusion_blocks": 2, "attention_reduction": 1, "gate": 0.5},
    },
    "lvit": {
        "alignment": NO_ALIGNMENT,
        "enhancement": NO_ENHANCEMENT,
        "options": {"width": 8, "grid": 4, "attention_heads": 2},
    },
    "tganet": IMAGE_ONLY
    | {
        "image_encoder": ImageEncoderConfig(
            weights="none",
            architecture="resnet",
            options={"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]},
        ),
        "options": {"width": 16},
    },
    "tmca": {},
    "unet": IMAGE_ONLY | {"options": {"widths": [4, 8, 8, 8, 8]}},
    "unet-lvit": IMAGE_ONLY | {"options": {"widths": [4, 8, 8, 8, 8]}},
    "unet-plus-plus": IMAGE_ONLY | {"options": {"widths": [4, 8, 8, 8, 8], "deep_supervision": True}},
}
"""Method → what its tiny model sets apart from the preset ``tiny``: fields of ModelConfig."""

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
    """One thread a process, also in the processes that tests start: several workers share the cores."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory):
    """Models and caches of the tests lie apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMCA_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True)
def _shapes_are_checked():
    assert not jaxtyping.config.jaxtyping_disable, "an earlier test turned the checks of shapes off for good"


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_experiment() -> Experiment:
    return get_preset("tiny")


@pytest.fixture(scope="session")
def tiny_model(tiny_experiment: Experiment) -> Callable[..., SegmentationModel]:
    """Return a factory of tiny models in training mode; keywords replace fields of the method's tiny ``ModelConfig``.

    Models of the same sentences share one tokenizer, so that weights can be carried from one to the other.
    """
    tokenizer_of = functools.cache(build_tokenizer)

    def build(seed: int = 0, *, sentences: Sequence[str] = SENTENCES, **fields: Any) -> SegmentationModel:
        fields = TINY[fields.get("method", "tmca")] | fields
        experiment = dataclasses.replace(tiny_experiment, model=dataclasses.replace(tiny_experiment.model, **fields))
        config = experiment.model
        tokenizer = tokenizer_of(config.text_encoder, tuple(sentences)) if config.guidance else None
        torch.manual_seed(seed)
        model = build_model(config, tokenizer=tokenizer)
        model.experiment = experiment
        return model

    return build


@pytest.fixture(scope="module")
def added_method() -> Iterator[str]:
    """Register the method of examples/add_a_method.py for the tests of one module, and return its name."""
    with pytest.MonkeyPatch.context() as patch:
        for registry in (_METHODS, PRESETS, TABLES):
            for name, value in registry.items():
                patch.setitem(registry, name, value)  # what it was is restored …
        before = (set(_METHODS), set(PRESETS))
        runpy.run_path(str(EXAMPLES / "add_a_method.py"))
        yield "film"
        for registry, names in zip((_METHODS, PRESETS), before, strict=True):
            for name in set(registry) - names:
                del registry[name]  # … and what was added goes


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
