"""TMCA: the parts of the paper's Fig. 1, joined.

With alignment and enhancement off this is the language-guided baseline (Ariadne); with guidance off as well it is
the same network without language.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from tmca.config import ModelConfig
from tmca.errors import ConfigError
from tmca.models.alignment import AlignmentHeads
from tmca.models.base import NoOptions, Parts, SegmentationModel, nobody, read_options
from tmca.models.decoder import GuidedDecoderStage, LanguageGuide, SubpixelHead, UpsampleBlock
from tmca.models.enhancement import TargetEnhancement, target_attention
from tmca.models.text import TextEncoder
from tmca.models.vision import ImageEncoder, build_image_encoder, check_images, describe_architecture
from tmca.types import GLOBAL_LEVEL, ImageFeatures, ModelOutput, TextFeatures

DECODED_STRIDES = (32, 16, 8)
"""Strides the three guided stages start from, deep to shallow."""

ROBUST_ENCODERS = ("convnext",)
"""Image encoders that may predict in bfloat16: a Dice of 0.9992 with the masks of float32 was measured. MobileNetV2 may
not: 0.994, and most of that is lost in its first layers."""


class TMCA(SegmentationModel):
    """Language-guided segmentation with target-informed multi-level contrastive alignments.

    The image encoder does not see the sentence, so one encoded image takes many sentences at the decoder's cost:
    :meth:`encode_image` once, :meth:`segment` for each.

    Args:
        image_encoder: Maps at strides 4, 8, 16, 32 and a pooled embedding.
        text_encoder: Word features and a sentence embedding; ``None`` for an image-only model.
        decoder: Stage that starts at stride s → key ``str(s)``.
        head: Full-size logits from the stride-4 map.
        alignment: Projection heads, or ``None``.
        enhancement: Enhancement behind the stage that starts at stride s → key ``str(s)``; may be empty.

    Source:
        Li et al., TMCA, Fig. 1.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder | None,
        decoder: dict[str, GuidedDecoderStage],
        head: SubpixelHead,
        alignment: AlignmentHeads | None = None,
        enhancement: dict[str, TargetEnhancement] | None = None,
    ) -> None:
        super().__init__(text_encoder)
        self.image_encoder = image_encoder
        robust = image_encoder.backbone.config.model_type in ROBUST_ENCODERS
        self.exact_parts = () if robust else ("image_encoder",)
        self.decoder = nn.ModuleDict(decoder)
        self.head = head
        self.alignment = alignment
        self.enhancement = nn.ModuleDict(enhancement or {})
        self.attention_temperature = next((stage.temperature for stage in (enhancement or {}).values()), 1.0)

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> ImageFeatures:
        """Encode images, and with them the skip connections of the decoder."""
        check_images(images)
        features: ImageFeatures = self.image_encoder(images)
        maps = features.feature_maps
        skips = {stride // 2: self._stage(stride).upsample.encode_skip(maps[stride // 2]) for stride in DECODED_STRIDES}
        return replace(features, encoded_skips=skips)

    def pretrained_parameters(self) -> list[nn.Parameter]:
        """Return the image encoder's parameters."""
        return list(self.image_encoder.parameters())

    def image_architecture(self) -> dict[str, Any]:
        """Return the image encoder's architecture."""
        return describe_architecture(self.image_encoder.backbone.config)

    def segment(self, images: ImageFeatures, text: TextFeatures | None) -> ModelOutput:
        """Decode encoded images, guided by encoded sentences (one an image) where there are any."""
        maps = images.feature_maps
        projected = self.alignment.project(text) if self.alignment is not None and text is not None else {}

        decoded = maps[DECODED_STRIDES[0]]
        for stride in DECODED_STRIDES:
            decoded = self._stage(stride)(decoded, images.encoded_skips[stride // 2], text)
            if str(stride) in self.enhancement and text is not None:
                decoded = self.enhancement[str(stride)](decoded, maps[stride], projected[str(stride)], text.present)
        height, width = images.size
        mask_logits = self.head(decoded)[..., :height, :width]

        if text is None:
            return ModelOutput(mask_logits, {}, nobody(images))
        alignments = self.alignment(images, projected) if self.alignment is not None else {}
        return ModelOutput(mask_logits, alignments, text.present)

    def target_attention(self, images: ImageFeatures, text: TextFeatures) -> Float[Tensor, "batch 1 rows cols"] | None:
        """Return the mean of the stages' attention to each sentence, at the finest size; ``None`` where none is."""
        if self.alignment is None or not self.enhancement:
            return None
        projected = self.alignment.project(text)
        maps = [
            target_attention(images.feature_maps[int(stride)], projected[stride], self.attention_temperature)
            for stride in self.enhancement
        ]
        size = max((one.shape[2:] for one in maps), key=lambda shape: shape.numel())
        return torch.stack([functional.interpolate(one, size=size, mode="bilinear") for one in maps]).mean(0)

    def _stage(self, stride: int) -> GuidedDecoderStage:
        stage: GuidedDecoderStage = self.decoder[str(stride)]  # type: ignore[assignment]
        return stage


def build(config: ModelConfig, parts: Parts) -> TMCA:
    """Build TMCA, its ablations, the language-guided baseline or the image-only network.

    Raises:
        ConfigError: An encoder or an option is unknown, or they do not fit together.
        WeightsError: Pretrained weights are neither on disk nor reachable.
    """
    read_options(NoOptions, config)
    image_encoder = build_image_encoder(
        config.image_encoder,
        pooled=config.alignment.align_global and config.alignment.train_image_encoder,
        load_weights=parts.load_weights,
    )
    text_encoder = parts.text_encoder(config.text_encoder) if config.guidance else None

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
                positions=config.decoder.positions,
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
        alignment = AlignmentHeads(
            text_encoder.sentence_dim,
            dims,
            aligned,
            pooling=config.alignment.pooling,
            attention_temperature=config.enhancement.attention_temperature,
            train_image_encoder=config.alignment.train_image_encoder,
        )
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
