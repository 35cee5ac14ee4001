"""Look-ups in an ONNX file that a linter needs: who writes and reads a tensor, its type, its constant value."""

from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper


class FileIndex:
    """The main graph of a model by tensor name. `inputs` are names of graph inputs, which are no constants even with an initial value."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self.inputs = {each.name for each in model.graph.input}
        self.writers = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
        self.constants = {each.name: each for each in model.graph.initializer if each.name not in self.inputs}
        self.constants |= {node.output[0]: _constant(node) for node in self.nodes if node.op_type == "Constant"}
        self._arrays: dict[str, NDArray[Any]] = {}

    def of(self, *operators: str) -> list[onnx.NodeProto]:
        """The nodes of these operators, in the order of the file."""
        return [node for node in self.nodes if node.op_type in operators]

    def array(self, name: str) -> NDArray[Any] | None:
        """The value of an initializer or a Constant; None of anything else."""
        if name in self.constants and name not in self._arrays:
            self._arrays[name] = numpy_helper.to_array(self.constants[name])
        return self._arrays.get(name)

    def attribute(self, node: onnx.NodeProto, name: str, default: Any = None) -> Any:
        """The value of an attribute, or `default`."""
        return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)

    def place(self, name: str) -> str:
        """The name of the node that writes a tensor, or else of the first that reads it; "" of neither."""
        writer = self.writers.get(name)
        return writer.name if writer is not None else next((node.name for node in self.readers.get(name, [])), "")

    @cached_property
    def foldable(self) -> set[str]:
        """Tensors that are constants or computed from constants only."""
        known = set(self.constants)
        for node in self.nodes:  # every node comes after those it reads
            if all(name in known for name in node.input if name):
                known.update(node.output)
        return known

    @cached_property
    def types(self) -> dict[str, int]:
        """TensorProto.DataType of every tensor of which it is declared or can be inferred."""
        graph = self.model.graph
        with suppress(onnx.shape_inference.InferenceError):  # an operator with too few inputs, for example
            graph = onnx.shape_inference.infer_shapes(self.model).graph
        declared = {each.name: each.type.tensor_type.elem_type for each in (*graph.value_info, *graph.input, *graph.output)}
        return declared | {name: constant.data_type for name, constant in self.constants.items()}


def _constant(node: onnx.NodeProto) -> onnx.TensorProto:
    """The tensor of a Constant node, however its attribute spells it."""
    value = helper.get_attribute_value(node.attribute[0])
    if isinstance(value, onnx.TensorProto):
        return value
    kind = np.float32 if node.attribute[0].name.startswith("value_float") else np.int64
    return numpy_helper.from_array(np.asarray(value, kind), node.output[0])
