"""Rounding in the training graph: autograd functions that give exactly the codes of fixedpoint.py, at the price of a few passes.

Values are code * 2^-frac in float32. After clamping, |code| <= 255, so adding C = 1.5 * 2^(23 - frac) leaves a number whose last
bit is one code: the hardware addition rounds half to even, and subtracting C is exact. This needs float32: C is not
representable in the half-precision types. On GPUs one Triton kernel does all of it (`edgeft.kernels.fused_round`).
"""

import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

TRITON_SWITCH = "EDGEFT_TRITON"
"""Environment variable; "0" keeps to PyTorch's elementwise operations on GPUs as well."""


class Derived:
    """What is computed from a buffer: computed anew at the first look after the buffer was written or replaced.

    A copy starts empty: the buffers of a copied module count their versions anew.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._version = -1
        self._value: Any = None

    def __reduce__(self) -> tuple[type["Derived"], tuple[()]]:
        return Derived, ()

    def get(self, buffer: Tensor, compute: Callable[[Tensor], Any]) -> Any:
        """`compute(buffer)`, or what it gave when the buffer was the same."""
        if buffer is not self._buffer or buffer._version != self._version:
            # Training must be able to use what validation computed.
            with torch.inference_mode(False), torch.no_grad():
                self._value = compute(buffer)
            self._buffer, self._version = buffer, buffer._version
        return self._value


def round_constant(frac: int) -> float:
    """C = 1.5 * 2^(23 - frac), which makes a float32 addition round to codes of 2^-frac."""
    return 1.5 * 2.0 ** (23 - frac)


def power_of_two(frac: Tensor) -> Tensor:
    """2^frac in float32, exact on every device: what float64's exp2 may be off by vanishes when it is rounded to float32."""
    return torch.exp2(frac.double()).float()


@functools.lru_cache(maxsize=1024)
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
        ctx.save_for_backward(x, scale)
        ctx.mask = mask_bounds(low, high, 0, relu=False)
        return (x * scale).clamp_(low, high).round_().mul_(scale.reciprocal())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient inside the code range, zero outside. Scaling by a power of two is exact, so one range serves all channels."""
        x, scale = ctx.saved_tensors
        codes = x * scale
        return torch.ops.aten.hardtanh_backward.grad_input(grads[0], codes, *ctx.mask, grad_input=codes), None, None, None


class RoundFused(torch.autograd.Function):
    """Both of the above in one Triton kernel each way: (x, 2^frac, 2^-frac, low code, high code, whether a ReLU is fused).

    x is float32; the two powers stay on the device and are one number or broadcastable with one axis that is not 1.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, step: Tensor, low: int, high: int, relu: bool) -> Tensor:
        """Values on the grid."""
        kernels = _fused_round()
        x = kernels.dense(x)
        ctx.save_for_backward(x, scale)
        ctx.mask = mask_bounds(low, high, 0, relu=relu)
        out: Tensor = kernels.fused_round(x, scale, step, low, high)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient inside the code range, zero outside."""
        grad: Tensor = _fused_round().fused_round_grad(grads[0], *ctx.saved_tensors, *ctx.mask)
        return grad, None, None, None, None, None


def has_fused_kernels(device: torch.device) -> bool:
    """Whether tensors there are rounded by Triton: on GPUs where it is installed, when EDGEFT_TRITON=1 asks for it."""
    return device.type == "cuda" and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return os.environ.get(TRITON_SWITCH) == "1" and importlib.util.find_spec("triton") is not None


@functools.cache
def _fused_round() -> ModuleType:
    return importlib.import_module("edgeft.kernels.fused_round")  # imports triton, which not every installation has


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


class TableLookup(torch.autograd.Function):
    """An elementwise function of 8-bit codes: (x on the grid, 2^frac, lowest code, values [256], slopes [256]) to values of x's shape.

    x, values and slopes are float32. The value at index code - lowest code is the output, and the slope there times the gradient is the
    gradient. A code outside the 256 is looked up modulo 256; a NaN anywhere in x makes every output NaN, so that it cannot get lost.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, low_code: int, values: Tensor, slopes: Tensor) -> Tensor:
        """Values at the codes of x, in x's memory format."""
        # In [2^23, 2^24) the last bit of a float32 is 1: its lowest byte is the index, and bytes convert faster than floats do.
        index = (x * scale).add_(round_constant(0) - low_code).view(torch.int32).to(torch.uint8)
        ctx.save_for_backward(index, slopes)
        return _look_up(values + x.sum() * 0.0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Slope times gradient."""
        index, slopes = ctx.saved_tensors
        return _look_up(slopes, index).mul_(grads[0]), None, None, None, None


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    # In the order of memory, which index_select wants flat; `index` was just computed elementwise, so it has no gaps.
    flat = index.as_strided((index.numel(),), (1,))
    return table.index_select(0, flat.long()).as_strided(index.shape, index.stride())
