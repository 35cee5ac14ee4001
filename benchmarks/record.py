"""What every result file states besides its numbers, and how it is written and named."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.tables import Cell, read_tables
from edgeft.artifact import atomic_write, installed_versions, json_bytes
from edgeft.bench.machine import Machine, cpu_name

__all__ = ["Machine", "Table", "cpu_name", "write", "write_tables"]


@dataclass(frozen=True)
class Table:
    """One of a suite's tables; README.md knows it as <suite>-<name>."""

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str]
    n_lead_rows: int | None = None


def write(
    folder: Path,
    machine: Machine,
    *,
    suite: str,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    notes: Sequence[str],
    options: Mapping[str, Any],
    n: Mapping[str, int],
    measurements: Any,
    n_lead_rows: int | None = None,
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Write `folder`/<suite>_<hardware>_<YYYYMM>.json (UTC date), which replaces an earlier one of the same month; returns the file.

    `n` says how many of what were measured, `measurements` is everything from which the rows were computed, `versions` are those of
    an earlier measurement where it was not made now. Raises ConfigError when a row does not fit the columns, ArtifactError when the
    file cannot be written.
    """
    body = {"title": title, "columns": list(columns), "rows": [list(row) for row in rows], "notes": list(notes), "n_lead_rows": n_lead_rows}
    about = {"options": dict(options), "n": dict(n), "measurements": measurements}
    return _write(folder, machine, suite, body | about, versions)


def write_tables(
    folder: Path,
    machine: Machine,
    *,
    suite: str,
    tables: Sequence[Table],
    plot: Mapping[str, Any] | None,
    options: Mapping[str, Any],
    n: Mapping[str, int],
    measurements: Any,
    versions: Mapping[str, str],
) -> Path:
    """As `write`, for a suite with several tables, and with what `benchmarks.plot` draws."""
    body = {"tables": [asdict(table) for table in tables], "plot": None if plot is None else dict(plot)}
    about = {"options": dict(options), "n": dict(n), "measurements": measurements}
    return _write(folder, machine, suite, body | about, versions)


def _write(folder: Path, machine: Machine, suite: str, body: Mapping[str, Any], versions: Mapping[str, str] | None) -> Path:
    now = datetime.now(UTC)
    tree = {
        "suite": suite, "hardware": machine.text, "date": now.date().isoformat(), "versions": dict(versions or installed_versions()),
        "machine": asdict(machine) | {"platform": platform.platform()}, **body,
    }  # fmt: skip
    file = folder / f"{suite}_{machine.slug}_{now:%Y%m}.json"
    read_tables(tree, file.name)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json_bytes(tree))
    return file
