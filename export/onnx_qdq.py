"""IntegerGraph to a QDQ ONNX file whose integers ONNX Runtime reproduces. Equations: fixedpoint.md.

Activations are stored as uint8: zero point 0 where no code is negative, 128 elsewhere. See README.md beside this file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto

from edgeft.artifact import Artifact, atomic_write
from edgeft.errors import UnsupportedError
from edgeft.export import ExportResult, Runtime
from edgeft.export.agreement import check_float_agreement
from edgeft.export.onnx_nodes import AVX2_PRECISION_KEY, artifact_metadata, assemble
from edgeft.export.onnx_writer import Writer
from edgeft.export.ort_runner import Fusion, OnnxRunner, fusion
from edgeft.export.runtimes import in_openvino, on_gpu
from edgeft.export.verify import verify_samples
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import Add, Conv, GlobalPool, IntegerGraph, Linear, Mul, Tensor

OPSET, IR_VERSION = 17, 8
"""Pinned: old enough for runtimes in the field, new enough for 8-bit MaxPool and per-channel DequantizeLinear."""
FILE = "model.onnx"
_FUSED = {Conv: "QLinearConv", GlobalPool: "QLinearConv", Linear: "QGemm", Add: "QLinearAdd", Mul: "QLinearMul"}


def build_model(graph: IntegerGraph, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
    """The checked ONNX model: input "images" uint8 [batch, 3, height, width], output "logits" float32 [batch, classes].

    Raises UnsupportedError naming the layer that float32 rescaling could not reproduce, or that adds accumulators.
    """
    _check_residual(graph)
    check_float_agreement(graph)
    writer = Writer(graph)
    for op in graph.ops:
        writer.write(op)
    writer.finish()
    about = {AVX2_PRECISION_KEY: "1", **(metadata or {})}
    stored = [writer.stored(tensor) for tensor in graph.tensors.values()]
    return assemble(graph, writer, stored, opset=OPSET, ir_version=IR_VERSION, output_type=TensorProto.FLOAT, metadata=about)


def check_fusion(graph: IntegerGraph, found: Fusion) -> None:
    """Raises UnsupportedError naming the layers that ONNX Runtime would compute in float."""
    expected: dict[str, int] = {}
    for op in graph.ops:
        if type(op) in _FUSED:
            expected[_FUSED[type(op)]] = expected.get(_FUSED[type(op)], 0) + 1
    missing = {name: n - found.operators.get(name, 0) for name, n in expected.items() if found.operators.get(name, 0) != n}
    if found.in_float or missing:
        names = ", ".join(f"'{name}'" for name in found.in_float)
        lacking = ", ".join(f"{n} {name}" for name, n in missing.items())
        raise UnsupportedError(f"ONNX Runtime {onnxruntime.__version__} leaves nodes in float: {names}; it lacks {lacking or 'nothing'}")


class OnnxTarget:
    """Target "onnx": `<out>/model.onnx`, fused to 8-bit operators and equal to the interpreter on every golden sample."""

    def export(self, artifact: Artifact, out: Path) -> ExportResult:
        """Write, check fusion, verify. Raises UnsupportedError or VerificationError naming the layer."""
        graph, samples = artifact.graph(), artifact.samples()
        model = build_model(graph, artifact_metadata(artifact))
        fuses = fusion(build_model(_probe())).in_float == ()
        found = fusion(model)
        if fuses:
            check_fusion(graph, found)
        path = out / FILE
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(path, model.SerializeToString())
        n = verify_samples(graph, OnnxRunner(path), samples)
        summary = {
            "file": FILE, "file_bytes": path.stat().st_size, "opset": OPSET, "onnxruntime": onnxruntime.__version__,
            "operators": found.operators, "fused": fuses, "verified_images": n, "verified_tensors": len(graph.tensors),
        }  # fmt: skip
        return ExportResult("onnx", out, graph, summary, _lines(summary, path))

    def load(self, out: Path, threads: int | None = None) -> OnnxRunner:
        """Open `<out>/model.onnx` on the CPU; `threads` None leaves the number to ONNX Runtime."""
        return OnnxRunner(out / FILE, threads)

    def runtimes(self, out: Path) -> list[Runtime]:
        """ONNX Runtime, on a GPU as well where there is one, and OpenVINO."""
        return [self.load(out), *in_openvino(out / FILE, "onnx"), *on_gpu(out / FILE, "onnx", "CUDA")]


TARGET = OnnxTarget()


def _check_residual(graph: IntegerGraph) -> None:
    for op in graph.ops:
        if isinstance(op, Add) and graph.wide_operand(op) is not None:
            raise UnsupportedError(
                f"layer '{op.output}' adds accumulators (residual mode wide), which ONNX Runtime computes in float",
                "export it to the targets trt and onnx-int, or train with --set quant.residual=branch",
            )


def _probe() -> IntegerGraph:
    """One convolution: whether this build of ONNX Runtime fuses anything on this processor is measured, not assumed."""
    tensors = {
        "image": Tensor("image", (4, 4, 4), FixedPointFormat(8, 8, signed=False)),
        "probe": Tensor("probe", (4, 4, 4), FixedPointFormat(8, 4, signed=False)),
    }
    conv = Conv("probe", "image", "weight", "bias", (7,), (1, 1), (0, 0, 0, 0), (1, 1), 1, relu=True)
    constants: dict[str, NDArray[Any]] = {"weight": np.ones((4, 4, 1, 1), np.int8), "bias": np.zeros(4, np.int32)}
    return IntegerGraph(tensors, (conv,), "image", constants=constants)


def _lines(summary: dict[str, Any], path: Path) -> tuple[str, ...]:
    fused = ", ".join(f"{n} {name}" for name, n in summary["operators"].items())
    note = "" if summary["fused"] else " (this build fuses nothing on this processor: correct, but slow)"
    n, size = summary["verified_images"], summary["file_bytes"] / 1e6
    return (
        f"onnx   exact on {n}/{n} images, {summary['verified_tensors']} tensors each   {size:.1f} MB   {path}",
        f"       ONNX Runtime {summary['onnxruntime']} runs {fused}{note}",
    )
