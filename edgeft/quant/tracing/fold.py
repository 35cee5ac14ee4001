"""Rectification, batch norm, scaling and constants, joined to the step that makes their input where nothing else reads it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from edgeft.quant.plan import (
    IDENTITY_FRAC,
    AddStep,
    ConcatStep,
    ConvStep,
    GlobalPoolStep,
    LinearStep,
    MaxPoolStep,
    MulStep,
    ResizeStep,
    SelectStep,
    Step,
    TableStep,
)
from edgeft.quant.tracing.builder import Builder
from edgeft.quant.tracing.values import Value

MAX_CODE = 127
"""Largest code of a constant weight."""


def rectify(b: Builder, x: Value, clip: float | None) -> Value:
    """ReLU, bounded by `clip` for ReLU6: at the step that makes `x`, or a convolution with the identity that rectifies."""
    if clip is None and b.nonnegative(x.name):
        return x
    steps = _rectifiable(b, x.name)
    if steps is not None:
        for step in steps:
            step.relu, step.clip = True, clip
        return x
    x = movable(b, x)
    channels = b.shape(x.name)[0]
    unit = torch.ones(channels, 1, 1, 1, dtype=torch.float64)
    out = b.fixed_conv(b.layer_name(), x.name, unit, b.shape(x.name), IDENTITY_FRAC, groups=channels)
    b.steps[out.name].relu, b.steps[out.name].clip = True, clip
    return x.of(out.name)


def _rectifiable(b: Builder, name: str, reader: str | None = None) -> list[Step] | None:
    """The steps to rectify so that `name`, which only `reader` (default: the node at hand) may read, is; None if that cannot be."""
    step = b.steps.get(name)
    if step is None or step.relu or not b.only_reader(name, None if reader is None else b.origin(reader)):
        return None
    if isinstance(step, ConvStep | AddStep | LinearStep):
        return [step]
    if isinstance(step, ConcatStep | MaxPoolStep | ResizeStep):
        parts = [_rectifiable(b, source, name) for source in dict.fromkeys(step.inputs)]
        found = [part for part in parts if part is not None]
        return [one for part in found for one in part] if len(found) == len(parts) else None
    return None


def movable(b: Builder, x: Value) -> Value:
    """`x` itself if it holds its whole tensor in any order (which functions of each element commute with), else a tensor of its own."""
    if x.whole:
        return x
    name = b.map(x)
    return Value(name, b.shape(name), x.shape)


def affine(b: Builder, x: Value, factor: Tensor, offset: Tensor, norm: Tensor | None) -> Value:
    """Batch norm: factor * x + offset per channel of the source [c, h, w]; `norm` as in ConvStep."""
    step = b.sole_source(x)
    if isinstance(step, ConvStep) and not step.fixed:
        _scale(step, factor)
        step.bias, step.norm = step.bias + offset, norm
        return x
    return depthwise(b, x, factor, offset, norm)


def depthwise(b: Builder, x: Value, factor: Tensor, offset: Tensor, norm: Tensor | None = None) -> Value:
    """factor * x + offset per channel as a depthwise convolution of its own: constant where an 8-bit weight is exact."""
    shape = b.shape(x.name)
    frac = exact_frac(factor)
    step = ConvStep(
        b.unique(b.layer_name()), (x.name,), shape, weight=factor.view(-1, 1, 1, 1), bias=offset, groups=shape[0], norm=norm,
        fixed_frac=frac if norm is None else None,
    )  # fmt: skip
    return x.of(b.add(step).name)


def exact_frac(weight: Tensor) -> int | None:
    """Fraction at which all weights are codes that use the 8-bit range; None where there is none."""
    peak = float(weight.abs().max())
    if not math.isfinite(peak) or peak == 0.0:
        return None
    frac = math.floor(math.log2(MAX_CODE / peak))
    codes = weight * 2.0**frac
    return frac if bool((codes == codes.round()).all()) else None


def multiply(b: Builder, x: Value, constant: Tensor | float) -> Value:
    """x * constant, a number or one for each channel: in the step that makes `x` if that can be, else a depthwise convolution."""
    x = movable(b, x)
    factor = per_channel(b, x, constant)
    if bool((factor == 1.0).all()):
        return x
    actions = _absorb(b, x.name, factor, None)
    if actions is None:
        return depthwise(b, x, factor, torch.zeros_like(factor))
    for act in actions:
        act()
    return x


def add_constant(b: Builder, x: Value, constant: Tensor | float) -> Value:
    """x + constant, a number or one for each channel: in the bias of the convolution that makes `x`, or of an identity."""
    x = movable(b, x)
    offset = per_channel(b, x, constant)
    if bool((offset == 0.0).all()):
        return x
    step = b.sole_source(x)
    if isinstance(step, ConvStep):
        step.bias = step.bias + offset
        if step.norm is not None:
            step.norm = torch.stack([step.norm[0] + offset, step.norm[1]])
        return x
    return depthwise(b, x, torch.ones_like(offset), offset)


def per_channel(b: Builder, x: Value, constant: Tensor | float) -> Tensor:
    """A constant that is broadcast over `x` as one number for each channel of the source of `x`."""
    values = torch.as_tensor(constant, dtype=torch.float64).detach()
    if values.numel() == 1:
        return values.reshape(1).expand(x.source[0]).clone()
    if x.index is None and x.shape[1:] == x.source and values.shape in ((1, x.source[0], 1, 1), (x.source[0], 1, 1)):
        return values.flatten().clone()
    try:
        values = values.expand(x.shape)
    except RuntimeError as error:
        raise b.unsupported(f"has a constant of shape {list(values.shape)} for a tensor of shape {list(x.shape)}") from error
    by_source = torch.empty(math.prod(x.source), dtype=torch.float64)
    by_source[x.elements.flatten()] = values.flatten()
    by_source = by_source.view(x.source[0], -1)
    if not torch.allclose(by_source, by_source[:, :1], rtol=0.0, atol=0.0, equal_nan=True):
        raise b.unsupported("has a constant that differs from pixel to pixel")
    return by_source[:, 0].clone()


Actions = list[Callable[[], None]]


def _absorb(b: Builder, name: str, factor: Tensor, reader: str | None) -> Actions | None:
    """What to do for `name` to be multiplied where it is made; None if that cannot be."""
    step = b.steps.get(name)
    if step is None or not b.only_reader(name, None if reader is None else b.origin(reader)):
        return None
    uniform = bool((factor == factor[0]).all())
    if step.relu and not (bool((factor > 0).all()) and (step.clip is None or uniform)):
        return None
    match step:
        case ConvStep() if not step.fixed:
            return [lambda: _scale(step, factor)]
        case TableStep() if uniform and float(factor[0]) > 0:
            return [lambda: _set_gain(step, float(factor[0]))]
        case MulStep() if step.inputs[0] != step.inputs[1]:
            return next((found for s in reversed(step.inputs) if (found := _absorb(b, s, factor, name)) is not None), None)
        case GlobalPoolStep() | ResizeStep():
            return _absorb(b, step.inputs[0], factor, name)
        case MaxPoolStep() if bool((factor > 0).all()):
            return _absorb(b, step.inputs[0], factor, name)
        case AddStep() if step.inputs[0] != step.inputs[1]:
            return _together([_absorb(b, source, factor, name) for source in step.inputs], step, factor)
        case ConcatStep() if len(set(step.inputs)) == len(step.inputs):
            parts = factor.split([b.shape(source)[0] for source in step.inputs])
            return _together([_absorb(b, s, part, name) for s, part in zip(step.inputs, parts, strict=True)], step, factor)
        case SelectStep() if uniform:
            return _absorb(b, step.inputs[0], factor[:1].expand(b.shape(step.inputs[0])[0]).clone(), name)
    return None


def _together(parts: list[Actions | None], step: Step, factor: Tensor) -> Actions | None:
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    return [*(act for part in found for act in part), lambda: _scale_clip(step, factor)]


def _scale(step: ConvStep, factor: Tensor) -> None:
    step.weight = step.weight * factor.view(-1, 1, 1, 1)
    step.bias = step.bias * factor
    if step.norm is not None:
        step.norm = step.norm * torch.stack([factor, factor.abs()])
    _scale_clip(step, factor)


def _scale_clip(step: Step, factor: Tensor) -> None:
    if step.clip is not None:
        step.clip *= float(factor[0])


def _set_gain(step: TableStep, factor: float) -> None:
    step.output_gain *= factor
