"""The statistics of diagnoses: probits, Student's t, differences of proportions, areas under curves. NumPy and standard library."""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgeft.report import Z_95, wilson

Floats = NDArray[np.float64]
Interval = tuple[float, float]

_NORMAL = NormalDist()
_probit = np.vectorize(_NORMAL.inv_cdf, otypes=[np.float64])
_share = np.vectorize(_NORMAL.cdf, otypes=[np.float64])


def probit(shares: ArrayLike) -> Floats:
    """Inverse of the normal distribution function, for shares inside 0 ... 1."""
    probits: Floats = _probit(np.asarray(shares, np.float64))
    return probits


def share_of(probits: ArrayLike) -> Floats:
    """Inverse of `probit`: the normal distribution function."""
    shares: Floats = _share(np.asarray(probits, np.float64))
    return shares


def density(probits: ArrayLike) -> Floats:
    """Slope of `share_of`."""
    values: Floats = np.exp(-(np.asarray(probits, np.float64) ** 2) / 2) / math.sqrt(2 * math.pi)
    return values


def inside(shares: ArrayLike, n: int | None) -> Floats:
    """Shares moved into [0.5 / n, 1 - 0.5 / n], so that they have a probit; as they are where n is not known."""
    values = np.asarray(shares, np.float64)
    return values if n is None else np.clip(values, 0.5 / n, 1 - 0.5 / n)


def student_p(t: float, freedom: int) -> float:
    """Two-sided probability of at least |t| (Abramowitz and Stegun 26.7.3 and 26.7.4, exact for whole degrees of freedom)."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cosine2 = math.cos(angle) ** 2
    # Powers of the cosine go up by two, from 1 for odd and from 0 for even degrees of freedom.
    term, total = (math.cos(angle), 0.0) if freedom % 2 else (1.0, 0.0)
    for power in range(1 if freedom % 2 else 0, freedom - 1, 2):
        total += term
        term *= cosine2 * (power + 1) / (power + 2)
    inner = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + inner) if freedom % 2 else inner)


def student_95(freedom: int) -> float:
    """The t that |t| exceeds with probability 0.05, by bisection."""
    low, high = 0.0, 20.0  # 12.7 for one degree of freedom
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, freedom) > 0.05 else (low, middle)
    return high


def difference(correct_a: int, n_a: int, correct_b: int, n_b: int) -> Interval:
    """95 % interval of share a minus share b for independent samples (Newcombe 1998, method 10: from two Wilson intervals).

    (-1, 1) where one of them was not measured.
    """
    if not n_a or not n_b:
        return -1.0, 1.0
    a, b = correct_a / n_a, correct_b / n_b
    (low_a, high_a), (low_b, high_b) = wilson(correct_a, n_a), wilson(correct_b, n_b)
    return a - b - math.hypot(a - low_a, high_b - b), a - b + math.hypot(high_a - a, b - low_b)


def auc(negatives: Floats, positives: Floats) -> tuple[float, Interval]:
    """Probability that a positive scores higher than a negative, ties counting half, and its 95 % interval (DeLong et al. 1988)."""
    above = _share_below(positives, negatives)
    below = 1 - _share_below(negatives, positives)
    area = float(above.mean())
    if area in (0.0, 1.0):  # No ranks vary, and DeLong's interval has no width; the smaller sample bounds it as it bounds a proportion.
        n = min(len(positives), len(negatives))
        return area, wilson(round(area * n), n)
    half = Z_95 * math.sqrt(_variance(above) / len(above) + _variance(below) / len(below))
    return area, (max(0.0, area - half), min(1.0, area + half))


def _share_below(values: Floats, others: Floats) -> Floats:
    """For each value the share of the others that are smaller, ties counting half."""
    ordered = np.sort(others)
    counts = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    shares: Floats = counts / (2 * len(others))
    return shares


def _variance(values: Floats) -> float:
    return float(values.var(ddof=1)) if len(values) > 1 else 0.0
