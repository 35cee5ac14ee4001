"""What calibration needs to know of each activation: deviation, peaks and a sample of values, from one float pass."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeft.errors import UnsupportedError
from edgeft.fixedpoint import FixedPointFormat
from edgeft.quant.f8net import EMPTY_FRAC, UNSIGNED_RMS, Rule, grid_frac, minmax_frac, spread, std_constant, std_frac
from edgeft.quant.formats import Point
from edgeft.quant.plan import IMAGE, GlobalPoolStep, Plan, rectify, run_step

SAMPLE = 1 << 16
"""Values kept of each tensor for the grid search."""
ACTIVE_CLIP = 0.01
"""A channel's clip is active when it removes more than this share of the channel's energy."""


@dataclass
class TensorStatistics:
    """Statistics of one tensor over the calibration images, before its `relu` and `clip` unless said otherwise.

    `peak` and `clip_loss` are per channel: the largest rectified value before a clip, and the energy that the clip removes.
    """

    relu: bool = False
    clip: float | None = None
    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    peak: Tensor = field(default_factory=lambda: torch.zeros(0))
    energy: Tensor = field(default_factory=lambda: torch.zeros(0))
    clip_loss: Tensor = field(default_factory=lambda: torch.zeros(0))
    samples: list[Tensor] = field(default_factory=list)

    def update(self, x: Tensor, *, keep: int) -> None:
        """Add a batch [n, c, ...]; `keep` evenly spaced values of it go into the sample."""
        self.count += x.numel()
        self.total += float(x.double().sum())
        self.squares += float(x.double().square().sum())
        channels = x.transpose(0, 1).flatten(1)
        rectified = channels.clamp(min=0.0) if self.relu else channels
        peak, energy = rectified.abs().amax(1), rectified.square().sum(1)
        clipped = rectified.clamp(max=self.clip).square().sum(1) if self.clip is not None else energy
        if self.peak.numel() == 0:
            self.peak, self.energy, self.clip_loss = peak, energy, energy - clipped
        else:
            self.peak = torch.maximum(self.peak, peak)
            self.energy, self.clip_loss = self.energy + energy, self.clip_loss + energy - clipped
        self.samples.append(x.flatten()[:: max(1, x.numel() // keep)].clone())

    @property
    def sigma(self) -> float:
        """Standard deviation."""
        return math.sqrt(max(self.squares / self.count - (self.total / self.count) ** 2, 0.0))

    @property
    def spread(self) -> float:
        """Standard deviation, or more where the mean is far from 0."""
        return spread(self.total / self.count, self.sigma, relu=self.relu)

    @property
    def rms(self) -> float:
        """Root mean square."""
        return math.sqrt(self.squares / self.count)

    @property
    def clip_active(self) -> Tensor:
        """Channels in which the clip does something."""
        return self.clip_loss > ACTIVE_CLIP * self.energy

    def sample(self) -> NDArray[np.float64]:
        """The kept values, after the clip."""
        values: NDArray[np.float64] = torch.cat(self.samples).double().clamp(max=self.clip if self.clip is not None else math.inf).numpy()
        return values


def collect(plan: Plan, images: Tensor, batch: int = 32) -> dict[str, TensorStatistics]:
    """Statistics of every step's output for image bytes [n, 3, h, w]. Raises UnsupportedError on values that are not finite."""
    found = {step.name: TensorStatistics(step.relu, step.clip) for step in plan.steps}
    last_use = plan.last_use()
    keep = max(1, SAMPLE * batch // max(len(images), batch))
    for start in range(0, len(images), batch):
        env = {IMAGE: plan.encode(images[start : start + batch])}
        for index, step in enumerate(plan.steps):
            before = run_step(step, [env[name] for name in step.inputs])
            found[step.name].update(before, keep=keep)
            env[step.name] = rectify(step, before)
            for name in set(step.inputs):
                if last_use[name] == index:
                    del env[name]
    for name, statistics in found.items():
        if not math.isfinite(statistics.squares):
            raise UnsupportedError(f"layer '{name}' gives values that are not finite numbers on the calibration images")
    return found


def propose(plan: Plan, point: Point, statistics: TensorStatistics, rule: Rule) -> int:
    """Fraction that `rule` picks for one activation alone."""
    fmt, peak = point.format, float(statistics.peak.max())
    if peak == 0.0:
        return EMPTY_FRAC
    if rule == "minmax":
        return minmax_frac(min(peak, statistics.clip) if statistics.clip is not None else peak, fmt.max_code)
    if rule == "grid":
        return grid_frac(statistics.sample(), fmt, relu=point.relu)
    if isinstance(plan[point.name], GlobalPoolStep) and not fmt.signed:
        return std_frac(statistics.rms, UNSIGNED_RMS)  # averages of rectified values: there is no value before rectification
    return std_frac(statistics.spread, std_constant(fmt, relu=point.relu))


def weight_spread(weight: NDArray[np.float64]) -> float:
    """Deviation of weights that the rule is given."""
    return spread(float(weight.mean()), float(weight.std()))


def propose_weight(weight: NDArray[np.float64], fmt: FixedPointFormat, rule: Rule) -> int:
    """Fraction that `rule` picks for a weight tensor, or for one output channel of it."""
    peak = float(np.abs(weight).max(initial=0.0))
    if peak == 0.0:
        return EMPTY_FRAC
    if rule == "minmax":
        return minmax_frac(peak, fmt.max_code)
    if rule == "grid":
        return grid_frac(weight, fmt, relu=False)
    return std_frac(weight_spread(weight), std_constant(fmt, relu=False))
