"""TGANet: a network that tells from the image how many targets there are and how large, and lets the answer guide it.

No sentence is read. The "text" are the vectors of five fixed words, weighted by what two classifiers say of the image;
the classifiers learn from the masks (:func:`tmca.losses.target_classes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tmca.config import ModelConfig
from tmca.errors import ConfigError, WeightsError
from tmca.files import expanded
from tmca.models.base import Parts, SegmentationModel, nobody, read_options
from tmca.models.vision import ImageEncoder, build_image_encoder, check_images, describe_architecture
from tmca.models.weights import load_tensors
from tmca.types import ImageFeatures, ModelOutput, TextFeatures

ENCODED_STRIDES = (2, 4, 8, 16)
WORDS = ("one", "multiple", "small", "medium", "large")
"""The words of the classes below, in their order."""
CLASSES = {"count": 2, "size": 3}
WORD_DIM = 300
DILATIONS = (6, 12, 18)
ATTENTION_REDUCTION = 16
SMALLEST_BOTTLENECK = 8
"""Hidden channels a channel attention has at least: fewer, and all of their ReLUs may be dead from the start."""


@dataclass(frozen=True)
class TGANetOptions:
    """Settings of TGANet."""

    width: int = 128
    """Channels of all maps behind the image encoder."""
    word_vectors: str = ""
    """File with the vectors of the words one, multiple, small, medium, large, 5 × 300: .npy, or .safetensors with one
    tensor; empty: fixed orthonormal vectors."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"model.options.width is {self.width}", hint="give a positive number")


