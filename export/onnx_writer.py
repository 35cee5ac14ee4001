"""The nodes of the QDQ ONNX file, op by op: what each operation of an IntegerGraph becomes. Table of all of them: README.md."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from edgeft.export.onnx_nodes import INPUT, OUTPUT, Nodes, StoredTensor, step_of, window
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

FEW, MOST_PARTS = 16, 64
"""Channels below which a pixel-wise convolution is split, and the most parts of a channel: 64 was the fastest of 16, 64 and 112."""


class Writer(Nodes):
    """Nodes and initializers, op by op. Tensor t becomes "t/codes" (bytes) and, where something reads it, "t/real"."""

    def __init__(self, graph: IntegerGraph) -> None:
        super().__init__()
        self.graph = graph
        self._zero_points = zero_points(graph)
        self._producers = {op.output: op for op in graph.ops}
        self._real: dict[str, str] = {}

    def write(self, op: Op) -> None:
        """Append the nodes of one op."""
        match op:
            case Conv() if (parts := self._parts(op)) > 1:
                self._conv_of_few_channels(op, parts)
            case Conv():
                shape = window(self.graph.constants[op.weight].shape[2:], op.stride, op.padding, dilations=op.dilation)
                self._compute("Conv", op, [self._factor(op), *self._weights(op)], relu=op.relu, group=op.groups, **shape)
            case Linear():
                self._compute("Gemm", op, [self._factor(op), *self._weights(op)], relu=op.relu, transB=1)
            case Add():
                self._compute("Add", op, [self._summand(op.left), self._summand(op.right)], relu=op.relu)
            case Mul():
                self._compute("Mul", op, [self._read(op.left), self._read(op.right)], relu=False)
            case GlobalPool():
                self._global_pool(op)
            case Lookup():
                self._lookup(op)
            case MaxPool():
                self._move("MaxPool", op, **window(op.kernel, op.stride, op.padding))
            case Flatten():
                self._move("Flatten", op, axis=1)
            case Concat():
                self._move("Concat", op, axis=1)
            case Select():
                self._select(op)
            case Resize():
                self._resize(op)

    def finish(self) -> None:
        """Write the logits."""
        self.name_output(self._read(self.graph.output))

    def stored(self, tensor: Tensor) -> StoredTensor:
        """Where and how a tensor of the graph is found in the file."""
        if tensor.format.width > 8:
            onnx_name = OUTPUT if tensor.name == self.graph.output else f"{tensor.name}/real"
            return StoredTensor(tensor.name, onnx_name, tensor.format, 0, TensorProto.FLOAT)
        return StoredTensor(tensor.name, self._codes(tensor.name), tensor.format, self._zero_points[tensor.name], TensorProto.UINT8)

    def _codes(self, name: str) -> str:
        return INPUT if name == self.graph.input else f"{name}/codes"

    def _read(self, name: str) -> str:
        """The real values of a tensor: one DequantizeLinear, shared by its readers."""
        if name not in self._real:
            self._real[name] = self.node("DequantizeLinear", [self._codes(name), *self._grid(name)], f"{name}/real")
        return self._real[name]

    def _factor(self, op: Conv | Linear | GlobalPool) -> str:
        """What a layer reads. From a table or an enlargement OpenVINO would take the codes as floats; read again (below) they are int8."""
        source = op.input
        while isinstance(maker := self._producers.get(source), Move) and not isinstance(maker, Resize):
            source = op_inputs(maker)[0]
        from_table = isinstance(maker, Lookup | Resize) and self._zero_points[op.input] != 0
        return self._again(op.input, f"{op.output}/again") if from_table else self._read(op.input)

    def _summand(self, name: str) -> str:
        """What an addition reads. OpenVINO computes a convolution together with the addition that alone reads it.

        It then leaves out the rounding in between if there is one pair of Q and DQ, but not if there are two (or, with zero point 0,
        where it would remove the second, a cast to integers and back). ONNX Runtime drops either.
        """
        if not isinstance(self._producers.get(name), Conv | GlobalPool) or len(self.graph.consumers[name]) != 1:
            return self._read(name)
        if self._zero_points[name]:
            return self._again(name, f"{name}/summand")
        wider = self.node("Cast", [self._codes(name)], f"{name}/wider", to=TensorProto.INT32)
        same = self.node("Cast", [wider], f"{name}/same", to=TensorProto.UINT8)
        return self.node("DequantizeLinear", [same, *self._grid(name)], f"{name}/real")

    def _again(self, name: str, place: str) -> str:
        """The real values of a tensor, quantized and dequantized once more: the same numbers. For one reader only."""
        first = self.node("DequantizeLinear", [self._codes(name), *self._grid(name)], f"{place}/first")
        codes = self.node("QuantizeLinear", [first, *self._grid(name)], f"{place}/codes")
        return self.node("DequantizeLinear", [codes, *self._grid(name)], f"{place}/real")

    def _grid(self, name: str) -> list[str]:
        """Scale and zero point of a tensor."""
        return [self._step(name), self.constant(f"{name}/zero", np.uint8(self._zero_points[name]))]

    def _parts(self, op: Conv) -> int:
        """Into how many channels each channel of a pixel-wise convolution is split so that a runtime fills its vectors; 1: as it is."""
        channels, rows, columns = self.graph.tensors[op.input].shape
        fmt = self.graph.format(op.output)
        fills_byte = fmt.width == 8 and (fmt.signed or self._zero_points[op.output] == 0) and not (fmt.signed and op.relu)
        pixelwise = op.groups == channels == len(self.graph.constants[op.weight]) < FEW and op.stride == (1, 1) and not any(op.padding)
        if not (pixelwise and fills_byte and self.graph.constants[op.weight].shape[2:] == (1, 1)):
            return 1
        return max(parts for parts in range(1, MOST_PARTS + 1) if rows * columns % parts == 0)

    def _conv_of_few_channels(self, op: Conv, parts: int) -> None:
        """A depthwise 1x1 convolution (of the image, mostly) on `parts` times as many channels with as many times fewer pixels."""
        channels, rows, columns = self.graph.tensors[op.input].shape
        spread = self.reshape(self._codes(op.input), (-1, channels * parts, rows * columns // parts, 1), f"{op.output}/spread")
        real = self.node("DequantizeLinear", [spread, *self._grid(op.input)], f"{op.output}/spread/real")
        result = self.node("Conv", [real, *self._weights(op, parts)], f"{op.output}/result", group=channels * parts, kernel_shape=[1, 1])
        codes = self.node("QuantizeLinear", [result, *self._grid(op.output)], f"{op.output}/bytes")
        self.reshape(codes, (-1, channels, rows, columns), self._codes(op.output))

    def _compute(self, operator: str, op: Op, inputs: list[str], *, relu: bool, **attributes: Any) -> None:
        """A float operator between Q and DQ; a 32-bit result stays float, its real values are the accumulators times their step."""
        fmt = self.graph.format(op.output)
        if fmt.width > 8:
            self._real[op.output] = self.node(operator, inputs, f"{op.output}/real", **attributes)
            return
        result = self.node(operator, inputs, f"{op.output}/result", **attributes)
        zero_point = self._zero_points[op.output]
        lowest, highest = max(fmt.min_code, 0) if relu else fmt.min_code, fmt.max_code
        saturates = (lowest + zero_point, highest + zero_point) == (0, 255)
        bytes_name = self._codes(op.output) if saturates else f"{op.output}/bytes"
        self.node("QuantizeLinear", [result, *self._grid(op.output)], bytes_name)
        if not saturates:  # an integer Clip keeps the operator fused, a float one would not
            bounds = [self.constant(f"{op.output}/{n}", np.uint8(c + zero_point)) for n, c in (("low", lowest), ("high", highest))]
            self.node("Clip", [bytes_name, *bounds], self._codes(op.output))

    def _global_pool(self, op: GlobalPool) -> None:
        """Eq. 10 as a depthwise convolution of ones over the whole map: the sum, times 2^-m."""
        channels, rows, columns = self.graph.tensors[op.input].shape
        ones = np.ones((channels, 1, rows, columns), np.int8)
        weight = self._dequantized(f"{op.output}/ones", ones, (op.divisor_log2,))
        self._compute("Conv", op, [self._factor(op), weight], relu=False, group=channels, kernel_shape=[rows, columns])

    def _lookup(self, op: Lookup) -> None:
        """Eq. 18 on bytes, as one flat list: of the exact forms in ONNX Runtime the fastest, several times faster than Gather."""
        table, shape = self.constant(f"{op.output}/table", self._table(op)), self.graph.tensors[op.output].shape
        is_map = len(shape) == 3
        source = self._pixels_first(op) if is_map else self._codes(op.input)
        index = self.node("Cast", [self.reshape(source, (-1,), f"{op.output}/flat")], f"{op.output}/index", to=TensorProto.INT32)
        found = self.node("GatherElements", [table, index], f"{op.output}/found", axis=0)
        if is_map:
            self._channels_first(op, self.reshape(found, (-1, *shape[1:], shape[0]), f"{op.output}/whole"))
        else:
            self.reshape(found, (-1, *shape), self._codes(op.output))

    def _table(self, op: Lookup) -> NDArray[np.uint8]:
        """The table by input byte: entry i is for code min_code + i, whose byte is min_code + i + zero point."""
        first = self.graph.format(op.input).min_code + self._zero_points[op.input]
        codes = np.roll(self.graph.constants[op.table], first) + self._zero_points[op.output]
        return np.asarray(codes, np.uint8)

    def _select(self, op: Select) -> None:
        """A run of neighbouring channels is a Slice, which moves whole blocks; any other choice a Gather."""
        first, last = op.index[0], op.index[-1]
        if op.index == tuple(range(first, last + 1)):
            bounds = (("start", first), ("end", last + 1), ("axis", 1))
            self._move("Slice", op, [self.constant(f"{op.output}/{name}", np.array([value], np.int64)) for name, value in bounds])
        else:
            self._move("Gather", op, [self.constant(f"{op.output}/channels", np.array(op.index, np.int64))], axis=1)

    def _resize(self, op: Resize) -> None:
        """Every pixel, as an axis of length 1 on either side of it, is repeated: faster than the operator Resize, and no coordinates."""
        channels, rows, columns = self.graph.tensors[op.input].shape
        down, across = op.factor
        pixels = self.reshape(self._pixels_first(op), (-1, rows, 1, columns, 1, channels), f"{op.output}/apart")
        repeats = self.constant(f"{op.output}/repeats", np.array([1, 1, down, 1, across, 1], np.int64))
        repeated = self.node("Tile", [pixels, repeats], f"{op.output}/repeated")
        self._channels_first(op, self.reshape(repeated, (-1, rows * down, columns * across, channels), f"{op.output}/whole"))

    def _pixels_first(self, op: Lookup | Resize) -> str:
        """A map in the layout of the runtime's convolutions, which drops such transpositions together with its own."""
        return self.node("Transpose", [self._codes(op.input)], f"{op.output}/pixels", perm=[0, 2, 3, 1])

    def _channels_first(self, op: Lookup | Resize, pixels: str) -> None:
        self.node("Transpose", [pixels], self._codes(op.output), perm=[0, 3, 1, 2])

    def _move(self, operator: str, op: Move, more: list[str] | None = None, **attributes: Any) -> None:
        """An operator that only moves codes; padding of an integer MaxPool is the lowest value of the type and never wins."""
        if self.graph.format(op.output).width > 8:
            sources = [self._real[name] for name in op_inputs(op)]
            self._real[op.output] = self.node(operator, [*sources, *(more or [])], f"{op.output}/real", **attributes)
        else:
            sources = [self._codes(name) for name in op_inputs(op)]
            self.node(operator, [*sources, *(more or [])], self._codes(op.output), **attributes)

    def _weights(self, op: Conv | Linear, times: int = 1) -> list[str]:
        """Weight and bias as integers with their exact steps: a float bias would be quantized again by the runtime."""
        weight, bias = (self.graph.constants[name].repeat(times, axis=0) for name in (op.weight, op.bias))
        weight_frac = op.weight_frac if len(op.weight_frac) == 1 else tuple(np.repeat(op.weight_frac, times).tolist())
        bias_frac = tuple(frac + self.graph.format(op.input).frac for frac in weight_frac)
        return [self._dequantized(f"{op.output}/weight", weight, weight_frac), self._dequantized(f"{op.output}/bias", bias, bias_frac)]

    def _dequantized(self, name: str, codes: NDArray[Any], frac: tuple[int, ...]) -> str:
        """An integer constant and its DequantizeLinear, per tensor or along axis 0."""
        steps = step_of(frac if len(frac) > 1 else frac[0])
        inputs = [self.constant(f"{name}/codes", codes), self.constant(f"{name}/step", steps)]
        if codes.dtype == np.int8:  # the operator has no zero point for int32
            inputs.append(self.constant(f"{name}/zero", np.zeros(steps.shape, np.int8)))
        return self.node("DequantizeLinear", inputs, f"{name}/real", **({"axis": 0} if len(frac) > 1 else {}))

    def _step(self, name: str) -> str:
        return self.constant(f"{name}/step", np.float32(self.graph.format(name).step))


def zero_points(graph: IntegerGraph) -> dict[str, int]:
    """What is added to a code to give its byte: 0, or 128 where a code may be negative.

    Tensors between which codes are only moved share one, because moving bytes must not change what they mean: a rectified tensor
    that is concatenated with a signed one is stored with 128.
    """
    group = {graph.input: graph.input}
    shifted = {graph.input} if image_offset(graph) else set()
    for op in graph.ops:
        group[op.output] = op.output
        if isinstance(op, Move):
            tied = {group[name] for name in op_inputs(op)} | {op.output}
            group = {name: op.output if each in tied else each for name, each in group.items()}
        elif graph.format(op.output).signed and not (isinstance(op, Conv | Linear | Add) and op.relu):
            shifted.add(op.output)
    shifted_groups = {group[name] for name in shifted}
    return {name: 128 if each in shifted_groups else 0 for name, each in group.items()}
