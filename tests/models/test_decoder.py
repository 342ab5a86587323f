from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.blocks import SubpixelUpsample, UnetrUpBlock
from torch import Tensor, nn

from tmca.models.decoder import (
    GuidedDecoderStage,
    LanguageGuide,
    SubpixelHead,
    TextSummary,
    UpsampleBlock,
    image_positions,
    sinusoidal_positions,
)
from tmca.types import TextFeatures

CHANNELS, TEXT_DIM, TOKENS = 8, 6, 5


def _guide(**fields: Any) -> LanguageGuide:
    options = {"max_tokens": TOKENS, "summary_tokens": 3, "attention_heads": 2, "gate": 1.421} | fields
    return LanguageGuide(CHANNELS, TEXT_DIM, **options).eval()


def _text(*counts: int) -> TextFeatures:
    mask = torch.arange(TOKENS)[None] < torch.tensor(counts)[:, None]
    words = torch.randn(len(counts), TOKENS, TEXT_DIM) * mask[:, :, None]
    return TextFeatures(words, mask, words.mean(dim=1))


# --- positions ----------------------------------------------------------------------------------------------------


def test_sinusoidal_positions_by_hand():
    encoding = sinusoidal_positions(3, 4)
    expected = [[math.sin(p), math.cos(p), math.sin(p / 100), math.cos(p / 100)] for p in range(3)]
    torch.testing.assert_close(encoding, torch.tensor(expected))


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([8, 16, 96]))
def test_every_cell_of_a_grid_has_its_own_encoding(rows: int, cols: int, dim: int):
    encoding = image_positions(rows, cols, dim)
    assert encoding.shape == (rows * cols, dim)
    assert encoding.abs().max() <= 1
    apart = torch.cdist(encoding, encoding, compute_mode="donot_use_mm_for_euclid_dist")
    assert (apart + torch.eye(rows * cols)).min() > 1e-3


def test_half_of_the_encoding_tells_the_row_and_half_the_column():
    grid = image_positions(3, 5, 8).reshape(3, 5, 8)
    assert torch.equal(grid[:, :, :4], grid[:, :1, :4].expand(-1, 5, -1))
    assert torch.equal(grid[:, :, 4:], grid[:1, :, 4:].expand(3, -1, -1))
    assert torch.equal(grid[2, 0, :4], grid[0, 2, 4:])


def test_flat_positions_number_the_cells_row_by_row_or_column_by_column():
    numbered = sinusoidal_positions(6, 8)
    assert torch.equal(image_positions(2, 3, 8, "flat"), numbered)
    by_column = image_positions(2, 3, 8, "flat_columns")
    assert torch.equal(by_column, numbered[[0, 2, 4, 1, 3, 5]])


@torch.no_grad()
@pytest.mark.parametrize("positions", ["grid", "flat", "flat_columns"])
def test_a_guide_adds_the_positions_it_was_told(positions: str):
    features, words = torch.randn(1, CHANNELS, 3, 4), _text(5).word_features
    guide = _guide(positions=positions)
    expected = {form: _guided(guide, features, words, form) for form in ("grid", "flat", "flat_columns")}
    torch.testing.assert_close(guide(features, words), expected.pop(positions), rtol=1e-4, atol=1e-5)
    assert all(not torch.allclose(guide(features, words), other, atol=1e-4) for other in expected.values())


# --- guidance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(1, 1), (7, 7), (3, 10)], ids=str)
def test_a_guide_serves_any_grid(grid: tuple[int, int]):
    features = torch.randn(2, CHANNELS, *grid)
    assert _guide()(features, _text(5, 2).word_features).shape == features.shape


@torch.no_grad()
def test_the_words_reach_the_image_through_the_gate():
    features = torch.randn(2, CHANNELS, 3, 4)
    first, second = _text(5, 2).word_features, _text(5, 2).word_features
    guide, closed = _guide(), _guide(gate=0.0)
    assert guide.gate == pytest.approx(1.421)
    assert not torch.allclose(guide(features, first), guide(features, second))
    assert torch.equal(closed(features, first), closed(features, second))


