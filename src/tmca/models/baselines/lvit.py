"""LViT: a U-Net whose skip connections carry what a transformer of four levels makes of the image and the sentence.

The convolutional encoder needs no sentence; the transformers and the decoder do.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tmca.config import ModelConfig
from tmca.errors import ConfigError
from tmca.models.base import Parts, SegmentationModel, nobody, read_options, refuse_image_weights
from tmca.models.baselines.unet import DEEPEST_STRIDE, PlainEncoder, convolutions, decoder_channels
from tmca.models.text import TextEncoder
from tmca.models.vision import check_images, pad_images
from tmca.types import ImageFeatures, ModelOutput, TextFeatures

STRIDES = (1, 2, 4, 8)
"""Strides of the levels that have transformers; the patches of all of them are 16 × 16 pixels of the image."""


@dataclass(frozen=True)
class LViTOptions:
    """Settings of LViT."""

    width: int = 64
    """Channels at stride 1; the strides 2, 4, 8 and 16 have 2, 4, 8 and 8 times as many."""
    grid: int = 14
    """Rows and columns of patches that positions and the sentence are learned for: image_size / 16. For images of
    another size both are interpolated."""
    attention_heads: int = 8
    """Heads of every transformer."""
    dropout: float = 0.1
    """Dropout behind the patch embedding and in the MLPs while training."""

    def __post_init__(self) -> None:
        for name in ("width", "grid", "attention_heads"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"model.options.{name} is {value}", hint="give 1 or more")
        if self.width % self.attention_heads:
            raise ConfigError(
                f"model.options.width is {self.width}, but there are {self.attention_heads} heads",
                hint="choose a width that is a multiple of attention_heads",
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.options.dropout is {self.dropout}", hint="give a share in [0, 1)")


class TransformerBlock(nn.Module):
    """Self-attention and an MLP, each behind a LayerNorm and added to its input.

    The MLP has a GELU after its second linear layer too, as in the published code.
    """

    def __init__(self, width: int, options: LViTOptions) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, options.attention_heads, batch_first=True)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(options.dropout),
            nn.Linear(4 * width, width),
            nn.GELU(),
            nn.Dropout(options.dropout),
        )

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """Return the tokens after one exchange."""
        normed = self.attention_norm(tokens)
        attended, _ = self.attention(normed, normed, normed, need_weights=False)
        tokens = tokens + attended
        added: Tensor = self.mlp(self.mlp_norm(tokens))
        return tokens + added


class PatchEmbedding(nn.Module):
    """One token a patch of the map, with a learned position that starts at zero."""

    def __init__(self, width: int, patch: int, options: LViTOptions) -> None:
        super().__init__()
        self.project = nn.Conv2d(width, width, kernel_size=patch, stride=patch)
        self.positions = nn.Parameter(torch.zeros(1, width, options.grid, options.grid))
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, features: Float[Tensor, "batch width _ _"]) -> Float[Tensor, "batch patches width"]:
        """Return the tokens, row by row."""
        patches = self.project(features)
        located: Tensor = self.dropout(patches + _resize(self.positions, patches.shape[-2:]))
        return located.flatten(2).transpose(1, 2)


class SentenceTokens(nn.Module):
    """One token a patch from the words: four convolutions along the sentence, then one from words to patches.

    The last convolution has the words as its input channels and the patches as its output channels. It is made for
    ``grid`` × ``grid`` patches; where an image has another number, its outputs, arranged as that grid, are
    interpolated.
    """

    def __init__(self, text_dim: int, max_tokens: int, options: LViTOptions) -> None:
        super().__init__()
        self.grid = options.grid
        widths = [text_dim, *(options.width * factor for factor in (8, 4, 2, 1))]
        self.narrow = nn.Sequential(
            *(nn.Conv1d(before, after, kernel_size=3, padding=1) for before, after in pairwise(widths))
        )
        self.spread = _convolution(max_tokens, options.grid**2)

    def forward(self, text: TextFeatures, grid: tuple[int, int]) -> Float[Tensor, "batch patches width"]:
        """Return the tokens of a grid of patches; zeros for an image without a sentence.

        Rows without a sentence are left out before the BatchNorm, so that its statistics are those of sentences.
        """
        words = self.narrow(text.word_features[text.present].transpose(1, 2))
        spread = self.spread(words.transpose(1, 2)).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        tokens = _resize(spread, grid).flatten(2).transpose(1, 2)
        every = tokens.new_zeros(len(text.present), *tokens.shape[1:])
        every[text.present] = tokens
        return every


class DownTransformer(nn.Module):
    """Patches of one level of the encoder → tokens, joined to those of the level above.

    Args:
        width: Channels of the level.
        patch: Side of a patch, in cells of the level.
        options: See :class:`LViTOptions`.
        first: Whether there is no level above.
    """

    def __init__(self, width: int, patch: int, options: LViTOptions, *, first: bool) -> None:
        super().__init__()
        self.embedding = PatchEmbedding(width, patch, options)
        self.block = TransformerBlock(width, options)
        self.narrow = None if first else _convolution(width, width // 2)

    def forward(
        self,
        features: Float[Tensor, "batch width _ _"],
        sentence: Float[Tensor, "batch patches width"] | None,
        above: Float[Tensor, "batch patches half"] | None,
    ) -> Float[Tensor, "batch patches width"]:
        """Return the tokens: half of them from this level, half from above."""
        embedded = self.embedding(features)
        tokens: Tensor = self.block(embedded if sentence is None else embedded + sentence)
        if self.narrow is None or above is None:
            return tokens
        return torch.cat([self.narrow(tokens.transpose(1, 2)).transpose(1, 2), above], dim=2)


class UpTransformer(nn.Module):
    """Tokens of one level and of the level below → a map that is added to the skip connection.

    Args:
        width: Channels of the level.
        patch: Side of a patch, in cells of the level.
        options: See :class:`LViTOptions`.
        last: Whether there is no level below.
    """

    def __init__(self, width: int, patch: int, options: LViTOptions, *, last: bool) -> None:
        super().__init__()
        self.block = TransformerBlock(width, options)
        self.narrow = None if last else _convolution(2 * width, width)
        self.reconstruct = nn.Sequential(
            nn.Conv2d(width, width, kernel_size=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Upsample(scale_factor=patch),
        )

    def forward(
        self,
        tokens: Float[Tensor, "batch patches width"],
        below: Float[Tensor, "batch patches double"] | None,
        grid: tuple[int, int],
    ) -> tuple[Float[Tensor, "batch patches width"], Float[Tensor, "batch width height width_"]]:
        """Return the tokens, and their map at the resolution of the level."""
        tokens = self.block(tokens)
        if self.narrow is not None and below is not None:
            tokens = tokens + self.narrow(below.transpose(1, 2)).transpose(1, 2)
        return tokens, self.reconstruct(tokens.transpose(1, 2).reshape(len(tokens), -1, *grid))


class PixelAttention(nn.Module):
    """Weighs every pixel by a small MLP of three numbers: mean, maximum and their sum over projected channels (PLAM).

    The weight is not squeezed into [0, 1], as in the published code.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean_projection = nn.Conv2d(channels, channels, kernel_size=1, bias=False)
        self.maximum_projection = nn.Conv2d(channels, channels, kernel_size=1, bias=False)
        self.weigh = nn.Sequential(nn.Conv2d(3, 6, kernel_size=1), nn.ReLU(), nn.Conv2d(6, 1, kernel_size=1))

    def forward(self, features: Float[Tensor, "batch channels rows cols"]) -> Float[Tensor, "batch channels rows cols"]:
        """Return the features times the weight of their pixel."""
        mean = self.mean_projection(features).relu().mean(dim=1, keepdim=True)
        maximum = self.maximum_projection(features).relu().amax(dim=1, keepdim=True)
        weight: Tensor = self.weigh(torch.cat([mean, maximum, mean + maximum], dim=1))
        return weight * features


