"""The one module that imports Brevitas: our fixed-point formats as its quantizers and layers.

Brevitas hosts the quantizers (proxies, `quant_weight()`, `.scale`, export of values); the body of each is `FixedPointQuant`,
put in place through the injector attribute `tensor_quant`. The stock body derives a float scale by some twenty elementwise
passes and learns it by gradient; here the scale is 2^-frac, chosen from outside, and one pass rounds.
"""

import math
from typing import Any

import torch
from brevitas import nn as qnn
from brevitas.quant.base import IntQuant, MaxStatsScaling, NarrowIntQuant, PerTensorPoTScaling8bit, UintQuant
from brevitas.quant.solver.act import ActQuantSolver
from brevitas.quant.solver.weight import WeightQuantSolver
from torch import Tensor, nn
from torch.nn import functional as F

from edgeft.quant.f8net import spread
from edgeft.quant.fakequant import (
    Derived,
    RoundFused,
    RoundPerChannel,
    RoundSaturate,
    RoundToGrid,
    has_fused_kernels,
    mask_bounds,
    power_of_two,
    round_constant,
)


class FixedPointQuant(nn.Module):
    """Quantizer body: round half to even to codes of an 8-bit format, saturate; the gradient is masked to the code range.

    `frac` is a buffer (0-dim, or one entry per output channel for weights); whoever writes it in place changes the format
    at the next call. With `relu` the lower bound is 0, so the quantizer is the ReLU as well, and it sees the tensor before
    rectification. While `observing`, each call adds to the sums from which `take_sigma()` is computed.
    """

    def __init__(
        self, int_quant: nn.Module, signed: bool, narrow_range: bool, relu: bool = False, channels: int = 0, weights: bool = False
    ) -> None:
        super().__init__()
        self.int_quant = int_quant  # Brevitas reads tensor_quant.int_quant.input_view_impl
        self.relu = relu
        self.weights = weights
        self.high = 127 if signed else 255
        self.low = 0 if relu or not signed else -127 if narrow_range else -128
        self.register_buffer("frac", torch.zeros((channels, 1, 1, 1) if channels else ()))
        self.register_buffer("running_sigma", torch.zeros((), dtype=torch.float64))
        self.register_buffer("bits", torch.tensor(8.0), persistent=False)
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)
        self.register_buffer("moves", torch.zeros((), dtype=torch.int64))  # changes of the format during training
        self.register_buffer("moments", torch.zeros(3, dtype=torch.float64))  # count, sum, sum of squares of what was observed
        self.observing = False
        self._powers, self._constants = Derived(), Derived()  # formats change rarely

    frac: Tensor
    running_sigma: Tensor
    moves: Tensor
    moments: Tensor
    bits: Tensor
    zero: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Value, scale 2^-frac, zero point 0 and bit width 8, as Brevitas' proxies expect."""
        if self.observing and torch.is_grad_enabled():  # training data only: validation runs without gradients
            self._observe(x.detach())
        scale, step = self._powers.get(self.frac, _powers)
        x = x.float()  # autocast may bring half precision, in which neither way of rounding is exact
        if has_fused_kernels(x.device):
            value = RoundFused.apply(x, scale, step, self.low, self.high, self.relu)
        elif self.frac.ndim:
            value = RoundPerChannel.apply(x, scale, self.low, self.high)
        else:
            value = RoundSaturate.apply(x, *self._constants.get(self.frac, self._kernel_constants))
        return value, step, self.zero, self.bits

    def _kernel_constants(self, buffer: Tensor) -> tuple[float, ...]:
        frac = int(buffer.item())
        step = 2.0**-frac
        return self.low * step, self.high * step, round_constant(frac), *mask_bounds(self.low, self.high, frac, relu=self.relu)

    def _observe(self, x: Tensor) -> None:
        # Weights are read whole; activations are sampled along the batch (a view: no copy, any memory format).
        sample = x if self.weights else x[:: max(1, x.shape[0] // 8)]
        squares = torch.linalg.vector_norm(sample, dtype=torch.float64).square()
        self.moments += torch.stack((squares.new_tensor(float(sample.numel())), sample.sum(dtype=torch.float64), squares))

    def take_sigma(self) -> float:
        """Deviation (`f8net.spread`) of everything observed since the last call, NaN when nothing was; clears the sums."""
        n, total, squares = self.moments.tolist()
        self.moments.zero_()
        return spread(total / n, max(squares / n - (total / n) ** 2, 0.0) ** 0.5, relu=self.relu) if n else math.nan


def _powers(frac: Tensor) -> tuple[Tensor, Tensor]:
    return power_of_two(frac), power_of_two(-frac)


class _Body(PerTensorPoTScaling8bit):  # type: ignore[misc]  # Brevitas' injectors are untyped metaclass magic
    tensor_quant = FixedPointQuant


class WeightFormat(_Body, NarrowIntQuant, MaxStatsScaling, WeightQuantSolver):  # type: ignore[misc]
    """Signed, narrow (-127 ... 127). MaxStatsScaling is unused but Brevitas cannot resolve the injector without a statistic."""


class SignedFormat(_Body, IntQuant, ActQuantSolver):  # type: ignore[misc]
    """Signed activation, full range (-128 ... 127)."""


class UnsignedFormat(_Body, UintQuant, ActQuantSolver):  # type: ignore[misc]
    """Unsigned activation (0 ... 255)."""


class ActivationQuant(qnn.QuantIdentity):  # type: ignore[misc]
    """Activation quantizer; `relu` fuses the rectification (a separate ReLU pass would cost more than the rounding)."""

    def __init__(self, *, signed: bool, relu: bool) -> None:
        injector = (SignedFormat if signed else UnsignedFormat).let(relu=relu)
        super().__init__(act_quant=injector, return_quant_tensor=False)
        self.act_quant.skip_create_quant_tensor = True
        self.signed = signed

    def forward(self, x: Tensor) -> Tensor:
        """Values on the grid. Brevitas' own forward renames the input's dimensions first, which warns before PyTorch 2.13."""
        out: Tensor = self.act_quant(x)
        return out

    @property
    def body(self) -> FixedPointQuant:
        """The quantizer body that holds `frac`."""
        body: FixedPointQuant = self.act_quant.fused_activation_quant_proxy.tensor_quant
        return body


class _FixedPointLayer:
    """What the convolution and the linear layer share: direct weight quantization and a bias on the accumulator's grid."""

    weight: Tensor
    bias: Tensor
    weight_quant: Any
    bias_frac: Tensor
    _bias_powers: Derived

    @property
    def body(self) -> FixedPointQuant:
        """The weight quantizer body that holds `frac`."""
        body: FixedPointQuant = self.weight_quant.tensor_quant
        return body

    def rounded_weight(self) -> Tensor:
        """Weight values on their grid, differentiable; Brevitas' own `quant_weight` slices first, which copies gradients."""
        weight: Tensor = self.weight_quant(self.weight)
        return weight

    def rounded_bias(self) -> Tensor:
        """Bias rounded to 2^-(frac_x + frac_w), the accumulator's grid; straight-through gradient."""
        bias: Tensor = RoundToGrid.apply(self.bias, self._bias_powers.get(self.bias_frac, power_of_two))
        return bias


class FixedPointConv2d(_FixedPointLayer, qnn.QuantConv2d):  # type: ignore[misc]
    """Convolution with explicit (top, left, bottom, right) zero padding, fixed-point weight and bias."""

    def __init__(
        self, weight: Tensor, bias: Tensor, stride: tuple[int, int], padding: tuple[int, int, int, int],
        dilation: tuple[int, int], groups: int, *, per_channel: bool,
    ) -> None:  # fmt: skip
        out_channels, in_per_group, *kernel = weight.shape
        top, left, bottom, right = padding
        symmetric = top == bottom and left == right
        injector = WeightFormat.let(weights=True, channels=out_channels if per_channel else 0)
        super().__init__(
            in_per_group * groups, out_channels, tuple(kernel), stride=stride, padding=(top, left) if symmetric else (0, 0),
            dilation=dilation, groups=groups, bias=True, weight_quant=injector, return_quant_tensor=False,
        )  # fmt: skip
        self.explicit_padding = None if symmetric else (left, right, top, bottom)
        _fill(self, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Accumulator as real values: convolution of codes, times 2^-(frac_x + frac_w)."""
        if self.explicit_padding is not None:
            x = F.pad(x, self.explicit_padding)
        return F.conv2d(x, self.rounded_weight(), self.rounded_bias(), self.stride, self.padding, self.dilation, self.groups)


class FixedPointLinear(_FixedPointLayer, qnn.QuantLinear):  # type: ignore[misc]
    """Linear layer with fixed-point weight and bias."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        injector = WeightFormat.let(weights=True, channels=0)
        super().__init__(weight.shape[1], weight.shape[0], bias=True, weight_quant=injector, return_quant_tensor=False)
        _fill(self, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Accumulator as real values."""
        return F.linear(x, self.rounded_weight(), self.rounded_bias())


def _fill(layer: Any, weight: Tensor, bias: Tensor) -> None:
    # Not by assigning a new Parameter, which makes Brevitas rebuild the quantizer body. In the activations' memory format, or every
    # convolution would reorder the weight, and its gradient back.
    layer.weight.data = weight.detach().clone(memory_format=torch.channels_last if weight.ndim == 4 else torch.contiguous_format)
    layer.bias.data.copy_(bias)
    layer.register_buffer("bias_frac", torch.zeros(weight.shape[0]))
    layer._bias_powers = Derived()
    layer.weight_quant.skip_create_quant_tensor = True
