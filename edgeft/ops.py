"""The operations of an IntegerGraph, the tensors between them, and how operations are read back from JSON."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import GenericAlias
from typing import Any, get_args

from edgeft.errors import ArtifactError
from edgeft.fixedpoint import FixedPointFormat


@dataclass(frozen=True)
class Tensor:
    """A named edge: shape of one sample (without the batch axis) and the format of its codes."""

    name: str
    shape: tuple[int, ...]
    format: FixedPointFormat


@dataclass(frozen=True)
class Conv:
    """2-D cross-correlation: 8-bit input, 8-bit weights [out, in/groups, kh, kw], int32 bias [out], one rounding shift.

    `weight_frac` holds one entry for the layer or one per output channel; `padding` is (top, left, bottom, right) with code 0.
    """

    output: str
    input: str
    weight: str
    bias: str
    weight_frac: tuple[int, ...]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    relu: bool


@dataclass(frozen=True)
class Linear:
    """Matrix product with weights [out, in] and int32 bias [out]; a 32-bit output format keeps the accumulator as it is."""

    output: str
    input: str
    weight: str
    bias: str
    weight_frac: tuple[int, ...]
    relu: bool


@dataclass(frozen=True)
class Add:
    """Residual addition (`branch` mode): both operands shifted left to the finer fraction, summed, rounded once."""

    output: str
    left: str
    right: str
    relu: bool


@dataclass(frozen=True)
class Mul:
    """Product of two 8-bit tensors, rounded once; `right` has the shape of `left` [c, h, w] or is a gate [c, 1, 1]."""

    output: str
    left: str
    right: str


@dataclass(frozen=True)
class Lookup:
    """Elementwise function: constant `table` int16 [256] holds the output code of each input code, the smallest first."""

    output: str
    input: str
    table: str


@dataclass(frozen=True)
class Concat:
    """Tensors one after the other along the channel axis; all of them and the output share one format."""

    output: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Select:
    """Channels by number, in the order of `index`: a slice, a chunk or a shuffle."""

    output: str
    input: str
    index: tuple[int, ...]


@dataclass(frozen=True)
class Resize:
    """Nearest-neighbour enlargement of [c, h, w]: every pixel repeated `factor` times (down, across)."""

    output: str
    input: str
    factor: tuple[int, int]


@dataclass(frozen=True)
class MaxPool:
    """Maximum over windows, on codes; padded positions never win."""

    output: str
    input: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]


@dataclass(frozen=True)
class GlobalPool:
    """Sum over all pixels, times 2^-divisor_log2 (the ratio to the true mean sits in the next layer's weights), rounded once."""

    output: str
    input: str
    divisor_log2: int


@dataclass(frozen=True)
class Flatten:
    """Codes of [c, h, w] as a vector in that order."""

    output: str
    input: str


Op = Conv | Linear | Add | Mul | Lookup | Concat | Select | Resize | MaxPool | GlobalPool | Flatten
Move = Concat | Select | Resize | MaxPool | Flatten
"""Ops that compute no new codes: they only move those of their inputs, so inputs and output share one format."""
_OPS: dict[str, type[Any]] = {cls.__name__: cls for cls in get_args(Op)}


def op_inputs(op: Op) -> tuple[str, ...]:
    """Names of the tensors an op reads."""
    match op:
        case Add() | Mul():
            return (op.left, op.right)
        case Concat():
            return op.inputs
    return (op.input,)


def op_from_json(entry: object) -> Op:
    """Inverse of dataclasses.asdict with the class name under "op"; keys for the human reader are ignored.

    Raises ArtifactError naming the op when its kind is unknown, a field is missing or a value has another type.
    """
    if not isinstance(entry, Mapping):
        raise ArtifactError(f"graph: {entry!r} is not an op")
    name, kind = entry.get("output"), entry.get("op")
    if not isinstance(kind, str) or kind not in _OPS:
        raise ArtifactError(f"graph: op '{name}' is a {kind!r}, which this version does not know; it knows {', '.join(_OPS)}")
    values = {}
    for field in dataclasses.fields(_OPS[kind]):
        if field.name not in entry:
            raise ArtifactError(f"graph: {kind} '{name}' lacks '{field.name}'")
        value = entry[field.name]
        values[field.name] = tuple(value) if isinstance(value, list) else value
        if not _is_a(values[field.name], field.type):
            raise ArtifactError(f"graph: {kind} '{name}' has {value!r} as '{field.name}'")
    op: Op = _OPS[kind](**values)
    return op


def _is_a(value: object, kind: object) -> bool:
    """Whether a value is of a field's type: str, int, bool, or a tuple of one of them."""
    if not isinstance(kind, GenericAlias):
        return type(value) is kind
    kinds = get_args(kind)
    return isinstance(value, tuple) and (kinds[1:] == (...,) or len(value) == len(kinds)) and all(type(each) is kinds[0] for each in value)
