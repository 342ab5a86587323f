"""A trained network made fast for prediction; its masks stay what they were.

Normalisation with fixed statistics is multiplied into the convolution before it, a ConvNeXt's layer scale into the
linear layer before it, and where bfloat16 is asked for, the weights of what runs in it are stored so. Not everything
does: ``benchmarks/prediction.py`` measures what masks lose.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tmca.models.base import SegmentationModel
from tmca.models.operations import channels_last

HALVED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.MultiheadAttention)
"""Layers whose weights are kept in bfloat16: those that only multiply."""

EXACT = ("cross_attention", "text_projection")
"""Parts that switch autocast off and compute in float32 by themselves."""


class InFloat32(nn.Module):
    """Runs a network in float32 in the middle of autocast."""

    def __init__(self, network: nn.Module, device_type: str) -> None:
        super().__init__()
        self.network = network
        self.device_type = device_type

    def forward(self, *inputs: Any) -> Any:  # noqa: ANN401
        """Return what the network returns."""
        with torch.autocast(self.device_type, enabled=False):
            return self.network(*inputs)


class InPlaceGELU(nn.Module):
    """GELU that overwrites what it reads, for predictions: less memory is moved."""

    def forward(self, values: Tensor) -> Tensor:
        """Return the values, changed."""
        changed: Tensor = torch.ops.aten.gelu_(values)
        return changed


def prepare_for_prediction(model: SegmentationModel, device: torch.device, *, half: bool) -> SegmentationModel:
    """Return a copy of a model for prediction; what need not change is shared with the model.

    Args:
        model: On the device. It is not changed, but its convolutions' weights are laid out with the channels last.
        device: Where it will run.
        half: Prepare for bfloat16 by autocast: except in the parts that :attr:`SegmentationModel.exact_parts` names.
    """
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    network = copy.deepcopy(channels_last(model).eval(), shared)
    _fold_normalisations(network)
    _fold_layer_scales(network)
    if half:
        for name in network.exact_parts or ():
            setattr(network, name, InFloat32(network.get_submodule(name), device.type))
        _halve(network)
        if network.text_encoder is not None:
            network.text_encoder.precision = torch.bfloat16
    if network.text_encoder is not None:
        network.text_encoder.forget()
    return channels_last(network)


def _fold_normalisations(network: nn.Module) -> None:
    """Multiply batch normalisations into the convolutions before them.

    Known to follow one another are neighbours in a sequence, and what transformers calls ``convolution`` and
    ``normalization``.
    """
    for parent in network.modules():
        children = parent._modules
        pairs = list(itertools.pairwise(children)) if isinstance(parent, nn.Sequential) else []
        if {"convolution", "normalization"} <= children.keys():
            pairs = [("convolution", "normalization")]
        for before, after in pairs:
            convolution, normalisation = children[before], children[after]
            if isinstance(convolution, nn.Conv2d) and isinstance(normalisation, nn.BatchNorm2d):
                children[before] = fuse_conv_bn_eval(convolution, normalisation)
                children[after] = nn.Identity()


def _fold_layer_scales(network: nn.Module) -> None:
    """Multiply a ConvNeXt's layer scales into the linear layers before them, and let its activations work in place."""
    for layer in network.modules():
        parts = layer._modules
        second, scale = parts.get("pwconv2"), getattr(layer, "layer_scale_parameter", None)
        if not isinstance(second, nn.Linear):
            continue
        if getattr(parts.get("act"), "act", None) is nn.functional.gelu:
            parts["act"] = InPlaceGELU()
        if isinstance(scale, nn.Parameter):
            for key, parameter in second._parameters.items():
                if parameter is not None:  # a new one, for the old is shared
                    scaled = scale.view(-1, *[1] * (parameter.ndim - 1)) * parameter
                    second._parameters[key] = nn.Parameter(scaled.detach(), requires_grad=False)
            layer.register_parameter("layer_scale_parameter", None)


def _halve(network: nn.Module, name: str = "") -> None:
    if isinstance(network, InFloat32) or name in EXACT:
        return
    if isinstance(network, HALVED):
        for key, parameter in network._parameters.items():
            if parameter is not None:  # a new one, for the old is shared
                network._parameters[key] = nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False)
    for key, child in network.named_children():
        _halve(child, key)
