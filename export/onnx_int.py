"""IntegerGraph to an ONNX file without floats: the portable proof that 8-bit products, additions, shifts and clips are all there is.

The writer is int_writer.py; `scan` reads a finished file and trusts nothing that wrote it. See README.md beside this file.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnx import TensorProto, shape_inference
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotInRuntime

from edgeft.artifact import Artifact, atomic_write
from edgeft.errors import UnsupportedError, VerificationError
from edgeft.export import ExportResult, Runtime
from edgeft.export.int_writer import IntWriter
from edgeft.export.onnx_nodes import AVX2_PRECISION_KEY, artifact_metadata, assemble
from edgeft.export.ort_runner import OnnxRunner
from edgeft.export.verify import verify_samples
from edgeft.graph import IntegerGraph

OPSET, IR_VERSION = 18, 8
"""Pinned: the first opset with BitwiseAnd."""
FILE, NAME = "model.onnx", "onnx-int"

PRODUCTS = frozenset({"ConvInteger", "MatMulInteger", "Mul"})
OPERATORS = PRODUCTS | {
    "Add", "BitShift", "BitwiseAnd", "Cast", "Clip", "Concat", "Flatten", "Gather", "MaxPool", "ReduceSum", "Sub",
}  # fmt: skip
"""The only operators of a file. None of them divides, and those of PRODUCTS alone multiply."""
TYPES = frozenset({TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32, TensorProto.UINT32})
BYTES = frozenset({TensorProto.INT8, TensorProto.UINT8})
TABLE_ENTRIES = 256


@dataclass(frozen=True)
class ScanResult:
    """What a file computes with: nodes by operator. Made by `scan` only, so it stands for a file that has passed."""

    operators: dict[str, int]

    @property
    def n_products(self) -> int:
        """Nodes that multiply, each of them 8 x 8 bits."""
        return sum(self.operators.get(name, 0) for name in PRODUCTS)

    @property
    def n_rounding_shifts(self) -> int:
        """Right shifts that round: each asks once whether a quotient is odd, which is what BitwiseAnd is for."""
        return self.operators.get("BitwiseAnd", 0)


class OnnxIntTarget:
    """Target "onnx-int": `<out>/model.onnx`, proven to be free of floats and equal to the interpreter on every golden sample."""

    def export(self, artifact: Artifact, out: Path) -> ExportResult:
        """Write, scan, verify. Raises UnsupportedError or VerificationError naming the layer or node."""
        graph, samples = artifact.graph(), artifact.samples()
        model = build_model(graph, artifact_metadata(artifact))
        found = scan(model)
        path = out / FILE
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(path, model.SerializeToString())
        n = verify_samples(graph, self.load(out), samples)
        summary = {
            "file": FILE, "file_bytes": path.stat().st_size, "opset": OPSET, "onnxruntime": onnxruntime.__version__,
            "operators": found.operators, "products": found.n_products, "rounding_shifts": found.n_rounding_shifts,
            "verified_images": n, "verified_tensors": len(graph.tensors),
        }  # fmt: skip
        return ExportResult(NAME, out, graph, summary, _lines(summary, path))

    def load(self, out: Path, threads: int | None = None) -> OnnxRunner:
        """Open `<out>/model.onnx` on the CPU; `threads` None leaves the number to ONNX Runtime.

        Raises UnsupportedError when this version of ONNX Runtime lacks an integer operator.
        """
        try:
            return OnnxRunner(out / FILE, threads, name=NAME)
        except NotInRuntime as error:
            hint = "1.24 and newer multiply signed integers: pip install --upgrade onnxruntime"
            raise UnsupportedError(f"ONNX Runtime {onnxruntime.__version__}: {error}", hint) from error

    def runtimes(self, out: Path) -> list[Runtime]:
        """ONNX Runtime."""
        return [self.load(out)]


TARGET = OnnxIntTarget()


def build_model(graph: IntegerGraph, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
    """The checked ONNX model: input "images" uint8 [batch, 3, height, width], output "logits": the codes, usually int32.

    Raises UnsupportedError naming the layer whose numbers are too large to be shifted in 32 bits.
    """
    if graph.rounding != "half_even":
        raise UnsupportedError(f"rounding '{graph.rounding}': target {NAME} writes half to even")
    writer = IntWriter(graph)
    for op in graph.ops:
        writer.write(op)
    writer.finish()
    stored = [writer.stored(graph.tensors[name]) for name in (graph.input, *(op.output for op in graph.ops))]
    about = {AVX2_PRECISION_KEY: "1", **(metadata or {})}
    return assemble(graph, writer, stored, opset=OPSET, ir_version=IR_VERSION, output_type=stored[-1].type, metadata=about)


def scan(model: onnx.ModelProto) -> ScanResult:
    """Prove that a file computes with integers only and multiplies nothing wider than 8 x 8 bits.

    Every operator must be known, every tensor must have an inferred integer type, every factor must be 8 bits wide, every shift and
    table must be constant. Raises VerificationError naming the node or tensor that is not so.
    """
    if model.functions:
        raise VerificationError(f"function '{model.functions[0].name}': a file of target {NAME} has none")
    for node in model.graph.node:
        if node.op_type not in OPERATORS or node.domain:
            kind = f"{node.domain}.{node.op_type}".lstrip(".")
            raise VerificationError(f"node '{_name(node)}' is of type {kind}; target {NAME} allows {', '.join(sorted(OPERATORS))}")
    scanner = _Scanner(model)
    for node in model.graph.node:
        scanner.check_types(node)
        scanner.check_factors(node)
    for each in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        scanner.check_type(each.name, f"tensor '{each.name}'")
    return ScanResult(dict(sorted(Counter(node.op_type for node in model.graph.node).items())))


class _Scanner:
    """The types and writers of all tensors of a file, inferred anew: what the file says about tensors inside of it is not believed."""

    def __init__(self, model: onnx.ModelProto) -> None:
        bare = onnx.ModelProto()
        bare.CopyFrom(model)
        del bare.graph.value_info[:]
        try:
            onnx.checker.check_model(bare)
            graph = shape_inference.infer_shapes(bare, check_type=True, strict_mode=True).graph
        except (onnx.checker.ValidationError, shape_inference.InferenceError) as error:
            raise VerificationError(f"the file contradicts itself: {error}") from error
        inputs = {each.name for each in graph.input}  # one with the name of an initializer replaces it
        self.constants = {each.name: each for each in graph.initializer if each.name not in inputs}
        self.types = {name: each.data_type for name, each in self.constants.items()}
        self.types |= {each.name: each.type.tensor_type.elem_type for each in (*graph.input, *graph.output, *graph.value_info)}
        self.writers = {name: node for node in graph.node for name in node.output}

    def check_types(self, node: onnx.NodeProto) -> None:
        """Every tensor at a node is an integer; 64 bits are for the numbers of axes and channels only, which are constants."""
        for name in (*node.input, *node.output):
            self.check_type(name, f"node '{_name(node)}' ({node.op_type}): '{name}'")

    def check_type(self, name: str, where: str) -> None:
        kind = self.types.get(name, TensorProto.UNDEFINED)
        if kind not in TYPES and not (kind == TensorProto.INT64 and name in self.constants):
            found = "of no known type" if kind == TensorProto.UNDEFINED else TensorProto.DataType.Name(kind).lower()
            allowed = ", ".join(TensorProto.DataType.Name(each).lower() for each in sorted(TYPES))
            raise VerificationError(f"{where} is {found}; allowed: {allowed}")

    def check_factors(self, node: onnx.NodeProto) -> None:
        """Factors have 8 bits; shifts are constants; a table is a constant of 256 bytes."""
        match node.op_type:
            case "ConvInteger" | "MatMulInteger":
                self._refuse(node, "subtracts", list(node.input[2:]), "makes a factor of 9 bits")  # ONNX has them for bytes only
            case "Mul":
                wrong = [name for name in node.input if not self._is_widened_byte(name)]
                self._refuse(node, "multiplies", wrong, "is no Cast of an 8-bit tensor")
            case "BitShift":
                self._refuse(node, "shifts by", [name for name in node.input[1:] if name not in self.constants], "is no constant")
            case "Gather":
                is_known = node.input[1] in self.constants or self._is_table(node.input[0])
                self._refuse(node, "reads", [] if is_known else list(node.input[:1]), f"is no constant table of {TABLE_ENTRIES} bytes")

    def _is_widened_byte(self, name: str) -> bool:
        writer = self.writers.get(name)
        return writer is not None and writer.op_type == "Cast" and self.types[writer.input[0]] in BYTES

    def _is_table(self, name: str) -> bool:
        table = self.constants.get(name)
        return table is not None and table.data_type in BYTES and list(table.dims) == [TABLE_ENTRIES]

    def _refuse(self, node: onnx.NodeProto, verb: str, names: list[str], why: str) -> None:
        if names:
            raise VerificationError(f"node '{_name(node)}' ({node.op_type}) {verb} '{names[0]}', which {why}")


def _name(node: onnx.NodeProto) -> str:
    return str(node.name or node.output[0])


def _lines(summary: dict[str, Any], path: Path) -> tuple[str, ...]:
    n, size = summary["verified_images"], summary["file_bytes"] / 1e6
    counts = f"{summary['products']} layers multiply 8 x 8 bits, {summary['rounding_shifts']} rounding shifts"
    return (
        f"{NAME}   exact on {n}/{n} images, {summary['verified_tensors']} tensors each   {size:.1f} MB   {path}",
        f"           {counts}, no float tensor and no wider multiplication between input and logits",
    )
