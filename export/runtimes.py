"""Other runtimes that can run an exported file here, beyond the one that its target is made for."""

import importlib.util
from pathlib import Path

import onnxruntime as ort

from edgeft.export import Runtime
from edgeft.export.ort_runner import OnnxRunner


def in_openvino(path: Path, target: str) -> list[Runtime]:
    """OpenVINO with the file, where it is installed (extra `openvino`)."""
    if importlib.util.find_spec("openvino") is None:
        return []
    from edgeft.export.openvino_runner import OpenVinoRunner

    return [OpenVinoRunner(path, name=f"{target} (in OpenVINO)")]


def on_gpu(path: Path, target: str, provider: str) -> list[Runtime]:
    """ONNX Runtime's execution provider "CUDA" or "Tensorrt" with the file, where onnxruntime-gpu is installed and finds a device.

    Without a device a session silently goes on with the CPU, which is run on its own anyway.
    """
    full = f"{provider}ExecutionProvider"
    if full not in ort.get_available_providers():
        return []
    runner = OnnxRunner(path, name=f"{target} ({provider})", provider=full)
    return [runner] if runner.provider == full else []
