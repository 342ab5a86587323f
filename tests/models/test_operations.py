from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from tmca.models import operations
from tmca.models.operations import (
    DepthwiseConv2d,
    DilatedConv2d,
    SubsampledConv2d,
    attend,
    avoid_faults,
    smooth,
    speed_up_depthwise,
)

SHAPES = [  # kernel, stride, padding, height, width
    ((3, 3), (2, 2), (0, 0), 9, 12),
    ((3, 3), (2, 2), (1, 1), 8, 7),
    ((5, 5), (1, 1), (2, 2), 6, 9),
    ((7, 7), (1, 1), (3, 3), 7, 5),
    ((7, 7), (2, 2), (3, 3), 13, 8),
    ((5, 7), (2, 3), (0, 1), 11, 14),
    ((3, 3), (3, 1), (1, 0), 10, 6),
]


def _pair(kernel: tuple[int, int], bias: bool = True, **fields: tuple[int, int]) -> tuple[nn.Conv2d, nn.Conv2d]:
    """Return a depthwise convolution of PyTorch and the same one sped up."""
    plain = nn.Conv2d(6, 6, kernel, groups=6, bias=bias, **fields)
    fast = copy.deepcopy(plain)
    speed_up_depthwise(fast)
    assert type(fast) is DepthwiseConv2d
    return plain, fast


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kernel", "stride", "padding", "height", "width"), SHAPES)
def test_a_depthwise_convolution_and_its_gradients_are_those_of_pytorch(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    height: int,
    width: int,
    bias: bool,
    channels_last: bool,
):
    torch.manual_seed(0)
    plain, fast = _pair(kernel, bias, stride=stride, padding=padding)
    images = torch.randn(3, 6, height, width, requires_grad=True)
    given = images.contiguous(memory_format=torch.channels_last) if channels_last else images
    expected, output = plain(images), fast(given)
    torch.testing.assert_close(output, expected)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), [images, *plain.parameters()])
    gradients = torch.autograd.grad((output * weight).sum(), [images, *fast.parameters()])
    for gradient, truth in zip(gradients, wanted, strict=True):
        assert gradient.dtype == truth.dtype
        torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kernel", "stride"), [((3, 3), (2, 2)), ((7, 7), (1, 1))])
def test_under_autocast_a_depthwise_convolution_computes_in_bfloat16(kernel: tuple[int, int], stride: tuple[int, int]):
    torch.manual_seed(0)
    plain, fast = _pair(kernel, stride=stride)
    images = torch.randn(3, 6, 17, 17, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = fast(images), plain(images)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected)
    truth = torch.autograd.grad(plain(images).square().sum(), [images, *plain.parameters()])
    gradients = torch.autograd.grad(output.float().square().sum(), [images, *fast.parameters()])
    for gradient, wanted in zip(gradients, truth, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, wanted, rtol=0.05, atol=0.02 * float(wanted.abs().max()))


FAULTY = {
    "dilated": nn.Conv2d(24, 16, 3, padding=2, dilation=2, bias=False),
    "subsampled": nn.Conv2d(8, 16, 1, stride=2),
}
GRADIENTS = """
import copy, sys, torch
from test_operations import FAULTY
from tmca.models.operations import avoid_faults
for name, plain in FAULTY.items():
    mended = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    avoid_faults(mended)
    for half in (False, True):
        for _ in range(20):
            images = torch.randn(4, plain.in_channels, 80, 80).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                found = torch.autograd.grad(mended(images).float().square().sum(), list(mended.parameters()))
            truth = torch.autograd.grad(plain(images.contiguous()).square().sum(), list(plain.parameters()))
            for gradient, wanted in zip(found, truth, strict=True):
                error = float((gradient - wanted).norm() / wanted.norm())
                assert error < (0.02 if half else 1e-4), (name, half, error)
"""


