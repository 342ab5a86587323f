"""What every method is: encode an image, encode a sentence, segment.

A method is one class and one builder. The class splits its work so that an image is encoded once and then takes many
sentences; the builder makes the class from a :class:`~tmca.config.ModelConfig` and :class:`Parts`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jaxtyping import Bool, Float
from torch import Tensor, nn

from tmca.config import Experiment, ImageEncoderConfig, ModelConfig, TextEncoderConfig, from_dict
from tmca.errors import ConfigError
from tmca.models.text import TextEncoder, build_text_encoder
from tmca.models.tokenizer import SentenceTokenizer, build_tokenizer
from tmca.types import ImageFeatures, ModelOutput, TextFeatures, TextTokens


class SegmentationModel(nn.Module, ABC):
    """A method of the registry.

    Args:
        text_encoder: Encoder of the sentences; ``None`` for a method that sees the image alone.

    Attributes:
        experiment: What the model was trained with; set by training and by loading.
        exact_parts: Modules that have to predict in float32 so that bfloat16 in all others leaves the masks as they
            are; ``None`` where that was not measured, and prediction is in float32 unless asked otherwise.
    """

    exact_parts: tuple[str, ...] | None = None

    def __init__(self, text_encoder: TextEncoder | None = None) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.experiment: Experiment | None = None

    @abstractmethod
    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> ImageFeatures:
        """Do everything that needs no sentence.

        Args:
            images: Normalised images of any size, float.
        """

    @abstractmethod
    def segment(self, images: ImageFeatures, text: TextFeatures | None) -> ModelOutput:
        """Segment encoded images, guided by encoded sentences (one an image) where there are any."""

    def pretrained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that may come from pretraining: they learn at ``optimiser.encoder_factor``."""
        return []

    def image_architecture(self) -> dict[str, Any] | None:
        """Return ``architecture`` and ``options`` of a transformers image encoder: a checkpoint then needs no hub."""
        return None

    def forward(self, images: Float[Tensor, "batch 3 height width"], tokens: TextTokens | None = None) -> ModelOutput:
        """Segment images by their sentences.

        Args:
            images: Normalised images of any size, float.
            tokens: Their sentences; ``None``, or a row without a real token, segments without a sentence.
        """
        text = self.text_encoder(tokens) if self.text_encoder is not None and tokens is not None else None
        return self.segment(self.encode_image(images), text)

    def encode_text(self, texts: Sequence[str | None]) -> TextFeatures | None:
        """Encode sentences; ``None`` for an image-only model or when no image has a sentence."""
        if self.text_encoder is None or not any(text and text.strip() for text in texts):
            return None
        return self.text_encoder.encode(texts)

    def target_attention(self, images: ImageFeatures, text: TextFeatures) -> Float[Tensor, "batch 1 rows cols"] | None:  # noqa: ARG002
        """Return how much each sentence points at each position, mean 1; ``None`` of methods without such a map."""
        return None

    @property
    def reads_text(self) -> bool:
        """Whether sentences can change this model's masks."""
        return self.text_encoder is not None

    @classmethod
    def from_pretrained(cls, name: str | Path) -> SegmentationModel:
        """Load a model; see :func:`tmca.checkpoints.load_checkpoint`."""
        from tmca.checkpoints import load_checkpoint

        return load_checkpoint(name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a model folder; see :func:`tmca.checkpoints.save_checkpoint`.

        Raises:
            ConfigError: The model does not know the experiment it belongs to.
        """
        from tmca.checkpoints import save_checkpoint

        if self.experiment is None:
            raise ConfigError("This model has no experiment to save with it", hint="set model.experiment first")
        save_checkpoint(self, self.experiment, Path(folder))


@dataclass(frozen=True)
class Parts:
    """What a builder is given besides the configuration.

    Attributes:
        sentences: Training sentences, from which a scratch text encoder learns its vocabulary.
        tokenizer: The tokenizer of a checkpoint; given, nothing is learned or looked for.
        text_architecture: The text encoder's architecture as a checkpoint stored it.
        load_weights: False skips pretrained weights of the image encoder, for a checkpoint fills them.
    """

    sentences: Iterable[str] = ()
    tokenizer: SentenceTokenizer | None = None
    text_architecture: dict[str, Any] | None = None
    load_weights: bool = True

    def text_encoder(self, config: TextEncoderConfig) -> TextEncoder:
        """Build the text encoder, with its tokenizer and, unless a checkpoint fills it, its weights.

        Raises:
            WeightsError: The weights or the tokenizer are neither on disk nor reachable, or do not fit.
            ConfigError: There is nothing to learn a vocabulary from.
        """
        tokenizer = self.tokenizer or build_tokenizer(config, self.sentences)
        return build_text_encoder(config, tokenizer, architecture=self.text_architecture)


Builder = Callable[[ModelConfig, Parts], SegmentationModel]

OptionsT = TypeVar("OptionsT")


def read_options(cls: type[OptionsT], config: ModelConfig) -> OptionsT:
    """Return ``model.options`` as the dataclass of a method's options.

    Raises:
        ConfigError: A field is unknown or of another type; the known ones are listed.
    """
    return from_dict(cls, config.options, where="model.options")


@dataclass(frozen=True)
class NoOptions:
    """The options of a method that has none."""


def refuse_image_weights(config: ModelConfig, parts: Parts) -> None:
    """Refuse pretrained image weights that a method could not take; what was left at its default asks for none.

    Raises:
        ConfigError: ``image_encoder.weights`` names some.
    """
    weights = config.image_encoder.weights
    if parts.load_weights and weights not in ("none", ImageEncoderConfig().weights):
        raise ConfigError(
            f"image_encoder.weights is {weights!r}, but {config.method!r} starts from random weights",
            hint="set it to none, or choose a method that takes an image encoder",
        )


def nobody(features: ImageFeatures) -> Bool[Tensor, " batch"]:
    """Return "no image of this batch has a sentence"."""
    like = next(iter(features.feature_maps.values()))
    return like.new_zeros(features.batch_size).bool()
