"""sweep(): every combination of some configuration keys as a run of its own; resumable, on one machine or on many.

The queue is an Optuna study in a journal file: no server, locked by the file system, so that workers on machines that share the folder
take runs from the same queue. Optuna chooses nothing here, the grid is run as it is. Each run is a process of its own: one that fails or is
killed harms no other, and goes on from its checkpoints when the sweep is started again.
"""

import csv
import io
import itertools
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from edgeft.artifact import SWEEP, Artifact, atomic_write, is_finished, json_bytes
from edgeft.config import Config, build_config, parse_assignment, to_toml
from edgeft.errors import ConfigError
from edgeft.methods import METHODS
from edgeft.progress import Progress

JOURNAL = "queue.journal"
_STUDY, _RUN, _OWNER, _ERROR = "sweep", "run", "owner", "error"
COLUMNS = ("run", "state", "id float", "id fixed point", "ood float", "ood fixed point", "error")

Command = Callable[[Sequence[str], Path, Mapping[str, str]], int]
"""Runs `edgeft` with arguments, output to a file, environment added; returns the exit code."""


@dataclass(frozen=True)
class SweepRow:
    """One run: its folder's name, "finished", "failed", "running" or "waiting", top-1 shares where it is finished, else why not."""

    run: str
    state: str
    accuracy: tuple[float | None, float | None, float | None, float | None] = (None, None, None, None)
    error: str = ""

    def cells(self) -> tuple[str, ...]:
        """As text, accuracy in percent."""
        return (self.run, self.state, *("-" if each is None else f"{100 * each:.1f}" for each in self.accuracy), self.error)


