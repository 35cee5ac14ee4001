"""A small hand-made ONNX file as the TensorRT target writes them, and ways to break it node by node.

Layer `x` has nodes "x/Conv", "x/QuantizeLinear", ..., tensors "x/result", "x/codes", "x/real", constants "x/weight/codes", "x/step", ...
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
SIDE, CLASSES = 8, 5
N_MATRIX_KERNELS = 4
"""Convolutions and matrix products of good_model."""


class FileBuilder:
    """Collects nodes and constants; every method returns the name of the tensor it makes."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, value: Any, dtype: Any) -> str:
        self.constants[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def node(self, operator: str, inputs: Sequence[str], output: str, name: str = "", **attributes: Any) -> str:
        name = name or f"{output.rpartition('/')[0]}/{operator}"
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name, **attributes))
        return output

    def quantized(self, x: str, real: str, frac: int) -> str:
        """Q and DQ of one scale: "x/codes", then "x/real"."""
        step = self.constant(f"{x}/step", 2.0**-frac, np.float32)
        zero = self.constant(f"{x}/zero", 0, np.int8)
        codes = self.node("QuantizeLinear", [real, step, zero], f"{x}/codes")
        return self.node("DequantizeLinear", [codes, step, zero], f"{x}/real")

    def image(self, frac: int = 7) -> str:
        real = self.node("Cast", ["images"], "image/float", to=TensorProto.FLOAT)
        real = self.node("Sub", [real, self.constant("image/offset", 128, np.float32)], "image/centred")
        real = self.node("Mul", [real, self.constant("image/unit", 2.0**-frac, np.float32)], "image/scaled")
        return self.quantized("image", real, frac)

    def weights(self, x: str, shape: tuple[int, ...], frac: int, weight_frac: int) -> list[str]:
        """An int8 weight with DQ; an int32 bias with Cast and Mul. `frac` is that of the input."""
        codes = self.constant(f"{x}/weight/codes", self.rng.integers(-127, 128, shape), np.int8)
        step = self.constant(f"{x}/weight/step", 2.0**-weight_frac, np.float32)
        zero = self.constant(f"{x}/weight/zero", 0, np.int8)
        weight = self.node("DequantizeLinear", [codes, step, zero], f"{x}/weight/real")
        bias = self.constant(f"{x}/bias/codes", self.rng.integers(-999, 1000, shape[0]), np.int32)
        bias = self.node("Cast", [bias], f"{x}/bias/float", to=TensorProto.FLOAT)
        unit = self.constant(f"{x}/bias/step", 2.0 ** -(frac + weight_frac), np.float32)
        return [weight, self.node("Mul", [bias, unit], f"{x}/bias/real")]

    def conv(self, x: str, source: str, shape: tuple[int, int, int, int], frac: int) -> str:
        """The float result of a convolution that keeps the size."""
        pads = [shape[2] // 2, shape[3] // 2] * 2
        return self.node(
            "Conv", [source, *self.weights(x, shape, frac, 9)], f"{x}/result", kernel_shape=list(shape[2:]), pads=pads, group=1
        )

    def model(self, output: str, batch: str | int = "batch") -> onnx.ModelProto:
        body = helper.make_graph(
            self.nodes,
            "edgeft",
            [helper.make_tensor_value_info("images", TensorProto.UINT8, [batch, 3, SIDE, SIDE])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, CLASSES])],
            list(self.constants.values()),
        )
        return helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def good_model(batch: str | int = "batch") -> onnx.ModelProto:
    """Stem, residual block with a wide addition (the skip has Q and DQ, the sum has not), global pool, linear head."""
    b = FileBuilder()
    stem = b.quantized("stem", b.node("Relu", [b.conv("stem", b.image(), (16, 3, 3, 3), 7)], "stem/relu"), 4)
    inner = b.quantized("block.conv1", b.node("Relu", [b.conv("block.conv1", stem, (16, 16, 3, 3), 4)], "block.conv1/relu"), 4)
    wide = b.node("Add", [b.conv("block.conv2", inner, (16, 16, 1, 1), 4), stem], "block/sum")
    block = b.quantized("block", b.node("Relu", [wide], "block/relu"), 4)
    total = b.node("ReduceSum", [block, b.constant("pool/axes", [2, 3], np.int64)], "pool/sum", keepdims=1)
    pool = b.quantized("pool", b.node("Mul", [total, b.constant("pool/unit", 2.0**-6, np.float32)], "pool/mean"), 4)
    flat = b.node("Flatten", [pool], "flat/real", axis=1)
    b.node("Gemm", [flat, *b.weights("fc", (CLASSES, 16), 4, 8)], "logits", name="fc/Gemm", transB=1)
    return b.model("logits", batch)


def find(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    """The node of that name."""
    node: onnx.NodeProto = next(node for node in model.graph.node if node.name == name)
    return node


def set_constant(model: onnx.ModelProto, name: str, value: NDArray[Any] | np.generic) -> None:
    """Replace an initializer's value, shape and type."""
    next(each for each in model.graph.initializer if each.name == name).CopyFrom(numpy_helper.from_array(np.asarray(value), name))


def insert(model: onnx.ModelProto, reader: str, operator: str, more: Sequence[str] = (), *, port: int = 0, **attributes: Any) -> None:
    """Put a node "new/<operator>" between a reader and its input number `port`."""
    target = find(model, reader)
    position = list(model.graph.node).index(target)
    new = helper.make_node(operator, [target.input[port], *more], [f"new/{operator}/out"], name=f"new/{operator}", **attributes)
    target.input[port] = new.output[0]
    model.graph.node.insert(position, new)


def add_constant(model: onnx.ModelProto, name: str, value: NDArray[Any] | np.generic) -> str:
    """A new initializer."""
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def save(model: onnx.ModelProto, path: Path) -> Path:
    """Write the file."""
    path.write_bytes(model.SerializeToString())
    return path
