import doctest
import re
from importlib.resources import files

import numpy as np
import pytest

from edgeft.errors import ConfigError
from edgeft.fixedpoint import FixedPointFormat, dequantize, quantize, requantize, round_shift

DOCUMENT = files("edgeft").joinpath("fixedpoint.md").read_text()


def test_the_examples_of_the_document_run() -> None:
    examples = doctest.DocTestParser().get_doctest(DOCUMENT, {}, "fixedpoint.md", None, 0)
    result = doctest.DocTestRunner().run(examples)
    assert result.failed == 0
    assert result.attempted >= 15


def test_the_rounding_table_of_the_document_is_right() -> None:
    rows = re.findall(r"^\| (-?\d+) \| (\d) \| (-?[\d.]+) \| (-?\d+) \| (-?\d+) \| (-?\d+) \| (-?\d+) \|$", DOCUMENT, re.M)
    assert len(rows) == 9
    for row in rows:
        a, k, quotient, even, up, away, floor = (float(each) for each in row)
        assert quotient == a / 2**k
        assert (even, up, floor) == (round(quotient), np.floor(quotient + 0.5), np.floor(quotient))
        assert away == np.sign(quotient) * np.floor(abs(quotient) + 0.5)
        assert round_shift(np.array(int(a)), int(k)) == even


def test_equations_are_numbered_without_gaps() -> None:
    numbers = [int(each) for each in re.findall(r"^    \((\d+)\)", DOCUMENT, re.M)]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("s8.5", -128, 127), ("w8.7", -127, 127), ("u8.-3", 0, 255), ("s32.13", -(2**31), 2**31 - 1), ("u2.0", 0, 3)],
)
def test_ranges(text: str, low: int, high: int) -> None:
    fmt = FixedPointFormat.parse(text)
    assert (fmt.min_code, fmt.max_code) == (low, high)
    assert fmt.max_value == high * 2.0**-fmt.frac


@pytest.mark.parametrize("text", ["", "s8", "x8.5", "s8.5 ", "s8.5.1", "u-8.5"])
def test_parse_refuses_other_text(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^'{re.escape(text)}' is not a fixed-point format$"):
        FixedPointFormat.parse(text)


@pytest.mark.parametrize(("width", "signed", "narrow"), [(1, True, False), (33, True, False), (8, False, True)])
def test_impossible_formats_are_refused(width: int, signed: bool, narrow: bool) -> None:
    with pytest.raises(ConfigError):
        FixedPointFormat(width, 0, signed=signed, narrow=narrow)


def test_shift_broadcasts_per_channel() -> None:
    acc = np.array([[5, 5], [-6, -6]])
    assert round_shift(acc, np.array([[1], [2]])).tolist() == [[2, 2], [-2, -2]]


@pytest.mark.parametrize(("shift", "expected"), [(31, [-1, 1, 0]), (32, [0, 0, 0]), (200, [0, 0, 0]), (-200, [-128, 127, 127])])
def test_requantize_takes_any_shift(shift: int, expected: list[int]) -> None:
    acc = np.array([-(2**31), 2**31 - 1, 1])
    assert requantize(acc, shift, FixedPointFormat.parse("s8.0"), relu=False).tolist() == expected


def test_relu_raises_the_lower_bound_only() -> None:
    fmt = FixedPointFormat.parse("s8.0")
    acc = np.array([-300, -1, 0, 1, 300])
    assert requantize(acc, 0, fmt, relu=False).tolist() == [-128, -1, 0, 1, 127]
    assert requantize(acc, 0, fmt, relu=True).tolist() == [0, 0, 0, 1, 127]


def test_quantize_saturates_and_dequantize_inverts() -> None:
    fmt = FixedPointFormat.parse("w8.7")
    codes = np.arange(-127, 128)
    assert np.array_equal(quantize(dequantize(codes, fmt), fmt), codes)
    assert quantize(np.array([-1.0, 1.0]), fmt).tolist() == [-127, 127]
