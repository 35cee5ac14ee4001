"""Call fast C kernels and the portable ones that they must equal, on the same random layers."""

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeft import kernels
from edgeft.export.c_packed import Packed

ISA = {
    "portable": "-DEDGEFT_PORTABLE",
    "arm-dsp": "-DEDGEFT_PORTABLE -DEDGEFT_DSP",
    "avx2": "-mavx2",
    "avx512vnni-256": "-mavx2 -mavx512vl -mavx512vnni",
    "avx512vnni": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni",
}
"""Instruction sets that kernels are written for, as the flags that make a compiler use them; of Arm's with its instructions in C."""
STORAGE = ("EDGEFT_U8", "EDGEFT_S8", "EDGEFT_OFFSET")
CONV = (
    *("in_rows", "in_columns", "in_channels", "out_rows", "out_columns", "out_channels", "kernel_rows", "kernel_columns"),
    *("stride_rows", "stride_columns", "pad_top", "pad_left", "dilation_rows", "dilation_columns", "groups"),
)
GUARD = 64
"""Bytes behind an output that must stay as they are."""


class Rounding(ctypes.Structure):
    """Struct edgeft_rounding."""

    _fields_ = [(name, ctypes.c_int32) for name in ("shift_step", "low", "high")]


class Conv(ctypes.Structure):
    """Struct edgeft_conv2d_params."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in CONV),
        ("storage", ctypes.c_int),
        ("rounding", Rounding),
        *((name, ctypes.c_int32) for name in ("ring_first", "ring_rows")),
    ]


class PackedConv(ctypes.Structure):
    """Struct edgeft_conv2d_packed_params."""

    _fields_ = [("conv", Conv), ("staged_columns", ctypes.c_int32), ("band_rows", ctypes.c_int32)]


class Add(ctypes.Structure):
    """Struct edgeft_add_params."""

    _fields_ = [("n", ctypes.c_int32), ("left", ctypes.c_int), ("right", ctypes.c_int)] + [
        (name, ctypes.c_int32) for name in ("left_shift", "right_shift", "shift", "low", "high")
    ]


class AddNarrow(ctypes.Structure):
    """Struct edgeft_add_narrow_params."""

    _fields_ = [
        ("n", ctypes.c_int32),
        *((name, ctypes.c_uint8) for name in ("left_flip", "right_flip")),
        *((name, ctypes.c_uint16) for name in ("left_times", "right_times", "start", "below", "low", "high", "base")),
        ("shift", ctypes.c_int32),
    ]


def library(compiler: str, isa: str, folder: Path) -> ctypes.CDLL:
    """All kernels for an instruction set. Skips, loudly, where compiler or processor do not have it."""
    flags = ISA[isa].split()
    wanted = {flag.removeprefix("-m").replace("avx512vnni", "avx512_vnni") for flag in flags if flag.startswith("-m")}
    cpuinfo = Path("/proc/cpuinfo")
    if not wanted <= set(cpuinfo.read_text().split() if cpuinfo.is_file() else ()):
        pytest.skip(f"NOT TESTED: this processor does not have {isa}")
    file = folder / f"{isa}.so"
    files = [str(path) for path in kernels.sources() if path.suffix == ".c"]
    command = [compiler, "-std=c99", "-O2", *flags, "-shared", "-fPIC", f"-I{kernels.include_dir()}", *files, "-o", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(file))


def call(run: Any, params: ctypes.Structure, *arrays: NDArray[Any] | None) -> None:
    """Call a kernel. Fails the test when it does not return EDGEFT_OK."""
    pointers = [ctypes.c_void_p(None if each is None else np.ascontiguousarray(each).ctypes.data) for each in arrays]
    assert all(each is None or each.flags["C_CONTIGUOUS"] for each in arrays)
    assert run(ctypes.byref(params), *pointers) == 0


def conv_params(params: dict[str, Any]) -> Conv:
    """The structure for the parameters of a plan."""
    sizes = [params[name] for name in CONV]
    return Conv(*sizes, STORAGE.index(params["in"]), Rounding(**params["rounding"]))


def packed_constants(packed: Packed) -> tuple[NDArray[np.int8], NDArray[np.int32], NDArray[np.int8]]:
    """Weights, bias and shifts in memory as the kernel reads them."""
    return (
        np.ascontiguousarray(packed.weight), np.ascontiguousarray(packed.bias, np.int32), np.ascontiguousarray(packed.shift, np.int8),
    )  # fmt: skip


def guarded(n: int, dtype: type = np.uint8) -> NDArray[Any]:
    """Room for n numbers, and some behind them."""
    return np.full(n + GUARD, 77, dtype)
