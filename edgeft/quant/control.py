"""Formats that follow the statistics during QAT: running sigma, hysteresis, and a stated step at which they freeze."""

import math

import torch

from edgeft.config import QuantConfig
from edgeft.quant.brevitas_bridge import FixedPointQuant
from edgeft.quant.calibration.statistics import weight_spread
from edgeft.quant.f8net import SIGNED_STD, octaves, std_constant
from edgeft.quant.formats import Point
from edgeft.quant.net import FixedPointNet
from edgeft.quant.plan import ConvStep, TableStep
from edgeft.quant.rescale import IMAGE_NORM


class FormatControl:
    """Moves formats by F8Net's rule while QAT runs; `before_step` is the training loop's hook.

    Every `update_every` steps sigma is measured and averaged (sigma itself, not the floored fraction, which would stick in a
    limit cycle). A fraction moves only when sigma is past its threshold by `hysteresis` octaves, at most by one, and never
    after `freeze_at` of the steps. Only the rule `std` moves: the others chose by an error that needs the float tensors. With
    headroom, activations get no finer than calibration made them: training images do not show what the room is for.
    """

    def __init__(self, net: FixedPointNet, config: QuantConfig, sigmas: dict[str, float]) -> None:
        self.net = net
        self.config = config
        self.points = {p.name: std_constant(p.format, relu=p.relu) for p in net.points if _follows_deviation(net, p)}
        self.ceilings = {p.name: net.frac(p.name) for p in net.points} if config.headroom != "none" else {}
        layers = [step.name for step in net.plan.weighted() if not (isinstance(step, ConvStep) and step.fixed)]
        self.layers = [name for name in layers if net.layer(name).body.frac.ndim == 0]
        for name in self.points:
            _remember(net.quantizer(name).body, sigmas[name])
        for name in self.layers:
            _remember(net.layer(name).body, weight_spread(net.layer(name).weight.detach().cpu().double().numpy()))

    @property
    def moves(self) -> int:
        """How often a format has moved so far; kept in buffers, so that it survives an interruption."""
        return sum(int(body.moves) for body in self._bodies())

    def before_step(self, step: int, total: int) -> None:
        """Called before each forward pass of training; `step` counts from 0."""
        if self.config.format != "std":
            return
        frozen_from = math.floor(self.config.freeze_at * total)
        if step > 0 and self._due(step - 1, frozen_from):
            self._update()
        due = self._due(step, frozen_from)
        for body in self._bodies():
            body.observing = due

    def _due(self, step: int, frozen_from: int) -> bool:
        return step < frozen_from and step % self.config.update_every == 0

    def _bodies(self) -> list[FixedPointQuant]:
        return [self.net.quantizer(n).body for n in self.points] + [self.net.layer(n).body for n in self.layers]

    @torch.no_grad()
    def _update(self) -> None:
        before = [body.frac.clone() for body in self._bodies()]
        proposals = {p.name: self.net.frac(p.name) for p in self.net.points}
        for name, constant in self.points.items():
            sigma = self._average(self.net.quantizer(name).body)
            proposals[name] += self._move(proposals[name], constant, sigma)
        self.net.set_fracs({name: min(frac, self.ceilings.get(name, frac)) for name, frac in proposals.items()})
        for name in self.layers:
            (frac,) = self.net.weight_fracs(name)
            sigma = self._average(self.net.layer(name).body)
            self.net.set_weight_fracs(name, (frac + self._move(frac, SIGNED_STD, sigma),))
        for body, old in zip(self._bodies(), before, strict=True):
            body.moves += int(bool(body.frac != old))

    def _average(self, body: FixedPointQuant) -> float:
        new = body.take_sigma()
        if math.isfinite(new):
            body.running_sigma.mul_(self.config.sigma_momentum).add_((1 - self.config.sigma_momentum) * new)
        return float(body.running_sigma)

    def _move(self, frac: int, constant: float, sigma: float) -> int:
        if sigma <= 0:
            return 0
        wanted = octaves(constant, sigma)  # frac is right while frac <= wanted < frac + 1
        if wanted < frac - self.config.hysteresis:
            return -1
        return int(wanted >= frac + 1 + self.config.hysteresis)


def _follows_deviation(net: FixedPointNet, point: Point) -> bool:
    """Whether the rule chose a tensor's format by its deviation.

    Not those of functions, chosen by error, nor averages and products of rectified values, chosen by their root mean square.
    """
    step = net.plan[point.name]
    pool = not point.format.signed and not point.relu
    return point.name != IMAGE_NORM and not pool and not isinstance(step, TableStep)


def _remember(body: FixedPointQuant, sigma: float) -> None:
    body.running_sigma.fill_(sigma)
