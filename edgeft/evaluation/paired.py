"""Differences in accuracy between two models on the same images, with intervals and a test that use the pairing. NumPy only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

N_RESAMPLES = 20_000
LEVEL = 95.0
"""Percent of resamples inside an interval."""


@dataclass(frozen=True)
class Pair:
    """Two models on the `n` images of one split: images that only the first has right, and that only the second has right."""

    n: int
    gained: int
    lost: int

    @classmethod
    def of(cls, first: NDArray[np.int64], second: NDArray[np.int64], labels: NDArray[np.int64]) -> "Pair":
        """From both models' top classes, in the same order."""
        right, other = first == labels, second == labels
        return cls(len(labels), int((right & ~other).sum()), int((other & ~right).sum()))

    @property
    def points(self) -> float:
        """Accuracy of the first model less that of the second, in points."""
        return 100 * (self.gained - self.lost) / self.n


def difference(pairs: Sequence[Pair], seed: int = 0) -> tuple[float, float, float]:
    """Accuracy of the first model less that of the second in points, as the unweighted mean over splits; its low and high bound.

    The bounds are percentiles over resamples of the images within each split (bootstrap), both models on the same images. Images on
    which the models agree add 0 however often they are drawn, which is why the interval is so much narrower than either model's own.
    The splits must have different images; for several versions of the same images see `mean_difference`.
    """
    rng = np.random.default_rng(seed)
    drawn = np.mean([_resampled(pair, rng) for pair in pairs], axis=0)
    low, high = _bounds(drawn)
    return float(np.mean([pair.points for pair in pairs])), low, high


def _resampled(pair: Pair, rng: np.random.Generator) -> NDArray[np.float64]:
    shares = np.array([pair.gained, pair.lost, pair.n - pair.gained - pair.lost]) / pair.n
    drawn = rng.multinomial(pair.n, shares, N_RESAMPLES)
    found: NDArray[np.float64] = 100 * (drawn[:, 0] - drawn[:, 1]) / pair.n
    return found


def mean_difference(more_right: NDArray[np.int64], versions: int, seed: int = 0) -> tuple[float, float, float]:
    """As `difference` for `versions` of the same images (severities of a corruption): images are drawn with all their versions.

    `more_right` says for each image on how many more of its versions the first model is right than the second; it may be negative.
    """
    values, counts = np.unique(more_right, return_counts=True)
    n = int(counts.sum())
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, N_RESAMPLES) @ values * (100 / (n * versions))
    low, high = _bounds(drawn)
    return float(100 * more_right.sum() / (n * versions)), low, high


def _bounds(drawn: NDArray[np.floating]) -> tuple[float, float]:
    low, high = np.percentile(drawn, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def mcnemar(pair: Pair) -> float:
    """Two-sided exact p-value of McNemar's test (1947): that the models are equally often right, given the images on which one is.

    Under that hypothesis `gained` is binomial with n = gained + lost and 1/2; the smaller tail is doubled, at most 1.
    """
    n = pair.gained + pair.lost
    log_factorials = np.concatenate([[0.0], np.log(np.arange(1, n + 1)).cumsum()])
    k = np.arange(min(pair.gained, pair.lost) + 1)
    tail = np.exp(log_factorials[n] - log_factorials[k] - log_factorials[n - k] - n * math.log(2)).sum()
    return min(1.0, float(2 * tail))
