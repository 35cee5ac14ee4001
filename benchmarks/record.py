"""What every result file states besides its numbers, and how it is written and named."""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.tables import Cell, Result
from edgeft.artifact import atomic_write, installed_versions, json_bytes
from edgeft.doctor import cpu_flags

_FREQUENCY = re.compile(r"@.*|\((r|tm)\)|\b(cpu|processor)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Machine:
    """Where something is measured: processor, cores that this process may use, threads, CPU flags, and how busy it is.

    `load` is the 1-minute load average when the measurement began: above the number of free cores, times are not worth much.
    """

    cpu: str
    n_cores: int
    n_threads: int
    flags: tuple[str, ...]
    load: float

    @classmethod
    def look(cls, n_threads: int) -> "Machine":
        """This machine, now."""
        file = Path("/proc/cpuinfo")
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        flags = cpu_flags(text) or {}
        n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(cpu_name(text), n_cores, n_threads, tuple(name for name, has in flags.items() if has), round(os.getloadavg()[0], 2))

    @property
    def text(self) -> str:
        """As tables show it."""
        cores = f"{self.n_cores} core{'s' if self.n_cores > 1 else ''}, {self.n_threads} thread{'s' if self.n_threads > 1 else ''}"
        return f"{self.cpu}, {cores}, {' '.join(self.flags) or 'no 8-bit instructions known'}"

    @property
    def slug(self) -> str:
        """As file names show it."""
        return f"{re.sub(r'[^a-z0-9]+', '-', self.cpu.lower()).strip('-')}-{self.n_cores}c"


def cpu_name(cpuinfo: str) -> str:
    """The processor's name out of the text of /proc/cpuinfo; the architecture where it names none."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    name = _FREQUENCY.sub(" ", found[1]) if found else platform.machine()
    return " ".join(name.split()) or platform.machine()


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
