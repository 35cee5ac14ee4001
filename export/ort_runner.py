"""Run an exported ONNX file on ONNX Runtime's CPU provider: logits, every layer, and what was fused."""

import platform
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from edgeft.errors import ArtifactError
from edgeft.export.onnx_nodes import AVX2_PRECISION_KEY, INPUT, OUTPUT, StoredTensor, stored_tensors
from edgeft.fixedpoint import dequantize
from edgeft.runner import Images, Logits

_FLOAT_OPERATORS = frozenset(
    {"Add", "Conv", "DequantizeLinear", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "Mul", "QuantizeLinear"}
)
CPU = "CPUExecutionProvider"
_VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni"})


@dataclass(frozen=True)
class Fusion:
    """The operators ONNX Runtime executes after its optimizations, and the names of the nodes it left in float."""

    operators: dict[str, int]
    in_float: tuple[str, ...]


class OnnxRunner:
    """An exported model in ONNX Runtime.

    `logits` runs the file as it is. `layers` runs a second session in which every stored tensor is a graph output too;
    fusion is the same in both, because only what the fused operators write anyway is shown.
    `optimise=False` runs the file node by node: Q/DQ graphs in float arithmetic. `name` is how reports call it.
    """

    def __init__(self, path: Path, threads: int | None = None, *, optimise: bool = True, name: str = "onnx", provider: str = CPU) -> None:
        """Open a file. Raises ArtifactError when it is missing or was not written by edgeft."""
        if not path.is_file():
            raise ArtifactError(f"'{path}' does not exist", f"edgeft export RUN --target {name.partition(' ')[0]}")
        self.name = name
        self.runtime = f"ONNX Runtime {ort.__version__}, {provider.removesuffix('ExecutionProvider')}"
        self._path = path
        self._optimise = optimise
        self._options = session_options(threads, optimise=optimise)
        self._providers = list(dict.fromkeys((provider, CPU)))
        self._tensors = stored_tensors(onnx.load(path), path)
        self._session = ort.InferenceSession(path, self._options, providers=self._providers)

    @property
    def provider(self) -> str:
        """The execution provider that is asked first: the wanted one, or the CPU where that is not to be had."""
        return str(self._session.get_providers()[0])

    def logits(self, images: Images) -> Logits:
        """Scores [n, classes]; of integer logits their real values."""
        scores = self._session.run([OUTPUT], {INPUT: images})[0]
        if np.issubdtype(scores.dtype, np.integer):
            scores = dequantize(scores, self._tensors[-1].format)
        real: Logits = scores.astype(np.float32)
        return real

    def layers(self, images: Images) -> dict[str, NDArray[np.int64]]:
        """Codes of every tensor. Raises VerificationError when a 32-bit tensor does not hold whole accumulators."""
        shown = [tensor.onnx for tensor in self._tensors if tensor.onnx != INPUT]
        stored = dict(zip(shown, self._layer_session.run(shown, {INPUT: images}), strict=True))
        return {tensor.name: tensor.codes(stored.get(tensor.onnx, images)) for tensor in self._tensors}

    def executes(self) -> Fusion:
        """What the runtime makes of the file."""
        return fusion(onnx.load(self._path), optimise=self._optimise, providers=self._providers)

    @cached_property
    def _layer_session(self) -> ort.InferenceSession:
        model = with_layer_outputs(onnx.load(self._path), self._tensors)
        return ort.InferenceSession(model.SerializeToString(), self._options, providers=self._providers)


def with_layer_outputs(model: onnx.ModelProto, tensors: list[StoredTensor]) -> onnx.ModelProto:
    """The same model (changed in place) with every stored tensor as a graph output."""
    outputs = {value.name for value in model.graph.output}
    for tensor in tensors:
        if tensor.onnx not in outputs | {INPUT}:
            model.graph.output.append(onnx.helper.make_tensor_value_info(tensor.onnx, tensor.type, None))
    return model


def fusion(model: onnx.ModelProto, *, optimise: bool = True, providers: Sequence[str] = (CPU,)) -> Fusion:
    """What ONNX Runtime makes of a model on this machine, read from the optimized model it writes."""
    with tempfile.TemporaryDirectory() as directory:
        options = session_options(None, optimise=optimise)
        options.optimized_model_filepath = str(Path(directory) / "optimized.onnx")
        ort.InferenceSession(model.SerializeToString(), options, providers=list(providers))
        optimized = onnx.load(options.optimized_model_filepath)
    nodes = optimized.graph.node
    integers = _integer_tensors(optimized)
    # Logits stored in 8 bits are read by a last DequantizeLinear, which is the output format and not a float layer.
    in_float = [
        node.name
        for node in nodes
        if node.op_type in _FLOAT_OPERATORS and OUTPUT not in _outputs_of_dequantize(node) and not integers & set(node.output)
    ]
    return Fusion(dict(sorted(Counter(node.op_type for node in nodes).items())), tuple(in_float))


def _integer_tensors(model: onnx.ModelProto) -> set[str]:
    """Outputs of arithmetic on integers (the target onnx-int), which QuantizeLinear is not."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    computed = {name for node in inferred.node if node.op_type != "QuantizeLinear" for name in node.output}
    return {name for name in computed if kinds.get(name) in (onnx.TensorProto.INT32, onnx.TensorProto.UINT32)}


def lacks_vnni(machine: str, cpuinfo: str) -> bool:
    """Whether an x86 CPU sums byte products in 16 bits: no VNNI flag in the text of /proc/cpuinfo, or no such text to tell."""
    return machine.lower() in ("x86_64", "amd64") and not _VNNI_FLAGS & set(cpuinfo.split())


def _outputs_of_dequantize(node: onnx.NodeProto) -> list[str]:
    return list(node.output) if node.op_type == "DequantizeLinear" else []


def session_options(threads: int | None, *, optimise: bool) -> ort.SessionOptions:
    """Options that keep a session exact on the machine at hand."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    cpuinfo = Path("/proc/cpuinfo")
    if lacks_vnni(platform.machine(), cpuinfo.read_text() if cpuinfo.is_file() else ""):
        options.add_session_config_entry(AVX2_PRECISION_KEY, "1")
    return options
