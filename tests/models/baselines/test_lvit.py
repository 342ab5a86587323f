from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tmca.config import ModelConfig, TextEncoderConfig
from tmca.errors import ConfigError
from tmca.models import build_model
from tmca.models.baselines.lvit import (
    LViT,
    LViTOptions,
    PatchEmbedding,
    PixelAttention,
    SentenceTokens,
    TransformerBlock,
    UpTransformer,
)
from tmca.presets import NO_ALIGNMENT, NO_ENHANCEMENT
from tmca.types import TextFeatures

SENTENCES = (
    "one small bright round lesion, located in upper left of the image",
    "two large dark lesions, located in centre, lower right of the image",
)
FIRST, SECOND = SENTENCES
TINY = LViTOptions(width=4, grid=4, attention_heads=2, dropout=0.0)
TEXT_DIM, TOKENS = 6, 5


def _config(*, max_tokens: int = 24, guidance: bool = True, **options: Any) -> ModelConfig:
    text_encoder = TextEncoderConfig(
        weights="scratch", freeze=False, hidden_size=8, layers=3, attention_heads=2, dropout=0.0, max_tokens=max_tokens
    )
    return ModelConfig(
        method="lvit",
        guidance=guidance,
        text_encoder=text_encoder,
        alignment=NO_ALIGNMENT,
        enhancement=NO_ENHANCEMENT,
        options=dataclasses.asdict(TINY) | options,
    )


def _model(**fields: Any) -> LViT:
    torch.manual_seed(0)
    return build_model(_config(**fields), SENTENCES)


def _images(batch: int = 1, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def _text(*counts: int) -> TextFeatures:
    """Return features of sentences of so many words."""
    mask = torch.arange(TOKENS)[None] < torch.tensor(counts)[:, None]
    words = torch.randn(len(counts), TOKENS, TEXT_DIM) * mask[:, :, None]
    return TextFeatures(words, mask, words.mean(dim=1))


# --- the whole ----------------------------------------------------------------------------------------------------


def test_parameters_at_the_published_width():
    text_encoder = TextEncoderConfig(
        weights="scratch", freeze=False, hidden_size=768, attention_heads=12, layers=3, max_tokens=10
    )
    config = dataclasses.replace(_config(), text_encoder=text_encoder, options={})
    with torch.device("meta"):
        model = build_model(config, SENTENCES)
    counts = Counter()
    for name, parameter in model.named_parameters():
        counts[name.partition(".")[0]] += parameter.numel()
    del counts["text_encoder"]
    normalised = (
        layer.out_channels
        for part in (model.encoder, model.sentence, model.down_transformers, model.up_transformers, model.decoder)
        for name, layer in part.named_modules()
        if isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.bias is None and not name.endswith("projection")
    )
    assert counts.total() == 29_902_077
    # The published class, whose convolutions have biases in front of BatchNorm: 29.91 million get a gradient.
    assert counts.total() + sum(normalised) == 29_908_033


@torch.no_grad()
def test_the_image_is_encoded_at_five_strides_without_the_sentence():
    features = _model().eval().encode_image(_images(2, 33, 50))
    assert features.size == (33, 50)
    assert {stride: tuple(maps.shape[1:]) for stride, maps in features.feature_maps.items()} == {
        1: (4, 48, 64),
        2: (8, 24, 32),
        4: (16, 12, 16),
        8: (32, 6, 8),
        16: (32, 3, 4),
    }


@pytest.mark.parametrize("max_tokens", [10, 24])
@torch.no_grad()
def test_the_sentence_changes_the_logits(max_tokens: int):
    model = _model(max_tokens=max_tokens).eval()
    assert model.sentence.spread[0].in_channels == max_tokens
    image = model.encode_image(_images())
    first, second, without = (
        model.segment(image, model.encode_text([text])).mask_logits for text in (FIRST, SECOND, None)
    )
    assert (first - second).abs().max() > 1e-4
    assert (first - without).abs().max() > 1e-4


@torch.no_grad()
def test_ten_tokens_cut_the_place_from_the_sentence():
    short, long = (_model(max_tokens=count).eval() for count in (10, 24))
    other = FIRST.replace("upper left of the", "lower right of an")
    for model, equal in ((short, True), (long, False)):
        image = model.encode_image(_images())
        logits = [model.segment(image, model.encode_text([text])).mask_logits for text in (FIRST, other)]
        assert torch.equal(*logits) == equal


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (20, 130), (112, 80)], ids="{0[0]}x{0[1]}".format)
@torch.no_grad()
def test_images_of_any_size(size: tuple[int, int]):
    model = _model().eval()
    for transformer in model.down_transformers:
        nn.init.normal_(transformer.embedding.positions)
    image = model.encode_image(_images(1, *size))
    first, second = (model.segment(image, model.encode_text([text])).mask_logits for text in SENTENCES)
    assert first.shape == (1, 1, *size)
    assert first.isfinite().all()
    assert not torch.allclose(first, second)


@torch.no_grad()
def test_without_guidance_it_is_the_same_network_without_a_sentence():
    guided, unguided = _model().eval(), _model(guidance=False).eval()
    assert not unguided.reads_text
    assert unguided.sentence is None
    unguided.load_state_dict({name: value for name, value in guided.state_dict().items() if name in _names(unguided)})
    assert _names(guided) - _names(unguided) == {
        name for name in _names(guided) if name.startswith(("sentence", "text"))
    }
    assert torch.equal(unguided(_images()).mask_logits, guided(_images()).mask_logits)


