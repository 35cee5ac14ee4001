"""edgeft bench: latency, memory, size and accuracy of runs in every backend, side by side. `edgeft.benching.bench` is the verb."""

from dataclasses import dataclass
from typing import Literal

from edgeft.errors import ConfigError
from edgeft.registry import nearest

Form = Literal["float", "static", "fixed"]
"""float32; ONNX Runtime's own 8 bits with float scales, made from the float net; edgeft's fixed point."""


@dataclass(frozen=True)
class Backend:
    """A model form in a runtime. `target` is the export that it runs; None where it runs what the run or the bench itself holds."""

    name: str
    label: str
    form: Form
    target: str | None = None


FLOAT, STATIC = "ort-float", "ort-static"
"""The two that ratios are taken to."""
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("torch", "float32 in PyTorch", "float"),
        Backend(FLOAT, "float32 in ONNX Runtime", "float"),
        Backend(STATIC, "ORT static int8", "static"),
        Backend("onnx", "edgeft int8 in ONNX Runtime", "fixed", "onnx"),
        Backend("openvino", "edgeft int8 in OpenVINO", "fixed", "onnx"),
        Backend("tensorrt", "edgeft int8 (trt) in TensorRT", "fixed", "trt"),
        Backend("cuda", "edgeft int8 (trt) on CUDA", "fixed", "trt"),
    )
}
NOT_TIMED_BY_DEFAULT = frozenset({"onnx-int", "trt"})
"""Targets whose own runtime here is no way to use them: a proof, and an emulation of TensorRT in float."""


def backend(name: str, targets: list[str]) -> Backend:
    """The backend of a name: one of BACKENDS, or an export target in its own runtime. Raises ConfigError for any other name."""
    if name in BACKENDS:
        return BACKENDS[name]
    if name in targets:
        return Backend(name, f"edgeft int8 ({name})", "fixed", name)
    known = [*BACKENDS, *(target for target in targets if target not in BACKENDS)]
    close = nearest(name, known, n=1)
    raise ConfigError(f"unknown backend '{name}'", f"known: {', '.join(known)}" + (f"\ndid you mean: {close[0]}" if close else ""))
