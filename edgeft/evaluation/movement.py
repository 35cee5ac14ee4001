"""How far fine-tuning moved a classifier: its features of given images, and its head (the distortion measure of the LP-FT paper)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeft.evaluation.metrics import row_parts

_LEAST = 1e-12
"""Norms are at least this, so that features that were 0 give a finite share."""


@dataclass(frozen=True)
class Moved:
    """A Euclidean distance, and the same as a share of the norm before; of features, both are means over images."""

    distance: float
    relative: float


def moved_features(before: NDArray[np.float32], after: NDArray[np.float32]) -> Moved:
    """Mean movement of the rows of [n, d], which may be memory-mapped files (Kumar et al. 2022, section 3)."""
    distance = relative = 0.0
    for part in row_parts(len(before)):
        old, new = (np.asarray(rows[part], np.float64) for rows in (before, after))
        gone = np.linalg.norm(new - old, axis=1)
        distance += gone.sum()
        relative += (gone / np.maximum(np.linalg.norm(old, axis=1), _LEAST)).sum()
    return Moved(float(distance / max(len(before), 1)), float(relative / max(len(before), 1)))


def moved_head(before: NDArray[np.floating], after: NDArray[np.floating]) -> Moved:
    """Movement of a head given as one vector, weight and bias: the Frobenius distance."""
    old, new = before.astype(np.float64), after.astype(np.float64)
    distance = float(np.linalg.norm(new - old))
    return Moved(distance, distance / max(float(np.linalg.norm(old)), _LEAST))
