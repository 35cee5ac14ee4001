"""What calibration needs to know of each activation: deviation, peaks and a sample of values, from one float pass."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeft.errors import UnsupportedError
from edgeft.fixedpoint import FixedPointFormat
from edgeft.quant.f8net import (
    EMPTY_FRAC,
    POWERS,
    UNSIGNED_RMS,
    Rule,
    grid_frac,
    minmax_frac,
    relative_error,
    spread,
    std_constant,
    std_frac,
)
from edgeft.quant.formats import Point, weight_format
from edgeft.quant.net import FixedPointNet
from edgeft.quant.plan import IMAGE, ConvStep, Plan, TableStep, Weighted, rectify, run_step

SAMPLE = 1 << 16
"""Values kept of each tensor for the grid search."""
BATCH = 8
"""Images that run at a time: few, so that temporary tensors stay small."""
ACTIVE_CLIP = 0.01
"""A channel's clip is active when it removes more than this share of the channel's energy."""


@dataclass
class TensorStatistics:
    """Statistics of one tensor over the calibration images, before its `relu` and `clip` unless said otherwise.

    All tensors are per channel: `total` and `squares` the sums of values and of their squares, `peak` the largest rectified value
    before a clip, `clip_loss` the part of the rectified `energy` that the clip removes. `factor` is what fitting its range multiplied the
    tensor by.
    """

    relu: bool = False
    clip: float | None = None
    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    peak: Tensor = field(default_factory=lambda: torch.zeros(1))
    energy: Tensor = field(default_factory=lambda: torch.zeros(1))
    clip_loss: Tensor = field(default_factory=lambda: torch.zeros(1))
    samples: list[Tensor] = field(default_factory=list)
    factor: float = 1.0

    def update(self, x: Tensor, *, keep: int) -> None:
        """Add a batch [n, c, ...]; `keep` evenly spaced values of it go into the sample."""
        others = [axis for axis in range(x.ndim) if axis != 1]
        squares = x.square().sum(others)
        self.count += x.numel()
        self.total = self.total + x.sum(others).double()
        self.squares = self.squares + squares.double()
        rectified = x.clamp(min=0.0) if self.relu else x
        peak = rectified.amax(others) if self.relu else torch.maximum(x.amax(others), -x.amin(others))
        self.peak = torch.maximum(self.peak, peak)
        if self.clip is not None:
            energy = rectified.square().sum(others)
            self.energy = self.energy + energy
            self.clip_loss = self.clip_loss + energy - rectified.clamp(max=self.clip).square().sum(others)
        self.samples.append(x.flatten()[:: max(1, x.numel() // keep)].clone())

    def scaled(self, factor: float) -> "TensorStatistics":
        """Those of the tensor times a factor above 0; a clip moves along."""
        square = factor**2
        return TensorStatistics(
            self.relu, None if self.clip is None else self.clip * factor, self.count, self.total * factor, self.squares * square,
            self.peak * factor, self.energy * square, self.clip_loss * square, [part * factor for part in self.samples],
            self.factor * factor,
        )  # fmt: skip

    @property
    def mean(self) -> float:
        """Mean of all values."""
        return float(self.total.sum()) / self.count

    @property
    def sigma(self) -> float:
        """Standard deviation."""
        return math.sqrt(max(self.rms**2 - self.mean**2, 0.0))

    @property
    def spread(self) -> float:
        """Standard deviation, or more where the mean is far from 0."""
        return spread(self.mean, self.sigma, relu=self.relu)

    @property
    def rms(self) -> float:
        """Root mean square."""
        return math.sqrt(float(self.squares.sum()) / self.count)

    @property
    def clip_active(self) -> Tensor:
        """Channels in which the clip does something."""
        return torch.zeros_like(self.peak, dtype=torch.bool) if self.clip is None else self.clip_loss > ACTIVE_CLIP * self.energy

    def sample(self) -> NDArray[np.float64]:
        """The kept values, after the clip."""
        values: NDArray[np.float64] = torch.cat(self.samples).double().clamp(max=self.clip if self.clip is not None else math.inf).numpy()
        return values


def collect(plan: Plan, images: Tensor, batch: int = BATCH) -> dict[str, TensorStatistics]:
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
        if not bool(statistics.squares.isfinite().all()):
            raise UnsupportedError(f"layer '{name}' gives values that are not finite numbers on the calibration images")
    return found


def propose(plan: Plan, point: Point, statistics: TensorStatistics, rule: Rule) -> int:
    """Fraction that `rule` picks for one activation alone."""
    fmt, peak = point.format, float(statistics.peak.max())
    if peak == 0.0:
        return EMPTY_FRAC
    if rule == "minmax":
        return minmax_frac(min(peak, statistics.clip) if statistics.clip is not None else peak, fmt.max_code)
    if rule in POWERS or isinstance(plan[point.name], TableStep):  # a function's values are bounded on one side: no Gaussian
        return grid_frac(statistics.sample(), fmt, relu=point.relu, power=POWERS.get(rule, 2))
    if not fmt.signed and not point.relu:
        return std_frac(statistics.rms, UNSIGNED_RMS)  # averages or products of rectified values: none before rectification
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
    if rule in POWERS:
        return grid_frac(weight, fmt, relu=False, power=POWERS[rule])
    return std_frac(weight_spread(weight), std_constant(fmt, relu=False))


def alternatives(values: NDArray[np.float64], fmt: FixedPointFormat, power: int = 2) -> dict[str, float]:
    """Relative error of storing `values` at a format's fraction and one beside it on either side, by fraction: its L_power norm."""
    if not np.any(values):
        return {}
    trials = [FixedPointFormat(fmt.width, fmt.frac + change, fmt.signed, fmt.narrow) for change in (-1, 0, 1)]
    return {str(trial.frac): relative_error(values, trial, power) ** (1.0 / power) for trial in trials}


