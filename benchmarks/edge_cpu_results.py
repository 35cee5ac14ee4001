"""Tables, notes and plot of the suite edge-cpu out of its recorded cells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import edge_cpu_latency as latency
from benchmarks.edge_cpu_cells import FIRST, FLOAT, FORMS, LEAD, Cell, Records, rate_of
from benchmarks.edge_cpu_notes import about_eight_bit, about_latency, about_methods, missing_cells
from benchmarks.paired import Repeated, repeated_difference, shown
from benchmarks.record import Machine, Table, write_tables
from benchmarks.runs import portable
from edgeft.artifact import Artifact, installed_versions
from edgeft.config import Config
from edgeft.errors import ConfigError
from edgeft.evaluation.calibration import calibration

SUITE = "edge-cpu"
MEAN_OOD = "mean OOD"
ALL = "all complete"
LATENCY_COLUMNS = ("net", "form", "runtime", "median ms", "p95 ms", "speed against fp32", "time against ORT static", "kB")


@dataclass(frozen=True)
class Scored:
    """One cell on the test splits, by split: which images are right, the answered classes, and ECE in percent."""

    cell: Cell
    kinds: dict[str, str]
    images: dict[str, list[str]]
    right: dict[str, NDArray[np.bool_]]
    top: dict[str, NDArray[np.int64]]
    ece: dict[str, float]

    @classmethod
    def of(cls, cell: Cell, artifact: Artifact, splits: dict[str, Any]) -> "Scored":
        """From a cell's scores and what its float net recorded about the test splits."""
        logits = artifact.arrays("logits.safetensors")
        labels = {name: np.array(about["labels"], np.int64) for name, about in splits.items()}
        top = {name: logits[name].argmax(1).astype(np.int64) for name in splits}
        return cls(
            cell, {name: about["kind"] for name, about in splits.items()}, {name: about["images"] for name, about in splits.items()},
            {name: top[name] == labels[name] for name in splits}, top,
            {name: 100 * calibration(logits[name], labels[name]).ece for name in splits},
        )  # fmt: skip

    def names(self, kind: str) -> list[str]:
        """Splits of a kind, "id" or "ood"."""
        return [name for name, found in self.kinds.items() if found == kind]

    @property
    def top1(self) -> dict[str, float]:
        """Percent by split, and in the unweighted mean over the OOD sets."""
        shares = {name: 100 * float(right.mean()) for name, right in self.right.items()}
        return shares | {MEAN_OOD: mean(shares[name] for name in self.names("ood"))}

    def ece_of(self, kind: str) -> float:
        """Mean over the splits of a kind."""
        return mean(self.ece[name] for name in self.names(kind))


Found = Mapping[Cell, Scored]


def read_scores(found: Mapping[Cell, Artifact]) -> dict[Cell, Scored]:
    """Every recorded cell; 8-bit nets were scored on the images of their float net."""
    splits = {cell: artifact.document("splits.json") for cell, artifact in found.items() if cell.form == FLOAT}
    return {cell: Scored.of(cell, artifact, splits[_float_of(cell)]) for cell, artifact in found.items()}


def _float_of(cell: Cell) -> Cell:
    return Cell(cell.data, cell.method, cell.seed)


def _cells(found: Found, data: str, method: str, form: str) -> list[Scored]:
    """One for each seed that is recorded."""
    return [scored for cell, scored in found.items() if (cell.data, cell.method, cell.form) == (data, method, form)]


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


# --- tables ------------------------------------------------------------------------------------------------------------------


def methods_table(data: str, methods: Sequence[str], n_seeds: int, found: Found, notes: Sequence[str]) -> Table:
    """Float nets: ID, each OOD set, mean OOD and ECE, over the seeds."""
    first = next(scored for cell, scored in found.items() if cell.data == data)
    labels = [*first.names("id"), *first.names("ood"), MEAN_OOD]
    rows = []
    for method in methods:
        scored = _cells(found, data, method, FLOAT)
        if scored:
            accuracy = [_spread([one.top1[label] for one in scored]) for label in labels]
            errors = [_spread([one.ece_of(kind) for one in scored]) for kind in ("id", "ood")]
            rows.append([method, _count(len(scored), n_seeds), *accuracy, *errors])
    columns = ["method", "seeds", *(label.upper() if label == "id" else label for label in labels), "ECE ID", "ECE OOD"]
    return Table(f"{_slug(data)}-methods", f"{data}: fine-tuning methods in float", columns, rows, notes)


