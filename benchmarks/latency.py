"""Suite ort-latency: the exported ONNX file against float32 and ONNX Runtime's static quantization of the same net, also in OpenVINO."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from benchmarks.nets import Case, fixed_point, random_classifier, random_images
from benchmarks.record import Machine, write
from edgeft.artifact import Artifact
from edgeft.bench.peers import check_float_peer, float_classifier, normalised
from edgeft.bench.peers import float_peer as write_float_peer
from edgeft.bench.timing import Call, one_round, shuffled, warm_up
from edgeft.errors import VerificationError
from edgeft.export.float_onnx import quantize_statically, session
from edgeft.export.onnx_nodes import INPUT
from edgeft.export.onnx_qdq import build_model
from edgeft.export.openvino_runner import OpenVinoRunner, signal_stack_kept
from edgeft.export.ort_runner import OnnxRunner
from edgeft.export.verify import verify
from edgeft.graph import IntegerGraph
from edgeft.interpret import Interpreter
from edgeft.models import Classifier
from edgeft.progress import Progress
from edgeft.quant.lower import lower
from edgeft.quant.rescale import IMAGE_NORM

SUITE = "ort-latency"
OURS, FLOAT, PEER = "edgeft", "fp32", "ORT static int8"
BATCH = 1
N_VERIFIED, N_CALIBRATION = 16, 32
RUNTIMES = ("ONNX Runtime", "OpenVINO")
COLUMNS = ("net", "model", "runtime", "median ms", "p95 ms", "speed against fp32", "time against static int8", "kB")


@dataclass(frozen=True)
class Subject:
    """A net to time, in both forms. `origin` says where its weights come from."""

    label: str
    origin: str
    classifier: Classifier
    graph: IntegerGraph
    images: NDArray[np.uint8]


def random_subject(case: Case) -> Subject:
    """A net with weights that mean nothing: time does not depend on them."""
    classifier = random_classifier(case)
    graph = lower(fixed_point(classifier)[0])
    images = random_images(N_CALIBRATION, case.size, seed=2).transpose(0, 3, 1, 2).copy()
    return Subject(case.label, "random weights and images", classifier, graph, images)


def run_subject(run: Path) -> Subject:
    """The network of a finished run, with its golden images. Raises ArtifactError when it is damaged."""
    artifact = Artifact.load(run)
    classifier = float_classifier(artifact)
    images = artifact.samples()["images"][:N_CALIBRATION]
    backbone, size = artifact.manifest.config["model"]["backbone"], classifier.preprocessing.size
    return Subject(f"{backbone} {size} px", f"run of digest {artifact.digest[:12]}", classifier, artifact.graph(), images)


def measure(subject: Subject, *, n_rounds: int, n_calls: int, threads: int, folder: Path) -> dict[str, Any]:
    """Verify all three models, then time them in interleaved rounds; a JSON-able record with every round's times in ms.

    Raises VerificationError when the exported model differs from the interpreter in a single code, or the float peer from PyTorch.
    """
    files = {name: folder / f"{number}.onnx" for number, name in enumerate((OURS, FLOAT, PEER))}
    files[OURS].write_bytes(build_model(subject.graph).SerializeToString())
    n_verified = verify(Interpreter(subject.graph), OnnxRunner(files[OURS], threads), subject.images[:N_VERIFIED])
    write_float_peer(subject.classifier, files[FLOAT])
    difference = check_float_peer(subject.classifier, files[FLOAT], subject.images[:N_VERIFIED])
    inputs = normalised(subject.classifier, subject.images)
    quantize_statically(files[FLOAT], files[PEER], inputs)
    _verify_in_openvino(subject, files[OURS])
    openers = dict(zip(RUNTIMES, (onnx_call, openvino_call), strict=True))
    calls = {
        f"{name} in {runtime}": openers[runtime](file, subject.images[:BATCH] if name == OURS else inputs[:BATCH], threads)
        for name, file in files.items()
        for runtime in RUNTIMES
    }
    return {
        "net": subject.label, "origin": subject.origin, "normalises": IMAGE_NORM in subject.graph.tensors,
        "verified_images": n_verified, "float_peer_difference": difference,
        "rounds_ms": time_rounds(calls, n_rounds, n_calls), "file_bytes": {name: file.stat().st_size for name, file in files.items()},
    }  # fmt: skip


def _verify_in_openvino(subject: Subject, file: Path) -> None:
    images = subject.images[:N_VERIFIED]
    differing = int((OpenVinoRunner(file).logits(images) != Interpreter(subject.graph).logits(images)).sum())
    if differing:
        raise VerificationError(f"{subject.label}: {differing} logits of the exported file differ in OpenVINO")


def onnx_call(file: Path, batch: NDArray[Any], threads: int) -> Call:
    """One call of a file in ONNX Runtime."""
    opened = session(file, threads)
    feed = {opened.get_inputs()[0].name: batch}
    return lambda: opened.run(None, feed)


def openvino_call(file: Path, batch: NDArray[Any], threads: int) -> Call:
    """One call of a file in OpenVINO."""
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    with signal_stack_kept():
        request = openvino.Core().compile_model(file, "CPU", settings).create_infer_request()
    return lambda: request.infer([batch], share_inputs=True)


def time_rounds(calls: dict[str, Call], n_rounds: int, n_calls: int) -> dict[str, list[list[float]]]:
    """Milliseconds of each call, per name and round; before the first round each is called `n_calls` times, untimed."""
    warm_up(calls, n_calls)
    rounds = [one_round(calls, order, n_calls) for order in shuffled(list(calls), n_rounds)]
    return {name: [each[name] for each in rounds] for name in calls}


def rows_of(record: dict[str, Any]) -> list[tuple[str | float, ...]]:
    """Table rows of one net: median and p95 over all calls; ratios, to the peers in the same runtime, are medians over the rounds."""
    rows: list[tuple[str | float, ...]] = []
    medians = {name: np.median(rounds, axis=1) for name, rounds in record["rounds_ms"].items()}
    for label, rounds in record["rounds_ms"].items():
        name, _, runtime = label.rpartition(" in ")
        median, p95 = float(np.median(rounds)), float(np.percentile(rounds, 95))
        against = [float(np.median(medians[label] / medians[f"{peer} in {runtime}"])) for peer in (FLOAT, PEER)]
        rows.append((
            record["net"], name, runtime, round(median, 3), round(p95, 3), round(1 / against[0], 2), round(against[1], 3),
            round(record["file_bytes"][name] / 1000),
        ))  # fmt: skip
    return rows


def run(subjects: Sequence[Callable[[], Subject]], out: Path, *, n_rounds: int, n_calls: int, threads: int, progress: Progress) -> Path:
    """Measure each net and write the result file."""
    machine, records = Machine.look(threads), []
    for make in subjects:
        subject = make()
        progress.line(f"{SUITE}: {subject.label}")
        with tempfile.TemporaryDirectory() as folder:
            records.append(measure(subject, n_rounds=n_rounds, n_calls=n_calls, threads=threads, folder=Path(folder)))
    origins = "; ".join(f"{record['net']}: {record['origin']}" for record in records)
    n_verified = min(record["verified_images"] for record in records)
    difference = max(record["float_peer_difference"] for record in records)
    notes = [
        f"Batch {BATCH}, {n_rounds} interleaved rounds in random order of {n_calls} calls each after {n_calls} untimed ones; median and "
        "p95 over all calls; ratios are to the peers in the same runtime, medians over rounds of the ratio within a round. Load at start "
        f"{machine.load}.",
        f"Every exported model was first compared with the interpreter: all tensors of {n_verified} images, 0 differing codes, "
        "and its logits in OpenVINO.",
        f"fp32 is the same net with batch norm folded, equal to PyTorch within {difference:.0e} of the largest score.",
        "ORT static int8 is onnxruntime.quantization.quantize_static of it (QDQ, per channel, U8S8, min-max).",
        f"edgeft takes '{INPUT}' as bytes{_normalising(records)}; the other two are given normalised floats and are not charged for that.",
        f"Weights: {origins}; time does not depend on them.",
    ]  # fmt: skip
    return write(
        out, machine, suite=SUITE, title="Latency in ONNX Runtime and OpenVINO", columns=COLUMNS,
        rows=[row for record in records for row in rows_of(record)], notes=notes,
        options={"batch": BATCH, "rounds": n_rounds, "calls": n_calls, "threads": threads, "warm_up_calls": n_calls},
        n={"rounds": n_rounds, "calls": n_rounds * n_calls}, measurements=records,
    )  # fmt: skip


def _normalising(records: Sequence[dict[str, Any]]) -> str:
    """Which nets spend time on normalising the image: those whose mean is neither 1/2 nor 0, which alone fold into the stem."""
    names = [record["net"] for record in records if record["normalises"]]
    return f" and normalises them in a layer of its own ({', '.join(names)})" if names else ""
