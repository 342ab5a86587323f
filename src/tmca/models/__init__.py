"""The registry of methods, and the builder that turns a configuration into a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tmca.config import ModelConfig
from tmca.errors import ConfigError, unknown_name
from tmca.models.alignment import AlignmentHeads
from tmca.models.decoder import GuidedDecoderStage, LanguageGuide, SubpixelHead, UpsampleBlock
from tmca.models.enhancement import TargetEnhancement
from tmca.models.text import SentenceTokenizer, build_text_encoder, build_tokenizer
from tmca.models.tmca import DECODED_STRIDES, TMCA
from tmca.models.vision import build_image_encoder
from tmca.types import GLOBAL_LEVEL

__all__ = ["TMCA", "build_model", "list_models"]


def build_model(
    config: ModelConfig,
    sentences: Iterable[str] = (),
    *,
    tokenizer: SentenceTokenizer | None = None,
    bert_config: dict[str, Any] | None = None,
    load_weights: bool = True,
) -> TMCA:
    """Build the model a configuration describes.

    Args:
        config: Method, encoders and components.
        sentences: Training sentences, from which a scratch text encoder learns its vocabulary.
        tokenizer: The tokenizer of a checkpoint; given, nothing is learned or looked for.
        bert_config: The text encoder's architecture as a checkpoint stored it.
        load_weights: False skips the image encoder's pretrained weights, for a checkpoint fills them.

    Raises:
        ConfigError: The method, an encoder or an option is unknown, or they do not fit together.
        WeightsError: Pretrained weights are neither on disk nor reachable.
    """
    if config.method not in BUILDERS:
        raise unknown_name("method", config.method, BUILDERS)
    return BUILDERS[config.method](config, sentences, tokenizer, bert_config, load_weights)


def list_models() -> tuple[str, ...]:
    """Return the names of all methods."""
    return tuple(sorted(BUILDERS))


def _build_tmca(
    config: ModelConfig,
    sentences: Iterable[str],
    tokenizer: SentenceTokenizer | None,
    bert_config: dict[str, Any] | None,
    load_weights: bool,
) -> TMCA:
    image_encoder = build_image_encoder(
        config.image_encoder, pooled=config.alignment.align_global, load_weights=load_weights
    )
    text_encoder = None
    if config.guidance:
        tokenizer = tokenizer or build_tokenizer(config.text_encoder, sentences)
        text_encoder = build_text_encoder(config.text_encoder, tokenizer, bert_config=bert_config)

    channels = image_encoder.out_channels
    widths = config.decoder.channels or (channels[4], channels[8], channels[16])
    decoded = dict(zip((4, 8, 16), widths, strict=True)) | {32: channels[32]}
    summary_tokens = dict(zip((8, 16, 32), config.decoder.text_tokens, strict=True))
    decoder = {}
    for stride in DECODED_STRIDES:
        guide = None
        if text_encoder is not None:
            _check_width(decoded[stride], config.decoder.attention_heads)
            guide = LanguageGuide(
                decoded[stride],
                text_encoder.text_dim,
                max_tokens=text_encoder.max_tokens,
                summary_tokens=summary_tokens[stride],
                attention_heads=config.decoder.attention_heads,
                gate=config.decoder.gate,
            )
        upsample = UpsampleBlock(decoded[stride], channels[stride // 2], decoded[stride // 2])
        decoder[str(stride)] = GuidedDecoderStage(guide, upsample)

    enhancement = {}
    if config.enhancement.mode != "off":
        enhancement = {
            str(stride): TargetEnhancement(config.enhancement.mode, config.enhancement.attention_temperature)
            for stride in DECODED_STRIDES
        }
    aligned = [str(stride) for stride in config.alignment.strides]
    aligned += [GLOBAL_LEVEL] if config.alignment.align_global else []
    needed = dict.fromkeys([*aligned, *enhancement])
    alignment = None
    if text_encoder is not None and needed:
        dims = {level: _level_dim(level, channels, image_encoder.embedding_dim) for level in needed}
        alignment = AlignmentHeads(text_encoder.text_dim, dims, aligned)
    head = SubpixelHead(decoded[4], config.decoder.head_channels)
    return TMCA(image_encoder, text_encoder, decoder, head, alignment, enhancement)


def _level_dim(level: str, channels: dict[int, int], embedding_dim: int) -> int:
    return embedding_dim if level == GLOBAL_LEVEL else channels[int(level)]


def _check_width(channels: int, attention_heads: int) -> None:
    if channels % 4 or channels % attention_heads:
        raise ConfigError(
            f"The decoder cannot attend over {channels} channels with {attention_heads} heads",
            hint="choose decoder.channels that are multiples of 4 and of decoder.attention_heads",
        )


Builder = Callable[[ModelConfig, Iterable[str], SentenceTokenizer | None, dict[str, Any] | None, bool], TMCA]

BUILDERS: dict[str, Builder] = {"tmca": _build_tmca}
