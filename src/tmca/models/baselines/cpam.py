"""CPAM: text-guided cross-position attention at the bottleneck of a U-shaped network, a reconstruction.

The authors' code is not public. What the paper and its figure say is followed; what they leave open is listed at
:class:`CPAM`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tmca.config import ModelConfig
from tmca.errors import ConfigError, WeightsError
from tmca.files import expanded
from tmca.models.base import Parts, SegmentationModel, nobody, read_options
from tmca.models.baselines.unet import convolutions, decoder_channels
from tmca.models.text import TextEncoder
from tmca.models.vision import check_images, pad_images
from tmca.models.weights import load_state_dict, load_tensors, locate
from tmca.types import ImageFeatures, ModelOutput, TextFeatures

VGG16_STAGES = (2, 2, 3, 3)
"""Convolutions of the first four stages of VGG16; the fifth has no place in the figure."""
BOTTLENECK_STRIDE = 16
QUERY_REDUCTION = 8


@dataclass(frozen=True)
class CPAMOptions:
    """Settings of CPAM."""

    width: int = 64
    """Channels at full size; doubled at each of the next three strides. VGG16's weights need 64."""
    value_from: Literal["text", "image"] = "text"
    """Whether the attention's values are made from the sentence's map, as in the description, or from the image's."""
    grid: int = 14
    """Rows and columns of the learned map that spreads the sentence over the bottleneck (14: images of 224 pixels);
    other sizes interpolate it."""
    gate: float = 0.1
    """Start value of the factor on what the attention adds."""

    def __post_init__(self) -> None:
        for name in ("width", "grid"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"model.options.{name} is {value}", hint="give a positive number")


