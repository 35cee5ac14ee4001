"""The 15 common corruptions and 4 extra ones at five severities, on batches of image bytes; NumPy and Pillow only.

Names, definitions and parameters are those published with ImageNet-C and CIFAR-10-C (Hendrycks and Dietterich 2019); the code is ours,
so views are like theirs but not equal to theirs, and results are never called ImageNet-C or CIFAR-10-C. Images with a short side of at
most SMALL_SIDE pixels take the parameters made for 32 x 32, larger ones those made for 224 x 224; lengths are in pixels and not scaled,
except in the elastic transform, where they are shares of the side. DIFFERENCES names what is not as published.

A view depends on (corruption, severity, seed, index of the image) alone, not on the batch in which it is made.
"""

import io
import itertools
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeft.errors import ConfigError
from edgeft.evaluation.filters import Planes, disk_blur, motion_blurred, smooth, warped, window, zoomed
from edgeft.evaluation.streams import streams
from edgeft.evaluation.weather import Rngs, fog, frost, snow, spatter
from edgeft.registry import nearest
from edgeft.runner import Images

VERSION = 1
"""Raised by a change that alters views, so that predictions on old ones are not mixed with new ones."""
SMALL_SIDE = 64
SEVERITIES = (1, 2, 3, 4, 5)

MAIN = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "frost", "fog",
    "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""Published for validation and tuning: never part of a mean over corruptions."""
ALL = MAIN + EXTRA
SUBSET = ("impulse_noise", "glass_blur", "motion_blur", "fog", "brightness", "contrast", "pixelate", "jpeg_compression")
"""One or two of each family; impulse noise and glass blur because they are said to cost quantized nets most (arXiv 2308.02350)."""
NOT_RANDOM = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur", "saturate")
"""Their views depend on the image and the severity alone."""
DIFFERENCES = {
    "frost": "drawn ice in place of photographs",
    "motion_blur": "smeared to nearest pixels by our own code in place of ImageMagick",
    "snow": "smeared to nearest pixels by our own code in place of ImageMagick",
    "spatter": "edges of drops from their mask in place of Canny's detector",
}
"""What is not as published, by corruption."""

Selection = Literal["none", "subset", "all"] | Sequence[str]


def selected(selection: Selection) -> tuple[str, ...]:
    """The corruptions that are meant, in their usual order. Raises ConfigError with the nearest names for an unknown one."""
    named = {"none": (), "subset": SUBSET, "all": ALL}
    wanted = named[selection] if isinstance(selection, str) and selection in named else selection
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    for name in wanted:
        if name not in ALL:
            close = nearest(name, list(ALL))
            hint = f"known: none, subset, all, or of {', '.join(ALL)}" + (f"\n  did you mean: {', '.join(close)}" if close else "")
            raise ConfigError(f"unknown corruption '{name}'", hint)
    return tuple(name for name in ALL if name in wanted)


def corrupt(images: Images, corruption: str, severity: int, indices: Sequence[int] | NDArray[np.int64], seed: int = 0) -> Images:
    """Corrupted image bytes [n, 3, h, w]; `indices` [n] are the numbers of the images in their set.

    Raises ConfigError for an unknown corruption or a severity outside 1 ... 5.
    """
    (name,) = selected([corruption])
    if severity not in SEVERITIES:
        raise ConfigError(f"severity {severity} of corruption '{name}'", "severities are 1, 2, 3, 4 and 5")
    if len(images) == 0:
        return images.copy()
    rngs = [] if name in NOT_RANDOM else streams((seed, zlib.crc32(name.encode()), severity), indices)
    changed = _apply(name, images, rngs, _parameters(name, images, severity))
    if changed.dtype == np.uint8:
        return changed
    np.clip(changed, 0, 1, out=changed)
    changed *= 255
    found: Images = np.rint(changed, out=changed).astype(np.uint8)
    return found


def _parameters(name: str, images: Images, severity: int) -> tuple[Any, ...]:
    values = PARAMETERS[name][0 if min(images.shape[2:]) <= SMALL_SIDE else 1][severity - 1]
    return values if isinstance(values, tuple) else (values,)


def _apply(name: str, images: Images, rngs: Rngs, parameters: tuple[Any, ...]) -> NDArray[Any]:
    if name in _ON_BYTES:
        return _ON_BYTES[name](images, rngs, *parameters)
    return _ON_PLANES[name](images.astype(np.float32) / np.float32(255), rngs, *parameters)


# Noise


def _normal(x: Planes, rngs: Rngs) -> Planes:
    return np.stack([rng.standard_normal(x.shape[1:], dtype=np.float32) for rng in rngs])


def gaussian_noise(x: Planes, rngs: Rngs, sigma: float) -> Planes:
    """Normal noise of standard deviation `sigma`."""
    return x + np.float32(sigma) * _normal(x, rngs)


def speckle_noise(x: Planes, rngs: Rngs, sigma: float) -> Planes:
    """Normal noise in proportion to the value."""
    return x + x * (np.float32(sigma) * _normal(x, rngs))


