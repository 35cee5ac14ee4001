"""Narrow accumulators: weights held so small that no partial sum can leave `bits` signed bits, whatever the input.

After A2Q (Colbert et al., ICCV 2023, arXiv:2308.13504), which bounds the L1 norm of each output channel's integer weights. Here the
bound is `edgeft.bounds.accumulator_bound`: with an unsigned input, positive and negative weights each have the whole budget (as in
A2Q+, ICML 2024, arXiv:2401.10432), and the bias counts. Instead of learning norms, training is projected gradient descent: weights
go to the nearest ones whose *rounded* codes fit, so that rounding to nearest is part of the guarantee.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeft.bounds import accumulator_bound, accumulator_bounds, largest_code, shifted
from edgeft.errors import UnsupportedError
from edgeft.fixedpoint import FixedPointFormat
from edgeft.quant.calibration.compensate import channel_means
from edgeft.quant.fakequant import power_of_two
from edgeft.quant.lower import integers
from edgeft.quant.net import FixedPointNet
from edgeft.quant.plan import IMAGE, AddStep, ConvStep, GlobalPoolStep, MulStep, Step, Weighted, rectify, run_step
from edgeft.quant.points import is_wide

UNLIMITED = 32
"""Bits at which nothing is projected: lowering keeps every accumulator below 2^31 anyway."""
COARSER = 8
"""Bits by which a weight format may be coarsened to fit."""
HALVINGS = 16
"""Steps of the search for a threshold, each of which halves the interval: down to 1/500 of a code, below which entries tie."""
BELOW_HALF = 0.5 - 2.0**-8
"""What is added to a lowered code: as far up as surely rounds down to it."""
PEAK = 4.0
"""Top of an activation's format over the root mean square that weight errors are weighed with."""


def largest(bits: int) -> int:
    """Largest magnitude that an accumulator may have, 2^(bits - 1) - 1."""
    return (1 << (bits - 1)) - 1


def _budgets(bias: Tensor, fmt: FixedPointFormat, bits: int) -> Tensor:
    """Sums of weight codes allowed for each channel, for bias codes [out]: [2, out] of either sign, or [1, out] of all magnitudes."""
    if not fmt.signed:
        return ((largest(bits) - torch.stack((bias, -bias)).clamp(min=0.0)) / fmt.max_code).floor()
    return ((largest(bits) - bias.abs()) / -fmt.min_code).floor()[None]


def shrink(sizes: Tensor, budget: Tensor) -> Tensor:
    """The nearest rows to nonnegative `sizes` [n, k] whose *rounded* entries sum to at most `budget` [n] (whole numbers).

    Rounding is nearest where codes are lowered in the order of what that costs: down to round(size - threshold) with the least
    threshold that suffices, and of entries that tie at it no more than needed. Each entry moves just as far as its code asks; the
    others, and rows that fit, stay as they are. A soft threshold would move all of a row close to where the next step flips them.
    """
    too_large = sizes.round().sum(1) > budget
    if not bool(too_large.any()):
        return sizes
    found = sizes.clone()
    found[too_large] = _shrunk(sizes[too_large], budget[too_large])
    return found


def _shrunk(sizes: Tensor, budget: Tensor) -> Tensor:
    low, high = torch.zeros_like(budget), sizes.amax(1).to(budget)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = _codes(sizes, middle).sum(1) <= budget
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    fewer, more = _codes(sizes, high), _codes(sizes, low)
    codes = fewer + _first(more - fewer, sizes, budget - fewer.sum(1))
    return torch.where(codes == sizes.round(), sizes, (codes + BELOW_HALF).to(sizes))


def _codes(sizes: Tensor, threshold: Tensor) -> Tensor:
    return (sizes - threshold[:, None].to(sizes)).clamp_(min=0.0).round_()


def _first(tied: Tensor, sizes: Tensor, n: Tensor) -> Tensor:
    """Of the `tied` entries (1, others 0) the `n` [rows] largest by size."""
    order = torch.where(tied > 0, sizes, -1.0).argsort(dim=1, descending=True, stable=True)
    ordered = tied.gather(1, order)
    return torch.zeros_like(tied).scatter(1, order, ordered * (ordered.cumsum(1) <= n[:, None]))


