"""What is computed from counts and times: intervals of means, reliability bins, the Pareto front. NumPy and the standard library only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeft.report import ModelResult

N_BINS = 10
"""Bins of a reliability diagram, of equal width in confidence."""


def mean_interval(result: ModelResult) -> tuple[float, float] | None:
    """95 % interval of the unweighted mean over the OOD splits, as fractions; None where there are none.

    From the Wilson intervals of the splits, whose images are independent of one another. The splits themselves are taken as given: it
    says nothing about other shifts.
    """
    splits = [split for split in result.splits if split.kind == "ood"]
    if not splits or result.mean_ood is None:
        return None
    below = math.hypot(*(split.top1 - split.interval[0] for split in splits)) / len(splits)
    above = math.hypot(*(split.interval[1] - split.top1 for split in splits)) / len(splits)
    return result.mean_ood - below, result.mean_ood + above


@dataclass(frozen=True)
class Reliability:
    """How often answers of a confidence are right. `bins`, lowest confidence first: images, mean confidence, share that is right."""

    bins: tuple[tuple[int, float, float], ...]

    @classmethod
    def of(cls, confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> "Reliability":
        """From the probability of each image's answered class and whether that is its class; bins are (low, high]."""
        index = np.clip(np.ceil(confidence * N_BINS).astype(int) - 1, 0, N_BINS - 1)
        counts = np.bincount(index, minlength=N_BINS)
        sums = (np.bincount(index, weights=values, minlength=N_BINS) for values in (confidence, right))
        means = [total / np.maximum(counts, 1) for total in sums]
        return cls(tuple((int(n), float(c), float(r)) for n, c, r in zip(counts, *means, strict=True)))

    @property
    def n(self) -> int:
        """Images in all."""
        return sum(n for n, _, _ in self.bins)

    @property
    def ece(self) -> float:
        """Expected calibration error over these bins: the mean distance of confidence and accuracy."""
        return sum(n * abs(confidence - right) for n, confidence, right in self.bins) / max(self.n, 1)


@dataclass(frozen=True)
class Cost:
    """What a model's accuracy differs by from the float model's on the same images, in points, with a 95 % interval."""

    points: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """As tables show it: "-0.4 [-1.1, +0.3]"."""
        return f"{self.points:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points (cost, gain) no other beats, by at most its cost and at least its gain and one of these better; equal ones all stay."""
    return [not any(_beats(other, point) for other in points) for point in points]


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] >= other[1] and one != other
