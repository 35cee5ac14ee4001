"""NumPy interpreter of IntegerGraph: slow, obvious, normative; every other implementation is compared with it.

Equation numbers refer to fixedpoint.md beside this file.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeft.errors import ArtifactError
from edgeft.fixedpoint import dequantize, requantize
from edgeft.graph import Add, Concat, Conv, Flatten, GlobalPool, IntegerGraph, Linear, Lookup, MaxPool, Mul, Op, Resize, Select
from edgeft.runner import Images, Logits

Codes = NDArray[np.int64]

CHUNK_PIXELS = 2**15
"""Input pixels worked on at a time: bounds the memory of the unfolded convolution inputs and keeps one layer in cache."""
_BYTE_OFFSET = {"u8.8": 0, "s8.7": 128}
_NEVER_WINS = np.iinfo(np.int64).min


def image_offset(graph: IntegerGraph) -> int:
    """What is subtracted from an image byte to give the input code (eq. 12): 0 for u8.8, 128 for s8.7.

    Raises ArtifactError for any other input format.
    """
    text = str(graph.format(graph.input))
    if text not in _BYTE_OFFSET:
        raise ArtifactError(f"graph: input format '{text}' is not an image format; allowed: {', '.join(_BYTE_OFFSET)}")
    return _BYTE_OFFSET[text]


class Interpreter:
    """The reference Runner. Raises ArtifactError when the input format, the images or a shape do not fit the graph."""

    name = "interpreter"

    def __init__(self, graph: IntegerGraph) -> None:
        self.graph = graph
        self._offset = image_offset(graph)
        read_last = {name: consumers[-1].output for name, consumers in graph.consumers.items() if consumers}
        self._dies_at: dict[str, list[str]] = {}
        for name, reader in read_last.items():
            self._dies_at.setdefault(reader, []).append(name)

    def logits(self, images: Images) -> Logits:
        """Scores [n, classes]: accumulator * 2^-frac, exact in float32 while |accumulator| <= 2^24 (eq. 15)."""
        return self.scores(_concatenate([self._run(chunk, keep=False)[self.graph.output] for chunk in _chunks(images)]))

    def scores(self, codes: Codes) -> Logits:
        """Real values of the logits' codes."""
        return dequantize(codes, self.graph.format(self.graph.output)).astype(np.float32)

    def rounded(self, op: Op, acc: Codes, shift: Codes) -> None:
        """Told of every accumulator before it is rounded; does nothing, for others to look at what is rounded."""

    def layers(self, images: Images) -> dict[str, Codes]:
        """Codes of every tensor, the input included, in execution order."""
        chunks = [self._run(chunk, keep=True) for chunk in _chunks(images)]
        return {name: _concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def _run(self, images: Images, *, keep: bool) -> dict[str, Codes]:
        codes = {self.graph.input: images.astype(np.int64) - self._offset}
        self._check_shape(self.graph.input, codes)
        for op in self.graph.ops:
            codes[op.output] = self._apply(op, codes)
            self._check_shape(op.output, codes)
            for name in () if keep else self._dies_at.get(op.output, ()):
                del codes[name]
        return codes

    def _check_shape(self, name: str, codes: dict[str, Codes]) -> None:
        found, expected = codes[name].shape[1:], self.graph.tensors[name].shape
        if found != expected:
            raise ArtifactError(f"tensor '{name}' has shape {found}, the graph says {expected}")

    def _apply(self, op: Op, codes: dict[str, Codes]) -> Codes:
        match op:
            case Conv():
                return self._requantize(op, self._conv(op, codes[op.input]), relu=op.relu)
            case Linear():
                weight, bias = self.graph.constants[op.weight], self.graph.constants[op.bias]
                return self._requantize(op, _product(codes[op.input], weight.T) + bias, relu=op.relu)
            case Add():
                return self._requantize(op, self._aligned(op.left, op, codes) + self._aligned(op.right, op, codes), relu=op.relu)
            case Mul():
                return self._requantize(op, codes[op.left] * codes[op.right], relu=False)
            case Lookup():
                table: NDArray[np.int16] = self.graph.constants[op.table]
                return table.astype(np.int64)[codes[op.input] - self.graph.format(op.input).min_code]
            case Concat():
                return np.concatenate([codes[name] for name in op.inputs], axis=1)
            case Select():
                return codes[op.input][:, list(op.index)]
            case Resize():
                return codes[op.input].repeat(op.factor[0], axis=2).repeat(op.factor[1], axis=3)
            case MaxPool():
                padded = _pad(codes[op.input], op.padding, _NEVER_WINS)
                return np.asarray(np.maximum.reduce(list(_taps(padded, op.kernel, op.stride, (1, 1)))))
            case GlobalPool():
                return self._requantize(op, codes[op.input].sum(axis=(2, 3), keepdims=True), relu=False)
            case Flatten():
                return codes[op.input].reshape(len(codes[op.input]), -1)

    def _requantize(self, op: Op, acc: Codes, *, relu: bool) -> Codes:
        shift = self.graph.shift(op).reshape(-1, *[1] * (acc.ndim - 2))
        self.rounded(op, acc, shift)
        return requantize(acc, shift, self.graph.format(op.output), relu=relu)

    def _aligned(self, name: str, op: Add, codes: dict[str, Codes]) -> Codes:
        """An operand in units of the finer of the two steps (eq. 8)."""
        finer = max(self.graph.format(op.left).frac, self.graph.format(op.right).frac)
        return codes[name] << (finer - self.graph.format(name).frac)

    def _conv(self, op: Conv, x: Codes) -> Codes:
        """Accumulators of a convolution (eq. 5)."""
        weight: NDArray[np.int8] = self.graph.constants[op.weight]
        bias: NDArray[np.int32] = self.graph.constants[op.bias]
        depthwise = weight.shape[1] == 1
        if depthwise and len(weight) > op.groups:
            x = np.repeat(x, len(weight) // op.groups, axis=1)
        taps = _taps(_pad(x, op.padding, 0), (weight.shape[2], weight.shape[3]), op.stride, op.dilation)
        acc = _depthwise(taps, weight) if depthwise else _grouped(taps, weight, op.groups)
        return acc + bias.reshape(-1, 1, 1)


def _chunks(images: Images) -> Iterator[Images]:
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise ArtifactError(f"images must be uint8 [n, channels, height, width] with n >= 1, not {images.dtype} {list(images.shape)}")
    n = max(1, CHUNK_PIXELS // max(1, images.shape[2] * images.shape[3]))
    for start in range(0, len(images), n):
        yield images[start : start + n]


def _concatenate(parts: list[Codes]) -> Codes:
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _product(left: NDArray[Any], right: NDArray[Any]) -> Codes:
    """Integer matrix product through float64.

    Exact: every partial sum, in whatever order the library adds, is at most the accumulator bound, which the graph has
    proven to be below 2^31; float64 holds all integers up to 2^53.
    """
    product: NDArray[np.float64] = np.matmul(left.astype(np.float64), right.astype(np.float64))
    return product.astype(np.int64)


def _pad(x: Codes, padding: tuple[int, int, int, int], value: int) -> Codes:
    top, left, bottom, right = padding
    return np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=value) if any(padding) else x


def _taps(x: Codes, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> Iterator[Codes]:
    """For each kernel position in row-major order, the input [n, c, rows, columns] it meets at every output position."""
    rows, columns = ((x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1))
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            y, z = i * dilation[0], j * dilation[1]
            yield x[:, :, y : y + (rows - 1) * stride[0] + 1 : stride[0], z : z + (columns - 1) * stride[1] + 1 : stride[1]]


def _depthwise(taps: Iterator[Codes], weight: NDArray[np.int8]) -> Codes:
    """One input channel per output channel: weight * tap, summed over the taps."""
    columns = weight.reshape(len(weight), -1).T.astype(np.int64)
    total: Codes = sum((tap * column.reshape(-1, 1, 1) for tap, column in zip(taps, columns, strict=True)), np.zeros((), np.int64))
    return total


def _grouped(taps: Iterator[Codes], weight: NDArray[np.int8], groups: int) -> Codes:
    """Unfold the taps to columns and multiply, group by group."""
    columns = np.stack(list(taps), axis=2)
    n, _, _, height, width = columns.shape
    by_group = weight.reshape(groups, len(weight) // groups, -1)
    return _product(by_group, columns.reshape(n, groups, by_group.shape[2], -1)).reshape(n, len(weight), height, width)
