"""Image arithmetic of the corruptions: blurs, zooms, warps and fractal noise on float planes [..., height, width]. NumPy only.

The images of a batch are computed independently of each other, so that a view is the same in whatever batch it is made.
"""

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Planes = NDArray[np.float32]
"""Values, usually 0 ... 1, with height and width as the last two axes."""
Border = Literal["edge", "mirror", "reflect"]
"""What lies outside: the edge pixel (aaa|abc), the image mirrored at its last pixel (cb|abc) or beyond it (ba|abc)."""


def inside(index: NDArray[np.int64], n: int, border: Border) -> NDArray[np.int64]:
    """Indices of any size as those of the n pixels that stand for them."""
    if border == "edge" or n == 1:
        return index.clip(0, n - 1)
    low, high = (int(index.min()), int(index.max())) if index.size else (0, 0)
    # Looked up: a remainder takes longer than anything else that is done with the index.
    return _folded(min(low, 0), max(high, 0), n, border).take(index - min(low, 0))


@lru_cache(maxsize=64)
def _folded(low: int, high: int, n: int, border: Border) -> NDArray[np.int64]:
    """`inside` of low ... high."""
    period = 2 * n - (2 if border == "mirror" else 0)
    folded = np.arange(low, high + 1) % period
    return np.minimum(folded, (period if border == "mirror" else period - 1) - folded)


@lru_cache(maxsize=64)
def gaussian_matrix(n: int, sigma: float, truncate: float, border: Border) -> Planes:
    """Gaussian smoothing of n pixels as a matrix [n, n] with rows that sum to 1; the kernel ends after `truncate` sigmas."""
    radius = int(truncate * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / max(sigma, 1e-6)) ** 2)
    columns = inside(np.arange(n)[:, None] + offsets, n, border)
    matrix = np.zeros((n, n))
    np.add.at(matrix, (np.arange(n)[:, None], columns), kernel / kernel.sum())
    return matrix.astype(np.float32)


def smooth(planes: Planes, sigma: float, truncate: float = 4.0, border: Border = "edge") -> Planes:
    """Gaussian blur of standard deviation `sigma` pixels. One small product per plane, so that no plane depends on the batch."""
    height, width = planes.shape[-2:]
    rows = np.matmul(gaussian_matrix(height, sigma, truncate, border), planes)
    blurred: Planes = np.matmul(rows, gaussian_matrix(width, sigma, truncate, border).T)
    return blurred


def box3(planes: Planes) -> Planes:
    """Mean of the 3 x 3 pixels around each, mirrored at the border."""
    padded = padded_by(planes, 1, "mirror")
    height, width = planes.shape[-2:]
    rows = padded[..., :height, :] + padded[..., 1 : height + 1, :] + padded[..., 2:, :]
    mean: Planes = (rows[..., :width] + rows[..., 1 : width + 1] + rows[..., 2:]) / 9
    return mean


def padded_by(planes: NDArray, n: int, border: Border) -> NDArray:  # type: ignore[type-arg]
    """The planes with n more pixels on every side."""
    rows, columns = (inside(np.arange(-n, side + n), side, border) for side in planes.shape[-2:])
    return np.take(np.take(planes, rows, axis=-2), columns, axis=-1)


def disk_blur(images: NDArray[np.uint8], radius: float, alias_sigma: float) -> Planes:
    """Mean over a disk of `radius` pixels whose edge is softened by a small Gaussian; bytes in, 0 ... 1 out.

    The disk is summed row by row as differences of running sums, in integers, which costs the same at any radius.
    """
    reach, soft = math.floor(radius), 1 if radius <= 8 else 2
    height, width = images.shape[-2:]
    wide = padded_by(images, reach + soft, "mirror").astype(np.int32)
    sums = np.zeros((*wide.shape[:-1], wide.shape[-1] + 1), np.int32)
    np.cumsum(wide, axis=-1, out=sums[..., 1:])
    h, w = height + 2 * soft, width + 2 * soft
    disk, n = np.zeros((*images.shape[:-2], h, w), np.int32), 0
    for dy in range(-reach, reach + 1):
        half = math.isqrt(math.floor(radius * radius - dy * dy))
        rows = sums[..., reach + dy : reach + dy + h, :]
        disk += rows[..., reach + half + 1 : reach + half + 1 + w] - rows[..., reach - half : reach - half + w]
        n += 2 * half + 1
    return _softened(disk.astype(np.float32) / np.float32(255 * n), soft, alias_sigma)


def _softened(planes: Planes, reach: int, sigma: float) -> Planes:
    """A Gaussian of 2 * reach + 1 taps along both axes; the result is smaller by `reach` pixels on every side."""
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    taps = (kernel / kernel.sum()).astype(np.float32)
    h, w = planes.shape[-2] - 2 * reach, planes.shape[-1] - 2 * reach
    rows: Planes = taps[0] * planes[..., :h, :]
    for i, tap in enumerate(taps[1:], 1):
        rows += tap * planes[..., i : i + h, :]
    columns: Planes = taps[0] * rows[..., :w]
    for i, tap in enumerate(taps[1:], 1):
        columns += tap * rows[..., i : i + w]
    return columns


def zoomed(planes: Planes, factor: float) -> Planes:
    """The central 1 / factor of the planes enlarged to their size, by linear interpolation between its corner pixels."""
    return _along(_along(planes, factor, -2), factor, -1)


def window(side: int, factor: float) -> tuple[int, int]:
    """Pixels of a side that `zoomed` keeps, and to how many it enlarges them; what it gives depends on these alone."""
    kept = math.ceil(side / factor)
    return kept, round(kept * factor)


