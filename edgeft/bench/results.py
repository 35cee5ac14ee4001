"""BenchReport: one row for each artifact, backend, number of threads and batch; as JSON values, as CSV, and judged by a gate."""

import csv
import io
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from edgeft.bench import Form
from edgeft.bench.machine import Machine
from edgeft.bench.numbers import Cost, Reliability, mean_interval
from edgeft.bench.timing import Latency
from edgeft.report import ModelResult, SplitResult

SCHEMA = 1
Status = Literal["timed", "missing", "differs"]
"""missing: not available or not exported, and `problem` says why; differs: not equal to the interpreter, and therefore not timed."""


@dataclass(frozen=True)
class Scored:
    """Accuracy of an artifact, where it was taken from, and its reliability by kind of split where its logits were seen."""

    result: ModelResult
    source: str
    reliability: dict[str, Reliability] = field(default_factory=dict)

    @property
    def id(self) -> SplitResult | None:
        """On the ID test split."""
        return self.result.split("id")

    @property
    def mean_ood_interval(self) -> tuple[float, float] | None:
        """95 % interval of mean OOD; None where there is no OOD split."""
        return mean_interval(self.result)


@dataclass(frozen=True)
class Row:
    """One artifact in one backend. Speeds are how many times as fast it is as float32 and as static int8 in ONNX Runtime.

    `in_float` names what computes in float in a model that should not, None in a float32 model; `peak_bytes` is of a fresh process.
    """

    run: str
    backend: str
    label: str
    form: Form
    digest: str
    threads: int
    batch: int
    status: Status = "timed"
    problem: str = ""
    runtime: str = ""
    latency: Latency | None = None
    speed_to_float: float | None = None
    speed_to_static: float | None = None
    file_bytes: int | None = None
    peak_bytes: int | None = None
    in_float: tuple[str, ...] | None = None
    n_verified: int | None = None
    scored: Scored | None = None
    not_scored: str = ""
    id_cost: Cost | None = None
    ood_cost: Cost | None = None
    front: tuple[str, ...] = ()

    @property
    def images_per_s(self) -> float | None:
        """Throughput at the median latency."""
        return None if self.latency is None else 1000 * self.batch / self.latency.median_ms

    @property
    def fell_back(self) -> bool:
        """Whether an 8-bit model computes something in float."""
        return bool(self.in_float)


@dataclass(frozen=True)
class RunInfo:
    """What the report says about a run beside its rows. `formats` are (layer, fractions of the weights, fraction of the output).

    `peers` says what the float32 and static int8 files of ONNX Runtime were made from and how equal they are.
    """

    name: str
    path: str
    digest: str
    recipe: dict[str, str]
    classes: int
    float_result: ModelResult | None
    formats: tuple[tuple[str, tuple[int, ...], int | None], ...]
    saturation: dict[str, Any] | None
    peers: str


