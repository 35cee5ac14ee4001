import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from edgeft.checkpoint import copy_of, restore, state_of
from edgeft.fixedpoint import FixedPointFormat, dequantize, quantize
from edgeft.quant.brevitas_bridge import ActivationQuant, FixedPointConv2d, FixedPointLinear
from edgeft.quant.fakequant import RoundPerChannel, RoundSaturate, RoundToGrid, mask_bounds, power_of_two, round_constant

CODES = [(0, 255), (-128, 127), (-127, 127), (0, 127)]
FRACS = list(range(-8, 21))


def awkward(frac: int) -> Tensor:
    """Quarter codes around the whole range with their float32 neighbours, normals, huge values and infinities."""
    quarters = torch.arange(-1200, 1201, dtype=torch.float32) / 4 * 2.0**-frac
    up, down = (torch.nextafter(quarters, torch.tensor(end)) for end in (math.inf, -math.inf))
    normals = torch.randn(500, generator=torch.Generator().manual_seed(frac % 97)) * 80 * 2.0**-frac
    return torch.cat([quarters, up, down, normals, torch.tensor([1e30, -1e30, math.inf, -math.inf, 0.0, -0.0])])


def reference(x: Tensor, frac: int, low: int, high: int) -> Tensor:
    codes = np.clip(np.rint(np.ldexp(x.double().numpy(), frac)), low, high)
    return torch.from_numpy(np.ldexp(codes, -frac)).float()


def inside(x: Tensor, frac: int, low: int, high: int, *, relu: bool) -> Tensor:
    """The mask as it is defined: the rounded, unclamped code is in range; a fused ReLU passes nothing at or below 0."""
    codes = torch.round(x.double() * 2.0**frac)
    return (codes >= low) & (codes <= high) & ((x > 0) | (not relu))


def saturate(x: Tensor, frac: int, low: int, high: int, *, relu: bool = False) -> Tensor:
    bounds = mask_bounds(low, high, frac, relu=relu)
    out: Tensor = RoundSaturate.apply(x, low * 2.0**-frac, high * 2.0**-frac, round_constant(frac), *bounds)
    return out


@pytest.mark.parametrize("frac", FRACS)
@pytest.mark.parametrize(("low", "high"), CODES)
def test_one_format_rounds_and_masks_as_defined(low: int, high: int, frac: int) -> None:
    for relu in (False, True) if low == 0 else (False,):
        x = awkward(frac).requires_grad_()
        out = saturate(x, frac, low, high, relu=relu)
        assert torch.equal(out, reference(x.detach(), frac, low, high))
        out.backward(torch.full_like(x, 3.0))
        assert x.grad is not None
        assert torch.equal(x.grad, 3.0 * inside(x.detach(), frac, low, high, relu=relu))


@pytest.mark.parametrize("text", ["u8.6", "s8.5", "w8.7", "s8.-3"])
def test_equal_to_the_reference_arithmetic(text: str) -> None:
    fmt = FixedPointFormat.parse(text)
    x = awkward(fmt.frac)
    wanted = dequantize(quantize(x.double().numpy(), fmt), fmt)
    np.testing.assert_array_equal(saturate(x, fmt.frac, fmt.min_code, fmt.max_code).numpy(), wanted)
    channel = RoundPerChannel.apply(x, torch.tensor(2.0**fmt.frac), fmt.min_code, fmt.max_code)
    np.testing.assert_array_equal(channel.numpy(), wanted)


def test_per_channel_formats_round_and_mask_as_defined() -> None:
    x = torch.stack([awkward(frac) for frac in FRACS]).requires_grad_()
    scale = power_of_two(torch.tensor(FRACS)).view(-1, 1)
    out = RoundPerChannel.apply(x, scale, -127, 127)
    out.backward(torch.full_like(x, 3.0))
    assert x.grad is not None
    for row, frac in enumerate(FRACS):
        assert torch.equal(out[row], reference(x[row].detach(), frac, -127, 127))
        assert torch.equal(x.grad[row], 3.0 * inside(x[row].detach(), frac, -127, 127, relu=False))


def test_values_that_are_not_numbers_stay_visible() -> None:
    x = torch.tensor([math.nan, 1.0])
    assert saturate(x, 5, -128, 127).isnan().tolist() == [True, False]
    assert RoundPerChannel.apply(x, torch.tensor(32.0), -128, 127).isnan().tolist() == [True, False]


@pytest.mark.parametrize("frac", [-4, 0, 13, 28])
def test_biases_are_rounded_exactly_however_large(frac: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.cat([torch.randn(1000, generator=generator) * 10.0**e for e in range(10)] + [torch.tensor([0.5, 1.5, -2.5, 2.0**31])])
    bias = (codes * 2.0**-frac).requires_grad_()
    out = RoundToGrid.apply(bias, torch.tensor(2.0**frac))
    np.testing.assert_array_equal(out.detach().double().numpy(), np.rint(bias.detach().double().numpy() * 2.0**frac) * 2.0**-frac)
    out.sum().backward()
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.ones_like(bias))


def test_powers_of_two_are_exact() -> None:
    fracs = torch.arange(-126, 128)
    np.testing.assert_array_equal(power_of_two(fracs).numpy(), np.ldexp(np.float32(1), fracs.numpy()))


# --- hosted by Brevitas ----------------------------------------------------------------------------------------------


