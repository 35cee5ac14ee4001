"""Effective robustness: what lies on the line has none, what is lifted off it has that much, and bad lines are named."""

import json
from pathlib import Path

import numpy as np
import pytest

from edgeft.diagnosis.effective import EffectiveRobustness, Point, against, fit_line
from edgeft.diagnosis.effective_text import render
from edgeft.diagnosis.intervals import probit, share_of
from edgeft.diagnosis.points import read_points
from edgeft.errors import DataError

ID_SHARES = (0.5, 0.56, 0.63, 0.7, 0.76, 0.83, 0.88, 0.92)


def on_line(id_share: float, scatter: float = 0.0) -> float:
    return float(share_of(0.9 * probit(id_share) - 0.5 + scatter))


def family(scatter: float = 0.0, n: int | None = None, seed: int = 0) -> list[Point]:
    """Baselines around a line; `scatter` is in probits."""
    rng = np.random.default_rng(seed)
    return [Point(f"b{x:g}", x, on_line(x, scatter * rng.standard_normal()), n, n) for x in ID_SHARES]


def test_points_on_the_line_have_no_effective_robustness() -> None:
    line = fit_line(family())
    assert [line.slope, line.intercept, line.r2] == pytest.approx([0.9, -0.5, 1])
    assert line.warnings == ()
    found = against(line, family())
    for model in found.models:
        assert model.effective == pytest.approx(0, abs=1e-12)
        assert model.verdict == "on"
        assert not model.unlike_family


def test_points_five_percentage_points_up_have_five_of_it_and_the_interval_covers() -> None:
    line = fit_line(family(scatter=0.01))
    for x in ID_SHARES[1:-1]:
        model = against(line, [Point("up", x, on_line(x) + 0.05, 5000, 5000)]).models[0]
        assert model.effective == pytest.approx(0.05, abs=0.01)
        assert model.interval[0] < 0.05 < model.interval[1]
    exact = against(fit_line(family()), [Point("up", 0.7, on_line(0.7) + 0.05, 5000, 5000)]).models[0]
    assert exact.effective == pytest.approx(0.05, abs=0.001)
    assert exact.verdict == "above"
    assert exact.unlike_family


def test_the_interval_covers_the_truth_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(3)
    n, covered = 800, 0
    for seed in range(150):
        line = fit_line(family(scatter=0.05, seed=seed))
        measured = Point("model", rng.binomial(n, 0.72) / n, rng.binomial(n, on_line(0.72) - 0.04) / n, n, n)
        low, high = against(line, [measured], seed).models[0].interval
        covered += low < -0.04 < high
    assert 135 <= covered <= 149


def test_what_scatters_like_the_baselines_is_not_unlike_them() -> None:
    line = fit_line(family(scatter=0.08))
    model = against(line, [Point("near", 0.7, line.expected(0.7) + 0.03)]).models[0]
    assert model.verdict == "on" or not model.unlike_family
    assert model.family[0] < model.expected < model.family[1]


def test_fewer_than_five_models_are_refused_by_name() -> None:
    with pytest.raises(DataError) as caught:
        fit_line(family()[:4])
    assert caught.value.message == "a line of baselines needs at least 5 models, found 4: 'b0.5', 'b0.56', 'b0.63', 'b0.7'"
    with pytest.raises(DataError, match="found 0: none"):
        fit_line([])


def test_baselines_of_one_id_accuracy_are_refused() -> None:
    with pytest.raises(DataError, match=r"all 5 baselines have the ID accuracy 70\.0 %"):
        fit_line([Point(f"m{ood}", 0.7, ood) for ood in (0.3, 0.35, 0.4, 0.45, 0.5)])


def test_a_poor_fit_is_flagged() -> None:
    line = fit_line(family(scatter=0.5))
    assert line.r2 < 0.9
    assert line.warnings[0].startswith(f"poor fit: R² is {line.r2:.2f}, below 0.9")


def test_a_falling_line_is_flagged() -> None:
    points = [Point(f"m{x:g}", x, 1 - x) for x in ID_SHARES]
    assert any("the line falls (slope -1.00)" in text for text in fit_line(points).warnings)


def test_a_curved_relation_is_flagged_and_a_straight_one_is_not() -> None:
    curved = [Point(f"m{x:g}", x, float(share_of(0.9 * probit(x) - 0.5 + 0.4 * probit(x) ** 2))) for x in ID_SHARES]
    assert any(text.startswith("the relation is curved (quadratic term, p = 0.0") for text in fit_line(curved).warnings)
    flagged = sum(fit_line(family(scatter=0.05, seed=seed)).curvature_p < 0.05 for seed in range(100))
    assert flagged <= 12, "one straight line in twenty by chance"


