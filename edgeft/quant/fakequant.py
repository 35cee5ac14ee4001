"""Rounding in the training graph: autograd functions that give exactly the codes of fixedpoint.py, at the price of a few passes.

Values are code * 2^-frac in float32. After clamping, |code| <= 255, so adding C = 1.5 * 2^(23 - frac) leaves a number whose last
bit is one code: the hardware addition rounds half to even, and subtracting C is exact. This needs float32: C is not
representable in the half-precision types.
"""

import math
from typing import Any

import torch
from torch import Tensor


def round_constant(frac: int) -> float:
    """C = 1.5 * 2^(23 - frac), which makes a float32 addition round to codes of 2^-frac."""
    return 1.5 * 2.0 ** (23 - frac)


def power_of_two(frac: Tensor) -> Tensor:
    """2^frac in float32, exact on every device: what float64's exp2 may be off by vanishes when it is rounded to float32."""
    return torch.exp2(frac.double()).float()


def mask_bounds(low: int, high: int, frac: int, *, relu: bool) -> tuple[float, float]:
    """Open interval of values whose rounded, unclamped code lies in low ... high; a fused ReLU starts at 0 exactly.

    Ties round to even: where the end code is even the tie itself still rounds inwards, so that bound moves one float32 outwards.
    """
    step = 2.0**-frac
    lower, upper = (low - 0.5) * step, (high + 0.5) * step
    if low % 2 == 0:
        lower = float(torch.nextafter(torch.tensor(lower), torch.tensor(-math.inf)))
    if high % 2 == 0:
        upper = float(torch.nextafter(torch.tensor(upper), torch.tensor(math.inf)))
    return (0.0 if relu else lower), upper


class RoundSaturate(torch.autograd.Function):
    """Saturate, then round half to even, for one format: (x, low, high, C, mask low, mask high), bounds as real values.

    The bounds are grid points, so saturating first gives the same codes and keeps infinities out of the addition.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float, constant: float, mask_low: float, mask_high: float) -> Tensor:
        """Values on the grid."""
        ctx.save_for_backward(x)
        ctx.mask = (mask_low, mask_high)
        return x.clamp(low, high).add_(constant).sub_(constant)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient inside the code range, zero outside. hardtanh's backward does it without a mask tensor."""
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grads[0], x, *ctx.mask), None, None, None, None, None


class RoundPerChannel(torch.autograd.Function):
    """The same with one power of two per output channel: (x, 2^frac broadcastable, low code, high code)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        """Values on each channel's grid."""
        codes = (x * scale).round_()
        ctx.save_for_backward((codes >= low) & (codes <= high))
        return codes.clamp_(low, high).div_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient inside the code range, zero outside."""
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None


class RoundToGrid(torch.autograd.Function):
    """Round to multiples of 1/scale without saturation; straight-through gradient. For 32-bit biases."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        """Values on the grid."""
        return (x * scale).round_().div_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Identity."""
        return grads[0], None
