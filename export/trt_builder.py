"""Build a TensorRT engine from an exported ONNX file, tell which kernels are int8, and keep the engine in a cache.

One builder for TensorRT 10, TensorRT 11 and TensorRT-RTX: what differs is asked of the module, not of its version. Freestanding: Python
3.10 and TensorRT; no torch, no onnx, no other module of edgeft, because the text is shipped beside a model (first half of build_engine.py;
the second half is trt_runner.py). Engines run native code when they are loaded: a cached one is opened only when the record beside it says
that this model, this TensorRT and this GPU made it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

DEFAULT_BATCHES = (1, 1, 32)
"""Smallest, most usual and largest batch of an engine when the file leaves the batch free."""
OLDEST_MAJOR = 10
MATRIX_KERNELS = ("correlation", "gemm", "deconv")
MATRIX_LAYERS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")
ERRORS = ("ERROR", "INTERNAL_ERROR")
_KINDS = {"deconv": "deconv", "conv": "correlation", "gemm": "gemm", "matmul": "gemm", "matrixmultiply": "gemm", "matrix_multiply": "gemm"}
"""Words of the inspector's layer types, first match wins, and the types of the log's table that they stand for."""


class BuilderError(Exception):
    """It could not be done: what was found, and in `hint` what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


def find_tensorrt(names: Sequence[str] = ("tensorrt", "tensorrt_rtx")) -> Any:
    """The first TensorRT module that can be imported. Raises BuilderError with the lines that install one."""
    reasons = []
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reasons.append(str(error))
    install = (
        "RTX GPU: pip install tensorrt-rtx\n  other GPU: pip install --extra-index-url https://pypi.nvidia.com tensorrt\n  Jetson: JetPack"
    )
    raise BuilderError(f"no TensorRT: {'; '.join(reasons)}", install)


@dataclass(frozen=True)
class Kernel:
    """One step of an engine: `type` is correlation (a convolution), gemm, kgen (generated elementwise code), ...

    `inputs` and `constants` are data types ("Int8", "Float"), `nodes` the names of the ONNX nodes joined in it.
    """

    name: str
    type: str
    inputs: list[str]
    constants: list[str]
    nodes: list[str]

    @property
    def is_int8(self) -> bool:
        """Whether the data are int8 and, where a second operand is listed (a constant or an activation), it is too."""
        others = self.inputs[1:] + self.constants
        return self.inputs[:1] == ["Int8"] and (not others or "Int8" in others)


def kernels(log: Iterable[str]) -> list[Kernel]:
    """The kernels in the message "Layers:" that TensorRT-RTX logs at VERBOSE when profiling verbosity is DETAILED; [] without one."""
    table = next((text for text in log if text.startswith("Layers:")), "").splitlines()[1:]
    line_form = re.compile(r"Name: (.*?), LayerType: (\w+), Inputs: \[(.*?)\], (?:Constants: \[(.*?)\], )?Outputs: ")
    found = []
    for line in takewhile(str.strip, table):
        match = line_form.match(line)
        if match:
            inputs, constants = (re.findall(r"Datatype: (\w+)", match[group] or "") for group in (3, 4))
            found.append(Kernel(match[1], match[2], inputs, constants, _onnx_names(line)))
    return found


def inspector_kernels(text: str) -> list[Kernel]:
    """The same from EngineInspector's JSON, whose keys differ from version to version: what is not understood is left out."""
    found = []
    for layer in json.loads(text).get("Layers", []):
        if isinstance(layer, dict):  # only names where the engine was built without details
            kind = f"{layer.get('LayerType', '')} {layer.get('ParameterType', '')}".lower()
            kind = next((known for word, known in _KINDS.items() if word in kind), kind.strip())
            inputs, weights = [_json_type(each) for each in layer.get("Inputs", [])], layer.get("Weights")
            constants = [_json_type(weights)] if isinstance(weights, dict) else []
            found.append(Kernel(layer.get("Name", ""), kind, inputs, constants, _onnx_names(str(layer.get("Metadata", "")))))
    return found


def _json_type(operand: Any) -> str:
    """Int8, or whatever else the entry says of its type: "Format/Datatype" in TensorRT 10, two entries in 11, "Type" of weights."""
    values = [str(value) for key, value in operand.items() if key.lower().endswith("type")] if isinstance(operand, dict) else []
    return "Int8" if re.search(r"\bint8\b", " ".join(values), re.IGNORECASE) else " ".join(values)


def _onnx_names(metadata: str) -> list[str]:
    return re.findall(r"\[ONNX Layer: ([^\]]*)\]", metadata)


@dataclass(frozen=True)
class Int8Summary:
    """How many convolutions and gemms have int8 operands; `in_float` names the ONNX nodes of the others."""

    n_int8: int
    n_total: int
    in_float: list[str]


