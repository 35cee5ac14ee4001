"""Whether one operation of an IntegerGraph is well formed: formats, shapes and constants fit each other."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeft.errors import ArtifactError
from edgeft.ops import Add, Concat, Conv, Linear, Lookup, Move, Mul, Op, Resize, Select, Tensor, op_inputs

TABLE_ENTRIES = 256
"""Length of every look-up table: one entry for each code of an 8-bit input."""

Tensors = Mapping[str, Tensor]
Constants = Mapping[str, NDArray[Any]]


def check_op(op: Op, tensors: Tensors, constants: Constants) -> None:
    """Raises ArtifactError naming the op and what does not fit. Its tensors must be in `tensors`."""
    if isinstance(op, Move):
        _check_format_is_kept(op, tensors)
    match op:
        case Conv() | Linear():
            _check_weights(op, constants)
        case Add():
            _check_add(op, tensors)
        case Mul():
            _check_mul(op, tensors)
        case Lookup():
            _check_lookup(op, tensors, constants)
        case Concat():
            _check_concat(op, tensors)
        case Select():
            _check_select(op, tensors)
        case Resize():
            _check_resize(op, tensors)


def _wrong(op: Op, what: str) -> ArtifactError:
    return ArtifactError(f"graph: {type(op).__name__} '{op.output}' {what}")


def _constant(op: Op, name: str, constants: Constants) -> NDArray[Any]:
    if name not in constants:
        raise _wrong(op, f"needs the constant '{name}', which is not there")
    return constants[name]


def _check_format_is_kept(op: Op, tensors: Tensors) -> None:
    for name in op_inputs(op):
        if tensors[name].format != tensors[op.output].format:
            raise ArtifactError(f"graph: '{op.output}' must keep the format of '{name}'")


def _check_weights(op: Conv | Linear, constants: Constants) -> None:
    weight, bias = _constant(op, op.weight, constants), _constant(op, op.bias, constants)
    if weight.dtype != np.int8 or bias.dtype != np.int32 or int(weight.min(initial=0)) < -127:
        raise ArtifactError(f"graph: constants of '{op.output}' must be int8 in -127 ... 127 and int32")
    if len(op.weight_frac) not in (1, weight.shape[0]):
        raise ArtifactError(f"graph: '{op.output}' needs 1 or {weight.shape[0]} weight fractions")


def _check_add(op: Add, tensors: Tensors) -> None:
    left, right, out = tensors[op.left], tensors[op.right], tensors[op.output]
    if not left.shape == right.shape == out.shape:
        raise _wrong(op, f"adds {left.shape} and {right.shape} to {out.shape}; it needs one shape")
    widths = sorted(tensor.format.width for tensor in (left, right))
    if widths not in ([8, 8], [8, 32]) or out.format.width != 8:
        formats = " and ".join(f"'{tensor.format}'" for tensor in (left, right))
        raise _wrong(op, f"adds {formats} to '{out.format}'; at most one operand may be an accumulator, and the sum is 8-bit")


def _check_mul(op: Mul, tensors: Tensors) -> None:
    left, right, out = tensors[op.left], tensors[op.right], tensors[op.output]
    for tensor in (left, right, out):
        if tensor.format.width != 8:
            raise _wrong(op, f"needs 8-bit tensors; '{tensor.name}' is '{tensor.format}'")
    allowed = dict.fromkeys((left.shape, (*left.shape[:1], *[1] * (len(left.shape) - 1))))
    if right.shape not in allowed:
        raise _wrong(op, f"multiplies {left.shape} by {right.shape}; allowed: {', '.join(map(str, allowed))}")
    if out.shape != left.shape:
        raise _wrong(op, f"has shape {out.shape}; its left operand has {left.shape}")


def _check_lookup(op: Lookup, tensors: Tensors, constants: Constants) -> None:
    source, out, table = tensors[op.input], tensors[op.output], _constant(op, op.table, constants)
    for tensor in (source, out):
        if tensor.format.width != 8 or tensor.format.narrow:
            raise _wrong(op, f"needs formats of {TABLE_ENTRIES} codes; '{tensor.name}' is '{tensor.format}'")
    if table.dtype != np.int16 or table.shape != (TABLE_ENTRIES,):
        raise _wrong(op, f"needs a table int16 [{TABLE_ENTRIES}], not {table.dtype} {list(table.shape)}")
    if int(table.min()) < out.format.min_code or int(table.max()) > out.format.max_code:
        raise _wrong(
            op, f"has a table of {table.min()} ... {table.max()}; '{out.format}' holds {out.format.min_code} ... {out.format.max_code}"
        )
    if out.shape != source.shape:
        raise _wrong(op, f"has shape {out.shape}; its input has {source.shape}")


def _check_concat(op: Concat, tensors: Tensors) -> None:
    if not op.inputs:
        raise _wrong(op, "has no inputs")
    shapes = [tensors[name].shape for name in op.inputs]
    if len({shape[1:] for shape in shapes}) != 1:
        raise _wrong(op, f"joins shapes that differ beyond the channels: {', '.join(map(str, shapes))}")
    _check_shape(op, tensors, (sum(shape[0] for shape in shapes), *shapes[0][1:]))


def _check_select(op: Select, tensors: Tensors) -> None:
    channels, *rest = tensors[op.input].shape
    if not op.index or min(op.index) < 0 or max(op.index) >= channels:
        found = f"{min(op.index)} ... {max(op.index)}" if op.index else "no channels"
        raise _wrong(op, f"selects {found}; '{op.input}' has channels 0 ... {channels - 1}")
    _check_shape(op, tensors, (len(op.index), *rest))


def _check_resize(op: Resize, tensors: Tensors) -> None:
    shape = tensors[op.input].shape
    if min(op.factor) < 1 or len(shape) != 3:
        raise _wrong(op, f"enlarges shape {shape} by {op.factor}; it needs a shape [c, h, w] and factors of at least 1")
    _check_shape(op, tensors, (shape[0], shape[1] * op.factor[0], shape[2] * op.factor[1]))


def _check_shape(op: Op, tensors: Tensors, expected: tuple[int, ...]) -> None:
    if tensors[op.output].shape != expected:
        raise _wrong(op, f"has shape {tensors[op.output].shape}; its inputs give {expected}")
