"""The nodes of the integer-only ONNX file, op by op: what each operation of an IntegerGraph becomes. Equations: fixedpoint.md."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from edgeft.bounds import Bounds, largest_code
from edgeft.errors import UnsupportedError
from edgeft.export.onnx_nodes import INPUT, OUTPUT, Nodes, StoredTensor, window
from edgeft.fixedpoint import FixedPointFormat, round_shift
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
INT32_LOG2 = 31
OFFSET_LOG2 = 30
OFFSET = 2**OFFSET_LOG2
"""ONNX shifts unsigned numbers only, so 2^30 is added before a shift, and what the shift made of it is subtracted afterwards.
A number must therefore be smaller than 2^30: with the offset it is positive and has 31 bits."""
LONGEST_SHIFT = 29
"""The longest right shift that leaves the offset even, so that eq. 3 sees whether the quotient is odd."""
SATURATED_LOG2, SATURATED_SHIFT = 29, 20
"""2^29, shifted right by up to 20 bits, is still beyond every 8-bit code: it may stand for every larger accumulator."""

Shift = NDArray[np.int64]
"""Bits to shift by, one entry for all channels or one per channel."""


@dataclass(frozen=True)
class Wide:
    """An int32 tensor of the file: its name and its largest |number|, one for all of it or one per channel."""

    name: str
    bounds: Bounds


class Shifts(Nodes):
    """Exact operations on int32 tensors for which ONNX has no operator. Per-channel numbers are for `ndim` axes after the batch."""

    def cast(self, source: str, kind: int, output: str) -> str:
        """Append a Cast."""
        return self.node("Cast", [source], output, to=kind)

    def with_constant(self, operator: str, source: str, number: NDArray[Any], output: str) -> str:
        """Append an operator whose second operand is a constant."""
        return self.node(operator, [source, self.constant(f"{output}/by", number)], output)

    def clip(self, x: Wide, lowest: int, highest: int, output: str) -> Wide:
        """Append a Clip, unless no number is outside of the range."""
        largest = int(x.bounds.max())
        if lowest <= -largest and largest <= highest:
            return x
        bounds = [self.constant(f"{output}/{name}", np.int32(code)) for name, code in (("lowest", lowest), ("highest", highest))]
        return Wide(self.node("Clip", [x.name, *bounds], output), np.minimum(x.bounds, max(-lowest, highest)))

    def shift_left(self, x: Wide, shift: Shift, ndim: int, layer: str, what: str) -> Wide:
        """Append x * 2^shift for shifts of at least 0."""
        if not shift.any():
            return x
        shift = np.minimum(shift, OFFSET_LOG2)  # only 0 can be shifted that far
        shifted = Wide(f"{layer}/{what}/shifted", x.bounds << shift)
        check_below(OFFSET_LOG2, shifted, layer)
        lifted = self.with_constant("Add", x.name, spread(OFFSET >> shift, ndim, np.int32), f"{layer}/{what}/lifted")
        unsigned = self.cast(lifted, TensorProto.UINT32, f"{layer}/{what}/unsigned")
        moved = self._bit_shift(unsigned, shift, ndim, f"{layer}/{what}/moved", "LEFT")
        signed = self.cast(moved, TensorProto.INT32, f"{layer}/{what}/signed")
        self.with_constant("Sub", signed, np.array(OFFSET, np.int32), shifted.name)
        return shifted

    def round_shift(self, x: Wide, shift: Shift, ndim: int, layer: str) -> Wide:
        """Append eq. 3 for shifts of at least 0: the parity of x >> k, then (x + 2^(k-1) - 1 + parity) >> k."""
        if not shift.any():
            return x
        check_below(OFFSET_LOG2, x, layer)
        shift = _shortened(shift, x, layer)
        lifted = self.with_constant("Add", x.name, np.array(OFFSET, np.int32), f"{layer}/round/lifted")
        unsigned = self.cast(lifted, TensorProto.UINT32, f"{layer}/round/unsigned")
        quotient = self._bit_shift(unsigned, shift, ndim, f"{layer}/round/quotient", "RIGHT")
        rounds = np.minimum(shift, 1)  # a channel that is not shifted is not rounded either
        parity = self.with_constant("BitwiseAnd", quotient, spread(rounds, ndim, np.uint32), f"{layer}/round/parity")
        half = spread((1 << shift >> 1) - rounds, ndim, np.uint32)
        raised = self.with_constant("Add", unsigned, half, f"{layer}/round/raised")
        total = self.node("Add", [raised, parity], f"{layer}/round/total")
        moved = self._bit_shift(total, shift, ndim, f"{layer}/round/moved", "RIGHT")
        signed = self.cast(moved, TensorProto.INT32, f"{layer}/round/signed")
        rounded = self.with_constant("Sub", signed, spread(OFFSET >> shift, ndim, np.int32), f"{layer}/round/rounded")
        return Wide(rounded, round_shift(x.bounds, shift))

    def _bit_shift(self, source: str, shift: Shift, ndim: int, output: str, direction: str) -> str:
        bits = self.constant(f"{output}/bits", spread(shift, ndim, np.uint32))
        return self.node("BitShift", [source, bits], output, direction=direction)


class IntWriter(Shifts):
    """Nodes and initializers, op by op. Tensor t becomes "t/codes": int8, uint8 or, beyond 8 bits, int32."""

    def __init__(self, graph: IntegerGraph) -> None:
        super().__init__()
        self.graph = graph
        self._largest: dict[str, int] = {graph.input: largest_code(graph.format(graph.input))}
        self._widened: dict[str, str] = {}
        self._image()

    def write(self, op: Op) -> None:
        """Append the nodes of one op. Raises UnsupportedError naming the layer when its numbers are too large to be shifted here."""
        match op:
            case Conv():
                weight = self.graph.constants[op.weight]
                shape = window(weight.shape[2:], op.stride, op.padding, dilations=op.dilation)
                self._weighted("ConvInteger", op, weight, group=op.groups, **shape)
            case Linear():
                self._weighted("MatMulInteger", op, self.graph.constants[op.weight].T)
            case Add():
                self._add(op)
            case Mul():
                left, right = self._wide(op.left), self._wide(op.right)
                product = self.node("Mul", [left.name, right.name], f"{op.output}/product")
                self._requantize(op, Wide(product, left.bounds * right.bounds))
            case GlobalPool():
                self._global_pool(op)
            case Lookup():
                self._lookup(op)
            case Resize():
                self._resize(op)
            case MaxPool():
                self._check_8_bit(op)
                self._move("MaxPool", op, **window(op.kernel, op.stride, op.padding))
            case Flatten():
                self._move("Flatten", op, axis=1)
            case Concat():
                self._move("Concat", op, axis=1)
            case Select():
                self._move("Gather", op, self.constant(f"{op.output}/channels", np.array(op.index, np.int64)), axis=1)

    def finish(self) -> None:
        """Write the logits."""
        self.name_output(self._codes(self.graph.output))

    def stored(self, tensor: Tensor) -> StoredTensor:
        """Where and how a tensor of the graph is found in the file."""
        name = OUTPUT if tensor.name == self.graph.output else self._codes(tensor.name)
        return StoredTensor(tensor.name, name, tensor.format, 0, _storage(tensor.format))

    def _codes(self, name: str) -> str:
        return INPUT if name == self.graph.input and not image_offset(self.graph) else f"{name}/codes"

    def _image(self) -> None:
        """Bytes minus 128 where the image is signed (eq. 12); otherwise the bytes are the codes."""
        name, offset = self.graph.input, image_offset(self.graph)
        if offset:
            wide = self.cast(INPUT, TensorProto.INT32, f"{name}/bytes")
            centred = self.with_constant("Sub", wide, np.array(offset, np.int32), f"{name}/centred")
            self.cast(centred, TensorProto.INT8, self._codes(name))

    def _wide(self, name: str) -> Wide:
        """The codes of a tensor as int32: of 8-bit ones by a Cast, shared by their readers."""
        if name not in self._widened:
            is_wide = self.graph.format(name).width > BYTE_BITS
            codes = self._codes(name)
            self._widened[name] = codes if is_wide else self.cast(codes, TensorProto.INT32, f"{name}/wide")
        return Wide(self._widened[name], np.array([self._largest[name]]))

    def _weighted(self, operator: str, op: Conv | Linear, weight: NDArray[np.int8], **attributes: Any) -> None:
        """Eq. 5: products of 8-bit codes and 8-bit weights, their sum and the bias."""
        self._check_8_bit(op)
        inputs = [self._codes(op.input), self.constant(f"{op.output}/weight", weight)]
        products = self.node(operator, inputs, f"{op.output}/products", **attributes)
        bias = spread(self.graph.constants[op.bias], self._ndim(op), np.int32)
        total = self.with_constant("Add", products, bias, f"{op.output}/sum")
        self._requantize(op, Wide(total, self.graph.bounds(op)), relu=op.relu)

    def _add(self, op: Add) -> None:
        """Eq. 8, of operands of 8 or 32 bits."""
        finer, operands = max(self.graph.format(name).frac for name in op_inputs(op)), []
        for side, name in (("left", op.left), ("right", op.right)):
            shift = np.array([finer - self.graph.format(name).frac])
            operands.append(self.shift_left(self._wide(name), shift, 0, op.output, side))
        total = self.node("Add", [each.name for each in operands], f"{op.output}/sum")
        self._requantize(op, Wide(total, operands[0].bounds + operands[1].bounds), relu=op.relu)

    def _global_pool(self, op: GlobalPool) -> None:
        """Eq. 10."""
        _, rows, columns = self.graph.tensors[op.input].shape
        x, axes = self._wide(op.input), self.constant(f"{op.output}/axes", np.array([2, 3]))
        total = self.node("ReduceSum", [x.name, axes], f"{op.output}/sum", keepdims=1)
        self._requantize(op, Wide(total, x.bounds * rows * columns))

    def _lookup(self, op: Lookup) -> None:
        """Eq. 18: a code, counted from the smallest, is the number of its entry."""
        index, lowest = self._wide(op.input).name, self.graph.format(op.input).min_code
        if lowest:
            index = self.with_constant("Add", index, np.array(-lowest, np.int32), f"{op.output}/index")
        table = self.graph.constants[op.table]
        entries = table.astype(np.int8 if self.graph.format(op.output).signed else np.uint8)
        self.node("Gather", [self.constant(f"{op.output}/table", entries), index], self._codes(op.output))
        self._largest[op.output] = int(np.abs(table).max())

    def _resize(self, op: Resize) -> None:
        """Eq. 19 as a choice of rows, then of columns: the operator Resize has float scales."""
        _, rows, columns = self.graph.tensors[op.input].shape
        tall = f"{op.output}/tall"
        row, column = (np.repeat(np.arange(n), factor) for n, factor in zip((rows, columns), op.factor, strict=True))
        self.node("Gather", [self._codes(op.input), self.constant(f"{op.output}/rows", row)], tall, axis=2)
        self.node("Gather", [tall, self.constant(f"{op.output}/columns", column)], self._codes(op.output), axis=3)
        self._largest[op.output] = self._largest[op.input]

    def _move(self, operator: str, op: Move, *more: str, **attributes: Any) -> None:
        """An operator that only moves codes; padding of an integer MaxPool is the lowest value of the type and never wins."""
        sources = [self._codes(name) for name in op_inputs(op)]
        self.node(operator, [*sources, *more], self._codes(op.output), **attributes)
        self._largest[op.output] = max(self._largest[name] for name in op_inputs(op))

    def _requantize(self, op: Op, acc: Wide, *, relu: bool = False) -> None:
        """Eq. 4 and 7: one rounding shift and saturation. In 8 bits, what must saturate is cut off before it gets too large to shift."""
        shift, fmt, layer, ndim = self.graph.shift(op), self.graph.format(op.output), op.output, self._ndim(op)
        check_below(INT32_LOG2, acc, layer)
        right, left = np.maximum(shift, 0), np.maximum(-shift, 0)
        narrow = fmt.width <= BYTE_BITS
        if narrow and right.max() <= SATURATED_SHIFT:
            acc = self.clip(acc, -(2**SATURATED_LOG2), 2**SATURATED_LOG2, f"{layer}/bounded")
        x = self.round_shift(acc, right, ndim, layer)
        if narrow and left.any():  # 2^8 is no code any more, and neither is 1 * 2^8
            left = np.minimum(left, BYTE_BITS)
            x = self.clip(x, -(2**BYTE_BITS), 2**BYTE_BITS, f"{layer}/cut")
        x = self.shift_left(x, left, ndim, layer, "scale")
        lowest = max(fmt.min_code, 0) if relu else fmt.min_code
        x = self.clip(x, lowest, min(fmt.max_code, 2**INT32_LOG2 - 1), f"{layer}/clipped")
        self._largest[layer] = int(x.bounds.max())
        if narrow:
            self.cast(x.name, _storage(fmt), self._codes(layer))
        else:  # the last node gives x
            self.nodes[-1].output[0] = self._codes(layer)

    def _ndim(self, op: Op) -> int:
        return len(self.graph.tensors[op.output].shape)

    def _check_8_bit(self, op: Conv | Linear | MaxPool) -> None:
        if self.graph.format(op.input).width > BYTE_BITS:
            raise UnsupportedError(f"layer '{op.output}' reads '{op.input}', which is not 8-bit")


def spread(numbers: NDArray[Any], ndim: int, dtype: type[np.integer[Any]]) -> NDArray[Any]:
    """One number as a scalar; one per channel as a column that broadcasts along `ndim` axes after the batch."""
    shape = (-1, *[1] * (ndim - 1)) if numbers.size > 1 else ()
    return numbers.astype(dtype).reshape(shape)


def check_below(limit_log2: int, x: Wide, layer: str) -> None:
    """Raises UnsupportedError naming the layer when a number may reach 2^limit_log2."""
    largest = int(x.bounds.max())
    if largest >= 2**limit_log2:
        raise UnsupportedError(
            f"layer '{layer}': '{x.name}' may reach {largest}; target onnx-int needs it below 2^{limit_log2}",
            f"use another target, or lower the weight or input fractions of '{layer}'",
        )


def _shortened(shift: Shift, x: Wide, layer: str) -> Shift:
    """Shifts of at most LONGEST_SHIFT. Of a number below half of 2^LONGEST_SHIFT a longer one gives 0, and so does this one."""
    check_below(LONGEST_SHIFT - 1, Wide(x.name, x.bounds * (shift > LONGEST_SHIFT)), layer)
    return np.minimum(shift, LONGEST_SHIFT)


def _storage(fmt: FixedPointFormat) -> int:
    """Type of stored codes: tensors of one format, between which codes are moved, have one type."""
    if fmt.width > BYTE_BITS:
        return int(TensorProto.INT32)
    return int(TensorProto.INT8 if fmt.signed else TensorProto.UINT8)