def quantizers_table(data: str, methods: Sequence[str], n_seeds: int, found: Found, notes: Sequence[str]) -> Table:
    """What each 8-bit form costs against its float net on the same images: the first method, all together, then the other methods.

    All together are the nets that are there in every form.
    """
    measured = [method for method in methods if any(_cells(found, data, method, form) for form in FORMS)]
    own = {cell: scored for cell, scored in found.items() if cell.data == data}
    complete = {cell: one for cell, one in own.items() if all(replace(cell, form=form) in own for form in FORMS)}
    rows = [row for method in measured[:1] for row in _block(method, [method], data, n_seeds, found)]
    if len({cell.method for cell in complete}) > 1:
        rows += _block(ALL, measured, data, n_seeds, complete)
    n_lead = len(rows)
    rows += [row for method in measured[1:] for row in _block(method, [method], data, n_seeds, found)]
    columns = ["method", "form", "seeds", "ID", MEAN_OOD, "ID - float", "OOD - float", "flips %"]
    return Table(f"{_slug(data)}-quantizers", f"{data}: cost of 8 bits", columns, rows, notes, n_lead)


def _block(label: str, methods: Sequence[str], data: str, n_seeds: int, found: Found) -> list[list[str]]:
    """Float and every form of these methods' nets. Differences are between the nets that have both."""
    rows = []
    for form in (FLOAT, *FORMS):
        scored = [one for method in methods for one in _cells(found, data, method, form)]
        if not scored:
            continue
        count = _count(len(scored), n_seeds) if len(methods) == 1 else f"{len(scored)} nets"
        values = [_spread([one.top1[name] for one in scored]) for name in (*scored[0].names("id")[:1], MEAN_OOD)]
        against = ["-", "-", "-"] if form == FLOAT else _against_float(scored, found)
        rows.append([label, form, count, *values, *against])
    return rows


def _against_float(scored: Sequence[Scored], found: Found) -> list[str]:
    pairs = [(one, found[_float_of(one.cell)]) for one in scored]
    n_flips = sum(int((one.top[name] != base.top[name]).sum()) for one, base in pairs for name in one.top)
    n = sum(len(top) for one, _ in pairs for top in one.top.values())
    return [*(shown(cost(pairs, kind)) for kind in ("id", "ood")), f"{100 * n_flips / n:.1f}"]


def cost(pairs: Sequence[tuple[Scored, Scored]], kind: str) -> tuple[float, float, float]:
    """Accuracy of the first of each pair less that of the second in points, with its interval over images."""
    names = pairs[0][0].names(kind)
    return repeated_difference([
        Repeated.of([(one.images[name], one.right[name], other.right[name]) for one, other in pairs]) for name in names
    ])  # fmt: skip


def _count(n: int, of: int) -> str:
    return str(n) if n == of else f"{n} of {of}"


def _slug(data: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in data.lower())


# --- plot --------------------------------------------------------------------------------------------------------------------

PLOTTED = {FLOAT: (latency.ORT,), "ORT static": (latency.ORT,), **dict.fromkeys(latency.OURS, (latency.ORT, latency.C))}
"""Runtimes of each form. Stock Brevitas QAT has no deployable file here, and therefore no latency."""


