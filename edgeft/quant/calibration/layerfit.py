"""One layer fitted to its float outputs at sampled positions: weights rounded with compensation, their format, and the bias."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgeft.quant.calibration.compensate import centred, compensate_rounding, refit
from edgeft.quant.net import FixedPointNet
from edgeft.quant.plan import ConvStep, Plan, Step, Weighted, rectify

SPAN = 8
"""Weight fractions that are tried for a whole layer, upwards from the largest that clips nothing."""
SHORT_LIST = 3
"""Candidates that are rounded with compensation, the best after plain rounding."""
NEWTON_STEPS = 4
"""Steps that move the bias of a rectified layer until the mean output is that of the float layer."""
LEAST_ACTIVE = 0.05
"""Share of unclipped outputs that such a step assumes at the least: what bounds its length."""


@dataclass
class LayerSample:
    """What a layer reads in the quantized net and should write, at sampled positions of the calibration images.

    `inputs` [groups, k, n] are the quantized columns that weights are multiplied with, `exact` those of the float net, in the same
    order. `importance` [out] says what a squared error of each output counts, rectified as the step has it.
    """

    step: Weighted
    inputs: Tensor
    exact: Tensor
    importance: Tensor
    columns: Tensor = field(init=False)
    wanted: Tensor = field(init=False)
    mean: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.columns = centred(self.inputs)
        before = self.rows(self.step.weight) @ self.exact + self.rows(self.step.bias)
        self.mean = before.mean(2, keepdim=True)
        self.wanted = rectify(self.step, before)

    def rows(self, values: Tensor) -> Tensor:
        """Values of each output, [out, ...], as [groups, out/groups, rest]."""
        return values.reshape(len(self.inputs), -1, values[0].numel())

    def target(self) -> Tensor:
        """Weights that are to be rounded: the float ones, refitted to quantized inputs."""
        return refit(self.step.weight, self.columns, centred(self.exact))

    def offset(self, weight: Tensor, gain: Tensor | None = None) -> Tensor:
        """Bias of `weight` on centred columns: mean outputs as in the float net (times `gain` [out] before rectification)."""
        offset = self.mean if gain is None else self.mean * self.rows(gain)
        if not self.step.relu:
            return offset
        products = self.rows(weight) @ self.columns
        ceiling = self.step.clip if self.step.clip is not None else float("inf")
        for _ in range(NEWTON_STEPS):
            before = products + offset
            active = ((before > 0.0) & (before < ceiling)).float().mean(2, keepdim=True).clamp(min=LEAST_ACTIVE)
            offset = offset + (self.wanted - rectify(self.step, before)).mean(2, keepdim=True) / active
        return offset

    def errors(self, weight: Tensor, offset: Tensor) -> Tensor:
        """Weighted mean squared error of each output after its rectification, [out]."""
        found = rectify(self.step, self.rows(weight) @ self.columns + offset)
        return (found - self.wanted).square().mean(2).flatten() * self.importance

    def bias(self, weight: Tensor, offset: Tensor) -> Tensor:
        """The offset as a bias on inputs that are not centred, [out]."""
        return (offset - self.rows(weight) @ self.inputs.mean(2, keepdim=True)).flatten()


@dataclass
class LayerFit:
    """Rounded weights, fractions [out] or [1], `offset` [groups, out/groups, 1] on centred inputs, bias [out], error of each output."""

    weight: Tensor
    fracs: Tensor
    offset: Tensor
    bias: Tensor
    errors: Tensor

    @classmethod
    def of(cls, sample: LayerSample, weight: Tensor, fracs: Tensor, offset: Tensor) -> "LayerFit":
        """With the bias and the errors that follow."""
        return cls(weight, fracs, offset, sample.bias(weight, offset), sample.errors(weight, offset))

    @property
    def error(self) -> float:
        """Sum over outputs."""
        return float(self.errors.sum())


def fit_layer(sample: LayerSample, fracs: Tensor | None, high: int, *, per_channel: bool) -> list[LayerFit]:
    """Weights rounded with compensation at the given fractions, 0-dim or [out]; or, for None, at those that suit the layer.

    For a whole layer these are the ones of least output error: returns the best fit first, then the others that were compared. Each
    channel alone gets the largest that clips nothing, and there is one fit: few columns decide over each, and what clipping gains on
    them does not carry over to other images. Raises torch.linalg.LinAlgError where inputs are degenerate.
    """
    target = sample.target()
    if fracs is not None:
        return [_rounded(sample, target, fracs.flatten(), high)]
    starts = _largest_unclipped(target, high, per_channel=per_channel)
    if per_channel:
        return [_rounded(sample, target, starts, high)]
    fits = [_rounded(sample, target, starts + offset, high) for offset in _short_list(sample, target, starts, high)]
    return sorted(fits, key=lambda fit: fit.error)


def _largest_unclipped(weight: Tensor, high: int, *, per_channel: bool) -> Tensor:
    peaks = weight.flatten(1).abs().amax(1) if per_channel else weight.abs().amax().view(1)
    return torch.floor(torch.log2(high / peaks.clamp(min=1e-12))).clamp(max=24.0)


def _short_list(sample: LayerSample, target: Tensor, starts: Tensor, high: int) -> list[int]:
    errors = []
    for offset in range(SPAN):
        scale = torch.exp2(starts + offset)
        weight = (target * scale).round().clamp(-high, high) / scale
        errors.append(float(sample.errors(weight, sample.mean).sum()))
    return sorted(range(SPAN), key=errors.__getitem__)[:SHORT_LIST]


def _rounded(sample: LayerSample, target: Tensor, fracs: Tensor, high: int) -> LayerFit:
    """Compensated rounding; rows that do not fit are clipped or shrunk as a whole, whichever costs less after rectification."""
    scale = torch.exp2(fracs)
    weight = compensate_rounding(target, scale, sample.columns, high)
    clipped = LayerFit.of(sample, weight, fracs, sample.offset(weight))
    view = (-1, *[1] * (target.ndim - 1))
    gain = (high / scale / target.flatten(1).abs().amax(1).clamp(min=1e-12)).clamp(max=1.0)
    if not bool((gain < 1.0).any()):
        return clipped
    weight = compensate_rounding(target * gain.view(view), scale, sample.columns, high)
    shrunk = LayerFit.of(sample, weight, fracs, sample.offset(weight, gain))
    return _chosen(sample, (clipped, shrunk), (shrunk.errors < clipped.errors).long())


def _chosen(sample: LayerSample, fits: Sequence[LayerFit], which: Tensor) -> LayerFit:
    """Each output from the fit that `which` [out] numbers."""
    weight, fracs, offset = fits[0].weight.clone(), fits[0].fracs.clone(), fits[0].offset.clone()
    for number, fit in enumerate(fits[1:], 1):
        rows = which == number
        weight[rows] = fit.weight[rows]
        offset = torch.where(sample.rows(rows), fit.offset, offset)
        if len(fracs) == len(rows):
            fracs[rows] = fit.fracs[rows]
    return LayerFit.of(sample, weight, fracs, offset)


def importance(plan: Plan, step: Step) -> Tensor:
    """What an error of each output channel does in the layers that read it: the energy of the weights there; 1 where others read it."""
    readers = plan.consumers(step.name)
    total = torch.zeros(step.shape[0])
    for reader in readers:
        if not isinstance(reader, ConvStep):
            return torch.ones(step.shape[0])
        energy = reader.weight.square().sum((2, 3))
        total += energy.view(reader.groups, -1, energy.shape[1]).sum(1).flatten()
    return total / total.mean().clamp(min=1e-12) if readers else torch.ones(step.shape[0])


def put(net: FixedPointNet, step: Weighted, fit: LayerFit) -> None:
    """Put a fit's format, weights and bias in force."""
    net.set_weight_fracs(step.name, tuple(int(frac) for frac in fit.fracs))
    layer = net.layer(step.name)
    layer.weight.data.copy_(fit.weight)
    layer.bias.data.copy_(fit.bias)