def _names(model: nn.Module) -> set[str]:
    return set(model.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 10, "attention_heads": 4}, "multiple"),
        ({"width": 0}, "1 or more"),
        ({"grid": 0}, "1 or more"),
        ({"attention_heads": 0}, "1 or more"),
        ({"dropout": 1.0}, "share"),
        ({"dropout": -0.1}, "share"),
        ({"widths": 8}, "width"),
        ({"width": 8.5}, "int"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        _model(**options)
    assert "model.options" in caught.value.message
    assert caught.value.hint


# --- the sentence -------------------------------------------------------------------------------------------------


def test_images_without_a_sentence_get_exactly_nothing_and_do_not_change_the_others():
    sentence, text = SentenceTokens(TEXT_DIM, TOKENS, TINY).eval(), _text(4, 0, 2, 0)
    tokens = sentence(text, (4, 4))
    assert tokens.shape == (4, 16, 4)
    assert not tokens[1::2].any()
    present = TextFeatures(text.word_features[::2], text.attention_mask[::2], text.sentence_embedding[::2])
    torch.testing.assert_close(tokens[::2], sentence(present, (4, 4)))
    assert tokens[::2].any(dim=2).any(dim=1).all()


def test_statistics_are_those_of_sentences_only():
    text = _text(4, 0, 2, 0)
    present = TextFeatures(text.word_features[::2], text.attention_mask[::2], text.sentence_embedding[::2])
    mixed, pure = SentenceTokens(TEXT_DIM, TOKENS, TINY), SentenceTokens(TEXT_DIM, TOKENS, TINY)
    pure.load_state_dict(mixed.state_dict())
    torch.testing.assert_close(mixed(text, (4, 4))[::2], pure(present, (4, 4)))
    torch.testing.assert_close(mixed.spread[1].running_mean, pure.spread[1].running_mean)
    torch.testing.assert_close(mixed.spread[1].running_var, pure.spread[1].running_var)
    assert mixed.spread[1].running_mean.any()


def test_on_another_grid_the_tokens_are_interpolated():
    sentence, text = SentenceTokens(TEXT_DIM, TOKENS, TINY).eval(), _text(3, 5)
    learned = sentence(text, (4, 4)).transpose(1, 2).reshape(2, 4, 4, 4)
    doubled = sentence(text, (8, 4)).transpose(1, 2).reshape(2, 4, 8, 4)
    torch.testing.assert_close(doubled[:, :, ::7], learned[:, :, ::3])  # the outermost rows are repeated
    torch.testing.assert_close(doubled[:, :, 1], 0.75 * learned[:, :, 0] + 0.25 * learned[:, :, 1])


def test_positions_start_at_zero_and_are_interpolated_on_another_grid():
    embedding = PatchEmbedding(4, 2, TINY)
    features = torch.randn(1, 4, 12, 10)
    patches = embedding.project(features).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embedding(features), patches)
    with torch.no_grad():
        embedding.positions.copy_(torch.arange(4.0).view(1, 1, 4, 1))
    added = (embedding(features) - patches).reshape(6, 5, 4)
    rows = (torch.arange(6) + 0.5) * 4 / 6 - 0.5
    torch.testing.assert_close(added, rows.clamp(0, 3).view(6, 1, 1).expand(6, 5, 4), rtol=0, atol=1e-5)


# --- the blocks ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_pixel_attention_by_hand():
    attention = PixelAttention(2)
    attention.mean_projection.weight.copy_(torch.eye(2)[..., None, None])
    attention.maximum_projection.weight.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0]])[..., None, None])
    first, second = attention.weigh[0], attention.weigh[2]
    first.weight.zero_()
    first.weight[:3, :, 0, 0] = torch.eye(3)
    first.bias.zero_()
    second.weight.copy_(torch.tensor([1.0, 10.0, -100.0, 0.0, 0.0, 0.0]).view(1, 6, 1, 1))
    second.bias.fill_(0.5)
    # Pixel (3, -1): the mean of (3, 0) is 1.5, the maximum of (0, 6) is 6, their sum 7.5.
    # Pixel (-2, 4): the mean of (0, 4) is 2, the maximum of (4, 0) is 4, their sum 6.
    features = torch.tensor([[3.0, -2.0], [-1.0, 4.0]]).view(1, 2, 1, 2)
    weights = torch.tensor([1.5 + 60 - 750 + 0.5, 2 + 40 - 600 + 0.5])
    torch.testing.assert_close(attention(features), weights * features)


@torch.no_grad()
def test_the_mlp_has_a_gelu_after_its_second_layer():
    block = TransformerBlock(4, TINY)
    for layer in (block.attention.out_proj, block.mlp[3]):
        layer.weight.zero_()
    block.attention.out_proj.bias.zero_()
    block.mlp[3].bias.copy_(torch.tensor([-1.0, 0.0, 1.0, 30.0]))
    tokens = torch.randn(2, 3, 4)
    expected = tokens + torch.tensor([-0.158655, 0.0, 0.841345, 30.0])
    torch.testing.assert_close(block(tokens), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_map_of_a_level_repeats_each_token_over_its_patch():
    transformer = UpTransformer(4, 2, TINY, last=True).eval()
    tokens, features = transformer(torch.randn(1, 6, 4), None, (2, 3))
    assert features.shape == (1, 4, 4, 6)
    convolution, normalise, *_ = transformer.reconstruct
    enlarged = tokens.transpose(1, 2).reshape(1, 4, 2, 3).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(features, normalise(convolution(enlarged)).relu())
