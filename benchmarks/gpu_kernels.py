"""Rounding on a GPU: one tensor, forward and backward, by Triton, by elementwise operations and by PyTorch's own operator."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_steps import synchronize
from edgeft.bench.timing import shuffled
from edgeft.errors import VerificationError
from edgeft.progress import Progress
from edgeft.quant.fakequant import (
    RoundFused,
    RoundPerChannel,
    RoundSaturate,
    has_fused_kernels,
    mask_bounds,
    power_of_two,
    round_constant,
)

FUSED, ELEMENTWISE, TORCH = "Triton", "elementwise operations", "torch.fake_quantize"
FRAC, LOW, HIGH = 5, -128, 127
TENSORS = {
    "activation": ((128, 64, 56, 56), False),
    "small activation": ((128, 160, 7, 7), False),
    "weight per channel": ((512, 512, 3, 3), True),
}
"""Shape of each tensor, and whether each entry of its first axis has a format of its own."""
N_CALLS = 20
WARM_UP_CALLS = 3

Rounding = Callable[[Tensor], Tensor]


def roundings(shape: tuple[int, ...], per_channel: bool, device: torch.device) -> dict[str, Rounding]:
    """The ways to round a tensor of that shape on that device."""
    fracs = torch.full((shape[0], 1, 1, 1) if per_channel else (), float(FRAC), device=device)
    scale, step = power_of_two(fracs), power_of_two(-fracs)
    constants = LOW * 2.0**-FRAC, HIGH * 2.0**-FRAC, round_constant(FRAC), *mask_bounds(LOW, HIGH, FRAC, relu=False)
    zeros = torch.zeros(shape[0], dtype=torch.int32, device=device)
    found: dict[str, Rounding] = {}
    if has_fused_kernels(device):
        found[FUSED] = lambda x: RoundFused.apply(x, scale, step, LOW, HIGH, False)
    if per_channel:
        found[ELEMENTWISE] = lambda x: RoundPerChannel.apply(x, scale, LOW, HIGH)
        found[TORCH] = lambda x: torch.fake_quantize_per_channel_affine(x, step.flatten(), zeros, 0, LOW, HIGH)
    else:
        found[ELEMENTWISE] = lambda x: RoundSaturate.apply(x, *constants)
        found[TORCH] = lambda x: torch.fake_quantize_per_tensor_affine(x, 2.0**-FRAC, 0, LOW, HIGH)
    return found


def measure(name: str, device: torch.device, *, n_rounds: int, progress: Progress) -> dict[str, Any]:
    """Interleaved rounds of N_CALLS calls, each forward and backward; a JSON-able record.

    Raises VerificationError when the kernels and the elementwise operations differ in a value or a gradient.
    """
    shape, per_channel = TENSORS[name]
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(device, memory_format=torch.channels_last)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, memory_format=torch.channels_last)
    ways = roundings(shape, per_channel, device)
    compare(name, ways, x, grad)
    us: dict[str, list[float]] = {way: [] for way in ways}
    for order in shuffled(list(ways), n_rounds):
        for way in order:
            us[way].append(_us_per_call(ways[way], x, grad))
    for way, times in us.items():
        progress.line(f"{name}, {way}: {np.median(times):.0f} us")
    return {"tensor": name, "shape": list(shape), "us": us}


def compare(name: str, ways: dict[str, Rounding], x: Tensor, grad: Tensor) -> None:
    """Raise VerificationError when the kernels, where there are any, give another value or gradient than the elementwise operations."""
    if FUSED not in ways:
        return
    for what, one, other in zip(("value", "gradient"), _both(ways[FUSED], x, grad), _both(ways[ELEMENTWISE], x, grad), strict=True):
        n = int((one != other).sum())
        if n:
            raise VerificationError(f"{name}: the Triton kernels differ from the elementwise operations in {n} {what}s of {x.numel()}")


def _both(way: Rounding, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    out = way(leaf)
    (gradient,) = torch.autograd.grad(out, leaf, grad)
    return out.detach(), gradient


def _us_per_call(way: Rounding, x: Tensor, grad: Tensor) -> float:
    for _ in range(WARM_UP_CALLS):
        _both(way, x, grad)
    synchronize(x.device)
    start = time.perf_counter()
    for _ in range(N_CALLS):
        _both(way, x, grad)
    synchronize(x.device)
    return 1e6 * (time.perf_counter() - start) / N_CALLS


def rows_of(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Table rows: median times, and the median over the rounds of the ratio to the elementwise operations of the same round."""
    us = {way: np.array(times) for way, times in record["us"].items()}
    size = " x ".join(map(str, record["shape"]))
    return [
        ("rounding, forward and backward", f"{record['tensor']}, {size}", way,
         f"{np.median(times):.0f} us ({np.median(times / us[ELEMENTWISE]):.2f} of elementwise)")
        for way, times in us.items()
    ]  # fmt: skip
