"""Telling images of known classes from others: scores from logits and features, AUROC and FPR at 95 % TPR. NumPy only.

A score is higher for images that look in distribution; those are the positives.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeft.evaluation.calibration import log_softmax
from edgeft.evaluation.metrics import by_rows

TPR = 0.95
"""Share of in-distribution images that the threshold of FPR@95 keeps."""

Scores = NDArray[np.float64]


def max_softmax(logits: NDArray[np.float32]) -> Scores:
    """The probability of the answered class (Hendrycks and Gimpel 2017), shape [n]."""
    return by_rows(lambda rows: np.exp(log_softmax(rows).max(axis=1)), logits)


def energy(logits: NDArray[np.float32]) -> Scores:
    """The negative energy at temperature 1, log sum exp of the logits (Liu et al. 2020), shape [n]."""
    return by_rows(_log_sum_exp, logits)


def _log_sum_exp(rows: NDArray[np.float32]) -> Scores:
    wide = rows.astype(np.float64)
    highest = wide.max(axis=1)
    scores: Scores = highest + np.log(np.exp(wide - highest[:, None]).sum(axis=1))
    return scores


def auroc(positive: Scores, negative: Scores) -> float:
    """Probability that a positive scores above a negative, equal scores counting half: the Mann-Whitney statistic by ranks."""
    both = np.concatenate([positive, negative])
    _, index, counts = np.unique(both, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[index]  # the mean rank, from 1, of those that are equal
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def fpr_at_tpr(positive: Scores, negative: Scores, tpr: float = TPR) -> float:
    """Share of negatives at or above the highest threshold that keeps at least `tpr` of the positives; ties are kept together."""
    needed = int(np.ceil(round(tpr * len(positive), 9)))  # rounded first: 0.95 * 20 must be 19, not a little more
    threshold = np.sort(positive)[len(positive) - needed]
    return float((negative >= threshold).mean())


@dataclass(frozen=True)
class Gaussians:
    """Class means [classes, d] and the inverse [d, d] of one covariance for all classes; `shrinkage` is what was mixed in, 0 ... 1."""

    means: NDArray[np.float64]
    precision: NDArray[np.float64]
    shrinkage: float

    def scores(self, features: NDArray[np.float32]) -> Scores:
        """Minus the squared Mahalanobis distance to the nearest class mean (Lee et al. 2018, last layer only), shape [n]."""
        return by_rows(self._scores, features)

    def _scores(self, features: NDArray[np.float32]) -> Scores:
        wide = features.astype(np.float64)
        nearest = np.full(len(wide), np.inf)
        for mean in self.means:
            away = wide - mean
            np.minimum(nearest, ((away @ self.precision) * away).sum(axis=1), out=nearest)
        return -nearest


class GaussianFit:
    """Collects features batch by batch, in memory that does not grow with the number of images."""

    def __init__(self, n_classes: int, n_features: int) -> None:
        self._n = np.zeros(n_classes, np.int64)
        self._sums = np.zeros((n_classes, n_features))
        self._squares = np.zeros((n_features, n_features))

    def add(self, features: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
        """Add features [n, d] of images of these classes."""
        wide = features.astype(np.float64)
        np.add.at(self._sums, labels, wide)
        self._n += np.bincount(labels, minlength=len(self._n))
        self._squares += wide.T @ wide

    def fitted(self) -> Gaussians:
        """The means of the classes that have images and the shrunk pooled covariance.

        The covariance is mixed with its mean variance times the identity, by the oracle approximating shrinkage of Chen et al. (2010,
        eq. 23), so that it can be inverted where there are fewer images than features.
        """
        present = self._n > 0
        means = self._sums[present] / self._n[present, None]
        n, d = int(self._n.sum()), self._squares.shape[0]
        covariance = (self._squares - (means.T * self._n[present]) @ means) / n
        share, variance = shrinkage(covariance, n), np.trace(covariance) / d
        # The floor keeps the inverse finite where all features of all images are equal.
        shrunk = (1 - share) * covariance + (share * variance + 1e-9 * max(variance, 1e-9)) * np.eye(d)
        return Gaussians(means, np.linalg.inv(shrunk), share)


def shrinkage(covariance: NDArray[np.float64], n: int) -> float:
    """Share of the identity in the oracle approximating shrinkage estimate (Chen et al. 2010, eq. 23), 0 ... 1."""
    d = len(covariance)
    square, trace2 = float((covariance**2).sum()), float(np.trace(covariance)) ** 2
    below = (n + 1 - 2 / d) * (square - trace2 / d)
    return 1.0 if below <= 0 else min(1.0, ((1 - 2 / d) * square + trace2) / below)
