from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeft.errors import UnsupportedError
from edgeft.quant.calibration.statistics import collect
from edgeft.quant.formats import CLIP_FRAC
from edgeft.quant.plan import ConvStep, GlobalPoolStep, LinearStep, Plan, run_float
from edgeft.quant.rescale import IMAGE_NORM, depthwise, equalize, fold_image, fold_pooling, prepare_plan, scale_clips
from edgeft.quant.tracing.trace import trace
from tests.nets import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    SIZE,
    Sum,
    bytes_of,
    conv_bn,
    depthwise_net,
    double,
    head,
    prepared,
    randomise,
    residual_net,
    run_plan,
)

UNIT = ((0.0,) * 3, (1.0,) * 3)


def plan_of(net: nn.Module, size: int = SIZE) -> Plan:
    plan = trace(randomise(net).double(), (3, size, size))
    fold_pooling(plan)
    return plan


def normalised(images: Tensor, mean: Any, std: Any) -> Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (mean, std))
    return torch.as_tensor((images.double() / 255.0 - mean) / std)


def encoded(plan: Plan, images: Tensor) -> Tensor:
    return (images.double() - 128) / 128 if plan.signed_image else images.double() / 256


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.from_numpy(bytes_of(6))


@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_pooling_factor_goes_into_the_next_layer(size: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), *head(4))
    plan = plan_of(net, size)
    pool = next(step for step in plan.steps if isinstance(step, GlobalPoolStep))
    assert 0.7 < 2.0**pool.divisor_log2 / size**2 < 1.42
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    torch.testing.assert_close(run_plan(plan, x)[plan.output], net(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plan["0"].weight, net[0].weight.double())  # type: ignore[attr-defined]


@pytest.mark.parametrize(("mean", "std"), [UNIT, ((0.0,) * 3, (0.5, 0.25, 2.0)), (IMAGENET_MEAN, IMAGENET_STD), ((0.1, 0.9, 1.0), HALF)])
def test_image_folding_is_exact(mean: Any, std: Any, images: Tensor) -> None:
    """With padding in the first layer, for a mean of 0 and through image_norm."""
    plan = plan_of(residual_net())
    wanted = run_plan(plan, normalised(images, mean, std))[plan.output]
    fold_image(plan, mean, std)
    assert not plan.signed_image
    assert (plan.steps[0].name == IMAGE_NORM) == (mean != (0.0,) * 3)
    torch.testing.assert_close(run_plan(plan, encoded(plan, images))[plan.output], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("std", [HALF, (0.2, 0.5, 1.0)])
def test_mean_of_a_half_is_exact_but_for_half_a_level_of_padding(std: Any, images: Tensor) -> None:
    plan = plan_of(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *head(8)))
    wanted = run_plan(plan, normalised(images, HALF, std))["0"]
    weight = plan["0"].weight.abs().sum((1, 2, 3)).max()  # type: ignore[attr-defined]
    fold_image(plan, HALF, std)
    assert plan.signed_image
    found = run_plan(plan, encoded(plan, images))["0"]
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(found[inner], wanted[inner], rtol=1e-12, atol=1e-12)
    assert 0 < float((found - wanted).abs().max()) <= float(weight) * 0.5 / (255 * min(std)) + 1e-12


@pytest.mark.parametrize("mean", [IMAGENET_MEAN, (0.1, 0.9, 1.0), (1.5, -0.5, 0.3)])
def test_image_norm_uses_its_range_and_never_leaves_it(mean: Any) -> None:
    plan = plan_of(residual_net())
    fold_image(plan, mean, HALF)
    first = plan.steps[0]
    assert isinstance(first, ConvStep)
    assert first.fixed
    codes = first.weight.flatten() * 2.0**6
    assert torch.equal(codes, codes.round())
    assert 0 < float(codes.min()) <= float(codes.max()) <= 127
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, SIZE, SIZE)
    out = run_plan(plan, encoded(plan, ends))[IMAGE_NORM] * 2.0**7
    assert float(out.min()) >= -128.5
    assert float(out.max()) <= 127.5
    assert float((out[1] - out[0]).min()) > 60
    assert float(out.abs().max()) > 100


