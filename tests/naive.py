"""An independent reference in plain Python: loops over whole numbers, rounding by fractions.Fraction. For tiny graphs only."""

from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import Add, Concat, Conv, Flatten, GlobalPool, IntegerGraph, Linear, Lookup, MaxPool, Mul, Op, Resize, Select

Codes = NDArray[np.int64]


def requantize(acc: int, acc_frac: int, fmt: FixedPointFormat, relu: bool) -> int:
    """The value acc * 2^-acc_frac in `fmt`; Python rounds a Fraction half to even."""
    code = round(Fraction(acc) * Fraction(2) ** (fmt.frac - acc_frac))
    low = 0 if relu else fmt.min_code
    return min(max(code, low), fmt.max_code)


def layers(graph: IntegerGraph, image: NDArray[np.uint8]) -> dict[str, Codes]:
    """Codes of every tensor for one image [c, h, w]."""
    offset = 128 if graph.format(graph.input).signed else 0
    codes: dict[str, Codes] = {graph.input: image.astype(np.int64) - offset}
    for op in graph.ops:
        out = np.zeros(graph.tensors[op.output].shape, np.int64)
        for index in np.ndindex(out.shape):
            out[index] = _element(graph, op, codes, index)
        codes[op.output] = out
    return codes


def _element(graph: IntegerGraph, op: Op, codes: dict[str, Codes], index: tuple[int, ...]) -> int:
    fmt = graph.format(op.output)
    match op:
        case Conv() | Linear():
            weight, bias = graph.constants[op.weight], graph.constants[op.bias]
            acc = int(bias[index[0]])
            frac = op.weight_frac[index[0] if len(op.weight_frac) > 1 else 0] + graph.format(op.input).frac
            if isinstance(op, Linear):
                acc += sum(int(w) * int(x) for w, x in zip(weight[index[0]], codes[op.input], strict=True))
            else:
                acc += sum(int(w) * int(x) for w, x in _conv_terms(op, weight, codes[op.input], index) if x is not None)
            return requantize(acc, frac, fmt, op.relu)
        case Add():
            value = sum(Fraction(int(codes[name][index])) / Fraction(2) ** graph.format(name).frac for name in (op.left, op.right))
            return requantize(int(value * 2**64), 64, fmt, op.relu)
        case Mul():
            gate = index if graph.tensors[op.right].shape == graph.tensors[op.left].shape else (index[0], *[0] * (len(index) - 1))
            product_frac = graph.format(op.left).frac + graph.format(op.right).frac
            return requantize(int(codes[op.left][index]) * int(codes[op.right][gate]), product_frac, fmt, False)
        case Lookup():
            inputs = range(graph.format(op.input).min_code, graph.format(op.input).max_code + 1)
            return int(dict(zip(inputs, graph.constants[op.table], strict=True))[int(codes[op.input][index])])
        case Concat():
            return int([channel for name in op.inputs for channel in codes[name]][index[0]][index[1:]])
        case Select():
            return int(codes[op.input][op.index[index[0]]][index[1:]])
        case Resize():
            return int(codes[op.input][index[0], index[1] // op.factor[0], index[2] // op.factor[1]])
        case GlobalPool():
            total = sum(int(x) for x in codes[op.input][index[0]].flat)
            return requantize(total, graph.format(op.input).frac + op.divisor_log2, fmt, False)
        case MaxPool():
            positions = product(range(op.kernel[0]), range(op.kernel[1]))
            seen = [_at(codes[op.input][index[0]], index, i, j, op.stride, op.padding) for i, j in positions]
            return max(x for x in seen if x is not None)
        case Flatten():
            return int(codes[op.input].flat[index[0]])


def _conv_terms(op: Conv, weight: NDArray[Any], x: Codes, index: tuple[int, ...]) -> list[tuple[int, int | None]]:
    depth = weight.shape[1]
    first = index[0] // (len(weight) // op.groups) * depth
    return [
        (weight[index[0], c, i, j], _at(x[first + c], index, i * op.dilation[0], j * op.dilation[1], op.stride, op.padding))
        for c, i, j in np.ndindex(*weight.shape[1:])
    ]


def _at(plane: Codes, index: tuple[int, ...], i: int, j: int, stride: tuple[int, int], padding: tuple[int, int, int, int]) -> int | None:
    """The code under a window position, None in the padding."""
    y, x = index[1] * stride[0] + i - padding[0], index[2] * stride[1] + j - padding[1]
    return int(plane[y, x]) if 0 <= y < plane.shape[0] and 0 <= x < plane.shape[1] else None
