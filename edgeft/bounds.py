"""How large sums of codes can get, and when a runtime that rescales in float32 still gives their integers. Equations: fixedpoint.md."""

import numpy as np
from numpy.typing import NDArray

from edgeft.fixedpoint import FixedPointFormat

INT32_LIMIT = 2**31
FLOAT32_EXACT = 2**24
"""float32 holds every integer up to this one."""

Bounds = NDArray[np.int64]


def accumulator_bounds(weight: NDArray[np.int8], bias: NDArray[np.int32], fmt: FixedPointFormat) -> Bounds:
    """Largest |partial sum| of bias + sum w * x of each output, over any order of summation and any codes x of `fmt` (eq. 13).

    weight [out, ...], bias [out]; the result is [out]. The positive and the negative products are bounded apart, so an unsigned input
    counts half.
    """
    w = weight.astype(np.int64).reshape(len(weight), -1)
    products = np.stack((w * fmt.min_code, w * fmt.max_code))
    high = products.max(0).clip(min=0).sum(1) + np.maximum(bias.astype(np.int64), 0)
    low = products.min(0).clip(max=0).sum(1) + np.minimum(bias.astype(np.int64), 0)
    found: Bounds = np.maximum(high, -low)
    return found


def accumulator_bound(weight: NDArray[np.int8], bias: NDArray[np.int32], fmt: FixedPointFormat) -> int:
    """The largest of `accumulator_bounds`."""
    return int(accumulator_bounds(weight, bias, fmt).max())


def shifted(bounds: Bounds | int, left: Bounds | int) -> Bounds:
    """Bounds in steps that are 2^-left times as large, rounded down; beyond 2^62, where int64 would overflow, 2^62."""
    found: Bounds = np.minimum(np.floor(np.ldexp(np.asarray(bounds, np.float64), left)), 2.0**62).astype(np.int64)
    return found


def largest_code(fmt: FixedPointFormat) -> int:
    """Largest |code| of a format."""
    return max(fmt.max_code, -fmt.min_code)


def exact_in_float32(sums: Bounds, others: Bounds | int, shift: Bounds | int, fmt: FixedPointFormat) -> bool:
    """Whether float32 rounds sums to the codes of `fmt` that integers give, for every input (eq. 14, eq. 22).

    `sums` bounds each sum, `others` all of its summands but the one that is formed first, `shift` is the right shift to the codes.
    A sum that float32 does not hold exactly must saturate, with and without its rounding error.
    """
    bits = fmt.width - int(fmt.signed)
    saturates = FLOAT32_EXACT - np.asarray(others, np.int64) >= 2.0 ** (bits + np.asarray(shift, np.float64))
    return bool(np.all((np.asarray(sums) <= FLOAT32_EXACT) | saturates))