def test_what_onednn_gets_wrong_is_avoided():
    # In a process of its own, because the fault ends it; there, processors with AMX do as if they had none.
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "PYTHONPATH": str(Path(__file__).parent)}
    ended = subprocess.run([sys.executable, "-c", GRADIENTS], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]


@pytest.mark.parametrize(("name", "kind"), [("dilated", DilatedConv2d), ("subsampled", SubsampledConv2d)])
@pytest.mark.parametrize("half", [False, True])
def test_a_mended_convolution_gives_what_it_gave(name: str, kind: type[nn.Conv2d], half: bool):
    plain, mended = FAULTY[name], copy.deepcopy(FAULTY[name])
    avoid_faults(mended)
    assert type(mended) is kind
    images = torch.randn(2, plain.in_channels, 9, 12)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        expected, output = plain(images), mended(images)
        assert output.dtype == expected.dtype
        torch.testing.assert_close(output, expected, rtol=0.016, atol=0.01 if half else 1e-5)
        with torch.inference_mode():
            torch.testing.assert_close(mended(images), expected)


def test_what_has_no_fault_is_left_alone():
    network = nn.Sequential(
        nn.Conv2d(8, 16, 3, stride=2),
        nn.Conv2d(16, 16, 1, stride=2),
        nn.Conv2d(8, 16, 1),
        nn.Conv2d(8, 16, 1, stride=2, padding=1),
    )
    avoid_faults(network)
    assert {type(module) for module in network} == {nn.Conv2d}


def test_what_gains_nothing_is_left_alone():
    network = nn.Sequential(
        nn.Conv2d(6, 6, 7, padding=3),  # not depthwise
        nn.Conv2d(6, 12, 7, groups=6),  # two outputs a channel
        nn.Conv2d(6, 6, 3, groups=6),  # fast already
        nn.Conv2d(6, 6, 7, groups=6, dilation=2),
        nn.Conv2d(6, 6, 7, groups=6, padding="same"),
        nn.Conv2d(6, 6, 7, groups=6, padding_mode="reflect", padding=3),
        nn.Conv2d(6, 6, 5, groups=6, padding=6),  # padded beyond the kernel
    )
    speed_up_depthwise(network)
    assert all(type(module) is nn.Conv2d for module in network)


def test_a_frozen_kernel_gets_no_gradient_and_images_still_do():
    plain, fast = _pair((7, 7))
    fast.requires_grad_(requires_grad=False)
    images = torch.randn(2, 6, 9, 9, requires_grad=True)
    fast(images).sum().backward()
    assert fast.weight.grad is None
    torch.testing.assert_close(images.grad, torch.autograd.grad(plain(images).sum(), images)[0])


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize(("heads", "tokens", "few"), [(1, 3, True), (4, 3, True), (4, 4, False), (1, 16, False)])
def test_attention_is_that_of_the_layer(
    heads: int, tokens: int, few: bool, explicit: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(operations, "EXPLICIT_SCORES", 2 * heads * 18 * tokens if explicit else 0)
    attention = nn.MultiheadAttention(16, heads, batch_first=True)
    for bias in (attention.in_proj_bias, attention.out_proj.bias):
        nn.init.normal_(bias)
    inputs = [torch.randn(2, length, 16, requires_grad=True) for length in (18, tokens, tokens)]
    with mock.patch.object(operations, "_attend_to_few", wraps=operations._attend_to_few) as of_few:
        found = attend(attention, *inputs)
    assert of_few.called == (few and explicit)
    expected, _ = attention(*inputs, need_weights=False)
    torch.testing.assert_close(found, expected)
    wanted = [*inputs, *attention.parameters()]
    gradients = [torch.autograd.grad(output.square().sum(), wanted) for output in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_smoothing_is_average_pooling_of_the_padded_map(side: int):
    maps = torch.randn(2, 3, 7, 5)
    padded = nn.functional.pad(maps, (side - 1, 0, side - 1, 0))
    torch.testing.assert_close(smooth(maps, side), nn.functional.avg_pool2d(padded, side, stride=1))
