"""The C header equals edgeft.fixedpoint, value for value."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeft import kernels
from edgeft.fixedpoint import FixedPointFormat, requantize, round_shift
from tests.native import compile_shared

pytestmark = pytest.mark.cc

WRAPPER = """
#include "edgeft_fixedpoint.h"
void round_shifts(const int32_t *acc, int32_t shift, int32_t *out, int32_t n);
void requantizes(const int32_t *acc, int32_t shift, int32_t low, int32_t high, int32_t *out, int32_t n);
void round_shifts(const int32_t *acc, int32_t shift, int32_t *out, int32_t n)
{
    for (int32_t i = 0; i < n; i++) { out[i] = edgeft_round_shift(acc[i], shift); }
}
void requantizes(const int32_t *acc, int32_t shift, int32_t low, int32_t high, int32_t *out, int32_t n)
{
    for (int32_t i = 0; i < n; i++) { out[i] = edgeft_requantize(acc[i], shift, low, high); }
}
"""
Ints = NDArray[np.int32]
Call = Callable[..., Ints]

EDGES = np.unique(
    np.clip([sign * (2**bit) + delta for bit in range(32) for sign in (-1, 1) for delta in range(-3, 4)], -(2**31), 2**31 - 1)
).astype(np.int32)
FORMATS = [
    (FixedPointFormat(8, 0, signed=True), False),
    (FixedPointFormat(8, 0, signed=True), True),
    (FixedPointFormat(8, 0, signed=False), True),
    (FixedPointFormat(32, 0, signed=True), False),
]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Call]:
    library = compile_shared(WRAPPER, tmp_path_factory.mktemp("c"))

    def bind(name: str) -> Call:
        def call(acc: Ints, *arguments: int) -> Ints:
            out = np.empty_like(acc)
            pointer = ctypes.POINTER(ctypes.c_int32)
            integers = [ctypes.c_int32(each) for each in arguments]
            getattr(library, name)(acc.ctypes.data_as(pointer), *integers, out.ctypes.data_as(pointer), ctypes.c_int32(acc.size))
            return out

        return call

    return bind


def test_round_shift_equals_python_on_every_edge_and_shift(native: Callable[[str], Call]) -> None:
    for shift in range(32):
        assert np.array_equal(native("round_shifts")(EDGES, shift), round_shift(EDGES.astype(np.int64), shift)), shift


@pytest.mark.parametrize(("fmt", "relu"), FORMATS, ids=["s8", "s8-relu", "u8", "s32"])
def test_requantize_equals_python_on_every_edge_and_shift(native: Callable[[str], Call], fmt: FixedPointFormat, relu: bool) -> None:
    low = 0 if relu else fmt.min_code
    for shift in range(-30, 32):
        expected = requantize(EDGES.astype(np.int64), shift, fmt, relu=relu)
        assert np.array_equal(native("requantizes")(EDGES, shift, low, fmt.max_code), expected), shift


@settings(deadline=None, derandomize=True)
@given(acc=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1), shift=st.integers(-30, 31), case=st.sampled_from(FORMATS))
def test_requantize_equals_python_on_random_accumulators(
    native: Callable[[str], Call], acc: list[int], shift: int, case: tuple[FixedPointFormat, bool]
) -> None:
    fmt, relu = case
    expected = requantize(np.array(acc, np.int64), shift, fmt, relu=relu)
    found = native("requantizes")(np.array(acc, np.int32), shift, 0 if relu else fmt.min_code, fmt.max_code)
    assert np.array_equal(found, expected)


def test_the_header_is_in_the_package() -> None:
    names = [path.name for path in kernels.sources()]
    assert {"edgeft_fixedpoint.h", "edgeft_kernels.h", "conv2d.c"} <= set(names)
    assert kernels.include_dir() == Path(kernels.sources()[names.index("edgeft_fixedpoint.h")]).parent
    assert kernels.source("conv2d.c") in kernels.sources()
