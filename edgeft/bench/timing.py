"""How time is measured: interleaved rounds in random order, ratios within rounds, median and tail over all calls."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Call = Callable[[], object]
Rounds = dict[str, list[float]]
"""Milliseconds of each call, by the name of the round; models timed in one round share its name."""


@dataclass(frozen=True)
class Latency:
    """Of one call of a whole batch, in ms over all calls."""

    median_ms: float
    p95_ms: float
    n_rounds: int
    n_calls: int

    @classmethod
    def of(cls, rounds: Rounds) -> "Latency":
        """From all calls of all rounds."""
        times = np.concatenate([np.asarray(each) for each in rounds.values()])
        return cls(float(np.median(times)), float(np.percentile(times, 95)), len(rounds), len(times))


def ratio(of: Rounds, to: Rounds) -> float | None:
    """Median over the rounds that two models share of the ratio of their median times: how often `to` fits into `of`."""
    shared = [name for name in of if name in to]
    return float(np.median([np.median(of[name]) / np.median(to[name]) for name in shared])) if shared else None


def shuffled(names: list[str], n_rounds: int, seed: int = 0) -> Iterator[list[str]]:
    """The names in a new random order for each round, so that no variant always runs first or after the same other one."""
    rng = np.random.default_rng(seed)
    for _ in range(n_rounds):
        yield [names[int(i)] for i in rng.permutation(len(names))]


def warm_up(calls: Mapping[str, Call], n_calls: int) -> None:
    """Call each as often as in a round, untimed."""
    for call in calls.values():
        timed(call, n_calls)


def one_round(calls: Mapping[str, Call], order: Sequence[str], n_calls: int) -> dict[str, list[float]]:
    """Milliseconds of each call, by name; each name's calls stand together, in the given order of names."""
    found = {}
    for name in order:
        calls[name]()  # the model before has filled the caches
        found[name] = timed(calls[name], n_calls)
    return found


def timed(call: Call, n: int) -> list[float]:
    """Milliseconds of each of n calls."""
    times_ms = []
    for _ in range(n):
        start = time.perf_counter_ns()
        call()
        times_ms.append((time.perf_counter_ns() - start) / 1e6)
    return times_ms
