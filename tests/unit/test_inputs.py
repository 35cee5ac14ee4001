"""Images that are hard on a network: where they come from, and that they do what they are for."""

from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeft.export.inputs import JITTER, PATCH, adversarial_images, hard_inputs, random_images
from edgeft.graph import Conv, IntegerGraph, Op
from edgeft.interpret import Interpreter
from edgeft.runner import Images
from tests.graphs import GraphBuilder
from tests.graphs import random_images as uniform_images

ImageFormat = Literal["u8.8", "s8.7"]
Geometry = dict[str, Any]

N_PATTERNS, N_COLOURS = 6, 2**3 + 2
"""Stripes and checkerboards; corners of the colour cube and two greys."""
PLAIN: Geometry = {"n_out": 4, "kernel": (3, 3), "padding": (0, 0, 0, 0)}
GEOMETRIES: dict[str, Geometry] = {
    "dense": PLAIN,
    "pointwise": {**PLAIN, "kernel": (1, 1)},
    "oblong": {**PLAIN, "kernel": (2, 5)},
    "grouped": {**PLAIN, "n_out": 6, "groups": 3},
    "dilated": {**PLAIN, "dilation": (2, 3)},
    "depthwise and dilated": {**PLAIN, "n_out": 3, "groups": 3, "dilation": (1, 2)},
    "many outputs": {**PLAIN, "n_out": 20},
}
PADDED: dict[str, Geometry] = {
    "3x3 of stride 2": {**PLAIN, "padding": (1, 1, 1, 1), "stride": (2, 2)},
    "4x4 of stride 2": {**PLAIN, "kernel": (4, 4), "padding": (1, 1, 1, 1), "stride": (2, 2)},
    "7x7 of stride 2": {**PLAIN, "kernel": (7, 7), "padding": (3, 3, 3, 3), "stride": (2, 2)},
    "3x3 padded below": {**PLAIN, "padding": (0, 0, 1, 1), "stride": (2, 2)},
}


class Accumulators(Interpreter):
    """Keeps the accumulators of every rounding, by layer."""

    def __init__(self, graph: IntegerGraph, images: Images) -> None:
        super().__init__(graph)
        self.of: dict[str, NDArray[np.int64]] = {}
        self.layers(images)

    def rounded(self, op: Op, acc: NDArray[np.int64], shift: NDArray[np.int64]) -> None:
        self.of[op.output] = np.concatenate([self.of.get(op.output, acc[:0]), acc])


def one_layer(geometry: Geometry, image: ImageFormat = "u8.8", *, side: int = 24, channels: int = 3, **options: Any) -> IntegerGraph:
    b = GraphBuilder(3, (channels, side, side), image_format=image, **options)
    b.conv("image", **geometry)
    return b.graph()


def ends(graph: IntegerGraph) -> NDArray[np.int64]:
    """Smallest and largest accumulator of each output channel of the only layer, by hand; [2, out]."""
    (op,) = graph.ops
    assert isinstance(op, Conv)
    fmt = graph.format("image")
    weight = graph.constants[op.weight].reshape(len(graph.constants[op.weight]), -1).astype(np.int64)
    products = np.sort(np.stack((weight * fmt.min_code, weight * fmt.max_code)), axis=0)
    found: NDArray[np.int64] = products.sum(2) + graph.constants[op.bias]
    return found


def plain_colours(images: Images) -> Images:
    """Colours [n, channels] of those images that have only one."""
    return np.array([image[:, 0, 0] for image in images if (image == image[:, :1, :1]).all()])


def n_ties(graph: IntegerGraph, colour: NDArray[np.uint8]) -> int:
    """Output channels of the only layer that are exactly between two codes inside an image of one colour, in float64."""
    (op,) = graph.ops
    assert isinstance(op, Conv)
    offset = 0 if str(graph.format("image")) == "u8.8" else 128
    weight, per_group = graph.constants[op.weight], len(graph.constants[op.weight]) // op.groups
    count = 0
    for out, shift in enumerate(np.broadcast_to(graph.shift(op), len(weight)).tolist()):
        first = out // per_group * weight.shape[1]
        inputs = colour[first : first + weight.shape[1]].astype(float) - offset
        total = inputs @ weight[out].astype(float).sum((1, 2)) + graph.constants[op.bias][out]
        count += int((total / 2.0**shift) % 1 == 0.5)
    return count


