"""Stand-ins for TensorRT 10, TensorRT 11, TensorRT-RTX and the CUDA driver, with exactly the names that each of them has.

An attribute that a product lacks is missing here too, so that a builder that uses a removed name fails. The fake engine computes, for every
image, the sum of its bytes times 0 ... 4, times 2^-4.
"""

import ctypes
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

FRAC, N_LOGITS, SIDE = 4, 5, 2
MATRIX_LAYERS = {"stem/Conv": "CONVOLUTION", "fc/Gemm": "MATRIX_MULTIPLY"}
TABLE = """Layers:
Name: a_myl0_1, LayerType: kgen, Inputs: [ { Name: images, Dimensions: [-1,3,2,2], Datatype: UInt8, Format: (Linear) }], Constants: [], \
Outputs: [ { Name: b, Dimensions: [-1,4,2,2], Datatype: Int8 }], TacticName: x, Metadata: [ONNX Layer: stem/Conv][ONNX Layer: image/Cast]
Name: stem/Conv_myl0_2, LayerType: correlation, Inputs: [ { Name: b, Dimensions: [-1,4,2,2], Datatype: Int8, Format: (NHWC) }], Constants: \
[ { Name: w, Dimensions: [16,4,3,3], Datatype: Int8 }, { Name: s, Dimensions: [1,16,1,1], Datatype: Float }], Outputs: [ { Name: c, \
Datatype: Float }], TacticName: y, Metadata: [ONNX Layer: stem/Conv][ONNX Layer: stem/bias/Mul]
Name: fc/Gemm_myl0_3, LayerType: gemm, Inputs: [ { Name: c, Dimensions: [-1,16], Datatype: Int8 }], Constants: [ { Name: v, \
Datatype: Int8 }], Outputs: [ { Name: logits, Datatype: Float }], TacticName: z, Metadata: [ONNX Layer: fc/Gemm]

I/O Tensors:
 Name: images, IOMode: Input, DataType: UInt8
"""
"""As TensorRT-RTX 1.7.1.116 logs it, shortened."""


class FakeLibrary:
    """The CUDA driver: memory is a dictionary, the clock of events advances by 0.5 ms."""

    def __init__(self) -> None:
        self.memory: dict[int, bytearray] = {}
        self.fails = ""
        self.n_events = 0

    def __getattr__(self, name: str) -> Any:
        if name not in ("cuInit", "cuCtxSetCurrent", "cuDevicePrimaryCtxRetain", "cuStreamSynchronize", "cuEventDestroy_v2"):
            raise AttributeError(name)
        return lambda *_: 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = ordinal
        return 100 if self.fails else 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:
        name.value = b"Fake GPU"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = {75: 8, 76: 6}[attribute]
        return 0

    def cuStreamCreate(self, stream: Any, flags: int) -> int:
        stream._obj.value = 77
        return 0

    def cuMemAlloc_v2(self, address: Any, size: ctypes.c_size_t) -> int:
        address._obj.value = (1 << 40) + (len(self.memory) << 20)
        self.memory[address._obj.value] = bytearray(size.value)
        return 0

    def cuMemcpyHtoD_v2(self, address: ctypes.c_uint64, source: ctypes.c_void_p, size: ctypes.c_size_t) -> int:
        assert size.value <= len(self.memory[address.value])
        self.memory[address.value][: size.value] = ctypes.string_at(source.value or 0, size.value)
        return 0

    def cuMemcpyDtoH_v2(self, target: ctypes.c_void_p, address: ctypes.c_uint64, size: ctypes.c_size_t) -> int:
        ctypes.memmove(target.value or 0, bytes(self.memory[address.value][: size.value]), size.value)
        return 0

    def cuEventCreate(self, event: Any, flags: int) -> int:
        self.n_events += 1
        event._obj.value = self.n_events
        return 0

    def cuEventRecord(self, event: ctypes.c_void_p, stream: ctypes.c_void_p) -> int:
        assert stream.value == 77
        return 0

    def cuEventElapsedTime(self, ms: Any, start: ctypes.c_void_p, end: ctypes.c_void_p) -> int:
        ms._obj.value = 0.5 * ((end.value or 0) - (start.value or 0))
        return 0


@dataclass
class Behaviour:
    """What the fake does, and in `seen` what was asked of it."""

    input_batch: int = -1
    n_layers: int = 2
    parse: bool = True
    parser_errors: list[tuple[str, str, str]] = field(default_factory=list)
    parse_log: list[tuple[str, str]] = field(default_factory=list)
    build_log: list[tuple[str, str]] = field(default_factory=list)
    builds: bool = True
    has_device: bool = True
    profile_index: int = 0
    loads: bool = True
    starts: bool = True
    smallest_batch: int = 1
    inspector: str = "{}"
    library: FakeLibrary = field(default_factory=FakeLibrary)
    seen: dict[str, Any] = field(default_factory=dict)


class Severity:
    def __init__(self, name: str) -> None:
        self.name = name


class Logger:
    def __init__(self) -> None: ...


