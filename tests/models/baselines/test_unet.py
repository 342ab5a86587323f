from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from monai.networks.nets.attentionunet import AttentionUnet
from monai.networks.nets.basic_unet import BasicUNet
from monai.networks.nets.basic_unetplusplus import BasicUNetPlusPlus
from torch import Tensor, nn

from tmca.cli import _explain
from tmca.config import ModelConfig, ObjectiveConfig
from tmca.errors import ConfigError
from tmca.losses import objective
from tmca.models import build_model
from tmca.models.baselines.unet import LViTUNet, UNet, decoder_channels
from tmca.models.vision import pad_images
from tmca.presets import NO_ALIGNMENT, NO_ENHANCEMENT

NAMES = ("unet", "unet-plus-plus", "attention-unet", "unet-lvit")
WIDTHS = (4, 6, 8, 10, 12)


def _config(method: str, **options: Any) -> ModelConfig:
    return ModelConfig(
        method=method, guidance=False, alignment=NO_ALIGNMENT, enhancement=NO_ENHANCEMENT, options=options
    )


def _model(method: str, **options: Any) -> UNet:
    torch.manual_seed(0)
    return build_model(_config(method, **{"widths": list(WIDTHS)} | options))


def _original(method: str, *, deep_supervision: bool = False) -> nn.Module:
    """Return MONAI's network with the weights of ``_model``."""
    torch.manual_seed(0)
    features = (*WIDTHS, WIDTHS[0])
    if method == "unet":
        return BasicUNet(2, 3, 1, features=features, act="RELU", norm="batch")
    if method == "unet-plus-plus":
        return BasicUNetPlusPlus(
            2, 3, 1, features=features, deep_supervision=deep_supervision, act="RELU", norm="batch"
        )
    return AttentionUnet(2, 3, 1, channels=WIDTHS, strides=(2, 2, 2, 2))


def _images(batch: int = 2, height: int = 32, width: int = 48) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def _masks(images: Tensor) -> Tensor:
    return images[:, :1] > 0.5


@pytest.mark.parametrize(
    ("method", "options", "count"),
    [
        ("unet", {}, 31_113_217),
        ("unet-plus-plus", {"deep_supervision": True}, 9_119_332),
        ("unet-plus-plus", {}, 9_119_332 - 3 * (32 + 1)),
        ("attention-unet", {}, 31_740_337),
        ("unet-lvit", {}, 14_747_969),
    ],
)
def test_parameters_at_the_published_widths(method: str, options: dict[str, Any], count: int):
    with torch.device("meta"):
        model = build_model(_config(method, **options))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["unet", "unet-plus-plus", "attention-unet"])
@torch.no_grad()
def test_the_mask_is_that_of_the_original(method: str, training: bool):
    expected = _original(method).train(training)(_images())
    output = _model(method).train(training)(_images())
    assert torch.equal(output.mask_logits, expected[0] if isinstance(expected, list) else expected)
    assert output.side_logits == ()


@torch.no_grad()
def test_deep_supervision_returns_the_four_outputs_of_the_original():
    expected = _original("unet-plus-plus", deep_supervision=True).eval()(_images())
    output = _model("unet-plus-plus", deep_supervision=True).eval()(_images())
    assert len(expected) == 4
    for got, wanted in zip((*output.side_logits, output.mask_logits), expected, strict=True):
        assert torch.equal(got, wanted)


def test_the_loss_of_deep_supervision_is_the_mean_of_the_outputs():
    output = _model("unet-plus-plus", deep_supervision=True)(_images())
    logits = (*output.side_logits, output.mask_logits)
    alone = [nn.functional.binary_cross_entropy_with_logits(part, _masks(_images()).float()) for part in logits]
    loss = objective(output, _masks(_images()), ObjectiveConfig(dice_weight=0.0))["loss"]
    torch.testing.assert_close(loss, torch.stack(alone).mean())


def test_without_deep_supervision_every_trainable_parameter_learns():
    model = _model("unet-plus-plus")
    objective(model(_images()), _masks(_images()), ObjectiveConfig())["loss"].backward()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name for name, parameter in trainable.items() if parameter.grad is None or not parameter.grad.any()] == []


