"""Scaling a tensor of a plan without changing the function: its readers take the factor back, through everything that passes it on."""

from collections.abc import Callable

import torch
from torch import Tensor

from edgeft.quant.plan import (
    IMAGE,
    ConcatStep,
    ConvStep,
    FlattenStep,
    GlobalPoolStep,
    LinearStep,
    MaxPoolStep,
    MulStep,
    Plan,
    ResizeStep,
    SelectStep,
    Step,
    TableStep,
)

Actions = list[Callable[[], None]]


def channels_of(plan: Plan, name: str) -> int:
    """Number of channels of a tensor."""
    step = plan.producer(name)
    return plan.image_shape[0] if step is None else step.shape[0]


def scale_readers(plan: Plan, name: str, factor: Tensor, offset: Tensor | None = None) -> bool:
    """Make all readers of `name` read factor * x + offset (one entry per channel, factors above 0); False if one of them cannot.

    Convolutions, linear layers and tables take it into their constants; pools, moves, constant convolutions and products pass it on.
    Nothing is changed where the answer is False. An offset ignores that padding stays 0.
    """
    actions = _reading(plan, name, factor, offset)
    for act in actions or []:
        act()
    return actions is not None


def _reading(plan: Plan, name: str, factor: Tensor, offset: Tensor | None) -> Actions | None:
    found: Actions = []
    for step in plan.consumers(name):
        actions = _reader(plan, step, name, factor, offset)
        if actions is None:
            return None
        found += actions
    return found


def _reader(plan: Plan, step: Step, name: str, factor: Tensor, offset: Tensor | None) -> Actions | None:
    if isinstance(step, ConvStep) and step.fixed:
        return _through_constants(plan, step, factor, offset)
    if isinstance(step, ConvStep | LinearStep):
        return [lambda: scale_input(step, factor, offset)]
    if isinstance(step, TableStep):
        return [lambda: _set_input_gain(step, factor)] if offset is None and bool((factor == factor[0]).all()) else None
    passed = _passed_on(plan, step, name, factor)
    if passed is None or (offset is not None and isinstance(step, MulStep)) or step.relu:
        return None
    moved = None if offset is None else _passed_on(plan, step, name, offset, other=0.0)
    if moved is not None and isinstance(step, GlobalPoolStep):
        shape = plan.image_shape if name == IMAGE else plan[name].shape
        moved = moved * (shape[1] * shape[2] * 2.0**-step.divisor_log2)
    return _reading(plan, step.name, passed, moved)


def _passed_on(plan: Plan, step: Step, name: str, values: Tensor, other: float = 1.0) -> Tensor | None:
    """Per-channel values of an input as they appear in the output; `other` for the channels of other inputs."""
    match step:
        case MaxPoolStep() | ResizeStep() | GlobalPoolStep():
            return values
        case SelectStep():
            return values[list(step.index)]
        case FlattenStep():
            return values.repeat_interleave(step.shape[0] // len(values))
        case MulStep() if step.inputs[0] != step.inputs[1]:
            return values
        case ConcatStep():
            parts = [values if source == name else values.new_full((channels_of(plan, source),), other) for source in step.inputs]
            return torch.cat(parts)
    return None


def _through_constants(plan: Plan, step: ConvStep, factor: Tensor, offset: Tensor | None) -> Actions | None:
    """A convolution with constant weights passes a factor on to its readers if no output mixes inputs of different factors."""
    used = (step.weight != 0).double()
    counts = used.sum((1, 2, 3)).clamp(min=1.0)
    out_factor = (used * per_input(step, factor)).sum((1, 2, 3)) / counts
    out_factor = torch.where(used.sum((1, 2, 3)) > 0, out_factor, torch.ones_like(out_factor))
    mixed = bool((used * (per_input(step, factor) - out_factor[:, None, None, None])).abs().max() > 1e-12 * factor.max())
    if mixed or (offset is not None and (step.relu or any(step.padding))):
        return None
    out_offset = None if offset is None else (step.weight * per_input(step, offset)).sum((1, 2, 3))
    readers = _reading(plan, step.name, out_factor, out_offset)
    return None if readers is None else [*readers, lambda: _divide_bias(step, out_factor)]


def _divide_bias(step: ConvStep, factor: Tensor) -> None:
    step.bias = step.bias / factor
    if step.clip is not None:
        step.clip /= float(factor[0])


def _set_input_gain(step: TableStep, factor: Tensor) -> None:
    step.input_gain *= float(factor[0])


def scale_input(step: ConvStep | LinearStep, factor: Tensor, offset: Tensor | None = None) -> None:
    """Make a layer compute from x what it computed from factor * x + offset."""
    if isinstance(step, ConvStep):
        if offset is not None:
            step.bias = step.bias + (step.weight * per_input(step, offset)).sum((1, 2, 3))
        step.weight = step.weight * per_input(step, factor)
    else:
        if offset is not None:
            step.bias = step.bias + step.weight @ offset
        step.weight = step.weight * factor


def scale_output(step: Step, factor: Tensor) -> None:
    """Make a step yield `factor` times as much, a number above 0 for all channels, or one each; its inputs stay as they are."""
    if isinstance(step, ConvStep | LinearStep):
        step.weight = step.weight * factor.view(-1, *(1,) * (step.weight.ndim - 1))
        step.bias = step.bias * factor
        if isinstance(step, ConvStep) and step.norm is not None:
            step.norm = step.norm * factor
    elif isinstance(step, TableStep):
        step.output_gain *= float(factor)


def per_input(step: ConvStep, values: Tensor) -> Tensor:
    """Values per input channel, laid out to multiply [out, in/groups, kh, kw] weights."""
    per_group = values.view(step.groups, -1)
    return per_group.repeat_interleave(step.weight.shape[0] // step.groups, 0)[:, :, None, None]
