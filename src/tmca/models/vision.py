"""Image encoder: images → feature maps at strides 4, 8, 16, 32 (or others) and one pooled embedding.

Any transformers vision model serves whose hidden states contain maps at the wanted strides: ConvNeXt (the paper),
MobileNetV2, ResNet, Swin, … Which hidden state holds which stride is found by looking, not by a table of names.
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tmca.config import STRIDES, ImageEncoderConfig
from tmca.errors import ConfigError, DataError, WeightsError, unknown_name
from tmca.models.operations import speed_up_depthwise
from tmca.models.weights import changed_fields, load_config, load_state_dict, locate, without_kernels
from tmca.types import ImageFeatures

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

PROBE_SIZE = 64
USUAL_BATCHNORM_MOMENTUM = 0.1


class ImageEncoder(nn.Module):
    """A transformers vision model behind the contract a decoder needs.

    Args:
        backbone: Model that returns ``hidden_states``. It is changed in place: what serves no wanted stride may go.
        strides: Strides of the feature maps, ascending.
        pooled: Whether the pooled embedding will be used; if not, parameters that serve only it are frozen, so that
            every trainable parameter gets a gradient.

    Attributes:
        out_channels: Stride → channels of its feature map.
        embedding_dim: Width of the pooled embedding.

    Raises:
        ConfigError: The backbone lacks one of the strides.
    """

    def __init__(self, backbone: PreTrainedModel, *, strides: tuple[int, ...] = STRIDES, pooled: bool = True) -> None:
        super().__init__()
        self.backbone = backbone
        self.strides = strides
        _fit_to_strides(backbone, strides)
        _use_running_statistics(backbone)
        _pad_in_convolutions(backbone)
        speed_up_depthwise(backbone)
        # In evaluation mode, so that looking does not change the statistics of BatchNorm.
        was_training = backbone.training
        self.eval()
        self._index_by_stride = _find_strides(backbone, strides)
        with torch.no_grad():
            maps, embedding = self._run(_probe_images(backbone))
        self.out_channels = {stride: maps[stride].shape[1] for stride in strides}
        self.embedding_dim = embedding.shape[1]
        _freeze_unused(self, pooled=pooled)
        self.train(was_training)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> ImageFeatures:
        """Encode a batch of images of any size.

        Images whose sides are no multiple of the deepest stride are padded; see :func:`pad_images`.

        Args:
            images: Normalised images, float.
        """
        height, width = images.shape[-2:]
        maps, embedding = self._run(pad_images(images, self.strides[-1]))
        return ImageFeatures(maps, embedding, (height, width))

    def _run(self, images: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        output = self.backbone(pixel_values=images, output_hidden_states=True)
        states = _spatial_states(output)
        maps = {stride: states[index] for stride, index in self._index_by_stride.items()}
        pooled = getattr(output, "pooler_output", None)
        embedding = maps[self.strides[-1]].mean(dim=(2, 3)) if pooled is None else pooled.flatten(1)
        return maps, embedding


@torch.inference_mode(mode=False)
def build_image_encoder(
    config: ImageEncoderConfig,
    *,
    strides: tuple[int, ...] = STRIDES,
    pooled: bool = True,
    load_weights: bool = True,
) -> ImageEncoder:
    """Build an image encoder, with pretrained weights unless told otherwise.

    Args:
        config: Which backbone, and where its weights are.
        strides: See :class:`ImageEncoder`.
        pooled: See :class:`ImageEncoder`.
        load_weights: False builds the architecture only (a checkpoint will fill it).

    Raises:
        WeightsError: The weights are neither on disk nor reachable, or do not fit.
        ConfigError: The architecture is unknown or lacks a stride.
    """
    from transformers import AutoModel

    backbone_config = image_backbone_config(config)
    try:
        # A config stores the precision of its file; the model is trained and run in float32.
        backbone = AutoModel.from_config(backbone_config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"Cannot build an image encoder of {backbone_config.model_type!r}: {error}", hint="choose a vision backbone"
        ) from error
    if load_weights and config.weights != "none":
        state = load_state_dict(locate(config.weights))
        load_backbone(backbone, state, config.weights)
    return ImageEncoder(backbone, strides=strides, pooled=pooled)


def image_backbone_config(config: ImageEncoderConfig) -> Any:  # noqa: ANN401
    """Return the transformers configuration of an image encoder without building it.

    Raises:
        ConfigError: The architecture or one of its options is unknown.
        WeightsError: The weights' folder cannot be found.
    """
    from transformers import CONFIG_MAPPING

    if config.weights != "none":
        values = load_config(locate(config.weights))
        architecture = str(values.pop("model_type", ""))
    else:
        values = dict(config.options)
        architecture = config.architecture
    if architecture not in CONFIG_MAPPING:
        raise unknown_name("image encoder architecture", architecture, ENCODERS)
    backbone_config = CONFIG_MAPPING[architecture]()
    if config.weights == "none":
        known = [key for key in vars(backbone_config) if not key.startswith("_")]
        for name in values:
            if name.startswith("_") or not hasattr(backbone_config, name):
                raise unknown_name(f"option of {architecture}", name, known)
    try:
        return CONFIG_MAPPING[architecture](**without_kernels(values))
    except (TypeError, ValueError) as error:
        problem = (str(error).splitlines() or [""])[-1].strip()
        raise ConfigError(
            f"The options of image encoder {architecture!r} do not fit: {problem}", hint="see the transformers config"
        ) from error


ENCODERS = ("convnext", "convnextv2", "mobilenet_v2", "resnet", "swin", "focalnet", "poolformer", "pvt_v2")
"""Architectures known to have the four strides; others of transformers may work too."""


_OWN_NORMALISATION = "download it again, or set preprocessing.normalisation to fixed with mean and std"


def encoder_normalisation(config: ImageEncoderConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation an encoder was trained with, for images scaled to [0, 1].

    Raises:
        ConfigError: There is no ``preprocessor_config.json`` to tell.
        WeightsError: The file does not tell.
    """
    if config.weights != "none":
        path = locate(config.weights) / "preprocessor_config.json"
        if path.is_file():
            return _read_normalisation(path)
    raise ConfigError(
        f"normalisation is 'encoder' but {config.weights!r} has no preprocessor_config.json",
        hint="set preprocessing.normalisation to per_image, or to fixed with mean and std",
    )


