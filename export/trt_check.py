"""Let NVIDIA's own parser and ahead-of-time builder judge an exported file, without a GPU.

Runs build_engine.py, the script that is shipped beside the export, in a child process: TensorRT can kill the process that it runs in.
What counts against a file is what the parser says at WARNING while it reads it, errors, and the table of kernels. A file in order gives no
row above INFO at all (TensorRT-RTX 1.7.1: a banner and memory figures at INFO, the rest at VERBOSE).
"""

import ast
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from edgeft.errors import MissingExtraError, UnsupportedError
from edgeft.export import trt_builder, trt_runner

PACKAGE = "tensorrt_rtx"
SCRIPT = "build_engine.py"
TIMEOUT_S = 1800


@dataclass(frozen=True)
class AheadOfTime:
    """What the builder made of a file: `n_int8` of `n_total` convolutions and gemms, the size of the engine, the table of kernels.

    `n_fused_adds` of `n_adds` residual additions are inside the kernel of a convolution.
    """

    version: str
    targets: tuple[str, ...]
    n_int8: int
    n_total: int
    n_fused_adds: int
    n_adds: int
    engine_bytes: int
    kernels: tuple[trt_builder.Kernel, ...]

    @property
    def line(self) -> str:
        """What may be claimed."""
        return (
            f"parsed and built ahead of time by TensorRT-RTX {self.version} for {', '.join(self.targets)}; "
            f"{self.n_int8} of {self.n_total} convolutions and gemms int8; not run on a device"
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "targets": list(self.targets), "kernels": [asdict(kernel) for kernel in self.kernels]}


def available() -> bool:
    """Whether the check can be made: the extra 'trt-check' is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def ahead_of_time(path: Path, targets: Sequence[str] = ("SM86",)) -> AheadOfTime:
    """Parse and build `path`. Raises UnsupportedError where TensorRT refuses it, warns, dies, or would compute in float."""
    if not available():
        raise MissingExtraError(f"building ahead of time needs the package '{PACKAGE}'", "pip install 'edgeft[trt-check]'")
    report = _report(path, targets)
    name = f"TensorRT-RTX {report.get('version', '')}".rstrip()
    if "error" in report:
        raise UnsupportedError(f"{name} cannot check '{path}': {report['error']}", report["hint"])
    if report["errors"]:
        raise UnsupportedError(f"{name} refuses '{path}': {'; '.join(report['errors'])}")
    if report["warnings"]:
        warnings = "; ".join(dict.fromkeys(report["warnings"]))
        raise UnsupportedError(f"{name} does not take '{path}' as it is written: {warnings}", "what the parser changes is not exact")
    int8 = report["int8"]
    if int8 is None or not int8["n_total"]:
        raise UnsupportedError(f"{name} shows no convolution or gemm in '{path}'")
    if int8["in_float"]:
        names = ", ".join(f"'{each}'" for each in int8["in_float"])
        raise UnsupportedError(f"{name} would run {names} in float", "edgeft.export.trt_lint names the cause, where it is known")
    table = tuple(trt_builder.Kernel(**row) for row in report["kernels"])
    fused, adds = _residual_adds(path, table)
    version, engine_bytes = report["version"], report["engine_bytes"]
    return AheadOfTime(version, tuple(targets), int8["n_int8"], int8["n_total"], fused, adds, engine_bytes, table)


def script_text() -> str:
    """The text of build_engine.py: trt_builder.py, then trt_runner.py without what only the package needs (its import of the first)."""
    first, second = (Path(str(module.__file__)).read_text(encoding="utf-8") for module in (trt_builder, trt_runner))
    lines = second.splitlines(keepends=True)
    for node in ast.parse(second).body:
        if isinstance(node, ast.ImportFrom) and node.module in ("__future__", trt_builder.__name__):
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    return first + "\n" + "".join(lines)


def _report(path: Path, targets: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / SCRIPT
        script.write_text(script_text(), encoding="utf-8")
        command = [sys.executable, str(script), str(path), "--check-only", "--json", "--targets", *targets]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise UnsupportedError(f"TensorRT's builder has not finished '{path}' in {TIMEOUT_S} s") from error
    if done.returncode < 0:
        number = -done.returncode
        raise UnsupportedError(
            f"TensorRT's builder died on '{path}' with signal {number} ({signal.strsignal(number)})",
            "known cause: a scale that is no constant of the file",
        )
    lines = done.stdout.splitlines()
    try:
        report: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        last = (done.stderr.splitlines() or ["no message"])[-1]
        raise UnsupportedError(f"TensorRT's builder ended with code {done.returncode} on '{path}': {last}") from error
    return report


def _residual_adds(path: Path, table: Sequence[trt_builder.Kernel]) -> tuple[int, int]:
    """How many additions of two computed tensors are joined with a convolution or gemm, and how many there are."""
    graph = onnx.load(path, load_external_data=False).graph
    constants = {each.name for each in graph.initializer} | {node.output[0] for node in graph.node if node.op_type == "Constant"}
    joined = {name for kernel in table if kernel.type in trt_builder.MATRIX_KERNELS for name in kernel.nodes}
    adds = [node.name for node in graph.node if node.op_type == "Add" and not constants & set(node.input)]
    return len(joined & set(adds)), len(adds)
