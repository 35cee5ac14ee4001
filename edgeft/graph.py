"""IntegerGraph: the network as integers; typed ops, formats on every tensor, JSON + arrays form. numpy only.

This is the seam of the project: training ends here and every export target starts here. There is no float in it.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeft.bounds import INT32_LIMIT, Bounds, accumulator_bounds, largest_code, shifted
from edgeft.errors import ArtifactError, ConfigError, UnsupportedError
from edgeft.fixedpoint import FixedPointFormat
from edgeft.opcheck import check_op
from edgeft.ops import (
    Add,
    Concat,
    Conv,
    Flatten,
    GlobalPool,
    Linear,
    Lookup,
    MaxPool,
    Move,
    Mul,
    Op,
    Resize,
    Select,
    Tensor,
    op_from_json,
    op_inputs,
)

__all__ = [
    "SCHEMA", "Add", "Concat", "Conv", "Flatten", "GlobalPool", "IntegerGraph", "Linear", "Lookup",
    "MaxPool", "Move", "Mul", "Op", "Profile", "Residual", "Resize", "Rounding", "Select", "Tensor", "op_inputs",
]  # fmt: skip

SCHEMA = 1
"""Version of graph.json. An operation that a reader does not know is refused by name, so new kinds of operation keep the number."""

Rounding = Literal["half_even"]
Profile = Literal["u8", "s8"]
Residual = Literal["branch", "wide"]


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
            check_op(op, self.tensors, self.constants)
            if isinstance(op, Conv | Linear | Add) and int(self.bounds(op).max()) >= INT32_LIMIT:
                raise UnsupportedError(f"layer '{op.output}': its accumulator may overflow 32 bits")

    @property
    def output(self) -> str:
        """Name of the logits."""
        return self.ops[-1].output

    def format(self, name: str) -> FixedPointFormat:
        """Format of a tensor."""
        return self.tensors[name].format

    def accumulator_bound(self, op: Conv | Linear) -> int:
        """Largest |accumulator| that any input can produce, at any point of the summation. Exact, from the integer weights."""
        return int(self.bounds(op).max())

    def bounds(self, op: Conv | Linear | Add) -> Bounds:
        """Largest |accumulator| of each output channel, in the accumulator's own steps: of a layer [out], of an addition [out] or [1]."""
        if isinstance(op, Conv | Linear):
            return accumulator_bounds(self.constants[op.weight], self.constants[op.bias], self.format(op.input))
        return self.operand_bounds(op, op.left) + self.operand_bounds(op, op.right)

    def operand_bounds(self, add: Add, name: str) -> Bounds:
        """Largest |operand| of an addition for each output channel, [out] or [1], in steps of the finer operand (eq. 8)."""
        finest = max(self.format(add.left).frac, self.format(add.right).frac)
        wide = self.wide_operand(add)
        codes = np.asarray([largest_code(self.format(name))], np.int64)
        if wide is not None and wide.output == name:
            codes = shifted(self.bounds(wide), -self.shift(wide))
        return shifted(codes, finest - self.format(name).frac)

    def wide_operand(self, add: Add) -> Conv | None:
        """The convolution whose accumulators an addition takes, in residual mode `wide`; None in mode `branch`."""
        wide = [op for op in self.ops if isinstance(op, Conv) and op.output in op_inputs(add) and self.format(op.output).width > 8]
        return wide[0] if wide else None

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
            case Mul():
                acc = np.asarray([self.format(op.left).frac + self.format(op.right).frac], np.int64)
            case Lookup() | Concat() | Select() | Resize() | MaxPool() | Flatten():
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
            ops = tuple(op_from_json(entry) for entry in tree["ops"])
            return cls(tensors, ops, tree["input"], tree["profile"], tree["residual"], tree["rounding"], constants)
        except ConfigError as error:
            raise ArtifactError(f"graph.json: {error.message}", error.hint) from error
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"graph.json is not complete: {error}") from error
