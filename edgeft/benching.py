"""bench(): runs in every backend, side by side: latency, memory, size, accuracy in and out of distribution, and what to make of it."""

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgeft.artifact import Artifact, atomic_write, json_bytes
from edgeft.bench import FLOAT as PEER_FLOAT
from edgeft.bench import STATIC
from edgeft.bench.candidates import Candidate, Run, backends_of, candidates_of, runs_of
from edgeft.bench.machine import Machine
from edgeft.bench.measuring import Expected, Plan, measure
from edgeft.bench.numbers import front
from edgeft.bench.opening import open_model
from edgeft.bench.page import page
from edgeft.bench.plots import write_plots
from edgeft.bench.results import BenchReport, Row, RunInfo, Scored, failures
from edgeft.bench.scoring import cost, read_score, scored_by
from edgeft.bench.store import Store, versions
from edgeft.bench.text import table
from edgeft.data.loading import ImageCache
from edgeft.errors import ConfigError
from edgeft.exporting import FLOAT
from edgeft.graph import Conv, Linear
from edgeft.progress import Progress
from edgeft.report import ModelResult

SEEN = (PEER_FLOAT, STATIC, "onnx")
"""Backends whose probabilities are looked at: the other runtimes were compared with the same interpreter."""
OUT = Path("bench")
N_ROUNDS, N_CALLS = 10, 20
JSON, CSV, TEXT, PAGE = "results.json", "results.csv", "results.txt", "report.html"