@pytest.mark.parametrize(
    ("n", "summary"),
    [
        (1, "1 golden, 0 adversarial, 0 random"),
        (4, "4 golden, 0 adversarial, 0 random"),
        (9, "4 golden, 5 adversarial, 0 random"),
        (80, "4 golden, 33 adversarial, 43 random"),
    ],
)
def test_there_are_as_many_as_asked_for(n: int, summary: str) -> None:
    graph = one_layer(PLAIN)
    golden = uniform_images(graph, 4)
    found = hard_inputs(graph, golden, n, 0)
    assert (found.summary, found.all.shape, str(found.all.dtype)) == (summary, (n, 3, 24, 24), "uint8")
    np.testing.assert_array_equal(found.golden, golden[:n])
    np.testing.assert_array_equal(found.all[: len(found.golden)], found.golden)
    np.testing.assert_array_equal(found.adversarial, adversarial_images(graph, 0)[: len(found.adversarial)])
    assert len(adversarial_images(graph, 0)) == 33 == N_COLOURS + N_PATTERNS + 2 * 4 + 8 + 1


def test_without_golden_images_the_rest_are_still_there() -> None:
    graph = one_layer(PLAIN)
    found = hard_inputs(graph, uniform_images(graph, 4)[:0], 40, 0)
    assert (found.summary, found.all.shape) == ("0 golden, 33 adversarial, 7 random", (40, 3, 24, 24))


