"""Paired differences as the tables of the suites show them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeft.evaluation.paired import LEVEL, N_RESAMPLES, Pair, difference

__all__ = ["Pair", "Repeated", "difference", "repeated_difference", "shown", "text"]


def text(pairs: Sequence[Pair]) -> str:
    """As tables show it: "-0.4 [-1.1, 0.3]"."""
    return shown(difference(pairs))


def shown(found: tuple[float, float, float]) -> str:
    """A difference and its bounds as tables show them."""
    mean, low, high = found
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


@dataclass(frozen=True)
class Repeated:
    """Two kinds of model on one split, measured several times (seeds, methods), each time on some of its images.

    For each image: on how many more of the times that it was `seen` the first kind is right than the second.
    """

    more_right: NDArray[np.int64]
    seen: NDArray[np.int64]

    @classmethod
    def of(cls, times: Sequence[tuple[Sequence[str], NDArray[np.bool_], NDArray[np.bool_]]]) -> "Repeated":
        """From the names of the images, and whether the first and the second model are right on them, of each time."""
        names, index = np.unique(np.concatenate([np.asarray(images) for images, _, _ in times]), return_inverse=True)
        gain = np.concatenate([first.astype(np.int64) - second for _, first, second in times])
        return cls(np.bincount(index, gain, len(names)).astype(np.int64), np.bincount(index, minlength=len(names)))

    @property
    def points(self) -> float:
        """Accuracy of the first less that of the second, in points."""
        return float(100 * self.more_right.sum() / self.seen.sum())


def repeated_difference(splits: Sequence[Repeated], seed: int = 0) -> tuple[float, float, float]:
    """As `difference`, where the models of several seeds saw the same images: an image is drawn with all that was measured on it.

    The interval is over images; it does not say what other seeds would give.
    """
    rng = np.random.default_rng(seed)
    drawn = np.mean([_resampled(split, rng) for split in splits], axis=0)
    low, high = np.percentile(drawn, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(np.mean([split.points for split in splits])), float(low), float(high)


def _resampled(split: Repeated, rng: np.random.Generator) -> NDArray[np.float64]:
    kinds, counts = np.unique(np.stack([split.more_right, split.seen], axis=1), axis=0, return_counts=True)
    totals = rng.multinomial(counts.sum(), counts / counts.sum(), N_RESAMPLES) @ kinds
    found: NDArray[np.float64] = 100 * totals[:, 0] / totals[:, 1]
    return found
