"""What exports are compared with: the float32 net as an ONNX file, ONNX Runtime's own static quantization of it, and a Runner of both."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from edgeft.errors import ArtifactError
from edgeft.export.onnx_qdq import IR_VERSION, OPSET
from edgeft.export.ort_runner import Fusion, fusion, session_options
from edgeft.runner import Images, Logits

_FLOAT_ARITHMETIC = ("Add", "AveragePool", "Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "GlobalAveragePool", "MatMul", "Mul")
"""Operators that compute on floats; their 8-bit forms have other names (QLinearConv, QGemm, ...)."""


@dataclass(frozen=True)
class FloatNode:
    """One ONNX operator that writes tensor `output`; `constants`, by name, are its inputs after `inputs`."""

    operator: str
    output: str
    inputs: tuple[str, ...]
    constants: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)


def assemble_float(nodes: Sequence[FloatNode], image: str, shape: Sequence[int], output: str, n_classes: int) -> onnx.ModelProto:
    """The checked ONNX model of a float32 net: input `image` [batch, *shape], *normalised*; output [batch, n_classes]."""
    protos, constants = [], []
    for node in nodes:
        name = f"{node.output.removesuffix('/result')}/{node.operator}"
        protos.append(helper.make_node(node.operator, [*node.inputs, *node.constants], [node.output], name=name, **node.attributes))
        constants += [numpy_helper.from_array(np.asarray(value), key) for key, value in node.constants.items()]
    given = helper.make_tensor_value_info(image, TensorProto.FLOAT, ["batch", *shape])
    logits = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", n_classes])
    body = helper.make_graph(protos, "float", [given], [logits], constants)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model


def quantize_statically(source: Path, file: Path, images: NDArray[np.float32], *, per_channel: bool = True) -> None:
    """ONNX Runtime's static quantization of `source` as its manual has it, calibrated on `images` [n, 3, size, size].

    Pre-processed, QDQ, uint8 activations by min and max, int8 weights per channel or per tensor.
    """
    prepared = file.with_suffix(".prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)  # the symbolic part is for transformers
    reader = _Reader(onnx.load(source).graph.input[0].name, images)
    quantize_static(
        prepared, file, reader, quant_format=QuantFormat.QDQ, per_channel=per_channel,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Normalised images, one at a time."""

    def __init__(self, name: str, images: NDArray[np.float32]) -> None:
        self._name = name
        self._images: Iterator[NDArray[np.float32]] = iter(images)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The next input, or None at the end."""
        image = next(self._images, None)
        return None if image is None else {self._name: image[None]}


def session(file: Path, threads: int) -> ort.InferenceSession:
    """ONNX Runtime on the CPU, all optimizations, with the options that the exported model runs with."""
    return ort.InferenceSession(file, session_options(threads, optimise=True), providers=["CPUExecutionProvider"])


class FloatOnnxRunner:
    """A file that takes normalised floats, behind the interface of image bytes. `mean` and `std` are of pixels in 0 ... 1."""

    def __init__(self, path: Path, threads: int, mean: Sequence[float], std: Sequence[float], *, name: str) -> None:
        """Open a file. Raises ArtifactError when it is missing."""
        if not path.is_file():
            raise ArtifactError(f"'{path}' does not exist")
        self.name = name
        self.runtime = f"ONNX Runtime {ort.__version__}, CPU"
        self._path = path
        self._mean, self._std = (np.asarray(values, np.float32).reshape(1, 3, 1, 1) for values in (mean, std))
        self._session = session(path, threads)
        self._input = self._session.get_inputs()[0].name

    def logits(self, images: Images) -> Logits:
        """Scores [n, classes] of image bytes."""
        scores: Logits = self.call(images)()
        return scores

    def call(self, images: Images) -> Callable[[], Any]:
        """What computes the scores of these images each time it is called; they are normalised now."""
        feed = {self._input: (images.astype(np.float32) / np.float32(255) - self._mean) / self._std}
        return lambda: self._session.run(None, feed)[0]

    def executes(self) -> Fusion:
        """The operators that ONNX Runtime executes, and how many of which compute in float."""
        operators = fusion(onnx.load(self._path)).operators
        return Fusion(operators, tuple(f"{operators[name]} {name}" for name in _FLOAT_ARITHMETIC if name in operators))
