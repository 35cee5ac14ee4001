"""What a bench computes from counts and times, on numbers that can be checked by hand."""

import numpy as np
import pytest

from edgeft.bench.numbers import Cost, Reliability, front, mean_interval
from edgeft.bench.scoring import cost
from edgeft.bench.timing import Latency, one_round, ratio, shuffled, warm_up
from edgeft.report import ModelResult, SplitResult, wilson


def test_the_front_keeps_what_nothing_beats() -> None:
    points = [(1.0, 0.7), (2.0, 0.9), (2.0, 0.8), (3.0, 0.9), (4.0, 0.95), (1.0, 0.7)]
    assert front(points) == [True, True, False, False, True, True]
    assert front([]) == []


def test_the_interval_of_mean_ood_is_narrower_than_that_of_one_set() -> None:
    one = ModelResult("m", (SplitResult("id", "id", 50, 40), SplitResult("a", "ood", 100, 60)))
    found = mean_interval(one)
    assert found is not None
    assert found == pytest.approx(wilson(60, 100))
    four = ModelResult("m", tuple(SplitResult(name, "ood", 100, 60) for name in "abcd"))
    low, high = mean_interval(four) or (0.0, 0.0)
    assert (0.6 - low, high - 0.6) == pytest.approx(((0.6 - found[0]) / 2, (found[1] - 0.6) / 2))
    assert mean_interval(ModelResult("m", (SplitResult("id", "id", 50, 40),))) is None


def test_reliability_by_hand() -> None:
    found = Reliability.of(np.array([0.95, 0.92, 0.1, 0.11]), np.array([True, False, False, True]))
    assert found.bins[0] == (1, 0.1, 0.0)  # bins are open below: 0.1 belongs to the first
    assert found.bins[1] == (1, 0.11, 1.0)
    n, confidence, right = found.bins[9]
    assert (n, right) == (2, 0.5)
    assert confidence == pytest.approx(0.935)
    assert found.n == 4
    assert found.ece == pytest.approx((0.1 + 0.89 + 2 * 0.435) / 4)


def test_ratios_are_taken_within_rounds() -> None:
    slow = {"r0": [4.0, 4.0], "r1": [9.0], "r2": [100.0]}
    fast = {"r0": [2.0, 2.0], "r1": [3.0], "other": [1.0]}
    assert ratio(slow, fast) == 2.5
    assert ratio(slow, {"other": [1.0]}) is None
    latency = Latency.of({"a": [1.0, 2.0], "b": [3.0]})
    assert (latency.median_ms, latency.n_rounds, latency.n_calls) == (2.0, 2, 3)
    assert latency.p95_ms == pytest.approx(2.9)


def test_a_round_calls_each_as_often_as_asked() -> None:
    counts = dict.fromkeys("ab", 0)

    def caller(name: str) -> None:
        counts[name] += 1

    calls = {name: lambda name=name: caller(name) for name in counts}
    warm_up(calls, 2)
    found = one_round(calls, ["b", "a"], 3)
    assert list(found) == ["b", "a"]
    assert all(len(times) == 3 and min(times) >= 0 for times in found.values())
    assert counts == {"a": 2 + 1 + 3, "b": 2 + 1 + 3}


def test_orders_differ_and_are_complete() -> None:
    orders = list(shuffled(["a", "b", "c"], 20))
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_the_cost_is_paired_and_its_interval_holds_the_truth() -> None:
    base = ModelResult("float", (SplitResult("id", "id", 1000, 900), SplitResult("x", "ood", 1000, 500)))
    other = ModelResult("q", (SplitResult("id", "id", 1000, 890, 30), SplitResult("x", "ood", 1000, 500, 0)))
    found = cost(base, other, "id")
    assert found is not None
    assert found.points == pytest.approx(-1.0)
    assert -2.5 < found.low < -1.0 < found.high < 0.5
    assert cost(base, other, "ood") == Cost(0.0, 0.0, 0.0)
    assert Cost(-0.41, -1.1, 0.3).text == "-0.4 [-1.1, +0.3]"


@pytest.mark.parametrize(
    "other",
    [SplitResult("id", "id", 999, 900, 1), SplitResult("id", "id", 1000, 900), SplitResult("new", "ood", 10, 9, 1)],
    ids=["other images", "flips not counted", "split not in float"],
)
def test_a_cost_that_cannot_be_known_is_none(other: SplitResult) -> None:
    base = ModelResult("float", (SplitResult("id", "id", 1000, 900),))
    assert cost(base, ModelResult("q", (other,)), other.kind) is None
