"""Open an artifact in a backend: a Runner, what it executes, and the call that is timed. Nothing here loads torch before it is needed."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.artifact import Artifact
from edgeft.bench import BACKENDS, FLOAT, STATIC
from edgeft.bench.store import ABOUT, PEER_FILES
from edgeft.bench.timing import Call
from edgeft.errors import MissingExtraError
from edgeft.export import TARGETS, Runtime
from edgeft.runner import Images, Runner


@dataclass(frozen=True)
class Spec:
    """What to open; plain values, so that a fresh process can do it too.

    `folder` is the run for PyTorch, the folder of its peers for ONNX Runtime's float32 and static 8 bits, else an export.
    """

    backend: str
    folder: str
    threads: int


@dataclass(frozen=True)
class Executed:
    """What runs a model ("ONNX Runtime 1.32.0, CPU"), its operators, and which compute in float; `in_float` None: float32 by intention."""

    runtime: str
    operators: dict[str, int]
    in_float: tuple[str, ...] | None


@dataclass(frozen=True)
class Opened:
    """A model in a runtime. `prepare(images)` gives the call that is timed; `executed` looks at it more closely, which takes memory."""

    runner: Runner
    prepare: Callable[[Images], Call]
    executed: Callable[[], Executed]


def open_model(spec: Spec) -> Opened:
    """Open it. Raises MissingExtraError with the install command where a package is missing, ArtifactError for a damaged file."""
    return OPENERS.get(spec.backend, _open_target)(spec)


def _open_torch(spec: Spec) -> Opened:
    import torch

    from edgeft.bench.peers import float_classifier
    from edgeft.pipeline import FloatModel

    classifier = float_classifier(Artifact.load(Path(spec.folder)))

    def prepare(images: Images) -> Call:
        with torch.inference_mode():
            pixels = classifier.normalise(torch.from_numpy(images))

        @torch.inference_mode()
        def call() -> object:
            torch.set_num_threads(spec.threads)  # of the whole process: other models may have set another number
            return classifier.net(pixels)

        return call

    return Opened(FloatModel(classifier), prepare, lambda: Executed(f"PyTorch {torch.__version__}, CPU", {}, None))


def _open_peer(spec: Spec) -> Opened:
    from edgeft.export.float_onnx import FloatOnnxRunner

    folder = Path(spec.folder)
    about = json.loads((folder / ABOUT).read_bytes())
    label = BACKENDS[spec.backend].label
    runner = FloatOnnxRunner(folder / PEER_FILES[spec.backend], spec.threads, about["mean"], about["std"], name=label)

    def executed() -> Executed:
        found = runner.executes()
        return Executed(runner.runtime, found.operators, None if spec.backend == FLOAT else found.in_float)

    return Opened(runner, runner.call, executed)


def _open_openvino(spec: Spec) -> Opened:
    if importlib.util.find_spec("openvino") is None:
        raise MissingExtraError("OpenVINO is not installed", "pip install 'edgeft[openvino]'")
    from edgeft.export.openvino_runner import OpenVinoRunner

    return _fixed(OpenVinoRunner(_file(spec), spec.threads))


def _open_gpu(provider: str) -> Callable[[Spec], Opened]:
    """ONNX Runtime's execution provider "CUDA" or "Tensorrt"; the batch is copied to the device and the scores back in every call."""

    def opener(spec: Spec) -> Opened:
        from edgeft.export.runtimes import on_gpu

        found = on_gpu(_file(spec), "trt", provider)
        if not found:
            raise MissingExtraError(f"ONNX Runtime finds no {provider} device here", "pip install 'edgeft[gpu]', with an NVIDIA GPU")
        return _fixed(found[0])

    return opener


def _open_onnx(spec: Spec) -> Opened:
    runner: Runtime = TARGETS.get("onnx").load(Path(spec.folder), spec.threads)
    return _fixed(runner)


def _open_target(spec: Spec) -> Opened:
    """An export in the runtime that its target opens first."""
    target, folder = TARGETS.get(spec.backend), Path(spec.folder)
    runner: Runner = target.load(folder, spec.threads)

    def executed() -> Executed:
        first: Runtime = target.runtimes(folder)[0]
        found = first.executes()
        return Executed(first.runtime, found.operators, found.in_float)

    return Opened(runner, _logits_of(runner), executed)


def _fixed(runner: Runtime) -> Opened:
    def executed() -> Executed:
        found = runner.executes()
        return Executed(runner.runtime, found.operators, found.in_float)

    return Opened(runner, _logits_of(runner), executed)


def _logits_of(runner: Runner) -> Callable[[Images], Call]:
    return lambda images: lambda: runner.logits(images)


def _file(spec: Spec) -> Path:
    about: dict[str, Any] = json.loads((Path(spec.folder) / "export.json").read_bytes())
    return Path(spec.folder, about["file"])


OPENERS: dict[str, Callable[[Spec], Opened]] = {
    "torch": _open_torch,
    FLOAT: _open_peer,
    STATIC: _open_peer,
    "onnx": _open_onnx,
    "openvino": _open_openvino,
    "tensorrt": _open_gpu("Tensorrt"),
    "cuda": _open_gpu("CUDA"),
}
"""How the backends are opened; any other name is an export target in its own runtime."""
