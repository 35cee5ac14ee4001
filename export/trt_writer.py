"""The nodes of the TensorRT file, op by op: int8 Q/DQ by the rules of `trt_lint`. Table of all of them: README.md.

Tensor t becomes "t/codes" (int8) and, where something computes with it, "t/real"; both names are those of the uint8 file.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from edgeft.export.onnx_nodes import INPUT, OUTPUT, Nodes, StoredTensor, step_of, window
from edgeft.fixedpoint import FixedPointFormat
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

OFFSET = 128
"""What is subtracted from image bytes, and added to codes to index a table."""


class TrtWriter(Nodes):
    """Nodes and initializers of a graph without unsigned tensors (profile `s8`)."""

    def __init__(self, graph: IntegerGraph) -> None:
        super().__init__()
        self.graph = graph
        self._producers = {op.output: op for op in graph.ops}
        self._real: dict[str, str] = {}
        self._image()

    def write(self, op: Op) -> None:
        """Append the nodes of one op."""
        match op:
            case Conv():
                geometry = window(self.graph.constants[op.weight].shape[2:], op.stride, op.padding, dilations=op.dilation)
                self._compute("Conv", op, [self._read(op.input), *self._weights(op)], relu=op.relu, group=op.groups, **geometry)
            case Linear():
                self._compute("Gemm", op, [self._read(op.input), *self._weights(op)], relu=op.relu, transB=1)
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
        if tensor.name == self.graph.input:
            return StoredTensor(tensor.name, INPUT, tensor.format, OFFSET, TensorProto.UINT8)
        return StoredTensor(tensor.name, f"{tensor.name}/codes", tensor.format, 0, TensorProto.INT8)

    def _image(self) -> None:
        """Bytes to codes (eq. 12): the cast comes first, as TensorRT has no other operator on bytes."""
        name = self.graph.input
        offset = self.constant(f"{name}/offset", np.float32(OFFSET))
        numbers = self.node("Cast", [INPUT], f"{name}/bytes", to=TensorProto.FLOAT)
        codes = self.node("Sub", [numbers, offset], f"{name}/centred")
        real = self.node("Mul", [codes, self._step(name)], f"{name}/result")
        self._quantize(name, real)

    def _read(self, name: str) -> str:
        """The real values of a tensor: one DequantizeLinear, shared by its readers."""
        if name not in self._real:
            inputs = [f"{name}/codes", self._step(name), self._zero(name)]
            self._real[name] = self.node("DequantizeLinear", inputs, f"{name}/real")
        return self._real[name]

    def _summand(self, name: str) -> str:
        """What an addition reads: accumulators, or codes that are rounded.

        OpenVINO would compute a convolution together with the addition that alone reads it, and leave out the rounding in between; a cast
        to integers and back keeps it there. TensorRT makes the same kernels with it and without it.
        """
        alone = isinstance(self._producers.get(name), Conv | GlobalPool) and len(self.graph.consumers[name]) == 1
        if self.graph.format(name).width > 8 or not alone:
            return self._read(name)
        wider = self.node("Cast", [f"{name}/codes"], f"{name}/wider", to=TensorProto.INT32)
        same = self.node("Cast", [wider], f"{name}/same", to=TensorProto.INT8)
        return self.node("DequantizeLinear", [same, self._step(name), self._zero(name)], f"{name}/real")

    def _compute(self, operator: str, op: Op, inputs: list[str], *, relu: bool, **attributes: Any) -> None:
        """A float operator, its ReLU, and Q. A 32-bit result stays float: its real values are the accumulators times their step."""
        if self.graph.format(op.output).width > 8:
            self._real[op.output] = self.node(operator, inputs, f"{op.output}/real", **attributes)
            return
        result = self.node(operator, inputs, f"{op.output}/result", **attributes)
        self._quantize(op.output, self.node("Relu", [result], f"{op.output}/rectified") if relu else result)

    def _quantize(self, name: str, real: str) -> None:
        self.node("QuantizeLinear", [real, self._step(name), self._zero(name)], f"{name}/codes")

    def _global_pool(self, op: GlobalPool) -> None:
        """Eq. 10 as a sum and a power of two, which TensorRT makes one kernel of; a mean would multiply by 1/n."""
        axes = self.constant(f"{op.output}/axes", np.array([2, 3], np.int64))
        total = self.node("ReduceSum", [self._read(op.input), axes], f"{op.output}/sum", keepdims=1)
        share = self.constant(f"{op.output}/share", step_of(op.divisor_log2))
        self._quantize(op.output, self.node("Mul", [total, share], f"{op.output}/result"))

    def _lookup(self, op: Lookup) -> None:
        """Eq. 18: codes, counted from 0, index a table of 256 dequantized codes, which TensorRT folds to int8[256]."""
        index = self.node("Cast", [f"{op.input}/codes"], f"{op.output}/code", to=TensorProto.INT32)
        index = self.node("Add", [index, self.constant(f"{op.output}/offset", np.int32(OFFSET))], f"{op.output}/index")
        codes = self.constant(f"{op.output}/table/codes", self.graph.constants[op.table].astype(np.int8))
        table = self.node("DequantizeLinear", [codes, self._step(op.output), self._zero(op.output)], f"{op.output}/table/real")
        self._quantize(op.output, self.node("Gather", [table, index], f"{op.output}/result", axis=0))

    def _select(self, op: Select) -> None:
        first, last = op.index[0], op.index[-1]
        if op.index == tuple(range(first, last + 1)):
            bounds = (("start", first), ("end", last + 1), ("axis", 1))
            self._move("Slice", op, [self.constant(f"{op.output}/{name}", np.array([value], np.int64)) for name, value in bounds])
        else:
            self._move("Gather", op, [self.constant(f"{op.output}/channels", np.array(op.index, np.int64))], axis=1)

    def _resize(self, op: Resize) -> None:
        scales = self.constant(f"{op.output}/scales", np.array([1, 1, *op.factor], np.float32))
        attributes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        self._move("Resize", op, ["", scales], **attributes)

    def _move(self, operator: str, op: Move, more: list[str] | None = None, **attributes: Any) -> None:
        """An operator that only moves numbers: on codes, so that a pair of Q and DQ stays next to what computes; or on accumulators."""
        wide = self.graph.format(op.output).width > 8
        sources = [self._real[name] if wide else f"{name}/codes" for name in op_inputs(op)]
        found = self.node(operator, [*sources, *(more or [])], f"{op.output}/{'real' if wide else 'codes'}", **attributes)
        if wide:
            self._real[op.output] = found

    def _weights(self, op: Conv | Linear) -> list[str]:
        """Weights and bias as integers with their exact steps. TensorRT refuses DequantizeLinear on int32; Cast and Mul it folds."""
        weight, bias = self.graph.constants[op.weight], self.graph.constants[op.bias]
        several = len(op.weight_frac) > 1
        frac = np.asarray(op.weight_frac if several else op.weight_frac[0])
        steps = self.constant(f"{op.output}/weight/step", step_of(frac))
        inputs = [self.constant(f"{op.output}/weight/codes", weight), steps, self._zeros(f"{op.output}/weight", frac.shape)]
        real = self.node("DequantizeLinear", inputs, f"{op.output}/weight/real", **({"axis": 0} if several else {}))
        number = self.node("Cast", [self.constant(f"{op.output}/bias/codes", bias)], f"{op.output}/bias/float", to=TensorProto.FLOAT)
        step = self.constant(f"{op.output}/bias/step", step_of(frac + self.graph.format(op.input).frac))
        return [real, self.node("Mul", [number, step], f"{op.output}/bias/real")]

    def _step(self, name: str) -> str:
        fmt: FixedPointFormat = self.graph.format(name)
        return self.constant(f"{name}/step", step_of(fmt.frac))

    def _zero(self, name: str) -> str:
        return self._zeros(name, ())

    def _zeros(self, name: str, shape: tuple[int, ...]) -> str:
        zeros: NDArray[np.int8] = np.zeros(shape, np.int8)
        return self.constant(f"{name}/zero", zeros)