def shot_noise(x: Planes, rngs: Rngs, photons: float) -> Planes:
    """Poisson noise; white is `photons` counts."""
    return np.stack([rng.poisson(one * photons) for one, rng in zip(x, rngs, strict=True)]).astype(np.float32) / np.float32(photons)


def impulse_noise(x: Planes, rngs: Rngs, share: float) -> Planes:
    """A share of the values, each channel by itself, becomes 0 or 1."""
    drawn = np.stack([rng.random(x.shape[1:], dtype=np.float32) for rng in rngs])
    return np.where(drawn < share / 2, np.float32(0), np.where(drawn < share, np.float32(1), x))


# Blur


def gaussian_blur(x: Planes, rngs: Rngs, sigma: float) -> Planes:
    """Gaussian blur of `sigma` pixels."""
    return smooth(x, sigma)


def glass_blur(x: Planes, rngs: Rngs, sigma: float, reach: int, rounds: int) -> Planes:
    """Pixels change places with random neighbours, between two Gaussian blurs.

    The definition visits pixels one after the other. Those of different rows that are far enough apart touch different pixels, so a
    diagonal front of them is exchanged at once, with the same result.
    """
    n, _, height, width = x.shape
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    order, ends = _fronts(len(rows), len(columns), 2 * reach + 1)
    first = np.arange(n) * (height * width)
    here = (rows[:, None] * width + columns).reshape(-1, 1)[order] + first
    places = np.tile(np.arange(height * width), n)
    for _ in range(rounds):
        moves = np.stack([rng.integers(-reach, reach, (2, len(rows), len(columns))) for rng in rngs]).reshape(n, 2, -1)
        there = here + (moves[:, 0] * width + moves[:, 1]).T[order]
        for start, end in itertools.pairwise(ends):
            a, b = here[start:end], there[start:end]
            places[a], places[b] = places[b], places[a]
    blurred = smooth(x, sigma).reshape(n, 3, -1)
    moved = np.take_along_axis(blurred, places.reshape(n, 1, -1), axis=2)
    return smooth(moved.reshape(x.shape), sigma)


@lru_cache(maxsize=8)
def _fronts(n_rows: int, n_columns: int, lag: int) -> tuple[NDArray[np.int64], list[int]]:
    """Steps of a scan row by row in an order of fronts, and where these begin and end: each row is `lag` columns behind the one before."""
    row, column = np.divmod(np.arange(n_rows * n_columns), max(n_columns, 1))
    time = column + lag * row
    order = np.argsort(time, kind="stable")
    starts = (np.flatnonzero(np.diff(time[order])) + 1).tolist()
    return order, [0, *starts, len(order)]


def defocus_blur(images: Images, rngs: Rngs, radius: float, alias_sigma: float) -> Planes:
    """The mean over a disk, as of a lens out of focus."""
    return disk_blur(images, radius, alias_sigma)


def motion_blur(x: Planes, rngs: Rngs, radius: int, sigma: float) -> Planes:
    """Smeared along a direction between -45 and 45 degrees."""
    return motion_blurred(x, radius, sigma, [rng.uniform(-45, 45) for rng in rngs])


def zoom_blur(x: Planes, rngs: Rngs, end: float, step: float) -> Planes:
    """The mean of the image and of its enlargements by 1, 1 + step, ... below `end`."""
    factors = np.arange(1, end, step)
    total = 2 * x  # the image itself and its enlargement by 1
    windows = [tuple(window(side, float(factor)) for side in x.shape[-2:]) for factor in factors[1:]]
    for _, same in itertools.groupby(zip(windows, factors[1:], strict=True), key=lambda pair: pair[0]):
        alike = [float(factor) for _, factor in same]  # to whole pixels these are one enlargement
        enlarged = zoomed(x, alike[0])
        for _ in alike:
            total += enlarged
    return total / np.float32(len(factors) + 1)


# Colour


def brightness(x: Planes, rngs: Rngs, amount: float) -> Planes:
    """HSV value raised by `amount`; hue and saturation stay."""
    value = x.max(axis=1, keepdims=True)
    raised = (value + np.float32(amount)).clip(0, 1)
    bright: Planes = np.where(value > 0, x * (raised / np.maximum(value, 1e-6)), raised)
    return bright


def saturate(x: Planes, rngs: Rngs, factor: float, amount: float) -> Planes:
    """HSV saturation times `factor` plus `amount`; hue and value stay. Grey has hue 0, so that it becomes reddish."""
    value = x.max(axis=1, keepdims=True)
    spread = value - x.min(axis=1, keepdims=True)
    old = spread / np.maximum(value, 1e-6)
    new = (old * np.float32(factor) + np.float32(amount)).clip(0, 1)
    grey = np.concatenate([value, value * (1 - new), value * (1 - new)], axis=1)
    return np.where(spread > 0, value - (value - x) * (new / np.maximum(old, 1e-6)), grey)