class VGGEncoder(nn.Module):
    """The first four stages of VGG16 with BatchNorm, and the pooled map behind them.

    The layers are numbered as in torchvision, whose weights :func:`load_vgg` reads.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage, count in enumerate(VGG16_STAGES):
            layers += [*_convolutions(channels, width * 2**stage, count=count), nn.MaxPool2d(2)]
            channels = width * 2**stage
        self.features = nn.Sequential(*layers)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> dict[int, Tensor]:
        """Return stride → map: 1, 2, 4, 8 in front of each pooling, 16 behind the last one."""
        maps: dict[int, Tensor] = {}
        features = images
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps[2 ** len(maps)] = features
            features = layer(features)
        return maps | {BOTTLENECK_STRIDE: features}


class CrossPositionAttention(nn.Module):
    """Each image position attends to the positions of a map made of the sentence (the paper's CPAM^TG).

    The sentence becomes one vector, a learned map spreads it over the positions, and the image asks that map.

    Args:
        channels: Of the image features.
        text_dim: Width of the sentence embedding.
        options: Grid of the learned map, source of the values, and the start of the factor.
    """

    def __init__(self, channels: int, text_dim: int, options: CPAMOptions) -> None:
        super().__init__()
        self.value_from = options.value_from
        self.project_text = nn.Sequential(
            nn.Linear(text_dim, 2 * channels), nn.LayerNorm(2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )
        # Not constant: a map that is equal everywhere gives equal keys, from which nothing can be learned.
        self.spread = nn.Parameter(torch.randn(1, 1, options.grid, options.grid))
        inner = max(1, channels // QUERY_REDUCTION)
        self.query = nn.Conv2d(channels, inner, kernel_size=1)
        self.key = nn.Conv2d(channels, inner, kernel_size=1, bias=False)  # a softmax over keys ignores their bias
        self.value = nn.Conv2d(channels, channels, kernel_size=1)
        self.gate = nn.Parameter(torch.tensor(options.gate))

    def forward(
        self,
        features: Float[Tensor, "batch channels rows cols"],
        sentence_embedding: Float[Tensor, "batch text_dim"],
    ) -> Float[Tensor, "batch channels rows cols"]:
        """Return the image features with what the attention read added."""
        spread = nn.functional.interpolate(self.spread, size=features.shape[2:], mode="bilinear", align_corners=False)
        text_map = self.project_text(sentence_embedding)[:, :, None, None] * spread
        query, key = self.query(features), self.key(text_map)
        value = self.value(text_map if self.value_from == "text" else features)
        query, key, value = (part.flatten(2).transpose(1, 2) for part in (query, key, value))
        attended = nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0)
        return features + self.gate * attended.transpose(1, 2).reshape(features.shape)


class UpBlock(nn.Module):
    """Bilinear upsampling by 2, the skip connection joined, two convolutions."""

    def __init__(self, below: int, skip: int, out_channels: int) -> None:
        super().__init__()
        self.refine = _convolutions(below + skip, out_channels, count=2)

    def forward(
        self, features: Float[Tensor, "batch below rows cols"], skip: Float[Tensor, "batch skip height width"]
    ) -> Float[Tensor, "batch out height width"]:
        """Return the map at twice the resolution."""
        larger = nn.functional.interpolate(features, size=skip.shape[2:], mode="bilinear", align_corners=False)
        refined: Tensor = self.refine(torch.cat([skip, larger], dim=1))
        return refined


class CPAM(SegmentationModel):
    """U-shaped network whose bottleneck attends to the sentence; images without one skip the attention.

    A reconstruction from the paper's description and figure.

    Args:
        image_encoder: Maps at the strides 1, 2, 4, 8, 16.
        text_encoder: Of the sentences; ``None`` for the same network without language.
        attention: The block at the bottleneck; ``None`` without language.
        width: Channels at full size.

    Differs from the paper in:
        1. Left open there, and ours: VGG16 as the encoder's shape, CLIP's sentence embedding as the text's vector, the
           layers that project it, and the U-Net decoder.
        2. The factor on the attention starts at 0.1. The position attention that the block descends from starts at 0,
           where nothing but the factor itself has a gradient.
        3. The learned map is interpolated for images of other sizes.

    Source:
        Lee et al., Text-guided cross-position attention for segmentation: case of medical image, MICCAI 2023.
    """

    def __init__(
        self,
        image_encoder: VGGEncoder,
        text_encoder: TextEncoder | None,
        attention: CrossPositionAttention | None,
        width: int,
    ) -> None:
        super().__init__(text_encoder)
        self.image_encoder = image_encoder
        self.attention = attention
        stages = zip((8, 4, 2, 1), decoder_channels(encoder_widths(width)), strict=True)
        # A stage is named after the stride it ends at.
        self.decoder = nn.ModuleDict({str(stride): UpBlock(*channels) for stride, channels in stages})
        self.head = nn.Conv2d(width, 1, kernel_size=1)

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> ImageFeatures:
        """Encode images, padded at the right and bottom by repeating their border."""
        check_images(images)
        height, width = images.shape[-2:]
        return ImageFeatures(self.image_encoder(pad_images(images, BOTTLENECK_STRIDE)), None, (height, width))

    def segment(self, images: ImageFeatures, text: TextFeatures | None) -> ModelOutput:
        """Attend to encoded sentences (one an image) where there are any, and decode."""
        decoded = images.feature_maps[BOTTLENECK_STRIDE]
        present = nobody(images) if text is None else text.present
        if self.attention is not None and text is not None:
            attended = self.attention(decoded, text.sentence_embedding)
            decoded = torch.where(present.view(-1, 1, 1, 1), attended, decoded.to(attended.dtype))
        for stride, decode in self.decoder.items():
            decoded = decode(decoded, images.feature_maps[int(stride)])
        height, width = images.size
        return ModelOutput(self.head(decoded)[..., :height, :width], {}, present)

    def pretrained_parameters(self) -> list[nn.Parameter]:
        """Return the image encoder's parameters."""
        return list(self.image_encoder.parameters())


def build(config: ModelConfig, parts: Parts) -> CPAM:
    """Build CPAM, or the same network without language.

    Raises:
        ConfigError: The text encoder or an option is unknown or does not fit.
        WeightsError: Pretrained weights are neither on disk nor reachable, or are not those of a VGG16.
    """
    options = read_options(CPAMOptions, config)
    image_encoder = VGGEncoder(options.width)
    if parts.load_weights and config.image_encoder.weights != "none":
        load_vgg(image_encoder, config.image_encoder.weights)
    if not config.guidance:
        return CPAM(image_encoder, None, None, options.width)
    text_encoder = parts.text_encoder(config.text_encoder)
    attention = CrossPositionAttention(encoder_widths(options.width)[-1], text_encoder.sentence_dim, options)
    return CPAM(image_encoder, text_encoder, attention, options.width)


def encoder_widths(width: int) -> tuple[int, ...]:
    """Return the channels of the encoder's maps at the strides 1, 2, 4, 8, 16."""
    widths = tuple(width * 2**stage for stage in range(len(VGG16_STAGES)))
    return (*widths, widths[-1])


def load_vgg(encoder: VGGEncoder, name: str) -> None:
    """Copy the weights of a VGG16 with BatchNorm in torchvision's layout (``features.0.weight``, …).

    torchvision's convolutions have biases that the BatchNorm behind them cancels; here its running mean takes them up.

    Args:
        encoder: What to fill.
        name: A weight file, or a folder or hub id with one.

    Raises:
        WeightsError: The weights cannot be found or read, or do not fit.
    """
    file = expanded(name)
    state = load_tensors(file) if file.is_file() else load_state_dict(locate(name))
    wanted = encoder.state_dict()
    missing = [key for key in wanted if not key.endswith("num_batches_tracked") and key not in state]
    wrong = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if missing or wrong:
        raise WeightsError(
            f"Weights {name!r} do not fit this VGG16 with BatchNorm: {len(missing)} tensors missing, {len(wrong)} of "
            f"another shape, first {(missing + wrong)[0]!r}",
            hint="give torchvision's vgg16_bn (hub: timm/vgg16_bn.tv_in1k) and width 64, or image_encoder.weights none",
        )
    for index, layer in enumerate(encoder.features):
        bias = state.get(f"features.{index - 1}.bias")
        if isinstance(layer, nn.BatchNorm2d) and bias is not None:
            state[f"features.{index}.running_mean"] = state[f"features.{index}.running_mean"] - bias
    encoder.load_state_dict({key: state[key] for key in wanted if key in state}, strict=False)


def _convolutions(in_channels: int, out_channels: int, *, count: int) -> nn.Sequential:
    """Return 3×3 convolutions with BatchNorm and ReLU, initialised as VGG's are, which keeps the scale of a signal."""
    layers = convolutions(in_channels, out_channels, count=count)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layers