def int8_summary(table: Sequence[Kernel], matrix_nodes: Sequence[str] = ()) -> Int8Summary:
    """Count kernels or, where `matrix_nodes` names all convolutions and gemms of the file, nodes.

    Counted by node, one that became another kind of kernel (a gemm in float becomes a "runtime_fusion") is not overlooked.
    """
    matrix = [kernel for kernel in table if kernel.type in MATRIX_KERNELS]
    if not matrix_nodes:
        in_float = [name for kernel in matrix if not kernel.is_int8 for name in kernel.nodes or [kernel.name]]
        return Int8Summary(sum(kernel.is_int8 for kernel in matrix), len(matrix), in_float)
    joined = {name: [kernel.is_int8 for kernel in matrix if name in kernel.nodes] for name in matrix_nodes}
    in_float = [name for name, states in joined.items() if not (states and all(states))]
    return Int8Summary(len(joined) - len(in_float), len(joined), in_float)


@dataclass(frozen=True)
class BuildResult:
    """What a build gave. `engine` is None exactly when `errors` is not empty; `warnings` are those of the parser.

    `kernels` is empty where this TensorRT does not log its table; `matrix_nodes` are the convolutions and gemms of the parsed file.
    """

    flavour: str
    version: str
    engine: bytes | None
    kernels: list[Kernel]
    matrix_nodes: list[str]
    warnings: list[str]
    errors: list[str]

    @property
    def int8(self) -> Int8Summary | None:
        """Which convolutions and gemms run in int8; None without a table of kernels."""
        return int8_summary(self.kernels, self.matrix_nodes) if self.kernels else None


