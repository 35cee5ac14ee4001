"""The commands on a GPU, as typed: train-quantize in both precisions, killed and resumed, and the export of what came out."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.artifact import Artifact, is_finished
from edgeft.errors import TrainingError
from edgeft.exporting import FIXED_POINT, FLOAT
from edgeft.progress import Progress
from edgeft.report import EvalReport, ModelResult

PRECISIONS = ("fp32", "bf16")
KILL_AT = ("fine-tune/state.safetensors", "qat/state.safetensors")
"""Files under the run's work folder: the run is killed when the first appears, resumed, and killed again when the second does."""
POLL_S = 0.02


def command(out: Path, device: str, *extra: str) -> list[str]:
    """train-quantize with default settings."""
    return [sys.executable, "-m", "edgeft", "train-quantize", "--method", "lpft", "--device", device, "--out", str(out), *extra]


def train(out: Path, device: str, precision: str, sets: tuple[str, ...], progress: Progress) -> dict[str, Any]:
    """One run from start to end; its wall time and accuracies, JSON-able. Raises TrainingError when it fails."""
    progress.line(f"train-quantize, {precision}")
    start = time.monotonic()
    done = subprocess.run(command(out, device, *_flags(precision, sets)), capture_output=True, text=True, check=False)
    wall_s = time.monotonic() - start
    if done.returncode != 0:
        raise TrainingError(f"train-quantize failed with exit code {done.returncode}", done.stderr[-2000:])
    progress.line(f"{done.stdout}\n{wall_s:.0f} s")
    compared = next(line for line in done.stderr.splitlines() if "interpreter = training graph" in line)
    return {"precision": precision, "wall_s": wall_s, "report": Artifact.load(out).report().to_json(), "compared": compared.strip()}


def export(run: Path, progress: Progress) -> dict[str, Any]:
    """Export a run to ONNX, which verifies it on ONNX Runtime's CPU provider; what the command printed."""
    done = subprocess.run(
        [sys.executable, "-m", "edgeft", "export", str(run), "--target", "onnx"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise TrainingError(f"export failed with exit code {done.returncode}", done.stderr[-2000:])
    progress.line(done.stdout)
    return {"printed": done.stdout.splitlines()}


def killed_and_resumed(out: Path, device: str, uninterrupted: Path, sets: tuple[str, ...], progress: Progress) -> dict[str, Any]:
    """Kill (signal 9) in each of KILL_AT, resume to the end, and compare with the run that was left alone; JSON-able."""
    resume: tuple[str, ...] = ()
    kills = []
    for file in KILL_AT:
        process = subprocess.Popen(
            command(out, device, *_flags("fp32", sets), *resume), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not (out / "work" / file).exists() and process.poll() is None:
            time.sleep(POLL_S)
        process.kill()
        process.wait()
        kills.append({"file": file, "unfinished": not is_finished(out)})
        progress.line(f"killed at {file}")
        resume = ("--resume",)
    done = subprocess.run(command(out, device, *_flags("fp32", sets), *resume), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TrainingError(f"--resume failed with exit code {done.returncode}", done.stderr[-2000:])
    ours, theirs = Artifact.load(uninterrupted), Artifact.load(out)
    return {"kills": kills, "differing": differing_integers(ours, theirs), "same_graph": ours.graph().to_json() == theirs.graph().to_json()}


def differing_integers(left: Artifact, right: Artifact) -> dict[str, int]:
    """Weights and biases, in all and differing."""
    a, b = left.graph().constants, right.graph().constants
    return {"of": sum(value.size for value in a.values()), "differing": sum(int(np.count_nonzero(a[key] != b[key])) for key in a)}


def _flags(precision: str, sets: tuple[str, ...]) -> list[str]:
    return [flag for text in (f"train.precision={precision}", *sets) for flag in ("--set", text)]


def rows_of(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Table rows: both precisions, the killed run, the export."""
    label = "edgeft_micro 48 px on shapes"
    rows: list[tuple[str, ...]] = []
    for run in record["runs"]:
        report = EvalReport.from_json(run["report"])
        found = "; ".join(f"{name} {_accuracy(report.model(name))}" for name in (FLOAT, FIXED_POINT))
        rows.append(("train-quantize, ID / mean OOD", label, run["precision"], f"{found}; {run['wall_s']:.0f} s"))
    killed = record["killed"]
    counts, formats = killed["differing"], "equal" if killed["same_graph"] else "differ"
    result = f"{counts['differing']} of {counts['of']:,} weights and biases differ, formats {formats}"
    rows.append((f"kill -9 {len(killed['kills'])} times, --resume", label, "fp32", result))
    exact = next(line.strip() for line in record["export"]["printed"] if "0 differing codes" in line)
    rows.append(("export to ONNX, ONNX Runtime on the CPU", label, "fp32", exact))
    return rows


def _accuracy(result: ModelResult | None) -> str:
    if result is None:
        return "-"
    id_share = next(split.top1 for split in result.splits if split.kind == "id")
    return f"{100 * id_share:.1f} / {100 * (result.mean_ood or 0.0):.1f} %"
