"""What quantization costs under shift beyond its ID loss: nothing when both losses are the line's, and what was added otherwise."""

import json

import pytest

from edgeft.diagnosis.effective_text import render_quantization
from edgeft.diagnosis.intervals import probit, share_of
from edgeft.diagnosis.points import choose_split, points_of
from edgeft.diagnosis.quantization import quantization_effect
from edgeft.errors import DataError
from edgeft.report import EvalReport, ModelResult, SplitResult

N_ID, N_OOD = 4000, 5000
SHARES = (0.80, 0.83, 0.85, 0.88, 0.91, 0.93)


def on_line(id_share: float) -> float:
    return float(share_of(0.8 * probit(id_share) - 0.4))


def result(model: str, id_share: float, ood_share: float, flips: int | None, n_id: int = N_ID) -> ModelResult:
    return ModelResult(
        model,
        (
            SplitResult("id", "id", n_id, round(id_share * n_id), flips),
            SplitResult("sketch", "ood", N_OOD, round(ood_share * N_OOD), flips),
        ),
    )


def reports(extra: float = 0.0, flips: int | None = 60, n: int = len(SHARES)) -> dict[str, EvalReport]:
    """Runs whose fixed-point models lose 0.5 points ID, the line's share of that under shift, and `extra` on top."""
    return {
        f"run{index}": EvalReport(
            (result("float", share, on_line(share), None), result("fixed point", share - 0.005, on_line(share - 0.005) + extra, flips))
        )
        for index, share in enumerate(SHARES[:n])
    }


def test_losses_along_the_line_are_no_excess() -> None:
    found = quantization_effect(reports(), "ood:sketch", "fixed point")
    assert found.mean == pytest.approx(0, abs=2e-4)
    assert found.warnings == ()
    assert "no excess that these runs can show" in render_quantization(found)
    for run in found.runs:
        assert run.id_change == pytest.approx(-0.005, abs=3e-4)
        assert run.interval[0] < run.excess < run.interval[1]


def test_a_point_more_under_shift_is_an_excess_of_a_point() -> None:
    found = quantization_effect(reports(-0.01), "ood:sketch", "fixed point")
    assert found.mean == pytest.approx(-0.01, abs=2e-4)
    assert found.interval[1] < 0
    text = render_quantization(found)
    assert "'fixed point' against the line of the float models, ood:sketch" in text
    assert "mean excess over 6 runs: -1.0 [" in text
    assert "quantization costs more under shift than its loss in distribution says" in text
    tree = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert tree["runs"][0]["excess"] == pytest.approx(-0.01, abs=1e-3)


def test_a_collapse_is_not_read_off_the_line_without_a_word() -> None:
    broken = reports()
    broken["run0"] = EvalReport((broken["run0"].models[0], result("fixed point", 0.4, 0.2, 2500)))
    found = quantization_effect(broken, "ood:sketch", "fixed point")
    assert found.warnings == ("far below the float models' ID accuracies 80.0 ... 93.0 %: 'run0: fixed point'",)


def test_flips_of_the_same_images_narrow_the_interval() -> None:
    paired, unpaired = (quantization_effect(reports(0, flips), "ood:sketch", "fixed point").runs[0].interval for flips in (60, None))
    assert paired[1] - paired[0] < 0.4 * (unpaired[1] - unpaired[0])


def test_fewer_than_five_runs_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="needs at least 5 models, found 4: 'run0: float', 'run1: float', 'run2: float', 'run3: float'"):
        quantization_effect(reports(n=4), "ood:sketch", "fixed point")


def test_runs_on_other_images_are_refused() -> None:
    mixed = reports()
    mixed["odd"] = EvalReport((result("float", 0.9, 0.7, None, 100), result("fixed point", 0.9, 0.7, 1, 100)))
    with pytest.raises(DataError) as caught:
        quantization_effect(mixed, "ood:sketch", "fixed point")
    assert caught.value.message == (
        "the runs 'run0' and 'odd' were measured on other images: 4000 and 100 ID, 5000 and 5000 of 'ood:sketch'"
    )


def test_a_model_that_was_not_measured_is_named() -> None:
    with pytest.raises(DataError) as caught:
        quantization_effect(reports(), "ood:sketch", "trt")
    assert caught.value.message == "the run 'run0' was not measured as 'trt'"
    with pytest.raises(DataError) as caught:
        points_of(reports(), "ood:cartoon")
    assert caught.value.message == "the model 'float' of the run 'run0' was not measured on 'ood:cartoon'"


def test_the_split_is_chosen_where_there_is_one_and_named_where_there_are_more() -> None:
    assert choose_split(reports(), None) == "ood:sketch"
    splits = (*result("float", 0.8, 0.6, None).splits, SplitResult("night", "ood", 10, 5))
    both = {"run": EvalReport((ModelResult("float", splits),))}
    assert choose_split(both, "night") == "ood:night"
    with pytest.raises(DataError, match="which shifted split\\? measured in every run: 'sketch', 'night'"):
        choose_split(both, None)
    with pytest.raises(DataError, match="the shifted split 'night' was not measured in every run; those that were: 'sketch'"):
        choose_split({**both, **reports()}, "night")