def contrast(x: Planes, rngs: Rngs, factor: float) -> Planes:
    """Each channel's distance from its mean times `factor`."""
    mean = x.mean(axis=(2, 3), keepdims=True)
    flat: Planes = (x - mean) * np.float32(factor) + mean
    return flat


# Geometry and compression


def elastic_transform(x: Planes, rngs: Rngs, strength: float, sigma: float, jitter: float) -> Planes:
    """A random affine map, then a smooth random displacement; all three parameters are shares of the side."""
    height, width = x.shape[2:]
    side = min(height, width)
    y, column = np.meshgrid(np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32), indexing="ij")
    ones = np.ones_like(y)
    maps = _affine(height, width, jitter * side, rngs)
    source = np.einsum("nij,jhw->nihw", maps, np.stack([y, column, ones])).astype(np.float32)
    x = warped(x, source[:, 0], source[:, 1], "mirror")
    moves = np.stack([rng.uniform(-1, 1, (2, height, width)) for rng in rngs]).astype(np.float32)
    moves = smooth(moves, sigma * side, truncate=3.0, border="reflect") * np.float32(strength * side)
    return warped(x, y + moves[:, 0], column + moves[:, 1], "reflect")


def _affine(height: int, width: int, jitter: float, rngs: Rngs) -> NDArray[np.float64]:
    """Affine maps [n, 2, 3] that take three moved points back to where they were; (row, column, 1) in, (row, column) out."""
    centre, reach = np.array([height // 2, width // 2]), max(min(height, width) // 3, 1)
    points = centre + reach * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = points + np.stack([rng.uniform(-jitter, jitter, points.shape) for rng in rngs])
    homogeneous = np.concatenate([moved, np.ones((len(rngs), 3, 1))], axis=2)
    return np.linalg.solve(homogeneous, np.broadcast_to(points, moved.shape)).transpose(0, 2, 1)


def pixelate(images: Images, rngs: Rngs, share: float) -> Images:
    """Box averages of a coarser grid with `share` of the sides."""

    def change(image: Image.Image) -> Image.Image:
        coarse = image.resize((max(int(image.width * share), 1), max(int(image.height * share), 1)), Image.Resampling.BOX)
        return coarse.resize(image.size, Image.Resampling.BOX)

    return _each(images, change)


def jpeg_compression(images: Images, rngs: Rngs, quality: int) -> Images:
    """JPEG at a quality of 1 ... 100."""

    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file, formats=("JPEG",))

    return _each(images, change)


def _each(images: Images, change: Callable[[Image.Image], Image.Image]) -> Images:
    rows = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    changed = np.empty_like(rows)
    for index, image in enumerate(rows):
        changed[index] = np.asarray(change(Image.fromarray(image)))
    return np.ascontiguousarray(changed.transpose(0, 3, 1, 2))


_ON_BYTES: dict[str, Callable[..., NDArray[Any]]] = {
    "defocus_blur": defocus_blur, "pixelate": pixelate, "jpeg_compression": jpeg_compression,
}  # fmt: skip
_ON_PLANES: dict[str, Callable[..., Planes]] = {
    "gaussian_noise": gaussian_noise, "shot_noise": shot_noise, "impulse_noise": impulse_noise, "glass_blur": glass_blur,
    "motion_blur": motion_blur, "zoom_blur": zoom_blur, "snow": snow, "frost": frost, "fog": fog, "brightness": brightness,
    "contrast": contrast, "elastic_transform": elastic_transform, "speckle_noise": speckle_noise, "gaussian_blur": gaussian_blur,
    "spatter": spatter, "saturate": saturate,
}  # fmt: skip

PARAMETERS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "gaussian_noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": ((500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": ((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "speckle_noise": ((0.06, 0.1, 0.12, 0.16, 0.2), (0.15, 0.2, 0.35, 0.45, 0.6)),
    "gaussian_blur": ((0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6)),
    "glass_blur": (
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "defocus_blur": (((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)), ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "motion_blur": (((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)), ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": (
        ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
         (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
        ((0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
         (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)),
    ),
    "frost": (((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)), ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    "fog": (((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)), ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    ),
    "pixelate": ((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
    "spatter": (
        ((0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0), (0.65, 0.3, 1, 0.69, 0.5, 0), (0.65, 0.1, 0.7, 0.69, 0.6, 1),
         (0.65, 0.1, 0.5, 0.68, 0.6, 1)),
        ((0.65, 0.3, 4, 0.69, 0.6, 0), (0.65, 0.3, 3, 0.68, 0.6, 0), (0.65, 0.3, 2, 0.68, 0.5, 0), (0.65, 0.3, 1, 0.65, 1.5, 1),
         (0.67, 0.4, 1, 0.65, 1.5, 1)),
    ),
    "saturate": (((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)), ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))),
}  # fmt: skip
"""Published parameters by severity: for small images, for large ones. Noise and colour are in units of white = 1."""
