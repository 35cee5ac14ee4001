"""Splits made of other splits: some of their images, or those of two."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgeft.data import ImageSource, Split


class _SelectedImages:
    """Some images of another source."""

    def __init__(self, source: ImageSource, indices: NDArray[np.int64]) -> None:
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def image(self, index: int) -> NDArray[np.uint8]:
        """RGB bytes of one image."""
        return self._source.image(int(self._indices[index]))


class _JoinedImages:
    """The images of several sources one after the other."""

    def __init__(self, *sources: ImageSource) -> None:
        self._sources = sources
        self._starts = np.cumsum([0, *map(len, sources)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def image(self, index: int) -> NDArray[np.uint8]:
        """RGB bytes of one image."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sources[number].image(index - int(self._starts[number]))


def selected(split: Split, indices: NDArray[np.int64]) -> Split:
    """The images of a split at the given places, in that order."""
    groups = None if split.groups is None else split.groups[indices]
    return replace(split, images=_SelectedImages(split.images, indices), labels=split.labels[indices], groups=groups)


def joined(first: Split, second: Split) -> Split:
    """Both splits as one, of the kind and the name of the first; without groups."""
    labels = np.concatenate([first.labels, second.labels])
    return replace(first, images=_JoinedImages(first.images, second.images), labels=labels, groups=None)


def divided(split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Two splits of its images in their order, drawn by `seed`: all but `share` of them, and these, one at the least."""
    chosen = np.zeros(len(split), dtype=bool)
    chosen[np.random.default_rng(seed).permutation(len(split))[: max(1, int(share * len(split)))]] = True
    return selected(split, np.flatnonzero(~chosen)), selected(split, np.flatnonzero(chosen))