def _along(planes: Planes, factor: float, axis: int) -> Planes:
    side = planes.shape[axis]
    kept, enlarged = window(side, factor)
    if kept == enlarged == side:
        return planes
    first, trimmed = (side - kept) // 2, (enlarged - side) // 2
    places = first + (np.arange(side) + trimmed).clip(0, enlarged - 1) * ((kept - 1) / max(enlarged - 1, 1))
    low = np.floor(places).astype(int).clip(0, side - 1)
    share = (places - low).astype(np.float32).reshape(-1, *([1] * (-axis - 1)))
    below = np.take(planes, low, axis=axis)
    above: Planes = np.take(planes, (low + 1).clip(0, side - 1), axis=axis)
    above -= below
    above *= share
    above += below
    return above


def warped(planes: Planes, y: Planes, x: Planes, border: Border) -> Planes:
    """Planes [n, c, h, w] read at fractional rows `y` and columns `x`, each [n, h, w], by linear interpolation."""
    n, channels, height, width = planes.shape
    top, left = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
    down, right = (y - top).astype(np.float32), (x - left).astype(np.float32)
    rows = [inside(top + i, height, border) * width + np.arange(n).reshape(-1, 1, 1) * (height * width) for i in (0, 1)]
    columns = [inside(left + i, width, border) for i in (0, 1)]
    corners = [row + column for row in rows for column in columns]
    found = np.empty_like(planes)
    for channel in range(channels):
        flat = planes[:, channel].ravel()
        upper, upper_right, lower, lower_right = (flat.take(corner) for corner in corners)
        for here, beside in ((upper, upper_right), (lower, lower_right)):
            beside -= here
            beside *= right
            here += beside
        lower -= upper
        lower *= down
        np.add(upper, lower, out=found[:, channel])
    return found


def motion_blurred(planes: Planes, radius: int, sigma: float, degrees: Sequence[float]) -> Planes:
    """Images [n, ..., h, w] smeared, each in its direction: half a Gaussian over 2 * radius + 1 steps, each to its nearest pixel."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    # In the order of their directions, neighbours go to the same pixel in most steps, and go there together.
    order = np.argsort(degrees, kind="stable")
    angles = np.array([[math.sin(angle), math.cos(angle)] for angle in np.radians(degrees)[order].tolist()])
    moves = np.rint(steps[:, None, None] * angles).astype(int)
    height, width = planes.shape[-2:]
    reach = int(abs(moves).max())
    padded = padded_by(planes[order], reach, "edge")
    smeared, part = np.zeros_like(planes), np.empty_like(planes)
    for weight, there in zip(weights, moves, strict=True):
        ends = [0, *(np.flatnonzero((there[1:] != there[:-1]).any(axis=1)) + 1).tolist(), len(there)]
        for start, end in itertools.pairwise(ends):
            row, column = (there[start] + reach).tolist()
            np.multiply(padded[start:end, ..., row : row + height, column : column + width], weight, out=part[start:end])
        smeared += part
    found = np.empty_like(planes)
    found[order] = smeared
    return found


def plasma(rngs: Sequence[np.random.Generator], side: int, decay: float) -> Planes:
    """Cloud-like maps [n, side, side] in 0 ... 1 by midpoint displacement (diamond-square) on a torus.

    From level to level the displacement falls by `decay` squared, which is what the published parameter amounts to.
    """
    size = 1 << max(side - 1, 0).bit_length()
    noise = np.stack([rng.uniform(-1, 1, size * size) for rng in rngs]).astype(np.float32)
    grid = np.zeros((len(rngs), size, size), np.float32)
    used, strength, step = 0, 1.0, size
    while step > 1:
        half, cells = step // 2, size // step
        shape = (len(rngs), cells, cells)
        jitter = [strength * noise[:, used + k * cells**2 : used + (k + 1) * cells**2].reshape(shape) for k in range(3)]
        used += 3 * cells**2
        corners = grid[:, ::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=1)
        centres = (pairs + np.roll(pairs, -1, axis=2)) / 4 + jitter[0]
        grid[:, half::step, half::step] = centres
        beside = corners + np.roll(corners, -1, axis=2)
        grid[:, ::step, half::step] = (beside + centres + np.roll(centres, 1, axis=1)) / 4 + jitter[1]
        grid[:, half::step, ::step] = (pairs + centres + np.roll(centres, 1, axis=2)) / 4 + jitter[2]
        step, strength = half, strength / decay**2
    low, high = (find(grid, axis=(1, 2), keepdims=True) for find in (np.min, np.max))
    unit: Planes = ((grid - low) / np.maximum(high - low, 1e-12))[:, :side, :side]
    return unit


def distance_to(mask: NDArray[np.bool_], limit: int) -> Planes:
    """Distance in pixels to the nearest set pixel of masks [n, h, w], at most `limit`: along columns, then along rows."""
    column = _spread(np.where(mask, 0.0, float(limit * limit)).astype(np.float32), limit, axis=1)
    return np.sqrt(_spread(column, limit, axis=2))


def _spread(squares: Planes, limit: int, axis: int) -> Planes:
    """Minimum over shifts d along an axis of squares + d * d."""
    nearest = squares.copy()
    side = squares.shape[axis]
    for d in range(1, min(limit, side)):
        ahead, behind = [slice(None)] * 3, [slice(None)] * 3
        ahead[axis], behind[axis] = slice(d, None), slice(None, side - d)
        for here, there in ((ahead, behind), (behind, ahead)):
            np.minimum(nearest[tuple(here)], squares[tuple(there)] + d * d, out=nearest[tuple(here)])
    return nearest
