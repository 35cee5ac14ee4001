"""Rules for activations: rectifiers join the step before them, other functions of one variable become table look-ups."""

from collections.abc import Callable
from typing import Any

from timm.layers import activations as plain
from timm.layers import activations_me as lean
from torch import nn

from edgeft.quant.plan import TableStep
from edgeft.quant.tracing.builder import Builder
from edgeft.quant.tracing.fold import movable, rectify
from edgeft.quant.tracing.values import Value

QUICK_GELU = 1.702
"""x sigmoid(1.702 x) is a SiLU between two gains."""


def look_up(b: Builder, x: Value, function: str, input_gain: float = 1.0, output_gain: float = 1.0) -> Value:
    """output_gain * function(input_gain * x), one table entry for each code."""
    x = movable(b, x)
    name, shape = b.unique(b.layer_name()), b.shape(x.name)
    return x.of(b.add(TableStep(name, (x.name,), shape, function=function, input_gain=input_gain, output_gain=output_gain)).name)


def quick_gelu(b: Builder, x: Value) -> Value:
    """The sigmoid approximation of GELU."""
    return look_up(b, x, "silu", QUICK_GELU, 1.0 / QUICK_GELU)


def leaky_relu(b: Builder, x: Value, slope: float = 0.01) -> Value:
    """Leaky ReLU."""
    return look_up(b, x, f"leaky_relu:{slope!r}")


def _prelu(b: Builder, x: Value, module: Any) -> Value:
    slopes = module.weight.detach().unique()
    if len(slopes) > 1:
        raise b.unsupported("has a slope for each channel, which one table cannot hold")
    return leaky_relu(b, x, float(slopes[0]))


def _gelu(b: Builder, x: Value, module: Any) -> Value:
    return look_up(b, x, "gelu" if module.approximate == "none" else "gelu_tanh")


def _softplus(b: Builder, x: Value, module: Any) -> Value:
    return look_up(b, x, "softplus", module.beta, 1.0 / module.beta)


def _table(function: str) -> Callable[[Builder, Value, Any], Value]:
    return lambda b, x, module: look_up(b, x, function)


ACTIVATIONS: dict[type[nn.Module], Callable[[Builder, Value, Any], Value]] = {
    nn.ReLU6: lambda b, x, m: rectify(b, x, 6.0),
    nn.ReLU: lambda b, x, m: rectify(b, x, None),
    nn.LeakyReLU: lambda b, x, m: leaky_relu(b, x, m.negative_slope),
    nn.PReLU: _prelu,
    nn.ELU: lambda b, x, m: look_up(b, x, f"elu:{m.alpha!r}"),
    nn.GELU: _gelu,
    nn.Softplus: _softplus,
    plain.GELUTanh: _table("gelu_tanh"),
    plain.QuickGELU: lambda b, x, m: quick_gelu(b, x),
    **dict.fromkeys((nn.Sigmoid, plain.Sigmoid), _table("sigmoid")),
    **dict.fromkeys((nn.Hardsigmoid, plain.HardSigmoid, lean.HardSigmoidMe), _table("hard_sigmoid")),
    **dict.fromkeys((nn.Tanh, plain.Tanh), _table("tanh")),
    **dict.fromkeys((nn.SiLU, plain.Swish, lean.SwishMe), _table("silu")),
    **dict.fromkeys((nn.Hardswish, plain.HardSwish, lean.HardSwishMe), _table("hard_swish")),
    **dict.fromkeys((nn.Mish, plain.Mish, lean.MishMe), _table("mish")),
    **dict.fromkeys((plain.HardMish, lean.HardMishMe), _table("hard_mish")),
    **dict.fromkeys((plain.GELU,), _table("gelu")),
    **dict.fromkeys((nn.SELU,), _table("selu")),
}
"""PyTorch's modules and timm's own."""

ACTIVATION_TYPES: tuple[type[nn.Module], ...] = tuple(ACTIVATIONS)


def activate(b: Builder, x: Value, module: nn.Module) -> Value:
    """Apply an activation module."""
    rule = next(rule for kind, rule in ACTIVATIONS.items() if isinstance(module, kind))
    return rule(b, x, module)
