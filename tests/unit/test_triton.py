"""The fused rounding kernels against the elementwise operations, run on the CPU by Triton's interpreter."""

import importlib
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from edgeft.quant import brevitas_bridge, fakequant
from edgeft.quant.brevitas_bridge import ActivationQuant, FixedPointConv2d
from edgeft.quant.fakequant import RoundFused, RoundPerChannel, RoundSaturate, mask_bounds, power_of_two, round_constant

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

RANGES = [(-128, 127, False), (-127, 127, False), (0, 127, True), (0, 255, True), (0, 255, False)]
FRACS = [-12, -3, 0, 5, 12, 24]
NAME = "edgeft.kernels.fused_round"
ROOT = Path(__file__).resolve().parents[2]


def load() -> ModuleType:
    sys.modules.pop(NAME, None)
    return importlib.import_module(NAME)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The kernels' module as the interpreter runs it: Triton decides when a kernel is defined."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = load()
    monkeypatch.setattr(fakequant, "_fused_round", lambda: module)
    yield module
    sys.modules.pop(NAME, None)


def awkward(frac: int) -> Tensor:
    """All halves of codes around the range with their float32 neighbours, large and small values, infinities, zeros and NaN."""
    halves = torch.arange(-520, 521).float() / 2 * 2.0**-frac
    up, down = (torch.nextafter(halves, torch.tensor(end)) for end in (math.inf, -math.inf))
    return torch.cat([halves, up, down, torch.tensor([1e30, -1e30, 1e-30, -1e-30, math.inf, -math.inf, 0.0, -0.0, math.nan])])


def values_and_gradient(function: Any, x: Tensor, *arguments: Any, grad: Tensor | None = None) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    out = function.apply(leaf, *arguments)
    (gradient,) = torch.autograd.grad(out, leaf, torch.linspace(-1, 1, x.numel()).view(x.shape) if grad is None else grad)
    return out.detach(), gradient


def assert_same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(0.0), other.nan_to_num(0.0))


def elementwise(frac: int, low: int, high: int, *, relu: bool) -> tuple[Any, ...]:
    step = 2.0**-frac
    return low * step, high * step, round_constant(frac), *mask_bounds(low, high, frac, relu=relu)


def powers(*fracs: int) -> tuple[Tensor, Tensor]:
    table = torch.tensor(fracs, dtype=torch.float32)
    return power_of_two(table), power_of_two(-table)


@pytest.mark.parametrize("frac", FRACS)
@pytest.mark.parametrize(("low", "high", "relu"), RANGES)
def test_one_format(low: int, high: int, relu: bool, frac: int) -> None:
    x = awkward(frac)
    scale, step = (power[0] for power in powers(frac))
    found = values_and_gradient(RoundFused, x, scale, step, low, high, relu)
    assert_same(found, values_and_gradient(RoundSaturate, x, *elementwise(frac, low, high, relu=relu)))


def test_a_format_per_output_channel() -> None:
    x = torch.stack([awkward(frac) for frac in FRACS])[:, : 4 * 3 * 3 * 80].view(len(FRACS), -1, 2, 2)
    scale, step = (power.view(-1, 1, 1, 1) for power in powers(*FRACS))
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = x.contiguous(memory_format=layout)
        found = values_and_gradient(RoundFused, weight, scale, step, -127, 127, False)
        assert_same(found, values_and_gradient(RoundPerChannel, weight, scale, -127, 127))
        assert found[0].stride() == weight.stride()


def test_a_format_per_channel_of_an_activation() -> None:
    x = torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(1)) * 40
    scale, step = (power.view(1, -1, 1, 1) for power in powers(-3, 0, 1, 2, 5))
    for layout in (torch.contiguous_format, torch.channels_last):
        found = values_and_gradient(RoundFused, x.contiguous(memory_format=layout), scale, step, -128, 127, False)
        assert_same(found, values_and_gradient(RoundPerChannel, x, scale, -128, 127))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced", "empty"])
