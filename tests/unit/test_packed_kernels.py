"""Fast C kernels give the codes of the portable ones, on every instruction set that this machine has."""

import ctypes
import shutil
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeft.export.c_packed import MOST_RUNS, narrow_addition, pack, pack_depthwise
from tests.packed import (
    GUARD,
    ISA,
    STORAGE,
    Add,
    AddNarrow,
    PackedConv,
    call,
    conv_params,
    guarded,
    library,
    packed_constants,
)

pytestmark = pytest.mark.cc
LIMITS = [(0, 255), (-128, 127), (0, 127), (-128, 0), (-3, 100)]


@pytest.fixture(scope="module", params=list(ISA))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("NOT TESTED: there is no cc, gcc or clang")
    return library(compiler, request.param, tmp_path_factory.mktemp("kernels"))


@st.composite
def windows(draw: st.DrawFn, *, depthwise: bool, of_3: bool = False) -> dict[str, Any]:
    """Sizes of a convolution that fit each other; `of_3`: those that depthwise kernels are faster for."""
    size = st.integers(1, 3)
    kernel = [3 if of_3 else draw(st.integers(1, 5)) for _ in range(2)]
    stride, dilation = [draw(size) for _ in range(2)], [draw(size), 1 if of_3 else draw(size)]
    pad = [draw(st.integers(0, 2)) for _ in range(4)]
    rows_columns = [draw(st.integers(1, 20)) for _ in range(2)]
    channels = draw(st.sampled_from([1, 3, 16, 24, 63, 64, 65, 130])) if depthwise else draw(st.integers(1, 9))
    groups = channels if depthwise else draw(st.sampled_from([1, 1, 1, 2, 3]))
    n_in = channels if depthwise else channels * groups
    n_out = channels if depthwise else draw(st.sampled_from([1, 7, 16, 24, 33, 48, 144])) * groups
    out = []
    for axis in range(2):
        span = dilation[axis] * (kernel[axis] - 1) + 1
        rows_columns[axis] = max(rows_columns[axis], span - pad[2 * axis] - pad[2 * axis + 1], 1)
        out.append((rows_columns[axis] + pad[2 * axis] + pad[2 * axis + 1] - span) // stride[axis] + 1)
    low, high = draw(st.sampled_from(LIMITS))
    return {
        "in_rows": rows_columns[0], "in_columns": rows_columns[1], "in_channels": n_in, "out_rows": out[0], "out_columns": out[1],
        "out_channels": n_out, "kernel_rows": kernel[0], "kernel_columns": kernel[1], "stride_rows": stride[0], "stride_columns": stride[1],
        "pad_top": pad[0], "pad_left": pad[2], "dilation_rows": dilation[0], "dilation_columns": dilation[1], "groups": groups,
        "in": draw(st.sampled_from(STORAGE)), "rounding": {"shift_step": draw(st.integers(0, 1)), "low": low, "high": high},
    }  # fmt: skip


def layer(params: dict[str, Any], seed: int, shifts: tuple[int, int]) -> tuple[Any, ...]:
    """Codes, weights [out, rows, columns, in / groups], bias and shifts of a random layer; bytes at both ends are frequent."""
    rng = np.random.default_rng(seed)
    n_out, depth = params["out_channels"], params["in_channels"] // params["groups"]
    x = rng.choice([0, 127, 128, 255, *rng.integers(0, 256, 8)], params["in_rows"] * params["in_columns"] * params["in_channels"])
    weight = rng.integers(-127, 128, (n_out, params["kernel_rows"], params["kernel_columns"], depth)).astype(np.int8)
    bias = rng.integers(-(2**12), 2**12, n_out).astype(np.int32)
    return x.astype(np.uint8), weight, bias, rng.integers(*shifts, n_out if params["rounding"]["shift_step"] else 1).astype(np.int8)


MANY = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@MANY
@given(windows(depthwise=False), st.integers(0, 2**32), st.booleans())
def test_a_convolution(built: ctypes.CDLL, params: dict[str, Any], seed: int, wide: bool) -> None:
    if wide:
        params["rounding"] |= {"low": -(2**31), "high": 2**31 - 1}
    x, weight, bias, shift = layer(params, seed, (-3, 1) if wide else (0, 14))
    packed = pack(params, weight, bias, shift, wide=wide)
    per_row = params["kernel_columns"] if params["groups"] > 1 or params["dilation_columns"] > 1 else 1
    assert (packed is None) == (params["kernel_rows"] * per_row > MOST_RUNS)
    assert packed is not None
    assert packed.scratch is not None
    kernel, dtype = ("conv2d_wide", np.int32) if wide else ("conv2d", np.uint8)
    n = params["out_rows"] * params["out_columns"] * params["out_channels"]
    expected, found, scratch = guarded(n, dtype), guarded(n, dtype), guarded(packed.scratch)
    call(getattr(built, f"edgeft_{kernel}"), conv_params(params), x, weight, bias, shift, expected)
    sizes = PackedConv(conv_params(packed.params["conv"]), packed.params["staged_columns"], packed.params["band_rows"])
    name = "conv2d_packed_wide" if wide else "conv2d_packed"
    call(getattr(built, f"edgeft_{name}"), sizes, x, *packed_constants(packed), scratch, found)
    assert np.array_equal(found, expected)
    assert set(scratch[-GUARD:]) == {77}


@MANY
@given(st.one_of(windows(depthwise=True), windows(depthwise=True, of_3=True)), st.integers(0, 2**32))
def test_a_depthwise_convolution(built: ctypes.CDLL, params: dict[str, Any], seed: int) -> None:
    x, weight, bias, shift = layer(params, seed, (0, 12))
    packed = pack_depthwise(params, weight[..., 0], bias, shift)
    assert packed is not None
    n = params["out_rows"] * params["out_columns"] * params["out_channels"]
    expected, found = guarded(n), guarded(n)
    call(built.edgeft_conv2d, conv_params(params), x, weight, bias, shift, expected)
    call(built.edgeft_dwconv2d_packed, conv_params(packed.params), x, *packed_constants(packed), found)
    assert np.array_equal(found, expected)


@MANY
@given(
    st.tuples(st.sampled_from(STORAGE[:2]), st.sampled_from(STORAGE[:2])), st.tuples(st.integers(0, 6), st.integers(0, 6)),
    st.integers(0, 9), st.sampled_from(LIMITS), st.integers(1, 200), st.integers(0, 2**32), st.sampled_from([None, "left", "right"]),
)  # fmt: skip
def test_an_addition(
    built: ctypes.CDLL, storages: tuple[str, str], shifts: tuple[int, int], shift: int, limits: tuple[int, int], n: int, seed: int,
    in_place: str | None,
) -> None:  # fmt: skip
    params = {
        "n": n, "left": storages[0], "right": storages[1], "left_shift": shifts[0], "right_shift": shifts[1], "shift": shift,
        "low": limits[0], "high": limits[1],
    }  # fmt: skip
    narrow = narrow_addition(params)
    largest = 255 * (2 ** shifts[0] + 2 ** shifts[1])
    if narrow is None:
        assert (
            largest + 2**shift + (2 << shift) + 128 * 2 ** (shift + 1) > 2**15
        )  # only sums that come near 16 bits are left to the other kernel
        return
    rng = np.random.default_rng(seed)
    left, right = (np.append(rng.integers(0, 256, n), np.full(GUARD, 77)).astype(np.uint8) for _ in range(2))
    expected = guarded(n)
    numbers = {**params, "left": STORAGE.index(storages[0]), "right": STORAGE.index(storages[1])}
    call(built.edgeft_add, Add(**numbers), left, right, expected)
    found = {"left": left, "right": right, None: guarded(n)}[in_place]
    call(built.edgeft_add_narrow, AddNarrow(**narrow), left, right, found)
    assert np.array_equal(found, expected)


def test_what_the_fast_kernels_leave_to_the_portable_ones() -> None:
    sizes = {"in_channels": 8, "out_channels": 4, "in": "EDGEFT_U8", "rounding": {"shift_step": 0, "low": 0, "high": 255}}
    ones = dict.fromkeys(("in_rows", "in_columns", "out_rows", "out_columns", "kernel_rows", "kernel_columns"), 1)
    more = dict.fromkeys(("stride_rows", "stride_columns", "dilation_rows", "dilation_columns", "groups"), 1)
    params = {**sizes, **ones, **more, "pad_top": 0, "pad_left": 0}
    weight, bias = np.ones((4, 1, 1, 8), np.int8), np.zeros(4, np.int64)
    assert pack(params, weight, bias, np.array([3]), wide=False) is not None
    assert pack(params, weight, bias, np.array([-1]), wide=False) is None
    assert pack(params, weight, bias, np.array([1]), wide=True) is None
    assert pack(params, weight, np.full(4, 2**31 - 1024), np.array([3]), wide=False) is None  # 8 * 255 on top of the bias
    below = pack({**params, "out_rows": 2}, weight, bias, np.array([3]), wide=False)  # a row of padding below is not one of the map's
    assert below is not None
    assert below.params["conv"]["out_rows"] == 2


def test_sums_of_code_plus_128_as_a_compiler_vectorises_them(built: ctypes.CDLL) -> None:
    """gcc 12 takes code - 128 for an unsigned byte when it finds (x - 128) * w with -mavx512vnni."""
    rng = np.random.default_rng(0)
    n = 200
    x, weight = rng.integers(0, 256, n).astype(np.uint8), rng.integers(-127, 128, (1, n)).astype(np.int8)

    class Linear(ctypes.Structure):
        _fields_ = [
            ("in_channels", ctypes.c_int32),
            ("out_channels", ctypes.c_int32),
            ("storage", ctypes.c_int),
            ("rounding", ctypes.c_int32 * 3),
        ]

    for length in range(1, n):
        found = np.zeros(1, np.int32)
        params = Linear(length, 1, STORAGE.index("EDGEFT_OFFSET"), (0, -(2**31), 2**31 - 1))
        call(built.edgeft_linear_wide, params, x, weight[:, :length].copy(), np.zeros(1, np.int32), np.zeros(1, np.int8), found)
        assert found[0] == (x[:length].astype(int) - 128) @ weight[0, :length].astype(int)
