"""What do the operations of ``tmca.models.operations`` gain over PyTorch's own, forward and backward?

Shapes are those of a training step: ConvNeXt-Tiny at 224 pixels in batches of 8, MobileNetV2 at 160 pixels in batches
of 32, in bfloat16 where the CPU computes it. Before it is timed, each is compared with PyTorch's result.

    python benchmarks/operations.py [--rounds 9]

Prints a table and writes ``benchmarks/results/operations.json``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from measuring import interleaved, medians, ratios, report
from torch import Tensor, nn

from tmca.devices import keep_freed_memory, uses_bfloat16
from tmca.models.operations import attend, smooth, speed_up_depthwise

HALF = uses_bfloat16("auto", torch.device("cpu"))
CONVOLUTIONS = {  # batch, channels, size, kernel, stride, padding
    "ConvNeXt, stride 4": (8, 96, 56, 7, 1, 3),
    "ConvNeXt, stride 8": (8, 192, 28, 7, 1, 3),
    "ConvNeXt, stride 16": (8, 384, 14, 7, 1, 3),
    "ConvNeXt, stride 32": (8, 768, 7, 7, 1, 3),
    "MobileNetV2, stride 2 to 4": (32, 96, 81, 3, 2, 0),
    "MobileNetV2, stride 4 to 8": (32, 144, 41, 3, 2, 0),
    "MobileNetV2, stride 16 to 32": (32, 576, 11, 3, 2, 0),
}
ATTENTIONS = {  # batch, queries, keys, channels, heads
    "image to itself, 28 × 28": (8, 784, 784, 192, 1),
    "image to 9 tokens, 28 × 28": (8, 784, 9, 192, 4),
    "image to 9 tokens, 20 × 20": (32, 400, 9, 64, 4),
}


def step(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """Return a forward and backward pass."""
    weight = torch.randn_like(function(*inputs))

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=HALF):
            output = function(*inputs)
        output.backward(weight.to(output.dtype))

    return run


def compare(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Refuse a difference in float32."""
    torch.testing.assert_close(ours(*inputs), theirs(*inputs), rtol=1e-4, atol=1e-4)


def cases() -> dict[str, dict[str, Callable[[], object]]]:
    """Return what is timed: the operation → PyTorch's way and ours."""
    made = {}
    layout = {"memory_format": torch.channels_last}
    for name, (batch, channels, size, kernel, stride, padding) in CONVOLUTIONS.items():
        plain = nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels)
        fast = copy.deepcopy(plain)
        speed_up_depthwise(fast)
        images = torch.randn(batch, channels, size, size).to(**layout).requires_grad_()
        compare(fast, plain, images)
        made[f"depthwise, {name}"] = {"torch": step(plain, images), "ours": step(fast, images)}
    for name, (batch, queries, keys, channels, heads) in ATTENTIONS.items():
        layer = nn.MultiheadAttention(channels, heads, batch_first=True)
        asking = torch.randn(batch, queries, channels, requires_grad=True)
        answering = torch.randn(batch, keys, channels, requires_grad=True)

        def plain_attention(q: Tensor, k: Tensor, layer: nn.MultiheadAttention = layer) -> Tensor:
            return layer(q, k, k, need_weights=False)[0]

        def our_attention(q: Tensor, k: Tensor, layer: nn.MultiheadAttention = layer) -> Tensor:
            return attend(layer, q, k, k)

        compare(our_attention, plain_attention, asking, answering)
        made[f"attention, {name}"] = {
            "torch": step(plain_attention, asking, answering),
            "ours": step(our_attention, asking, answering),
        }
    maps = torch.randn(32, 1, 160, 160, requires_grad=True)

    def pooled(values: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(nn.functional.pad(values, (3, 0, 3, 0)), 4, stride=1)

    compare(lambda values: smooth(values, 4), pooled, maps)
    made["smoothing of the head, 160 × 160"] = {"torch": step(pooled, maps), "ours": step(lambda v: smooth(v, 4), maps)}
    return made


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    keep_freed_memory()
    rows, gains = [], {}
    for name, works in cases().items():
        seconds = interleaved(works, rounds)
        middle, gains[name] = medians(seconds), ratios(seconds, "torch")["ours"]
        cells = {f"{way}, ms": f"{1e3 * value:.1f}" for way, value in middle.items()}
        rows.append({"forward and backward": name, **cells, "× torch": f"{gains[name]:.1f}"})
    report("operations", __doc__, rows, bfloat16=HALF, ratio=gains)


if __name__ == "__main__":
    main()
