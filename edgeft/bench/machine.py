"""Where something is measured: processor, cores, CPU flags, load."""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

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
        return self._text(f", {self.n_threads} thread{'s' if self.n_threads > 1 else ''}")

    @property
    def place(self) -> str:
        """The same without threads, where there are several numbers of them."""
        return self._text("")

    def _text(self, threads: str) -> str:
        cores = f"{self.n_cores} core{'s' if self.n_cores > 1 else ''}"
        return f"{self.cpu}, {cores}{threads}, {' '.join(self.flags) or 'no 8-bit instructions known'}"

    @property
    def slug(self) -> str:
        """As file names show it."""
        return f"{re.sub(r'[^a-z0-9]+', '-', self.cpu.lower()).strip('-')}-{self.n_cores}c"


def cpu_name(cpuinfo: str) -> str:
    """The processor's name out of the text of /proc/cpuinfo; the architecture where it names none."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    name = _FREQUENCY.sub(" ", found[1]) if found else platform.machine()
    return " ".join(name.split()) or platform.machine()
