import math

import pytest
import torch
from torch import Tensor

from edgeft.quant.fakequant import TableLookup


def codes(low: int, *shape: int) -> Tensor:
    return torch.randint(low, low + 256, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("low", [-128, 0])
@pytest.mark.parametrize("frac", [-3, 0, 5, 12])
def test_value_and_slope_of_every_code(low: int, frac: int) -> None:
    values, slopes = torch.randn(2, 256, generator=torch.Generator().manual_seed(frac + low + 200))
    x = (torch.arange(low, low + 256) * 2.0**-frac).requires_grad_()
    out = TableLookup.apply(x, 2.0**frac, low, values, slopes)
    assert torch.equal(out, values)
    grad = torch.randn(256, generator=torch.Generator().manual_seed(1))
    out.backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, grad * slopes)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced", "expanded", "one pixel"])
def test_any_memory_layout(layout: str) -> None:
    wanted = codes(-128, 3, 6, 5, 4)
    x = wanted.float() / 16
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        wanted, x = wanted.transpose(1, 3), x.transpose(1, 3)
    elif layout == "sliced":
        wanted, x = wanted[:, 1:5:2, ::2], x[:, 1:5:2, ::2]
    elif layout == "expanded":
        wanted, x = wanted[:, :1].expand(3, 6, 5, 4), x[:, :1].expand(3, 6, 5, 4)
    elif layout == "one pixel":
        wanted, x = wanted[..., :1, :1], x[..., :1, :1].contiguous(memory_format=torch.channels_last)
    values, slopes = torch.randn(2, 256, generator=torch.Generator().manual_seed(4))
    x = x.detach().requires_grad_()
    out = TableLookup.apply(x, 16.0, -128, values, slopes)
    assert torch.equal(out, values[wanted + 128])
    if layout in ("contiguous", "channels_last", "transposed"):
        assert out.stride() == x.stride()
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))  # contiguous, as gradients of a pool are
    out.backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, grad * slopes[wanted + 128])


def test_values_that_are_not_numbers_stay_visible() -> None:
    x = torch.tensor([0.5, math.nan, 0.25])
    assert TableLookup.apply(x, 16.0, -128, torch.ones(256), torch.ones(256)).isnan().all()


def test_only_the_codes_are_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = (codes(0, 2, 8, 16, 16).float() / 32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        TableLookup.apply(x, 32.0, 0, torch.ones(256), torch.ones(256))
    assert sum(t.numel() * t.element_size() for t in kept) == x.numel() + 4 * 256
