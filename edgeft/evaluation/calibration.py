"""How far a model's probabilities can be believed: ECE, NLL, Brier score, and one temperature that repairs them. NumPy only.

Every function takes logits [n, classes], which may be a memory-mapped file: they are read a few thousand rows at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeft.evaluation.metrics import row_parts

N_BINS = 15
"""Bins of the expected calibration error, of equal width in confidence."""
LOG_T_BOUNDS = (-5.0, 5.0)
"""Range of log temperature: where accuracy on the fitting images is 1, the best temperature would be 0."""
AT_BOUND = 1e-3
"""A log temperature this near to a bound has ended there."""
_STEPS = 40


@dataclass(frozen=True)
class Calibration:
    """Of one model on one set at one temperature; `nll` in nats, `brier` the squared distance to the one-hot label (0 ... 2)."""

    ece: float
    nll: float
    brier: float


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Logarithms of the class probabilities, float64 [n, classes]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def ece(confidence: NDArray[np.float64], right: NDArray[np.bool_], n_bins: int = N_BINS) -> float:
    """Expected calibration error: sum over bins of |bin| / n * |accuracy - mean confidence|; bins of equal width, (low, high].

    `confidence` is the probability of the answered class (Guo et al. 2017, eq. 5).
    """
    bins = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    gaps = np.bincount(bins, weights=right, minlength=n_bins) - np.bincount(bins, weights=confidence, minlength=n_bins)
    return float(np.abs(gaps).sum() / len(confidence))


def calibration(logits: NDArray[np.float32], labels: NDArray[np.int64], temperature: float = 1.0) -> Calibration:
    """ECE, NLL and Brier score of softmax(logits / temperature)."""
    confidence, right = np.empty(len(labels)), np.empty(len(labels), bool)
    nll = brier = 0.0
    for part, rows, own in _parts(logits, labels):
        logp = log_softmax(rows / temperature)
        shares = np.exp(logp)
        confidence[part], right[part] = shares.max(axis=1), rows.argmax(axis=1) == own
        true = np.take_along_axis(logp, own[:, None], axis=1)[:, 0]
        nll -= true.sum()
        brier += (shares**2).sum() + (1 - 2 * np.exp(true)).sum()
    return Calibration(ece(confidence, right), float(nll / len(labels)), float(brier / len(labels)))


@dataclass(frozen=True)
class Temperature:
    """A fitted temperature; `at_bound` where the fit ended at a bound of its search."""

    value: float
    at_bound: bool


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Temperature:
    """The temperature with the least NLL on these images, which should be validation images (Guo et al. 2017, section 4.2).

    NLL is convex in 1 / T, so its derivative there, mean(E_p[z] - z_true), has one zero: bisection in log T. Where the model is right on
    every image the best temperature is 0, where it is no better than chance it is infinite; the answer stays within exp(LOG_T_BOUNDS)
    and says when it is at one of them.
    """
    low, high = LOG_T_BOUNDS
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if _slope(logits, labels, math.exp(-middle)) > 0:  # too confident: a smaller 1 / T is better
            low = middle
        else:
            high = middle
    found = (low + high) / 2
    return Temperature(math.exp(found), min(abs(found - bound) for bound in LOG_T_BOUNDS) < AT_BOUND)


def _slope(logits: NDArray[np.float32], labels: NDArray[np.int64], beta: float) -> float:
    """Derivative of the summed NLL of softmax(beta * logits) by beta."""
    total = 0.0
    for _, rows, own in _parts(logits, labels):
        shares = np.exp(log_softmax(rows * beta))
        total += float((shares * rows).sum() - np.take_along_axis(rows, own[:, None], axis=1).sum())
    return total


def _parts(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Iterator[tuple[slice, NDArray[np.float64], NDArray[np.int64]]]:
    for part in row_parts(len(labels)):
        yield part, np.asarray(logits[part], np.float64), labels[part]