@dataclass(frozen=True)
class SweepReport:
    """All runs of a sweep in `out`."""

    out: Path
    rows: tuple[SweepRow, ...]

    @property
    def complete(self) -> bool:
        """Whether every run is finished."""
        return all(row.state == "finished" for row in self.rows)

    @property
    def runs(self) -> list[Path]:
        """Folders of the finished runs."""
        return [self.out / row.run for row in self.rows if row.state == "finished"]

    def text(self) -> str:
        """The table for people."""
        table = [COLUMNS, *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        rows = [vars(row) | {"accuracy": list(row.accuracy)} for row in self.rows]
        return {"out": str(self.out), "complete": self.complete, "runs": rows}


def grid(axes: Sequence[str], file: Path | None, flags: dict[str, Any], sets: Sequence[str], out: Path) -> dict[str, Config]:
    """Configurations of every combination of the `axes`, each "key=value,value,...", by the name of its folder in `out`.

    Raises ConfigError for an axis without a choice, for two combinations of one name, and for all combinations that are not valid.
    """
    choices = [_axis(text) for text in axes]
    found: dict[str, Config] = {}
    for values in itertools.product(*(values for _, values in choices)):
        assignments = [f"{key}={value}" for (key, _), value in zip(choices, values, strict=True)]
        name = re.sub(r"[^\w.+-]+", "-", "-".join(values)).strip("-")
        if name in found:
            raise ConfigError(f"two combinations have the name '{name}'", "values must differ in letters, digits, '.', '+' or '-'")
        try:
            found[name] = build_config(file, {**flags, "out": out / name}, [*sets, *assignments])
            METHODS.get(found[name].train.method).stages(found[name])
        except ConfigError as error:
            raise ConfigError(f"combination {', '.join(assignments)}: {error.message}", error.hint) from error
    return found


def _axis(text: str) -> tuple[str, list[str]]:
    key, _, values = text.partition("=")
    found = [value.strip() for value in values.split(",") if value.strip()]
    parse_assignment(f"{key}={values}")
    if len(found) < 1 or len(set(found)) < len(found):
        raise ConfigError(f"--grid '{text}' is not of the form section.key=value,value,...", "example: --grid train.method=ft,lpft")
    return key, found


def run_edgeft(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """`edgeft` in a process of its own."""
    with log.open("ab") as file:
        command = [sys.executable, "-m", "edgeft", *arguments]
        return subprocess.run(command, stdout=file, stderr=file, env={**os.environ, **environment}, check=False).returncode


def sweep(
    configs: Mapping[str, Config], out: Path, *, targets: Sequence[str] = (), workers: int = 1, retry: bool = False,
    devices: Sequence[str] = (), progress: Progress | None = None, command: Command = run_edgeft,
) -> SweepReport:  # fmt: skip
    """Run the configurations that no worker has run yet, and export them to `targets`; the table is in `out`/sweep.json and sweep.csv.

    `workers` runs are made at a time, the i-th worker on the i-th of `devices` (values of CUDA_VISIBLE_DEVICES) where there are any. Runs
    that a worker of this machine left unfinished go on; those that failed do so with `retry`. Failures are rows of the table.
    """
    out.mkdir(parents=True, exist_ok=True)
    queue = _Queue(out, list(configs))
    queue.fill(retry=retry)
    work = _Work(configs, out, targets, progress or Progress(False), command)
    with ThreadPoolExecutor(workers) as pool:
        environments = [{"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]} if devices else {} for i in range(workers)]
        for future in [pool.submit(work.until_empty, queue, environment) for environment in environments]:
            future.result()
    return _tabulate(queue, out)


class _Queue:
    """The study. A trial is a run, whose name is an attribute of it. Of two trials of one name the first counts."""

    def __init__(self, out: Path, names: list[str]) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._names = names
        self._lock = threading.Lock()
        storage = JournalStorage(JournalFileBackend(str(out / JOURNAL)))
        self._study = optuna.create_study(study_name=_STUDY, storage=storage, direction="maximize", load_if_exists=True)

    def fill(self, *, retry: bool) -> None:
        """Put in the queue what was never in it, what a worker that is gone left, and with `retry` what failed."""
        newest = self.newest()
        for name in self._names:
            trial = newest.get(name)
            if trial is not None and trial.state == TrialState.RUNNING and _is_gone(trial.user_attrs.get(_OWNER, "")):
                self._study.tell(trial.number, state=TrialState.FAIL)
            elif trial is not None and not (retry and trial.state == TrialState.FAIL):
                continue
            self._study.enqueue_trial({}, user_attrs={_RUN: name})

    def take(self) -> "optuna.Trial | None":
        """The next run, or None where there is none left."""
        with self._lock:
            while self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                trial = self._study.ask()
                name = trial.user_attrs.get(_RUN)
                earlier = [t for t in self._study.get_trials(deepcopy=False) if t.number < trial.number and t.user_attrs.get(_RUN) == name]
                if name in self._names and not any(t.state in (TrialState.RUNNING, TrialState.COMPLETE) for t in earlier):
                    trial.set_user_attr(_OWNER, f"{socket.gethostname()}:{os.getpid()}")
                    return trial
                self._study.tell(trial, state=TrialState.PRUNED)  # another worker was faster, or the grid has changed
        return None

    def done(self, trial: "optuna.Trial", error: str) -> None:
        with self._lock:
            trial.set_user_attr(_ERROR, error)
            self._study.tell(trial, **({"state": TrialState.FAIL} if error else {"values": 1.0}))

    def newest(self) -> dict[str, FrozenTrial]:
        """The last trial of each name that was not a duplicate."""
        found: dict[str, FrozenTrial] = {}
        for trial in self._study.get_trials(deepcopy=False):
            name = trial.user_attrs.get(_RUN)
            if trial.state != TrialState.PRUNED and name in self._names:
                found[name] = trial
        return found


def _is_gone(owner: str) -> bool:
    """Whether a worker was a process of this machine that is no more; of other machines nothing is known."""
    host, _, pid = owner.rpartition(":")
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    return int(pid) == os.getpid()


@dataclass(frozen=True)
class _Work:
    """What a worker does with a run."""

    configs: Mapping[str, Config]
    out: Path
    targets: Sequence[str]
    progress: Progress
    command: Command

    def until_empty(self, queue: _Queue, environment: Mapping[str, str]) -> None:
        while (trial := queue.take()) is not None:
            name = trial.user_attrs[_RUN]
            self.progress.line(f"{name}: started")
            error = self._one(name, environment)
            queue.done(trial, error)
            self.progress.line(f"{name}: {error or 'finished'}")

    def _one(self, name: str, environment: Mapping[str, str]) -> str:
        """Why a run failed; empty where it did not."""
        file, log, run = self.out / f"{name}.toml", self.out / f"{name}.log", self.out / name
        atomic_write(file, to_toml(self.configs[name]).encode())
        code = 0
        if not is_finished(run):
            code = self.command(["train-quantize", "--config", str(file), "--resume"], log, environment)
        if not code and self.targets:
            targets = [argument for target in self.targets for argument in ("--target", target)]
            code = self.command(["export", str(run), *targets], log, environment)
        return _reason(log, code) if code else ""


def _reason(log: Path, code: int) -> str:
    """The last error in a log, or how the process ended."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    ended = f"signal {-code}" if code < 0 else f"exit code {code}"
    return errors[-1] if errors else f"{ended}, see '{log}'"


_STATES = {TrialState.COMPLETE: "finished", TrialState.FAIL: "failed", TrialState.RUNNING: "running", TrialState.WAITING: "waiting"}


def _tabulate(queue: _Queue, out: Path) -> SweepReport:
    rows = []
    for name, trial in sorted(queue.newest().items()):
        state = _STATES[trial.state]
        accuracy = _accuracy(out / name) if state == "finished" else (None,) * 4
        rows.append(SweepRow(name, state, accuracy, trial.user_attrs.get(_ERROR, "") if state == "failed" else ""))
    report = SweepReport(out, tuple(rows))
    atomic_write(out / f"{SWEEP}.json", json_bytes(report.to_json()))
    text = io.StringIO(newline="")
    csv.writer(text).writerows([COLUMNS, *(row.cells() for row in report.rows)])
    atomic_write(out / f"{SWEEP}.csv", text.getvalue().encode())
    return report


def _accuracy(run: Path) -> tuple[float | None, float | None, float | None, float | None]:
    report = Artifact.load(run).report()
    models = [report.model(name) for name in ("float", "fixed point")]
    ids = [split.top1 if model and (split := model.split("id")) else None for model in models]
    oods = [model.mean_ood if model else None for model in models]
    return ids[0], ids[1], oods[0], oods[1]
