"""What all writers of ONNX files share: collecting nodes and constants, and the checked model around them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import edgeft
from edgeft.artifact import Artifact
from edgeft.errors import ArtifactError, VerificationError
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import SCHEMA, IntegerGraph

INPUT, OUTPUT = "images", "logits"
TENSORS_KEY = "edgeft.tensors"
"""Metadata key: JSON list, in execution order, of what StoredTensor holds."""
AVX2_PRECISION_KEY = "session.x64quantprecision"
"""Session entry: on x86 without VNNI, unsigned * signed products are summed in pairs in 16 bits, which saturate; "1" avoids it."""


@dataclass(frozen=True)
class StoredTensor:
    """How a file stores one tensor of the IntegerGraph: ONNX name, format, what was added to a code to get the stored number, ONNX type.

    Stored as float32, a 32-bit tensor holds real values; every other type holds codes.
    """

    name: str
    onnx: str
    format: FixedPointFormat
    zero_point: int
    type: int

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        kind = TensorProto.DataType.Name(self.type).lower()
        return {"name": self.name, "onnx": self.onnx, "format": str(self.format), "zero_point": self.zero_point, "type": kind}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "StoredTensor":
        """Inverse of to_json."""
        kind = int(TensorProto.DataType.Value(tree["type"].upper()))
        return cls(tree["name"], tree["onnx"], FixedPointFormat.parse(tree["format"]), tree["zero_point"], kind)

    def codes(self, stored: NDArray[Any]) -> NDArray[np.int64]:
        """Codes of stored values. Raises VerificationError when a real value is not a whole number of steps."""
        if np.issubdtype(stored.dtype, np.integer):
            return stored.astype(np.int64) - self.zero_point
        codes = np.ldexp(stored.astype(np.float64), self.format.frac)
        if not np.array_equal(codes, np.rint(codes)):
            raise VerificationError(f"layer '{self.name}': the runtime gives values that are not multiples of 2^{-self.format.frac}")
        return codes.astype(np.int64)


class Nodes:
    """Nodes and initializers in the order in which they are added; every node gets a name of its own."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self._names: set[str] = set()

    def node(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Append a node with one output and return that output's name. "layer/what" gives a node "layer/Operator"."""
        name = f"{output.rpartition('/')[0]}/{operator}"
        name += "" if name not in self._names else f"/{output.rpartition('/')[2]}"
        self._names.add(name)
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=name, **attributes))
        return output

    def constant(self, name: str, value: NDArray[Any] | np.generic) -> str:
        """Add an initializer, unless one of that name is there, and return its name."""
        self.constants.setdefault(name, numpy_helper.from_array(np.asarray(value), name))
        return name

    def reshape(self, source: str, shape: tuple[int, ...], output: str) -> str:
        """Append a Reshape."""
        return self.node("Reshape", [source, self.constant(f"{output}/shape", np.array(shape, np.int64))], output)

    def name_output(self, tensor: str) -> None:
        """Give the tensor that holds the logits the name of the file's output."""
        writer = next(node for node in self.nodes if tensor in node.output)
        writer.output[0] = OUTPUT


def window(kernel: tuple[int, ...], stride: tuple[int, int], padding: tuple[int, int, int, int], **more: Any) -> dict[str, Any]:
    """Attributes of a convolution or pooling window."""
    return {"kernel_shape": list(kernel), "strides": list(stride), "pads": list(padding), **more}


def step_of(frac: int | Sequence[int] | NDArray[Any]) -> NDArray[np.float32]:
    """2^-frac as a float32 scalar, or a vector of them."""
    steps: NDArray[np.float32] = np.ldexp(np.float32(1), -np.asarray(frac)).astype(np.float32)
    return steps


def assemble(
    graph: IntegerGraph, nodes: Nodes, stored: Sequence[StoredTensor], *, opset: int, ir_version: int, output_type: int,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:  # fmt: skip
    """The checked model: input "images" uint8 [batch, 3, height, width], output "logits" [batch, classes]."""
    image, logits = graph.tensors[graph.input], graph.tensors[graph.output]
    body = helper.make_graph(
        nodes.nodes,
        "edgeft",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["batch", *image.shape])],
        [helper.make_tensor_value_info(OUTPUT, output_type, ["batch", *logits.shape])],
        list(nodes.constants.values()),
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    model.producer_name, model.producer_version = "edgeft", edgeft.__version__
    about = {
        TENSORS_KEY: json.dumps([tensor.to_json() for tensor in stored]),
        "edgeft.graph_schema": str(SCHEMA), "edgeft.profile": graph.profile,
        "edgeft.rounding": graph.rounding, "edgeft.residual": graph.residual,
    }  # fmt: skip
    helper.set_model_props(model, {**about, **(metadata or {})})
    onnx.checker.check_model(model, full_check=True)
    return model


def artifact_metadata(artifact: Artifact) -> dict[str, str]:
    """Metadata entries that say where a file comes from and how images are prepared for it."""
    return {
        "edgeft.artifact": artifact.digest,
        "edgeft.preprocessing": json.dumps(artifact.manifest.preprocessing),
        "edgeft.classes": json.dumps(list(artifact.manifest.classes)),
    }


def stored_tensors(model: onnx.ModelProto, path: Path) -> list[StoredTensor]:
    """What a file says about its tensors. Raises ArtifactError when it was not written by edgeft."""
    text = {entry.key: entry.value for entry in model.metadata_props}.get(TENSORS_KEY)
    if text is None:
        raise ArtifactError(f"'{path}' was not exported by edgeft: it has no metadata '{TENSORS_KEY}'")
    return [StoredTensor.from_json(tree) for tree in json.loads(text)]