def conv(*, per_channel: bool = False, padding: tuple[int, int, int, int] = (1, 1, 1, 1)) -> FixedPointConv2d:
    generator = torch.Generator().manual_seed(5)
    weight, bias = torch.randn(4, 3, 3, 3, generator=generator) * 0.3, torch.randn(4, generator=generator)
    layer = FixedPointConv2d(weight, bias, (1, 1), padding, (1, 1), 1, per_channel=per_channel)
    layer.body.frac.copy_(torch.tensor([5.0, 6.0, 7.0, 4.0]).view(4, 1, 1, 1) if per_channel else torch.tensor(6.0))
    layer.bias_frac.copy_(layer.body.frac.flatten().expand(4) + 5)
    layer.eval()
    return layer


@pytest.mark.parametrize("per_channel", [False, True])
def test_brevitas_shows_value_scale_and_integers(per_channel: bool) -> None:
    layer = conv(per_channel=per_channel)
    layer.weight_quant.skip_create_quant_tensor = False
    hosted = layer.quant_weight()
    assert torch.equal(hosted.value, layer.weight_quant(layer.weight).value)
    assert torch.equal(hosted.scale, 2.0**-layer.body.frac)
    assert hosted.int().dtype == torch.int8
    assert torch.equal(hosted.int().float() * hosted.scale, hosted.value)
    assert int(hosted.int().min()) >= -127
    assert float(hosted.bit_width) == 8
    assert float(hosted.zero_point) == 0
    assert bool(hosted.signed)
    layer.weight_quant.skip_create_quant_tensor = True
    assert torch.equal(layer.rounded_weight(), hosted.value)


@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 0, 1, 1), (2, 1, 0, 3), (0, 2, 0, 2)])
def test_convolution_of_rounded_weights(padding: tuple[int, int, int, int]) -> None:
    layer = conv(per_channel=True, padding=padding)
    x = torch.randint(0, 256, (2, 3, 7, 9), generator=torch.Generator().manual_seed(1)).float() / 32
    top, left, bottom, right = padding
    wide = torch.nn.functional.pad(x.double(), (left, right, top, bottom))
    bias = torch.round(layer.bias.double() * 2.0**layer.bias_frac) * 2.0**-layer.bias_frac
    wanted = torch.nn.functional.conv2d(wide, layer.rounded_weight().double(), bias.double())
    assert torch.equal(layer(x).double(), wanted)


def test_gradients_reach_weight_and_bias_but_not_beyond_the_range() -> None:
    layer = FixedPointLinear(torch.tensor([[0.5, 5.0]]), torch.tensor([0.3]))
    layer.body.frac.fill_(6)
    layer.bias_frac.fill_(9)
    layer(torch.tensor([[1.0, 2.0]])).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[1.0, 0.0]]  # 5.0 is beyond 127/64
    assert layer.bias.grad is not None
    assert layer.bias.grad.tolist() == [1.0]


@pytest.mark.parametrize(("signed", "relu", "low", "high"), [(True, False, -128, 127), (True, True, 0, 127), (False, True, 0, 255)])
def test_activation_range(signed: bool, relu: bool, low: int, high: int) -> None:
    quantizer = ActivationQuant(signed=signed, relu=relu)
    quantizer.body.frac.fill_(4)
    x = awkward(4)
    assert torch.equal(quantizer(x), reference(x, 4, low, high))


@pytest.mark.parametrize("per_channel", [False, True])
def test_formats_written_in_place_are_in_force(per_channel: bool) -> None:
    layer, quantizer = conv(per_channel=per_channel), ActivationQuant(signed=True, relu=False)
    quantizer.body.frac.fill_(3)
    x = torch.linspace(-4, 4, 100)
    weight, coarse = layer.rounded_weight().clone(), quantizer(x)
    saved = copy_of(state_of(layer)), copy_of(state_of(quantizer))
    layer.body.frac.sub_(2)
    quantizer.body.frac.fill_(5)
    assert torch.equal(quantizer(x), reference(x, 5, -128, 127))
    assert not torch.equal(layer.rounded_weight(), weight)
    restore(layer, saved[0])
    restore(quantizer, saved[1])
    assert torch.equal(quantizer(x), coarse)
    assert torch.equal(coarse, reference(x, 3, -128, 127))
    assert torch.equal(layer.rounded_weight(), weight)


def test_a_copy_follows_its_own_format() -> None:
    quantizer = ActivationQuant(signed=True, relu=False)
    for _ in range(3):
        quantizer.body.frac.fill_(3)
    x = torch.linspace(-4, 4, 100)
    coarse = quantizer(x)
    twin = copy.deepcopy(quantizer)
    assert torch.equal(twin(x), coarse)
    for frac in (5, 6, 7):  # whatever the version counter of the copy starts at
        twin = copy.deepcopy(quantizer)
        for _ in range(frac - 4):
            twin.body.frac.fill_(frac)
        assert torch.equal(twin(x), reference(x, frac, -128, 127))
    assert torch.equal(quantizer(x), coarse)


def test_observing_sums_what_training_saw() -> None:
    body = ActivationQuant(signed=True, relu=False).body
    x = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(2))
    assert math.isnan(body.take_sigma())
    body(x)
    assert math.isnan(body.take_sigma())  # not observing
    body.observing = True
    body(x)
    body(x * 2)
    with torch.no_grad():
        body(x * 100)  # validation
    both = torch.cat([x, x * 2]).double()
    assert body.take_sigma() == pytest.approx(float(both.std(correction=0)), rel=1e-6)
    assert math.isnan(body.take_sigma())


def test_observing_samples_large_batches() -> None:
    body = ActivationQuant(signed=False, relu=True).body
    body.observing = True
    x = torch.zeros(64, 2, 2, 2)
    x[::8] = torch.randn(8, 2, 2, 2, generator=torch.Generator().manual_seed(2))
    body(x)
    assert body.moments[0] == 64
    assert body.take_sigma() == pytest.approx(float(x[::8].double().std(correction=0)), rel=1e-6)
