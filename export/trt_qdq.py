"""IntegerGraph to a Q/DQ ONNX file that TensorRT takes and fuses, with all that is needed to build and prove the engine on a device.

TensorRT 10 and 11 and TensorRT-RTX. Without a GPU the file is linted, built ahead of time by NVIDIA's own builder where the package
tensorrt-rtx is installed, and its integers are compared in ONNX Runtime. See README.md beside this file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnx import TensorProto

from edgeft.artifact import Artifact, atomic_write
from edgeft.errors import UnsupportedError
from edgeft.export import ExportResult, Runtime
from edgeft.export import trt_check as builder
from edgeft.export.agreement import check_float_agreement
from edgeft.export.onnx_nodes import INPUT, artifact_metadata, assemble
from edgeft.export.ort_runner import OnnxRunner
from edgeft.export.runtimes import in_openvino, on_gpu
from edgeft.export.signed import is_signed, signed_graph
from edgeft.export.trt_lint import check_lint
from edgeft.export.trt_writer import TrtWriter
from edgeft.export.verify import verify_samples
from edgeft.graph import IntegerGraph
from edgeft.interpret import Interpreter

OPSET, IR_VERSION = 17, 8
FILE, SCRIPT = "model.onnx", builder.SCRIPT
TARGETS = ("SM86", "SM89", "SM120")
"""GPUs that the file is built for ahead of time: GeForce and RTX of the generations Ampere, Ada and Blackwell."""
LARGEST_BATCH = 32


def build_model(graph: IntegerGraph, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
    """The checked and linted ONNX model of a graph in profile `s8`.

    Raises UnsupportedError naming the tensor or layer that TensorRT, or a rescaling in float32, could not reproduce.
    """
    unsigned = [tensor.name for tensor in graph.tensors.values() if not tensor.format.signed]
    if unsigned:
        raise UnsupportedError(
            f"tensor '{unsigned[0]}' is unsigned ('{graph.format(unsigned[0])}'); TensorRT's 8-bit type is int8",
            "edgeft.export.signed.signed_graph converts it, or train with --profile s8",
        )
    check_float_agreement(graph)
    writer = TrtWriter(graph)
    for op in graph.ops:
        writer.write(op)
    writer.finish()
    stored = [writer.stored(tensor) for tensor in graph.tensors.values()]
    model = assemble(graph, writer, stored, opset=OPSET, ir_version=IR_VERSION, output_type=TensorProto.FLOAT, metadata=metadata)
    check_lint(model)
    return model


class TrtTarget:
    """Target "trt": `<out>/model.onnx` and `<out>/build_engine.py`, equal to the interpreter on every golden sample."""

    def export(self, artifact: Artifact, out: Path) -> ExportResult:
        """Convert where the run is unsigned, write, lint, verify, build ahead of time. Raises UnsupportedError or VerificationError."""
        trained, samples = artifact.graph(), artifact.samples()
        converted = not is_signed(trained)
        graph = signed_graph(trained) if converted else trained
        model = build_model(graph, artifact_metadata(artifact))
        out.mkdir(parents=True, exist_ok=True)
        path = out / FILE
        atomic_write(path, model.SerializeToString())
        atomic_write(out / SCRIPT, builder.script_text().encode())
        n = verify_samples(graph, self.load(out), {INPUT: samples[INPUT]} if converted else samples)
        check = builder.ahead_of_time(path, TARGETS) if builder.available() else None
        cost = conversion_cost(trained, graph, samples) if converted else None
        summary = {
            "file": FILE, "file_bytes": path.stat().st_size, "opset": OPSET, "verified_in": f"ONNX Runtime {onnxruntime.__version__}",
            "verified_images": n, "verified_tensors": len(graph.tensors), "logits_frac": graph.format(graph.output).frac,
            "residual": graph.residual, "converted_from": trained.profile if converted else None, "conversion": cost,
            "ahead_of_time": check.to_json() if check else None, "trtexec": trtexec(graph),
        }  # fmt: skip
        return ExportResult("trt", out, graph, summary, _lines(summary, path, check), converted)

    def load(self, out: Path, threads: int | None = None) -> OnnxRunner:
        """Open `<out>/model.onnx` in ONNX Runtime, node by node: what it computes in float is exact, but slow."""
        return OnnxRunner(out / FILE, threads, optimise=False, name=NAME)

    def runtimes(self, out: Path) -> list[Runtime]:
        """ONNX Runtime, on a GPU through TensorRT as well where there is one, and OpenVINO; build_engine.py verifies the engine itself."""
        return [self.load(out), *in_openvino(out / FILE, "trt"), *on_gpu(out / FILE, "trt", "Tensorrt")]


NAME = "trt (in ONNX Runtime)"
"""How reports call what was not run on TensorRT."""
TARGET = TrtTarget()


def conversion_cost(trained: IntegerGraph, graph: IntegerGraph, samples: Mapping[str, Any]) -> dict[str, Any]:
    """What a conversion changes on an artifact's samples: images, how many keep their class, and how many were and are right."""
    before, after = (Interpreter(each).logits(samples[INPUT]).argmax(axis=1) for each in (trained, graph))
    cost: dict[str, Any] = {"images": len(before), "same_class": int((before == after).sum())}
    if "labels" in samples:
        cost |= {"right_before": int((before == samples["labels"]).sum()), "right_after": int((after == samples["labels"]).sum())}
    return cost


def trtexec(graph: IntegerGraph) -> str:
    """The command that builds the same engine as build_engine.py does, for TensorRT 11; 10 needs --stronglyTyped as well."""
    sides = "x".join(map(str, graph.tensors[graph.input].shape))
    shapes = " ".join(f"--{bound}Shapes={INPUT}:{n}x{sides}" for bound, n in (("min", 1), ("opt", 1), ("max", LARGEST_BATCH)))
    return f"trtexec --onnx={FILE} --saveEngine=model.engine {shapes} --profilingVerbosity=detailed --skipInference"


def _lines(summary: dict[str, Any], path: Path, check: builder.AheadOfTime | None) -> tuple[str, ...]:
    n = summary["verified_images"]
    lines = [
        f"trt    exact on {n}/{n} images, {summary['verified_tensors']} tensors each, in {summary['verified_in']} without optimizations"
        f"   {summary['file_bytes'] / 1e6:.1f} MB   {path}",
        "       " + (check.line if check else "emitted and linted; not built (pip install 'edgeft[trt-check]' builds it without a GPU)"),
    ]
    if check and check.n_adds:
        lines.append(f"       {check.n_fused_adds} of {check.n_adds} residual additions run inside a convolution ({summary['residual']})")
    cost = summary["conversion"]
    if cost is not None:
        right = f"; right {cost['right_before']} before, {cost['right_after']} after" if "right_before" in cost else ""
        lines += [
            f"       converted from profile u8, one bit less after every ReLU: {cost['same_class']} of {cost['images']} stored samples "
            f"keep their class{right}",
            "       trained for it instead, additions inside convolutions: edgeft train-quantize --profile s8 --set quant.residual=wide",
        ]
    return (*lines, f"       on the device: python {SCRIPT}, or {summary['trtexec']}")
