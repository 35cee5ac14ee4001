"""The statistics behind diagnoses against published tables and examples."""

import numpy as np
import pytest

from edgeft.diagnosis.intervals import auc, difference, probit, share_of, student_95, student_p


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042)]
)  # fmt: skip
def test_student_s_t_is_that_of_the_tables(freedom: int, t: float) -> None:
    assert student_95(freedom) == pytest.approx(t, abs=5e-4)
    assert student_p(-t, freedom) == pytest.approx(0.05, abs=1e-4)
    assert student_p(0, freedom) == 1


def test_difference_is_newcombe_s_example() -> None:
    low, high = difference(56, 70, 48, 80)
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)
    assert difference(0, 0, 3, 4) == (-1, 1)


def test_probits_invert() -> None:
    shares = np.array([1e-9, 0.025, 0.5, 0.975])
    np.testing.assert_allclose(share_of(probit(shares)), shares)
    assert float(probit(0.975)) == pytest.approx(1.959964)


def test_area_counts_pairs_and_its_interval_covers() -> None:
    negatives, positives = np.array([0.1, 0.4, 0.4, 0.8]), np.array([0.35, 0.4, 0.9])
    pairs = np.mean([(p > n) + 0.5 * (p == n) for p in positives for n in negatives])
    assert auc(negatives, positives)[0] == pytest.approx(pairs)
    rng = np.random.default_rng(0)
    truth = float(share_of(1 / np.sqrt(2)))
    intervals = [auc(rng.standard_normal(60), rng.standard_normal(60) + 1)[1] for _ in range(200)]
    assert 182 <= sum(low < truth < high for low, high in intervals) <= 199


def test_an_area_of_one_is_not_taken_for_certain() -> None:
    area, (low, high) = auc(np.zeros(20), np.ones(30))
    assert area == high == 1
    assert low == pytest.approx(0.839, abs=1e-3)
