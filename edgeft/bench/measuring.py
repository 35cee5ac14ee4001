"""Verify, then time: all candidates with the same threads and batch in interleaved rounds, each round kept as soon as it is done."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgeft.bench import FLOAT, STATIC
from edgeft.bench.candidates import Candidate
from edgeft.bench.memory import peak_bytes, repeated
from edgeft.bench.opening import Opened, open_model
from edgeft.bench.results import Row
from edgeft.bench.store import Key, Store
from edgeft.bench.timing import Latency, Rounds, one_round, ratio, shuffled, warm_up
from edgeft.errors import EdgeftError
from edgeft.interpret import Interpreter
from edgeft.progress import Progress
from edgeft.runner import Logits

SAMPLES = "samples.safetensors"


class Expected:
    """Logits of the interpreter on the golden images of exports, computed once for each export."""

    def __init__(self) -> None:
        self._known: dict[str, Logits] = {}

    def of(self, candidate: Candidate) -> Logits:
        """What the candidate's fixed-point network must give, exactly."""
        artifact = candidate.artifact
        if artifact.digest not in self._known:
            self._known[artifact.digest] = Interpreter(artifact.graph()).logits(artifact.samples()["images"])
        return self._known[artifact.digest]


@dataclass(frozen=True)
class Plan:
    """How often to measure."""

    rounds: int
    calls: int


def measure(
    candidates: Sequence[Candidate], threads: int, batch: int, plan: Plan, store: Store, expected: Expected, progress: Progress
) -> list[Row]:
    """Rows of all candidates with so many threads and images of a batch, from records where they are complete."""
    members = [_Member(candidate, Key(candidate.digest, candidate.backend.name, threads, batch), store) for candidate in candidates]
    for member in members:
        if not member.record.get("about"):
            member.look(expected)
    _time(members, plan, batch, progress)
    with progress.task(f"memory of fresh processes, {threads} threads, batch {batch}", len(members)) as advance:
        for member in members:
            member.weigh()
            advance(1, member.candidate.backend.label)
    return [_row(member, members) for member in members]


class _Member:
    """A candidate in a group, with its record: "about" (what was verified and what executes), "rounds", "calls" and "peak_bytes"."""

    def __init__(self, candidate: Candidate, key: Key, store: Store) -> None:
        self.candidate, self.key, self._store = candidate, key, store
        self.record = store.timing(key)

    @property
    def rounds(self) -> Rounds:
        found: Rounds = self.record.get("rounds", {})
        return found

    @property
    def problem(self) -> str:
        """Why it is not timed; empty where it is."""
        return str(self.record["about"]["problem"])

    def open(self) -> Opened:
        return open_model(self.candidate.spec(self.key.threads))

    def look(self, expected: Expected) -> None:
        """Compare with the interpreter on the golden images, and ask the runtime what it executes."""
        about: dict[str, Any] = {"problem": "", "verified": None, "runtime": "", "in_float": None, "operators": {}}
        try:
            opened = self.open()
            executed = opened.executed()
            about |= {"runtime": executed.runtime, "operators": executed.operators}
            about["in_float"] = None if executed.in_float is None else list(executed.in_float)
            if self.candidate.backend.form == "fixed":
                wanted = expected.of(self.candidate)
                found = opened.runner.logits(self.candidate.artifact.samples()["images"])
                differing = int((found != wanted).any(axis=1).sum())
                about["verified"] = len(wanted)
                about["problem"] = f"differs from the interpreter on {differing} of {len(wanted)} golden images" if differing else ""
        except EdgeftError as error:
            about["problem"] = error.message
        self.record["about"] = about

    def add(self, name: str, times_ms: list[float], n_calls: int) -> None:
        """Keep a round."""
        self.record["calls"] = n_calls
        self.record.setdefault("rounds", {})[name] = times_ms
        self._store.keep_timing(self.key, self.record)

    def weigh(self) -> None:
        """Peak memory, in a process of its own."""
        if self.problem or "peak_bytes" in self.record:
            return
        samples = self.candidate.artifact.path / SAMPLES
        self.record["peak_bytes"] = peak_bytes(self.candidate.spec(self.key.threads), samples, self.key.batch)
        self._store.keep_timing(self.key, self.record)

    def references(self, members: Sequence["_Member"]) -> list["_Member"]:
        """The same run's float32 and static 8 bits in ONNX Runtime."""
        run = self.candidate.run.name
        return [each for each in members if each.candidate.run.name == run and each.candidate.backend.name in (FLOAT, STATIC)]


def _time(members: Sequence[_Member], plan: Plan, batch: int, progress: Progress) -> None:
    """Time those that lack rounds, together with what they are compared with: ratios need rounds that both are in."""
    for member in members:
        if member.record.get("calls", plan.calls) != plan.calls:
            member.record.pop("rounds", None)
    lacking = [member for member in members if not member.problem and len(member.rounds) < plan.rounds]
    wanted = {id(member): member for one in lacking for member in (one, *one.references(members)) if not member.problem}
    if not wanted:
        return
    named = {str(index): member for index, member in enumerate(wanted.values())}
    images = {name: repeated(member.candidate.artifact.samples()["images"], batch) for name, member in named.items()}
    calls = {name: member.open().prepare(images[name]) for name, member in named.items()}
    left = plan.rounds - min(len(member.rounds) for member in lacking)
    threads, session = lacking[0].key.threads, uuid.uuid4().hex[:8]
    seed = int(np.random.default_rng().integers(2**31))  # a resumed bench must not repeat the same orders
    with progress.task(f"time {len(named)} models, {threads} threads, batch {batch}", left) as advance:
        warm_up(calls, plan.calls)
        for number, order in enumerate(shuffled(list(named), left, seed)):
            for name, times_ms in one_round(calls, order, plan.calls).items():
                named[name].add(f"{session}-{number}", times_ms, plan.calls)
            advance()


def _row(member: _Member, members: Sequence[_Member]) -> Row:
    about, key = member.record["about"], member.key
    in_float = None if about["in_float"] is None else tuple(about["in_float"])
    row = replace(
        member.candidate.row(key.threads, key.batch), runtime=about["runtime"], in_float=in_float, n_verified=about["verified"]
    )  # fmt: skip
    if member.problem:
        return replace(row, status="differs", problem=member.problem, not_scored="not equal to the interpreter")
    speeds = {one.candidate.backend.name: ratio(one.rounds, member.rounds) for one in member.references(members) if one.rounds}
    return replace(
        row, latency=Latency.of(member.rounds), peak_bytes=member.record.get("peak_bytes"),
        speed_to_float=speeds.get(FLOAT), speed_to_static=speeds.get(STATIC),
    )  # fmt: skip