def new_log(trt: Any) -> Any:
    """A TensorRT logger that keeps everything, VERBOSE included, in `rows`: pairs of severity and text."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.rows: list[tuple[str, str]] = []

        def log(self, severity: Any, text: str) -> None:
            self.rows.append((getattr(severity, "name", str(severity)), text))

    return Log()


def logged_errors(log: Any, start: int = 0) -> list[str]:
    """Errors logged from row `start` on. Without a driver each is followed by a remark on the driver, which counts only when alone."""
    texts = [text for severity, text in log.rows[start:] if severity in ERRORS]
    return _without_driver_remarks(texts)


def build(trt: Any, model: Path, *, batches: tuple[int, int, int] | None = None, targets: Sequence[str] | None = None) -> BuildResult:
    """Parse and build; what is wrong with the model is in the result, BuilderError is for what is wrong with the machine.

    `batches` (smallest, most usual, largest) counts where the batch of the file is free; `targets` ("SM86") where TensorRT can build for a
    GPU that is not there.
    """
    if not model.is_file():
        raise BuilderError(f"'{model}' does not exist")
    log = new_log(trt)
    builder = _new_builder(trt, log)
    kinds = trt.NetworkDefinitionCreationFlag
    # Types as written in the file: a request in TensorRT 10, always so in 11. EXPLICIT_BATCH is gone in 11.
    flags = [int(getattr(kinds, name)) for name in ("STRONGLY_TYPED", "EXPLICIT_BATCH") if hasattr(kinds, name)]
    network, config = builder.create_network(sum(1 << flag for flag in flags)), builder.create_builder_config()
    errors = _parse(trt, network, log, model)
    n_parsed = len(log.rows)
    errors = errors or _configure(trt, builder, network, config, batches or DEFAULT_BATCHES, targets or ())
    plan = None if errors else builder.build_serialized_network(network, config)
    if plan is None and not errors:
        errors = logged_errors(log, n_parsed) or ["the build failed and gave no reason"]
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return BuildResult(
        trt.__name__,
        trt.__version__,
        None if plan is None else bytes(plan),
        kernels(text for _, text in log.rows),
        [layer.name for layer in layers if layer.type.name in MATRIX_LAYERS],
        [text for severity, text in log.rows[:n_parsed] if severity == "WARNING"],
        errors,
    )


def _new_builder(trt: Any, log: Any) -> Any:
    if trt.__name__ == "tensorrt" and int(trt.__version__.split(".")[0]) < OLDEST_MAJOR:
        raise BuilderError(f"TensorRT {trt.__version__} is too old: {OLDEST_MAJOR} is the first that keeps to the types of the file")
    try:
        return trt.Builder(log)
    except (TypeError, RuntimeError) as error:  # how the bindings say that the library returned nothing
        reason = "; ".join(logged_errors(log)) or str(error)
        raise BuilderError(f"{trt.__name__} {trt.__version__} has no builder on this machine: {reason}", "nvidia-smi") from error


def _parse(trt: Any, network: Any, log: Any, model: Path) -> list[str]:
    """Errors that name node and operator."""
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse_from_file(str(model))
    errors = []
    for error in (parser.get_error(index) for index in range(parser.num_errors)):
        place = f"node '{error.node_name()}' ({error.node_operator()}): " if error.node_name() else ""
        errors.append(place + "; ".join(_without_driver_remarks(error.desc().splitlines())))
    if errors or not parsed:
        return errors or ["the file was not parsed, and no reason given"]
    # A file without a byte, or with garbage, is parsed without an error: only the network tells.
    return [] if network.num_layers and network.num_outputs else ["the network is empty: no layers or no outputs were found in the file"]


def _without_driver_remarks(texts: list[str]) -> list[str]:
    return [text for text in texts if "catchCudaError" not in text] or texts


def _configure(trt: Any, builder: Any, network: Any, config: Any, batches: tuple[int, int, int], targets: Sequence[str]) -> list[str]:
    """Details for the table of kernels, targets, a profile for a free batch; the errors."""
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if targets and not hasattr(config, "num_compute_capabilities"):
        return [f"{trt.__name__} builds for the GPU it runs on: targets {', '.join(targets)} need tensorrt_rtx"]
    unknown = [target for target in targets if not hasattr(trt.ComputeCapability, target)]
    if unknown:
        return [f"{trt.__name__} {trt.__version__} does not know the target '{unknown[0]}'"]
    if targets:
        config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, target), index)
    image = network.get_input(0)
    batch, *sizes = tuple(image.shape)
    if batch == -1:
        profile = builder.create_optimization_profile()
        profile.set_shape(image.name, *((each, *sizes) for each in batches))
        if config.add_optimization_profile(profile) < 0:
            return [f"input '{image.name}' {tuple(image.shape)}: batches {', '.join(map(str, batches))} are refused"]
    return []


@dataclass(frozen=True)
class Conditions:
    """What an engine depends on. An engine is used only where all of it is equal."""

    flavour: str
    version: str
    gpu: str
    compute_capability: str
    model_sha256: str
    batches: list[int]


@dataclass(frozen=True)
class Engine:
    """The bytes of an engine and, when they are known, its counts. `is_new` when it was not in the cache."""

    plan: bytes
    int8: Int8Summary | None
    is_new: bool


def conditions(trt: Any, model: Path, gpu: str, compute_capability: str, batches: Sequence[int] | None = None) -> Conditions:
    """For this TensorRT, this file and the GPU of that name."""
    if not model.is_file():
        raise BuilderError(f"'{model}' does not exist")
    return Conditions(trt.__name__, trt.__version__, gpu, compute_capability, _sha256(model.read_bytes()), list(batches or DEFAULT_BATCHES))


def engine_path(model: Path) -> Path:
    """Where the engine of a model is kept; its record is beside it, with ".json" added."""
    return model.with_suffix(".engine")


def load_engine(path: Path, wanted: Conditions) -> Engine:
    """A cached engine, not deserialized. Raises BuilderError naming everything by which it does not fit."""
    side = _record_path(path)
    try:
        plan, record = path.read_bytes(), json.loads(side.read_text(encoding="utf-8"))
        int8 = None if record["int8"] is None else Int8Summary(**record["int8"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuilderError(f"'{path}' has no usable record '{side.name}': {error!r}", "build it again") from error
    expected = {**asdict(wanted), "engine_sha256": _sha256(plan)}
    differing = [f"{key} is {record.get(key)!r}, not {value!r}" for key, value in expected.items() if record.get(key) != value]
    if differing:
        raise BuilderError(f"'{path}' does not fit: {'; '.join(differing)}", "build it again: an engine made elsewhere is code of others")
    return Engine(plan, int8, is_new=False)


def build_or_load(
    trt: Any, model: Path, wanted: Conditions, *, targets: Sequence[str] | None = None, say: Callable[[str], Any] = print
) -> Engine:
    """The cached engine, or a new one when that does not fit; `say` is told why. Raises BuilderError when nothing can be built."""
    path = engine_path(model)
    try:
        return load_engine(path, wanted)
    except BuilderError as error:
        say(f"building again: {error.message}" if path.exists() else f"building '{path}'")
    smallest, usual, largest = wanted.batches
    result = build(trt, model, batches=(smallest, usual, largest), targets=targets)
    for warning in result.warnings:
        say(f"warning of the parser: {warning}")
    if result.engine is None:
        raise BuilderError(f"{result.flavour} {result.version} refuses '{model}': {'; '.join(result.errors)}")
    path.write_bytes(result.engine)
    int8 = None if result.int8 is None else asdict(result.int8)
    record = {**asdict(wanted), "engine_sha256": _sha256(result.engine), "int8": int8}
    _record_path(path).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return Engine(result.engine, result.int8, is_new=True)


def _record_path(engine: Path) -> Path:
    return engine.with_name(engine.name + ".json")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
