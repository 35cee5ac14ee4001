"""Weights in the order in which the fast C kernels read them, and how those kernels go through a map.

The layout is described in kernels/include/edgeft_kernels.h at edgeft_conv2d_packed_params. Equation numbers: fixedpoint.md.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeft.bounds import INT32_LIMIT

BLOCK = 16
"""Output channels whose weights lie side by side."""
QUAD = 4
"""Products that one instruction adds up."""
MOST_RUNS = 64
"""EDGEFT_RUNS of edgeft_packed.h."""
SLACK = 64
"""EDGEFT_SLACK of edgeft_kernels.h."""
BAND_BYTES = 48 * 1024
"""Rows that are staged at a time, read once for every block of output channels: what a cache of 1st or 2nd level holds."""
LONGEST_SHIFT = 31
LONGEST_NARROW_SHIFT = 14
UINT16_MOST = 2**16 - 1
DEPTH = 64
"""Channels that a depthwise convolution takes at a time."""
MOST_ROWS = 16
"""EDGEFT_MOST_ROWS of edgeft_kernels.h."""


@dataclass(frozen=True)
class Window:
    """Sizes of a convolution as the parameters of the C kernels name them, and how its input is stored."""

    params: dict[str, Any]

    def __getitem__(self, name: str) -> int:
        value: int = self.params[name]
        return value

    @property
    def runs_per_row(self) -> int:
        """Taps of a row are neighbours in memory, unless something lies between them."""
        return 1 if self["dilation_columns"] == 1 and self["groups"] == 1 else self["kernel_columns"]

    @property
    def reach(self) -> int:
        """Columns from the first tap of the first window to the last tap of the last one."""
        return (self["out_columns"] - 1) * self["stride_columns"] + (self["kernel_columns"] - 1) * self["dilation_columns"] + 1

    @property
    def reach_rows(self) -> int:
        """The same for rows."""
        return (self["out_rows"] - 1) * self["stride_rows"] + (self["kernel_rows"] - 1) * self["dilation_rows"] + 1

    @property
    def run_bytes(self) -> int:
        """Codes that are neighbours in memory."""
        return (self["kernel_columns"] if self.runs_per_row == 1 else 1) * (self["in_channels"] // self["groups"])

    def is_staged(self) -> bool:
        """Whether the kernel cannot read the input where it is."""
        beyond_columns = self["pad_left"] > 0 or self.reach > self["in_columns"]
        beyond_rows = self["pad_top"] > 0 or self.reach_rows > self["in_rows"]
        storage = self.params["in"]
        return beyond_columns or storage == "EDGEFT_S8" or (storage != "EDGEFT_U8" and beyond_rows) or self.run_bytes % QUAD != 0

    def staged_bytes(self, band_rows: int) -> int:
        """Bytes of the rows that a band of output rows reads."""
        rows = (band_rows - 1) * self["stride_rows"] + (self["kernel_rows"] - 1) * self["dilation_rows"] + 1
        return rows * self.reach * self["in_channels"]


@dataclass(frozen=True)
class Packed:
    """Parameters, weights, bias and shifts as a fast kernel reads them, and bytes of scratch if it takes some."""

    params: dict[str, Any]
    weight: NDArray[np.int8]
    bias: NDArray[np.int64]
    shift: NDArray[np.int64]
    scratch: int | None


def pack(
    params: dict[str, Any], weight: NDArray[np.int8], bias: NDArray[np.int64], shift: NDArray[np.int64], *, wide: bool
) -> Packed | None:
    """A convolution for the fast kernel; None where it does not take it: shifts in the wrong direction, sums or windows that are too large.

    `weight` [out, kernel_rows, kernel_columns, in / groups]; `bias` [out]; `shift` [out] or [1], to the right; `params` those of
    edgeft_conv2d.
    """
    window = Window(_as_rows(params))
    shift = np.broadcast_to(shift.astype(np.int64), (len(weight),))
    least, most = (-LONGEST_SHIFT + 1, 0) if wide else (0, LONGEST_SHIFT)
    if window["kernel_rows"] * window.runs_per_row > MOST_RUNS or shift.min() < least or shift.max() > most:
        return None
    folded = _folded(window, weight, bias, shift, wide=wide)
    if folded is None:
        return None
    staged, band = window.is_staged(), window["out_rows"]
    while staged and band > 1 and window.staged_bytes(band) > BAND_BYTES:
        band -= 1
    groups = window["groups"]
    rounding = {**window.params["rounding"], "shift_step": 1}
    sizes = {"conv": {**window.params, "rounding": rounding}, "staged_columns": window.reach if staged else 0, "band_rows": band}
    scratch = window.staged_bytes(band) + SLACK if staged else 0
    return Packed(sizes, _blocks(window, weight), _filled(folded, groups), _filled(shift, groups), scratch)


def pack_depthwise(params: dict[str, Any], weight: NDArray[np.int8], bias: NDArray[np.int64], shift: NDArray[np.int64]) -> Packed | None:
    """A depthwise convolution for the fast kernel; None where it does not take it. `weight` [channels, kernel_rows, kernel_columns]."""
    window = Window(_spread(params))
    times = window["in_channels"] // len(weight)
    weight, bias = np.tile(weight, (times, 1, 1)), np.tile(bias.astype(np.int64), times)
    shift = np.tile(np.broadcast_to(shift.astype(np.int64), (len(weight) // times,)), times)
    folded = _folded(window, weight, bias, shift, wide=False)
    if window["kernel_rows"] > MOST_ROWS or shift.min() < 0 or shift.max() > LONGEST_SHIFT or folded is None:
        return None
    sets, columns = -(-window["kernel_rows"] // QUAD), window["kernel_columns"]
    full = np.zeros((-(-len(weight) // DEPTH) * DEPTH, sets * QUAD, columns), np.int8)
    full[: len(weight), : weight.shape[1]] = weight
    lanes = full.reshape(-1, 4, 4, 4, sets, QUAD, columns)  # block, l, j, i: channel 16 l + 4 j + i
    sizes = {**window.params, "rounding": {**window.params["rounding"], "shift_step": 1}}
    return Packed(sizes, lanes.transpose(0, 6, 4, 2, 1, 3, 5), _in_lanes(folded), _in_lanes(shift), None)


def _spread(params: dict[str, Any]) -> dict[str, Any]:
    """A pixel-wise layer of few channels as one of several times as many channels and as many times fewer pixels."""
    if params["kernel_rows"] != 1 or params["kernel_columns"] != 1 or params["in_rows"] != params["out_rows"] or params["pad_top"]:
        return params
    pixels, channels = params["in_rows"] * params["in_columns"], params["in_channels"]
    if params["in_columns"] != params["out_columns"] or params["pad_left"] or channels >= DEPTH:
        return params
    times = max(n for n in range(1, DEPTH + 1) if pixels % n == 0)
    sizes = {"in_rows": 1, "out_rows": 1, "in_columns": pixels // times, "out_columns": pixels // times}
    return {**params, **sizes, **dict.fromkeys(("in_channels", "out_channels", "groups"), channels * times)}


def _in_lanes(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """One entry per channel in the order of the accumulators, filled up with zeros."""
    return np.pad(values, (0, -len(values) % DEPTH)).reshape(-1, 4, 4, 4).transpose(0, 2, 1, 3)


def matrix_product(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters of edgeft_linear as those of a convolution of one pixel."""
    ones = ("in_rows", "in_columns", "out_rows", "out_columns", "kernel_rows", "kernel_columns", "stride_rows", "stride_columns")
    more = {"dilation_rows": 1, "dilation_columns": 1, "groups": 1, "pad_top": 0, "pad_left": 0}
    return {**dict.fromkeys(ones, 1), **more, **params}


