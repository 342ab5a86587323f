from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from tmca.config import Experiment, ImageEncoderConfig, ModelConfig
from tmca.errors import ConfigError, WeightsError
from tmca.losses import class_loss
from tmca.models import build_model
from tmca.models.base import SegmentationModel
from tmca.models.baselines.tganet import (
    CLASSES,
    WORDS,
    ChannelAttention,
    FeatureEnhancement,
    LabelAttention,
    LabelEmbedding,
    ResidualChain,
    SpatialAttention,
    TGANet,
    orthonormal_words,
)
from tmca.presets import NO_ALIGNMENT, NO_ENHANCEMENT

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]}


def _config(architecture: str = "resnet", encoder: dict[str, Any] = RESNET, **options: Any) -> ModelConfig:
    return ModelConfig(
        method="tganet",
        guidance=False,
        image_encoder=ImageEncoderConfig(weights="none", architecture=architecture, options=encoder),
        alignment=NO_ALIGNMENT,
        enhancement=NO_ENHANCEMENT,
        options={"width": 16} | options,
    )


def _model(config: ModelConfig | None = None) -> TGANet:
    return build_model(config or _config()).eval()


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _squares(*sides: int) -> Tensor:
    masks = torch.zeros(len(sides), 1, 64, 64, dtype=torch.bool)
    for mask, side in zip(masks, sides, strict=True):
        mask[:, 4 : 4 + side, 4 : 4 + side] = True
    return masks


# --- the whole ----------------------------------------------------------------------------------------------------


def test_the_size_at_the_published_width_is_that_of_the_original():
    model = _model(_config(encoder={}, width=128))
    counts = {name: _count(part) for name, part in model.named_children()}
    assert counts == {
        "image_encoder": 8_543_296,  # ResNet-50 without its last stage
        "classify": 262_784,
        "embed_label": 208_640,
        "enhance": 9_288_072,
        "decoder": 1_041_702,
        "label_attention": 98_304,
        "aggregate": 344_832,
        "head": 129,
    }
    assert sum(counts.values()) == pytest.approx(19.84e6, rel=0.003)
    assert model.image_encoder.out_channels == {2: 64, 4: 256, 8: 512, 16: 1024}


@torch.no_grad()
def test_the_output_is_what_the_classifiers_and_the_decoder_make_of_the_image():
    model = _model()
    features = model.encode_image(torch.randn(2, 3, 40, 70))
    assert {stride: maps.shape for stride, maps in features.feature_maps.items()} == {2: (2, 16, 24, 40)}
    output = model.segment(features, None)
    assert output.mask_logits.shape == (2, 1, 40, 70)
    assert not output.present.any()
    # As published: to full size first, then the convolution.
    larger = nn.functional.interpolate(features.feature_maps[2], scale_factor=2, mode="bilinear", align_corners=True)
    torch.testing.assert_close(output.mask_logits, model.head(larger)[..., :40, :70], rtol=1e-5, atol=1e-6)


def test_a_mobilenet_may_encode_the_image():
    model = _model(_config("mobilenet_v2", {"depth_multiplier": 0.25, "min_depth": 8}))
    assert model(torch.randn(1, 3, 33, 50)).mask_logits.shape == (1, 1, 33, 50)


def test_an_encoder_without_stride_two_is_refused():
    with pytest.raises(ConfigError, match="no feature map at stride 2"):
        _model(_config("convnext", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}))


def test_the_encoder_may_be_pretrained(tmp_path: Path):
    resnet = ResNetModel(ResNetConfig(**RESNET)).eval()
    resnet.save_pretrained(tmp_path)
    model = _model(replace(_config(), image_encoder=ImageEncoderConfig(weights=str(tmp_path))))
    images = torch.randn(1, 3, 32, 32)
    expected = resnet(pixel_values=images, output_hidden_states=True).hidden_states[3]
    torch.testing.assert_close(model.image_encoder(images).feature_maps[16], expected)
    assert set(model.pretrained_parameters()) == set(model.image_encoder.parameters())
    assert model.image_architecture()["architecture"] == "resnet"


