"""Build the engine of a model, run its golden samples, time it: `python build_engine.py` beside model.onnx.

Second half of build_engine.py, after trt_builder.py: the standard library, numpy and TensorRT, nothing else. The GPU is reached through
the C interface of its driver, so that a device needs no further package.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from edgeft.export.trt_builder import (
    BuilderError,
    Engine,
    Int8Summary,
    Kernel,
    build,
    build_or_load,
    conditions,
    find_tensorrt,
    inspector_kernels,
    int8_summary,
    logged_errors,
    new_log,
)

INPUT, OUTPUT = "images", "logits"
N_WARM_UP = 20
DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32", "INT64": "int64", "BOOL": "bool"}
"""NumPy types of TensorRT's."""
STORED_DTYPES = {"U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F32": "<f4", "F64": "<f8"}
"""NumPy types of those of a safetensors file."""
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_* of the CUDA driver interface."""


class Cuda:
    """A GPU through its driver: memory, one stream, events. `library` is libcuda as ctypes loads it."""

    def __init__(self, library: Any, device: int = 0) -> None:
        self._library, self._device, self.stream = library, ctypes.c_int(), ctypes.c_void_p()
        context, name = ctypes.c_void_p(), ctypes.create_string_buffer(256)
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(self._device), device)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)  # the context that TensorRT uses too
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", ctypes.byref(self.stream), 0)
        self._call("cuDeviceGetName", name, len(name), self._device)
        self.gpu = name.value.decode()
        self.compute_capability = f"{self._attribute(CAPABILITY_MAJOR)}.{self._attribute(CAPABILITY_MINOR)}"

    @classmethod
    def open(cls) -> Cuda:
        """The first GPU. Raises BuilderError without a driver."""
        try:
            return cls(ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1"))
        except OSError as error:
            raise BuilderError(f"no CUDA driver: {error}", "run this on the device with the GPU; --check-only needs none") from error

    def allocate(self, n_bytes: int) -> int:
        """Address of device memory, which is kept until the process ends."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(n_bytes))
        return address.value

    def upload(self, address: int, array: Any) -> None:
        """Copy a contiguous array to the device, after what the stream was doing."""
        self.wait()
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes))

    def download(self, array: Any, address: int) -> None:
        """Fill a contiguous array from the device, when the stream has finished."""
        self.wait()
        self._call("cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))

    def wait(self) -> None:
        """Until the stream has finished."""
        self._call("cuStreamSynchronize", self.stream)

    def time_ms(self, enqueue: Callable[[], None], n_calls: int) -> list[float]:
        """Milliseconds on the device of each of `n_calls` calls, between two events around it."""
        pairs = [(self._event(), self._event()) for _ in range(n_calls)]
        for start, end in pairs:
            self._call("cuEventRecord", start, self.stream)
            enqueue()
            self._call("cuEventRecord", end, self.stream)
        self.wait()
        times = [self._elapsed_ms(start, end) for start, end in pairs]
        for event in (event for pair in pairs for event in pair):
            self._call("cuEventDestroy_v2", event)
        return times

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), number, self._device)
        return value.value

    def _event(self) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), 0)
        return event

    def _elapsed_ms(self, start: ctypes.c_void_p, end: ctypes.c_void_p) -> float:
        ms = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(ms), start, end)
        return ms.value

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise BuilderError(f"{function} failed with CUDA error {status}", "nvidia-smi")


