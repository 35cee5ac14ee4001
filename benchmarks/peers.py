"""What the exported model is compared with: the same net in float32, and ONNX Runtime's own static quantization of that."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from edgeft.errors import UnsupportedError, VerificationError
from edgeft.export.onnx_qdq import IR_VERSION, OPSET
from edgeft.export.ort_runner import session_options
from edgeft.models import Classifier
from edgeft.quant.plan import IMAGE, AddStep, ConvStep, FlattenStep, GlobalPoolStep, LinearStep, MaxPoolStep, Plan, Step
from edgeft.quant.tracing.trace import trace

TOLERANCE = 1e-4
"""Largest difference between peer and PyTorch, as a share of the largest score."""


def float_peer(classifier: Classifier, file: Path) -> None:
    """Write the classifier's net as float32 ONNX: input "image" [batch, 3, size, size], *normalised*, batch norm folded.

    Normalisation is left to the caller, which favours this peer: the exported fixed-point model takes image bytes.
    Raises UnsupportedError for a net that has no plan.
    """
    size = classifier.preprocessing.size
    onnx.save(float_model(trace(classifier.net, (3, size, size))), file)


def float_model(plan: Plan) -> onnx.ModelProto:
    """The checked ONNX model of a traced plan (not yet prepared for bytes)."""
    writer = _Writer()
    for step in plan.steps:
        writer.write(step)
    n_classes = plan.steps[-1].shape[-1]
    image = helper.make_tensor_value_info(IMAGE, TensorProto.FLOAT, ["batch", *plan.image_shape])
    logits = helper.make_tensor_value_info(plan.output, TensorProto.FLOAT, ["batch", n_classes])
    body = helper.make_graph(writer.nodes, "float", [image], [logits], writer.constants)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model


class _Writer:
    """Collects nodes and initializers; a step's tensor keeps its name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def write(self, step: Step) -> None:
        match step:
            case ConvStep():
                inputs = [*step.inputs, *self._weights(step)]
                window = {"strides": step.stride, "pads": step.padding, "dilations": step.dilation}
                self._node("Conv", step, inputs, kernel_shape=step.weight.shape[2:], group=step.groups, **window)
            case LinearStep():
                self._node("Gemm", step, [*step.inputs, *self._weights(step)], transB=1)
            case AddStep():
                self._node("Add", step, list(step.inputs))
            case MaxPoolStep():
                self._node("MaxPool", step, list(step.inputs), kernel_shape=step.kernel, strides=step.stride, pads=step.padding)
            case GlobalPoolStep():
                self._node("GlobalAveragePool", step, list(step.inputs))
            case FlattenStep():
                self._node("Flatten", step, list(step.inputs), axis=1)
            case _:
                raise UnsupportedError(f"layer '{step.name}' ({type(step).__name__}) has no float32 ONNX form")

    def _node(self, operator: str, step: Step, inputs: list[str], **attributes: Any) -> None:
        """A node, followed by the step's rectification where it has one."""
        result = f"{step.name}/result" if step.relu else step.name
        self.nodes.append(helper.make_node(operator, inputs, [result], name=f"{step.name}/{operator}", **attributes))
        if step.relu and step.clip is None:
            self.nodes.append(helper.make_node("Relu", [result], [step.name], name=f"{step.name}/Relu"))
        elif step.relu:
            bounds = [self._constant(f"{step.name}/{end}", np.float32(value)) for end, value in (("low", 0.0), ("high", step.clip))]
            self.nodes.append(helper.make_node("Clip", [result, *bounds], [step.name], name=f"{step.name}/Clip"))

    def _weights(self, step: ConvStep | LinearStep) -> list[str]:
        parts = {"weight": step.weight, "bias": step.bias}
        return [self._constant(f"{step.name}/{part}", value.detach().float().numpy()) for part, value in parts.items()]

    def _constant(self, name: str, value: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name


def session(file: Path, threads: int) -> ort.InferenceSession:
    """ONNX Runtime on the CPU, all optimizations, with the options that the exported model runs with."""
    return ort.InferenceSession(file, session_options(threads, optimise=True), providers=["CPUExecutionProvider"])


def check_float_peer(classifier: Classifier, file: Path, images: NDArray[np.uint8]) -> float:
    """Largest difference to PyTorch on image bytes [n, 3, size, size], as a share of the largest score.

    Raises VerificationError when it is above TOLERANCE: a net that computes something else is no peer.
    """
    with torch.inference_mode():
        expected = classifier(torch.from_numpy(images)).numpy()
    found = session(file, 1).run(None, {IMAGE: normalised(classifier, images)})[0]
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not difference <= TOLERANCE:
        raise VerificationError(
            f"the float32 ONNX peer differs from PyTorch by {difference:.2g} of the largest score, more than {TOLERANCE:g}"
        )
    return difference


def normalised(classifier: Classifier, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the float32 net reads, [n, 3, size, size] in row-major layout."""
    with torch.inference_mode():
        values: NDArray[np.float32] = classifier.normalise(torch.from_numpy(images)).contiguous().numpy()
    return values


def quantized_peer(source: Path, file: Path, images: NDArray[np.float32], *, per_channel: bool = True) -> None:
    """ONNX Runtime's static quantization of `source` as its manual has it, calibrated on `images` [n, 3, size, size].

    Pre-processed, QDQ, uint8 activations by min and max, int8 weights per channel or per tensor.
    """
    prepared = file.with_suffix(".prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)  # the symbolic part is for transformers
    quantize_static(
        prepared, file, _Reader(images), quant_format=QuantFormat.QDQ, per_channel=per_channel,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Normalised images, one at a time."""

    def __init__(self, images: NDArray[np.float32]) -> None:
        self._images: Iterator[NDArray[np.float32]] = iter(images)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The next input, or None at the end."""
        image = next(self._images, None)
        return None if image is None else {IMAGE: image[None]}
