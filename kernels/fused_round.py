"""Triton kernels of the training graph's rounding: one pass over memory forward, one backward, the format read on the device.

They compute what `edgeft.quant.fakequant` computes with several elementwise passes, to the last bit. How, and what is not yet known:
README.md beside this file.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
AS_WRITTEN = {"enable_fp_fusion": False}
"""Compiler options: every operation is rounded on its own, as PyTorch's are."""


@triton.jit
def _power(table, offsets, inner, channels, PER_CHANNEL: tl.constexpr):
    # Where the same channel fills `inner` consecutive places of memory, then the next one does, and so on again and again.
    if PER_CHANNEL:
        return tl.load(table + offsets // inner % channels)
    else:  # as an early return, the other one would count as well, and its type is another
        return tl.load(table)


@triton.jit
def _forward(x_at, out_at, scale_at, step_at, n, inner, channels, LOW: tl.constexpr, HIGH: tl.constexpr,
             PER_CHANNEL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = offsets < n
    x = tl.load(x_at + offsets, mask=here, other=0.0)
    code = x * _power(scale_at, offsets, inner, channels, PER_CHANNEL)
    code = tl.where(code < LOW, LOW, tl.where(code > HIGH, HIGH, code))  # NaN is neither, and stays
    below = tl.floor(code)
    rest = code - below
    odd = below * 0.5 != tl.floor(below * 0.5)
    code = below + tl.where((rest > 0.5) | ((rest == 0.5) & odd), 1.0, 0.0)
    tl.store(out_at + offsets, code * _power(step_at, offsets, inner, channels, PER_CHANNEL), mask=here)


@triton.jit
def _backward(grad_at, x_at, out_at, scale_at, n, inner, channels, LOWER: tl.constexpr, UPPER: tl.constexpr,
              PER_CHANNEL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = offsets < n
    x = tl.load(x_at + offsets, mask=here, other=0.0)
    code = x * _power(scale_at, offsets, inner, channels, PER_CHANNEL)
    # At 0, as with a ReLU, it is x that is compared: the code of a tiny number may be too small for a float.
    dead = (x <= 0.0 if LOWER == 0.0 else code <= LOWER) | (code >= UPPER)
    grad = tl.load(grad_at + offsets, mask=here, other=0.0)
    tl.store(out_at + offsets, tl.where(dead, 0.0, grad), mask=here)


def fused_round(x: Tensor, scale: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Saturated and rounded values of float32 `x`, which `dense` must have laid out; the result has its memory format.

    `scale` is 2^frac and `step` 2^-frac, float32: one number, or one for each entry of the one axis of `x` along which they are not 1.
    """
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _forward[_grid(x)](
            x, out, scale, step, x.numel(), *_channels(x, scale), float(low), float(high), scale.numel() > 1, BLOCK, **AS_WRITTEN
        )
    return out


def fused_round_grad(grad: Tensor, x: Tensor, scale: Tensor, lower: float, upper: float) -> Tensor:
    """`grad` where lower < x * scale < upper, else 0, in the memory format of `x`; arguments as for `fused_round`."""
    grad = grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _backward[_grid(x)](grad, x, out, scale, x.numel(), *_channels(x, scale), lower, upper, scale.numel() > 1, BLOCK, **AS_WRITTEN)
    return out


def dense(x: Tensor) -> Tensor:
    """`x` itself where it fills memory without gaps in one of PyTorch's two formats, otherwise a contiguous copy."""
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if channels_last else x.contiguous()


def _grid(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), BLOCK),)


def _channels(x: Tensor, scale: Tensor) -> tuple[int, int]:
    """How many consecutive places of memory belong to one entry of `scale`, and how many entries there are."""
    axis = next((axis for axis, size in enumerate(scale.shape) if size > 1), None)
    return (1, 1) if axis is None else (x.stride(axis), scale.shape[axis])
