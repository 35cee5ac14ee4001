"""Lower a trained FixedPointNet to the IntegerGraph: weights and biases as integers, formats on every edge, bounds proven."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeft.bounds import FLOAT32_EXACT, INT32_LIMIT, accumulator_bounds, exact_in_float32, largest_code, shifted
from edgeft.errors import UnsupportedError
from edgeft.fixedpoint import FixedPointFormat, quantize
from edgeft.graph import (
    Add,
    Concat,
    Conv,
    Flatten,
    GlobalPool,
    IntegerGraph,
    Linear,
    Lookup,
    MaxPool,
    Mul,
    Op,
    Residual,
    Resize,
    Select,
    Tensor,
)
from edgeft.quant.formats import FormatTable, LayerFormats, weight_format
from edgeft.quant.net import FixedPointNet
from edgeft.quant.plan import (
    IMAGE,
    AddStep,
    ConcatStep,
    ConvStep,
    FlattenStep,
    GlobalPoolStep,
    LinearStep,
    MaxPoolStep,
    MulStep,
    ResizeStep,
    SelectStep,
    Step,
    TableStep,
    Weighted,
)
from edgeft.quant.points import is_wide
from edgeft.quant.rescale import image_format

MAX_NARROWING = 8
"""Bits that a weight format may lose to the bounds."""


def integers(net: FixedPointNet, step: Weighted) -> tuple[NDArray[np.int8], NDArray[np.int32]]:
    """Weight codes and bias codes of a layer. Raises UnsupportedError when the bias does not fit 32 bits."""
    weight, bias = _codes(net, step)
    if float(bias.abs().max()) >= INT32_LIMIT:
        raise UnsupportedError(
            f"layer '{step.name}': its bias does not fit 32 bits at fraction {int(net.layer(step.name).bias_frac.max())}"
        )
    return weight.round().cpu().numpy().astype(np.int8), bias.round().cpu().numpy().astype(np.int32)


@torch.no_grad()
def _codes(net: FixedPointNet, step: Weighted) -> tuple[torch.Tensor, torch.Tensor]:
    layer = net.layer(step.name)
    weight = layer.rounded_weight().double() * torch.exp2(layer.body.frac.double())
    bias = layer.rounded_bias().double() * torch.exp2(layer.bias_frac.double())
    if not bool(torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise UnsupportedError(f"layer '{step.name}' has weights that are not finite numbers")
    return weight, bias


def enforce_bounds(net: FixedPointNet) -> list[str]:
    """Coarsen weight formats until float32 runtimes and 32-bit accumulators are exact; returns the layers that were narrowed.

    A float32 accumulator is exact up to 2^24. Beyond that a hidden layer is safe only if its output saturates anyway (eq. 14, eq. 22);
    logits are not saturated, so theirs must stay within. Raises UnsupportedError.
    """
    narrowed = []
    for step in net.plan.weighted():
        if isinstance(step, ConvStep) and step.fixed:
            continue
        bits = 0
        while not _exact(net, step):
            if bits == MAX_NARROWING:
                raise UnsupportedError(f"layer '{step.name}': no weight format keeps its accumulator exact")
            net.set_weight_fracs(step.name, tuple(f - 1 for f in net.weight_fracs(step.name)))
            bits += 1
        if bits:
            narrowed.append(step.name)
    return narrowed


def _exact(net: FixedPointNet, step: Weighted) -> bool:
    if float(_codes(net, step)[1].abs().max()) >= INT32_LIMIT:
        return False
    bounds = accumulator_bounds(*integers(net, step), net.format(step.inputs[0]))
    if step.name == net.plan.output or int(bounds.max()) >= INT32_LIMIT:
        return int(bounds.max()) <= FLOAT32_EXACT
    fracs = net.frac(step.inputs[0]) + np.array(net.weight_fracs(step.name), np.int64)
    add = net.plan.rounded_in(step.name)
    if add == step.name:
        return exact_in_float32(bounds, 0, fracs - net.frac(step.name), net.format(step.name))
    skip = next(name for name in net.plan[add].inputs if name != step.name)
    finer = np.maximum(fracs, net.frac(skip))
    others = shifted(largest_code(net.format(skip)), finer - net.frac(skip))
    sums = shifted(bounds, finer - fracs) + others
    fits = int(shifted(sums, finer.max() - finer).max()) < INT32_LIMIT
    return fits and exact_in_float32(sums, others, finer - net.frac(add), net.format(add))


def lower(net: FixedPointNet) -> IntegerGraph:
    """IntegerGraph with the same integers as the eval-mode training graph."""
    constants: dict[str, NDArray[Any]] = {}
    tensors = {IMAGE: Tensor(IMAGE, net.plan.image_shape, image_format(net.plan))}
    ops: list[Op] = []
    for step in net.plan.steps:
        op = _lower_step(net, step, constants)
        tensors[step.name] = Tensor(step.name, step.shape, _output_format(net, step))
        ops.append(op)
    residual: Residual = "wide" if any(is_wide(step) for step in net.plan.steps) else "branch"
    return IntegerGraph(tensors, tuple(ops), IMAGE, net.profile, residual, constants=constants)  # type: ignore[arg-type]


def _output_format(net: FixedPointNet, step: Step) -> FixedPointFormat:
    if step.name != net.plan.output:
        return net.format(step.name)
    return FixedPointFormat(32, net.frac(step.inputs[0]) + net.weight_fracs(step.name)[0], signed=True)


def _lower_step(net: FixedPointNet, step: Step, constants: dict[str, NDArray[Any]]) -> Op:
    source = step.inputs[0]
    match step:
        case ConvStep() | LinearStep():
            weight, bias = f"{step.name}.weight", f"{step.name}.bias"
            constants[weight], constants[bias] = integers(net, step)
            fracs = net.weight_fracs(step.name)
            if isinstance(step, LinearStep):
                return Linear(step.name, source, weight, bias, fracs, step.relu)
            return Conv(step.name, source, weight, bias, fracs, step.stride, step.padding, step.dilation, step.groups, step.relu)
        case AddStep():
            return Add(step.name, source, step.inputs[1], step.relu)
        case MulStep():
            return Mul(step.name, source, step.inputs[1])
        case ConcatStep():
            return Concat(step.name, step.inputs)
        case SelectStep():
            return Select(step.name, source, step.index)
        case ResizeStep():
            return Resize(step.name, source, step.factor)
        case TableStep():
            constants[f"{step.name}.table"] = quantize(net.table(step.name).values.cpu().double().numpy(), net.format(step.name)).astype(
                np.int16
            )
            return Lookup(step.name, source, f"{step.name}.table")
        case MaxPoolStep():
            return MaxPool(step.name, source, step.kernel, step.stride, step.padding)
        case GlobalPoolStep():
            return GlobalPool(step.name, source, step.divisor_log2)
        case FlattenStep():
            return Flatten(step.name, source)
    raise UnsupportedError(f"layer '{step.name}' ({type(step).__name__}) has no integer form")


def format_table(
    net: FixedPointNet, graph: IntegerGraph, rule: str, granularity: str, sigmas: dict[str, float], choices: dict[str, Any] | None = None
) -> FormatTable:
    """What was chosen for every layer and activation, and why where `choices` has it, for the artifact and the report."""
    layers = {}
    for op in graph.ops:
        if isinstance(op, Conv | Linear):
            output = None if op.output == graph.output else graph.format(op.output)
            sigma = float(net.layer(op.output).weight.detach().double().std(correction=0))
            bits = graph.accumulator_bound(op).bit_length() + 1
            weights = tuple(weight_format(frac) for frac in op.weight_frac)
            layers[op.output] = LayerFormats(weights, graph.format(op.input), output, sigma, bits)
    activations = {p.name: graph.format(p.name) for p in net.points}
    return FormatTable(rule, granularity, layers, activations, sigmas, choices or {})