def expected_logits(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the fake engine computes."""
    codes = images.reshape(len(images), -1).sum(1, dtype=np.int64)[:, None] * np.arange(N_LOGITS)
    logits: NDArray[np.float32] = np.ldexp(codes.astype(np.float32), -FRAC)
    return logits


def fake_tensorrt(flavour: str, version: str, behaviour: Behaviour) -> Any:
    """The module `flavour` of that version: 10.x, 11.x or TensorRT-RTX 1.x."""
    is_rtx, major = flavour == "tensorrt_rtx", int(version.split(".")[0])
    module: Any = ModuleType(flavour)
    module.__version__ = version
    module.ILogger = Logger
    flags = {"STRONGLY_TYPED": 1} if is_rtx or major > 10 else {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}
    module.NetworkDefinitionCreationFlag = SimpleNamespace(**flags)
    module.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    module.LayerInformationFormat = SimpleNamespace(JSON="json")
    module.Builder = lambda log: FakeBuilder(log, is_rtx, behaviour)
    module.OnnxParser = lambda network, log: FakeParser(network, log, behaviour)
    module.Runtime = lambda log: FakeRuntime(log, behaviour)
    if is_rtx:
        module.ComputeCapability = SimpleNamespace(SM86="sm86", SM89="sm89")
    return module


class DeviceConfig:
    __slots__ = ("_behaviour", "profiling_verbosity")

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour, self.profiling_verbosity = behaviour, "names only"

    def add_optimization_profile(self, profile: Any) -> int:
        self._behaviour.seen["profile"] = profile.shapes
        return self._behaviour.profile_index


class AheadConfig(DeviceConfig):
    """Of TensorRT-RTX."""

    __slots__ = ("num_compute_capabilities",)

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(behaviour)
        self.num_compute_capabilities = 0

    def set_compute_capability(self, capability: str, index: int) -> None:
        assert index < self.num_compute_capabilities
        self._behaviour.seen.setdefault("targets", []).append(capability)


class FakeBuilder:
    def __init__(self, log: Any, is_rtx: bool, behaviour: Behaviour) -> None:
        if not behaviour.has_device:
            log.log(Severity("ERROR"), "no device")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._log, self._is_rtx, self._behaviour = log, is_rtx, behaviour

    def create_network(self, flags: int) -> Any:
        self._behaviour.seen["flags"] = flags
        layers = [SimpleNamespace(name=name, type=SimpleNamespace(name=kind)) for name, kind in MATRIX_LAYERS.items()]
        layers.append(SimpleNamespace(name="stem/Relu", type=SimpleNamespace(name="ACTIVATION")))
        n_layers = self._behaviour.n_layers and len(layers)
        image = SimpleNamespace(name="images", shape=(self._behaviour.input_batch, 3, SIDE, SIDE))
        return SimpleNamespace(num_layers=n_layers, num_outputs=1, get_layer=layers.__getitem__, get_input=lambda _: image)

    def create_builder_config(self) -> DeviceConfig:
        config = (AheadConfig if self._is_rtx else DeviceConfig)(self._behaviour)
        self._behaviour.seen["config"] = config
        return config

    def create_optimization_profile(self) -> Any:
        shapes: dict[str, Any] = {}
        return SimpleNamespace(shapes=shapes, set_shape=lambda name, *each: shapes.__setitem__(name, each))

    def build_serialized_network(self, network: Any, config: DeviceConfig) -> bytes | None:
        assert config.profiling_verbosity == "detailed"
        if self._is_rtx:
            self._log.log(Severity("VERBOSE"), TABLE)
        for severity, text in self._behaviour.build_log:
            self._log.log(Severity(severity), text)
        return b"plan" if self._behaviour.builds else None


class FakeParser:
    def __init__(self, network: Any, log: Any, behaviour: Behaviour) -> None:
        self._log, self._behaviour = log, behaviour
        self.num_errors = len(behaviour.parser_errors)

    def parse_from_file(self, path: str) -> bool:
        for severity, text in self._behaviour.parse_log:
            self._log.log(Severity(severity), text)
        return self._behaviour.parse

    def get_error(self, index: int) -> Any:
        name, operator, text = self._behaviour.parser_errors[index]
        return SimpleNamespace(node_name=lambda: name, node_operator=lambda: operator, desc=lambda: text)


class FakeRuntime:
    def __init__(self, log: Any, behaviour: Behaviour) -> None:
        self._log, self._behaviour = log, behaviour

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        self._behaviour.seen["deserialized"] = plan
        if not self._behaviour.loads:
            self._log.log(Severity("ERROR"), "built by another version")
            return None
        names = {"images": "UINT8", "logits": "FLOAT"}
        inspector = SimpleNamespace(get_engine_information=lambda form: self._behaviour.inspector)
        return SimpleNamespace(
            num_io_tensors=2,
            get_tensor_name=list(names).__getitem__,
            get_tensor_dtype=lambda name: SimpleNamespace(name=names[name]),
            get_tensor_profile_shape=lambda name, index: [(n, 3, SIDE, SIDE) for n in (self._behaviour.smallest_batch, 4, 4)],
            create_execution_context=lambda: FakeContext(self._behaviour),
            create_engine_inspector=lambda: inspector,
        )


class FakeContext:
    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self._shape: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shape = shape
        return name == "images" and shape[1:] == (3, SIDE, SIDE) and self._behaviour.smallest_batch <= shape[0] <= 4

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shape if name == "images" else (self._shape[0], N_LOGITS)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        memory = self._behaviour.library.memory
        size = int(np.prod(self._shape))
        images = np.frombuffer(bytes(memory[self._addresses["images"]][:size]), np.uint8).reshape(self._shape)
        logits = expected_logits(images).tobytes()
        memory[self._addresses["logits"]][: len(logits)] = logits
        return stream == 77 and self._behaviour.starts
