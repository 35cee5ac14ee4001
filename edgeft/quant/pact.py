"""Learned clip levels in fixed point: PACT (Choi et al. 2018, arXiv:1805.06085) as F8Net couples it to power-of-two formats.

A clip level alpha makes the values of a tensor alpha / top * code, with the top code 127 or 255: no power-of-two grid. So the tensor
is stored divided by its gain eta = 2^frac * alpha / top, which puts it on the grid of 2^-frac; the layers that write it divide their
weights and biases by eta, the layers that read it multiply theirs (Jin et al., ICLR 2022, arXiv:2202.05239). Nothing of eta is left
in the network. In real values `frac` cancels out: it only chooses the unit in which the tensor is stored.
"""

import torch
from torch import Tensor, nn

from edgeft.fixedpoint import FixedPointFormat
from edgeft.quant.f8net import std_constant, std_frac
from edgeft.quant.fakequant import power_of_two
from edgeft.quant.formats import Groups
from edgeft.quant.net import FixedPointNet
from edgeft.quant.plan import IMAGE, MOVES, AddStep, ConvStep, GlobalPoolStep, MulStep, Plan, Step, TableStep, Weighted

FRAC_MOMENTUM = 0.9
"""Weight of the old value in the published running average of fractions."""


def reach(plan: Plan) -> list[set[str]]:
    """Sets of tensors that must be stored in one unit, without those whose unit is given.

    Additions, pools, constant convolutions and steps that move codes have no weights that could absorb a ratio of two gains; so a
    whole residual group has one. The unit is given for the image, the logits, and whatever touches a product or a table.
    """
    groups = Groups.of(plan.steps, AddStep, GlobalPoolStep, *MOVES)
    given = {groups.find(IMAGE), groups.find(plan.output)}
    for step in plan.steps:
        if isinstance(step, ConvStep) and step.fixed:
            groups.join(step.inputs[0], step.name)
    for step in plan.steps:
        if isinstance(step, MulStep | TableStep) or (isinstance(step, ConvStep) and step.fixed and bool(step.bias.any())):
            given |= {step.name, *step.inputs}
    roots = {groups.find(name) for name in given}
    return [members for members in groups.sets() if groups.find(next(iter(members))) not in roots]


class ClipLevels(nn.Module):
    """One learned clip level for each set of tensors that share a unit, and the gains that follow from them.

    `alpha` [sets] is used by its absolute value: the largest real value of the set's reference tensor, the first one with a format of
    its own along the identity path. It starts at the range of the format that calibration chose, where every gain is 1. The other
    members of a residual group clip at the range of their own format, times the same gain.
    """

    def __init__(self, net: FixedPointNet) -> None:
        super().__init__()
        self._net = [net]  # in a list, so that it is no submodule of this one
        self.references: list[str] = []
        self._set_of: dict[str, int] = {}
        for members in reach(net.plan):
            points = [point for point in net.points if point.name in members]
            if points:
                self._set_of |= dict.fromkeys(members, len(self.references))
                self.references.append(next((point for point in points if point.carried), points[0]).name)
        self.register_buffer("top", torch.tensor([float(net.format(name).max_code) for name in self.references]))
        self.alpha = nn.Parameter(torch.tensor([net.format(name).max_value for name in self.references]))

    top: Tensor

    def gains(self) -> Tensor:
        """eta = 2^frac * |alpha| / top of every set, differentiable in alpha."""
        fracs = [self._net[0].quantizer(name).body.frac for name in self.references]
        units = power_of_two(torch.stack(fracs)) if fracs else self.top
        return units * self.alpha.abs() / self.top

    def gain(self, name: str, gains: Tensor) -> Tensor | float:
        """The gain of a tensor, out of `gains()`; 1 where its unit is given."""
        number = self._set_of.get(name)
        return 1.0 if number is None else gains[number]

    def to_json(self) -> dict[str, float]:
        """The clip level of each reference tensor, in real units."""
        return dict(zip(self.references, self.alpha.detach().abs().tolist(), strict=True))


def published_frac(x: Tensor, fmt: FixedPointFormat, *, relu: bool = False) -> int:
    """The published rule: floor(log2(c / sigma)) with the unbiased deviation of all of `x`, within 0 ... 7 signed or 0 ... 8."""
    return published_limit(std_frac(float(x.detach().double().std()), std_constant(fmt, relu=relu)), fmt)


def published_limit(frac: int, fmt: FixedPointFormat) -> int:
    """The nearest fraction that F8Net allows."""
    return min(max(frac, 0), 7 if fmt.signed else 8)


class PublishedFormats(nn.Module):
    """F8Net's activation formats as published: the rule sees the *stored* tensor, and its fraction, not sigma, is averaged.

    Because the stored tensor has been divided by eta, and eta contains the fraction, the rule feeds back into itself: with alpha / sigma
    below 3.64 (3.17 signed) the fraction walks down to 0, above 7.29 (6.35) up to the largest, in between it stays where it started. In
    training a tensor takes the fraction of its own batch, in evaluation the rounded average. Unlike the published code, members of a
    residual group always take the average, resolved over the group: fractions of their own would put a factor 2 on the identity path.
    """

    def __init__(self, net: FixedPointNet) -> None:
        super().__init__()
        self._net = [net]
        self._numbers = {point.name: number for number, point in enumerate(net.points)}
        self._alone = {point.name for point in net.points if _alone(net, point.name)}
        self.register_buffer("running", torch.tensor([float(net.frac(point.name)) for point in net.points], dtype=torch.float64))

    running: Tensor

    def settle(self) -> None:
        """Put the rounded averages in force."""
        rounded = self.running.round().tolist()
        net = self._net[0]
        net.set_fracs({p.name: published_limit(int(frac), p.format) for p, frac in zip(net.points, rounded, strict=True)})

    @torch.no_grad()
    def observe(self, step: Step, x: Tensor) -> None:
        """Average the fraction of a batch `x`, and put it in force where the tensor's format is its own."""
        number = self._numbers.get(step.name)
        if number is None:
            return
        net = self._net[0]
        frac = published_frac(x, net.points[number].format, relu=step.relu)
        self.running[number] = FRAC_MOMENTUM * self.running[number] + (1.0 - FRAC_MOMENTUM) * frac
        if step.name in self._alone:
            net.quantizer(step.name).body.frac.fill_(frac)


def _alone(net: FixedPointNet, name: str) -> bool:
    """Whether every reader of a tensor computes with weights, which take up any change of its format."""
    readers = net.plan.consumers(name)
    return all(isinstance(reader, Weighted) and not (isinstance(reader, ConvStep) and reader.fixed) for reader in readers)
