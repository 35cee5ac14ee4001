"""Suite targets: every export target on nets of realistic size, code for code, and what TensorRT's builder makes of the files."""

import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.nets import Case, fixed_point, random_classifier
from benchmarks.record import Machine, write
from edgeft.artifact import Artifact, write_artifact
from edgeft.errors import VerificationError
from edgeft.export import TARGETS, ExportResult, Runtime
from edgeft.export.c_build import find_compiler
from edgeft.export.c_runner import CRunner
from edgeft.export.inputs import hard_inputs, random_images
from edgeft.export.verify import golden
from edgeft.graph import IntegerGraph
from edgeft.progress import Progress
from edgeft.quant.lower import lower
from edgeft.verifying import Checked, check

SUITE = "targets"
N_GOLDEN = 16
COLUMNS = ("net", "trained as", "target", "runtime", "differing codes", "of", "ties", "int8 layers", "fused additions")


@dataclass(frozen=True)
class Form:
    """How a net is quantized, and where it is exported to."""

    profile: Literal["u8", "s8"]
    residual: Literal["branch", "wide"]
    targets: tuple[str, ...]

    @property
    def label(self) -> str:
        """As tables show it."""
        return f"{self.profile}, {self.residual}"


FORMS = (Form("u8", "branch", ("onnx", "onnx-int", "trt", "c")), Form("s8", "wide", ("onnx-int", "trt", "c")))
INSTRUCTIONS = {"x86_64": (("-mavx2",), ("-DEDGEFT_PORTABLE",))}
"""What C bundles are compiled for besides the machine at hand: flags by its architecture."""
CASES = (Case("edgeft_micro", 48, 1), Case("mobilenetv2_100", 64, 1), Case("resnet18", 64, 1), Case("resnet50", 64, 1))


def run_artifact(graph: IntegerGraph, path: Path) -> Artifact:
    """What export needs of a run: the integer network, and golden images, which are random here."""
    images = random_images(graph, np.zeros((0, *graph.tensors[graph.input].shape), np.uint8), N_GOLDEN, seed=7)
    classes = [str(number) for number in range(graph.tensors[graph.output].shape[0])]
    return write_artifact(
        path, kind="quantized", config={}, seed=0, preprocessing={}, classes=classes,
        arrays={"weights.safetensors": dict(graph.constants), "samples.safetensors": golden(graph, images)},
        documents={"graph.json": graph.to_json()},
    )  # fmt: skip


def runtimes(name: str, folder: Path) -> list[Runtime]:
    """What executes an export; C bundles also with older instruction sets and without any."""
    if name != "c":
        found: list[Runtime] = TARGETS.get(name).runtimes(folder)
        return found
    compilers = [find_compiler(more=flags) for flags in (None, *INSTRUCTIONS.get(platform.machine(), ()))]
    bundles = [CRunner(folder, compiler) for compiler in compilers]
    for compiler, bundle in zip(compilers, bundles, strict=True):
        bundle.name = f"c ({compiler.instructions})"
    return [*bundles]


def measure(case: Case, form: Form, *, n: int, only: str | None, progress: Progress) -> list[dict[str, Any]]:
    """Quantize, export, and compare in every runtime; a JSON-able record per target."""
    graph = lower(fixed_point(random_classifier(case), profile=form.profile, residual=form.residual)[0])
    records = []
    with tempfile.TemporaryDirectory() as folder:
        artifact = run_artifact(graph, Path(folder) / "run")
        for name in [each for each in form.targets if only in (None, each)]:
            result: ExportResult = TARGETS.get(name).export(artifact, Path(folder) / name)
            inputs = hard_inputs(result.graph, artifact.samples()["images"], n, seed=0)
            with progress.task(f"{case.label}, {form.label}, {name}", len(inputs.all)) as advance:
                found, ties = check(result.graph, runtimes(name, result.path), inputs.all, advance)
            records.append({
                "net": case.label, "form": form.label, "target": name, "inputs": inputs.summary, "ties": ties,
                "checked": [each.to_json() for each in found], "ahead_of_time": result.summary.get("ahead_of_time"),
            })  # fmt: skip
            _report(found, progress)
    return records


def _report(found: Sequence[Checked], progress: Progress) -> None:
    for each in found:
        progress.line(f"  {each.runner}: {each.line()}")


def rows_of(record: dict[str, Any]) -> list[tuple[str | int, ...]]:
    """A row for each runtime; the kernels that NVIDIA's builder chose stand beside the first one of a TensorRT file."""
    built = record["ahead_of_time"]
    rows: list[tuple[str | int, ...]] = []
    for number, checked in enumerate(record["checked"]):
        differing = sum(layer["differing"] for layer in checked["differing"]) + checked["logits_differ"]
        kernels = ("", "")
        if built and not number:
            kernels = (f"{built['n_int8']} of {built['n_total']}", f"{built['n_fused_adds']} of {built['n_adds']}")
        where = (record["net"], record["form"], record["target"], checked["runner"])
        rows.append((*where, differing, checked["codes"], record["ties"], *kernels))
    return rows


def run(cases: Sequence[Case], out: Path, *, n: int, progress: Progress, only: str | None = None) -> Path:
    """Measure all targets, or one, and write the result file.

    Raises VerificationError where a target differed in the runtime that it is made for.
    """
    machine = Machine.look(1)
    records = [record for case in cases for form in FORMS for record in measure(case, form, n=n, only=only, progress=progress)]
    versions = sorted({record["ahead_of_time"]["version"] for record in records if record["ahead_of_time"]})
    rtx = [
        f"int8 layers: convolutions and gemms with int8 operands in the kernels that TensorRT-RTX {', '.join(versions)} builds ahead of "
        "time, without a device; fused additions: residual additions inside a convolution's kernel. No warning of its parser."
        if versions
        else "TensorRT-RTX was not installed.",
        "trt (in ONNX Runtime): node by node, without optimizations; it has not run on TensorRT.",
    ]
    notes = [
        f"{n} images for every file: {records[0]['inputs']}; every tensor and the logits are compared with the interpreter. Ties are sums "
        "that lie exactly between two codes.",
        "Random weights; batch-norm statistics and formats from random images. The file trt of a net in profile u8 is the converted one.",
        *(rtx if only in (None, "trt") else []),
    ]
    title = f"Export target {only}, code for code" if only else "Export targets, code for code"
    file = write(
        out, machine, suite=f"{SUITE}-{only}" if only else SUITE, title=title, columns=COLUMNS,
        rows=[row for each in records for row in rows_of(each)], notes=notes,
        options={"n": n, "seed": 0, "forms": [form.label for form in FORMS]}, n={"images": n}, measurements=records,
    )  # fmt: skip
    wrong = [f"{r['net']}: {r['target']}" for r in records if not r["checked"][0]["exact"]]
    if wrong:
        raise VerificationError(f"not exact in the runtime that the target is made for: {', '.join(wrong)}")
    return file
