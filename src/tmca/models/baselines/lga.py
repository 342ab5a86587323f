"""LGA: adapters that carry a sentence into SAM's image encoder, and SAM's mask decoder without prompts.

Written from the paper and from transformers' SAM; what is not followed stands at :class:`LGA`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tmca.config import ImageEncoderConfig, ModelConfig
from tmca.errors import ConfigError, unknown_name
from tmca.models.base import Parts, SegmentationModel, nobody, read_options
from tmca.models.text import TextEncoder
from tmca.models.vision import check_images, describe_architecture, image_backbone_config, load_backbone, pad_images
from tmca.models.weights import load_state_dict, locate
from tmca.types import ImageFeatures, ModelOutput, TextFeatures

if TYPE_CHECKING:
    from transformers import SamModel
    from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPositionalEmbedding

SCRATCH_DEVIATION = 0.02
"""Deviation of random weights; transformers' default of 1e-10 for SAM supposes that weights are loaded."""


@dataclass(frozen=True)
class LGAOptions:
    """Settings of LGA."""

    finetune_image_encoder: bool = True
    """Train SAM's image encoder too, as the authors' configuration does; off: adapters and mask decoder only, as the
    paper says."""
    fusion_blocks: int = 3
    """Fusion blocks, spread evenly over the encoder's layers (SAM-B: before layers 0, 4 and 8); one more injector
    follows the last layer."""
    attention_reduction: int = 8
    """Width of the encoder over the inner width of the adapters' attention."""
    mlp_ratio: float = 0.25
    """Inner width of the adapters' MLP over the width of the encoder."""
    gate: float = 0.01
    """Start value of the factor on what the sentence adds, one a channel."""

    def __post_init__(self) -> None:
        for name in ("fusion_blocks", "attention_reduction", "mlp_ratio"):
            value = getattr(self, name)
            if value <= 0:
                raise ConfigError(f"model.options.{name} is {value}", hint="give a positive value")


class AdapterMLP(nn.Module):
    """LayerNorm and two linear layers with a ReLU between, added to the input."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        inner = max(1, int(channels * ratio))
        self.layers = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, inner), nn.ReLU(), nn.Linear(inner, channels)
        )

    def forward(self, features: Float[Tensor, "*positions channels"]) -> Float[Tensor, "*positions channels"]:
        """Return the input plus what the layers make of it."""
        added: Tensor = self.layers(features)
        return features + added


class Extractor(nn.Module):
    """The sentence's token reads the image: attention with one head of reduced width, then an MLP."""

    def __init__(self, channels: int, options: LGAOptions) -> None:
        super().__init__()
        inner = max(1, channels // options.attention_reduction)
        self.image_norm = nn.LayerNorm(channels)
        self.text_norm = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, inner)
        self.key = nn.Linear(channels, inner, bias=False)  # a softmax over keys ignores their bias
        self.value = nn.Linear(channels, inner)
        self.output = nn.Linear(inner, channels)
        self.mlp = AdapterMLP(channels, options.mlp_ratio)

    def forward(
        self, features: Float[Tensor, "batch rows cols channels"], token: Float[Tensor, "batch 1 channels"]
    ) -> Float[Tensor, "batch 1 channels"]:
        """Return the token with what it read added."""
        normed = self.image_norm(features).flatten(1, 2)
        read = nn.functional.scaled_dot_product_attention(
            self.query(self.text_norm(token)), self.key(normed), self.value(normed)
        )
        changed: Tensor = self.mlp(token + self.output(read))
        return changed


