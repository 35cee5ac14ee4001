"""Range fitting (eq. 20): every tensor scaled, without changing the function, so that its values fill a power-of-two format.

A format whose scale is a power of two misses the best clipping range of a tensor by up to a factor of 2, half of it on average in the
logarithm. Where neighbouring weights can take a factor up and back, the tensor can be stretched to the range instead, so that a shift
costs activations nothing against a free float scale (cross-layer equalisation by one positive factor for all channels; Nagel et al. 2019,
arXiv:1906.04721, section 4.1, uses one for each).
"""

from collections.abc import Sequence

import numpy as np
import torch

from edgeft.fixedpoint import FixedPointFormat
from edgeft.quant.calibration.statistics import TensorStatistics, propose
from edgeft.quant.f8net import POWERS, Rule, relative_error
from edgeft.quant.formats import Point, resolve
from edgeft.quant.plan import IMAGE, MulStep, Plan
from edgeft.quant.points import Storage, find_points
from edgeft.quant.rescale import IMAGE_NORM, IMAGE_VALUES, scale_group, ties

TRIALS = 8
"""Factors tried within an octave: the range is met to half of 9 %."""
Statistics = dict[str, TensorStatistics]


def fit_ranges(plan: Plan, seen: Sequence[Statistics], profile: str, rule: Rule) -> list[Statistics]:
    """Scale the tensors of a plan in place, each by the factor in [1, 2) whose format by `rule` has the least relative error.

    `seen` are the statistics of every step's output on one or more sets of images; a format has room for all of them. Tensors that can
    only be scaled together (additions, pools, moves) take one factor, the one with the least sum of their errors. Left alone are the
    image, the logits, the gates of products, and tensors with a clip, which have their own scale. Returns the statistics of the scaled
    tensors. Exact in float but for one rounding of each weight.
    """
    points = {point.name: point for point in find_points(Storage(plan, profile))}
    gates = {step.inputs[1] for step in plan.steps if isinstance(step, MulStep)}
    fixed = {IMAGE, IMAGE_NORM, IMAGE_VALUES, plan.output} | gates | {step.name for step in plan.steps if step.clip is not None}
    found = [dict(statistics) for statistics in seen]
    for members in ties(plan).sets():
        chosen = [points[name] for name in points if name in members and float(seen[0][name].peak.max()) > 0.0]
        if members & fixed or not chosen:
            continue
        trials = [2.0 ** (number / TRIALS) for number in range(TRIALS)]
        errors = [_error(plan, chosen, seen, rule, factor) for factor in trials]
        factor = trials[errors.index(min(errors))]
        if factor != 1.0:
            scale_group(plan, members, torch.tensor(factor))
            for statistics in found:
                statistics.update({name: statistics[name].scaled(factor) for name in members})
    return found


def _error(plan: Plan, points: Sequence[Point], seen: Sequence[Statistics], rule: Rule, factor: float) -> float:
    """Relative error, summed over tensors, in the formats that the rule gives to the scaled tensors."""
    scaled = [{point.name: statistics[point.name].scaled(factor) for point in points} for statistics in seen]
    proposals = {point.name: min(propose(plan, point, found[point.name], rule) for found in scaled) for point in points}
    fracs = resolve(points, proposals)
    power = POWERS.get(rule, POWERS["l4"])
    return sum(_error_of(found[p.name], p, fracs[p.name], power) for found in scaled for p in points)


def _error_of(statistics: TensorStatistics, point: Point, frac: int, power: int) -> float:
    values = statistics.sample()
    fmt = FixedPointFormat(point.format.width, frac, point.format.signed)
    return relative_error(np.maximum(values, 0.0) if point.relu else values, fmt, power)
