"""Formulas of the evaluation suite against hand examples, brute force and known limits."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeft.evaluation.calibration import calibration, ece, fit_temperature, log_softmax
from edgeft.evaluation.detection import GaussianFit, auroc, energy, fpr_at_tpr, max_softmax, shrinkage
from edgeft.evaluation.metrics import Flips, Share, by_group, in_top, macro_f1, worst_group
from edgeft.evaluation.paired import Pair, difference, mcnemar, mean_difference

RNG = np.random.default_rng


# Accuracy


def test_top_k_counts_equal_scores_as_argmax_does() -> None:
    logits = np.array([[3, 2, 1, 0], [1, 1, 1, 1], [0, 1, 2, 3]], np.float32)
    labels = np.array([1, 2, 0])
    assert in_top(logits, labels, 1).tolist() == [False, False, False]
    assert in_top(logits, labels, 2).tolist() == [True, False, False]
    assert in_top(logits, labels, 3).tolist() == [True, True, False]
    assert in_top(logits, labels, 4).all()
    many = RNG(0).integers(0, 4, (9000, 6)).astype(np.float32)
    true = RNG(1).integers(0, 6, 9000)
    np.testing.assert_array_equal(in_top(many, true, 1), many.argmax(axis=1) == true)


def test_shares() -> None:
    share = Share.of(np.array([True, False, True, True]))
    assert (share.n, share.correct, share.value, share.too_small) == (4, 3, 0.75, True)
    assert share.interval == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert not Share(30, 1).too_small
    assert (Share(0, 0).value, Share(0, 0).interval) == (0.0, (0.0, 1.0))


def test_flips() -> None:
    found = Flips.of(np.array([0, 1, 2, 0, 1]), np.array([0, 0, 1, 1, 0]), np.array([0, 0, 2, 2, 1]))
    assert found == Flips(n=5, flipped=4, negative=1, positive=2)
    assert found.rate == 0.8


def test_macro_f1_by_hand() -> None:
    labels, top = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 3, 3])
    assert macro_f1(top, labels, 5) == pytest.approx((2 * 2 / (3 + 2) + 2 * 1 / (2 + 2) + 0) / 3)
    assert macro_f1(labels, labels, 5) == 1.0
    assert macro_f1(np.zeros(0, np.int64), np.zeros(0, np.int64), 3) == 0.0


def test_groups() -> None:
    found = by_group(np.array([True, False, True, False, False]), ["land", "water", "land", "water", "air"])
    assert found == {"air": Share(1, 0), "land": Share(2, 2), "water": Share(2, 0)}
    assert worst_group(found) == "air"


# Pairs


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert mcnemar(Pair(100, 0, 0)) == 1.0
    assert mcnemar(Pair(100, 3, 3)) == 1.0
    assert mcnemar(Pair(100, 1, 9)) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(Pair(100, 9, 1)) == mcnemar(Pair(100, 1, 9))
    z = (1000 - 1) / 41_000**0.5
    assert mcnemar(Pair(90_000, 20_000, 21_000)) == pytest.approx(math.erfc(z / 2**0.5), rel=0.01), "no overflow"


def test_versions_of_an_image_are_drawn_together() -> None:
    once = np.array([1] * 30 + [-1] * 50 + [0] * 920)
    assert mean_difference(once, 1) == pytest.approx(difference([Pair(1000, 30, 50)]), abs=0.1)
    assert mean_difference(5 * once, 5) == pytest.approx(mean_difference(once, 1)), "five equal versions say no more than one"
    assert mean_difference(np.zeros(7, np.int64), 3) == (0.0, 0.0, 0.0)


# Calibration


def test_ece_of_a_calibrated_set_vanishes() -> None:
    n, rng = 100_000, RNG(0)
    confidence = rng.uniform(0.1, 1, n)
    assert ece(confidence, rng.random(n) < confidence) < 0.01
    assert ece(confidence, rng.random(n) < confidence - 0.1) == pytest.approx(0.1, abs=0.01)


def test_ece_by_hand() -> None:
    confidence, right = np.array([0.05, 0.06, 0.5, 1.0]), np.array([True, False, True, True])
    gaps = [abs(1 - 0.11), abs(1 - 0.5), 0.0]
    assert ece(confidence, right) == pytest.approx(sum(gaps) / 4)
    assert ece(np.array([1 / 15]), np.array([True])) == pytest.approx(14 / 15), "a bin holds its upper end"


def test_nll_and_brier_by_hand() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])).astype(np.float32)
    found = calibration(logits, np.array([0, 1]))
    assert found.nll == pytest.approx(-(math.log(0.7) + math.log(0.1)) / 2, abs=1e-6)
    assert found.brier == pytest.approx((0.3**2 + 0.2**2 + 0.1**2 + 0.1**2 + 0.9**2 + 0.8**2) / 2, abs=1e-6)
    np.testing.assert_allclose(np.exp(log_softmax(1000 * logits)).sum(axis=1), 1)


def test_the_temperature_is_found_and_helps() -> None:
    rng = RNG(3)
    honest = 2 * rng.normal(size=(20_000, 4))
    labels = (honest + rng.gumbel(size=honest.shape)).argmax(axis=1)
    logits = (3 * honest).astype(np.float32)
    fitted = fit_temperature(logits, labels)
    assert not fitted.at_bound
    found = fitted.value
    assert found == pytest.approx(3, rel=0.05)
    at = [calibration(logits, labels, t).nll for t in (found / 1.02, found, found * 1.02)]
    assert at[1] == min(at)
    assert calibration(logits, labels, found).ece < 0.02 < calibration(logits, labels).ece


def test_temperatures_without_an_optimum_stay_finite_and_say_so() -> None:
    logits = np.eye(3, dtype=np.float32)
    for labels, log_t in ((np.arange(3), -5), (np.array([1, 2, 0]), 5)):
        found = fit_temperature(logits, labels)
        assert found.value == pytest.approx(math.exp(log_t), rel=1e-6)
        assert found.at_bound
    sure = 100 * logits[[0, 1, 2, 0]]
    assert not fit_temperature(sure, np.array([0, 1, 2, 1])).at_bound, "a large temperature, and an optimum"


# Detection


def brute_auroc(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float:
    above = (positive[:, None] > negative).sum() + 0.5 * (positive[:, None] == negative).sum()
    return float(above / (len(positive) * len(negative)))


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auroc_is_the_share_of_ordered_pairs(levels: int) -> None:
    rng = RNG(levels)
    negative = rng.integers(0, levels, 57).astype(np.float64)
    positive = rng.integers(0, levels, 83).astype(np.float64) + levels // 3
    assert auroc(positive, negative) == pytest.approx(brute_auroc(positive, negative), abs=1e-12)
    assert auroc(positive, positive) == pytest.approx(0.5)
    assert auroc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0


def test_fpr_by_hand() -> None:
    positive = np.arange(1.0, 21.0)
    assert fpr_at_tpr(positive, np.array([0.0, 1.9, 2.0, 30.0])) == 0.5, "19 of 20 are kept: the threshold is 2, and 2 passes it"
    assert fpr_at_tpr(np.ones(20), np.array([1.0, 0.0])) == 0.5, "equal scores cannot be told apart"
    assert fpr_at_tpr(np.array([1.0]), np.array([0.0])) == 0.0
    rng = RNG(0)
    inside, outside = np.round(rng.normal(1, 1, 301), 1), np.round(rng.normal(0, 1, 200), 1)
    brute = min(float((outside >= t).mean()) for t in inside if (inside >= t).mean() >= 0.95)
    assert fpr_at_tpr(inside, outside) == brute


def test_scores_from_logits() -> None:
    logits = np.array([[1000, 0, 0], [0, 0, 0]], np.float32)
    np.testing.assert_allclose(max_softmax(logits), [1, 1 / 3])
    np.testing.assert_allclose(energy(logits), [1000, math.log(3)])


def test_mahalanobis_against_the_definition() -> None:
    rng = RNG(5)
    labels = rng.integers(0, 3, 400)
    mix = rng.normal(size=(4, 4))
    features = (rng.normal(size=(400, 4)) @ mix + 5 * labels[:, None]).astype(np.float32)
    fit = GaussianFit(n_classes=5, n_features=4)
    for start in range(0, 400, 64):
        fit.add(features[start : start + 64], labels[start : start + 64])
    found = fit.fitted()
    wide = features.astype(np.float64)
    means = np.stack([wide[labels == c].mean(axis=0) for c in range(3)])
    covariance = (wide - means[labels]).T @ (wide - means[labels]) / 400
    share = shrinkage(covariance, 400)
    assert found.shrinkage == pytest.approx(share)
    assert 0 < share < 0.1
    shrunk = (1 - share) * covariance + share * np.trace(covariance) / 4 * np.eye(4)
    away = wide[:50, None] - means
    distances = np.einsum("nci,ij,ncj->nc", away, np.linalg.inv(shrunk), away)
    np.testing.assert_allclose(found.scores(features[:50]), -distances.min(axis=1), rtol=1e-5)
    far = (features[:50] + 40).astype(np.float32)
    assert auroc(found.scores(features), found.scores(far)) == 1.0


def test_fewer_images_than_features_shrink_the_covariance() -> None:
    fit = GaussianFit(n_classes=2, n_features=60)
    fit.add(RNG(0).normal(size=(10, 60)).astype(np.float32), np.arange(10) % 2)
    assert 0.3 < fit.fitted().shrinkage <= 1
    constant = GaussianFit(2, 3)
    constant.add(np.ones((4, 3), np.float32), np.arange(4) % 2)
    assert np.isfinite(constant.fitted().scores(np.zeros((2, 3), np.float32))).all()