@pytest.mark.parametrize("grad_layout", [torch.contiguous_format, torch.channels_last])
def test_memory_layouts(layout: str, grad_layout: torch.memory_format) -> None:
    x = torch.randn(3, 6, 9, 11, generator=torch.Generator().manual_seed(2))
    views = {
        "contiguous": x, "channels_last": x.contiguous(memory_format=torch.channels_last), "transposed": x.transpose(1, 3),
        "sliced": x[:, ::2, 1:], "empty": x[:0],
    }  # fmt: skip
    view = views[layout]
    leaf = view.detach().requires_grad_()
    scale, step = (power[0] for power in powers(5))
    out = RoundFused.apply(leaf, scale, step, -128, 127, False)
    grad = torch.randn(view.shape, generator=torch.Generator().manual_seed(3)).contiguous(memory_format=grad_layout)
    (gradient,) = torch.autograd.grad(out, leaf, grad)
    assert_same((out.detach(), gradient), values_and_gradient(RoundSaturate, view, *elementwise(5, -128, 127, relu=False), grad=grad))
    if layout in ("contiguous", "channels_last"):
        assert out.stride() == gradient.stride() == view.stride()


def test_more_than_one_block_and_a_partial_one(kernels: ModuleType) -> None:
    x = torch.randn(3 * kernels.BLOCK + 7, generator=torch.Generator().manual_seed(4)) * 4
    scale, step = (power[0] for power in powers(5))
    found = values_and_gradient(RoundFused, x, scale, step, 0, 255, True)
    assert_same(found, values_and_gradient(RoundSaturate, x, *elementwise(5, 0, 255, relu=True)))


@pytest.mark.parametrize("per_channel", [False, True])
def test_brevitas_quantizers_use_the_kernels(per_channel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    weight, bias = torch.randn(4, 3, 3, 3, generator=generator), torch.randn(4, generator=generator)
    layer = FixedPointConv2d(weight, bias, (1, 1), (1, 1, 1, 1), (1, 1), 1, per_channel=per_channel)
    layer.body.frac.copy_(torch.tensor([5.0, 6.0, 7.0, 4.0]).view(4, 1, 1, 1) if per_channel else torch.tensor(6.0))
    layer.bias_frac.copy_(layer.body.frac.flatten().expand(4) + 5)
    quantizer = ActivationQuant(signed=False, relu=True)
    quantizer.body.frac.fill_(4)
    x = torch.randn(2, 3, 6, 6, generator=generator).contiguous(memory_format=torch.channels_last)

    def run() -> list[Tensor]:
        layer.zero_grad()
        out = quantizer(layer(x))
        out.square().sum().backward()
        assert layer.weight.grad is not None
        return [out.detach(), layer.weight.grad.clone()]

    wanted = run()
    calls: list[Tensor] = []
    apply = RoundFused.apply

    def counted(x: Tensor, *rest: Any) -> Any:
        calls.append(x)
        return apply(x, *rest)

    monkeypatch.setattr(brevitas_bridge, "has_fused_kernels", lambda device: True)
    monkeypatch.setattr(RoundFused, "apply", counted)
    assert all(torch.equal(found, one) for found, one in zip(run(), wanted, strict=True))
    assert len(calls) == 2


def test_kernels_are_for_gpus_and_wait_for_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    fakequant._has_triton.cache_clear()
    monkeypatch.delenv(fakequant.TRITON_SWITCH, raising=False)
    assert not fakequant.has_fused_kernels(torch.device("cuda"))
    fakequant._has_triton.cache_clear()
    monkeypatch.setenv(fakequant.TRITON_SWITCH, "1")
    assert fakequant.has_fused_kernels(torch.device("cuda"))
    assert not fakequant.has_fused_kernels(torch.device("cpu"))
    fakequant._has_triton.cache_clear()


@pytest.mark.parametrize("per_channel", [False, True])
def test_kernels_compile_for_a_gpu_without_one(per_channel: bool, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.triton_ptx", str(int(per_channel))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(".visible .entry") == 3
    assert "div" not in "".join(line for line in done.stdout.splitlines() if ".f32" in line), "an approximate division would not be exact"
