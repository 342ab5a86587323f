from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tmca.config import ImageEncoderConfig
from tmca.models import TMCA
from tmca.models.preparation import InFloat32, InPlaceGELU, prepare_for_prediction

TEXTS = ["one small bright lesion, located in top left of the image", "two dark lesions"]


@pytest.fixture
def model(tiny_model: Callable[..., TMCA]) -> TMCA:
    """With statistics and factors of the normalisations as training leaves them, not 0 and 1."""
    torch.manual_seed(0)
    model = tiny_model()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


@pytest.fixture
def mobilenet(tiny_model: Callable[..., TMCA]) -> TMCA:
    encoder = ImageEncoderConfig(
        weights="none", architecture="mobilenet_v2", options={"depth_multiplier": 0.25, "finegrained_output": False}
    )
    return tiny_model(image_encoder=encoder).eval()


def _logits(model: nn.Module, images: torch.Tensor, *, half: bool = False) -> torch.Tensor:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        return model.segment(model.encode_image(images), model.encode_text(TEXTS)).mask_logits.float()


def test_folded_normalisations_change_nothing(model: TMCA):
    images = torch.randn(2, 3, 64, 96)
    expected = _logits(model, images)
    network = prepare_for_prediction(model, torch.device("cpu"), half=False)
    torch.testing.assert_close(_logits(network, images), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.decoder.modules())


def test_transformers_convolutions_are_folded(mobilenet: TMCA):
    images = torch.randn(2, 3, 64, 64)
    network = prepare_for_prediction(mobilenet, torch.device("cpu"), half=False)
    torch.testing.assert_close(_logits(network, images), _logits(mobilenet, images), rtol=1e-3, atol=1e-3)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("architecture", ["convnext", "convnextv2"])
def test_layer_scales_are_folded_and_activations_work_in_place(tiny_model: Callable[..., TMCA], architecture: str):
    options = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
    encoder = ImageEncoderConfig(weights="none", architecture=architecture, options=options)
    model = tiny_model(image_encoder=encoder).eval()
    scales = [value for name, value in model.named_parameters() if name.endswith("layer_scale_parameter")]
    assert len(scales) == (5 if architecture == "convnext" else 0)
    for scale in scales:
        nn.init.normal_(scale)
    images = torch.randn(2, 3, 64, 64)
    network = prepare_for_prediction(model, torch.device("cpu"), half=False)
    for _ in range(2):
        torch.testing.assert_close(_logits(network, images), _logits(model, images), rtol=1e-4, atol=1e-4)
    assert not any(name.endswith("layer_scale_parameter") for name, _ in network.named_parameters())
    assert sum(isinstance(module, InPlaceGELU) for module in network.modules()) == 5
    assert len([value for name, value in model.named_parameters() if name.endswith("layer_scale_parameter")]) == len(
        scales
    )


@pytest.mark.parametrize("half", [False, True])
def test_the_model_stays_as_it_is(model: TMCA, half: bool):
    before = copy.deepcopy(model.state_dict())
    network = prepare_for_prediction(model, torch.device("cpu"), half=half)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    norms = {id(module.weight) for module in model.modules() if isinstance(module, nn.LayerNorm)}
    assert norms <= {id(value) for value in network.parameters()}  # shared, not copied


def _precisions(model: TMCA, images: torch.Tensor) -> tuple[set[torch.dtype], set[torch.dtype]]:
    network = prepare_for_prediction(model, torch.device("cpu"), half=True)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        features = network.encode_image(images)
    maps, skips = features.feature_maps.values(), features.encoded_skips.values()
    return {found.dtype for found in maps}, {found.dtype for found in skips}


def test_an_encoder_that_must_be_exact_stays_in_float32(mobilenet: TMCA):
    images = torch.randn(2, 3, 64, 64)
    assert _precisions(mobilenet, images) == ({torch.float32}, {torch.bfloat16})
    network = prepare_for_prediction(mobilenet, torch.device("cpu"), half=True)
    assert isinstance(network.image_encoder, InFloat32)


def test_convnext_and_the_decoder_compute_in_bfloat16_but_for_attention_to_the_sentence(model: TMCA):
    images = torch.randn(2, 3, 64, 64)
    network = prepare_for_prediction(model, torch.device("cpu"), half=True)
    layers = [layer for layer in network.image_encoder.modules() if isinstance(layer, nn.Linear)]
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
    guides = [stage.guide for stage in network.decoder.values()]
    assert {guide.cross_attention.in_proj_weight.dtype for guide in guides} == {torch.float32}
    assert {guide.self_attention.in_proj_weight.dtype for guide in guides} == {torch.bfloat16}
    expected = _logits(model, images)
    found = _logits(network, images, half=True)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
