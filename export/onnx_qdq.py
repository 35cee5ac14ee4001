"""IntegerGraph to a QDQ ONNX file whose integers ONNX Runtime reproduces. Equations: fixedpoint.md.

Activations are stored as uint8: zero point 0 where no code is negative, 128 elsewhere. See README.md beside this file.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import edgeft
from edgeft.artifact import Artifact, atomic_write
from edgeft.errors import UnsupportedError, VerificationError
from edgeft.export import ExportResult
from edgeft.export.agreement import check_float_agreement
from edgeft.export.ort_runner import AVX2_PRECISION_KEY, INPUT, OUTPUT, TENSORS_KEY, Fusion, OnnxRunner, StoredTensor, fusion
from edgeft.export.verify import BATCH, verify
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import SCHEMA, Add, Conv, Flatten, GlobalPool, IntegerGraph, Linear, MaxPool, Op, Tensor
from edgeft.interpret import Interpreter, image_offset
from edgeft.runner import Images

OPSET, IR_VERSION = 17, 8
"""Pinned: old enough for runtimes in the field, new enough for 8-bit MaxPool and per-channel DequantizeLinear."""
FILE = "model.onnx"
_FUSED = {Conv: "QLinearConv", GlobalPool: "QLinearConv", Linear: "QGemm", Add: "QLinearAdd"}


def build_model(graph: IntegerGraph, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
    """The checked ONNX model: input "images" uint8 [batch, 3, height, width], output "logits" float32 [batch, classes].

    Raises UnsupportedError naming the layer that float32 rescaling could not reproduce.
    """
    check_float_agreement(graph)
    writer = _Writer(graph)
    for op in graph.ops:
        writer.write(op)
    image, logits = graph.tensors[graph.input], graph.tensors[graph.output]
    body = helper.make_graph(
        writer.finish(),
        "edgeft",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["batch", *image.shape])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", *logits.shape])],
        list(writer.constants.values()),
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    model.producer_name, model.producer_version = "edgeft", edgeft.__version__
    tensors = json.dumps([writer.stored(tensor).to_json() for tensor in graph.tensors.values()])
    helper.set_model_props(model, {TENSORS_KEY: tensors, AVX2_PRECISION_KEY: "1", **_graph_metadata(graph), **(metadata or {})})
    onnx.checker.check_model(model, full_check=True)
    return model


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
        model = build_model(graph, _artifact_metadata(artifact))
        fuses = fusion(build_model(_probe())).in_float == ()
        found = fusion(model)
        if fuses:
            check_fusion(graph, found)
        path = out / FILE
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(path, model.SerializeToString())
        n = _verify_samples(graph, OnnxRunner(path), samples)
        summary = {
            "file": FILE, "file_bytes": path.stat().st_size, "opset": OPSET, "onnxruntime": onnxruntime.__version__,
            "operators": found.operators, "fused": fuses, "verified_images": n, "verified_tensors": len(graph.tensors),
        }  # fmt: skip
        return ExportResult("onnx", out, summary, _lines(summary, path))

    def load(self, out: Path, threads: int | None = None) -> OnnxRunner:
        """Open `<out>/model.onnx` on the CPU; `threads` None leaves the number to ONNX Runtime."""
        return OnnxRunner(out / FILE, threads)


TARGET = OnnxTarget()


class _Writer:
    """Collects nodes and initializers, op by op. Tensor t becomes "t/codes" (bytes) and, where something reads it, "t/real"."""

    def __init__(self, graph: IntegerGraph) -> None:
        self.graph = graph
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self._zero_points = {graph.input: image_offset(graph)}
        self._real: dict[str, str] = {}

    def write(self, op: Op) -> None:
        """Append the nodes of one op."""
        self._zero_points[op.output] = self._zero_point(op)
        match op:
            case Conv():
                window = _window(self.graph.constants[op.weight].shape[2:], op.stride, op.padding, dilations=op.dilation)
                self._compute("Conv", op, [self._read(op.input), *self._weights(op)], relu=op.relu, group=op.groups, **window)
            case Linear():
                self._compute("Gemm", op, [self._read(op.input), *self._weights(op)], relu=op.relu, transB=1)
            case Add():
                self._compute("Add", op, [self._read(op.left), self._read(op.right)], relu=op.relu)
            case GlobalPool():
                self._global_pool(op)
            case MaxPool():
                self._on_codes("MaxPool", op, **_window(op.kernel, op.stride, op.padding))
            case Flatten():
                self._on_codes("Flatten", op, axis=1)

    def finish(self) -> list[onnx.NodeProto]:
        """All nodes, the last of which writes the logits."""
        last = self._read(self.graph.output)
        writer = next(node for node in self.nodes if last in node.output)
        writer.output[0] = OUTPUT
        return self.nodes

    def stored(self, tensor: Tensor) -> StoredTensor:
        """Where and how a tensor of the graph is found in the file."""
        if tensor.format.width > 8:
            onnx_name = OUTPUT if tensor.name == self.graph.output else f"{tensor.name}/real"
            return StoredTensor(tensor.name, onnx_name, tensor.format, 0)
        return StoredTensor(tensor.name, self._codes(tensor.name), tensor.format, self._zero_points[tensor.name])

    def _zero_point(self, op: Op) -> int:
        if isinstance(op, MaxPool | Flatten):
            return self._zero_points[op.input]
        rectified = isinstance(op, Conv | Linear | Add) and op.relu
        return 128 if self.graph.format(op.output).signed and not rectified else 0

    def _codes(self, name: str) -> str:
        return INPUT if name == self.graph.input else f"{name}/codes"

    def _read(self, name: str) -> str:
        """The real values of a tensor: one DequantizeLinear, shared by its readers."""
        if name not in self._real:
            step, zero = self._step(name), self._constant(f"{name}/zero", np.uint8(self._zero_points[name]))
            self._real[name] = self._node("DequantizeLinear", [self._codes(name), step, zero], f"{name}/real")
        return self._real[name]

    def _compute(self, operator: str, op: Op, inputs: list[str], *, relu: bool, **attributes: Any) -> None:
        """A float operator between Q and DQ; a 32-bit result stays float, its real values are the accumulators times their step."""
        fmt = self.graph.format(op.output)
        if fmt.width > 8:
            self._real[op.output] = self._node(operator, inputs, f"{op.output}/real", **attributes)
            return
        result = self._node(operator, inputs, f"{op.output}/result", **attributes)
        zero_point = self._zero_points[op.output]
        zero = self._constant(f"{op.output}/zero", np.uint8(zero_point))
        lowest, highest = max(fmt.min_code, 0) if relu else fmt.min_code, fmt.max_code
        saturates = (lowest + zero_point, highest + zero_point) == (0, 255)
        bytes_name = self._codes(op.output) if saturates else f"{op.output}/bytes"
        self._node("QuantizeLinear", [result, self._step(op.output), zero], bytes_name)
        if not saturates:  # an integer Clip keeps the operator fused, a float one would not
            bounds = [self._constant(f"{op.output}/{n}", np.uint8(c + zero_point)) for n, c in (("low", lowest), ("high", highest))]
            self._node("Clip", [bytes_name, *bounds], self._codes(op.output))

    def _global_pool(self, op: GlobalPool) -> None:
        """Eq. 10 as a depthwise convolution of ones over the whole map: the sum, times 2^-m."""
        channels, rows, columns = self.graph.tensors[op.input].shape
        ones = np.ones((channels, 1, rows, columns), np.int8)
        weight = self._dequantized(f"{op.output}/ones", ones, (op.divisor_log2,))
        self._compute("Conv", op, [self._read(op.input), weight], relu=False, group=channels, kernel_shape=[rows, columns])

    def _on_codes(self, operator: str, op: MaxPool | Flatten, **attributes: Any) -> None:
        """An operator that only moves codes; padding of an integer MaxPool is the lowest value of the type and never wins."""
        if self.graph.format(op.input).width > 8:
            self._real[op.output] = self._node(operator, [self._real[op.input]], f"{op.output}/real", **attributes)
        else:
            self._node(operator, [self._codes(op.input)], self._codes(op.output), **attributes)

    def _weights(self, op: Conv | Linear) -> list[str]:
        """Weight and bias as integers with their exact steps: a float bias would be quantized again by the runtime."""
        weight, bias = self.graph.constants[op.weight], self.graph.constants[op.bias]
        bias_frac = tuple(frac + self.graph.format(op.input).frac for frac in op.weight_frac)
        return [self._dequantized(f"{op.output}/weight", weight, op.weight_frac), self._dequantized(f"{op.output}/bias", bias, bias_frac)]

    def _dequantized(self, name: str, codes: NDArray[Any], frac: tuple[int, ...]) -> str:
        """An integer constant and its DequantizeLinear, per tensor or along axis 0."""
        steps = np.ldexp(np.float32(1), -np.asarray(frac if len(frac) > 1 else frac[0]))
        inputs = [self._constant(f"{name}/codes", codes), self._constant(f"{name}/step", steps.astype(np.float32))]
        if codes.dtype == np.int8:  # the operator has no zero point for int32
            inputs.append(self._constant(f"{name}/zero", np.zeros(steps.shape, np.int8)))
        return self._node("DequantizeLinear", inputs, f"{name}/real", **({"axis": 0} if len(frac) > 1 else {}))

    def _step(self, name: str) -> str:
        return self._constant(f"{name}/step", np.float32(self.graph.format(name).step))

    def _constant(self, name: str, value: NDArray[Any] | np.generic) -> str:
        self.constants.setdefault(name, numpy_helper.from_array(np.asarray(value), name))
        return name

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"{output.rpartition('/')[0]}/{operator}", **attributes))
        return output


def _window(kernel: tuple[int, ...], stride: tuple[int, int], padding: tuple[int, int, int, int], **more: Any) -> dict[str, Any]:
    return {"kernel_shape": list(kernel), "strides": list(stride), "pads": list(padding), **more}


def _probe() -> IntegerGraph:
    """One convolution: whether this build of ONNX Runtime fuses anything on this processor is measured, not assumed."""
    tensors = {
        "image": Tensor("image", (4, 4, 4), FixedPointFormat(8, 8, signed=False)),
        "probe": Tensor("probe", (4, 4, 4), FixedPointFormat(8, 4, signed=False)),
    }
    conv = Conv("probe", "image", "weight", "bias", (7,), (1, 1), (0, 0, 0, 0), (1, 1), 1, relu=True)
    constants: dict[str, NDArray[Any]] = {"weight": np.ones((4, 4, 1, 1), np.int8), "bias": np.zeros(4, np.int32)}
    return IntegerGraph(tensors, (conv,), "image", constants=constants)


def _graph_metadata(graph: IntegerGraph) -> dict[str, str]:
    return {
        "edgeft.graph_schema": str(SCHEMA),
        "edgeft.profile": graph.profile,
        "edgeft.rounding": graph.rounding,
        "edgeft.residual": graph.residual,
    }


def _artifact_metadata(artifact: Artifact) -> dict[str, str]:
    return {
        "edgeft.artifact": artifact.digest,
        "edgeft.preprocessing": json.dumps(artifact.manifest.preprocessing),
        "edgeft.classes": json.dumps(list(artifact.manifest.classes)),
    }


def _verify_samples(graph: IntegerGraph, runner: OnnxRunner, samples: Mapping[str, NDArray[Any]]) -> int:
    """Every layer against the interpreter, and against the codes that the training graph recorded in the artifact."""
    images: Images = samples["images"]
    n = verify(Interpreter(graph), runner, images)
    recorded = {key.removeprefix("layer:"): codes for key, codes in samples.items() if key.startswith("layer:")}
    for start in range(0, n, BATCH):
        found = runner.layers(images[start : start + BATCH])
        for layer, codes in recorded.items():
            if not np.array_equal(found[layer], codes[start : start + BATCH]):
                raise VerificationError(f"layer '{layer}': the exported model does not give the codes recorded in the artifact")
    return n


def _lines(summary: dict[str, Any], path: Path) -> tuple[str, ...]:
    fused = ", ".join(f"{n} {name}" for name, n in summary["operators"].items())
    note = "" if summary["fused"] else " (this build fuses nothing on this processor: correct, but slow)"
    n, size = summary["verified_images"], summary["file_bytes"] / 1e6
    return (
        f"onnx   exact on {n}/{n} images, {summary['verified_tensors']} tensors each   {size:.1f} MB   {path}",
        f"       ONNX Runtime {summary['onnxruntime']} runs {fused}{note}",
    )
