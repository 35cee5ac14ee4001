"""Small changes that should not change the answer: a translation by a few pixels, another resize filter. NumPy and Pillow only."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeft.data import ImageSource
from edgeft.data.preprocess import Preprocessing
from edgeft.evaluation.filters import padded_by
from edgeft.runner import Images

DISTANCES = (1, 2, 3, 4, 5, 6, 7, 8)
"""Pixels of a translation."""
FILTERS = ("bilinear", "bicubic", "nearest", "box")
"""Pillow's resize filters."""
_DIRECTIONS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))


def translated(images: Images, distance: int, indices: Sequence[int] | NDArray[np.int64]) -> Images:
    """Image bytes [n, 3, h, w] moved by `distance` pixels, along rows, columns or both; the edge pixels are repeated.

    The direction is one of eight and depends on the image's index alone, so that all directions take part equally.
    """
    height, width = images.shape[2:]
    wide = padded_by(images, distance, "edge")
    moved = np.empty_like(images)
    for place, index in enumerate(indices):
        down, right = _DIRECTIONS[int(index) % len(_DIRECTIONS)]
        top, left = distance * (1 - down), distance * (1 - right)
        moved[place] = wide[place, :, top : top + height, left : left + width]
    return moved


@dataclass(frozen=True)
class Refiltered:
    """Images of another source, resized and cropped to the network's size with one of Pillow's filters (an ImageSource)."""

    source: ImageSource
    p: Preprocessing
    filter: str

    def __len__(self) -> int:
        return len(self.source)

    def image(self, index: int) -> NDArray[np.uint8]:
        """RGB bytes [size, size, 3]: the short side resized to p.resize_side, without shrinking before, and the centre cut out."""
        image = Image.fromarray(np.ascontiguousarray(self.source.image(index)))
        short = min(image.size)
        width, height = (max(side * self.p.resize_side // short, self.p.resize_side) for side in image.size)
        resized = np.asarray(image.resize((width, height), Image.Resampling[self.filter.upper()]))
        top, left = round((height - self.p.size) / 2), round((width - self.p.size) / 2)
        return resized[top : top + self.p.size, left : left + self.p.size]


def as_is(p: Preprocessing) -> Preprocessing:
    """Preprocessing that leaves images of the network's size alone."""
    return replace(p, crop_pct=1.0)


def is_resized(source: ImageSource, p: Preprocessing) -> bool:
    """Whether the images of a source are resized at all: rendered sets come in the network's size. Looks at the first image."""
    return source.image(0).shape[:2] != (p.size, p.size) or p.resize_side != p.size
