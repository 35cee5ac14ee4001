import math

import numpy as np
import pytest

from edgeft.fixedpoint import FixedPointFormat, dequantize, quantize
from edgeft.quant.f8net import (
    EMPTY_FRAC,
    GRID,
    SIGNED_STD,
    UNSIGNED_STD,
    grid_frac,
    minmax_frac,
    spread,
    std_constant,
    std_frac,
)
from edgeft.quant.formats import weight_format

SIGNED = [(0.2, 7), (0.5, 6), (1.0, 5), (2, 4), (4, 3), (8, 2), (15, 1), (30, 0)]
UNSIGNED = [(0.2, 8), (0.4, 7), (1.0, 6), (2, 5), (4, 4), (8, 3), (15, 2), (30, 1), (50, 0)]
S8, U8 = FixedPointFormat(8, 0, signed=True), FixedPointFormat(8, 0, signed=False)


def with_frac(fmt: FixedPointFormat, frac: int) -> FixedPointFormat:
    return FixedPointFormat(fmt.width, frac, fmt.signed, fmt.narrow)


def loss(x: np.ndarray, fmt: FixedPointFormat, frac: int) -> float:
    trial = with_frac(fmt, frac)
    return float(np.square(dequantize(quantize(x, trial), trial) - x).sum())


@pytest.mark.parametrize(("sigma", "frac"), SIGNED)
def test_published_signed_reference_points(sigma: float, frac: int) -> None:
    assert std_frac(sigma, SIGNED_STD) == frac


@pytest.mark.parametrize(("sigma", "frac"), UNSIGNED)
def test_published_unsigned_reference_points(sigma: float, frac: int) -> None:
    assert std_frac(sigma, UNSIGNED_STD) == frac


@pytest.mark.parametrize("frac", [-3, 0, 5, 12])
@pytest.mark.parametrize("constant", [SIGNED_STD, UNSIGNED_STD])
def test_fraction_changes_at_the_threshold(constant: float, frac: int) -> None:
    threshold = constant * 2.0**-frac
    assert std_frac(threshold, constant) == frac
    assert std_frac(threshold * 1.0001, constant) == frac - 1
    assert std_frac(threshold * 0.9999, constant) == frac


def test_fraction_is_not_clamped_to_the_published_range() -> None:
    assert std_frac(1e-3, SIGNED_STD) == 15
    assert std_frac(1e3, SIGNED_STD) == -5


def test_constants_by_storage() -> None:
    assert std_constant(S8, relu=False) == 40
    assert std_constant(U8, relu=True) == 70
    assert std_constant(S8, relu=True) == 35  # half the codes of an unsigned tensor: one bit less at the same sigma


@pytest.mark.parametrize(("fmt", "relu"), [(S8, False), (U8, True), (S8, True)], ids=["signed", "unsigned", "signed-relu"])
@pytest.mark.parametrize("offset", [0.15, 0.5, 0.85])
def test_rule_has_the_least_error_on_gaussians_away_from_thresholds(fmt: FixedPointFormat, relu: bool, offset: float) -> None:
    constant = std_constant(fmt, relu=relu)
    for frac in (-2, 3, 6):
        low, high = constant * 2.0 ** -(frac + 1) * 1.15, constant * 2.0**-frac / 1.15
        sigma = low * (high / low) ** offset
        x = np.random.default_rng(3).normal(0.0, sigma, 200_000)
        x = np.maximum(x, 0.0) if relu else x
        errors = {trial: loss(x, fmt, trial) for trial in range(frac - 4, frac + 5)}
        assert min(errors, key=lambda trial: errors[trial]) == frac == std_frac(sigma, constant)


@pytest.mark.parametrize("fmt", [S8, U8, weight_format(0)], ids=str)
def test_minmax_saturates_nothing_and_wastes_no_bit(fmt: FixedPointFormat) -> None:
    rng = np.random.default_rng(0)
    for peak in [*np.exp(rng.uniform(-20, 20, 200)), 127.0, 255.0, 127 / 64, 1.0, 2.0]:
        frac = minmax_frac(peak, fmt.max_code)
        assert np.rint(peak * 2.0**frac) <= fmt.max_code
        assert peak * 2.0 ** (frac + 1) > fmt.max_code


@pytest.mark.parametrize(("fmt", "relu"), [(S8, False), (U8, True), (weight_format(0), False)], ids=["s8", "u8", "w8"])
def test_grid_finds_the_least_error(fmt: FixedPointFormat, relu: bool) -> None:
    rng = np.random.default_rng(1)
    found = set()
    for draw in (rng.normal(0.3, 1, 5000), rng.laplace(0, 3, 5000), rng.standard_t(2, 5000), rng.uniform(-1, 1, 5000)):
        kept = np.maximum(draw, 0) if relu else draw
        start = minmax_frac(float(np.abs(kept).max()), fmt.max_code)
        frac = grid_frac(draw, fmt, relu=relu)
        errors = [loss(kept, fmt, trial) for trial in range(start - 3, start + GRID)]
        assert errors[frac - start + 3] == min(errors)
        found.add(frac - start)
    assert len(found) > 1  # long tails are worth saturating, flat ones are not


def test_grid_takes_the_smaller_fraction_on_ties() -> None:
    assert grid_frac(np.array([64.0]), S8, relu=False) == 0  # 64 is exact at fraction 0, and saturates above


@pytest.mark.parametrize("x", [np.zeros(10), np.zeros(0)], ids=["zeros", "empty"])
def test_nothing_to_represent(x: np.ndarray) -> None:
    assert minmax_frac(float(np.abs(x).max(initial=0.0)), 127) == EMPTY_FRAC
    assert std_frac(0.0, SIGNED_STD) == EMPTY_FRAC
    assert EMPTY_FRAC <= grid_frac(x, S8, relu=False) < EMPTY_FRAC + GRID


def test_rectified_grid_ignores_what_the_relu_removes() -> None:
    x = np.concatenate([np.full(10, -1000.0), np.linspace(0, 1, 1000)])
    assert grid_frac(x, U8, relu=True) == grid_frac(np.linspace(0, 1, 1000), U8, relu=True) == 8


def test_spread_is_the_deviation_of_centred_values() -> None:
    assert spread(0.0, 0.7) == 0.7
    assert spread(-1.0, 1.0) == 1.0
    assert spread(-100.0, 1.0, relu=True) == 1.0  # the mean lies where the rectifier cuts


@pytest.mark.parametrize("mean", [-5.0, 3.0, 0.1, 1e-6, 127 / 64])
@pytest.mark.parametrize("deviation", [0.0, 1e-17, 1e-3])
def test_spread_keeps_constants_in_range(mean: float, deviation: float) -> None:
    sigma = spread(mean, deviation)
    for fmt, constant in ((S8, SIGNED_STD), (U8, UNSIGNED_STD)):
        frac = std_frac(sigma, constant)
        assert abs(mean) * 2.0**frac <= fmt.max_code * (1 + 1e-12)
        if deviation < 1e-3 * abs(mean):
            assert math.log2(fmt.max_code / abs(mean)) - frac < 2