def _read_normalisation(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    try:
        values = json.loads(path.read_text("utf-8"))
        mean, std = (tuple(float(value) for value in values[key]) for key in ("image_mean", "image_std"))
    except (ValueError, LookupError, TypeError) as error:
        raise WeightsError(
            f"{path} does not tell mean and standard deviation: {error!r}", hint=_OWN_NORMALISATION
        ) from error
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise WeightsError(
            f"{path} has the means {mean} and standard deviations {std}, expected three of each, above 0",
            hint=_OWN_NORMALISATION,
        )
    return mean, std


def load_backbone(backbone: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Copy weights, forgiving a task head and the prefix transformers gives a backbone inside a task model.

    Raises:
        WeightsError: Weights are missing or of another shape.
    """
    wanted = backbone.state_dict()
    prefix = str(getattr(backbone, "base_model_prefix", ""))
    stripped = {key.removeprefix(f"{prefix}."): value for key, value in state.items()}
    missing = [key for key in wanted if key not in stripped and not key.endswith("num_batches_tracked")]
    wrong = [key for key, value in wanted.items() if key in stripped and stripped[key].shape != value.shape]
    if missing or wrong:
        raise WeightsError(
            f"Weights {name!r} do not fit their config: {len(missing)} tensors missing, {len(wrong)} of another shape, "
            f"first {(missing + wrong)[0]!r}",
            hint="download the folder again, or correct its config.json",
        )
    backbone.load_state_dict(
        {key: stripped[key].to(wanted[key].dtype) for key in wanted if key in stripped}, strict=False
    )


def _probe_images(backbone: nn.Module) -> Tensor:
    # A window must fit into the deepest map: transformers' Swin fails on smaller ones.
    window = getattr(backbone.config, "window_size", None)
    size = max(PROBE_SIZE, STRIDES[-1] * window) if isinstance(window, int) else PROBE_SIZE
    return torch.zeros(1, 3, size, size)


def _spatial_states(output: Any) -> list[Tensor]:  # noqa: ANN401
    reshaped = getattr(output, "reshaped_hidden_states", None)
    return list(reshaped if reshaped is not None else output.hidden_states)


def _fit_to_strides(backbone: Any, strides: tuple[int, ...]) -> None:  # noqa: ANN401
    """Put the map at stride 2 among the hidden states, where transformers leaves it out, and drop unread ResNet stages.

    What the backbone computes stays the same.
    """
    model_type = backbone.config.model_type
    if strides[0] == 2 and model_type == "mobilenet_v2":
        backbone.layer.insert(0, nn.Identity())
    if model_type == "resnet":
        if strides[0] == 2:
            backbone.encoder.stages.insert(0, backbone.embedder.pooler)
            backbone.embedder.pooler = nn.Identity()
        del backbone.encoder.stages[len(strides) :]


@torch.no_grad()
def _find_strides(backbone: nn.Module, wanted: tuple[int, ...]) -> dict[int, int]:
    """Return stride → index of the last hidden state with that stride."""
    images = _probe_images(backbone)
    size = images.shape[-1]
    try:
        states = _spatial_states(backbone(pixel_values=images, output_hidden_states=True))
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"Image encoder {type(backbone).__name__} cannot read images of {size} x {size} pixels: {error}",
            hint="use a hierarchical backbone such as convnext, mobilenet_v2, resnet or swin",
        ) from error
    strides: dict[int, int] = {}
    for index, state in enumerate(states):
        if state.ndim == 4 and size % state.shape[-1] == 0 and state.shape[-1] == state.shape[-2]:
            strides[size // state.shape[-1]] = index
    missing = [stride for stride in wanted if stride not in strides]
    if missing:
        raise ConfigError(
            f"Image encoder {type(backbone).__name__} has no feature map at stride {missing[0]}; "
            f"its maps have strides {sorted(strides)}",
            hint="use a hierarchical backbone such as convnext, mobilenet_v2, resnet or swin",
        )
    return {stride: strides[stride] for stride in wanted}


def _use_running_statistics(backbone: nn.Module) -> None:
    """Give BatchNorm the usual momentum.

    transformers builds MobileNetV2 with 0.997, the TensorFlow convention; in PyTorch that makes evaluation depend on
    the very last training batch.
    """
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d) and (module.momentum or 0) > 0.5:
            module.momentum = USUAL_BATCHNORM_MOMENTUM


def _pad_in_convolutions(backbone: Any) -> None:  # noqa: ANN401
    """Let convolutions pad by themselves where transformers copies every map to pad it as TensorFlow does.

    At stride one, an odd kernel is padded alike at opposite sides, and a 1 × 1 kernel not at all: no value changes.
    """
    if not getattr(backbone.config, "tf_padding", False):
        return
    without = copy.copy(backbone.config)
    without.tf_padding = False
    for layer in backbone.modules():
        convolution = getattr(layer, "convolution", None)
        if not isinstance(convolution, nn.Conv2d) or max(convolution.stride) > 1:
            continue
        if all(side % 2 for side in convolution.kernel_size):
            sides = zip(convolution.kernel_size, convolution.dilation, strict=True)
            convolution.padding = tuple(side // 2 * step for side, step in sides)
            layer.config = without


@torch.enable_grad()
def _freeze_unused(encoder: ImageEncoder, *, pooled: bool) -> None:
    maps, embedding = encoder._run(_probe_images(encoder.backbone))
    used = [*maps.values(), embedding] if pooled else list(maps.values())
    parameters = list(encoder.parameters())
    gradients = torch.autograd.grad([value.sum() for value in used], parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def describe_architecture(config: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return ``architecture`` and ``options`` of a transformers configuration, as :class:`ImageEncoderConfig` has them.

    The options are the fields that differ from the defaults.
    """
    return {"architecture": config.model_type, "options": changed_fields(config)}


def pad_images(
    images: Float[Tensor, "batch 3 height width"], multiple: int
) -> Float[Tensor, "batch 3 padded_height padded_width"]:
    """Pad images at the right and bottom, by repeating their border, until both sides are multiples of ``multiple``."""
    height, width = images.shape[-2:]
    padding = (0, -width % multiple, 0, -height % multiple)
    return nn.functional.pad(images, padding, mode="replicate") if any(padding) else images


def check_images(images: Tensor) -> None:
    """Refuse what cannot be a batch of images.

    Raises:
        DataError: Not four dimensions, or not three channels.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise DataError(
            f"Images have shape {tuple(images.shape)}, expected (batch, 3, height, width)",
            hint="preprocess files with tmca.data.preprocessing, which repeats grey images to three channels",
        )
