"""Rules for pooling: maxima and means over windows, equal windows, the whole map."""

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import get_same_padding

from edgeft.quant.plan import IDENTITY_FRAC, ConvStep, GlobalPoolStep, MaxPoolStep, MulStep, Padding, Pair, SelectStep, TableStep
from edgeft.quant.tracing.builder import Builder, window_shape
from edgeft.quant.tracing.values import Value


def pair(value: Any) -> Pair:
    """One number for both directions, or two numbers."""
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def same_padding(size: tuple[int, ...], kernel: Pair, stride: Pair, dilation: Pair = (1, 1)) -> Padding:
    """TensorFlow's SAME padding of a map of `size` (height, width)."""
    vertical, horizontal = (max(0, get_same_padding(n, k, s, d)) for n, k, s, d in zip(size, kernel, stride, dilation, strict=True))
    return (vertical // 2, horizontal // 2, vertical - vertical // 2, horizontal - horizontal // 2)


def symmetric(padding: Any) -> Padding:
    """PyTorch's padding of windows."""
    vertical, horizontal = pair(padding)
    return (vertical, horizontal, vertical, horizontal)


def sum_of(first: Padding, second: Padding) -> Padding:
    """One padding around another."""
    return (first[0] + second[0], first[1] + second[1], first[2] + second[2], first[3] + second[3])


def max_pool(
    b: Builder, x: Value, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False, *, same: bool = False,
) -> Value:  # fmt: skip
    """Maximum over windows. Zeros that were put around the map join the padding where the map is never negative."""
    if pair(dilation) != (1, 1) or return_indices:
        raise b.unsupported("uses dilation or indices, which have no fixed-point form")
    name, around = b.padded(x)
    if any(around) and not b.nonnegative(name):
        name, around = b.map(x), (0, 0, 0, 0)
    kernel, stride = pair(kernel_size), pair(stride if stride else kernel_size)
    channels, height, width = b.shape(name)
    size = (height + around[0] + around[2], width + around[1] + around[3])
    total = sum_of(same_padding(size, kernel, stride) if same else symmetric(padding), around)
    if ceil_mode:
        total = sum_of(total, _ceiling((height, width), kernel, stride, total))
    shape = (channels, *window_shape((height, width), kernel, stride, total))
    return b.add(MaxPoolStep(b.unique(b.layer_name()), (name,), shape, kernel=kernel, stride=stride, padding=total))


def _ceiling(size: Pair, kernel: Pair, stride: Pair, padding: Padding) -> Padding:
    """What `ceil_mode` adds at the bottom and right: windows that begin inside the map or its padding, but not in what is added."""
    extra = []
    for n, k, s, before, after in zip(size, kernel, stride, padding[:2], padding[2:], strict=True):
        count = math.ceil((n + before + after - k) / s) + 1
        if (count - 1) * s >= n + before:
            count -= 1
        extra.append(max(0, (count - 1) * s + k - (n + before + after)))
    return (0, 0, extra[0], extra[1])


def average_pool(
    b: Builder, x: Value, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True,
    divisor_override: int | None = None, *, same: bool = False,
) -> Value:  # fmt: skip
    """Mean over windows: a depthwise convolution with a constant near 1/n, or global pooling where one window covers the map."""
    kernel, stride = pair(kernel_size), pair(stride if stride else kernel_size)
    n = divisor_override or kernel[0] * kernel[1]
    if kernel == x.shape[2:] and pair(padding) == (0, 0) and n == math.prod(kernel) and not same:
        return global_pool(b, x)
    name, around = b.padded(x)
    channels, height, width = b.shape(name)
    size = (height + around[0] + around[2], width + around[1] + around[3])
    own = same_padding(size, kernel, stride) if same else symmetric(padding)
    total = sum_of(own, around)
    ceiling = _ceiling((height, width), kernel, stride, total) if ceil_mode else (0, 0, 0, 0)
    uneven = (any(own) and not (count_include_pad or same)) or any(ceiling)
    if uneven and (divisor_override or any(around) or (any(own) and (count_include_pad or same))):
        raise b.unsupported(f"divides windows at the border of a map of {height}x{width} by numbers that have no fixed-point form")
    total = sum_of(total, ceiling)
    frac = math.floor(math.log2(127.5 * n))
    weight = torch.full((channels, 1, *kernel), round(2.0**frac / n) * 2.0**-frac, dtype=torch.float64)
    out = window_shape((height, width), kernel, stride, total)
    pooled = b.fixed_conv(b.layer_name(), name, weight, (channels, *out), frac, stride=stride, padding=total, groups=channels)
    return _per_pixel_in_window(b, name, pooled, kernel, stride, total) if uneven else pooled


def _per_pixel_in_window(b: Builder, name: str, pooled: Value, kernel: Pair, stride: Pair, padding: Padding) -> Value:
    """Make up for windows at the border that count fewer pixels than the others: times n / count, computed from a map of ones."""
    (channels, height, width), (_, rows, columns) = b.shape(name), pooled.source
    nothing = torch.zeros(1, channels, 1, 1, dtype=torch.float64)
    ones = b.add(ConvStep(
        b.unique(f"{pooled.name}.ones"), (name,), (1, height, width), weight=nothing, bias=torch.ones(1, dtype=torch.float64),
        fixed_frac=IDENTITY_FRAC,
    ))  # fmt: skip
    window = torch.ones(1, 1, *kernel, dtype=torch.float64)
    shape = (1, rows, columns)
    count = b.fixed_conv(f"{pooled.name}.count", ones.name, window, shape, IDENTITY_FRAC, stride=stride, padding=padding)
    share = b.add(TableStep(
        b.unique(f"{pooled.name}.share"), (count.name,), shape, function="reciprocal", output_gain=float(kernel[0] * kernel[1])
    ))  # fmt: skip
    wide = b.add(SelectStep(b.unique(f"{share.name}.select"), (share.name,), pooled.source, index=(0,) * channels))
    return b.add(MulStep(b.unique(f"{pooled.name}.mean"), (pooled.name, wide.name), pooled.source))


def adaptive_pool(b: Builder, x: Value, output_size: Any) -> Value:
    """Mean over equal windows."""
    return _adaptive(b, x, output_size, average_pool)


def adaptive_max_pool(b: Builder, x: Value, output_size: Any, return_indices: bool = False) -> Value:
    """Maximum over equal windows."""
    if return_indices:
        raise b.unsupported("uses indices, which have no fixed-point form")
    return _adaptive(b, x, output_size, max_pool)


def _adaptive(b: Builder, x: Value, output_size: Any, pool: Callable[[Builder, Value, Pair], Value]) -> Value:
    wanted = output_size if isinstance(output_size, tuple | list) else (output_size, output_size)
    sizes = [n if out is None else int(out) for n, out in zip(x.shape[2:], wanted, strict=True)]
    if any(n % out for n, out in zip(x.shape[2:], sizes, strict=True)):
        raise b.unsupported(f"makes {sizes[0]}x{sizes[1]} windows of unequal size from a map of {x.shape[2]}x{x.shape[3]}")
    kernel = (x.shape[2] // sizes[0], x.shape[3] // sizes[1])
    return x if kernel == (1, 1) else pool(b, x, kernel)


def global_pool(b: Builder, x: Value) -> Value:
    """Mean over all pixels, [1, c, 1, 1]."""
    name = b.map(x)
    return b.add(GlobalPoolStep(b.unique(b.layer_name()), (name,), (b.shape(name)[0], 1, 1)))