class AttributeClassifiers(nn.ModuleDict):
    """Tells from the pooled deepest map how many targets there are and how large they are."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(
            {
                name: nn.Sequential(
                    nn.Linear(channels, width, bias=False), nn.ReLU(), nn.Linear(width, classes, bias=False)
                )
                for name, classes in CLASSES.items()
            }
        )

    def forward(self, pooled: Float[Tensor, "batch channels"]) -> dict[str, Float[Tensor, "batch _"]]:
        """Return attribute → logits of its classes."""
        return {name: classify(pooled) for name, classify in self.items()}


class LabelEmbedding(nn.Module):
    """The five words, each times the probability of its class, as one vector (the paper's f0).

    Args:
        words: One vector a word; kept with the weights, not trained.
        width: Width of the result.
    """

    words: Tensor

    def __init__(self, words: Float[Tensor, "words word_dim"], width: int) -> None:
        super().__init__()
        self.register_buffer("words", words)
        self.project = nn.Sequential(nn.Linear(words.numel(), width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())

    def forward(self, class_logits: dict[str, Float[Tensor, "batch _"]]) -> Float[Tensor, "batch width"]:
        """Return the embedding of what the classifiers say."""
        probabilities = torch.cat([logits.softmax(dim=1) for logits in class_logits.values()], dim=1)
        label: Tensor = self.project((probabilities.unsqueeze(2) * self.words).flatten(1))
        return label


class ChannelAttention(nn.Module):
    """Weighs channels by their average and their maximum over the image (CBAM)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(SMALLEST_BOTTLENECK, channels // ATTENTION_REDUCTION)
        self.weigh = nn.Sequential(
            nn.Linear(channels, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, channels, bias=False)
        )

    def forward(self, features: Float[Tensor, "batch channels rows cols"]) -> Float[Tensor, "batch channels rows cols"]:
        """Return the weighted features."""
        gains: Tensor = (self.weigh(features.mean(dim=(2, 3))) + self.weigh(features.amax(dim=(2, 3)))).sigmoid()
        return features * gains[:, :, None, None]


class SpatialAttention(nn.Module):
    """Weighs positions by the average and the maximum over their channels (CBAM)."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Conv2d(2, 1, kernel_size=7, padding=3, bias=False)

    def forward(self, features: Float[Tensor, "batch channels rows cols"]) -> Float[Tensor, "batch channels rows cols"]:
        """Return the weighted features."""
        pooled = torch.cat([features.mean(dim=1, keepdim=True), features.amax(dim=1, keepdim=True)], dim=1)
        gains: Tensor = self.weigh(pooled).sigmoid()
        return features * gains


class FeatureEnhancement(nn.Module):
    """Widens the view of an encoder map: four dilated branches, joined, beside a shortcut (the paper's FEM)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        branches = [_convolution(channels, width, kernel_size=1)]
        branches += [_convolution(channels, width, dilation=dilation) for dilation in DILATIONS]
        self.branches = nn.ModuleList(
            nn.Sequential(convolution, nn.ReLU(), ChannelAttention(width)) for convolution in branches
        )
        self.join = _convolution(width * len(branches), width)
        self.shortcut = _convolution(channels, width, kernel_size=1)
        self.spatial_attention = SpatialAttention()

    def forward(self, features: Float[Tensor, "batch channels rows cols"]) -> Float[Tensor, "batch width rows cols"]:
        """Return the enhanced map."""
        joined = self.join(torch.cat([branch(features) for branch in self.branches], dim=1))
        enhanced: Tensor = self.spatial_attention((joined + self.shortcut(features)).relu())
        return enhanced


class ResidualChain(nn.Module):
    """Convolutions to each of which everything that came before it is added: the input and all earlier outputs."""

    def __init__(self, width: int, kernel_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(_convolution(width, width, kernel_size=size) for size in kernel_sizes)

    def forward(self, features: Float[Tensor, "batch width rows cols"]) -> Float[Tensor, "batch width rows cols"]:
        """Return the output of the last convolution with what was added to it."""
        shortcut = features
        for convolution in self.convolutions:
            features = (convolution(features) + shortcut).relu()
            shortcut = shortcut + features
        return features


class DecoderStage(nn.Module):
    """Doubles the resolution, joins the encoder's map, and refines: residual convolutions and two attentions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.join = nn.Sequential(_convolution(2 * width, width, kernel_size=1), nn.ReLU())
        self.refine = nn.Sequential(ResidualChain(width, (3, 3, 1)), ChannelAttention(width), SpatialAttention())

    def forward(
        self,
        features: Float[Tensor, "batch width rows cols"],
        skip: Float[Tensor, "batch width out_rows out_cols"],
    ) -> Float[Tensor, "batch width out_rows out_cols"]:
        """Return the decoded map."""
        decoded: Tensor = self.refine(self.join(torch.cat([_upsample(features, 2), skip], dim=1)))
        return decoded


class LabelAttention(nn.Module):
    """Weighs channels by the label (the paper's label attention)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weigh = nn.Sequential(nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, width, bias=False))

    def forward(
        self, features: Float[Tensor, "batch width rows cols"], label: Float[Tensor, "batch width"]
    ) -> tuple[Float[Tensor, "batch width rows cols"], Float[Tensor, "batch width"]]:
        """Return the weighted features, and the logits of the weights for the next stage's label."""
        logits = self.weigh(label)
        return features * logits.sigmoid()[:, :, None, None], logits


class Aggregation(nn.Module):
    """Joins the maps of all decoder stages at the resolution of the last one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.join = nn.Sequential(_convolution(3 * width, width, kernel_size=1), nn.ReLU())
        self.refine = ResidualChain(width, (3, 3))

    def forward(self, maps: list[Tensor]) -> Float[Tensor, "batch width rows cols"]:
        """Return the joined map; ``maps`` go from deep to shallow."""
        rows = maps[-1].shape[2]
        joined: Tensor = self.refine(self.join(torch.cat([_upsample(deep, rows // deep.shape[2]) for deep in maps], 1)))
        return joined


class TGANet(SegmentationModel):
    """Text-guided attention network without text.

    The whole network runs when an image is encoded; only the last 1×1 convolution is left for :meth:`segment`.

    Args:
        image_encoder: Maps at the strides 2, 4, 8, 16.
        words: One vector for each of :data:`WORDS`.
        width: Channels of all maps behind the encoder.

    Differs from the paper in:
        1. Orthonormal vectors stand for the words unless a file with BPEmb's is given. The words are constants, and a
           linear layer follows them: any five independent vectors can express the same.
        2. ``class_logits`` are logits. The published code gives its probabilities to a cross-entropy that takes the
           softmax again.
        3. The last 1×1 convolution comes before the last upsampling: the same function, without a full-size map of all
           channels.
        4. Convolutions in front of a BatchNorm have no bias, which the BatchNorm would cancel.
        5. Kernel sizes of the residual convolutions are those that fit the published number of parameters.

    Source:
        Tomar et al., TGANet: Text-guided attention for improved polyp segmentation, MICCAI 2022.
    """

    def __init__(self, image_encoder: ImageEncoder, words: Float[Tensor, "words word_dim"], width: int) -> None:
        super().__init__()
        channels = image_encoder.out_channels
        self.image_encoder = image_encoder
        self.classify = AttributeClassifiers(channels[16], width)
        self.embed_label = LabelEmbedding(words, width)
        self.enhance = nn.ModuleDict({str(stride): FeatureEnhancement(channels[stride], width) for stride in channels})
        # A stage is named after the stride it ends at.
        stages = [str(stride) for stride in (8, 4, 2)]
        self.decoder = nn.ModuleDict({stage: DecoderStage(width) for stage in stages})
        self.label_attention = nn.ModuleDict({stage: LabelAttention(width) for stage in stages})
        self.aggregate = Aggregation(width)
        self.head = nn.Conv2d(width, 1, kernel_size=1)

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> ImageFeatures:
        """Run the network up to the last convolution."""
        check_images(images)
        encoded = self.image_encoder(images)
        maps = {stride: self.enhance[str(stride)](features) for stride, features in encoded.feature_maps.items()}
        pooled = encoded.feature_maps[16].mean(dim=(2, 3))
        label = self.embed_label(self.classify(pooled))

        decoded = maps[16]
        gated = []
        for stage, decode in self.decoder.items():
            decoded, logits = self.label_attention[stage](decode(decoded, maps[int(stage)]), label)
            label = label + logits
            gated.append(decoded)
        return ImageFeatures({2: self.aggregate(gated)}, pooled, encoded.size)

    def segment(self, images: ImageFeatures, text: TextFeatures | None) -> ModelOutput:  # noqa: ARG002
        """Apply the last convolution; ``text`` changes nothing."""
        height, width = images.size
        mask_logits = _upsample(self.head(images.feature_maps[2]), 2)[..., :height, :width]
        return ModelOutput(mask_logits, {}, nobody(images), class_logits=self.classify(images.image_embedding))

    def pretrained_parameters(self) -> list[nn.Parameter]:
        """Return the image encoder's parameters."""
        return list(self.image_encoder.parameters())

    def image_architecture(self) -> dict[str, Any]:
        """Return the image encoder's architecture."""
        return describe_architecture(self.image_encoder.backbone.config)


def build(config: ModelConfig, parts: Parts) -> TGANet:
    """Build TGANet.

    Raises:
        ConfigError: Guidance is on, or an encoder or an option is unknown or does not fit.
        WeightsError: Pretrained weights or the word vectors cannot be found or read.
    """
    if config.guidance:
        raise ConfigError(
            "Method 'tganet' reads no sentence, but guidance is on",
            hint="set model.guidance, and with it alignment and enhancement, off, as the preset tganet does",
        )
    options = read_options(TGANetOptions, config)
    image_encoder = build_image_encoder(
        config.image_encoder, strides=ENCODED_STRIDES, pooled=False, load_weights=parts.load_weights
    )
    given = options.word_vectors and parts.load_weights
    words = read_word_vectors(Path(options.word_vectors)) if given else orthonormal_words()
    return TGANet(image_encoder, words, options.width)


def orthonormal_words() -> Float[Tensor, "words word_dim"]:
    """Return fixed orthonormal vectors that stand for the words where no word vectors are given."""
    random = torch.randn(WORD_DIM, len(WORDS), generator=torch.Generator().manual_seed(0))
    basis: Tensor = torch.linalg.qr(random).Q
    return basis.T.contiguous()


def read_word_vectors(path: Path) -> Float[Tensor, "words word_dim"]:
    """Read the vectors of the words from a ``.npy`` or ``.safetensors`` file.

    Raises:
        WeightsError: The file cannot be read, or does not hold one vector of 300 numbers a word.
    """
    path = expanded(path)
    if path.suffix == ".npy":
        try:
            tensors = [torch.from_numpy(np.load(path, allow_pickle=False))]
        except (OSError, ValueError, TypeError) as error:
            raise WeightsError(f"{path} is no readable .npy file: {error}", hint="write it again") from error
    else:
        tensors = list(load_tensors(path).values())
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if shapes != [(len(WORDS), WORD_DIM)]:
        raise WeightsError(
            f"{path} holds arrays of the shapes {shapes}, expected one of {(len(WORDS), WORD_DIM)}",
            hint=f"write one row for each of the words {', '.join(WORDS)}",
        )
    return tensors[0].float()


def _convolution(in_channels: int, out_channels: int, *, kernel_size: int = 3, dilation: int = 1) -> nn.Sequential:
    """Return a convolution that keeps the size, and its BatchNorm."""
    padding = dilation * (kernel_size // 2)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def _upsample(features: Tensor, factor: int) -> Tensor:
    if factor == 1:
        return features
    return nn.functional.interpolate(features, scale_factor=float(factor), mode="bilinear", align_corners=True)
