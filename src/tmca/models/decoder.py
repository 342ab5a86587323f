"""Language-guided decoder: self-attention, attention to the words (Eq. 3), upsampling with a skip connection.

The stages follow the language-guided baseline (Ariadne) that the paper builds on, from its description, with every
size taken from the features instead of a table.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tmca.models.operations import attend, smooth
from tmca.types import TextFeatures

LEAKY_SLOPE = 0.01


def sinusoidal_positions(length: int, dim: int, *, device: torch.device | None = None) -> Float[Tensor, "length dim"]:
    """Return the fixed sine and cosine encoding of positions 0 … length-1; ``dim`` is even.

    Source:
        Vaswani et al., Attention Is All You Need, 2017, Sec. 3.5.
    """
    positions = torch.arange(length, dtype=torch.float32, device=device)[:, None]
    rates = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32, device=device) * (-math.log(10_000.0) / dim))
    angles = positions * rates
    return torch.stack([torch.sin(angles), torch.cos(angles)], dim=2).flatten(1)


def image_positions(
    rows: int, cols: int, dim: int, form: str = "grid", *, device: torch.device | None = None
) -> Float[Tensor, "positions dim"]:
    """Return the encoding of a grid, row by row: half of the channels tell the row, half the column.

    Differs from the paper in:
        1. The baseline numbers the flattened positions 0 … 48, which ties the encoding to one image size; rows and
           columns are encoded apart here, unless ``form`` asks for the baseline's.

    Args:
        rows: Rows of the grid.
        cols: Columns of the grid.
        dim: Channels of the encoding; a multiple of 4.
        form: ``grid``, ``flat`` or ``flat_columns``; see :class:`~tmca.config.DecoderConfig`.
        device: Where to.
    """
    if form == "flat":
        return sinusoidal_positions(rows * cols, dim, device=device)
    if form == "flat_columns":
        by_column = sinusoidal_positions(rows * cols, dim, device=device).reshape(cols, rows, dim)
        return by_column.transpose(0, 1).reshape(rows * cols, dim)
    down = sinusoidal_positions(rows, dim // 2, device=device)[:, None].expand(rows, cols, dim // 2)
    across = sinusoidal_positions(cols, dim // 2, device=device)[None].expand(rows, cols, dim // 2)
    return torch.cat([down, across], dim=-1).reshape(rows * cols, dim)


class TextSummary(nn.Module):
    """Condenses the words of a sentence to a few tokens of the stage's width (the paper's T').

    A convolution over the token axis mixes the words, a linear layer changes the width. Padding is zero on arrival
    and therefore adds nothing.
    """

    def __init__(self, max_tokens: int, summary_tokens: int, text_dim: int, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv1d(max_tokens, summary_tokens, kernel_size=1)
        self.project = nn.Linear(text_dim, channels)

    def forward(self, word_features: Float[Tensor, "batch tokens text_dim"]) -> Float[Tensor, "batch summary channels"]:
        """Return the summary tokens."""
        mixed = nn.functional.gelu(self.mix(word_features))
        return nn.functional.leaky_relu(self.project(mixed), LEAKY_SLOPE)


class LanguageGuide(nn.Module):
    """Self-attention over image positions, then attention from image positions to the sentence.

    Positions are added to queries and keys, not to values. The cross-attention is added back with one learnable
    factor.

    Args:
        channels: Width of the image features; a multiple of 4 and of ``attention_heads``.
        text_dim: Width of the word features.
        max_tokens: Tokens a sentence.
        summary_tokens: Tokens it is condensed to.
        attention_heads: Heads of the cross-attention.
        gate: Start value of the learnable factor.
        positions: How the places of the image are encoded; see :func:`image_positions`.

    Source:
        Li et al., TMCA, Sec. 3.4, Eq. 3.
    """

    def __init__(
        self,
        channels: int,
        text_dim: int,
        *,
        max_tokens: int,
        summary_tokens: int,
        attention_heads: int,
        gate: float,
        positions: str = "grid",
    ) -> None:
        super().__init__()
        self.positions = positions
        self.text_summary = TextSummary(max_tokens, summary_tokens, text_dim, channels)
        self.self_attention_norm = nn.LayerNorm(channels)
        self.self_attention = nn.MultiheadAttention(channels, num_heads=1, batch_first=True)
        self.self_attention_output_norm = nn.LayerNorm(channels)
        self.cross_attention_norm = nn.LayerNorm(channels)
        self.cross_attention = nn.MultiheadAttention(channels, num_heads=attention_heads, batch_first=True)
        self.cross_attention_output_norm = nn.LayerNorm(channels)
        self.gate = nn.Parameter(torch.tensor(gate))

    def forward(
        self,
        image_features: Float[Tensor, "batch channels rows cols"],
        word_features: Float[Tensor, "batch tokens text_dim"],
    ) -> Float[Tensor, "batch channels rows cols"]:
        """Return the image features with the sentence mixed in (the paper's f_s)."""
        rows, cols = image_features.shape[2:]
        sequence = image_features.flatten(2).transpose(1, 2)
        channels = sequence.shape[2]
        positions = image_positions(rows, cols, channels, self.positions, device=sequence.device)

        normed = self.self_attention_norm(sequence)
        located = normed + positions
        attended = attend(self.self_attention, located, located, normed)
        sequence = sequence + self.self_attention_output_norm(attended)

        summary = self.text_summary(word_features)
        keys = summary + sinusoidal_positions(summary.shape[1], channels, device=summary.device)
        located = self.cross_attention_norm(sequence) + positions
        # In float32: what is read from a few tokens is nearly the same everywhere, and the norm enlarges what differs.
        with torch.autocast(sequence.device.type, enabled=False):
            attended = attend(self.cross_attention, located.float(), keys.float(), summary.float())
        sequence = sequence + self.gate * self.cross_attention_output_norm(attended)
        guided: Tensor = sequence.transpose(1, 2).reshape(-1, channels, rows, cols)
        return guided


class UpsampleBlock(nn.Module):
    """Transposed convolution by 2, the skip connection joined, two 3×3 convolutions.

    Convolving two joined maps is the sum of convolving each. The share of the skip connection is computed by
    :meth:`encode_skip`, which needs no sentence and therefore runs once an image.
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2, bias=False)
        self.refine = nn.Sequential(
            _convolution(out_channels + skip_channels, out_channels), _convolution(out_channels, out_channels)
        )

    def encode_skip(self, skip: Float[Tensor, "batch skip height width"]) -> Float[Tensor, "batch out height width"]:
        """Return what the skip connection adds to the first convolution."""
        return nn.functional.conv2d(skip, self._kernel[:, self.upsample.out_channels :], padding=1)

    def forward(
        self,
        features: Float[Tensor, "batch channels rows cols"],
        encoded_skip: Float[Tensor, "batch out height width"],
    ) -> Float[Tensor, "batch out height width"]:
        """Return the map at twice the resolution.

        Args:
            features: The coarser map.
            encoded_skip: From :meth:`encode_skip`.
        """
        upsampled = self.upsample(features)
        convolution, norm, activation = self._first
        bias: Tensor | None = convolution.bias  # type: ignore[assignment]
        kernel = self._kernel[:, : upsampled.shape[1]]
        joined = nn.functional.conv2d(upsampled, kernel, bias, padding=1) + encoded_skip
        refined: Tensor = self.refine[1](activation(norm(joined)))
        return refined

    @property
    def _first(self) -> nn.Sequential:
        first: nn.Sequential = self.refine[0]  # type: ignore[assignment]
        return first

    @property
    def _kernel(self) -> Tensor:
        kernel: Tensor = self._first[0].weight  # type: ignore[assignment]
        return kernel


def _convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(LEAKY_SLOPE),
    )


class GuidedDecoderStage(nn.Module):
    """One stage of the decoder: guidance by the sentence where there is one, then upsampling.

    Args:
        guide: The guidance, or ``None`` for an image-only stage.
        upsample: The U-shaped part.
    """

    def __init__(self, guide: LanguageGuide | None, upsample: UpsampleBlock) -> None:
        super().__init__()
        self.guide = guide
        self.upsample = upsample

    def forward(
        self,
        features: Float[Tensor, "batch channels rows cols"],
        encoded_skip: Float[Tensor, "batch out height width"],
        text: TextFeatures | None,
    ) -> Float[Tensor, "batch out height width"]:
        """Return the decoded map at twice the resolution; images without a sentence pass by the guidance."""
        if self.guide is not None and text is not None:
            guided = self.guide(features, text.word_features)
            features = torch.where(text.present.view(-1, 1, 1, 1), guided, features.to(guided.dtype))
        decoded: Tensor = self.upsample(features, encoded_skip)
        return decoded


class SubpixelHead(nn.Module):
    """From the stride-4 map to logits at full size: convolution, pixel shuffle, smoothing, 1×1 convolution.

    All four steps are linear and the last one works pixel by pixel, so the 1×1 convolution is multiplied into the
    first one's kernel: the same function and parameters, without ever building the full-size map of many channels.

    Source:
        Aitken et al., Checkerboard artifact free sub-pixel convolution, 2017 (the average pooling).
    """

    def __init__(self, in_channels: int, channels: int, scale: int = 4) -> None:
        super().__init__()
        self.expand = nn.Conv2d(in_channels, channels * scale**2, kernel_size=3, padding=1)
        self.scale = scale
        self.classify = nn.Conv2d(channels, 1, kernel_size=1)

    def forward(self, features: Float[Tensor, "batch channels rows cols"]) -> Float[Tensor, "batch 1 height width"]:
        """Return the logits, before the sigmoid."""
        weights = self.classify.weight.flatten()
        by_channel = (len(weights), self.scale**2)
        kernel = torch.einsum("cskij,c->skij", self.expand.weight.reshape(*by_channel, -1, 3, 3), weights)
        offset = weights @ _bias(self.expand).view(by_channel)
        shuffled = nn.functional.pixel_shuffle(nn.functional.conv2d(features, kernel, offset, padding=1), self.scale)
        return smooth(shuffled.float(), self.scale) + _bias(self.classify)


def _bias(convolution: nn.Conv2d) -> Tensor:
    if convolution.bias is None:
        raise TypeError("the head's convolutions have biases")
    return convolution.bias