class Injector(nn.Module):
    """The image takes the sentence in: the token's value, gated channel by channel, then an MLP.

    The paper lets every image position attend to the sentence. There is one token to attend to, so that the softmax is
    1 everywhere and each position gets the same vector: queries and keys have no influence and are left out.
    """

    def __init__(self, channels: int, options: LGAOptions) -> None:
        super().__init__()
        inner = max(1, channels // options.attention_reduction)
        self.text_norm = nn.LayerNorm(channels)
        self.value = nn.Linear(channels, inner)
        self.output = nn.Linear(inner, channels)
        self.gate = nn.Parameter(torch.full((channels,), options.gate))
        self.mlp = AdapterMLP(channels, options.mlp_ratio)

    def forward(
        self, features: Float[Tensor, "batch rows cols channels"], token: Float[Tensor, "batch 1 channels"]
    ) -> Float[Tensor, "batch rows cols channels"]:
        """Return the image features with the sentence mixed in."""
        message = self.gate * self.output(self.value(self.text_norm(token)))
        changed: Tensor = self.mlp(features + message.unsqueeze(1))
        return changed


class FusionBlock(nn.Module):
    """The token reads the image, then the image takes the token in."""

    def __init__(self, channels: int, options: LGAOptions) -> None:
        super().__init__()
        self.extractor = Extractor(channels, options)
        self.injector = Injector(channels, options)

    def forward(
        self, features: Float[Tensor, "batch rows cols channels"], token: Float[Tensor, "batch 1 channels"]
    ) -> tuple[Float[Tensor, "batch rows cols channels"], Float[Tensor, "batch 1 channels"]]:
        """Return image features and token."""
        token = self.extractor(features, token)
        return self.injector(features, token), token


class PromptlessMaskDecoder(nn.Module):
    """SAM's mask decoder with its own tokens only; the mask is that of the first mask token.

    The head that predicts the quality of masks and the networks of the other mask tokens are left out.

    Args:
        decoder: The decoder whose parts are taken.
        positions: SAM's random Fourier encoding of coordinates; not trained.
    """

    def __init__(self, decoder: SamMaskDecoder, positions: SamPositionalEmbedding) -> None:
        super().__init__()
        self.iou_token = decoder.iou_token
        self.mask_tokens = decoder.mask_tokens
        self.transformer = decoder.transformer
        self.upscale = nn.Sequential(
            decoder.upscale_conv1, decoder.upscale_layer_norm, nn.GELU(), decoder.upscale_conv2, nn.GELU()
        )
        self.hypernetwork = decoder.output_hypernetworks_mlps[0]
        self.positions = positions.requires_grad_(requires_grad=False)
        for name, parameter in self.named_parameters():
            if name.endswith("k_proj.bias"):  # a softmax over keys ignores it: its gradient is rounding noise
                parameter.requires_grad_(False)

    def forward(self, features: Float[Tensor, "batch channels rows cols"]) -> Float[Tensor, "batch 1 height width"]:
        """Return logits at four times the resolution."""
        batch, channels, rows, cols = features.shape
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(batch, 1, -1, -1)
        down = (torch.arange(rows, device=features.device) + 0.5) / rows
        across = (torch.arange(cols, device=features.device) + 0.5) / cols
        places = torch.stack([across.expand(rows, cols), down[:, None].expand(rows, cols)], dim=-1)
        with torch.autocast(features.device.type, enabled=False):  # a rounded angle of many turns means nothing
            positions = self.positions(places).permute(2, 0, 1).unsqueeze(0)
        tokens, sequence = self.transformer(tokens, features, positions, attention_similarity=None)
        upscaled = self.upscale(sequence.transpose(2, 3).reshape(batch, channels, rows, cols))
        weights = self.hypernetwork(tokens[:, 0, 1])
        return torch.einsum("bc,bchw->bhw", weights, upscaled).unsqueeze(1)


class LGA(SegmentationModel):
    """SAM with the sentence injected into its image encoder.

    The patches and their positions need no sentence; everything behind them does.

    Differs from the paper in:
        1. The image encoder is trained by default. The paper says it is frozen, the authors' configuration trains it.
        2. The injector has no queries and keys, whose influence is nil for one token of text; see :class:`Injector`.
        3. The gates start at 0.01 instead of 0, at which no adapter but the gate itself learns in the first step.
        4. Images of any size are taken as they are, padded to whole patches, and SAM's positions are interpolated;
           the paper enlarges every image to 1024 pixels.
        5. The loss is computed at the image's size, from logits; the authors' at a quarter of it, from probabilities.
        6. An image without a sentence skips the adapters.

    Args:
        sam: SAM; its image encoder, its mask decoder and its encoding of coordinates are taken.
        text_encoder: The sentence's mean feature is used; ``None`` for SAM without adapters.
        options: See :class:`LGAOptions`.

    Source:
        Hu et al., LGA: A Language Guide Adapter for Advancing the SAM Model's Capabilities in Medical Image
        Segmentation, MICCAI 2024.
    """

    def __init__(self, sam: SamModel, text_encoder: TextEncoder | None, options: LGAOptions) -> None:
        super().__init__(text_encoder)
        self.config = sam.config
        self.image_encoder = sam.vision_encoder.requires_grad_(options.finetune_image_encoder)
        self.mask_decoder = PromptlessMaskDecoder(sam.mask_decoder, sam.shared_image_embedding)
        self.fusions = nn.ModuleDict()
        if text_encoder is None:
            return
        depth, channels = len(self.image_encoder.layers), self.image_encoder.config.hidden_size
        if options.fusion_blocks > depth:
            raise ConfigError(
                f"model.options.fusion_blocks is {options.fusion_blocks}, but the encoder has {depth} layers",
                hint=f"set it to {depth} or less",
            )
        # The authors' BERT is as wide as the encoder; another one's features are projected.
        same = text_encoder.sentence_dim == channels
        self.project_text = nn.Identity() if same else nn.Linear(text_encoder.sentence_dim, channels)
        for block in range(options.fusion_blocks):
            self.fusions[str(depth * block // options.fusion_blocks)] = FusionBlock(channels, options)
        self.last_injector = Injector(channels, options)
        for module in [*self.fusions.modules(), *self.last_injector.modules()]:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=SCRATCH_DEVIATION)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def pretrained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of SAM."""
        return [*self.image_encoder.parameters(), *self.mask_decoder.parameters()]

    def image_architecture(self) -> dict[str, Any]:
        """Return the architecture of the whole SAM."""
        return describe_architecture(self.config)

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> ImageFeatures:
        """Cut images into patches, padding them at the right and bottom by repeating their border."""
        check_images(images)
        height, width = images.shape[-2:]
        patch = self.image_encoder.patch_embed.projection.kernel_size[0]
        patches = self.image_encoder.patch_embed.projection(pad_images(images, patch))
        if self.image_encoder.pos_embed is not None:
            positions = self.image_encoder.pos_embed.permute(0, 3, 1, 2)
            if positions.shape[-2:] != patches.shape[-2:]:
                positions = nn.functional.interpolate(positions, patches.shape[-2:], mode="bilinear")
            patches = patches + positions
        return ImageFeatures({patch: patches}, None, (height, width))

    def segment(self, images: ImageFeatures, text: TextFeatures | None) -> ModelOutput:
        """Encode patches with the sentence, where there is one, and decode the mask."""
        ((patch, patches),) = images.feature_maps.items()
        features = patches.permute(0, 2, 3, 1)
        present = nobody(images) if text is None else text.present
        token = None
        # In training even if no image has one: of processes that share a batch, all take part in the same operations.
        if text is not None and (self.training or present.any()):
            token = self.project_text(text.sentence_embedding).unsqueeze(1)
        for index, layer in enumerate(self.image_encoder.layers):
            if token is not None and str(index) in self.fusions:
                fused, token = self.fusions[str(index)](features, token)
                features = _choose(present, fused, features)
            features = layer(features)
        if token is not None:
            features = _choose(present, self.last_injector(features, token), features)
        logits = self.mask_decoder(self.image_encoder.neck(features))
        rows, cols = patches.shape[-2:]
        full = nn.functional.interpolate(logits.float(), (rows * patch, cols * patch), mode="bilinear")
        height, width = images.size
        return ModelOutput(full[..., :height, :width], {}, present)


def build(config: ModelConfig, parts: Parts) -> LGA:
    """Build LGA, or with guidance off SAM without prompts.

    Raises:
        ConfigError: The image encoder is no SAM, or an option is unknown or does not fit.
        WeightsError: Pretrained weights are neither on disk nor reachable, or do not fit.
    """
    options = read_options(LGAOptions, config)
    text_encoder = parts.text_encoder(config.text_encoder) if config.guidance else None
    return LGA(build_sam(config.image_encoder, load_weights=parts.load_weights), text_encoder, options)


@torch.inference_mode(mode=False)
def build_sam(config: ImageEncoderConfig, *, load_weights: bool) -> SamModel:
    """Build SAM, with pretrained weights unless told otherwise.

    Raises:
        ConfigError: The configuration is of another architecture.
        WeightsError: The weights are neither on disk nor reachable, or do not fit.
    """
    from transformers import SamConfig, SamModel

    sam_config = image_backbone_config(config)
    if not isinstance(sam_config, SamConfig):
        raise ConfigError(
            f"LGA needs SAM as its image encoder, not {sam_config.model_type!r}",
            hint="set image_encoder.weights to facebook/sam-vit-base",
        )
    if config.weights == "none":
        _check_options(SamConfig(), config.options)
        vision: Any = sam_config.vision_config
        if "initializer_range" not in config.options.get("vision_config", {}):
            vision.initializer_range = SCRATCH_DEVIATION
    sam = SamModel(sam_config)
    if load_weights and config.weights != "none":
        # The prompt encoder is not used, and files may leave out the tensor it shares.
        used = {name: getattr(sam, name) for name in ("vision_encoder", "mask_decoder", "shared_image_embedding")}
        load_backbone(nn.ModuleDict(used), load_state_dict(locate(config.weights)), config.weights)
    return sam


def _check_options(defaults: Any, options: dict[str, Any]) -> None:  # noqa: ANN401
    """Refuse unknown names inside the parts of SAM's configuration, which transformers would accept in silence."""
    for part, values in options.items():
        for name in values if isinstance(values, dict) else ():
            if not hasattr(getattr(defaults, part), name):
                known = [key for key in vars(getattr(defaults, part)) if not key.startswith("_")]
                raise unknown_name(f"option of sam's {part}", name, known)


def _choose(present: Tensor, guided: Tensor, unguided: Tensor) -> Tensor:
    return torch.where(present.view(-1, 1, 1, 1), guided, unguided)
