"""Suite cortex-m: instructions, flash and RAM of the C bundle on Cortex-M cores, with simple, portable and DSP kernels side by side."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from timm.models import efficientnet, register_model
from torch import nn

from benchmarks.boards import Board, count, need_programs, toolchain
from benchmarks.nets import Case, fixed_point, random_classifier
from benchmarks.packs import TENSORFLOW
from benchmarks.record import Machine, Table, write_tables
from edgeft.artifact import installed_versions
from edgeft.export.c_build import find_compiler
from edgeft.export.c_bundle import write_bundle
from edgeft.export.c_runner import CRunner
from edgeft.export.inputs import random_images
from edgeft.export.verify import verify
from edgeft.graph import Conv, IntegerGraph, Linear
from edgeft.interpret import Interpreter
from edgeft.progress import Progress
from edgeft.quant.lower import lower

SUITE = "cortex-m"
N_GOLDEN = 4
COLUMNS = (
    "net", "core", "kernels", "M instructions", "per multiplication", "of simple", "flash kB", "code kB", "constants kB", "RAM kB",
    "arena kB", "stack kB",
)  # fmt: skip
KERNEL_COLUMNS = ("net", "kernels", "kernel", "M instructions", "share %")
SHOWN_CORE = "cortex-m4"
"""Core of the table by kernel; the result has all of them."""


@register_model
def mobilenetv1_025(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV1 at a quarter of its width, which timm has no name for; `pretrained` is timm's argument."""
    net: nn.Module = efficientnet._gen_mobilenet_v1("mobilenetv1_100", channel_multiplier=0.25, **TENSORFLOW, **kwargs)
    return net


CASES = (Case("edgeft_micro", 48, 1), Case("mobilenetv1_025", 128, 1))


@dataclass(frozen=True)
class Variant:
    """Kernels as tables name them: whether packed weights are exported, and the flags that choose their version."""

    label: str
    fast: bool
    flags: tuple[str, ...]


SIMPLE = "simple"
VARIANTS = (
    Variant(SIMPLE, False, ("-O3",)),
    Variant("packed, portable", True, ("-O3", "-DEDGEFT_PORTABLE")),
    Variant("packed, DSP", True, ("-O3",)),
    Variant("packed, DSP, -O2", True, ("-O2",)),
)
HOST_FLAGS = ("-DEDGEFT_PORTABLE", "-DEDGEFT_DSP")
"""The DSP kernels on the machine at hand."""


def multiplications(graph: IntegerGraph) -> int:
    """Products of convolutions and matrix products, those with zeros at the edges included."""
    layers = [op for op in graph.ops if isinstance(op, Conv | Linear)]
    weights = [graph.constants[op.weight] for op in layers]
    return sum(weight[0].size * prod(graph.tensors[op.output].shape) for op, weight in zip(layers, weights, strict=True))


def measure(case: Case, boards: Sequence[Board], progress: Progress) -> dict[str, Any]:
    """Quantize, export with and without fast kernels, compare, count; a JSON-able record.

    Raises VerificationError when a code differs from the interpreter: of every tensor on this machine, of the logits on a board.
    """
    graph = lower(fixed_point(random_classifier(case))[0])
    images = random_images(graph, np.zeros((0, *graph.tensors[graph.input].shape), np.uint8), N_GOLDEN, seed=7)
    records = []
    with tempfile.TemporaryDirectory() as name:
        folders = {fast: Path(name) / f"{fast}" for fast in (True, False)}
        written = {fast: write_bundle(graph, images, folder, fast=fast) for fast, folder in folders.items()}
        verify(Interpreter(graph), CRunner(folders[True], find_compiler(more=HOST_FLAGS)), images)
        for board in boards:
            for variant in VARIANTS:
                found = count(folders[variant.fast], board, variant.flags)
                arena = written[variant.fast]["arena_bytes"]
                records.append({"core": board.cpu, "kernels": variant.label, "arena_bytes": arena, **asdict(found)})
                progress.line(f"  {board.cpu}, {variant.label}: {found.instructions / 1e6:.1f} M instructions")
    return {"net": case.label, "multiplications": multiplications(graph), "runs": records}


def rows_of(record: dict[str, Any]) -> list[tuple[str | float, ...]]:
    """A row for each core and variant."""
    simple = {run["core"]: run["instructions"] for run in record["runs"] if run["kernels"] == SIMPLE}
    rows: list[tuple[str | float, ...]] = []
    for run in record["runs"]:
        n, code, constants = run["instructions"], run["code_bytes"], run["constant_bytes"]
        memory = (code + constants, code, constants, run["arena_bytes"] + run["stack_bytes"], run["arena_bytes"], run["stack_bytes"])
        rows.append((
            record["net"], run["core"], run["kernels"], round(n / 1e6, 2), round(n / record["multiplications"], 2),
            round(n / simple[run["core"]], 3), *(round(each / 1000, 1) for each in memory),
        ))  # fmt: skip
    return rows


def kernel_rows_of(record: dict[str, Any]) -> list[tuple[str | float, ...]]:
    """A row for each kernel on one core, the largest first."""
    rows: list[tuple[str | float, ...]] = []
    for run in (run for run in record["runs"] if run["core"] == SHOWN_CORE):
        for name, n in sorted(run["by_kernel"].items(), key=lambda each: -each[1]):
            rows.append((record["net"], run["kernels"], name, round(n / 1e6, 3), round(100 * n / run["instructions"], 1)))
    return rows


def tables_of(records: Sequence[dict[str, Any]], programs: str) -> tuple[Table, Table]:
    """Bundles, and kernels on one core."""
    codes = sum(run["codes"] for record in records for run in record["runs"])
    notes = [
        f"Counted by QEMU, one image, {programs}: instructions, not cycles, as QEMU knows no pipeline, wait states or caches. Each program "
        "first counted a loop of known length.",
        f"Before that: 0 of {codes} codes of the logits differ on the boards, and none of any tensor with the DSP kernels' instructions "
        "written in C on this machine.",
        "Flash: code and constants of the library. RAM: arena and measured stack of edgeft_run; the library keeps no data that changes. "
        "Image and logits are the caller's. Weights are random. 'simple' has other weights in memory and nothing fused.",
        "-O3, as the bundle's Makefile has it, unless another level is named. Cortex-M55 runs the DSP kernels; none uses Helium.",
    ]  # fmt: skip
    own = "Instructions of each kernel without those that it calls; the rest of 100 % is the run function itself and the counting."
    rows, kernel_rows = ([row for each in records for row in make(each)] for make in (rows_of, kernel_rows_of))
    return (
        Table("bundles", "The C bundle on Cortex-M", COLUMNS, rows, notes),
        Table("kernels", f"Kernels of the C bundle on {SHOWN_CORE}", KERNEL_COLUMNS, kernel_rows, [own]),
    )


def run(cases: Sequence[Case], out: Path, *, boards: Sequence[Board], progress: Progress) -> Path:
    """Count for each net and core, and write the result file."""
    need_programs()
    machine, records = Machine.look(1), []
    for case in cases:
        progress.line(f"{SUITE}: {case.label}")
        records.append(measure(case, boards, progress))
    options = {"cores": [board.cpu for board in boards], "seed": 0}
    return write_tables(
        out, machine, suite=SUITE, tables=tables_of(records, toolchain()), plot=None, options=options, n={"images": N_GOLDEN},
        measurements=records, versions=installed_versions(),
    )  # fmt: skip
