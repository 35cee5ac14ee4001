"""Rules for functions and methods: arithmetic, reductions, and everything that only moves elements."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from edgeft.quant.plan import AddStep, ConcatStep, MulStep
from edgeft.quant.tracing.activations import leaky_relu, look_up
from edgeft.quant.tracing.builder import Builder
from edgeft.quant.tracing.fold import add_constant, multiply, rectify
from edgeft.quant.tracing.layers import convolve, enlarge, linear
from edgeft.quant.tracing.pools import adaptive_max_pool, adaptive_pool, average_pool, global_pool, max_pool
from edgeft.quant.tracing.values import Value, place

Rule = Callable[..., Any]


def _binary(b: Builder, x: Any, y: Any, constant: Rule, both: Rule) -> Any:
    if isinstance(x, Value) and isinstance(y, Value):
        if len(x.shape) == len(y.shape) == 4 and (_channels_last(x) or _channels_last(y)):
            out: Value = both(b, *(v.moved(v.elements.permute(0, 3, 1, 2)) for v in (x, y)))
            return out.moved(out.elements.permute(0, 2, 3, 1))
        return both(b, x, y)
    return constant(b, x, y) if isinstance(x, Value) else constant(b, y, x)


def _channels_last(x: Value) -> bool:
    return not x.plain and place(x) is None and place(x.moved(x.elements.permute(0, 3, 1, 2))) is not None


def _broadcast(b: Builder, x: Value, y: Value) -> tuple[Value, Value, tuple[int, ...]]:
    shape = tuple(torch.broadcast_shapes(x.shape, y.shape))
    left, right = (v if v.shape == shape else v.moved(v.elements.expand(shape)) for v in (x, y))
    return left, right, shape


def add(b: Builder, x: Any, y: Any, *, alpha: float = 1) -> Any:
    """Sum of tensors of one shape, or of a tensor and a constant."""
    if alpha != 1:
        y = multiply(b, y, alpha) if isinstance(y, Value) else y * alpha
    return _binary(b, x, y, add_constant, _add_values)


def _add_values(b: Builder, x: Value, y: Value) -> Value:
    if (x.source, x.shape) == (y.source, y.shape) and x.whole and y.whole and torch.equal(x.elements, y.elements):
        return x.of(b.add(AddStep(b.unique(b.layer_name()), (x.name, y.name), x.source)).name)
    x, y, shape = _broadcast(b, x, y)
    names = (b.map(x), b.map(y))
    return _shaped(b.add(AddStep(b.unique(b.layer_name()), names, b.shape(names[0]))), shape)


def _shaped(value: Value, shape: tuple[int, ...]) -> Value:
    return Value(value.name, value.source, shape)


def subtract(b: Builder, x: Any, y: Any, *, alpha: float = 1) -> Any:
    """Difference."""
    return add(b, x, multiply(b, y, -alpha) if isinstance(y, Value) else -alpha * y)


def times(b: Builder, x: Any, y: Any) -> Any:
    """Product with a constant, of two tensors of one shape, or of a tensor and a gate for each channel."""
    return _binary(b, x, y, multiply, _multiply_values)


def _multiply_values(b: Builder, x: Value, y: Value) -> Value:
    if (x.source, x.shape) == (y.source, y.shape) and x.whole and y.whole and torch.equal(x.elements, y.elements):
        return x.of(b.add(MulStep(b.unique(b.layer_name()), (x.name, y.name), x.source)).name)
    shape = tuple(torch.broadcast_shapes(x.shape, y.shape))
    for full, gate in ((x, y), (y, x)):
        wide = gate.moved(gate.elements.expand(shape)).as_map()
        placed = place(wide)
        if full.shape == shape and placed is not None and placed.broadcasts(gate.source) and wide.shape[2:] != (1, 1):
            names = (b.map(full), b.map(gate.moved(wide.elements[:, :, :1, :1])))
            return _shaped(b.add(MulStep(b.unique(b.layer_name()), names, b.shape(names[0]))), shape)
    x, y, shape = _broadcast(b, x, y)
    names = (b.map(x), b.map(y))
    return _shaped(b.add(MulStep(b.unique(b.layer_name()), names, b.shape(names[0]))), shape)


def divide(b: Builder, x: Any, y: Any) -> Any:
    """Quotient by a constant."""
    if isinstance(y, Value):
        raise b.unsupported("divides by a tensor, which has no fixed-point form")
    return multiply(b, x, 1.0 / y)


def concatenate(b: Builder, tensors: Any, dim: int = 0) -> Any:
    """Tensors one after the other along any axis; the codes are stored along the channels."""
    parts: list[Value] = list(tensors)
    if not all(isinstance(part, Value) for part in parts):
        raise b.unsupported("joins a tensor with a constant, which has no fixed-point form")
    if len(parts) == 1:
        return parts[0]
    if dim % len(parts[0].shape) != 1:
        raise b.unsupported(f"joins tensors along axis {dim}, only channels can be joined")
    names = tuple(b.map(part) for part in parts)
    channels = sum(b.shape(name)[0] for name in names)
    out = b.add(ConcatStep(b.unique(b.layer_name()), names, (channels, *b.shape(names[0])[1:])))
    return _shaped(out, (1, channels, *parts[0].shape[2:]))


def mean(b: Builder, x: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Value:
    """Mean over the pixels."""
    return _reduce(b, x, dim, keepdim or kwargs.get("keepdims", False), global_pool)


def maximum(b: Builder, x: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Value:
    """Largest value over the pixels."""
    pool = lambda b, v: max_pool(b, v, v.shape[2:])  # noqa: E731
    return _reduce(b, x, dim, keepdim or kwargs.get("keepdims", False), pool)


def _reduce(b: Builder, x: Value, dim: Any, keepdim: bool, pool: Callable[[Builder, Value], Value]) -> Value:
    rank = len(x.shape)
    dims = sorted(d % rank for d in ((dim,) if isinstance(dim, int) else dim or range(1, rank)))
    kept = [d for d in range(1, rank) if d not in dims]
    if rank != 4 or len(dims) != 2 or 0 in dims:
        raise b.unsupported(f"reduces axes {dims} of {rank}; only both axes of a map can be reduced")
    out = pool(b, x.moved(x.elements.permute(0, *kept, *dims))) if kept != [1] else pool(b, x)
    shape = [1 if d in dims else n for d, n in enumerate(x.shape) if keepdim or d not in dims]
    return _shaped(out, tuple(shape))


def total(b: Builder, x: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Value:
    """Sum over the pixels."""
    out = mean(b, x, dim, keepdim, **kwargs)
    return multiply(b, out, math.prod(x.shape) / math.prod(out.shape))


def _pad(b: Builder, x: Value, pad: Any, mode: str = "constant", value: float | None = None) -> Value:
    if mode == "circular":
        return x.moved(F.pad(x.elements.double(), tuple(pad), mode).long())
    if mode != "constant" or value:
        raise b.unsupported(f"pads with '{value if mode == 'constant' else mode}', only zeros are supported")
    return x.moved(F.pad(x.elements, tuple(pad), value=-1))


def _attribute(b: Builder, x: Any, name: str, *default: Any) -> Any:
    if not isinstance(x, Value):
        return getattr(x, name, *default)
    known = {"shape": torch.Size(x.shape), "ndim": len(x.shape), "dtype": torch.float64, "device": torch.device("cpu")}
    if name not in known:
        raise b.unsupported(f"asks for '{name}' of a tensor")
    return known[name]


def _move(function: Callable[..., Any]) -> Rule:
    def rule(b: Builder, x: Value, *args: Any, **kwargs: Any) -> Any:
        moved = function(x.elements, *args, **kwargs)
        return tuple(x.moved(part) for part in moved) if isinstance(moved, tuple | list) else x.moved(moved)

    return rule


def _unary(function: str) -> Rule:
    return lambda b, x, *args, **kwargs: look_up(b, x, function)


def _gelu(b: Builder, x: Value, approximate: str = "none") -> Value:
    return look_up(b, x, "gelu" if approximate == "none" else "gelu_tanh")


def _relu(b: Builder, x: Value, inplace: bool = False) -> Value:
    return rectify(b, x, None)


def _same(b: Builder, x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


def _clamp(b: Builder, x: Value, min: float | None = None, max: float | None = None) -> Value:
    if min != 0:
        raise b.unsupported(f"clamps to {min} ... {max}, only a lower bound of 0 is supported")
    return rectify(b, x, max)


def _index(b: Builder, x: Any, key: Any) -> Any:
    return x.moved(x.elements[key]) if isinstance(x, Value) else x[key]


def _size(b: Builder, x: Value, dim: int | None = None) -> Any:
    return torch.Size(x.shape) if dim is None else x.shape[dim]


_MOVING = (
    "flatten", "reshape", "view", "squeeze", "unsqueeze", "transpose", "permute", "movedim", "swapaxes", "chunk", "split", "unbind",
    "narrow", "expand", "repeat", "repeat_interleave", "roll", "flip", "unflatten", "contiguous", "clone", "detach", "tile",
)  # fmt: skip


def _mover(name: str) -> Rule:
    return _move(lambda index, *args, **kwargs: getattr(index, name)(*args, **kwargs))


FUNCTIONS: dict[str, Rule] = {
    **{name: _mover(name) for name in _MOVING},
    "channel_shuffle": _move(F.channel_shuffle), "native_channel_shuffle": _move(F.channel_shuffle),
    "pixel_shuffle": _move(F.pixel_shuffle), "pixel_unshuffle": _move(F.pixel_unshuffle),
    "expand_as": lambda b, x, other: x.moved(x.elements.expand(other.shape)),
    "view_as": lambda b, x, other: x.moved(x.elements.reshape(other.shape)),
    "reshape_as": lambda b, x, other: x.moved(x.elements.reshape(other.shape)),
    "getitem": _index, "getattr": _attribute, "size": _size, "dim": lambda b, x: len(x.shape), "pad": _pad,
    "add": add, "iadd": add, "sub": subtract, "isub": subtract, "rsub": lambda b, x, y: subtract(b, y, x),
    "mul": times, "imul": times, "multiply": times, "div": divide, "truediv": divide, "itruediv": divide,
    "neg": lambda b, x: multiply(b, x, -1.0),
    "cat": concatenate, "concat": concatenate, "mean": mean, "sum": total, "amax": maximum,
    "relu": _relu, "relu6": lambda b, x, inplace=False: rectify(b, x, 6.0), "clamp": _clamp, "dropout": _same, "float": _same, "to": _same,
    "type_as": _same, "type": _same, "sigmoid": _unary("sigmoid"), "tanh": _unary("tanh"), "silu": _unary("silu"), "mish": _unary("mish"),
    "hardswish": _unary("hard_swish"), "hardsigmoid": _unary("hard_sigmoid"), "gelu": _gelu, "softplus": _unary("softplus"),
    "leaky_relu": lambda b, x, negative_slope=0.01, inplace=False: leaky_relu(b, x, negative_slope),
    "elu": lambda b, x, alpha=1.0, inplace=False: look_up(b, x, f"elu:{alpha!r}"),
    "conv2d": convolve, "linear": linear, "max_pool2d": max_pool, "avg_pool2d": average_pool,
    "adaptive_avg_pool2d": adaptive_pool, "adaptive_max_pool2d": adaptive_max_pool, "interpolate": enlarge,
}  # fmt: skip
"""By name; a method `name_` in place has the rule of `name`."""


def rule_for(target: Any) -> Rule | None:
    """Rule of a function (or of a method's name)."""
    name = target if isinstance(target, str) else str(getattr(target, "__name__", ""))
    if name == "boolean_dispatch" or name == "fn":  # what PyTorch wraps its pooling functions in
        name = "max_pool2d" if target is F.max_pool2d else "adaptive_max_pool2d" if target is F.adaptive_max_pool2d else name
    return FUNCTIONS.get(name) or FUNCTIONS.get(name.rstrip("_"))
