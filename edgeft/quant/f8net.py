"""F8Net's choice of a format from statistics (Jin et al., ICLR 2022, arXiv:2202.05239), and two alternatives. No torch.

The constants come from the published error analysis: with c / sigma between 2^frac and 2^(frac + 1), quantizing a Gaussian of
deviation sigma at `frac` has (nearly) the smallest relative error.
"""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeft.fixedpoint import FixedPointFormat, dequantize, quantize

Rule = Literal["std", "grid", "l4", "minmax"]
POWERS: dict[Rule, int] = {"grid": 2, "l4": 4}
"""Rules that look for the fraction of least error, and the power of a value's error that they sum.

The fourth power saturates less than the square does. What saturates errs in one direction, in many channels at once, and most on images
unlike those of calibration; what is rounded averages out in the next sum. Fitting a step size by an L_p norm: Nahshan et al.,
arXiv:1911.07190.
"""

SIGNED_STD = 40.0
"""c of signed 8-bit values."""
UNSIGNED_STD = 70.0
"""c of unsigned 8-bit values, with sigma that of the value *before* rectification."""
UNSIGNED_RMS = 50.0
"""c of unsigned 8-bit values for the root mean square of the already rectified value."""
REACH = 127.0 / SIGNED_STD
"""Deviations that the range of a chosen format covers at the least."""
EMPTY_FRAC = 7
"""Fraction of a tensor that is zero everywhere: any will do."""
GRID = 5
"""Fractions that the grid search tries, upwards from the largest that saturates nothing."""


def octaves(constant: float, sigma: float) -> float:
    """log2(c / sigma); its floor is the fraction."""
    return math.log2(constant / sigma)


def spread(mean: float, deviation: float, *, relu: bool = False) -> float:
    """Deviation to give to the rule, which takes the mean for 0: the tensor's own, or more where the mean is far from 0.

    As much as keeps |mean| + 2 deviations in range; without this a (nearly) constant tensor would saturate altogether. With
    `relu`, mean and deviation are those before rectification, and a mean below 0 does no harm.
    """
    centre = max(mean, 0.0) if relu else abs(mean)
    return max(deviation, (centre + 2.0 * deviation) / REACH)


def std_constant(fmt: FixedPointFormat, *, relu: bool) -> float:
    """c for the deviation before rectification. A rectified value in a signed format has half the codes of an unsigned one."""
    if not fmt.signed:
        return UNSIGNED_STD
    return UNSIGNED_STD / 2.0 if relu else SIGNED_STD


def minmax_frac(peak: float, max_code: int) -> int:
    """Largest fraction at which `peak` does not saturate."""
    return math.floor(math.log2(max_code / peak)) if peak > 0 else EMPTY_FRAC


def relative_error(sample: NDArray[np.float64], fmt: FixedPointFormat, power: int) -> float:
    """Sum of the errors of storing `sample` in a format over the sum of its values, both to an even `power`; 0 for zeros."""
    size = float((sample**power).sum())
    return float(((dequantize(quantize(sample, fmt), fmt) - sample) ** power).sum()) / size if size > 0.0 else 0.0


def grid_frac(sample: NDArray[np.float64], fmt: FixedPointFormat, *, relu: bool, power: int = 2) -> int:
    """Fraction of least error to the rectified `sample`, among GRID candidates; ties go to the smaller one."""
    wanted = np.maximum(sample, 0.0) if relu else sample
    start = minmax_frac(float(np.abs(wanted).max(initial=0.0)), fmt.max_code)
    trials = [FixedPointFormat(fmt.width, frac, fmt.signed, fmt.narrow) for frac in range(start, start + GRID)]
    return start + int(np.argmin([relative_error(wanted, trial, power) for trial in trials]))


def std_frac(sigma: float, constant: float) -> int:
    """floor(log2(c / sigma)), F8Net eq. for the fractional length, without the published clamp to 0 ... 8."""
    return math.floor(octaves(constant, sigma)) if sigma > 0 else EMPTY_FRAC
