"""Suite cpu-latency: the C bundle, built by each compiler at hand, against OpenVINO and ONNX Runtime on the same integers."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.latency import Subject, onnx_call, openvino_call, random_subject, time_rounds
from benchmarks.nets import Case
from benchmarks.record import Machine, write
from edgeft.bench.timing import Call
from edgeft.errors import MissingExtraError
from edgeft.export.c_build import find_compiler
from edgeft.export.c_bundle import write_bundle
from edgeft.export.c_runner import CRunner
from edgeft.export.onnx_qdq import build_model
from edgeft.export.openvino_runner import OpenVinoRunner
from edgeft.export.ort_runner import OnnxRunner
from edgeft.export.verify import verify
from edgeft.interpret import Interpreter
from edgeft.progress import Progress
from edgeft.runner import LayerRunner

SUITE = "cpu-latency"
NETS = ("mobilenetv2_100", "mobilenetv1_100", "resnet18", "resnet50")
COMPILERS = ("gcc", "clang")
OPENVINO, ORT = "OpenVINO", "ONNX Runtime"
N_VERIFIED = 8
COLUMNS = ("net", "model", "median ms", "p95 ms", "time against OpenVINO", "arena kB", "kB")


def subject_of(backbone: str, size: int) -> Subject:
    """A net with random weights: time does not depend on them."""
    return random_subject(Case(backbone, size, 1))


def measure(subject: Subject, folder: Path, *, n_rounds: int, n_calls: int) -> dict[str, Any]:
    """Verify every model, then time them in interleaved rounds on one thread; a JSON-able record.

    Raises VerificationError when one differs from the interpreter in a code, MissingExtraError when there is no C compiler.
    """
    reference, images = Interpreter(subject.graph), subject.images[:N_VERIFIED]
    file = folder / "model.onnx"
    file.write_bytes(build_model(subject.graph).SerializeToString())
    summary = write_bundle(subject.graph, images, folder / "c")
    compilers = [find_compiler([name]) for name in COMPILERS if shutil.which(name)]
    if not compilers:
        raise MissingExtraError(f"there is no C compiler here: looked for {', '.join(COMPILERS)}", "apt-get install gcc clang")
    bundles = {f"C, {compiler.text}": CRunner(folder / "c", compiler) for compiler in compilers}
    checked: list[LayerRunner] = [*bundles.values(), OnnxRunner(file, 1)]
    for runner in checked:
        verify(reference, runner, images)
    assert np.array_equal(OpenVinoRunner(file).logits(images), reference.logits(images))
    calls: dict[str, Call] = {name: runner.prepared(images[:1]) for name, runner in bundles.items()}
    calls |= {OPENVINO: openvino_call(file, images[:1], 1), ORT: onnx_call(file, images[:1], 1)}
    rounds = time_rounds(calls, n_rounds, n_calls)
    n_bytes = {**dict.fromkeys(bundles, summary["constant_bytes"]), **dict.fromkeys((OPENVINO, ORT), file.stat().st_size)}
    return {
        "net": subject.label, "origin": subject.origin, "arena_bytes": summary["arena_bytes"],
        "arena_lower_bound": summary["arena_lower_bound"], "rounds_ms": rounds, "bytes": n_bytes,
    }  # fmt: skip


def rows_of(record: dict[str, Any]) -> list[tuple[str | float, ...]]:
    """Table rows of one net; ratios are medians over the rounds of the ratio of medians."""
    medians = {name: np.median(rounds, axis=1) for name, rounds in record["rounds_ms"].items()}
    rows: list[tuple[str | float, ...]] = []
    for name, rounds in record["rounds_ms"].items():
        arena = round(record["arena_bytes"] / 1000) if name.startswith("C,") else "-"
        rows.append((
            record["net"], name, round(float(np.median(rounds)), 3), round(float(np.percentile(rounds, 95)), 3),
            round(float(np.median(medians[name] / medians[OPENVINO])), 3), arena, round(record["bytes"][name] / 1000),
        ))  # fmt: skip
    return rows


def run(nets: Sequence[str], size: int, out: Path, *, n_rounds: int, n_calls: int, progress: Progress) -> Path:
    """Measure each net and write the result file."""
    machine, records = Machine.look(1), []
    for backbone in nets:
        progress.line(f"{SUITE}: {backbone}")
        with tempfile.TemporaryDirectory() as folder:
            records.append(measure(subject_of(backbone, size), Path(folder), n_rounds=n_rounds, n_calls=n_calls))
    notes = [
        f"Batch 1, 1 thread, {n_rounds} interleaved rounds in random order of {n_calls} calls each after {n_calls} untimed ones; the "
        f"ratio is the median over rounds of the ratio within a round. Load at start {machine.load}.",
        f"The same integers in all: every tensor of {N_VERIFIED} images in C and in ONNX Runtime, and the logits in OpenVINO, were first "
        "compared with the interpreter: 0 differing codes. All take the image as bytes.",
        "OpenVINO and ONNX Runtime run edgeft's own ONNX file. Random weights: time does not depend on them. kB: constants of the C "
        "bundle, and the ONNX file.",
    ]  # fmt: skip
    return write(
        out, machine, suite=SUITE, title="Latency of the C bundle", columns=COLUMNS,
        rows=[row for record in records for row in rows_of(record)], notes=notes,
        options={"size": size, "rounds": n_rounds, "calls": n_calls, "nets": list(nets)},
        n={"rounds": n_rounds, "calls": n_rounds * n_calls}, measurements=records,
    )  # fmt: skip
