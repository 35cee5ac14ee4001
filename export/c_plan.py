"""IntegerGraph to calls of C kernels: which kernel computes each op, with which sizes and constants, and how every tensor is stored.

What a kernel computes and how tensors lie in memory is written in kernels/include/edgeft_kernels.h. Equation numbers: fixedpoint.md.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeft.bounds import INT32_LIMIT
from edgeft.errors import UnsupportedError
from edgeft.export.agreement import Arithmetic, accumulator_bound
from edgeft.export.c_packed import Packed, matrix_product, narrow_addition, pack, pack_depthwise
from edgeft.graph import (
    Add,
    Concat,
    Conv,
    Flatten,
    GlobalPool,
    IntegerGraph,
    Linear,
    Lookup,
    MaxPool,
    Move,
    Mul,
    Op,
    Resize,
    Select,
    Tensor,
    op_inputs,
)
from edgeft.interpret import image_offset

BYTE_BITS = 8
LEAST_SHIFT, LONGEST_SHIFT = -30, 31
"""Right shifts that the kernels take (eq. 3)."""
LOGITS = "logits"
"""Where the output goes: int32 memory of the caller."""

FAST = {
    "conv2d": ("conv2d_packed", "conv2d_packed"), "conv2d_wide": ("conv2d_packed_wide", "conv2d_packed"),
    "linear": ("conv2d_packed", "conv2d_packed"), "linear_wide": ("conv2d_packed_wide", "conv2d_packed"),
    "dwconv2d": ("dwconv2d_packed", "conv2d"),
}  # fmt: skip
"""The kernel that reads packed weights, and its parameters, for each kernel that reads them as they are."""

Storage = Literal["EDGEFT_U8", "EDGEFT_S8", "EDGEFT_OFFSET", "int32_t"]
Params = dict[str, Any]
"""Fields of a parameter struct: numbers, names of C, or the fields of a struct inside of it."""


@dataclass(frozen=True)
class Stored:
    """A tensor in memory. `map_shape` is the (channels, rows, columns) of a vector that is stored in the order of the map it was."""

    tensor: Tensor
    storage: Storage
    map_shape: tuple[int, int, int] | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of one image's codes."""
        return prod(self.tensor.shape) * (4 if self.storage == "int32_t" else 1)


@dataclass(frozen=True)
class Constant:
    """Numbers that a kernel reads, in the order in which it wants them."""

    name: str
    ctype: Literal["int8_t", "uint8_t", "uint16_t", "int32_t"]
    values: NDArray[Any] = field(repr=False)

    @property
    def n_bytes(self) -> int:
        """Read-only memory that they take."""
        return self.values.size * np.dtype(self.ctype.removesuffix("_t")).itemsize


@dataclass(frozen=True)
class Step:
    """One call: edgeft_<kernel>(params, reads, constants, scratch, writes). `in_place` are inputs that it may write over."""

    layer: str
    kernel: str
    params: tuple[str, Params]
    reads: tuple[str, ...]
    constants: tuple[Constant, ...]
    writes: str
    in_place: tuple[str, ...] = ()
    scratch: int | None = None
    """Bytes that it may write besides; None where the kernel takes no such argument."""


@dataclass(frozen=True)
class Plan:
    """The calls in order, all tensors, and those that are another one's bytes under another name (`views`, to what they show)."""

    graph: IntegerGraph
    steps: tuple[Step, ...]
    stored: dict[str, Stored]
    views: dict[str, str]

    @property
    def constants(self) -> list[Constant]:
        """All constants, in the order in which they are read."""
        return [constant for step in self.steps for constant in step.constants]

    def root(self, name: str) -> str:
        """The tensor whose bytes these are."""
        while name in self.views:
            name = self.views[name]
        return name


def plan(graph: IntegerGraph, *, fast: bool = True) -> Plan:
    """The calls for a graph, without `fast` those of the simple kernels only, to compare with.

    Raises UnsupportedError naming the layer that no kernel computes.
    """
    if graph.rounding != "half_even":
        raise UnsupportedError(f"rounding '{graph.rounding}': the kernels of target c round half to even")
    planner = _Planner(graph, fast=fast)
    for op in graph.ops:
        planner.add(op)
    planner.finish()
    return Plan(graph, tuple(planner.steps), planner.stored, planner.views)