def bench(
    paths: Sequence[Path],
    *,
    backends: Sequence[str] = (),
    threads: Sequence[int] = (1,),
    batches: Sequence[int] = (1,),
    rounds: int = N_ROUNDS,
    calls: int = N_CALLS,
    out: Path = OUT,
    max_drop: float | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure runs in backends and write the report into `out`: results.txt, .json, .csv, report.html and plots.

    Each fixed-point model is compared with the interpreter first, and not timed where it differs. A backend that is not available or
    a run that is not exported is a row that says so. `rounds` of `calls` calls each are interleaved over all models with the same
    threads and batch; they are kept in `out`/records, so that the same call goes on after an interruption. With `max_drop`, the report
    has not passed when a fixed-point model is more points below float in ID or in mean OOD accuracy. Raises ConfigError for an unknown
    backend and numbers below 1, ArtifactError for a damaged run.
    """
    progress = progress or Progress(False)
    _check(paths, threads=threads, batches=batches, rounds=[rounds], calls=[calls])
    runs = runs_of(paths, progress)
    chosen = backends_of(backends, runs)
    machine = Machine.look(max(threads))
    store = Store(out / "records", machine)
    candidates: list[Candidate] = []
    missing: list[Row] = []
    origins = {}
    for run in runs:
        progress.line(f"open {len(chosen)} backends of '{run.name}'")
        found, lacking, origins[run.name] = candidates_of(run, chosen, out)
        candidates, missing = candidates + found, missing + lacking
    scores = _scores(runs, candidates, store, progress)
    expected, plan = Expected(), Plan(rounds, calls)
    measured = [
        row for n in threads for batch in batches for row in measure(candidates, n, batch, plan, store, expected, progress)
    ]  # fmt: skip
    rows = _with_fronts([*(_with_accuracy(row, runs, scores) for row in measured), *missing])
    report = BenchReport(
        tuple(rows), tuple(_info(run, origins[run.name]) for run in runs), machine, versions(),
        datetime.now(UTC).isoformat(timespec="minutes"), rounds, calls, round(os.getloadavg()[0], 2), max_drop,
        tuple(failures(rows, max_drop)),
    )  # fmt: skip
    write(report, out, progress)
    return report


def write(report: BenchReport, out: Path, progress: Progress) -> None:
    """All files of a report."""
    progress.line(f"write the report into '{out}'")
    atomic_write(out / TEXT, (table(report) + "\n").encode())
    atomic_write(out / JSON, json_bytes(report.to_json()))
    atomic_write(out / CSV, report.to_csv().encode())
    write_plots(report, out / "plots")
    atomic_write(out / PAGE, page(report).encode())


def _check(paths: Sequence[Path], **numbers: Sequence[int]) -> None:
    if not paths:
        raise ConfigError("no run was given to bench", "edgeft bench RUN")
    for name, values in numbers.items():
        if not values or min(values) < 1:
            raise ConfigError(f"{name}: {', '.join(map(str, values)) or 'nothing'} was given; whole numbers from 1 are allowed")


def _scores(runs: Sequence[Run], candidates: Sequence[Candidate], store: Store, progress: Progress) -> dict[tuple[str, str], Scored | str]:
    """Accuracy by run and backend, or why it is not known."""
    found: dict[tuple[str, str], Scored | str] = {}
    for run in runs:
        cache = ImageCache(run.config.data.cache_mb)  # of this run only: they could be many
        for candidate in (one for one in candidates if one.run is run):
            found[run.name, candidate.backend.name] = _score(candidate, cache, store, progress)
    return found


def _score(candidate: Candidate, cache: ImageCache, store: Store, progress: Progress) -> Scored | str:
    """What the artifact's report says; where it says nothing, or where probabilities are wanted too, what is measured now."""
    backend, run = candidate.backend, candidate.run
    reported = _reported(candidate)
    if isinstance(run.dataset, str):
        return reported or f"not measured: {run.dataset}"
    if reported is not None and backend.name not in SEEN:
        return reported
    opened = open_model(candidate.spec(1))
    record = scored_by(opened.runner, run.artifact, run.dataset, cache, store, (candidate.digest, backend.name), progress)
    now = read_score(record, "measured by this bench")
    if reported is None:
        return now
    if _counts(reported.result) != _counts(now.result):
        return f"not known: the {reported.source} says {_counts(reported.result)}, this bench finds {_counts(now.result)} right"
    return Scored(reported.result, reported.source, now.reliability)


def _counts(result: ModelResult) -> dict[str, int]:
    return {split.label: split.correct for split in result.splits}


def _reported(candidate: Candidate) -> Scored | None:
    backend, artifact = candidate.backend, candidate.artifact
    name = FLOAT if backend.name == "torch" else _model_name(artifact) if backend.target else None
    result = artifact.report().model(name) if name else None
    return None if result is None else Scored(result, f"report of the {'export' if backend.target else 'run'} {artifact.digest[:12]}")


def _model_name(export: Artifact) -> str:
    """How an export's report calls the exported model: what it has beside those of the run."""
    document: dict[str, Any] = export.document("export.json")
    names = [result.model for result in export.report().models]
    return next((name for name in names if name.partition(" ")[0] == document["target"]), "")


def _with_accuracy(row: Row, runs: Sequence[Run], scores: dict[tuple[str, str], Scored | str]) -> Row:
    scored = scores[row.run, row.backend]
    if row.status == "differs":
        return row
    if isinstance(scored, str):
        return replace(row, not_scored=scored)
    base = next(run for run in runs if run.name == row.run).artifact.report().model(FLOAT)
    if base is None:
        return replace(row, scored=scored)
    return replace(row, scored=scored, id_cost=cost(base, scored.result, "id"), ood_cost=cost(base, scored.result, "ood"))


def _with_fronts(rows: Sequence[Row]) -> list[Row]:
    """Rows that are on the Pareto front of latency and accuracy among those with the same threads and batch."""
    found = list(rows)
    for kind in ("id", "ood"):
        points = [(index, point) for index, row in enumerate(found) if (point := _point(row, kind))]
        for group in {(found[index].threads, found[index].batch) for index, _ in points}:
            inside = [(index, point) for index, point in points if (found[index].threads, found[index].batch) == group]
            for (index, _), keeps in zip(inside, front([point for _, point in inside]), strict=True):
                if keeps:
                    found[index] = replace(found[index], front=(*found[index].front, kind))
    return found


def _point(row: Row, kind: str) -> tuple[float, float] | None:
    if row.latency is None or row.scored is None:
        return None
    split = row.scored.id
    gain = row.scored.result.mean_ood if kind == "ood" else split.top1 if split else None
    return None if gain is None else (row.latency.median_ms, gain)


def _info(run: Run, origin: str) -> RunInfo:
    artifact, config = run.artifact, run.config
    recipe = {
        "data": config.data.source, "backbone": config.model.backbone, "method": config.train.method, "recipe": config.quant.recipe,
        "profile": config.quant.profile, "format rule": config.quant.format, "shift per": config.quant.granularity,
        "seed": str(config.seed),
    }  # fmt: skip
    saturation = artifact.document("saturation.json") if "saturation.json" in artifact.manifest.files else None
    return RunInfo(
        run.name, str(artifact.path), artifact.digest, recipe, len(artifact.manifest.classes), artifact.report().model(FLOAT),
        _formats(artifact), saturation, origin,
    )  # fmt: skip


def _formats(artifact: Artifact) -> tuple[tuple[str, tuple[int, ...], int | None], ...]:
    """Of each layer with weights: the fractions of its weights, and that of its output where it is 8 bits wide."""
    graph, found = artifact.graph(), []
    for op in graph.ops:
        if isinstance(op, Conv | Linear):
            fmt = graph.format(op.output)
            found.append((op.output, tuple(sorted(set(op.weight_frac))), fmt.frac if fmt.width == 8 else None))
    return tuple(found)
