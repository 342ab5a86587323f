from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tmca.config import Experiment, ImageEncoderConfig, ModelConfig, TextEncoderConfig
from tmca.errors import ConfigError, WeightsError
from tmca.models import build_model
from tmca.models.base import SegmentationModel
from tmca.models.baselines.cpam import CPAM, CPAMOptions, CrossPositionAttention, VGGEncoder, load_vgg
from tmca.presets import NO_ALIGNMENT, NO_ENHANCEMENT

SENTENCES = ("one small lesion in upper left", "two large lesions in lower right")
CONVOLUTIONS = (0, 3, 7, 10, 14, 17, 20, 24, 27, 30)
"""Places of the convolutions of the first four stages in the layers of torchvision's vgg16_bn."""
CHANNELS, TEXT_DIM = 8, 6


def _config(*, guidance: bool = True, weights: str = "none", **options: Any) -> ModelConfig:
    return ModelConfig(
        method="cpam",
        guidance=guidance,
        image_encoder=ImageEncoderConfig(weights=weights),
        text_encoder=TextEncoderConfig(
            weights="scratch", freeze=False, hidden_size=16, layers=3, attention_heads=2, dropout=0.0
        ),
        alignment=NO_ALIGNMENT,
        enhancement=NO_ENHANCEMENT,
        options={"width": 4, "grid": 4} | options,
    )


def _model(config: ModelConfig | None = None, **options: Any) -> CPAM:
    return build_model(config or _config(**options), SENTENCES).eval()


def _attention(**options: Any) -> CrossPositionAttention:
    return CrossPositionAttention(CHANNELS, TEXT_DIM, CPAMOptions(grid=4, gate=0.5, **options))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- the whole ----------------------------------------------------------------------------------------------------


def test_the_size_is_that_of_the_description():
    with torch.device("meta"):
        model = CPAM(VGGEncoder(64), None, CrossPositionAttention(512, 512, CPAMOptions()), 64)
    counts = {name: _count(part) for name, part in model.named_children()}
    assert counts == {"image_encoder": 7_637_952, "attention": 1_380_613, "decoder": 3_983_360, "head": 65}


@torch.no_grad()
def test_a_blank_sentence_skips_the_attention_exactly():
    model = _model()
    images = torch.randn(2, 3, 64, 64)
    without = model(images).mask_logits
    mixed = model(images, model.text_encoder.tokenizer([SENTENCES[0], None]))
    assert mixed.present.tolist() == [True, False]
    assert torch.equal(mixed.mask_logits[1], without[1])
    assert not torch.allclose(mixed.mask_logits[0], without[0])


@torch.no_grad()
@pytest.mark.parametrize("value_from", ["text", "image"])
def test_the_sentence_changes_the_logits(value_from: str):
    model = _model(value_from=value_from, gate=1.0)
    image = model.encode_image(torch.randn(1, 3, 64, 64))
    first, second = (model.segment(image, model.encode_text([text])).mask_logits for text in SENTENCES)
    assert (first - second).abs().max() > 1e-4


def test_without_guidance_there_is_neither_text_nor_attention():
    model = _model(guidance=False)
    assert not model.reads_text
    assert {name for name, _ in model.named_children()} == {"image_encoder", "decoder", "head"}
    assert {name for name, _ in _model().named_children()} == {
        "text_encoder",
        "image_encoder",
        "attention",
        "decoder",
        "head",
    }
    assert not model(torch.randn(1, 3, 20, 30)).present.any()


def test_the_sentence_embedding_may_be_wider_or_narrower_than_the_words():
    clip = {
        "model_type": "clip_text_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "projection_dim": 10,
    }
    text_encoder = TextEncoderConfig(weights="not/here", word_layers=1, sentence_pooling="last")
    tokenizer = _model().text_encoder.tokenizer
    config = replace(_config(), text_encoder=text_encoder)
    model = build_model(config, tokenizer=tokenizer, text_architecture=clip, load_weights=False).eval()
    assert model.attention.project_text[0].in_features == 10
    assert model(torch.randn(1, 3, 32, 32), tokenizer(SENTENCES[:1])).present.all()


@torch.no_grad()
def test_a_checkpoint_needs_no_pretrained_folder(tmp_path: Path):
    folder = tmp_path / "vgg"
    folder.mkdir()
    save_file(_torchvision_layout(4).state_dict(), folder / "model.safetensors")
    config = _config(weights=str(folder))
    model = _model(config)
    model.experiment = Experiment(model=config)
    model.save_pretrained(tmp_path / "checkpoint")
    (folder / "model.safetensors").unlink()
    again = SegmentationModel.from_pretrained(tmp_path / "checkpoint")
    images = torch.randn(1, 3, 32, 32)
    tokens = model.text_encoder.tokenizer(SENTENCES[:1])
    assert torch.equal(again(images, tokens).mask_logits, model(images, tokens).mask_logits)
    assert set(model.pretrained_parameters()) == set(model.image_encoder.parameters())