def _attend(attention: nn.MultiheadAttention, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return softmax(Q K / sqrt(d)) V of every head, written out."""
    weights, offsets = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    projected = [
        nn.functional.linear(part, weight, offset).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        for part, weight, offset in zip((queries, keys, values), weights, offsets, strict=True)
    ]
    scores = projected[0] @ projected[1].mT / projected[0].shape[-1] ** 0.5
    return attention.out_proj((scores.softmax(dim=-1) @ projected[2]).transpose(1, 2).flatten(2))


def _guided(guide: LanguageGuide, features: Tensor, words: Tensor, form: str = "grid") -> Tensor:
    """Return what a guide makes of features, written out."""
    sequence, positions = features.flatten(2).mT, image_positions(*features.shape[2:], CHANNELS, form)
    normed = guide.self_attention_norm(sequence)
    attended = _attend(guide.self_attention, normed + positions, normed + positions, normed)
    sequence = sequence + guide.self_attention_output_norm(attended)
    summary = guide.text_summary(words)
    keys = summary + sinusoidal_positions(3, CHANNELS)
    attended = _attend(guide.cross_attention, guide.cross_attention_norm(sequence) + positions, keys, summary)
    sequence = sequence + guide.gate * guide.cross_attention_output_norm(attended)
    return sequence.mT.unflatten(2, features.shape[2:])


@torch.no_grad()
def test_positions_join_queries_and_keys_but_not_values():
    guide = _guide()
    for parameter in guide.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    features, words = torch.randn(2, CHANNELS, 3, 4), _text(5, 2).word_features
    torch.testing.assert_close(guide(features, words), _guided(guide, features, words), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_every_word_counts():
    features = torch.randn(1, CHANNELS, 3, 4)
    words = _text(TOKENS).word_features
    guide = _guide()
    before = guide(features, words)
    for token in range(TOKENS):
        changed = words.clone()
        changed[:, token] += 1
        assert not torch.allclose(guide(features, changed), before)


@torch.no_grad()
def test_zeroed_padding_adds_nothing_to_the_summary():
    summary = TextSummary(TOKENS, 3, TEXT_DIM, CHANNELS)
    words = _text(2).word_features
    before = summary(words)
    assert before.shape == (1, 3, CHANNELS)
    summary.mix.weight[:, 2:] = torch.randn(3, TOKENS - 2, 1)
    assert torch.equal(summary(words), before)


@torch.no_grad()
def test_the_place_of_a_feature_matters():
    # Attention alone treats positions as a set; the encoding is what tells left from right.
    features = torch.randn(1, CHANNELS, 3, 4)
    words = _text(TOKENS).word_features
    guide = _guide()
    assert not torch.allclose(guide(features.flip(3), words).flip(3), guide(features, words), atol=1e-4)


@torch.no_grad()
def test_an_image_without_a_sentence_skips_the_guidance():
    stage = GuidedDecoderStage(_guide(), UpsampleBlock(CHANNELS, 4, 6)).eval()
    features, skip = torch.randn(2, CHANNELS, 3, 4), stage.upsample.encode_skip(torch.randn(2, 4, 6, 8))
    text = _text(3, 0)
    decoded = stage(features, skip, text)
    assert torch.equal(decoded[1], stage.upsample(features, skip)[1])
    assert not torch.allclose(decoded[0], stage.upsample(features, skip)[0])
    assert torch.equal(stage(features, skip, None), stage.upsample(features, skip))
    blind = GuidedDecoderStage(None, stage.upsample)
    assert torch.equal(blind(features, skip, text), stage.upsample(features, skip))


# --- upsampling ---------------------------------------------------------------------------------------------------


def _copy_from_monai(block: UpsampleBlock, reference: UnetrUpBlock) -> None:
    parts = reference.conv_block
    block.upsample.load_state_dict(reference.transp_conv.conv.state_dict())
    for index, (convolution, norm) in enumerate([(parts.conv1, parts.norm1), (parts.conv2, parts.norm2)]):
        block.refine[index][0].load_state_dict(convolution.conv.state_dict())
        block.refine[index][1].load_state_dict(norm.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_upsampling_equals_monai(training: bool):
    reference = UnetrUpBlock(2, 8, 6, kernel_size=3, upsample_kernel_size=2, norm_name="BATCH").train(training)
    with torch.no_grad():
        for value in reference.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) - 0.3 * (value.ndim > 1))
    block = UpsampleBlock(8, 6, 6).train(training)
    _copy_from_monai(block, reference)
    features, skip = torch.randn(2, 8, 3, 5), torch.randn(2, 6, 6, 10)
    torch.testing.assert_close(block(features, block.encode_skip(skip)), reference(features, skip))
    for name, expected in reference.conv_block.norm1.named_buffers():
        torch.testing.assert_close(block.refine[0][1].get_buffer(name), expected, msg=name)


def test_the_skip_may_have_another_width():
    block = UpsampleBlock(8, 3, 5)
    skip = block.encode_skip(torch.randn(2, 3, 6, 10))
    assert block(torch.randn(2, 8, 3, 5), skip).shape == (2, 5, 6, 10)


# --- head ---------------------------------------------------------------------------------------------------------


def _naive(head: SubpixelHead, features: Tensor) -> Tensor:
    shuffled = nn.functional.pixel_shuffle(head.expand(features), 4)
    smoothed = nn.functional.avg_pool2d(nn.functional.pad(shuffled, (3, 0, 3, 0)), 4, stride=1)
    return head.classify(smoothed)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (16, 16)], ids=str)
def test_the_head_equals_its_four_steps(size: tuple[int, int]):
    head = SubpixelHead(6, 4)
    features = torch.randn(2, 6, *size, requires_grad=True)
    logits, expected = head(features), _naive(head, features)
    assert logits.shape == (2, 1, 4 * size[0], 4 * size[1])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(logits)
    inputs = [features, *head.parameters()]
    gradients = torch.autograd.grad((logits * weight).sum(), inputs)
    for gradient, wanted in zip(gradients, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_head_equals_monai():
    head = SubpixelHead(6, 4)
    upsample = SubpixelUpsample(spatial_dims=2, in_channels=6, out_channels=4, scale_factor=4)
    classify = nn.Conv2d(4, 1, kernel_size=1)
    upsample.conv_block.load_state_dict(head.expand.state_dict())
    classify.load_state_dict(head.classify.state_dict())
    features = torch.randn(2, 6, 5, 7)
    torch.testing.assert_close(head(features), classify(upsample(features)), rtol=1e-5, atol=1e-5)
