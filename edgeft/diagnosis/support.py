"""Which shifted images lie in the support of the reference images, and which do not.

The split of MadryLab's "Ask Your Distribution Shift", in its cheap form: instead of a fine-tuned net, logistic regression on frozen
features tells shifted from reference images, every image being scored by a model that has not seen it (cross-fitting). One scale is
calibrated on all scores together; with it a score is the log of the density ratio

    r(x) = p_shift(x) / p_ref(x),        and x is out of support where r(x) >= 1 / EPSILON.

The scores are taken without the classes' prior odds, which differ from the paper's order of steps: a classifier that knows nothing
then has the ratio 1 also where one set is much the larger. A split is only as good as its features: what they do not show is called
in support.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edgeft.diagnosis.intervals import Floats, Interval, auc
from edgeft.errors import DataError, TrainingError
from edgeft.probe import Features, LogisticRegression

FOLDS = 5
MIN_IMAGES = 20
"""In either set: four in a fold."""
EPSILON = 0.1
"""Out of support is what is at least 1 / EPSILON times as dense among the shifted images; the value of the paper's figures."""
PENALTIES = (1e-1, 1e-2, 1e-3)
"""Tried from the largest on; the one with the least loss on images that a model has not seen is kept."""
MAX_ITER = 60
MAX_SCALE = 100.0
"""Bound of the calibrated scale, for sets that are separated without an error."""

Values = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class SupportSplit:
    """Log density ratios (natural logarithm) of the reference images and of the shifted ones, in their order.

    `auc` is the probability that a shifted image scores higher than a reference image, with its 95 % interval.
    """

    ref: Floats
    shift: Floats
    auc: float
    auc_interval: Interval
    penalty: float
    scale: float

    @property
    def out_of_support(self) -> NDArray[np.bool_]:
        """Which shifted images the reference has (next to) nothing like."""
        return _outside(self.shift)

    @property
    def ref_out_of_support(self) -> NDArray[np.bool_]:
        """Reference images that are mistaken for such: a check, their share should be below EPSILON."""
        return _outside(self.ref)


def split_support(ref: Values, shift: Values, copies: NDArray[np.int64], seed: int = 0) -> SupportSplit:
    """Split shifted images by their frozen features [n, d], given those of the reference images [m, d].

    `copies` [m + n], of reference and shifted images in this order, numbers the distinct images: copies of one image stay in one fold,
    so that none is scored by a model that has seen it. Raises DataError where a set has fewer than MIN_IMAGES images, TrainingError
    where features are not finite or the same for all images.
    """
    for name, values in (("reference", ref), ("shifted", shift)):
        if len(values) < MIN_IMAGES:
            raise DataError(
                f"{len(values)} {name} images are too few to tell what is in support", f"at least {MIN_IMAGES} are needed of each set"
            )
    values = np.concatenate([ref, shift])
    if not np.isfinite(values).all():
        raise TrainingError("the features of the images are not finite", "check the weights, data.mean and data.std")
    spread = values.std(axis=0)
    if not spread.any():
        raise TrainingError("all images have the same features: the backbone sees nothing", "check the weights, data.mean and data.std")
    # Of both sets together, so that no fold learns from it which is which. A constant feature says nothing and is left at 0.
    values = (values - values.mean(axis=0)) / np.where(spread > 0, spread, 1)
    shifted = np.arange(len(values)) >= len(ref)
    scores = _cross_fitted(values, shifted, _folds(shifted, copies, seed))
    prior = np.log(len(shift) / len(ref))
    losses = [_loss(row, shifted, prior) for row in scores]
    best = int(np.argmin(losses))
    scale = _calibrated(scores[best], shifted, prior)
    ratios = scale * scores[best]
    area, interval = auc(scores[best][~shifted], scores[best][shifted])
    return SupportSplit(ratios[~shifted], ratios[shifted], area, interval, PENALTIES[best], scale)


def _outside(log_ratios: Floats) -> NDArray[np.bool_]:
    outside: NDArray[np.bool_] = log_ratios >= np.log(1 / EPSILON)
    return outside


def _folds(shifted: NDArray[np.bool_], copies: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The fold of each image: FOLDS parts with the same share of either set, up to copies."""
    distinct, first, which = np.unique(copies, return_index=True, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(distinct))
    order = order[np.argsort(shifted[first][order], kind="stable")]  # One set after the other, each in random order.
    fold = np.empty(len(distinct), np.int64)
    fold[order] = np.arange(len(distinct)) % FOLDS
    found: NDArray[np.int64] = fold[which]
    return found


def _cross_fitted(values: Values, shifted: NDArray[np.bool_], folds: NDArray[np.int64]) -> Floats:
    """Scores [penalties, images]: log odds less the prior log odds, by the model that has not seen the image."""
    scores = np.empty((len(PENALTIES), len(values)))
    for fold in range(FOLDS):
        seen = folds != fold
        train = Features(torch.from_numpy(values[seen]), torch.from_numpy(shifted[seen].astype(np.int64)))
        problem = LogisticRegression(train, torch.arange(2), mean=0.0, std=1.0)
        prior = np.log(shifted[seen].sum() / (~shifted[seen]).sum())
        for number, penalty in enumerate(PENALTIES):
            problem.solve(penalty, MAX_ITER)
            weight, bias = (problem.weight[1] - problem.weight[0]).numpy(), float(problem.bias[1] - problem.bias[0])
            scores[number, ~seen] = values[~seen] @ weight + bias - prior
    return scores


def _loss(scores: Floats, shifted: NDArray[np.bool_], prior: float) -> float:
    """Mean cross-entropy of scores without the prior log odds."""
    log_odds = np.where(shifted, 1, -1) * (scores + prior)
    return float(np.logaddexp(0, -log_odds).mean())


def _calibrated(scores: Floats, shifted: NDArray[np.bool_], prior: float) -> float:
    """The scale in 0 ... MAX_SCALE with the least loss, which is convex in it: thirds of the interval are cut off in turns."""
    low, high = 0.0, MAX_SCALE
    for _ in range(60):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if _loss(left * scores, shifted, prior) <= _loss(right * scores, shifted, prior):
            high = right
        else:
            low = left
    return (low + high) / 2