def test_few_images_flatten_the_line_and_that_is_said() -> None:
    assert fit_line(family(scatter=0.01, n=5000)).warnings == ()
    close = [Point(f"m{x:g}", x, on_line(x), 100, 100) for x in (0.80, 0.81, 0.82, 0.83, 0.84)]
    assert any("of the variance of the baselines' ID accuracies is not chance" in text for text in fit_line(close).warnings)


def test_extrapolation_and_missing_counts_are_flagged_by_name() -> None:
    found = against(fit_line(family(scatter=0.01)), [Point("far", 0.97, 0.9), Point("near", 0.7, 0.6, 500, 500)])
    assert found.warnings == (
        "extrapolated beyond the baselines' ID accuracies 50.0 ... 92.0 %: 'far'",
        "numbers of images not given: the intervals leave out the chance in the accuracies of 'far'",
    )
    assert [model.extrapolated for model in found.models] == [True, False]


def test_perfect_accuracies_need_a_count() -> None:
    assert Point("all", 1.0, 0.5, 100, 100).probits[0] == pytest.approx(float(probit(0.995)))
    with pytest.raises(DataError) as caught:
        Point("all", 1.0, 0.5)
    assert caught.value.message == "the accuracy id of model 'all' is exactly 1, which has no probit"


def test_text_and_json() -> None:
    found = against(fit_line(family()), [Point("up", 0.7, 0.61, 900, 900), Point("same", 0.7, on_line(0.7), 900, 900)])
    text = render(found)
    assert "8 baselines, ID 50.0 ... 92.0 %: probit(OOD) = 0.90 probit(ID) - 0.50, R² 1.000" in text
    assert "more robust than expected" in text
    assert "as expected" in text
    tree = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [model["verdict"] for model in tree["models"]] == ["above", "on"]
    assert tree["line"]["n"] == 8


# CSV files


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "baselines.csv"
    path.write_text(text, encoding="utf-8")
    return path


def error_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_points(path)
    return caught.value.message


def test_shares_and_percent_read_the_same(tmp_path: Path) -> None:
    shares = read_points(written(tmp_path, "name,id,ood,n_id,n_ood\na,0.8,0.5,1000,500\nb,0.9,0.6,,\n"))
    percent = read_points(written(tmp_path, "\ufeffood, name, id, paper, n_id\n50, a, 80, x, 1000\n60, b, 90, y,\n"))
    assert shares == [Point("a", 0.8, 0.5, 1000, 500), Point("b", 0.9, 0.6)]
    assert percent == [Point("a", 0.8, 0.5, 1000, None), Point("b", 0.9, 0.6)]


def test_missing_columns_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, "model,id\na,0.8\n")
    assert error_of(path) == f"'{path}' has no column 'name' and no column 'ood'; found: 'model', 'id'"
    assert error_of(written(tmp_path, "")).endswith("no column 'name' and no column 'id' and no column 'ood'; found: none")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("b,x,0.5,,", "line 3: id is 'x', not a number"),
        ("b,0.8,,,", "line 3: ood is '', not a number"),
        ("b,0.8,nan,,", "line 3: ood is 'nan', not a number"),
        ("b,0.8", "line 3: ood is '', not a number"),
        ("b,80,60,,", "line 3: the accuracy 80 and others of the file do not have the same unit"),
        ("b,-0.1,0.5,,", "line 3: the accuracy id of model 'b' is -0.1"),
        ("b,0.8,0.5,many,", "line 3: n_id is 'many', not a number of images"),
        ("b,0.8,0.5,0,", "line 3: model 'b' was measured on n_id = 0 images"),
        ("b,1.0,0.5,,", "line 3: the accuracy id of model 'b' is exactly 1, which has no probit"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(tmp_path: Path, row: str, message: str) -> None:
    path = written(tmp_path, f"name,id,ood,n_id,n_ood\na,0.7,0.5,,\n{row}\n")
    assert error_of(path) == f"'{path}', {message}"


def test_files_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none.csv") == f"cannot read the CSV file '{tmp_path / 'none.csv'}': No such file or directory"
    (tmp_path / "bytes.csv").write_bytes(b"name,id,ood\n\xff\xfe\n")
    assert "cannot read the CSV file" in error_of(tmp_path / "bytes.csv")


def test_the_same_seed_gives_the_same_intervals() -> None:
    def found() -> EffectiveRobustness:
        return against(fit_line(family(scatter=0.05)), [Point("m", 0.7, 0.6, 500, 500)])

    assert found().to_json() == found().to_json()