# --- classification -----------------------------------------------------------------------------------------------


def test_class_logits_are_logits_of_count_and_size():
    output = _model()(50 * torch.randn(3, 3, 64, 64))
    assert {name: logits.shape for name, logits in output.class_logits.items()} == {"count": (3, 2), "size": (3, 3)}
    assert any(logits.min() < 0 for logits in output.class_logits.values())
    assert not torch.allclose(output.class_logits["size"][0], output.class_logits["size"][1])


def test_the_class_loss_teaches_the_classifiers_and_the_encoder_alone():
    model = _model().train()
    masks = _squares(10, 40, 60)
    class_loss(model(torch.randn(3, 3, 64, 64)).class_logits, masks).backward()
    reached = {name.split(".")[0] for name, value in model.named_parameters() if value.grad is not None}
    assert reached == {"classify", "image_encoder"}
    assert all(value.grad.any() for value in model.classify.parameters())


def test_empty_masks_teach_no_class():
    model = _model().train()
    class_loss(model(torch.randn(2, 3, 64, 64)).class_logits, _squares(0, 0)).backward()
    assert not any(value.grad.any() for value in model.classify.parameters())


@torch.no_grad()
def test_what_the_classifiers_say_changes_the_mask():
    model = _model()
    images = torch.randn(1, 3, 64, 64)
    before = model(images)
    for classify in model.classify.values():
        classify[-1].weight.mul_(-30)
    after = model(images)
    assert not torch.allclose(before.mask_logits, after.mask_logits)
    assert not torch.allclose(before.class_logits["count"], after.class_logits["count"])


# --- blocks -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_words_are_weighted_by_the_probability_of_their_class():
    words = torch.tensor([[1.0, 0], [2, 0], [0, 3], [0, 6], [0, 12]])
    embed = LabelEmbedding(words, 4)
    embed.project = nn.Identity()
    logits = {"count": torch.tensor([[0.0, math.log(3)]]), "size": torch.zeros(1, 3)}
    expected = torch.tensor([[0.25, 0, 1.5, 0, 0, 1, 0, 2, 0, 4]])
    torch.testing.assert_close(embed(logits), expected)


@torch.no_grad()
def test_channel_attention_weighs_by_average_and_maximum():
    attention = ChannelAttention(2)
    for layer in (attention.weigh[0], attention.weigh[2]):
        nn.init.eye_(layer.weight)
    features = torch.tensor([[[[0.0, 1, 2, 5]], [[0, 0, 0, 4]]]])
    expected = features * torch.tensor([2 + 5.0, 1 + 4]).sigmoid()[:, None, None]
    torch.testing.assert_close(attention(features), expected)


@torch.no_grad()
def test_spatial_attention_weighs_by_average_and_maximum():
    attention = SpatialAttention()
    attention.weigh.weight.zero_()
    attention.weigh.weight[0, :, 3, 3] = torch.tensor([1.0, 10])
    features = torch.tensor([[[[0.0, 2]], [[-1, 1]]]])
    torch.testing.assert_close(attention(features), features * torch.tensor([-0.5 + 0, 1.5 + 20]).sigmoid())


@torch.no_grad()
def test_a_residual_convolution_adds_all_that_came_before():
    chain = ResidualChain(1, (1, 1, 1)).eval()
    for convolution in chain.convolutions:
        nn.init.ones_(convolution[0].weight)
        convolution[1].eps = 0.0
    # 1; 1+1 = 2; 2+(1+2) = 5; 5+(1+2+5) = 13
    assert chain(torch.ones(1, 1, 2, 2)).unique().item() == 13
    assert not chain(-torch.ones(1, 1, 2, 2)).any()


@torch.no_grad()
def test_label_attention_gates_channels_and_hands_its_logits_on():
    attention = LabelAttention(2)
    nn.init.eye_(attention.weigh[0].weight)
    attention.weigh[2].weight.copy_(torch.tensor([[2.0, 0], [0, -3]]))
    gated, logits = attention(torch.ones(1, 2, 3, 3), torch.tensor([[1.0, 2]]))
    assert logits.tolist() == [[2.0, -6.0]]
    torch.testing.assert_close(gated[0, :, 0, 0], logits[0].sigmoid())


