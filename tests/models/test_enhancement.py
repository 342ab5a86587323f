from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tmca.models.enhancement import TargetEnhancement, target_attention

EVERYONE = torch.ones(2, dtype=torch.bool)


def _features(rows: int = 3, cols: int = 4, channels: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(2, channels, rows, cols), torch.randn(2, channels)


@given(
    st.integers(0, 2**32),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([0.01, 0.2, 1.0, 10.0]),
    st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_the_attention_has_mean_one(seed: int, rows: int, cols: int, temperature: float, scale: float):
    torch.manual_seed(seed)
    features, text = _features(rows, cols)
    attention = target_attention(features * scale, text, temperature)
    assert attention.shape == (2, 1, rows, cols)
    assert (attention >= 0).all()
    torch.testing.assert_close(attention.mean(dim=(1, 2, 3)), torch.ones(2), rtol=1e-4, atol=1e-4)


def test_the_attention_by_hand():
    # Cosines 1 and 0 with the sentence, whatever the lengths of the vectors.
    features = torch.tensor([[3.0, 0.0], [0.0, 0.5]]).reshape(1, 2, 1, 2)
    attention = target_attention(features, torch.tensor([[7.0, 0.0]]), temperature=0.5)
    expected = 2 / (1 + math.exp(-1 / 0.5))
    torch.testing.assert_close(attention.flatten(), torch.tensor([expected, 2 - expected]))


def test_the_attention_is_identity_where_all_positions_are_alike():
    direction = torch.randn(2, 5)
    lengths = torch.rand(2, 1, 3, 4) + 0.1
    attention = target_attention(direction[:, :, None, None] * lengths, torch.randn(2, 5), temperature=0.01)
    torch.testing.assert_close(attention, torch.ones(2, 1, 3, 4), rtol=0, atol=1e-4)


def test_a_position_without_signal_is_finite():
    features = torch.zeros(2, 5, 3, 4, requires_grad=True)
    text = torch.zeros(2, 5, requires_grad=True)
    attention = target_attention(features, text, temperature=0.2)
    assert torch.equal(attention, torch.ones(2, 1, 3, 4))
    attention.square().sum().backward()
    assert features.grad.isfinite().all()
    assert text.grad.isfinite().all()


def test_a_smaller_temperature_is_sharper():
    features, text = _features()
    peaks = [float(target_attention(features, text, temperature).amax()) for temperature in (1.0, 0.2, 0.05)]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[-1]


def test_autocast_does_not_reach_the_attention():
    features, text = _features()
    expected = target_attention(features.bfloat16(), text.bfloat16(), 0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention = target_attention(features.bfloat16(), text.bfloat16(), 0.2)
        exact = target_attention(features, text, 0.2)
    assert attention.dtype == torch.float32
    assert torch.equal(attention, expected)
    assert torch.equal(exact, target_attention(features, text, 0.2))


def test_multiply_is_the_product_with_the_upsampled_attention():
    features, text = _features()
    decoded = torch.randn(2, 6, 6, 8)
    enhanced = TargetEnhancement("multiply", 0.2)(decoded, features, text, EVERYONE)
    gain = torch.nn.functional.interpolate(target_attention(features, text, 0.2), scale_factor=2, mode="bilinear")
    torch.testing.assert_close(enhanced, decoded * gain)
    assert not torch.allclose(enhanced, decoded)
    assert list(TargetEnhancement("multiply", 0.2).parameters()) == []


def test_gated_starts_as_identity_and_can_open():
    features, text = _features()
    decoded = torch.randn(2, 6, 6, 8)
    gated, multiply = TargetEnhancement("gated", 0.2), TargetEnhancement("multiply", 0.2)
    assert torch.equal(gated(decoded, features, text, EVERYONE), decoded)
    gated(decoded, features, text, EVERYONE).square().sum().backward()
    assert gated.gate.grad != 0
    with torch.no_grad():
        gated.gate.fill_(1)
    expected = multiply(decoded, features, text, EVERYONE)
    torch.testing.assert_close(gated(decoded, features, text, EVERYONE), expected)
    with torch.no_grad():
        gated.gate.fill_(0.5)
    torch.testing.assert_close(gated(decoded, features, text, EVERYONE), (decoded + expected) / 2)


@pytest.mark.parametrize("mode", ["multiply", "gated"])
def test_an_image_without_a_sentence_passes_unchanged(mode: str):
    features, text = _features()
    decoded = torch.randn(2, 6, 6, 8)
    enhancement = TargetEnhancement(mode, 0.2)
    with torch.no_grad():
        for parameter in enhancement.parameters():
            parameter.fill_(0.7)
    enhanced = enhancement(decoded, features, text, torch.tensor([True, False]))
    assert not torch.allclose(enhanced[0], decoded[0])
    assert torch.equal(enhanced[1], decoded[1])


def test_the_type_of_the_decoded_features_is_kept():
    features, text = _features()
    decoded = torch.randn(2, 6, 6, 8).bfloat16()
    assert TargetEnhancement("multiply", 0.2)(decoded, features, text, EVERYONE).dtype == torch.bfloat16
