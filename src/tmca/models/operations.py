"""Operations that PyTorch computes slowly, or wrongly, on a CPU, computed another way there.

What each one gains is measured by ``benchmarks/operations.py``; on other devices PyTorch's own kernels run.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NetworkT = TypeVar("NetworkT", bound=nn.Module)

LARGE_KERNEL = 5
"""Side from which the gradient of a depthwise kernel is computed by exchanged roles; for 3 × 3 PyTorch is fast."""
CHANNEL_BLOCK = 16
"""Channels that oneDNN takes together; with fewer, a strided 1 × 1 convolution is faulty."""
EXPLICIT_SCORES = 2**25
"""Attention scores of a batch up to which they are written out; more would need too much memory."""


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution whose gradients are fast on a CPU; made by :func:`speed_up_depthwise`."""

    def forward(
        self,
        input: Float[Tensor, "batch channels height width"],  # noqa: A002
    ) -> Float[Tensor, "batch channels rows cols"]:
        """Convolve each channel with its own kernel."""
        if input.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(input)
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled("cpu"):  # autocast does not look into a function with its own gradient
            precision = torch.get_autocast_dtype("cpu")
            input, weight = input.to(precision), weight.to(precision)  # noqa: A001
            bias = None if bias is None else bias.to(precision)
        convolved: Tensor = _Depthwise.apply(input, weight, bias, self.stride, self.padding)  # type: ignore[no-untyped-call]
        return convolved


def speed_up_depthwise(network: nn.Module) -> None:
    """Let the depthwise convolutions of a network compute their gradients fast; names and values stay as they are."""
    for module in network.modules():
        if type(module) is nn.Conv2d and _gains(module):
            module.__class__ = DepthwiseConv2d


def _gains(module: nn.Conv2d) -> bool:
    """Whether a convolution is depthwise, and of a form whose gradients PyTorch computes slowly."""
    depthwise = module.groups == module.in_channels == module.out_channels
    slow = max(module.stride) > 1 or min(module.kernel_size) >= LARGE_KERNEL
    if not depthwise or not slow or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return False
    fits = all(padding < side for padding, side in zip(module.padding, module.kernel_size, strict=True))
    return fits and max(module.dilation) == 1


