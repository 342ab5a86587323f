"""The U-Net family: U-Net, U-Net++ and Attention U-Net of MONAI, and the U-Net that LViT is built on.

None of them reads a sentence. Each runs up to its last 1×1 convolution when an image is encoded; only that convolution
is left for :meth:`UNet.segment`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tmca.config import ModelConfig
from tmca.errors import ConfigError
from tmca.models.base import Parts, SegmentationModel, nobody, read_options, refuse_image_weights
from tmca.models.vision import check_images, pad_images
from tmca.types import ImageFeatures, ModelOutput, TextFeatures

DEEPEST_STRIDE = 16

OptionsT = TypeVar("OptionsT")


@dataclass(frozen=True)
class UNetOptions:
    """Settings of U-Net and Attention U-Net."""

    widths: tuple[int, int, int, int, int] = (64, 128, 256, 512, 1024)
    """Channels at the strides 1, 2, 4, 8, 16; even numbers."""

    def __post_init__(self) -> None:
        if any(width < 2 or width % 2 for width in self.widths):
            raise ConfigError(
                f"model.options.widths is {self.widths}", hint="give five even numbers, for the strides 1, 2, 4, 8, 16"
            )


@dataclass(frozen=True)
class UNetPlusPlusOptions(UNetOptions):
    """Settings of U-Net++."""

    widths: tuple[int, int, int, int, int] = (32, 64, 128, 256, 512)
    """Channels at the strides 1, 2, 4, 8, 16; even numbers."""
    deep_supervision: bool = False
    """Train the three shallower outputs too; the mask is that of the deepest one either way."""


@dataclass(frozen=True)
class LViTUNetOptions(UNetOptions):
    """Settings of LViT's U-Net."""

    widths: tuple[int, int, int, int, int] = (64, 128, 256, 512, 512)
    """Channels at the strides 1, 2, 4, 8, 16; even numbers."""


