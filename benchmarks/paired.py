"""Differences in accuracy between two models on the same images, with intervals that use the pairing."""

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


def difference(pairs: Sequence[Pair], seed: int = 0) -> tuple[float, float, float]:
    """Accuracy of the first model less that of the second in points, as the unweighted mean over splits; its low and high bound.

    The bounds are percentiles over resamples of the images within each split (bootstrap), both models on the same images. Images on
    which the models agree add 0 however often they are drawn, which is why the interval is so much narrower than either model's own.
    """
    rng = np.random.default_rng(seed)
    drawn = np.mean([_resampled(pair, rng) for pair in pairs], axis=0)
    low, high = np.percentile(drawn, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(np.mean([100 * (pair.gained - pair.lost) / pair.n for pair in pairs])), float(low), float(high)


def _resampled(pair: Pair, rng: np.random.Generator) -> NDArray[np.float64]:
    shares = np.array([pair.gained, pair.lost, pair.n - pair.gained - pair.lost]) / pair.n
    drawn = rng.multinomial(pair.n, shares, N_RESAMPLES)
    found: NDArray[np.float64] = 100 * (drawn[:, 0] - drawn[:, 1]) / pair.n
    return found


def text(pairs: Sequence[Pair]) -> str:
    """As tables show it: "-0.4 [-1.1, 0.3]"."""
    mean, low, high = difference(pairs)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
