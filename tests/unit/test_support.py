"""The split by support on Gaussians: nothing in common is out of support, the same distribution is in, half is half."""

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeft.diagnosis.support import FOLDS, SupportSplit, _folds, split_support
from edgeft.errors import DataError, TrainingError

D = 16
Values = NDArray[np.float32]


def gaussian(n: int, mean: float = 0.0, seed: int = 0) -> Values:
    return (np.random.default_rng((seed, n, int(10 * mean))).standard_normal((n, D)) + mean).astype(np.float32)


def split(ref: Values, shift: Values) -> SupportSplit:
    return split_support(ref, shift, np.arange(len(ref) + len(shift)))


@pytest.mark.parametrize(("n_ref", "n_shift"), [(400, 400), (600, 60), (60, 600), (20, 20)])
def test_disjoint_sets_are_out_of_support_and_identical_ones_are_in(n_ref: int, n_shift: int) -> None:
    disjoint = split(gaussian(n_ref, seed=1), gaussian(n_shift, 3.0, seed=2))
    assert disjoint.out_of_support.mean() > 0.95
    assert disjoint.ref_out_of_support.mean() < 0.05
    assert disjoint.auc > 0.99
    identical = split(gaussian(n_ref, seed=1), gaussian(n_shift, seed=2))
    assert identical.out_of_support.mean() < 0.05
    assert identical.ref_out_of_support.mean() < 0.05
    assert identical.auc_interval[0] < 0.5 < identical.auc_interval[1] + 0.1


def test_of_a_mixture_the_foreign_half_is_out_of_support() -> None:
    shift = np.concatenate([gaussian(300, seed=2), gaussian(300, 3.0, seed=3)])
    found = split(gaussian(600, seed=1), shift)
    assert found.out_of_support[:300].mean() < 0.05
    assert found.out_of_support[300:].mean() > 0.95


def test_calibrated_ratios_are_densities() -> None:
    found = split(gaussian(4000, seed=1), gaussian(2000, 0.5, seed=2))
    shift = gaussian(2000, 0.5, seed=2).astype(np.float64)
    truth = 0.5 * shift.sum(axis=1) - D * 0.5**2 / 2
    slope = np.polyfit(truth, found.shift, 1)[0]
    assert slope == pytest.approx(1, abs=0.15)
    assert abs(float((found.shift - truth).mean())) < 0.2


def test_copies_stay_in_one_fold_and_folds_are_even() -> None:
    shifted = np.arange(200) >= 120
    copies = np.arange(200)
    copies[150:160] = 3  # ten copies of a reference image among the shifted ones
    folds = _folds(shifted, copies, seed=0)
    assert len(set(folds[copies == 3])) == 1
    for fold in range(FOLDS):
        assert 23 <= (~shifted & (folds == fold)).sum() <= 25
        assert 12 <= (shifted & (folds == fold)).sum() <= 26


def test_the_same_seed_gives_the_same_split() -> None:
    ref, shift = gaussian(100), gaussian(100, 0.5)
    np.testing.assert_array_equal(split(ref, shift).shift, split(ref, shift).shift)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        split(gaussian(100), gaussian(19))
    assert caught.value.message == "19 shifted images are too few to tell what is in support"
    assert caught.value.hint == "at least 20 are needed of each set"


def test_features_that_say_nothing_or_are_broken_are_refused() -> None:
    with pytest.raises(TrainingError, match="all images have the same features: the backbone sees nothing"):
        split(np.ones((30, D), np.float32), np.ones((30, D), np.float32))
    broken = gaussian(30)
    broken[3, 2] = np.nan
    with pytest.raises(TrainingError, match="the features of the images are not finite"):
        split(gaussian(30), broken)
