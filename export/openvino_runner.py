"""Run an exported ONNX file on OpenVINO's CPU plugin: a second opinion on every integer, and a fast runtime."""

import ctypes
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
from numpy.typing import NDArray

from edgeft.errors import ArtifactError
from edgeft.export.onnx_nodes import INPUT, OUTPUT, StoredTensor, stored_tensors
from edgeft.export.ort_runner import Fusion, with_layer_outputs
from edgeft.fixedpoint import dequantize
from edgeft.runner import Images, Logits

_NO_OPERATION = frozenset({"Const", "Input", "Output", "Reorder", "Reshape"})
_ARITHMETIC = frozenset({"Convolution", "FullyConnected", "MatMul", "Eltwise", "Pooling", "Reduce", "Subgraph", "FakeQuantize"})
_INTEGER = frozenset({"i8", "u8"})


class _SignalStack(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Keep the alternative signal stack of this thread (Linux).

    OpenVINO 2026.4 sets one when it compiles or runs a model, and frees it later without taking it back: the next signal with a handler,
    such as that of a child process that ends, would then kill the process.
    """
    change = getattr(ctypes.CDLL(None), "sigaltstack", None) if sys.platform == "linux" else None
    before = _SignalStack()
    if change is not None:
        change(None, ctypes.byref(before))
    try:
        yield
    finally:
        if change is not None:
            change(ctypes.byref(before), None)


class OpenVinoRunner:
    """An exported model in OpenVINO. `logits` runs the file as it is; `layers` a second model that shows every stored tensor."""

    def __init__(self, path: Path, threads: int | None = None, *, name: str = "onnx (in OpenVINO)") -> None:
        """Open a file. Raises ArtifactError when it is missing or was not written by edgeft."""
        if not path.is_file():
            raise ArtifactError(f"'{path}' does not exist", f"edgeft export RUN --target {name.partition(' ')[0]}")
        self.name = name
        self.runtime = f"OpenVINO {openvino.__version__.partition('-')[0]}, CPU"
        self._model = onnx.load(path)
        self._tensors: list[StoredTensor] = stored_tensors(self._model, path)
        # float32: on processors with bfloat16 the plugin would otherwise compute what stays in float with 8 bits of mantissa.
        self._settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        self._settings |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
        self._compiled = self._compile(self._model)

    def _compile(self, model: onnx.ModelProto) -> Any:
        with signal_stack_kept():
            core = openvino.Core()
            return core.compile_model(core.read_model(model.SerializeToString()), "CPU", self._settings)

    def logits(self, images: Images) -> Logits:
        """Scores [n, classes]; of integer logits their real values."""
        with signal_stack_kept():
            scores = self._compiled([images])[OUTPUT]
        if np.issubdtype(scores.dtype, np.integer):
            scores = dequantize(scores, self._tensors[-1].format)
        real: Logits = scores.astype(np.float32)
        return real

    def layers(self, images: Images) -> dict[str, NDArray[np.int64]]:
        """Codes of every tensor. Raises VerificationError when a 32-bit tensor does not hold whole accumulators."""
        model = self._layer_model
        with signal_stack_kept():
            found = model([images])
        return {each.name: each.codes(images if each.onnx == INPUT else found[each.onnx]) for each in self._tensors}

    def executes(self) -> Fusion:
        """What the plugin makes of the file, by its kinds of operation; those on float tensors by the names of the file's nodes."""
        operators: Counter[str] = Counter()
        in_float = []
        for operation in self._compiled.get_runtime_model().get_ordered_ops():
            about = {key: str(value.astype(str)) for key, value in operation.get_rt_info().items() if hasattr(value, "astype")}
            kind = about.get("layerType", operation.get_type_name())
            if kind in _NO_OPERATION:
                continue
            operators[kind] += 1
            if kind in _ARITHMETIC and about.get("runtimePrecision") not in _INTEGER:
                in_float.append(about.get("originalLayersNames", operation.get_friendly_name()))
        return Fusion(dict(sorted(operators.items())), tuple(in_float))

    @cached_property
    def _layer_model(self) -> Any:
        shown = onnx.ModelProto()
        shown.CopyFrom(self._model)
        return self._compile(with_layer_outputs(shown, self._tensors))