@torch.no_grad()
def projected(
    weight: Tensor, bias: Tensor, weight_frac: Tensor, bias_frac: Tensor, fmt: FixedPointFormat, bits: int
) -> tuple[Tensor, Tensor]:
    """The nearest weight [out, ...] and bias [out] whose codes keep an accumulator over inputs of `fmt` within `bits` signed bits.

    `weight_frac` has no dimension or broadcasts over the output channels of `weight`. A bias may take half of the range.
    """
    half = largest(bits) // 2
    scale = power_of_two(bias_frac)
    bias = (bias * scale).clamp(-half, half) / scale
    codes = (weight * power_of_two(weight_frac)).clamp(-127.0, 127.0).flatten(1)  # exact: the scale is a power of two
    budgets = _budgets((bias * scale).double().round(), fmt, bits)
    parts = torch.stack((codes.clamp(min=0.0), -codes.clamp(max=0.0))) if len(budgets) == 2 else codes.abs()[None]
    kept = shrink(parts.flatten(0, 1), budgets.flatten()).view_as(parts)
    codes = kept[0] - kept[1] if len(budgets) == 2 else torch.copysign(kept[0], codes)
    return codes.view_as(weight) / power_of_two(weight_frac), bias


def _trained(net: FixedPointNet) -> list[Weighted]:
    return [step for step in net.plan.weighted() if not (isinstance(step, ConvStep) and step.fixed)]


@torch.no_grad()
def project(net: FixedPointNet, bits: int) -> None:
    """Project the weights and biases of every layer, in place, at the formats in force. Nothing happens at 32 bits."""
    for step in _trained(net):
        project_layer(net, step, bits)


@torch.no_grad()
def project_layer(net: FixedPointNet, step: Weighted, bits: int) -> None:
    """The same for one layer."""
    if bits < UNLIMITED:
        layer = net.layer(step.name)
        weight, bias = projected(layer.weight, layer.bias, layer.body.frac, layer.bias_frac, net.format(step.inputs[0]), bits)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)


@torch.no_grad()
def choose_formats(net: FixedPointNet, bits: int) -> list[str]:
    """Coarsen weight formats where projected and rounded weights then are nearer to the present ones; returns the layers changed.

    A fine format spends the budget on few weights; a coarse one rounds many. Nothing happens at 32 bits.
    """
    changed = []
    for step in _trained(net) if bits < UNLIMITED else []:
        fracs = torch.tensor(net.weight_fracs(step.name))
        errors = torch.stack([_error(net, step, fracs - coarser, bits) for coarser in range(COARSER + 1)])
        best = errors.sum(1, keepdim=True).argmin(0) if len(fracs) == 1 else errors.argmin(0).cpu()
        if bool(best.any()):
            net.set_weight_fracs(step.name, tuple((fracs - best.cpu()).tolist()))
            changed.append(step.name)
    return changed


def _error(net: FixedPointNet, step: Weighted, fracs: Tensor, bits: int) -> Tensor:
    """Expected squared error of each output channel at other weight fractions."""
    layer, fmt = net.layer(step.name), net.format(step.inputs[0])
    weight_frac = fracs.to(layer.weight).view(-1, *[1] * (layer.weight.ndim - 1))
    bias_frac = fracs.to(layer.bias).expand(layer.bias.shape) + fmt.frac
    weight, bias = projected(layer.weight, layer.bias, weight_frac, bias_frac, fmt, bits)
    rounded = (weight * power_of_two(weight_frac)).round() / power_of_two(weight_frac)
    power = (fmt.max_value / PEAK) ** 2
    return power * (rounded - layer.weight).square().flatten(1).sum(1) + (bias - layer.bias).square()


@torch.no_grad()
def fit(net: FixedPointNet, images: Tensor, bits: int) -> None:
    """Choose formats and project layer by layer in network order, on calibration images [n, 3, h, w]. Nothing happens at 32 bits.

    What a projection takes from a channel's mean goes into its bias: each layer sees the inputs that it will have, and keeps the
    channel means of the float plan. Without this a narrow net is of no use before it is trained.
    """
    if bits >= UNLIMITED:
        return
    choose_formats(net, bits)
    plan, trained, last_use = net.plan, {step.name for step in _trained(net)}, net.plan.last_use()
    encoded = plan.encode(images)
    exact, rounded = {IMAGE: encoded}, {IMAGE: encoded}
    for index, step in enumerate(plan.steps):
        wanted, inputs = run_step(step, [exact[name] for name in step.inputs]), [rounded[name] for name in step.inputs]
        if isinstance(step, Weighted) and step.name in trained:
            project_layer(net, step, bits)
            layer = net.layer(step.name)
            layer.bias.copy_(layer.rounded_bias() + channel_means(wanted) - channel_means(net.run_step(step, inputs)))
            project_layer(net, step, bits)
        rounded[step.name] = net.activate(step, net.run_step(step, inputs))
        exact[step.name] = rectify(step, wanted)
        for name in set(step.inputs):
            if last_use[name] == index:
                del exact[name], rounded[name]