@pytest.mark.parametrize("method", NAMES)
def test_frozen_biases_have_no_influence(method: str):
    model = _model(method).double()
    frozen = [(name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert bool(frozen) == (method != "unet-lvit")
    assert all(name.endswith("bias") for name, _ in frozen)
    model.requires_grad_(True)
    model(_images().double()).mask_logits.square().mean().backward()
    assert all(parameter.grad.abs().max() < 1e-12 for _, parameter in frozen)
    learning = (
        parameter.grad.abs().max()
        for name, parameter in model.named_parameters()
        if name not in dict(frozen) and parameter.grad is not None
    )
    assert min(learning) > 1e-9


@pytest.mark.parametrize("method", NAMES)
@torch.no_grad()
def test_a_sentence_costs_the_last_convolution_only(method: str):
    model = _model(method).eval()
    features = model.encode_image(_images(2, 20, 37))
    ((stride, maps),) = features.feature_maps.items()
    assert (stride, tuple(maps.shape)) == (1, (2, WIDTHS[0], 20, 37))
    model.network = nn.Identity()
    logits = model.segment(features, None).mask_logits
    weight, bias = model.heads[-1].parameters()
    torch.testing.assert_close(logits, torch.einsum("bchw,c->bhw", maps, weight.flatten())[:, None] + bias)


@pytest.mark.parametrize("method", NAMES)
@torch.no_grad()
def test_images_of_odd_sizes_are_padded_with_their_border(method: str):
    model = _model(method).eval()
    images = _images(1, 33, 50)
    by_hand = torch.cat([images, images[..., -1:].expand(-1, -1, -1, 14)], dim=3)
    by_hand = torch.cat([by_hand, by_hand[..., -1:, :].expand(-1, -1, 15, -1)], dim=2)
    assert torch.equal(pad_images(images, 16), by_hand)
    assert torch.equal(model(images).mask_logits, model(by_hand).mask_logits[..., :33, :50])


@pytest.mark.parametrize("method", NAMES)
def test_a_long_thin_batch_of_two_trains(method: str):
    output = _model(method)(_images(2, 20, 130))
    assert output.mask_logits.shape == (2, 1, 20, 130)
    assert output.mask_logits.isfinite().all()


def test_stages_of_lvits_decoder_end_at_the_width_of_the_level_above():
    assert decoder_channels((64, 128, 256, 512, 512)) == [
        (512, 512, 256),
        (256, 256, 128),
        (128, 128, 64),
        (64, 64, 64),
    ]


def test_lvits_unet_starts_with_one_convolution_and_then_has_pairs():
    network = LViTUNet(WIDTHS)
    parts = [network.encoder.stem, *network.encoder.down, *network.up]
    counts = [sum(isinstance(module, nn.Conv2d) for module in part.modules()) for part in parts]
    assert counts == [1, 2, 2, 2, 2, 2, 2, 2, 2]
    maps = network.encoder(_images())
    assert {stride: tuple(features.shape[1:]) for stride, features in maps.items()} == {
        1: (4, 32, 48),
        2: (6, 16, 24),
        4: (8, 8, 12),
        8: (10, 4, 6),
        16: (12, 2, 3),
    }


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": [4, 8, 8, 8]}, "5 values"),
        ({"widths": [4, 8, 8, 8, 8, 4]}, "5 values"),
        ({"widths": [4, 8, 7, 8, 8]}, "even"),
        ({"widths": [0, 8, 8, 8, 8]}, "even"),
        ({"widths": 4}, "5 values"),
        ({"depth": 4}, "widths"),
    ],
)
def test_options_that_do_not_fit_are_refused(method: str, options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        build_model(_config(method, **options))
    assert "model.options" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("method", ["unet", "attention-unet", "unet-lvit"])
def test_only_unet_plus_plus_has_deep_supervision(method: str):
    with pytest.raises(ConfigError, match="deep_supervision"):
        build_model(_config(method, deep_supervision=True))


@pytest.mark.parametrize("method", NAMES)
def test_guidance_is_refused(method: str):
    with pytest.raises(ConfigError, match="image alone") as caught:
        build_model(ModelConfig(method=method), ["a sentence"])
    assert "model.guidance" in caught.value.hint


@pytest.mark.parametrize("method", ["unet", "unet-plus-plus", "attention-unet"])
def test_without_monai_the_user_is_told_what_to_install(method: str, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "monai"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "monai", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        _model(method)
    message, _ = _explain(caught.value)
    assert "package 'monai" in message
    assert "tmca[train]" in message
    assert _model("unet-lvit")