def plot_of(data: Sequence[str], found: Found, times: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """What `benchmarks.plot` draws: accuracy (mean over seeds) and latency of every method and form; None without latencies."""
    rows = [
        [{"title": f"{name}, {title}", "points": _points(name, label, found, times[name])} for title, label in
         (("in distribution", "id"), ("mean out of distribution", MEAN_OOD))]
        for name in data if name in times
    ]  # fmt: skip
    return {"title": "Accuracy and latency, one image, one thread", "methods": list(FIRST), "rows": rows} if rows else None


def _points(data: str, label: str, found: Found, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    medians = {name: round(float(np.median(rounds)), 3) for name, rounds in record["rounds_ms"].items()}
    methods = dict.fromkeys(cell.method for cell in found if cell.data == data)
    points = []
    for form, runtimes in PLOTTED.items():
        for runtime in (runtime for runtime in runtimes if f"{form} in {runtime}" in medians):
            for method in methods:
                values = [scored.top1[label] for scored in _cells(found, data, method, form)]
                if values and len(values) == len(_cells(found, data, method, FLOAT)):  # means over the same seeds
                    spread = round(stdev(values), 2) if len(values) > 1 else 0.0
                    place = {"ms": medians[f"{form} in {runtime}"], "percent": round(mean(values), 2), "spread": spread}
                    points.append({"form": f"{form}, {runtime}", "method": method, **place})
    return points


# --- result ------------------------------------------------------------------------------------------------------------------


def write_result(
    out: Path, machine: Machine, data: Sequence[str], methods: Sequence[str], seeds: Sequence[int], configs: Mapping[Cell, Config],
    store: Records,
) -> Path:  # fmt: skip
    """Write the result file of everything that is recorded. Raises ConfigError where nothing is."""
    artifacts = store.find_all(configs)
    if not artifacts:
        raise ConfigError("no cell of this grid is recorded, and none was asked for", "leave --only out")
    found = read_scores(artifacts)
    times = {name: record for name in data if (record := latency.read(store, name)) is not None}
    tables: list[Table] = []
    for name in data:
        nets = {cell: artifact for cell, artifact in artifacts.items() if cell.data == name and cell.form == FLOAT}
        if nets:
            lacking = missing_cells(name, [FLOAT], configs, found)
            notes = about_methods(name, {cell: found[cell].top1 for cell in nets}, nets, configs, lacking)
            tables.append(methods_table(name, methods, len(seeds), found, notes))
            ranked = sorted(methods, key=lambda method: method != LEAD)
            table = quantizers_table(
                name, ranked, len(seeds), found, about_eight_bit(configs, missing_cells(name, list(FORMS), configs, found))
            )
            tables += [table] if table.rows else []
    if times:
        rows = [row for name, record in times.items() for row in latency.rows_of(name, record)]
        tables.append(Table(latency.LATENCY, "Latency of the suite's nets", LATENCY_COLUMNS, rows, about_latency(times)))
    first = next(iter(configs.values()))
    return write_tables(
        out, machine, suite=SUITE, tables=tables, plot=plot_of(data, found, times), versions=installed_versions(),
        options={"seeds": list(seeds), "methods": list(methods), "config": portable(first.model_dump(mode="json"))},
        n=_counts(artifacts),
        measurements={"cells": [_measurement(cell, artifacts[cell], found) for cell in found], "latency": times},
    )  # fmt: skip


def _counts(artifacts: Mapping[Cell, Artifact]) -> dict[str, int]:
    """Images of every split, by data set."""
    return {
        f"{cell.data} {split}": n
        for cell, artifact in artifacts.items() if cell.form == FLOAT
        for split, n in artifact.document("training.json")["images"].items()
    }  # fmt: skip


def _measurement(cell: Cell, artifact: Artifact, found: Found) -> dict[str, Any]:
    scored, about = found[cell], artifact.document("training.json")
    tree: dict[str, Any] = {
        "data": cell.data, "method": cell.method, "seed": cell.seed, "form": cell.form, "digest": artifact.digest,
        "seconds": about["seconds"],
        "splits": {name: {"n": len(right), "correct": int(right.sum()), "ece": scored.ece[name]} for name, right in scored.right.items()},
    }  # fmt: skip
    if cell.form == FLOAT:
        last = about["stages"][-1]["result"]
        chosen = {key: value for key, value in last.items() if key != "history"}
        return tree | {"rate": rate_of(artifact), "chosen": chosen}
    base = found[_float_of(cell)]
    for name, entry in tree["splits"].items():
        one, other = scored.right[name], base.right[name]
        entry |= {"gained": int((one & ~other).sum()), "lost": int((other & ~one).sum())}
        entry["flips"] = int((scored.top[name] != base.top[name]).sum())
    return tree | {"epoch": about["chosen"].get("epoch", 0)}
