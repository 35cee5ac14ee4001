"""Reports: intervals, derived numbers, JSON and the table."""

import json

import pytest

from edgeft.errors import ArtifactError
from edgeft.report import EvalReport, ModelResult, SplitResult, render, wilson

FLOAT = ModelResult(
    "float", (SplitResult("id", "id", 1000, 960), SplitResult("sketch", "ood", 200, 100), SplitResult("art", "ood", 50, 45))
)
FIXED = ModelResult(
    "fixed point", (SplitResult("id", "id", 1000, 955, 12), SplitResult("sketch", "ood", 200, 98, 5), SplitResult("art", "ood", 50, 45, 0))
)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17), table I: the Wilson score interval without continuity correction.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_agrees_with_published_intervals(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0
    assert wilson(10, 10)[0] == pytest.approx(1 - wilson(0, 10)[1])
    assert wilson(0, 0) == (0.0, 1.0)


def test_json_holds_counts_and_everything_derived() -> None:
    tree = EvalReport((FLOAT, FIXED)).to_json()
    fixed = tree["models"][1]
    assert fixed["model"] == "fixed point"
    assert fixed["mean_ood"] == pytest.approx((0.49 + 0.9) / 2)
    sketch = fixed["splits"][1]
    low, high = wilson(98, 200)
    assert sketch == {
        "split": "sketch", "kind": "ood", "n": 200, "correct": 98, "top1": 0.49, "interval": [low, high], "flips": 5, "flip_rate": 0.025,
    }  # fmt: skip
    assert tree["models"][0]["splits"][0]["flips"] is None


def test_json_round_trip() -> None:
    report = EvalReport((FLOAT, FIXED))
    assert EvalReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_with_model_appends_and_replaces_in_place() -> None:
    report = EvalReport().with_model(FLOAT).with_model(FIXED)
    assert [result.model for result in report.models] == ["float", "fixed point"]
    better = ModelResult("float", (SplitResult("id", "id", 10, 10),))
    assert report.with_model(better).models == (better, FIXED)


def test_mean_ood_is_none_without_shifted_sets() -> None:
    assert ModelResult("m", (SplitResult("id", "id", 10, 9),)).mean_ood is None


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"schema": 9, "models": []}, "this is not an evaluation report of schema 1, the one this version reads"),
        ({"schema": 1}, "the evaluation report is not complete: 'models'"),
        (
            {"schema": 1, "models": [{"model": "m", "splits": [{"split": "s", "kind": "id", "n": 3, "correct": 4, "flips": None}]}]},
            "the evaluation report is not complete: impossible counts in split 's': n=3, correct=4, flips=None",
        ),
        (
            {"schema": 1, "models": [{"model": "m", "splits": [{"split": "s", "kind": "val", "n": 3, "correct": 1, "flips": None}]}]},
            "the evaluation report is not complete: kind 'val' of split 's' is neither 'id' nor 'ood'",
        ),
    ],
)
def test_bad_json_is_refused(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        EvalReport.from_json(tree)
    assert caught.value.message == message


def test_render_shows_counts_accuracy_interval_mean_and_flips() -> None:
    assert render(EvalReport((FLOAT, FIXED))).splitlines() == [
        "                  float               fixed point",
        "split       n     top-1 % [95 %]      top-1 % [95 %]      flips %",
        "id          1000   96.0 [94.6, 97.0]   95.5 [94.0, 96.6]  1.2",
        "ood:sketch  200    50.0 [43.1, 56.9]   49.0 [42.2, 55.9]  2.5",
        "ood:art     50     90.0 [78.6, 95.7]   90.0 [78.6, 95.7]  0.0",
        "mean OOD           70.0                69.5",
    ]


def test_render_leaves_a_dash_where_a_model_was_not_measured() -> None:
    text = render(EvalReport((FLOAT, ModelResult("onnx", (SplitResult("id", "id", 1000, 960, 0),)))))
    assert text.splitlines()[3].split() == ["ood:sketch", "200", "50.0", "[43.1,", "56.9]", "-", "-"]
    assert text.splitlines()[5].split() == ["mean", "OOD", "70.0", "-"]