class UNet(SegmentationModel):
    """A U-shaped network that sees the image alone.

    Args:
        network: Full-size feature maps of images whose sides are multiples of 16; one map, or a list of several.
        heads: The 1×1 convolution behind each map. The last one tells the mask; the others are deep supervision.
    """

    def __init__(self, network: nn.Module, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.network = network
        self.heads = nn.ModuleList(heads)
        _freeze_cancelled_biases(network)

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> ImageFeatures:
        """Run the network, padding images at the right and bottom by repeating their border."""
        check_images(images)
        height, width = images.shape[-2:]
        maps = self.network(pad_images(images, DEEPEST_STRIDE))
        joined = maps if isinstance(maps, Tensor) else torch.cat(maps, dim=1)
        return ImageFeatures({1: joined[..., :height, :width]}, None, (height, width))

    def segment(self, images: ImageFeatures, text: TextFeatures | None) -> ModelOutput:  # noqa: ARG002
        """Apply the last convolution."""
        maps = images.feature_maps[1].chunk(len(self.heads), dim=1)
        *side_logits, mask_logits = (head(features) for head, features in zip(self.heads, maps, strict=True))
        return ModelOutput(mask_logits, {}, nobody(images), side_logits=tuple(side_logits))


class PlainEncoder(nn.Module):
    """The contracting half of LViT's U-Net: a single convolution, then four times pooling and two convolutions."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.stem = convolutions(3, widths[0], count=1)
        self.down = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), convolutions(above, width, count=2)) for above, width in pairwise(widths)
        )

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> dict[int, Tensor]:
        """Return stride → map for the strides 1, 2, 4, 8, 16."""
        maps = {1: self.stem(images)}
        for level, down in enumerate(self.down):
            maps[2 ** (level + 1)] = down(maps[2**level])
        return maps


class UpBlock(nn.Module):
    """Transposed convolution by 2, the skip connection joined, two convolutions."""

    def __init__(self, below: int, skip: int, out_channels: int) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(below, below, kernel_size=2, stride=2)
        self.refine = convolutions(below + skip, out_channels, count=2)

    def forward(
        self, features: Float[Tensor, "batch below rows cols"], skip: Float[Tensor, "batch skip height width"]
    ) -> Float[Tensor, "batch out height width"]:
        """Return the map at twice the resolution."""
        refined: Tensor = self.refine(torch.cat([skip, self.upsample(features)], dim=1))
        return refined


class LViTUNet(nn.Module):
    """The U-Net that LViT compares itself with and whose shape its convolutional branch has.

    Differs from the published code in:
        1. Convolutions in front of a BatchNorm have no bias, which the BatchNorm would cancel.

    Source:
        Li et al., LViT, IEEE TMI 2023; the same network as in UCTransNet (Wang et al., AAAI 2022).
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.encoder = PlainEncoder(widths)
        self.up = nn.ModuleList(UpBlock(*channels) for channels in decoder_channels(widths))

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels height width"]:
        """Return the map in front of the last convolution."""
        maps = self.encoder(images)
        decoded: Tensor = maps[DEEPEST_STRIDE]
        for stride, up in zip((8, 4, 2, 1), self.up, strict=True):
            decoded = up(decoded, maps[stride])
        return decoded


def convolutions(in_channels: int, out_channels: int, *, count: int) -> nn.Sequential:
    """Return ``count`` 3×3 convolutions, each with BatchNorm and ReLU."""
    layers: list[nn.Module] = []
    for channels in (in_channels, *[out_channels] * (count - 1)):
        layers += [
            nn.Conv2d(channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


def decoder_channels(widths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return the channels from below, of the skip and of the output of each stage of LViT's decoder, deep to shallow.

    A stage ends at the width of the level above it, the last one at the width of the first level.
    """
    *skips, below = widths
    stages = []
    for level in reversed(range(len(skips))):
        out_channels = widths[max(level - 1, 0)]
        stages.append((below, skips[level], out_channels))
        below = out_channels
    return stages


def build_unet(config: ModelConfig, parts: Parts) -> UNet:
    """Build U-Net.

    Raises:
        ConfigError: Guidance is on, or an option is unknown or out of range.
    """
    from monai.networks.nets.basic_unet import BasicUNet

    widths = _options(UNetOptions, config, parts).widths
    network = BasicUNet(2, 3, 1, features=(*widths, widths[0]), act="RELU", norm="batch")
    head, network.final_conv = network.final_conv, nn.Identity()
    return UNet(network, [head])


def build_unet_plus_plus(config: ModelConfig, parts: Parts) -> UNet:
    """Build U-Net++.

    Raises:
        ConfigError: Guidance is on, or an option is unknown or out of range.
    """
    from monai.networks.nets.basic_unetplusplus import BasicUNetPlusPlus

    options = _options(UNetPlusPlusOptions, config, parts)
    network = BasicUNetPlusPlus(
        2,
        3,
        1,
        features=(*options.widths, options.widths[0]),
        deep_supervision=options.deep_supervision,
        act="RELU",
        norm="batch",
    )
    heads = []
    for depth in (1, 2, 3, 4):
        heads.append(getattr(network, f"final_conv_0_{depth}"))
        setattr(network, f"final_conv_0_{depth}", nn.Identity())
    return UNet(network, heads if options.deep_supervision else heads[-1:])


def build_attention_unet(config: ModelConfig, parts: Parts) -> UNet:
    """Build Attention U-Net.

    Raises:
        ConfigError: Guidance is on, or an option is unknown or out of range.
    """
    from monai.networks.nets.attentionunet import AttentionUnet

    widths = _options(UNetOptions, config, parts).widths
    network = AttentionUnet(2, 3, 1, channels=widths, strides=(2, 2, 2, 2))
    head, network.model[-1] = network.model[-1], nn.Identity()
    return UNet(network, [head])


def build_lvit_unet(config: ModelConfig, parts: Parts) -> UNet:
    """Build the U-Net that LViT is built on.

    Raises:
        ConfigError: Guidance is on, or an option is unknown or out of range.
    """
    widths = _options(LViTUNetOptions, config, parts).widths
    return UNet(LViTUNet(widths), [nn.Conv2d(widths[0], 1, kernel_size=1)])


def _options(cls: type[OptionsT], config: ModelConfig, parts: Parts) -> OptionsT:
    if config.guidance:
        raise ConfigError(
            f"Method {config.method!r} sees the image alone, but guidance is on",
            hint="set model.guidance, and with it alignment and enhancement, off, as the preset of that name does",
        )
    refuse_image_weights(config, parts)
    return read_options(cls, config)


def _freeze_cancelled_biases(network: nn.Module) -> None:
    """Freeze the biases of convolutions in front of a normalisation, which subtracts them again: no gradient."""
    leaves = [module for module in network.modules() if not any(module.children())]
    for layer, follower in pairwise(leaves):
        normalised = isinstance(follower, nn.BatchNorm2d | nn.InstanceNorm2d)
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and normalised and layer.bias is not None:
            layer.bias.requires_grad_(False)