@pytest.mark.parametrize("image", ["u8.8", "s8.7"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_extreme_colour_is_tried(channels: int, image: ImageFormat) -> None:
    found = plain_colours(adversarial_images(one_layer(PLAIN, image, channels=channels), 0))
    assert len(found) >= 2**channels + 2
    colours = {tuple(colour) for colour in found.tolist()}
    assert {(0,) * channels, (255,) * channels, (127,) * channels, (128,) * channels} <= colours
    assert sum(set(colour) <= {0, 255} for colour in colours) == 2**channels


def test_stripes_and_checkerboards_are_there_in_both_phases() -> None:
    patterns = adversarial_images(one_layer(PLAIN), 0)[N_COLOURS : N_COLOURS + N_PATTERNS]
    assert np.isin(patterns, (0, 255)).all()
    for first, second in patterns.reshape(3, 2, *patterns.shape[1:]):
        np.testing.assert_array_equal(first, 255 - second)
    rows, columns, board = patterns[::2, 0]
    assert (np.diff(rows.astype(int), axis=0) != 0).all()
    assert (np.diff(columns.astype(int), axis=1) != 0).all()
    assert all((np.diff(board.astype(int), axis=axis) != 0).all() for axis in (0, 1))


@pytest.mark.parametrize("image", ["u8.8", "s8.7"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_sums_reach_both_ends(geometry: Geometry, image: ImageFormat) -> None:
    graph = one_layer(geometry, image)
    acc = Accumulators(graph, adversarial_images(graph, 0)).of["conv0"]
    low, high = ends(graph)
    tried = slice(0, 16)
    np.testing.assert_array_equal(acc.min((0, 2, 3))[tried], low[tried])
    np.testing.assert_array_equal(acc.max((0, 2, 3))[tried], high[tried])


def test_without_a_bias_the_end_is_the_proven_bound() -> None:
    graph = one_layer(PLAIN)
    graph.constants["conv0.bias"][:] = 0
    (op,) = graph.ops
    assert isinstance(op, Conv)
    acc = Accumulators(graph, adversarial_images(graph, 0)).of["conv0"]
    np.testing.assert_array_equal(np.abs(acc).max((0, 2, 3)), graph.bounds(op))


@pytest.mark.parametrize("geometry", PADDED.values(), ids=PADDED)
def test_sums_reach_both_ends_inside_of_padding(geometry: Geometry) -> None:
    graph = one_layer(geometry)
    acc = Accumulators(graph, adversarial_images(graph, 0)).of["conv0"]
    low, high = ends(graph)
    np.testing.assert_array_equal(acc.min((0, 2, 3)), low)
    np.testing.assert_array_equal(acc.max((0, 2, 3)), high)


@pytest.mark.parametrize("image", ["u8.8", "s8.7"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_tie_images_are_ties(geometry: Geometry, per_channel: bool, image: ImageFormat) -> None:
    graph = one_layer(geometry, image, per_channel=per_channel)
    *colours, mosaic = adversarial_images(graph, 5)[N_COLOURS + N_PATTERNS + 2 * min(16, geometry["n_out"]) :]
    counts = [n_ties(graph, colour) for colour in plain_colours(np.stack(colours))]
    assert len(counts) == 8
    assert min(counts) > 0
    assert counts == sorted(counts, reverse=True)
    found = {tuple(pixel) for pixel in mosaic.reshape(3, -1).T.tolist()}
    assert found == {tuple(colour[:, 0, 0].tolist()) for colour in colours}


def test_a_layer_that_rounds_nothing_has_no_ties_and_no_error() -> None:
    graph = one_layer({**PLAIN, "fmt": one_layer(PLAIN).format("conv0")})
    (op,) = graph.ops
    assert isinstance(op, Conv)
    left = IntegerGraph(graph.tensors, (Conv(**{**vars(op), "weight_frac": (-9,)}),), "image", constants=graph.constants)
    assert left.shift(left.ops[0]).max() <= 0
    assert len(adversarial_images(left, 0)) == N_COLOURS + N_PATTERNS + 2 * 4 + 1 + 1


def test_every_convolution_that_reads_the_image_is_driven() -> None:
    b = GraphBuilder(0, (3, 12, 12))
    b.add(b.conv("image", 2), b.conv("image", 2, (1, 1)))
    assert len(adversarial_images(b.graph(), 0)) == N_COLOURS + N_PATTERNS + 2 * (2 * 2 + 8 + 1)


def test_a_first_layer_that_is_no_convolution_gets_colours_and_patterns() -> None:
    b = GraphBuilder(0, (3, 8, 8))
    b.linear(b.flatten(b.max_pool("image")), 4)
    found = hard_inputs(b.graph(), uniform_images(b.graph(), 2), 20, 0)
    assert found.summary == "2 golden, 16 adversarial, 2 random"


def test_images_smaller_than_the_kernel_are_filled() -> None:
    graph = one_layer({"n_out": 4, "kernel": (5, 5), "padding": (2, 2, 2, 2)}, side=4)
    assert adversarial_images(graph, 0).shape[1:] == (3, 4, 4)


def test_random_images_are_of_three_kinds() -> None:
    graph = one_layer(PLAIN, side=20)
    golden = uniform_images(graph, 4)
    found = random_images(graph, golden, 9, 1)
    patches = found[1::3]
    for row in range(0, 20, PATCH):
        for column in range(0, 20, PATCH):
            patch = patches[:, :, row : row + PATCH, column : column + PATCH]
            assert (patch == patch[:, :, :1, :1]).all()
    for image in found[2::3]:
        distance = np.abs(golden.astype(int) - image.astype(int)).max((1, 2, 3))
        assert 0 < distance.min() <= JITTER
    assert all(len(np.unique(image)) > 200 for image in found[::3])


def test_a_seed_repeats_everything_and_another_one_does_not() -> None:
    graph = one_layer(PLAIN)
    golden = uniform_images(graph, 4)
    first, again, other = (hard_inputs(graph, golden, 80, seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first.all, again.all)
    assert (first.random != other.random).any(axis=(1, 2, 3)).all()
    certain = N_COLOURS + N_PATTERNS + 2 * 4
    np.testing.assert_array_equal(first.adversarial[:certain], other.adversarial[:certain])
    assert (first.adversarial[certain:] != other.adversarial[certain:]).any()