@dataclass(frozen=True)
class BenchReport:
    """All rows, and what is needed to judge them. `failures` are sentences: what differs, and what the gate does not let through."""

    rows: tuple[Row, ...]
    runs: tuple[RunInfo, ...]
    machine: Machine
    versions: dict[str, str]
    date: str
    n_rounds: int
    n_calls: int
    load_after: float
    max_drop: float | None
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether everything that was timed equals the interpreter, and the gate, where there is one, lets it through."""
        return not self.failures

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Threads and batches that were measured, in order."""
        return list(dict.fromkeys((row.threads, row.batch) for row in self.rows if row.status == "timed"))

    @property
    def split_labels(self) -> list[str]:
        """Labels of all test splits, ID first."""
        return list(dict.fromkeys(split.label for row in self.rows if row.scored for split in row.scored.result.splits))

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values; shares are fractions, costs are points."""
        return {
            "schema": SCHEMA, "passed": self.passed, "failures": list(self.failures), "max_drop": self.max_drop, "date": self.date,
            "machine": asdict(self.machine), "load_after": self.load_after, "versions": self.versions,
            "rounds": self.n_rounds, "calls": self.n_calls,
            "runs": [asdict(run) for run in self.runs],
            "rows": [flat(row, self.split_labels) | _nested(row) for row in self.rows],
        }  # fmt: skip

    def to_csv(self) -> str:
        """The rows, one line each."""
        lines = [flat(row, self.split_labels) for row in self.rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return text.getvalue()


def flat(row: Row, labels: list[str]) -> dict[str, Any]:
    """A row as plain values with one key each; `labels` are the splits that get columns."""
    latency, scored = row.latency, row.scored
    found: dict[str, Any] = {
        "run": row.run, "backend": row.backend, "model": row.label, "form": row.form, "runtime": row.runtime, "digest": row.digest,
        "threads": row.threads, "batch": row.batch, "status": row.status, "problem": row.problem,
        "median_ms": latency and latency.median_ms, "p95_ms": latency and latency.p95_ms,
        "n_rounds": latency and latency.n_rounds, "n_calls": latency and latency.n_calls, "images_per_s": row.images_per_s,
        "speed_to_float": row.speed_to_float, "speed_to_static": row.speed_to_static,
        "file_bytes": row.file_bytes, "peak_bytes": row.peak_bytes,
        "n_in_float": None if row.in_float is None else len(row.in_float), "n_verified": row.n_verified,
    }  # fmt: skip
    spread = (scored and scored.mean_ood_interval) or (None, None)
    for name, change in (("id_cost", row.id_cost), ("ood_cost", row.ood_cost)):
        found |= {name: change and change.points, f"{name}_low": change and change.low, f"{name}_high": change and change.high}
    found |= {"mean_ood": scored and scored.result.mean_ood, "mean_ood_low": spread[0], "mean_ood_high": spread[1]}
    found |= {"accuracy_from": scored.source if scored else row.not_scored, "front": " ".join(row.front)}
    for label in labels:
        split = scored and scored.result.split(label)
        low, high = split.interval if split else (None, None)
        found |= {f"{label} n": split and split.n, f"{label} top1": split and split.top1, f"{label} low": low, f"{label} high": high}
    return found


def _nested(row: Row) -> dict[str, Any]:
    reliability = row.scored.reliability if row.scored else {}
    return {
        "in_float": None if row.in_float is None else list(row.in_float),
        "reliability": {kind: [list(each) for each in found.bins] for kind, found in reliability.items()},
    }


def failures(rows: list[Row], max_drop: float | None) -> list[str]:
    """What differs from the interpreter; and which fixed-point model loses more than `max_drop` points to float, ID or mean OOD.

    A gate that has nothing to compare lets nothing through.
    """
    found = [f"{row.label} of '{row.run}': {row.problem}" for row in rows if row.status == "differs"]
    if max_drop is None:
        return list(dict.fromkeys(found))
    judged = {(row.run, row.backend): row for row in rows if row.form == "fixed" and row.status == "timed"}
    runs = dict.fromkeys(row.run for row in rows)
    found += [f"the gate of {max_drop:g} points has no fixed-point model of '{run}' to judge" for run in runs if not _has(judged, run)]
    for row in judged.values():
        found += _dropped(row, max_drop)
    return list(dict.fromkeys(found))


def _has(judged: dict[tuple[str, str], Row], run: str) -> bool:
    return any(name == run for name, _ in judged)


def _dropped(row: Row, max_drop: float) -> list[str]:
    name = f"{row.label} of '{row.run}'"
    if row.id_cost is None:
        return [f"{name}: its accuracy against the float model is not known, so the gate of {max_drop:g} points cannot pass it"]
    costs = {"ID": row.id_cost, "mean OOD": row.ood_cost}
    return [
        f"{name}: {kind} accuracy is {-change.points:.2f} points below float, more than {max_drop:g}"
        for kind, change in costs.items()
        if change is not None and -change.points > max_drop + 1e-9
    ]
