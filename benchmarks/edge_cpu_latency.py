"""Latency in the suite edge-cpu: the recorded 8-bit nets of one float net, as exported files, beside its peers in ONNX Runtime.

Apart from accuracy, so that it can be measured again on a machine that does nothing else.
"""

import json
import os
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.edge_cpu_cells import FORMS, Bench, Cell, Records
from benchmarks.latency import onnx_call, openvino_call, time_rounds
from benchmarks.qat import EDGEFT
from edgeft.artifact import Artifact, atomic_write, installed_versions, json_bytes, write_artifact
from edgeft.bench import FLOAT, STATIC
from edgeft.bench.measuring import Plan
from edgeft.bench.opening import Spec, open_model
from edgeft.bench.peers import peers_of
from edgeft.bench.store import PEER_FILES
from edgeft.bench.timing import Call
from edgeft.config import Config
from edgeft.data.loading import subset
from edgeft.data.preprocess import Preprocessing
from edgeft.errors import ConfigError, VerificationError
from edgeft.export import TARGETS
from edgeft.export.openvino_runner import OpenVinoRunner
from edgeft.export.verify import golden
from edgeft.interpret import Interpreter
from edgeft.progress import Progress
from edgeft.runner import Images

LATENCY = "latency"
FP32, PEER = "float", "ORT static"
"""Names of the two peers: as the forms whose accuracy they have."""
ORT, OPENVINO, C = "ONNX Runtime", "OpenVINO", "C"
OURS = tuple(form for form, variant in FORMS.items() if variant.form == EDGEFT)
N_VERIFIED = 8
"""Golden images on which every exported file is compared with the interpreter before it is timed."""


def file_of(store: Records, data: str) -> Path:
    """Where the latency of a data set's nets is recorded."""
    return store.folder / f"{data}-{LATENCY}.json"


def keep(store: Records, cell: Cell, config: Config, bench: Bench, plan: Plan, *, again: bool, progress: Progress) -> None:
    """Measure and record the latency of the float net `cell` in all forms, unless that has been done (and not `again`).

    Raises ConfigError where a form is not recorded yet, VerificationError where an exported file differs from the interpreter.
    """
    tuned = store.find(cell, config)
    nets = {form: found for form in OURS if tuned and (found := store.find(_of(cell, form), FORMS[form].config(config), tuned))}
    if tuned is None or len(nets) != len(OURS):
        lacking = [_of(cell, form).name for form in OURS if form not in nets]
        raise ConfigError(f"latency needs cells that are not recorded: {', '.join(lacking)}", f"--only '{cell.data} {cell.method}'")
    key = {"nets": [found.digest for found in nets.values()], **asdict(plan), "threads": torch.get_num_threads()}
    before = read(store, cell.data)
    if before is None or before["key"] != key or again:
        dataset, _ = bench.images(config)
        p = Preprocessing.from_json(tuned.manifest.preprocessing)
        calibration = subset([dataset.train], p, config.quant.calibration_images, config.seed)
        images = subset(dataset.tests, p, N_VERIFIED, config.seed)
        with tempfile.TemporaryDirectory() as folder:
            calls, sizes = _calls(tuned, nets, calibration, images, Path(folder))
            progress.line(f"time {len(calls)} models, {plan.rounds} rounds of {plan.calls} calls")
            record = {
                "key": key, "versions": installed_versions(), "date": datetime.now(UTC).isoformat(timespec="minutes"),
                "size": p.size, "load": round(os.getloadavg()[0], 2), "kb": sizes,
                "rounds_ms": time_rounds(calls, plan.rounds, plan.calls),
            }  # fmt: skip
        atomic_write(file_of(store, cell.data), json_bytes(record))


def read(store: Records, data: str) -> dict[str, Any] | None:
    """What was recorded, or None."""
    file = file_of(store, data)
    return json.loads(file.read_bytes()) if file.is_file() else None