class EngineRunner:
    """An engine on a GPU. Input "images" uint8 [n, 3, h, w]; memory for the largest batch is taken once."""

    def __init__(self, trt: Any, plan: bytes, cuda: Cuda) -> None:
        """Raises BuilderError when TensorRT does not load the engine. The bytes are executed: take them from build_or_load only."""
        self._trt, self._log, self._cuda = trt, new_log(trt), cuda
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            reason = "; ".join(logged_errors(self._log)) or "no reason given"
            raise BuilderError(f"{trt.__name__} {trt.__version__} does not load the engine: {reason}")
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._dtypes = {name: np.dtype(DTYPES[self._engine.get_tensor_dtype(name).name]) for name in names}
        smallest, _, largest = (tuple(shape) for shape in self._engine.get_tensor_profile_shape(INPUT, 0))
        self.smallest_batch, self.largest_batch, self.image_shape = smallest[0], largest[0], largest[1:]
        self._set_shape(largest)
        self._memory = {name: cuda.allocate(int(np.prod(self._shape(name))) * self._dtypes[name].itemsize) for name in names}
        for name, address in self._memory.items():
            self._context.set_tensor_address(name, address)

    def run(self, images: Any) -> dict[str, Any]:
        """Outputs by name for any number of images; they are cut into batches, and one that is too small is filled up."""
        self._check_type(images)
        parts = []
        for start in range(0, len(images), self.largest_batch):
            part = images[start : start + self.largest_batch]
            filler = np.zeros((max(self.smallest_batch - len(part), 0), *part.shape[1:]), part.dtype)
            parts.append({name: value[: len(part)] for name, value in self._run(np.concatenate([part, filler])).items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def time_ms(self, images: Any, n_warm_up: int = N_WARM_UP, n_calls: int = 100) -> list[float]:
        """Milliseconds of each call for one batch that is already on the device; copies are not counted."""
        self._check_type(images)
        if not self.smallest_batch <= len(images) <= self.largest_batch:
            raise BuilderError(f"a batch of {len(images)} is outside {self.smallest_batch} ... {self.largest_batch} of the engine")
        self._run(images)
        for _ in range(n_warm_up):
            self._enqueue()
        return self._cuda.time_ms(self._enqueue, n_calls)

    def kernels(self) -> list[Kernel]:
        """What the engine tells of its kernels; [] where it cannot."""
        with contextlib.suppress(AttributeError, ValueError):
            inspector = self._engine.create_engine_inspector()
            return inspector_kernels(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))
        return []

    def _run(self, batch: Any) -> dict[str, Any]:
        self._set_shape(batch.shape)
        self._cuda.upload(self._memory[INPUT], np.ascontiguousarray(batch))
        self._enqueue()
        outputs = {name: np.empty(self._shape(name), self._dtypes[name]) for name in self._memory if name != INPUT}
        for name, array in outputs.items():
            self._cuda.download(array, self._memory[name])
        return outputs

    def _check_type(self, images: Any) -> None:
        if images.dtype != self._dtypes[INPUT]:
            raise BuilderError(f"the engine takes {INPUT} as {self._dtypes[INPUT]}, not {images.dtype}")

    def _set_shape(self, shape: Sequence[int]) -> None:
        if not self._context.set_input_shape(INPUT, tuple(shape)):
            raise BuilderError(f"the engine does not take images of shape {tuple(shape)}")

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._context.get_tensor_shape(name))

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._cuda.stream.value or 0):
            raise BuilderError(f"the engine did not start: {'; '.join(logged_errors(self._log)) or 'no reason given'}")


