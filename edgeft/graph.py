"""IntegerGraph: the network as integers; typed ops, formats on every tensor, JSON + arrays form. numpy only.

This is the seam of the project: training ends here and every export target starts here. There is no float in it.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeft.errors import ArtifactError, UnsupportedError
from edgeft.fixedpoint import FixedPointFormat

SCHEMA = 1
INT32_LIMIT = 2**31
FLOAT32_EXACT = 2**24

Rounding = Literal["half_even"]
Profile = Literal["u8", "s8"]
Residual = Literal["branch"]


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


Op = Conv | Linear | Add | MaxPool | GlobalPool | Flatten
_OPS: dict[str, type[Any]] = {cls.__name__: cls for cls in (Conv, Linear, Add, MaxPool, GlobalPool, Flatten)}


def op_inputs(op: Op) -> tuple[str, ...]:
    """Names of the tensors an op reads."""
    return (op.left, op.right) if isinstance(op, Add) else (op.input,)


@dataclass(frozen=True)
class IntegerGraph:
    """Ops in execution order, the tensors between them and the integer constants they use.

    The input tensor holds the image: format u8.8 means raw bytes, s8.7 means bytes minus 128. The last op's output
    are the logits (int32 accumulators with their true fraction).
    Raises UnsupportedError when an accumulator could overflow 32 bits and ArtifactError when the graph is not well formed.
    """

    tensors: dict[str, Tensor]
    ops: tuple[Op, ...]
    input: str
    profile: Profile = "u8"
    residual: Residual = "branch"
    rounding: Rounding = "half_even"
    constants: dict[str, NDArray[Any]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        known = {self.input}
        for op in self.ops:
            for name in op_inputs(op):
                if name not in known:
                    raise ArtifactError(f"graph: op '{op.output}' reads '{name}', which no earlier op writes")
            if op.output in known or op.output not in self.tensors:
                raise ArtifactError(f"graph: tensor '{op.output}' is written twice or has no format")
            known.add(op.output)
            self._check(op)

    @property
    def output(self) -> str:
        """Name of the logits."""
        return self.ops[-1].output

    def format(self, name: str) -> FixedPointFormat:
        """Format of a tensor."""
        return self.tensors[name].format

    def _check(self, op: Op) -> None:
        if isinstance(op, MaxPool | Flatten) and self.format(op.input) != self.format(op.output):
            raise ArtifactError(f"graph: '{op.output}' must keep the format of '{op.input}'")
        if isinstance(op, Conv | Linear):
            weight, bias = self.constants[op.weight], self.constants[op.bias]
            if weight.dtype != np.int8 or bias.dtype != np.int32 or int(weight.min(initial=0)) < -127:
                raise ArtifactError(f"graph: constants of '{op.output}' must be int8 in -127 ... 127 and int32")
            if len(op.weight_frac) not in (1, weight.shape[0]):
                raise ArtifactError(f"graph: '{op.output}' needs 1 or {weight.shape[0]} weight fractions")
            if self.accumulator_bound(op) >= INT32_LIMIT:
                raise UnsupportedError(f"layer '{op.output}': its accumulator may overflow 32 bits")

    def accumulator_bound(self, op: Conv | Linear) -> int:
        """Largest |accumulator| that any input can produce, at any point of the summation. Exact, from the integer weights."""
        return accumulator_bound(self.constants[op.weight], self.constants[op.bias], self.format(op.input))

    def shift(self, op: Op) -> NDArray[np.int64]:
        """Right shift from accumulator to output codes, one entry or one per output channel (eq. 3); negative shifts left."""
        out = self.format(op.output).frac
        match op:
            case Conv() | Linear():
                acc = np.asarray(op.weight_frac, np.int64) + self.format(op.input).frac
            case Add():
                acc = np.asarray([max(self.format(op.left).frac, self.format(op.right).frac)], np.int64)
            case GlobalPool():
                acc = np.asarray([self.format(op.input).frac + op.divisor_log2], np.int64)
            case MaxPool() | Flatten():
                acc = np.asarray([out], np.int64)
        return acc - out

    @cached_property
    def consumers(self) -> dict[str, tuple[Op, ...]]:
        """Ops that read each tensor."""
        found: dict[str, list[Op]] = {name: [] for name in self.tensors}
        for op in self.ops:
            for name in op_inputs(op):
                found[name].append(op)
        return {name: tuple(ops) for name, ops in found.items()}

    def to_json(self) -> dict[str, Any]:
        """Everything but the constants, as plain JSON values; `shift` and `accumulator_bound` are written for the reader."""
        ops = []
        for op in self.ops:
            entry: dict[str, Any] = {"op": type(op).__name__, **dataclasses.asdict(op), "shift": self.shift(op).tolist()}
            if isinstance(op, Conv | Linear):
                entry["accumulator_bound"] = self.accumulator_bound(op)
            ops.append(entry)
        tensors = [{"name": t.name, "shape": list(t.shape), "format": str(t.format)} for t in self.tensors.values()]
        return {
            "schema": SCHEMA, "profile": self.profile, "residual": self.residual, "rounding": self.rounding,
            "input": self.input, "tensors": tensors, "ops": ops,
        }  # fmt: skip

    @classmethod
    def from_json(cls, tree: dict[str, Any], constants: dict[str, NDArray[Any]]) -> "IntegerGraph":
        """Inverse of to_json. Raises ArtifactError when the schema or a key is not what this version writes."""
        if tree.get("schema") != SCHEMA:
            raise ArtifactError(f"graph schema {tree.get('schema')!r} is not {SCHEMA}, the one this version reads")
        try:
            tensors = {t["name"]: Tensor(t["name"], tuple(t["shape"]), FixedPointFormat.parse(t["format"])) for t in tree["tensors"]}
            ops = tuple(_op_from_json(entry) for entry in tree["ops"])
            return cls(tensors, ops, tree["input"], tree["profile"], tree["residual"], tree["rounding"], constants)
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"graph.json is not complete: {error}") from error


def accumulator_bound(weight: NDArray[np.int8], bias: NDArray[np.int32], fmt: FixedPointFormat) -> int:
    """Largest |partial sum| of bias + sum w * x over any order of summation and any codes x of `fmt`.

    weight [out, ...], bias [out]. The positive and the negative products are bounded apart, so an unsigned input counts half.
    """
    w = weight.astype(np.int64).reshape(len(weight), -1)
    products = np.stack((w * fmt.min_code, w * fmt.max_code))
    high = products.max(0).clip(min=0).sum(1) + np.maximum(bias.astype(np.int64), 0)
    low = products.min(0).clip(max=0).sum(1) + np.minimum(bias.astype(np.int64), 0)
    return int(np.maximum(high, -low).max())


def _op_from_json(entry: dict[str, Any]) -> Op:
    cls = _OPS[entry["op"]]
    values = {f.name: entry[f.name] for f in dataclasses.fields(cls)}
    op: Op = cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    return op