def _as_rows(params: dict[str, Any]) -> dict[str, Any]:
    """A 1x1 convolution as few long rows: tiles of pixels do not end where a row of the map does.

    Rows that are staged stay short enough for a band.
    """
    ones = ("kernel_rows", "kernel_columns", "stride_rows", "stride_columns")
    padded = params["pad_top"] or params["pad_left"] or any(params[f"in_{side}"] != params[f"out_{side}"] for side in ("rows", "columns"))
    if padded or any(params[name] != 1 for name in ones):
        return params
    pixels = params["in_rows"] * params["in_columns"]
    most = BAND_BYTES // params["in_channels"] if Window(params).is_staged() else pixels
    columns = max(n for n in range(1, pixels + 1) if pixels % n == 0 and (n <= most or n == 1))
    sizes = {"in_rows": pixels // columns, "in_columns": columns, "out_rows": pixels // columns, "out_columns": columns}
    return {**params, **sizes}


def _folded(
    window: Window, weight: NDArray[np.int8], bias: NDArray[np.int64], shift: NDArray[np.int64], *, wide: bool
) -> NDArray[np.int64] | None:
    """The bias with all that is constant: for inputs of code + 128, for half a step of rounding, and for codes that may be negative.

    None where sums could reach 2^31.
    """
    rows = weight.astype(np.int64).reshape(len(weight), -1)
    folded = bias.astype(np.int64) - (0 if window.params["in"] == "EDGEFT_U8" else 128 * rows.sum(1))
    if not wide:
        folded += np.where(shift > 0, (1 << shift) >> 1, 0)
        folded += 128 << shift if window.params["rounding"]["low"] < 0 else 0
    return folded if int((255 * np.abs(rows).sum(1) + np.abs(folded)).max()) < INT32_LIMIT else None


def _blocks(window: Window, weight: NDArray[np.int8]) -> NDArray[np.int8]:
    """Weights as [groups, blocks, runs, quads, 16, 4]."""
    groups, n_runs = window["groups"], window["kernel_rows"] * window.runs_per_row
    runs = weight.reshape(groups, -1, n_runs, window.run_bytes)
    n_blocks, n_quads = -(-runs.shape[1] // BLOCK), -(-window.run_bytes // QUAD)
    full = np.zeros((groups, n_blocks * BLOCK, n_runs, n_quads * QUAD), np.int8)
    full[:, : runs.shape[1], :, : window.run_bytes] = runs
    return full.reshape(groups, n_blocks, BLOCK, n_runs, n_quads, QUAD).transpose(0, 1, 3, 4, 2, 5)


def _filled(values: NDArray[np.int64], groups: int) -> NDArray[np.int64]:
    """One entry per output channel as [groups, blocks * 16]."""
    rows = values.reshape(groups, -1)
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % BLOCK)))


def narrow_addition(params: dict[str, Any]) -> dict[str, Any] | None:
    """Parameters of edgeft_add_narrow for those of edgeft_add; None where 16 bits do not hold the sum."""
    shift = params["shift"]
    sides = [(params[side], 1 << params[f"{side}_shift"]) for side in ("left", "right")]
    offset = sum(0 if storage == "EDGEFT_U8" else 128 * times for storage, times in sides)
    most = 255 * sum(times for _, times in sides)
    if not 0 <= shift <= LONGEST_NARROW_SHIFT:
        return None
    base = -(-max(offset, -params["low"] << shift) // (2 << shift)) * 2  # in steps: as many as what is below 0, an even number
    start = (base << shift) - offset
    if start + most + (1 << shift) > UINT16_MOST or base + params["high"] > UINT16_MOST:
        return None
    flips = {f"{side}_flip": 128 if params[side] == "EDGEFT_S8" else 0 for side in ("left", "right")}
    return {
        "n": params["n"], **flips, "left_times": sides[0][1], "right_times": sides[1][1], "start": start,
        "below": (1 << shift) // 2 - 1 if shift else 0, "low": base + params["low"], "high": base + params["high"], "base": base,
        "shift": shift,
    }  # fmt: skip