def _of(cell: Cell, form: str) -> Cell:
    return Cell(cell.data, cell.method, cell.seed, form)


def _calls(
    tuned: Artifact, nets: dict[str, Artifact], calibration: Images, images: Images, folder: Path
) -> tuple[dict[str, Call], dict[str, int]]:
    """What is timed, by "form in runtime", and the kB of its file or constants; each compared with what it should compute."""
    threads, one = torch.get_num_threads(), images[:1]
    peers = peers_of(tuned, folder / "peers", calibration)
    calls, sizes = {}, {}
    for name, backend in ((FP32, FLOAT), (PEER, STATIC)):
        calls[f"{name} in {ORT}"] = open_model(Spec(backend, str(peers.folder), threads)).prepare(one)
        sizes[f"{name} in {ORT}"] = round((peers.folder / PEER_FILES[backend]).stat().st_size / 1000)
    for number, (form, net) in enumerate(nets.items()):
        run = _with_samples(net, images, folder / str(number))
        for runtime, (call, n_bytes) in (in_onnx(run, images, threads) | in_c(run, one)).items():
            calls[f"{form} in {runtime}"] = call
            sizes[f"{form} in {runtime}"] = round(n_bytes / 1000)
    return calls, sizes


def _with_samples(net: Artifact, images: Images, path: Path) -> Artifact:
    """The cell as an artifact that can be exported."""
    about, graph = net.manifest, net.graph()
    return write_artifact(
        path, kind="quantized", config=about.config, seed=about.seed, preprocessing=about.preprocessing, classes=about.classes,
        arrays={"weights.safetensors": dict(graph.constants), "samples.safetensors": golden(graph, images)},
        documents={"graph.json": graph.to_json()},
    )  # fmt: skip


def in_onnx(run: Artifact, images: Images, threads: int) -> dict[str, tuple[Call, int]]:
    """The first image in the exported file in its runtimes, and its bytes. The target verifies it in ONNX Runtime, this in OpenVINO."""
    exported = TARGETS.get("onnx").export(run, run.path / "onnx")
    file = exported.path / exported.summary["file"]
    expected = Interpreter(run.graph()).logits(images)
    differing = int((OpenVinoRunner(file, threads).logits(images) != expected).any(axis=1).sum())
    if differing:
        raise VerificationError(f"the exported file gives other logits in OpenVINO on {differing} of {len(images)} images")
    one, n_bytes = images[:1], file.stat().st_size
    return {ORT: (onnx_call(file, one, threads), n_bytes), OPENVINO: (openvino_call(file, one, threads), n_bytes)}


def in_c(run: Artifact, image: Images) -> dict[str, tuple[Call, int]]:
    """An image in the freestanding bundle, which its target verifies, and the bytes of its constants; nothing without a C compiler."""
    exported = TARGETS.get("c").export(run, run.path / "c")
    if exported.not_run:
        return {}
    return {C: (open_model(Spec("c", str(exported.path), 1)).prepare(image), exported.summary["constant_bytes"])}


def rows_of(data: str, record: dict[str, Any]) -> list[list[str | float]]:
    """Table rows: median and p95 over all calls; ratios are medians over rounds of the ratio of the round's medians."""
    medians = {name: np.median(rounds, axis=1) for name, rounds in record["rounds_ms"].items()}
    rows: list[list[str | float]] = []
    for name, rounds in record["rounds_ms"].items():
        form, _, runtime = name.rpartition(" in ")
        speed, share = (medians[f"{peer} in {ORT}"] for peer in (FP32, PEER))
        rows.append([
            f"{data} {record['size']} px", form, runtime, round(float(np.median(rounds)), 3), round(float(np.percentile(rounds, 95)), 3),
            round(float(np.median(speed / medians[name])), 2), round(float(np.median(medians[name] / share)), 2), record["kb"][name],
        ])  # fmt: skip
    return rows
