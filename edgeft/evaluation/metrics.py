"""Accuracy of top classes: top-k, flips against another model, groups and macro-F1. NumPy only."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeft.report import wilson

Classes = NDArray[np.int64]
"""One class index per image, shape [n]: true ones, or a model's answers."""
MIN_IMAGES = 30
"""Below this many images a 95 % interval is wider than 30 points at 50 %: reports say that the set is too small."""
_ROWS = 4096


def row_parts(n: int) -> Iterator[slice]:
    """Slices that cover n rows a few thousand at a time, so that logits in a file are never in memory as a whole."""
    for start in range(0, n, _ROWS):
        yield slice(start, min(start + _ROWS, n))


def by_rows(function: Callable[[NDArray[np.float32]], NDArray[np.float64]], rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """A function of rows [n, k] to values [n], applied a few thousand rows at a time."""
    return np.concatenate([np.zeros(0), *(function(np.asarray(rows[part])) for part in row_parts(len(rows)))])


@dataclass(frozen=True)
class Share:
    """A share of images: `correct` of `n`, with its 95 % Wilson interval (Wilson 1927)."""

    n: int
    correct: int

    @property
    def value(self) -> float:
        """The share, 0 ... 1; 0 where there is nothing."""
        return self.correct / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high bound of the 95 % interval."""
        return wilson(self.correct, self.n)

    @property
    def too_small(self) -> bool:
        """Whether there are fewer than MIN_IMAGES images."""
        return self.n < MIN_IMAGES

    @classmethod
    def of(cls, hits: NDArray[np.bool_]) -> "Share":
        """From one flag per image."""
        return cls(len(hits), int(hits.sum()))


def in_top(logits: NDArray[np.float32], labels: Classes, k: int) -> NDArray[np.bool_]:
    """Whether the true class is among the k highest scores, shape [n]; of equal scores the class with the lower index comes first.

    With k = 1 this is argmax = label. With k at or above the number of classes every image is a hit.
    """
    hits = np.empty(len(labels), bool)
    for part in row_parts(len(labels)):
        rows, true = np.asarray(logits[part]), labels[part, None]
        own = np.take_along_axis(rows, true, axis=1)
        ahead = (rows > own) | ((rows == own) & (np.arange(rows.shape[1]) < true))
        hits[part] = ahead.sum(axis=1) < k
    return hits


@dataclass(frozen=True)
class Flips:
    """Images on which a model answers otherwise than a reference does: all; right there and wrong here; wrong there and right here."""

    n: int
    flipped: int
    negative: int
    positive: int

    @classmethod
    def of(cls, top: Classes, reference: Classes, labels: Classes) -> "Flips":
        """From both models' answers on the same images, in the same order."""
        was, now = reference == labels, top == labels
        return cls(len(labels), int((top != reference).sum()), int((was & ~now).sum()), int((now & ~was).sum()))

    @property
    def rate(self) -> float:
        """Share of images whose answer differs."""
        return self.flipped / self.n if self.n else 0.0


def macro_f1(top: Classes, labels: Classes, n_classes: int) -> float:
    """Unweighted mean of F1 over the classes that have images; a class that is never answered has F1 = 0.

    F1 of a class is 2 TP / (2 TP + FP + FN). Classes without images are left out, as in WILDS (Koh et al. 2021), not counted as 0 or 1.
    """
    true = np.bincount(labels, minlength=n_classes)
    answered = np.bincount(top, minlength=n_classes)
    hits = np.bincount(labels[top == labels], minlength=n_classes)
    present = true > 0
    return float(np.mean(2 * hits[present] / (true + answered)[present])) if present.any() else 0.0


def by_group(hits: NDArray[np.bool_], groups: Sequence[str]) -> dict[str, Share]:
    """Accuracy in each group that has images, sorted by name; `groups` names the group of each image."""
    names, index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    n, correct = np.bincount(index, minlength=len(names)), np.bincount(index, weights=hits, minlength=len(names))
    return {str(name): Share(int(total), int(right)) for name, total, right in zip(names, n, correct, strict=True)}


def worst_group(groups: Mapping[str, Share]) -> str:
    """Name of the group with the lowest accuracy; the first by name of equal ones."""
    return min(groups, key=lambda name: (groups[name].value, name))