def explain(net: FixedPointNet, statistics: dict[str, TensorStatistics], rule: Rule) -> dict[str, Any]:
    """Why each format is what it is: {"activations" or "layers": {name: {"reason", "alternatives"}}}, JSON values.

    Errors are in the norm of the rule, root mean square where it has none: of activations those of the float tensor, of weights those of
    plain rounding of the float weights, before any compensation. Layers with a format for each output channel list the mean over
    channels at "-1", "0" and "+1" of each one's own as `alternatives_by_change`. Activations also have the `range_factor` that they were
    multiplied by to fill their format.
    """
    activations = {}
    for point in net.points:
        sample = statistics[point.name].sample()
        values = np.maximum(sample, 0.0) if point.relu else sample
        table = isinstance(net.plan[point.name], TableStep) and rule == "std"
        activations[point.name] = {
            "reason": "grid" if table else rule,
            "alternatives": alternatives(values, net.format(point.name), POWERS.get(rule, 2)),
            "range_factor": statistics[point.name].factor,
        }  # fmt: skip
    return {"activations": activations, "layers": {step.name: _explain_layer(net, step, rule) for step in net.plan.weighted()}}


def _explain_layer(net: FixedPointNet, step: Weighted, rule: Rule) -> dict[str, Any]:
    fracs = net.weight_fracs(step.name)
    reason, power = "constant" if isinstance(step, ConvStep) and step.fixed else rule, POWERS.get(rule, 2)
    weight = step.weight.detach().cpu().double().numpy()
    if len(fracs) == 1:
        return {"reason": reason, "alternatives": alternatives(weight, weight_format(fracs[0]), power)}
    found = [alternatives(row, weight_format(frac), power) for row, frac in zip(weight, fracs, strict=True)]
    errors = np.array([list(row.values()) for row in found if row]).reshape(-1, 3)
    by_change = dict(zip(("-1", "0", "+1"), errors.mean(0).tolist(), strict=True)) if len(errors) else {}
    return {"reason": reason, "alternatives_by_change": by_change}