@torch.no_grad()
def test_labels_accumulate_from_stage_to_stage():
    model = _model()
    labels, logits = [], []

    def listen(_: nn.Module, arguments: tuple[Tensor, Tensor], result: tuple[Tensor, Tensor]) -> None:
        labels.append(arguments[1])
        logits.append(result[1])

    for attention in model.label_attention.values():
        attention.register_forward_hook(listen)
    model(torch.randn(1, 3, 64, 64))
    assert len(labels) == 3
    torch.testing.assert_close(labels[1], labels[0] + logits[0])
    torch.testing.assert_close(labels[2], labels[0] + logits[0] + logits[1])
    assert not torch.allclose(labels[1], labels[0])


@pytest.mark.parametrize("size", [1, 5])
def test_the_enhancement_serves_maps_smaller_than_its_dilation(size: int):
    block = FeatureEnhancement(3, 8).eval()
    assert block(torch.randn(2, 3, size, size)).shape == (2, 8, size, size)


# --- word vectors -------------------------------------------------------------------------------------------------


def test_words_without_a_file_are_orthonormal_and_always_the_same():
    words = orthonormal_words()
    torch.testing.assert_close(words @ words.T, torch.eye(len(WORDS)), rtol=0, atol=1e-6)
    assert torch.equal(words, orthonormal_words())
    assert sum(CLASSES.values()) == len(WORDS)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_words_from_a_file_are_stored_with_the_weights(tmp_path: Path, suffix: str):
    vectors = torch.randn(5, 300)
    path = tmp_path / f"words{suffix}"
    if suffix == ".npy":
        np.save(path, vectors.numpy().astype(np.float64))
    else:
        save_file({"words": vectors}, path)
    config = _config(word_vectors=str(path))
    model = _model(config)
    assert torch.equal(model.embed_label.words, vectors)
    assert not model.embed_label.words.requires_grad
    model.experiment = Experiment(model=config)
    model.save_pretrained(tmp_path / "checkpoint")
    path.unlink()
    again = SegmentationModel.from_pretrained(tmp_path / "checkpoint")
    assert torch.equal(again.embed_label.words, vectors)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(images).mask_logits, model(images).mask_logits)


@pytest.mark.parametrize(
    ("arrays", "shapes"),
    [
        ({"words": torch.zeros(5, 100)}, r"\[\(5, 100\)\]"),
        ({"one": torch.zeros(300), "two": torch.zeros(300)}, r"\[\(300,\), \(300,\)\]"),
    ],
    ids=["width", "several"],
)
def test_words_of_another_shape_are_refused(tmp_path: Path, arrays: dict[str, Tensor], shapes: str):
    save_file(arrays, tmp_path / "words.safetensors")
    with pytest.raises(WeightsError, match=f"shapes {shapes}, expected one of") as caught:
        _model(_config(word_vectors=str(tmp_path / "words.safetensors")))
    assert "one, multiple, small, medium, large" in caught.value.hint


@pytest.mark.parametrize("name", ["absent.npy", "absent.safetensors", "text.npy", "objects.npy", "many.npy"])
def test_a_word_file_that_cannot_be_read_is_named(tmp_path: Path, name: str):
    (tmp_path / "text.npy").write_text("one two three")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "many.npz", np.zeros((5, 300)))
    (tmp_path / "many.npz").rename(tmp_path / "many.npy")
    with pytest.raises(WeightsError, match=name):
        _model(_config(word_vectors=str(tmp_path / name)))


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [({"width": 0}, r"model\.options\.width is 0"), ({"wide": 8}, "Unknown field of model.options 'wide'")],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        _model(_config(**options))


def test_guidance_is_refused():
    with pytest.raises(ConfigError, match="'tganet' reads no sentence, but guidance is on"):
        _model(replace(_config(), guidance=True))