# --- the block ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("value_from", ["text", "image"])
def test_attention_written_out(value_from: str):
    attention = _attention(value_from=value_from)
    features, sentence = torch.randn(2, CHANNELS, 4, 4), torch.randn(2, TEXT_DIM)
    vector = attention.project_text(sentence)
    text_map = torch.einsum("bc,n->bcn", vector, attention.spread.flatten())
    image = features.flatten(2)

    def apply(layer: nn.Conv2d, positions: Tensor) -> Tensor:
        mixed = torch.einsum("oc,bcn->bon", layer.weight[:, :, 0, 0], positions)
        return mixed if layer.bias is None else mixed + layer.bias[:, None]

    scores = torch.einsum("bcn,bcm->bnm", apply(attention.query, image), apply(attention.key, text_map)).softmax(dim=2)
    values = apply(attention.value, text_map if value_from == "text" else image)
    expected = image + 0.5 * torch.einsum("bnm,bcm->bcn", scores, values)
    torch.testing.assert_close(attention(features, sentence), expected.view_as(features), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_equal_keys_read_the_mean_of_the_image():
    attention = _attention(value_from="image")
    attention.spread.fill_(1.0)
    features = torch.randn(1, CHANNELS, 4, 4)
    mean = attention.value(features).mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(attention(features, torch.randn(1, TEXT_DIM)), features + 0.5 * mean)


def test_a_closed_gate_changes_nothing():
    attention = CrossPositionAttention(CHANNELS, TEXT_DIM, CPAMOptions(grid=4, gate=0.0))
    features = torch.randn(2, CHANNELS, 4, 4)
    assert torch.equal(attention(features, torch.randn(2, TEXT_DIM)), features)


@torch.no_grad()
def test_the_learned_map_is_interpolated_for_other_grids():
    attention = _attention()
    attention.spread.copy_(torch.arange(4.0).expand(4, 4))
    seen = []
    attention.key.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    sentence = torch.randn(1, TEXT_DIM)
    for size in ((4, 4), (2, 8), (1, 2)):
        attention(torch.randn(1, CHANNELS, *size), sentence)
    vector = attention.project_text(sentence)[0]
    for text_map, columns in zip(
        seen, ([0, 1, 2, 3], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3], [0.5, 2.5]), strict=True
    ):
        expected = vector[:, None, None] * torch.tensor(columns).float().expand(text_map.shape[2:])
        torch.testing.assert_close(text_map[0], expected)


# --- pretrained weights -------------------------------------------------------------------------------------------


def _torchvision_layout(width: int) -> nn.Module:
    """Return a VGG16 as torchvision numbers its layers: convolutions with biases, and a stage more than is used."""
    layers: list[nn.Module] = []
    channels = 3
    for stage, count in enumerate((2, 2, 3, 3, 3)):
        for _ in range(count):
            out_channels = width * 2 ** min(stage, 3)
            layers += [nn.Conv2d(channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()]
            channels = out_channels
        layers.append(nn.MaxPool2d(2))
    network = nn.Module()
    network.features = nn.Sequential(*layers)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point():
                value.add_(torch.randn_like(value), alpha=0.2)
    return network.eval()


@torch.no_grad()
def test_features_equal_those_of_the_layers_of_torchvision(tmp_path: Path):
    original = _torchvision_layout(4)
    assert all(isinstance(original.features[index], nn.Conv2d) for index in CONVOLUTIONS)
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    torch.save(original.state_dict(), tmp_path / "vgg16_bn.pth")
    images = torch.randn(2, 3, 32, 48)
    for name in (tmp_path, tmp_path / "model.safetensors", tmp_path / "vgg16_bn.pth"):
        encoder = VGGEncoder(4)
        load_vgg(encoder, str(name))
        maps = encoder.eval()(images)
        for stride, layers in {1: 6, 2: 13, 4: 23, 8: 33, 16: 34}.items():
            torch.testing.assert_close(maps[stride], original.features[:layers](images), rtol=1e-4, atol=1e-5)


def test_the_encoder_of_a_model_is_pretrained(tmp_path: Path):
    original = _torchvision_layout(4)
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    model = _model(weights=str(tmp_path))
    for index in CONVOLUTIONS:
        assert torch.equal(model.image_encoder.features[index].weight, original.features[index].weight)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: _torchvision_layout(6).state_dict(), r"0 tensors missing, \d+ of another shape, first 'features\.0"),
        (lambda: {"features.0.weight": torch.zeros(4, 3, 3, 3)}, r"\d+ tensors missing, 0 of another shape, first"),
        (lambda: {"layer.running_mean": torch.zeros(4)}, "tensors missing"),
    ],
    ids=["width", "cut", "another network"],
)
def test_weights_that_do_not_fit(tmp_path: Path, state: Any, message: str):
    save_file(state(), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=message) as caught:
        _model(weights=str(tmp_path))
    assert "vgg16_bn" in caught.value.hint


def test_weights_that_are_not_there():
    with pytest.raises(WeightsError, match=r"No model folder '\./nowhere'"):
        _model(weights="./nowhere")


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, r"model\.options\.width is 0"),
        ({"grid": 0}, r"model\.options\.grid is 0"),
        ({"value_from": "audio"}, r"Unknown model\.options\.value_from 'audio'; known: image, text"),
        ({"gat": 1.0}, r"Unknown field of model\.options 'gat'"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        _model(**options)
