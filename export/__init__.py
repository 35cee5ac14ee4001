"""Export targets: what turns a quantized artifact into something a runtime executes, and the registry of them."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgeft import VerbModule
from edgeft.artifact import Artifact
from edgeft.graph import IntegerGraph
from edgeft.registry import Entry, Registry
from edgeft.runner import LayerRunner

if TYPE_CHECKING:
    from edgeft.export.ort_runner import Fusion


@dataclass(frozen=True)
class ExportResult:
    """What an export made: `path` is its directory, `summary` is for machines, `lines` are for people.

    `graph` is the network in it: the artifact's, or, where it is `converted`, one with other integers than the run was measured with.
    `not_run` says why it was written but cannot be run on this machine.
    """

    target: str
    path: Path
    graph: IntegerGraph
    summary: dict[str, Any]
    lines: tuple[str, ...]
    converted: bool = False
    not_run: str = ""


class Runtime(LayerRunner, Protocol):
    """An exported file in a runtime: a LayerRunner that says what runs it ("ONNX Runtime 1.32.0, CPU") and how."""

    runtime: str

    def executes(self) -> "Fusion":
        """The operators that are executed, and the names of the file's nodes that compute in float."""
        ...


class ExportTarget(Protocol):
    """One way to run a fixed-point model outside PyTorch."""

    def export(self, artifact: Artifact, out: Path) -> ExportResult:
        """Write the model under `out` and verify it on the artifact's golden samples.

        Raises UnsupportedError when the target cannot reproduce the graph and VerificationError when it did not.
        """
        ...

    def load(self, out: Path, threads: int | None = None) -> LayerRunner:
        """Open what `export` wrote under `out`. Raises ArtifactError when it is not there."""
        ...

    def runtimes(self, out: Path) -> list[Runtime]:
        """The file in every runtime that is installed here and reproduces it, the one that `load` opens first."""
        ...


TARGETS = Registry(
    "export target",
    Entry("c", "freestanding C99 bundle: no libc, no allocation, one arena", "edgeft.export.c_bundle:TARGET"),
    Entry("onnx", "QDQ ONNX for ONNX Runtime, every layer fused to an 8-bit operator", "edgeft.export.onnx_qdq:TARGET"),
    Entry("onnx-int", "integer-only ONNX: 8-bit products, shifts and clips, as a proof; slow", "edgeft.export.onnx_int:TARGET"),
    Entry("trt", "int8 Q/DQ ONNX for TensorRT and TensorRT-RTX, with the script that builds the engine", "edgeft.export.trt_qdq:TARGET"),
)

sys.modules[__name__].__class__ = VerbModule  # edgeft.export(run, targets) is the verb, edgeft.export.TARGETS the package