class _Depthwise(torch.autograd.Function):
    """Depthwise convolution with both gradients written as depthwise convolutions of stride one.

    With respect to the images: of the gradient, spread out by the stride, with the flipped kernel. With respect to a
    large kernel: of each image with its gradient as the kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        images: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return nn.functional.conv2d(images, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        images, weight = ctx.saved_tensors
        of_images = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_images = _image_gradient(gradient, weight, images.shape[2:], ctx.stride, ctx.padding)
        if ctx.needs_input_grad[1]:
            of_weight = _kernel_gradient(gradient, images, weight, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_images, of_weight, of_bias, None, None


def _image_gradient(
    gradient: Tensor, weight: Tensor, size: torch.Size, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    batch, channels, rows, cols = gradient.shape
    kernel = weight.shape[2:]
    # Channels last: the layout in which both the copy and the convolution are fast.
    spread = gradient.new_zeros(batch, size[0] + kernel[0] - 1, size[1] + kernel[1] - 1, channels).permute(0, 3, 1, 2)
    starts = [side - 1 - pad for side, pad in zip(kernel, padding, strict=True)]
    ends = [start + step * (count - 1) + 1 for start, step, count in zip(starts, stride, (rows, cols), strict=True)]
    spread[:, :, starts[0] : ends[0] : stride[0], starts[1] : ends[1] : stride[1]] = gradient
    return nn.functional.conv2d(spread, weight.flip(2, 3), groups=channels)


def _kernel_gradient(
    gradient: Tensor, images: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    batch, channels = gradient.shape[:2]
    kernel = weight.shape[2:]
    if min(kernel) < LARGE_KERNEL:
        wanted = [False, True, False]
        arguments = (gradient, images, weight, None, stride, padding, (1, 1), False, (0, 0), channels, wanted)
        of_weight: Tensor = torch.ops.aten.convolution_backward(*arguments)[1]
        return of_weight
    planes = images.reshape(1, batch * channels, *images.shape[2:]).contiguous(memory_format=torch.channels_last)
    kernels = gradient.reshape(batch * channels, 1, *gradient.shape[2:])
    # The stride of the forward pass is the distance of the taps here.
    products = nn.functional.conv2d(planes, kernels, padding=padding, dilation=stride, groups=batch * channels)
    products = products[:, :, : kernel[0], : kernel[1]].view(batch, channels, 1, *kernel)
    return products.sum(0, dtype=torch.promote_types(products.dtype, torch.float32)).to(weight.dtype)


class DilatedConv2d(nn.Conv2d):
    """A dilated convolution that is trained in float32 on a CPU; made by :func:`avoid_faults`."""

    def forward(
        self,
        input: Float[Tensor, "batch channels height width"],  # noqa: A002
    ) -> Float[Tensor, "batch out_channels rows cols"]:
        """Convolve; under autocast the result has its precision, as elsewhere."""
        if input.device.type != "cpu" or not (torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")):
            return super().forward(input)
        precision = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float()).to(precision)


class SubsampledConv2d(nn.Conv2d):
    """A 1 × 1 convolution of few channels that leaves out what its stride skips first; made by :func:`avoid_faults`."""

    def forward(
        self,
        input: Float[Tensor, "batch channels height width"],  # noqa: A002
    ) -> Float[Tensor, "batch out_channels rows cols"]:
        """Convolve."""
        if input.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(input)
        rows, cols = self.stride
        return nn.functional.conv2d(input[..., ::rows, ::cols], self.weight, self.bias, groups=self.groups)


def avoid_faults(network: nn.Module) -> None:
    """Let a network be trained without the convolutions whose gradients oneDNN gets wrong on a CPU; names stay.

    Seen with PyTorch 2.13, where the channels come last:
        1. The gradient of a dilated kernel in bfloat16 is NaN, of 20 and 24 channels on maps of 40 positions a side and
           more (not of 16, 32 or 64), where oneDNN uses AVX512_BF16 but not AMX.
        2. The gradient of a 1 × 1 kernel of fewer than 16 channels with a stride writes beyond its memory, and the
           process dies (oneDNN's issue 6035).
    """
    for module in network.modules():
        if type(module) is nn.Conv2d and max(module.dilation) > 1:
            module.__class__ = DilatedConv2d
        elif type(module) is nn.Conv2d and _writes_beyond(module):
            module.__class__ = SubsampledConv2d


def _writes_beyond(module: nn.Conv2d) -> bool:
    subsamples = module.kernel_size == (1, 1) and max(module.stride) > 1 and not any(module.padding)
    return subsamples and module.in_channels // module.groups < CHANNEL_BLOCK


@torch.inference_mode(mode=False)  # so that a network laid out while it is scored can be trained afterwards
def channels_last(network: NetworkT) -> NetworkT:
    """Lay convolution weights out with the channels last, which is faster on CPUs and GPUs and changes no value."""
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network


def attend(
    attention: nn.MultiheadAttention,
    queries: Float[Tensor, "batch queries channels"],
    keys: Float[Tensor, "batch keys channels"],
    values: Float[Tensor, "batch keys channels"],
) -> Float[Tensor, "batch queries channels"]:
    """Return what an attention layer returns, without weights of its dropout and without masks.

    On a CPU a moderate number of scores is written out: PyTorch's fused kernel is made for long sequences, and takes
    two to six times as long, gradients included, where images attend to the few tokens of a sentence. There, besides,
    the projections of the queries and of what is read are multiplied into the tokens. In an export, where the number of
    scores is not known yet, they always are written out.

    Args:
        attention: The layer, ``batch_first``.
        queries: What asks.
        keys: What is compared with.
        values: What is returned, weighted.
    """
    exporting = torch.compiler.is_exporting()
    scores = queries.shape[0] * attention.num_heads * queries.shape[1] * keys.shape[1]
    explicit = queries.device.type == "cpu" and (exporting or scores <= EXPLICIT_SCORES)
    if explicit and not exporting and attention.num_heads * keys.shape[1] < min(queries.shape[1:]):
        return _attend_to_few(attention, queries, keys, values)
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    query, key, value = (
        nn.functional.linear(tokens, weight, bias).view(*tokens.shape[:2], attention.num_heads, -1).transpose(1, 2)
        for tokens, weight, bias in zip((queries, keys, values), weights, biases, strict=True)
    )
    if explicit:
        attended = (query @ key.transpose(2, 3) * query.shape[3] ** -0.5).softmax(dim=3).to(value.dtype) @ value
    else:
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
    read: Tensor = attention.out_proj(attended.transpose(1, 2).flatten(2))
    return read


def _attend_to_few(attention: nn.MultiheadAttention, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend to fewer tokens, over all heads, than there are queries and channels.

    What projects the many queries, and what is read for them, is linear: a token's key of each head is multiplied by
    the projection of the queries, its value by that of the output, and the queries themselves are never projected.
    """
    heads, channels = attention.num_heads, queries.shape[2]
    batch, tokens = keys.shape[:2]
    (of_queries, of_keys, of_values), biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    key, value = (
        nn.functional.linear(rows, weight, bias).view(batch, tokens, heads, -1).transpose(1, 2)
        for rows, weight, bias in ((keys, of_keys, biases[1]), (values, of_values, biases[2]))
    )
    key = key * key.shape[3] ** -0.5
    asked = (key @ of_queries.view(heads, -1, channels)).reshape(batch, heads * tokens, channels)
    offsets = (key @ biases[0].view(heads, -1, 1)).view(batch, 1, heads, tokens)
    scores = (queries @ asked.transpose(1, 2)).view(batch, -1, heads, tokens) + offsets
    by_head = attention.out_proj.weight.view(channels, heads, -1).permute(1, 2, 0)
    given = (value @ by_head).reshape(batch, heads * tokens, channels)
    read: Tensor = scores.softmax(dim=3).to(given.dtype).flatten(2) @ given + attention.out_proj.bias
    return read


def smooth(
    maps: Float[Tensor, "batch channels height width"], side: int
) -> Float[Tensor, "batch channels height width"]:
    """Return the mean over the square of ``side`` pixels that ends at each pixel; outside of the map is zero.

    The same as padding at the left and top and average pooling with stride one, which is ten times slower on a CPU.
    """
    padded = nn.functional.pad(maps, (side - 1, 0, side - 1, 0))
    rows, cols = maps.shape[2:]
    summed = sum((padded[..., start : start + cols] for start in range(1, side)), padded[..., :cols])
    summed = sum((summed[..., start : start + rows, :] for start in range(1, side)), summed[..., :rows, :])
    return summed / side**2