class Body(nn.Module):
    """What comes before the classifier, as a function of a convolution's clipped or plain output and of the image."""

    def __init__(self, body: Callable[[Tensor, Tensor], Tensor], channels: int, act: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.conv, self.second, self.body = conv_bn(3, 8, act=act), conv_bn(8, 8, 1, act=None), body
        self.end = nn.Sequential(conv_bn(channels, 8, 1), *head(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out: Tensor = self.end(self.body(y, self.second(y)) if self.body.__code__.co_name != "of_image" else self.body(x, y))
        return out


def test_image_that_an_addition_reads_gets_a_layer_of_its_own(images: Tensor) -> None:
    """With weights that nothing approximates: the normalised values themselves."""
    for mean, std in ((HALF, HALF), ((0.0,) * 3, (0.5, 0.25, 2.0)), (IMAGENET_MEAN, IMAGENET_STD)):
        plan = plan_of(nn.Sequential(Sum(nn.Identity(), nn.Conv2d(3, 3, 1)), *head(3)))
        wanted = run_plan(plan, normalised(images, mean, std))[plan.output]
        fold_image(plan, mean, std)
        first = plan.steps[0]
        assert (first.name, isinstance(first, ConvStep) and first.fixed) == ("image_values", False)
        torch.testing.assert_close(run_plan(plan, encoded(plan, images))[plan.output], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("mean", "std"), [((0.0,) * 3, (0.5, 0.25, 2.0)), (IMAGENET_MEAN, IMAGENET_STD), (HALF, HALF)])
def test_image_is_folded_through_everything_that_moves_it(mean: Any, std: Any, images: Tensor) -> None:
    def of_image(x: Tensor, y: Tensor) -> Tensor:
        parts = [x[..., ::2, ::2], x.flip(1)[..., 1::2, 1::2], F.max_pool2d(x, 2), y[..., ::2, ::2]]
        return torch.cat([F.interpolate(torch.cat(parts, 1), scale_factor=2), x], 1)

    plan = plan_of(Body(of_image, 20))
    wanted = run_plan(plan, normalised(images, mean, std))[plan.output]
    fold_image(plan, mean, std)
    assert "image_values" not in [step.name for step in plan.steps]
    tolerance = 0.01 if mean == HALF else 1e-10  # half a level at zero padding
    torch.testing.assert_close(run_plan(plan, encoded(plan, images))[plan.output], wanted, rtol=tolerance, atol=tolerance)


def test_pool_that_a_product_reads_and_an_addition_gets_a_constant() -> None:
    net = Body(lambda x, y: x * y.mean((2, 3), keepdim=True), 8)
    assert not [step for step in plan_of(net).steps if isinstance(step, ConvStep) and step.fixed], "products pass the ratio on"
    net = Body(lambda x, y: y + F.interpolate(y.mean((2, 3), keepdim=True), scale_factor=12), 8)
    plan = plan_of(net, 12)
    (factor,) = [step for step in plan.steps if isinstance(step, ConvStep) and step.fixed]
    assert 64 <= float(factor.weight[0] * 2.0 ** (factor.fixed_frac or 0)) <= 127
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(run_plan(plan, x)[plan.output], net(x), rtol=0.02, atol=0.02)


def test_rounded_constant_of_an_averaging_window_is_made_up_for() -> None:
    """9 * 57/512 is more than 1; a convolution can make up for it, an addition cannot."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(3, 1, 1), nn.Conv2d(4, 4, 1), *head(4))
    plan = plan_of(net)
    window = plan["1"]
    assert isinstance(window, ConvStep)
    assert set(window.weight.flatten().tolist()) == {114 / 1024}
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    torch.testing.assert_close(run_plan(plan, x)[plan.output], net(x), rtol=1e-12, atol=1e-12)
    net = nn.Sequential(Sum(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(3, 1, 1))), *head(4))
    found, wanted = run_plan(plan := plan_of(net), x)[plan.output], net(x)
    torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.01)
    assert not torch.equal(found, wanted)


CLIPPED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "concatenated": (lambda x, y: torch.cat([x, y], 1), 16),
    "selected": (lambda x, y: F.channel_shuffle(torch.cat([x, y], 1), 2)[:, :11], 11),
    "enlarged": (lambda x, y: F.interpolate(F.max_pool2d(x, 2), scale_factor=2) + y, 8),
    "product": (lambda x, y: x * y.mean((2, 3), keepdim=True).sigmoid(), 8),
    "gate": (lambda x, y: F.relu6(y * 8.0) * x.mean((2, 3), keepdim=True), 8),
    "table": (lambda x, y: F.silu(x) + y, 8),
    "averaged": (lambda x, y: F.avg_pool2d(x + 1.0, 2), 8),
    "table in a clipped group": (lambda x, y: F.relu6(F.gelu(y) + x), 8),
}


@pytest.mark.parametrize("profile", ["u8", "s8"])
@pytest.mark.parametrize("where", CLIPPED)
def test_scaled_clips_pass_everything_that_ties(where: str, profile: str) -> None:
    body, channels = CLIPPED[where]
    plan = plan_of(Body(body, channels, nn.ReLU6))
    x = 8 * torch.randn(4, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = run_plan(plan, x)
    scale_clips(plan, profile)
    after = run_plan(plan, x)
    tolerance = 0.02 if where == "gate" else 1e-10  # a constant of 8 bits undoes the factor of a gate
    torch.testing.assert_close(
        after[plan.output], before[plan.output], rtol=tolerance, atol=tolerance * float(before[plan.output].abs().max())
    )
    top = {"u8": 255 / 32, "s8": 127 / 16}[profile]
    assert [step.clip for step in plan.steps if step.clip is not None] == pytest.approx(
        [top] * (2 if "clipped group" in where or where == "gate" else 1)
    )
    assert all(torch.equal(s.weight * 2.0**s.fixed_frac, (s.weight * 2.0**s.fixed_frac).round())
               for s in plan.steps if isinstance(s, ConvStep) and s.fixed_frac is not None)  # fmt: skip


def test_norm_is_what_batch_norm_implies_and_follows_the_output() -> None:
    """Mean and deviation of each channel, under inputs whose statistics are the running ones."""
    net = randomise(nn.Sequential(conv_bn(3, 8, act=nn.ReLU6), conv_bn(8, 4, act=None), *head(4))).double()
    plan = plan_of(net)
    first, second = plan["0.0"], plan["1.0"]
    assert isinstance(first, ConvStep)
    assert isinstance(second, ConvStep)
    norm = net[0][1]  # type: ignore[index]
    assert first.norm is not None
    assert second.norm is not None
    torch.testing.assert_close(first.norm, torch.stack([norm.bias, norm.weight.abs()]))
    kept = second.norm.clone()
    scale_clips(plan, "u8")
    torch.testing.assert_close(first.norm, torch.stack([norm.bias, norm.weight.abs()]) * (255 / 32 / 6))
    assert torch.equal(second.norm, kept)


@pytest.mark.parametrize("profile", ["u8", "s8"])
@pytest.mark.parametrize("where", ["chain", "before", "after"])
def test_scaled_clips_keep_the_function(where: str, profile: str) -> None:
    tail = [nn.MaxPool2d(2), nn.Conv2d(8, 8, 1), *head(8)]
    block = {
        "chain": depthwise_net()[1],
        "before": Sum(nn.Identity(), conv_bn(8, 8, act=nn.ReLU6)),
        "after": Sum(nn.Identity(), conv_bn(8, 8, act=None), nn.ReLU6()),
    }[where]
    plan = plan_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), block, *tail))
    x = 8 * torch.randn(4, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = run_plan(plan, x)
    assert float(before["0"].max()) == 6.0
    scale_clips(plan, profile)
    after = run_plan(plan, x)
    torch.testing.assert_close(after[plan.output], before[plan.output], rtol=1e-10, atol=1e-10)
    top = {"u8": 255 / 32, "s8": 127 / 16}[profile]
    for step in plan.steps:
        if step.clip is not None:
            assert step.clip == pytest.approx(top, rel=1e-12)
            assert step.clip * 2.0 ** CLIP_FRAC[profile] == pytest.approx({"u8": 255, "s8": 127}[profile])
            torch.testing.assert_close(after[step.name], before[step.name] * top / 6, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("profile", ["u8", "s8"])
def test_prepared_plan_reads_bytes_in_float32(profile: str, images: Tensor) -> None:
    net = randomise(depthwise_net())
    plan = prepared(net, profile, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert all(step.weight.dtype == step.bias.dtype == torch.float32 for step in plan.weighted())
    with torch.no_grad():
        wanted = net(normalised(images, IMAGENET_MEAN, IMAGENET_STD).float())
    torch.testing.assert_close(run_float(plan, images), wanted, rtol=1e-4, atol=1e-4)


def test_weights_that_are_not_numbers_are_refused() -> None:
    net = randomise(depthwise_net())
    with torch.no_grad():
        net[3].running_var[1] = -1.0  # type: ignore[index]
    with pytest.raises(UnsupportedError, match="layer '2' has weights that are not finite"):
        prepare_plan(net, (3, SIZE, SIZE), HALF, HALF, "u8")


def spread_channels(net: nn.Module) -> nn.Module:
    """Depthwise channels that differ by octaves, so that there is something to equalise."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d) and module.num_features == 24:
                module.weight.mul_(torch.exp2(torch.arange(24.0) % 5 - 4))
                module.bias.mul_(torch.exp2(torch.arange(24.0) % 5 - 4))
    return net


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6])
def test_equalisation_keeps_the_function_and_evens_the_channels(act: type[nn.Module], images: Tensor) -> None:
    plan = prepared(spread_channels(randomise(depthwise_net(act))))
    statistics = collect(plan, images)
    before = run_float(plan, images)
    middle = next(step for step in plan.weighted() if depthwise(step))
    old = middle.weight.clone()
    changed = equalize(plan, {n: s.peak for n, s in statistics.items()}, {n: s.clip_active for n, s in statistics.items()})
    assert changed >= 1
    torch.testing.assert_close(run_float(plan, images), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    assert octaves(middle.weight) < 0.9 * octaves(old)
    again = collect(plan, images)
    for name, s in again.items():
        ceiling = plan[name].clip or float(statistics[name].peak.max())
        grown = s.peak > statistics[name].peak * 1.0001
        assert not bool((grown & (s.peak > ceiling * 1.0001)).any()), "no channel may grow past its tensor's range"
        assert torch.equal(s.clip_active, statistics[name].clip_active)


def octaves(weight: Tensor) -> float:
    """Spread of the channels' largest weights: standard deviation of their logarithms to base 2."""
    return float(weight.abs().amax((1, 2, 3)).log2().std())


def test_equalisation_is_exact_in_float64(images: Tensor) -> None:
    plan = double(prepared(spread_channels(randomise(depthwise_net(nn.ReLU)))))
    x = encoded(plan, images)
    before = run_plan(plan, x)[plan.output]
    peaks = {step.name: torch.full((step.shape[0],), 4.0, dtype=torch.float64) for step in plan.steps}
    assert equalize(plan, peaks, {name: torch.zeros_like(peak, dtype=torch.bool) for name, peak in peaks.items()})
    torch.testing.assert_close(run_plan(plan, x)[plan.output], before, rtol=1e-13, atol=1e-13)


def test_equalisation_leaves_grouped_layers_alone(images: Tensor) -> None:
    """A group of several inputs and one output has as many groups as outputs, but is not depthwise."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), conv_bn(8, 8, groups=8), nn.Conv2d(8, 4, 1, groups=4), nn.ReLU(), *head(4))
    plan = prepared(randomise(net))
    statistics = collect(plan, images)
    equalize(plan, {n: s.peak for n, s in statistics.items()}, {n: s.clip_active for n, s in statistics.items()})
    assert isinstance(plan.steps[-1], LinearStep)