class GatedUpBlock(nn.Module):
    """Repetition to twice the resolution, the weighed skip connection joined, two convolutions."""

    def __init__(self, below: int, skip: int, out_channels: int) -> None:
        super().__init__()
        self.upsample = nn.Upsample(scale_factor=2)
        self.gate_skip = PixelAttention(skip)
        self.refine = convolutions(below + skip, out_channels, count=2)

    def forward(
        self, features: Float[Tensor, "batch below rows cols"], skip: Float[Tensor, "batch skip height width"]
    ) -> Float[Tensor, "batch out height width"]:
        """Return the map at twice the resolution."""
        refined: Tensor = self.refine(torch.cat([self.gate_skip(skip), self.upsample(features)], dim=1))
        return refined


class LViT(SegmentationModel):
    """LViT, the supervised model.

    Differs from the published code in:
        1. Any image size: positions and the sentence's tokens are interpolated from the grid they are learned for.
        2. An image without a sentence gets nothing added (the paper's LViT-TW); the code has no answer for it, and
           fills captions of fewer than nine words with the words "EOF XXX".
        3. The sentence is whatever the text encoder makes of it, padding zeroed; the code's is ten tokens of BERT.
        4. Members that the forward pass never uses are left out, and so are biases that a BatchNorm cancels.
        5. Maps are reconstructed before they are enlarged, not after: repeating pixels commutes with it.

    Args:
        text_encoder: Its words are added to the first level's patches; ``None`` for LViT-TW.
        options: See :class:`LViTOptions`.

    Source:
        Li et al., LViT: Language meets Vision Transformer in Medical Image Segmentation, IEEE TMI 2023.
    """

    def __init__(self, text_encoder: TextEncoder | None, options: LViTOptions) -> None:
        super().__init__(text_encoder)
        widths = [options.width * factor for factor in (1, 2, 4, 8, 8)]
        self.encoder = PlainEncoder(widths)
        self.sentence = None
        if text_encoder is not None:
            self.sentence = SentenceTokens(text_encoder.text_dim, text_encoder.max_tokens, options)
        levels = list(zip(STRIDES, widths, strict=False))
        self.down_transformers = nn.ModuleList(
            DownTransformer(width, DEEPEST_STRIDE // stride, options, first=stride == STRIDES[0])
            for stride, width in levels
        )
        self.up_transformers = nn.ModuleList(
            UpTransformer(width, DEEPEST_STRIDE // stride, options, last=stride == STRIDES[-1])
            for stride, width in reversed(levels)
        )
        self.decoder = nn.ModuleList(GatedUpBlock(*channels) for channels in decoder_channels(widths))
        self.head = nn.Conv2d(options.width, 1, kernel_size=1)

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> ImageFeatures:
        """Run the convolutional encoder, padding images at the right and bottom by repeating their border."""
        check_images(images)
        height, width = images.shape[-2:]
        return ImageFeatures(self.encoder(pad_images(images, DEEPEST_STRIDE)), None, (height, width))

    def segment(self, images: ImageFeatures, text: TextFeatures | None) -> ModelOutput:
        """Run the transformers, with the sentence where there is one, and decode."""
        present = nobody(images) if text is None else text.present
        maps = images.feature_maps
        grid = maps[DEEPEST_STRIDE].shape[-2:]
        told = None
        # In training even if no image has one: of processes that share a batch, all take part in the same operations.
        if self.sentence is not None and text is not None and (self.training or present.any()):
            told = self.sentence(text, grid)

        above, levels = None, []
        for stride, transformer in zip(STRIDES, self.down_transformers, strict=True):
            above = transformer(maps[stride], told, above)
            levels.append(above)
            told = None  # the sentence enters at the first level only

        below, decoded = None, maps[DEEPEST_STRIDE]
        for stride, transformer, block in zip(reversed(STRIDES), self.up_transformers, self.decoder, strict=True):
            below, added = transformer(levels.pop(), below, grid)
            decoded = block(decoded, maps[stride] + added)
        height, width = images.size
        return ModelOutput(self.head(decoded)[..., :height, :width], {}, present)


def build(config: ModelConfig, parts: Parts) -> LViT:
    """Build LViT, or with guidance off LViT-TW.

    Raises:
        ConfigError: An option is unknown or out of range, or image weights are named, which LViT cannot take.
        WeightsError: The text encoder's weights are neither on disk nor reachable, or do not fit.
    """
    refuse_image_weights(config, parts)
    options = read_options(LViTOptions, config)
    return LViT(parts.text_encoder(config.text_encoder) if config.guidance else None, options)


def _convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm1d(out_channels),
        nn.ReLU(),
    )


def _resize(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    return maps if maps.shape[-2:] == grid else nn.functional.interpolate(maps, grid, mode="bilinear")