def read_safetensors(path: Path) -> dict[str, Any]:
    """All arrays of a safetensors file. Raises BuilderError when it is none."""
    try:
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:start])
        return {name: _stored_array(content, start, entry) for name, entry in entries.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuilderError(f"'{path}' is not a readable safetensors file: {error!r}") from error


def _stored_array(content: bytes, start: int, entry: dict[str, Any]) -> Any:
    first, last = entry["data_offsets"]
    return np.frombuffer(content[start + first : start + last], STORED_DTYPES[entry["dtype"]]).reshape(entry["shape"])


def compare(logits: Any, codes: Any, frac: int) -> dict[str, Any]:
    """Logits against the codes they must be, code = logit * 2^frac: how many differ, and by how much at most."""
    if logits.shape != codes.shape:
        raise BuilderError(f"the engine gives logits of shape {logits.shape}, the samples hold {codes.shape}")
    distance = np.abs(np.ldexp(logits.astype(np.float64), frac) - codes)
    differing = ~(distance == 0)  # not a number differs too
    largest = float(distance.max(initial=0)) if np.isfinite(distance).all() else "not finite"
    return {"images": len(codes), "codes": codes.size, "differing": int(differing.sum()), "largest_difference": largest}


def check(options: argparse.Namespace, say: Callable[[str], Any]) -> tuple[dict[str, Any], int]:
    """Parse and build without a device and without writing a file: possible with TensorRT-RTX only. The report and the exit code."""
    result = build(find_tensorrt(("tensorrt_rtx",)), options.model, batches=_batches(options.batch), targets=options.targets)
    report = {**asdict(result), "engine": None, "engine_bytes": len(result.engine or b""), "int8": result.int8 and asdict(result.int8)}
    for text in result.errors + result.warnings:
        say(text)
    if result.engine is not None:
        say(f"{result.flavour} {result.version} builds it; {describe(result.int8)}; not run on a device")
    return report, 0 if result.engine is not None else 1


def verify(options: argparse.Namespace, say: Callable[[str], Any], cuda: Cuda) -> tuple[dict[str, Any], int]:
    """Build or load, run the golden samples, time. The report and the exit code."""
    trt = find_tensorrt()
    wanted = conditions(trt, options.model, cuda.gpu, cuda.compute_capability, _batches(options.batch))
    engine = build_or_load(trt, options.model, wanted, targets=options.targets, say=say)
    runner = EngineRunner(trt, engine.plan, cuda)
    int8 = _counts(engine, runner)
    report: dict[str, Any] = {**asdict(wanted), "built": engine.is_new, "int8": int8 and asdict(int8), "samples": None, "time": None}
    say(f"{trt.__name__} {trt.__version__} on {cuda.gpu} ({cuda.compute_capability}): {describe(int8)}")
    if options.samples is not None:
        samples = read_safetensors(options.samples)
        report["samples"] = found = compare(runner.run(samples[INPUT])[OUTPUT], _codes(samples, options.samples), _logits_frac(options))
        say("{differing} of {codes} logits differ on {images} golden images, by at most {largest_difference} codes".format(**found))
    if options.time:
        report["time"] = found = _time(runner, options.batch or 1, options.time)
        say("{median_ms:.4f} ms median, {p95_ms:.4f} ms 95th percentile of {calls} calls, batch {batch}, without copies".format(**found))
    return report, int(bool(report["samples"] and report["samples"]["differing"]))


def describe(int8: Int8Summary | None) -> str:
    """The counts in words."""
    if int8 is None or not int8.n_total:
        return "this TensorRT shows no table of kernels, so int8 is not confirmed"
    rest = f" (not: {', '.join(int8.in_float)})" if int8.in_float else ""
    return f"{int8.n_int8} of {int8.n_total} convolutions and gemms int8{rest}"


def _counts(engine: Engine, runner: EngineRunner) -> Int8Summary | None:
    """From the log of the build, or else from the engine itself."""
    if engine.int8 is not None:
        return engine.int8
    table = runner.kernels()
    return int8_summary(table) if table else None


def _batches(largest: int | None) -> tuple[int, int, int] | None:
    return None if largest is None else (1, largest, largest)


def _codes(samples: dict[str, Any], path: Path) -> Any:
    found = [codes for name, codes in samples.items() if name.startswith("layer:")]
    if len(found) != 1 or INPUT not in samples:
        raise BuilderError(f"'{path}' must hold '{INPUT}' and one 'layer:...', the codes of the logits, and holds {sorted(samples)}")
    return found[0]


def _logits_frac(options: argparse.Namespace) -> int:
    """Fraction of the logits: from the command line or from export.json beside the model."""
    if options.logits_frac is not None:
        return int(options.logits_frac)
    path = options.model.with_name("export.json")
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["logits_frac"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuilderError(f"the fraction of the logits is not known: '{path}' does not tell 'logits_frac'", "--logits-frac N") from error


def _time(runner: EngineRunner, batch: int, n_calls: int) -> dict[str, Any]:
    batch = min(max(batch, runner.smallest_batch), runner.largest_batch)
    times = sorted(runner.time_ms(np.zeros((batch, *runner.image_shape), np.uint8), n_calls=n_calls))
    last = times[min(len(times) * 95 // 100, len(times) - 1)]
    return {"batch": batch, "calls": n_calls, "warm_up": N_WARM_UP, "median_ms": median(times), "p95_ms": last}


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    here = Path(sys.argv[0]).resolve().parent
    parser = argparse.ArgumentParser(description="Build the TensorRT engine of an exported model, run its golden samples, time it.")
    parser.add_argument("model", nargs="?", type=Path, default=here / "model.onnx", help="ONNX file; default: model.onnx beside the script")
    parser.add_argument("--samples", type=Path, help="images and codes of logits; default: samples.safetensors beside the model, if there")
    parser.add_argument("--logits-frac", type=int, help="logit = code * 2^-N; default: 'logits_frac' of export.json beside the model")
    parser.add_argument("--batch", type=int, help="build for batches of 1 ... N and time N; default: 1 ... 32, time 1")
    parser.add_argument("--time", type=int, metavar="CALLS", help="time that many calls on the device")
    parser.add_argument("--targets", nargs="+", metavar="SM", help="compute capabilities, such as SM86 SM89 (TensorRT-RTX only)")
    parser.add_argument("--check-only", action="store_true", help="parse and build without a GPU; writes nothing (TensorRT-RTX only)")
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout, the rest on stderr")
    options = parser.parse_args(arguments)
    samples = options.model.with_name("samples.safetensors")
    options.samples = options.samples or (samples if samples.is_file() else None)
    return options


def main(arguments: Sequence[str] | None = None, open_cuda: Callable[[], Cuda] = Cuda.open) -> int:
    """The command line. Exit code 0: equal (or builds); 1: differs (or is refused); 2: it could not be done."""
    options = _arguments(arguments)
    say = partial(print, file=sys.stderr if options.json else sys.stdout)
    try:
        report, code = check(options, say) if options.check_only else verify(options, say, open_cuda())
    except BuilderError as error:
        print(f"error: {error.message}", *([f"  {error.hint}"] if error.hint else []), sep="\n", file=sys.stderr)
        report, code = {"error": error.message, "hint": error.hint}, 2
    if options.json:
        print(json.dumps(report))
    return code


if __name__ == "__main__":
    sys.exit(main())
