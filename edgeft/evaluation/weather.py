"""The corruptions that lay something over the image: fog, frost, snow and spatter. NumPy only.

Definitions and parameters are those published with ImageNet-C (Hendrycks and Dietterich 2019), the code is ours. Photographs of frost
do not come with edgeft: the ice is drawn. Edges of spattered drops are those of the drops' mask; the publication finds them with Canny's
detector.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeft.evaluation.filters import Planes, box3, distance_to, motion_blurred, padded_by, plasma, smooth, zoomed

Rngs = Sequence[np.random.Generator]
"""The random stream of every image of a batch."""

_GREY = np.array([0.299, 0.587, 0.114], np.float32)
_WATER: Planes = np.array([175 / 255, 238 / 255, 238 / 255], np.float32)[:, None, None]
_MUD: Planes = np.array([63 / 255, 42 / 255, 20 / 255], np.float32)[:, None, None]
_ICE = np.array([0.86, 0.94, 1.0], np.float32)[:, None, None]
_ICE_DECAY = 1.35
"""Roughness of the drawn ice: much rougher than fog, so that it has needles."""
_EMBOSS = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], np.float32)
_DROP_REACH = 20


def fog(x: Planes, rngs: Rngs, amount: float, decay: float) -> Planes:
    """A cloud is added, then the brightest value is brought back to where it was."""
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    foggy: Planes = (x + amount * _clouds(x, rngs, decay)) * (brightest / (brightest + amount))
    return foggy


def frost(x: Planes, rngs: Rngs, keep: float, amount: float) -> Planes:
    """Drawn ice is added to the darkened image."""
    ridges = 1 - abs(2 * _clouds(x, rngs, _ICE_DECAY) - 1)
    icy: Planes = keep * x + amount * ridges**1.5 * _ICE
    return icy


def _clouds(x: Planes, rngs: Rngs, decay: float) -> Planes:
    height, width = x.shape[-2:]
    return plasma(rngs, max(height, width), decay)[:, None, :height, :width]


def _normal(x: Planes, rngs: Rngs, mean: float, deviation: float) -> Planes:
    """One map [n, h, w] for each image."""
    drawn = np.stack([rng.standard_normal(x.shape[-2:], dtype=np.float32) for rng in rngs])
    return drawn * np.float32(deviation) + np.float32(mean)


def snow(x: Planes, rngs: Rngs, mean: float, deviation: float, zoom: float, floor: float, radius: int, sigma: float, keep: float) -> Planes:
    """The image is whitened, then flakes (thresholded noise, enlarged and smeared downwards) are added, also turned by 180 degrees."""
    flakes = zoomed(_normal(x, rngs, mean, deviation), zoom)
    flakes = np.where(flakes < floor, np.float32(0), flakes.clip(0, 1))
    layer = motion_blurred(flakes, radius, sigma, [rng.uniform(-135, -45) for rng in rngs])[:, None]
    grey = np.einsum("nchw,c->nhw", x, _GREY)[:, None]
    white = keep * x + (1 - keep) * np.maximum(x, 1.5 * grey + 0.5)
    snowy: Planes = white + layer + layer[..., ::-1, ::-1]
    return snowy


def spatter(x: Planes, rngs: Rngs, mean: float, deviation: float, sigma: float, floor: float, strength: float, mud: int) -> Planes:
    """Drops of water (strength: their brightness) or of mud (strength: softness of their edge in pixels)."""
    liquid = smooth(_normal(x, rngs, mean, deviation), sigma)
    liquid[liquid < floor] = 0
    if mud:
        cover = smooth((liquid > floor).astype(np.float32), strength)
        cover[cover < 0.8] = 0
        muddy: Planes = x + cover[:, None] * (_MUD - x)
        return muddy
    drops = liquid * _relief(liquid > 0)
    drops *= np.float32(strength) / np.maximum(drops.max(axis=(1, 2), keepdims=True), np.float32(1e-12))
    wet: Planes = x + drops[:, None] * _WATER
    return wet


def _relief(drops: NDArray[np.bool_]) -> Planes:
    """Light and shade of drops, masks [n, h, w]: their distance map, histogram-equalised and embossed; 0 ... 255."""
    wide = padded_by(drops, 1, "edge")
    around = wide[:, :-2, 1:-1] & wide[:, 2:, 1:-1] & wide[:, 1:-1, :-2] & wide[:, 1:-1, 2:]
    depth = np.floor(box3(distance_to(drops & ~around, _DROP_REACH)))
    levels = np.stack([_equalised(one.astype(np.uint8)) for one in depth]).astype(np.float32)
    padded = padded_by(levels, 1, "mirror")
    height, width = drops.shape[1:]
    lit = sum(_EMBOSS[i, j] * padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3))
    return box3(np.clip(np.asarray(lit, np.float32), 0, 255))


def _equalised(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes of one image spread so that their cumulative histogram is a line."""
    counts = np.bincount(levels.ravel(), minlength=256).cumsum()
    lowest = counts[counts > 0][0]
    if lowest == levels.size:
        return levels
    table = np.rint((counts - lowest) * (255 / (levels.size - lowest))).clip(0, 255).astype(np.uint8)
    equal: NDArray[np.uint8] = table[levels]
    return equal
