"""The network of the baseline, its modules named as the authors name them.

MONAI blocks, transformers encoders, PyTorch's own attention, every size free.
"""

from __future__ import annotations

import torch
from monai.networks.blocks import SubpixelUpsample, UnetOutBlock
from monai.networks.blocks.dynunet_block import UnetBasicBlock, get_conv_layer
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertForMaskedLM, PretrainedConfig

SUMMARY_TOKENS = (9, 12, 24)
HEAD_WIDTH = 24
MAX_POSITIONS = 4096


class Positions(nn.Module):
    """Adds the sinusoidal table of numbered positions."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        angles = torch.arange(length)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
        self.register_buffer("pe", torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[None])

    def forward(self, sequence: Tensor) -> Tensor:
        """Return the sequence with its positions."""
        return sequence + self.pe[:, : sequence.shape[1]]


class GuideLayer(nn.Module):
    """Self-attention of the image, then attention to the sentence."""

    def __init__(self, width: int, text_width: int, tokens: int, summary: int) -> None:
        super().__init__()
        self.text_project = nn.Sequential(
            nn.Conv1d(tokens, summary, 1), nn.GELU(), nn.Linear(text_width, width), nn.LeakyReLU()
        )
        self.vis_pos, self.txt_pos = Positions(width, MAX_POSITIONS), Positions(width, summary)
        self.norm1, self.self_attn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm2, self.cross_attn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = nn.MultiheadAttention(width, 1, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(width, 4, batch_first=True)
        self.scale = nn.Parameter(torch.tensor(1.421))

    def forward(self, sequence: Tensor, words: Tensor) -> Tensor:
        """Return the sequence with the sentence mixed in."""
        normed = self.norm1(sequence)
        placed = self.vis_pos(normed)
        sequence = sequence + self.self_attn_norm(self.self_attn(placed, placed, normed)[0])
        summary = self.text_project(words)
        placed = self.vis_pos(self.norm2(sequence))
        read = self.cross_attn(placed, self.txt_pos(summary), summary)[0]
        return sequence + self.scale * self.cross_attn_norm(read)


class UpBlock(nn.Module):
    """MONAI's ``UnetrUpBlock``, whose skip connection may have a width of its own."""

    def __init__(self, width: int, skip_width: int, out_width: int) -> None:
        super().__init__()
        self.transp_conv = get_conv_layer(2, width, out_width, 2, 2, conv_only=True, is_transposed=True)
        self.conv_block = UnetBasicBlock(2, out_width + skip_width, out_width, 3, 1, norm_name="BATCH")

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        """Return the map at twice the resolution."""
        return self.conv_block(torch.cat([self.transp_conv(features), skip], dim=1))


class Stage(nn.Module):
    """One stage of the decoder."""

    def __init__(self, widths: tuple[int, int, int], text_width: int, tokens: int, summary: int) -> None:
        super().__init__()
        self.guide_layer = GuideLayer(widths[0], text_width, tokens, summary)
        self.decoder = UpBlock(*widths)

    def forward(self, features: Tensor, skip: Tensor, words: Tensor) -> Tensor:
        """Return the decoded map at twice the resolution."""
        guided = self.guide_layer(features.flatten(2).mT, words)
        return self.decoder(guided.mT.unflatten(2, features.shape[2:]), skip)


class Wrapped(nn.Module):
    """An encoder beside a head that segmentation does not use."""

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.model = model
        self.project_head = nn.Linear(width, 5)


class Ariadne(nn.Module):
    """The whole network.

    Args:
        image: Configuration of a transformers image encoder.
        text: Configuration of the text encoder, which is frozen; its dropout is active in training, as published.
        tokens: Tokens a sentence.
        widths: Channels of the decoder at strides 4, 8, 16; by default the image encoder's.
        summary: Tokens a sentence is condensed to at strides 8, 16, 32.
        head: Channels of the head.
    """

    def __init__(
        self,
        image: PretrainedConfig,
        text: BertConfig,
        tokens: int = 24,
        *,
        widths: tuple[int, int, int] | None = None,
        summary: tuple[int, int, int] = SUMMARY_TOKENS,
        head: int = HEAD_WIDTH,
    ) -> None:
        super().__init__()
        backbone = AutoModel.from_config(image)
        with torch.no_grad():
            states = backbone.eval()(torch.zeros(1, 3, 64, 64), output_hidden_states=True).hidden_states
        last = {state.shape[2]: index for index, state in enumerate(states)}
        self.levels = [last[64 // stride] for stride in (4, 8, 16, 32)]
        channels = [states[level].shape[1] for level in self.levels]
        decoded = [*(widths or channels[:3]), channels[3]]
        self.encoder = Wrapped(backbone, channels[3])
        self.text_encoder = Wrapped(BertForMaskedLM(text), text.hidden_size)
        self.text_encoder.model.cls_projection_head = nn.Linear(text.hidden_size, 5)
        self.text_encoder.requires_grad_(requires_grad=False)
        sizes = (text.hidden_size, tokens)
        self.decoder16 = Stage((decoded[3], channels[2], decoded[2]), *sizes, summary[2])
        self.decoder8 = Stage((decoded[2], channels[1], decoded[1]), *sizes, summary[1])
        self.decoder4 = Stage((decoded[1], channels[0], decoded[0]), *sizes, summary[0])
        self.decoder1 = SubpixelUpsample(2, decoded[0], head, 4)
        self.out = UnetOutBlock(2, head, 1)

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits, one an image and a sentence."""
        states = self.encoder.model(images, output_hidden_states=True).hidden_states
        maps = [states[level] for level in self.levels]
        words = self.text_encoder.model.bert(input_ids, attention_mask).last_hidden_state
        features = maps[3]
        for stage, skip in ((self.decoder16, maps[2]), (self.decoder8, maps[1]), (self.decoder4, maps[0])):
            features = stage(features, skip, words)
        return self.out(self.decoder1(features))
