"""What every result file states besides its numbers, and how it is written and named."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.tables import Cell, Result
from edgeft.artifact import atomic_write, installed_versions, json_bytes
from edgeft.bench.machine import Machine, cpu_name

__all__ = ["Machine", "cpu_name", "write"]


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
    now = datetime.now(UTC)
    tree = {
        "suite": suite, "title": title, "hardware": machine.text, "date": now.date().isoformat(),
        "versions": dict(versions or installed_versions()),
        "columns": list(columns), "rows": [list(row) for row in rows], "notes": list(notes), "n_lead_rows": n_lead_rows,
        "machine": asdict(machine) | {"platform": platform.platform()}, "options": dict(options), "n": dict(n),
        "measurements": measurements,
    }  # fmt: skip
    file = folder / f"{suite}_{machine.slug}_{now:%Y%m}.json"
    Result.from_json(tree, file.name)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json_bytes(tree))
    return file
