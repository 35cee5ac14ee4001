"""Images that are hard on an integer network: extremes, sums as large as the weights allow, rounding ties, noise of several kinds."""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeft.graph import Conv, IntegerGraph
from edgeft.interpret import image_offset
from edgeft.runner import Images

N_COLOURS, N_TIE_IMAGES = 20_000, 8
"""Colours tried for ties, and images made of the best of them."""
N_EXTREMAL = 16
"""Output channels of the first layer that are driven to both ends."""
PATCH = 8
"""Side of the patches of one colour in smooth noise, in pixels."""
JITTER = 8
"""Largest change of a byte in noise around given images."""


@dataclass(frozen=True)
class Inputs:
    """Images uint8 [n, channels, height, width] by where they come from, in the order in which they are tried."""

    golden: Images
    adversarial: Images
    random: Images

    @property
    def all(self) -> Images:
        """All of them."""
        return np.concatenate([self.golden, self.adversarial, self.random])

    @property
    def summary(self) -> str:
        """How many of each, for one line of output."""
        return f"{len(self.golden)} golden, {len(self.adversarial)} adversarial, {len(self.random)} random"


def hard_inputs(graph: IntegerGraph, golden: Images, n: int, seed: int) -> Inputs:
    """`n` images for a graph, or fewer: the golden ones first, then adversarial ones, the rest random by `seed`."""
    golden = golden[:n]
    adversarial = adversarial_images(graph, seed)[: n - len(golden)]
    return Inputs(golden, adversarial, random_images(graph, golden, n - len(golden) - len(adversarial), seed))


def adversarial_images(graph: IntegerGraph, seed: int) -> Images:
    """All-min, all-max and mixed colours, stripes and checkerboards, sums at both ends of the first layers, and ties in them."""
    shape = graph.tensors[graph.input].shape
    colours = [*itertools.product((0, 255), repeat=shape[0]), (127,) * shape[0], (128,) * shape[0]]
    rows, columns = np.indices(shape[1:])
    patterns = [np.where((pattern + phase) % 2, 255, 0) for pattern in (rows, columns, rows + columns) for phase in (0, 1)]
    found = [*(_plain(shape, colour) for colour in colours), *(np.broadcast_to(pattern, shape) for pattern in patterns)]
    for op in graph.consumers[graph.input]:
        if isinstance(op, Conv):
            found += _extremal(graph, op) + _ties(graph, op, np.random.default_rng(seed))
            behind = graph.consumers[op.output] if _pixelwise(graph, op) else ()
            found += [image for reader in behind if isinstance(reader, Conv) for image in _extremal(graph, reader)]
    return np.stack(found).astype(np.uint8)


def random_images(graph: IntegerGraph, golden: Images, n: int, seed: int) -> Images:
    """In turn: independent bytes, patches of one colour each, and golden images with a little noise (patches where there are none)."""
    rng, shape = np.random.default_rng(seed), graph.tensors[graph.input].shape
    found = np.empty((n, *shape), np.uint8)
    for index in range(n):
        if index % 3 == 0:
            found[index] = rng.integers(0, 256, shape)
        elif index % 3 == 1 or not len(golden):
            coarse = rng.integers(0, 256, (shape[0], -(-shape[1] // PATCH), -(-shape[2] // PATCH)))
            found[index] = coarse.repeat(PATCH, 1).repeat(PATCH, 2)[:, : shape[1], : shape[2]]
        else:
            near = golden[rng.integers(len(golden))].astype(np.int64) + rng.integers(-JITTER, JITTER + 1, shape)
            found[index] = near.clip(0, 255)
    return found


def _pixelwise(graph: IntegerGraph, op: Conv) -> bool:
    """Whether a layer only scales each byte, so that the one behind it sums up what the image says."""
    weight = graph.constants[op.weight]
    return weight.shape == (op.groups, 1, 1, 1) and bool((weight > 0).all()) and op.stride == (1, 1) and not any(op.padding)


def _plain(shape: tuple[int, ...], colour: NDArray[np.int64] | tuple[int, ...]) -> NDArray[np.int64]:
    return np.broadcast_to(np.asarray(colour, np.int64).reshape(-1, 1, 1), shape)


def _dense(graph: IntegerGraph, op: Conv) -> NDArray[np.int64]:
    """Weights [out, in, kh, kw] with zeros between groups."""
    weight = graph.constants[op.weight].astype(np.int64)
    per_out, per_in = len(weight) // op.groups, weight.shape[1]
    dense = np.zeros((len(weight), per_in * op.groups, *weight.shape[2:]), np.int64)
    for out in range(len(weight)):
        start = out // per_out * per_in
        dense[out, start : start + per_in] = weight[out]
    return dense


def _extremal(graph: IntegerGraph, op: Conv) -> list[NDArray[np.int64]]:
    """For some output channels the image that is 255 where the weight is positive and 0 elsewhere, tiled, and its opposite."""
    _, height, width = graph.tensors[graph.input].shape
    found = []
    for weight in _dense(graph, op)[:N_EXTREMAL]:
        pattern = np.where(weight > 0, 255, 0).repeat(op.dilation[0], 1).repeat(op.dilation[1], 2)
        tiles = [-(-(side + pad) // each) for side, pad, each in zip((height, width), op.padding[:2], pattern.shape[1:], strict=True)]
        # As if the padding were part of the tiling: then some window meets a whole pattern at any stride.
        tiled = np.tile(pattern, (1, *tiles))[:, op.padding[0] :, op.padding[1] :][:, :height, :width]
        found += [tiled, 255 - tiled]
    return found


def _ties(graph: IntegerGraph, op: Conv, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Images of one colour, and mosaics of such colours, at which many output channels are exactly between two codes."""
    shape, shift = graph.tensors[graph.input].shape, graph.shift(op)
    colours = rng.integers(0, 256, (N_COLOURS, shape[0]))
    acc = (colours - image_offset(graph)) @ _dense(graph, op).sum((2, 3)).T + graph.constants[op.bias].astype(np.int64)
    k = np.broadcast_to(shift.clip(1, 31), acc.shape)
    tied = ((acc & ((1 << k) - 1)) == (1 << (k - 1))) & (shift > 0)
    order = np.argsort(-tied.sum(1), kind="stable")
    best = colours[order[: max(1, min(N_TIE_IMAGES, int(tied.any(1).sum())))]]
    mosaic = best[rng.integers(len(best), size=shape[1:])].transpose(2, 0, 1)
    return [*(_plain(shape, colour) for colour in best), mosaic]