class _Planner:
    """Appends the steps of one op after the other."""

    def __init__(self, graph: IntegerGraph, *, fast: bool) -> None:
        self.graph, self.fast = graph, fast
        self.steps: list[Step] = []
        self.views: dict[str, str] = {}
        self.stored: dict[str, Stored] = {}
        self._image()

    def add(self, op: Op) -> None:
        """The steps of an op."""
        methods: dict[type[Any], Callable[[Any], None]] = {
            Conv: self._conv, Linear: self._linear, Add: self._add, Mul: self._mul, Lookup: self._lookup, Concat: self._concat,
            Select: self._select, Resize: self._resize, MaxPool: self._max_pool, GlobalPool: self._global_pool, Flatten: self._flatten,
        }  # fmt: skip
        wide = [name for name in op_inputs(op) if self.graph.format(name).width > BYTE_BITS]
        if wide and not isinstance(op, Add | Flatten):
            raise UnsupportedError(f"layer '{op.output}' reads '{wide[0]}', which is not 8-bit; target c has no kernel for that")
        self._store(op.output, storage=self.stored[op_inputs(op)[0]].storage if isinstance(op, Move) else None)
        methods[type(op)](op)

    def finish(self) -> None:
        """8-bit codes that leave the network are widened; accumulators are written where the caller wants them."""
        name, shape = self.graph.output, self.graph.tensors[self.graph.output].shape
        if self.stored[name].storage != "int32_t":
            channels, pixels = shape[0], prod(shape[1:])
            params = {"pixels": pixels, "channels": channels, "in": self.stored[name].storage}
            self.steps.append(Step(name, "logits", ("flatten", params), (name,), (), LOGITS))
        elif prod(shape[1:]) != 1:
            raise UnsupportedError(f"layer '{name}' hands out a map of accumulators {shape}; target c hands out vectors of them")

    # Ops with accumulators

    def _conv(self, op: Conv) -> None:
        weight: NDArray[np.int8] = self.graph.constants[op.weight]
        (channels, rows, columns), (n_out, out_rows, out_columns) = self._shape(op.input), self._shape(op.output)
        is_wide = self.stored[op.output].storage == "int32_t"
        depthwise = weight.shape[1] == 1 and op.groups == len(weight) and not is_wide
        params: Params = {
            "in_rows": rows, "in_columns": columns, "in_channels": channels,
            "out_rows": out_rows, "out_columns": out_columns, "out_channels": n_out,
            "kernel_rows": weight.shape[2], "kernel_columns": weight.shape[3],
            "stride_rows": op.stride[0], "stride_columns": op.stride[1], "pad_top": op.padding[0], "pad_left": op.padding[1],
            "dilation_rows": op.dilation[0], "dilation_columns": op.dilation[1], "groups": op.groups,
        }  # fmt: skip
        packed = weight.transpose(1, 2, 3, 0) if depthwise else weight.transpose(0, 2, 3, 1)
        kernel = "dwconv2d" if depthwise else "conv2d_wide" if is_wide else "conv2d"
        self._weighted(op, kernel, "conv2d", params, packed)

    def _linear(self, op: Linear) -> None:
        weight: NDArray[np.int8] = self.graph.constants[op.weight]
        shape = self.stored[op.input].map_shape
        packed = weight if shape is None else weight.reshape(-1, *shape).transpose(0, 2, 3, 1)
        params: Params = {"in_channels": weight.shape[1], "out_channels": len(weight)}
        kernel = "linear_wide" if self.stored[op.output].storage == "int32_t" else "linear"
        self._weighted(op, kernel, "linear", params, packed)

    def _weighted(self, op: Conv | Linear, kernel: str, struct: str, params: Params, weight: NDArray[np.int8]) -> None:
        shift = self._shift(op)
        params |= {"in": self.stored[op.input].storage, "rounding": {"shift_step": int(shift.size > 1), **self._limits(op, relu=op.relu)}}
        bias = self.graph.constants[op.bias]
        packed = self._packed(kernel, params, weight, bias, shift) if self.fast else None
        if packed is not None:
            kernel, struct = FAST[kernel]
            params, weight, bias, shift = packed.params, packed.weight, packed.bias, packed.shift
        constants = (
            self._constant(op, "weight", "int8_t", weight),
            self._constant(op, "bias", "int32_t", bias),
            self._constant(op, "shift", "int8_t", shift),
        )
        self._step(op, kernel, (struct, params), (op.input,), constants, scratch=packed.scratch if packed else None)

    def _packed(
        self, kernel: str, params: Params, weight: NDArray[np.int8], bias: NDArray[np.int64], shift: NDArray[np.int64]
    ) -> Packed | None:
        """The same for the fast kernel, if it takes this layer."""
        if kernel == "dwconv2d":
            return pack_depthwise(params, weight[0].transpose(2, 0, 1), bias, shift)
        sizes, rows = (matrix_product(params), weight.reshape(len(weight), 1, 1, -1)) if "linear" in kernel else (params, weight)
        return pack(sizes, rows, bias, shift, wide=kernel.endswith("_wide"))

    def _add(self, op: Add) -> None:
        left, right = op.left, op.right
        wide = self.stored[left].storage == "int32_t" or self.stored[right].storage == "int32_t"
        if wide and self.stored[left].storage != "int32_t":
            left, right = right, left
        finer = max(self.graph.format(name).frac for name in (left, right))
        shifts = [finer - self.graph.format(name).frac for name in (left, right)]
        if max(shifts) > -LEAST_SHIFT:
            raise UnsupportedError(f"layer '{op.output}': its operands' steps are 2^{max(shifts)} apart; target c shifts by up to 30 bits")
        params = {
            "n": prod(self.graph.tensors[op.output].shape), "left": "EDGEFT_S8" if wide else self.stored[left].storage,
            "right": self.stored[right].storage, "left_shift": shifts[0], "right_shift": shifts[1],
            "shift": int(self._shift(op)[0]), **self._limits(op, relu=op.relu),
        }  # fmt: skip
        narrow = narrow_addition(params) if self.fast and not wide else None
        kernel = "add_wide" if wide else "add_narrow" if narrow else "add"
        self._step(op, kernel, ("add_narrow", narrow) if narrow else ("add", params), (left, right), in_place=(left, right))

    def _mul(self, op: Mul) -> None:
        channels, *size = self.graph.tensors[op.left].shape
        gate = self.graph.tensors[op.right].shape != self.graph.tensors[op.left].shape
        params = {
            "pixels": prod(size), "channels": channels, "left": self.stored[op.left].storage, "right": self.stored[op.right].storage,
            "shift": int(self._shift(op)[0]), **self._limits(op, relu=False),
        }  # fmt: skip
        in_place = (op.left,) if gate else (op.left, op.right)
        self._step(op, "mul_gate" if gate else "mul", ("mul", params), (op.left, op.right), in_place=in_place)

    def _global_pool(self, op: GlobalPool) -> None:
        channels, rows, columns = self._shape(op.input)
        params = {
            "pixels": rows * columns, "channels": channels, "in": self.stored[op.input].storage,
            "shift": int(self._shift(op)[0]), **self._limits(op, relu=False),
        }  # fmt: skip
        self._step(op, "global_pool", ("global_pool", params), (op.input,))

    # Ops that move codes

    def _lookup(self, op: Lookup) -> None:
        """The table in the order of the input's bytes: two's complement has the negative codes last."""
        table = self.graph.constants[op.table]
        in_order = np.roll(table, 128) if self.stored[op.input].storage == "EDGEFT_S8" else table
        entries = (in_order.astype(np.int64) & 255).astype(np.uint8)
        params = {"n": prod(self.graph.tensors[op.output].shape)}
        table_constant = self._constant(op, "table", "uint8_t", entries)
        self._step(op, "lookup", ("bytes", params), (op.input,), (table_constant,), in_place=(op.input,))

    def _concat(self, op: Concat) -> None:
        if len(op.inputs) == 1:
            self._view(op, op.inputs[0])
        channels, *size = self.graph.tensors[op.output].shape
        first = 0
        for name in op.inputs if len(op.inputs) > 1 else ():
            n = self.graph.tensors[name].shape[0]
            params = {"pixels": prod(size), "in_channels": n, "out_channels": channels, "first": first}
            self._step(op, "concat", ("channels", params), (name,))
            first += n

    def _select(self, op: Select) -> None:
        n_in, *size = self.graph.tensors[op.input].shape
        if op.index == tuple(range(n_in)):
            return self._view(op, op.input)
        params = {"pixels": prod(size), "in_channels": n_in, "out_channels": len(op.index), "first": 0}
        self._step(op, "select", ("channels", params), (op.input,), (self._constant(op, "index", "uint16_t", np.array(op.index)),))

    def _resize(self, op: Resize) -> None:
        if op.factor == (1, 1):
            return self._view(op, op.input)
        channels, rows, columns = self._shape(op.input)
        factors = {"factor_rows": op.factor[0], "factor_columns": op.factor[1]}
        params = {"in_rows": rows, "in_columns": columns, "channels": channels, **factors}
        self._step(op, "resize", ("resize", params), (op.input,))

    def _max_pool(self, op: MaxPool) -> None:
        (channels, rows, columns), (_, out_rows, out_columns) = self._shape(op.input), self._shape(op.output)
        params = {
            "in_rows": rows, "in_columns": columns, "channels": channels, "out_rows": out_rows, "out_columns": out_columns,
            "kernel_rows": op.kernel[0], "kernel_columns": op.kernel[1], "stride_rows": op.stride[0], "stride_columns": op.stride[1],
            "pad_top": op.padding[0], "pad_left": op.padding[1], "in": self.stored[op.input].storage,
        }  # fmt: skip
        self._step(op, "max_pool", ("max_pool", params), (op.input,))

    def _flatten(self, op: Flatten) -> None:
        """Nothing is moved where the order is the same, or where only linear layers read the vector: their weights are permuted."""
        channels, *size = self.graph.tensors[op.input].shape
        pixels, readers = prod(size), self.graph.consumers[op.output]
        if pixels == 1:
            return self._view(op, op.input)
        if readers and all(isinstance(reader, Linear) for reader in readers):
            return self._view(op, op.input, self._shape(op.input))
        if self.stored[op.output].storage == "int32_t":
            raise UnsupportedError(f"layer '{op.output}' flattens a map of accumulators; target c has no kernel for that")
        params = {"pixels": pixels, "channels": channels, "in": self.stored[op.input].storage}
        self._step(op, "flatten", ("flatten", params), (op.input,))

    # What they share

    def _image(self) -> None:
        """Bytes are read as they are. Ops that move codes get codes that can lie beside others."""
        name = self.graph.input
        signed = image_offset(self.graph) > 0
        moved = signed and any(isinstance(op, Move) for op in self.graph.consumers[name])
        self._store(name, storage="EDGEFT_S8" if moved else "EDGEFT_OFFSET" if signed else "EDGEFT_U8")
        if moved:
            params = {"n": prod(self.graph.tensors[name].shape)}
            self.steps.append(Step(name, "image_codes", ("bytes", params), (IMAGE,), (), name))

    def _store(self, name: str, *, storage: Storage | None = None) -> None:
        fmt = self.graph.format(name)
        if fmt.width > BYTE_BITS and not fmt.signed:
            raise UnsupportedError(f"layer '{name}': target c has no unsigned format of {fmt.width} bits ('{fmt}')")
        own: Storage = "int32_t" if fmt.width > BYTE_BITS else "EDGEFT_S8" if fmt.signed else "EDGEFT_U8"
        self.stored[name] = Stored(self.graph.tensors[name], storage or own)

    def _view(self, op: Op, of: str, map_shape: tuple[int, int, int] | None = None) -> None:
        self.views[op.output] = of
        shown = self.stored[of]
        self.stored[op.output] = Stored(self.graph.tensors[op.output], shown.storage, map_shape or shown.map_shape)

    def _step(
        self, op: Op, kernel: str, params: tuple[str, Params], reads: tuple[str, ...], constants: tuple[Constant, ...] = (),
        in_place: tuple[str, ...] = (), scratch: int | None = None,
    ) -> None:  # fmt: skip
        self.steps.append(Step(op.output, kernel, params, reads, constants, op.output, in_place, scratch))

    def _shape(self, name: str) -> tuple[int, int, int]:
        channels, rows, columns = self.graph.tensors[name].shape
        return channels, rows, columns

    def _constant(self, op: Op, what: str, ctype: Literal["int8_t", "uint8_t", "uint16_t", "int32_t"], values: NDArray[Any]) -> Constant:
        return Constant(f"edgeft_{c_name(self.graph, op.output)}_{what}", ctype, values)

    def _limits(self, op: Op, *, relu: bool) -> dict[str, int]:
        """What codes saturate to (eq. 4)."""
        fmt = self.graph.format(op.output)
        return {"low": max(fmt.min_code, 0) if relu else fmt.min_code, "high": fmt.max_code}

    def _shift(self, op: Arithmetic) -> NDArray[np.int64]:
        """Right shifts within what the kernels take; beyond that an accumulator of up to 2^30 gives 0, and an 8-bit code saturates."""
        shift, bound = self.graph.shift(op), accumulator_bound(self.graph, op)
        too_long = int(shift.max()) > LONGEST_SHIFT and bound > INT32_LIMIT // 2
        too_far_left = int(shift.min()) < LEAST_SHIFT and self.graph.format(op.output).width > BYTE_BITS
        if bound >= INT32_LIMIT or too_long or too_far_left:
            shifts = f"{shift.min()} ... {shift.max()}"
            raise UnsupportedError(f"layer '{op.output}': target c cannot shift accumulators of up to {bound} by {shifts}")
        return shift.clip(LEAST_SHIFT, LONGEST_SHIFT)


IMAGE = "image bytes"
"""What the first step reads where the image is converted: no tensor of the graph."""


def c_name(graph: IntegerGraph, name: str) -> str:
    """A name of C for a tensor: its place in the network and what can be kept of its name."""
    index = 0 if name == graph.input else 1 + [op.output for op in graph.ops].index(name)
    return f"t{index}_" + re.sub(r"\W+", "_", name, flags=re.ASCII)
