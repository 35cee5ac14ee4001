"""Elementwise functions that the device looks up in a table of 256 entries: one for each code of the input."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Function(NamedTuple):
    """A differentiable function of one real variable."""

    value: Callable[[Tensor], Tensor]
    nonnegative: bool
    """Whether its values are never below 0, so that an unsigned format can hold them."""


class _Functions(dict[str, Function]):
    def __missing__(self, name: str) -> Function:
        """Functions with a parameter: 'leaky_relu:0.01'."""
        kind, _, parameter = name.partition(":")
        if not parameter or kind not in FAMILIES:
            raise KeyError(name)
        return Function(partial(FAMILIES[kind], float(parameter)), nonnegative=False)


FAMILIES: dict[str, Callable[[float, Tensor], Tensor]] = {
    "leaky_relu": lambda slope, x: F.leaky_relu(x, slope),
    "elu": lambda alpha, x: F.elu(x, alpha),
}
"""Functions with one parameter, given after a colon in the name: the slope below 0, the limit below 0."""

FUNCTIONS: dict[str, Function] = _Functions(
    {
        "sigmoid": Function(torch.sigmoid, nonnegative=True),
        "hard_sigmoid": Function(F.hardsigmoid, nonnegative=True),
        "tanh": Function(torch.tanh, nonnegative=False),
        "silu": Function(F.silu, nonnegative=False),
        "hard_swish": Function(F.hardswish, nonnegative=False),
        "gelu": Function(F.gelu, nonnegative=False),
        "gelu_tanh": Function(lambda x: F.gelu(x, approximate="tanh"), nonnegative=False),
        "mish": Function(F.mish, nonnegative=False),
        "hard_mish": Function(lambda x: 0.5 * x * (x + 2.0).clamp(0.0, 2.0), nonnegative=False),
        "softplus": Function(F.softplus, nonnegative=True),
        "elu": Function(F.elu, nonnegative=False),
        "selu": Function(F.selu, nonnegative=False),
        "reciprocal": Function(lambda x: 1.0 / x.clamp(min=1.0), nonnegative=True),
    }
)
"""Names are those of PyTorch's functional forms where it has one; see FAMILIES for those with a parameter. `reciprocal` is for counts,
numbers from 1 on."""


def apply_function(name: str, x: Tensor) -> Tensor:
    """The float function of a table step."""
    return FUNCTIONS[name].value(x)
