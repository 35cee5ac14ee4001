"""FixedPointFormat; round, saturate, requantize. numpy only. Equations: fixedpoint.md beside this file."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeft.errors import ConfigError

MIN_WIDTH, MAX_WIDTH = 2, 32
_TEXT = re.compile(r"^([suw])(\d+)\.(-?\d+)$")


@dataclass(frozen=True)
class FixedPointFormat:
    """A number format: value = code * 2^-frac (eq. 1), with `width` bits.

    Signed codes run over the full two's-complement range, unless `narrow` drops the lowest one (weights: -127 ... 127).
    `frac` may be negative or larger than the width: it is only a shift constant.
    The text form is "s8.5" (signed), "u8.6" (unsigned) or "w8.7" (signed, narrow) and parses back.
    """

    width: int
    frac: int
    signed: bool
    narrow: bool = False

    def __post_init__(self) -> None:
        if not MIN_WIDTH <= self.width <= MAX_WIDTH:
            raise ConfigError(f"width {self.width} is not in {MIN_WIDTH} ... {MAX_WIDTH}")
        if self.narrow and not self.signed:
            raise ConfigError("an unsigned format cannot be narrow")

    @property
    def min_code(self) -> int:
        """Smallest code."""
        return -(1 << (self.width - 1)) + int(self.narrow) if self.signed else 0

    @property
    def max_code(self) -> int:
        """Largest code."""
        return (1 << (self.width - int(self.signed))) - 1

    @property
    def step(self) -> float:
        """Real value of one code step, 2^-frac."""
        return 2.0**-self.frac

    @property
    def max_value(self) -> float:
        """Largest real value."""
        return self.max_code * self.step

    def __str__(self) -> str:
        kind = "w" if self.narrow else "s" if self.signed else "u"
        return f"{kind}{self.width}.{self.frac}"

    @classmethod
    def parse(cls, text: str) -> "FixedPointFormat":
        """Inverse of str(). Raises ConfigError when `text` is not a format."""
        match = _TEXT.match(text)
        if match is None:
            raise ConfigError(f"'{text}' is not a fixed-point format", "examples: s8.5, u8.6, w8.7")
        kind, width, frac = match.group(1), int(match.group(2)), int(match.group(3))
        return cls(width, frac, signed=kind != "u", narrow=kind == "w")


def quantize(x: NDArray[np.floating[Any]], fmt: FixedPointFormat) -> NDArray[np.int64]:
    """Codes of real values: scale by 2^frac, round half to even, saturate (eq. 2)."""
    codes = np.rint(np.ldexp(np.asarray(x, np.float64), fmt.frac))
    return np.clip(codes, fmt.min_code, fmt.max_code).astype(np.int64)


def dequantize(codes: NDArray[np.integer[Any]], fmt: FixedPointFormat) -> NDArray[np.float64]:
    """Real values of codes (eq. 1)."""
    return np.ldexp(np.asarray(codes, np.float64), -fmt.frac)


def round_shift(acc: NDArray[np.int64], shift: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Divide by 2^shift, rounding half to even (eq. 3); a shift <= 0 multiplies. `shift` broadcasts against `acc`."""
    acc = np.asarray(acc, np.int64)
    k = np.asarray(shift, np.int64)
    right, left = np.maximum(k, 0), np.maximum(-k, 0)
    half_minus_one = np.where(right > 0, (np.int64(1) << np.maximum(right - 1, 0)) - 1, 0)
    odd = np.where(right > 0, (acc >> right) & 1, 0)
    return np.asarray(((acc + half_minus_one + odd) >> right) << left)


def requantize(acc: NDArray[np.int64], shift: NDArray[np.int64] | int, fmt: FixedPointFormat, *, relu: bool) -> NDArray[np.int64]:
    """Accumulator to codes of `fmt`: one rounding shift, then saturation; `relu` raises the lower bound to 0 (eq. 4)."""
    # 32-bit accumulators: a longer right shift gives 0 as well, a longer left shift saturates as well; int64 holds these.
    rounded = round_shift(acc, np.clip(shift, -32, 32))
    return np.clip(rounded, max(fmt.min_code, 0) if relu else fmt.min_code, fmt.max_code)