def prepare(net: FixedPointNet, bits: int) -> None:
    """Choose formats and project, before training. Nothing happens at 32 bits.

    Raises UnsupportedError for a layer that nothing can make fit: a pool, an addition, constant weights.
    """
    if bits < UNLIMITED:
        trained = {step.name for step in _trained(net)}
        for step in net.plan.steps:
            if step.name not in trained:
                _check_step(net, step, bits)
        choose_formats(net, bits)
        project(net, bits)


@contextmanager
def held(net: FixedPointNet, bits: int) -> Iterator[None]:
    """`prepare`, then project before every forward pass while active, which makes training inside projected gradient descent.

    Weight formats must not be moved meanwhile. Nothing happens at 32 bits. Raises UnsupportedError at the start for a layer that
    nothing can make fit, and at the end for any that does not fit.
    """
    if bits >= UNLIMITED:
        yield
        return
    prepare(net, bits)
    handle = net.register_forward_pre_hook(_Projection(bits))
    try:
        yield
    finally:
        handle.remove()
    project(net, bits)
    check(net, bits)


class _Projection:
    """The hook of `held`; evaluation projects once for many batches."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._seen: tuple[int, ...] = ()

    def __call__(self, module: nn.Module, args: Any) -> None:
        assert isinstance(module, FixedPointNet)
        versions = self._versions(module)
        if versions != self._seen:
            project(module, self._bits)
            self._seen = self._versions(module)

    def _versions(self, net: FixedPointNet) -> tuple[int, ...]:
        return tuple(tensor._version for layer in net.layers.children() for tensor in (*layer.parameters(), *layer.buffers()))


def check(net: FixedPointNet, bits: int) -> None:
    """Prove from the integers that no partial sum of any step can leave `bits` signed bits, in any order of summation.

    Raises UnsupportedError that names the first layer whose sums can. At 32 bits, lowering proves it.
    """
    for step in net.plan.steps if bits < UNLIMITED else []:
        _check_step(net, step, bits)


def _check_step(net: FixedPointNet, step: Step, bits: int) -> None:
    bound = _bound(net, step)
    if bound > largest(bits):
        raise UnsupportedError(
            f"layer '{step.name}': its accumulator may need {bound.bit_length() + 1} bits; quant.accumulator_bits allows {bits}",
            f"--set quant.accumulator_bits={bound.bit_length() + 1}",
        )


def _bound(net: FixedPointNet, step: Step) -> int:
    """Largest magnitude of any partial sum of a step; 0 for steps that sum nothing."""
    formats = [net.format(name) for name in step.inputs]
    largest_codes = [_largest(net, name) for name in step.inputs]
    if isinstance(step, Weighted):
        return accumulator_bound(*integers(net, step), formats[0])
    if isinstance(step, AddStep):
        finest = max(fmt.frac for fmt in formats)
        return sum(code << (finest - fmt.frac) for code, fmt in zip(largest_codes, formats, strict=True))
    if isinstance(step, MulStep):
        return largest_codes[0] * largest_codes[1]
    if isinstance(step, GlobalPoolStep):
        source = net.plan.producer(step.inputs[0])
        shape = source.shape if source is not None else net.plan.image_shape
        return largest_codes[0] * shape[1] * shape[2]
    return 0


def _largest(net: FixedPointNet, name: str) -> int:
    """Largest |code| of a tensor; of accumulators that an addition reads, in their common step."""
    step = net.plan.producer(name)
    if not isinstance(step, ConvStep) or not is_wide(step):
        return largest_code(net.format(name))
    fracs = np.array(net.weight_fracs(name), np.int64)
    bounds = accumulator_bounds(*integers(net, step), net.format(step.inputs[0]))
    return int(shifted(bounds, fracs.max() - fracs).max())
