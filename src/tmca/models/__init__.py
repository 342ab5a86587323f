"""The registry of methods: their names, and the builder that turns a configuration into a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tmca.config import ModelConfig
from tmca.errors import ConfigError, unknown_name
from tmca.models import tmca
from tmca.models.base import Builder, Parts, SegmentationModel
from tmca.models.baselines import cpam, lga, lvit, tganet, unet
from tmca.models.operations import avoid_faults
from tmca.models.tmca import TMCA
from tmca.models.tokenizer import SentenceTokenizer

__all__ = ["TMCA", "SegmentationModel", "build_model", "list_models", "register_model"]

_METHODS: dict[str, Builder] = {
    "attention-unet": unet.build_attention_unet,
    "cpam": cpam.build,
    "lga": lga.build,
    "lvit": lvit.build,
    "tganet": tganet.build,
    "tmca": tmca.build,
    "unet": unet.build_unet,
    "unet-lvit": unet.build_lvit_unet,
    "unet-plus-plus": unet.build_unet_plus_plus,
}


def build_model(
    config: ModelConfig,
    sentences: Iterable[str] = (),
    *,
    tokenizer: SentenceTokenizer | None = None,
    text_architecture: dict[str, Any] | None = None,
    load_weights: bool = True,
) -> SegmentationModel:
    """Build the model a configuration describes.

    Args:
        config: Method, encoders and components.
        sentences: Training sentences, from which a scratch text encoder learns its vocabulary.
        tokenizer: The tokenizer of a checkpoint; given, nothing is learned or looked for.
        text_architecture: The text encoder's architecture as a checkpoint stored it.
        load_weights: False skips the image encoder's pretrained weights, for a checkpoint fills them.

    Raises:
        ConfigError: The method, an encoder or an option is unknown, or they do not fit together.
        WeightsError: Pretrained weights are neither on disk nor reachable.
    """
    if config.method not in _METHODS:
        raise unknown_name("method", config.method, _METHODS)
    model = _METHODS[config.method](config, Parts(sentences, tokenizer, text_architecture, load_weights))
    avoid_faults(model)
    return model


def list_models() -> tuple[str, ...]:
    """Return the names of all methods."""
    return tuple(sorted(_METHODS))


def register_model(name: str, build: Builder) -> None:
    """Add a method under a name that ``model.method`` of an experiment can then say.

    Raises:
        ConfigError: The name is taken by another builder.
    """
    if _METHODS.get(name, build) is not build:
        raise ConfigError(f"There is a method {name!r} already", hint="choose another name")
    _METHODS[name] = build
