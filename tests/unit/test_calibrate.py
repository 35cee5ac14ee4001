import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeft.config import QuantConfig
from edgeft.errors import DataError, UnsupportedError
from edgeft.fixedpoint import FixedPointFormat
from edgeft.interpret import Interpreter
from edgeft.quant.calibration.calibrate import calibrate, calibrate_explained, n_advances
from edgeft.quant.calibration.compensate import centred, channel_means, compensate_rounding, layer_inputs, refit
from edgeft.quant.calibration.statistics import TensorStatistics, alternatives, collect, propose, propose_weight, weight_spread
from edgeft.quant.f8net import EMPTY_FRAC, SIGNED_STD, UNSIGNED_RMS
from edgeft.quant.formats import weight_format
from edgeft.quant.lower import enforce_bounds, lower
from edgeft.quant.net import FixedPointNet
from edgeft.quant.plan import ConvStep, GlobalPoolStep, run_float
from edgeft.quant.rescale import prepare_plan
from edgeft.quant.training_graph import TrainingGraph
from tests.nets import HALF, SIZE, Sum, bytes_of, calibrated, conv_bn, depthwise_net, head, prepared, randomise, residual_net


def error(net: FixedPointNet, float_net: nn.Module, n: int = 48) -> float:
    """Root mean square error of the logits on images that calibration has not seen."""
    images = torch.from_numpy(bytes_of(n, seed=77))
    with torch.no_grad():
        wanted = float_net(images.float() / 127.5 - 1)
        return float((net(images) - wanted).square().mean().sqrt() / wanted.std())


def quantized_error(build: Any, seed: int, **quant: Any) -> float:
    float_net = randomise(build(), seed)
    return error(calibrated(prepared(float_net), 48, **quant), float_net)


@pytest.mark.parametrize("build", [residual_net, depthwise_net])
def test_compensation_lowers_the_error_on_other_images(build: Any) -> None:
    plain = [quantized_error(build, seed, rounding="nearest") for seed in range(4)]
    repaired = [quantized_error(build, seed) for seed in range(4)]
    assert np.mean(repaired) < 0.9 * np.mean(plain)
    assert np.mean(repaired) < 0.2


@pytest.mark.parametrize("rule", ["std", "grid", "minmax"])
def test_channel_formats_are_at_least_as_good(rule: str) -> None:
    def uneven() -> nn.Module:
        return depthwise_net(nn.ReLU)

    def mean_error(granularity: str) -> float:
        errors = []
        for seed in range(3):
            float_net = randomise(uneven(), seed)
            with torch.no_grad():
                for module in float_net.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.weight.mul_(torch.exp2(torch.arange(float(module.num_features)) % 4 - 2))
            net = calibrated(prepared(float_net), 24, format=rule, granularity=granularity, equalize=False, fit_ranges=False,
                             rounding="nearest")  # fmt: skip
            errors.append(error(net, float_net))
        return float(np.mean(errors))

    assert mean_error("channel") < mean_error("tensor")


@pytest.mark.parametrize("rule", ["std", "grid"])
def test_bias_correction_leaves_no_mean_error_behind_the_rectification(rule: Any) -> None:
    float_net = randomise(residual_net())
    plan = prepared(float_net)
    images = torch.from_numpy(bytes_of(24, seed=1))
    net, _ = calibrate(plan, images, QuantConfig(format=rule), lambda *_: None)
    first = plan.weighted()[0]
    with torch.no_grad():
        found, wanted = net.run_step(first, [plan.encode(images)]).relu(), _float_output(first, plan.encode(images)).relu()
        unrepaired = calibrate(prepared(float_net), images, QuantConfig(format=rule, rounding="nearest"), lambda *_: None)[0]
        plain = unrepaired.run_step(first, [plan.encode(images)]).relu()
    drift = (channel_means(found) - channel_means(wanted)).abs()
    assert float(drift.max()) < 0.005 * float(wanted.std())  # means are taken at sampled positions
    assert float(drift.mean()) < 0.3 * float((channel_means(plain) - channel_means(wanted)).abs().mean())
    assert not torch.equal(net.layer(first.name).rounded_weight().detach(), first.weight)


def _float_output(step: Any, x: Tensor) -> Tensor:
    top, left, bottom, right = step.padding
    return nn.functional.conv2d(nn.functional.pad(x, (left, right, top, bottom)), step.weight, step.bias, step.stride)


def test_patches_are_what_the_weights_multiply() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 2, 3, 2, generator=generator, dtype=torch.float64)
    step = ConvStep("c", ("image",), (6, 3, 4), weight=weight, stride=(2, 1), padding=(1, 0, 0, 2), dilation=(1, 3), groups=3)
    x = torch.randn(2, 6, 6, 5, generator=generator, dtype=torch.float64)
    wanted = nn.functional.conv2d(nn.functional.pad(x, (0, 2, 1, 0)), weight, None, (2, 1), 0, (1, 3), 3)
    assert tuple(wanted.shape[1:]) == step.shape
    columns = layer_inputs(step, x, torch.Generator().manual_seed(4))
    found = (weight.reshape(3, 2, -1) @ columns).reshape(6, 2, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(found, wanted.transpose(0, 1).flatten(2)[:, :, order])


@pytest.mark.parametrize(("groups", "k"), [(1, 20), (3, 20), (2, 300)])
def test_compensated_weights_are_on_the_grid_and_closer(groups: int, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # A few directions behind all inputs: the errors of any block of columns can be made up for in the next.
    mixing = torch.randn(groups, k, 8, generator=generator)
    inputs = centred(mixing @ torch.randn(groups, 8, 400, generator=generator) + 0.3 * torch.randn(groups, k, 400, generator=generator))
    weight = torch.randn(groups * 4, k, generator=generator)
    scale = torch.exp2(torch.arange(float(groups * 4)) % 3 + 1)
    rounded = compensate_rounding(weight, scale, inputs, 127)
    codes = rounded * scale[:, None]
    assert torch.equal(codes, codes.round())
    plain = (weight * scale[:, None]).round() / scale[:, None]

    def output_error(candidate: Tensor) -> float:
        return float(((candidate - weight).reshape(groups, 4, k) @ inputs).square().mean())

    assert output_error(rounded) < 0.25 * output_error(plain)
    assert float(compensate_rounding(weight * 1000, scale, inputs, 127).abs().mul(scale[:, None]).max()) == 127


def test_compensation_without_correlation_is_plain_rounding() -> None:
    weight = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    rounded = compensate_rounding(weight, torch.tensor(8.0), torch.zeros(1, 10, 5), 127)
    assert torch.equal(rounded, (weight * 8).round() / 8)


def test_refit_undoes_what_the_inputs_lost() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = centred(torch.randn(1, 6, 500, generator=generator))
    weight = torch.randn(3, 6, generator=generator)
    refitted = refit(weight, 0.8 * exact, exact)
    torch.testing.assert_close(refitted, weight * (1 + 0.25 / 1.1), rtol=0.05, atol=0.02)  # a ridge of a tenth holds it back
    torch.testing.assert_close(refit(weight, exact, exact), weight)


def test_refit_keeps_weights_that_it_could_only_fit_to_noise() -> None:
    """More weights than images: an unjudged regression would reproduce the scores of exactly these images."""
    generator = torch.Generator().manual_seed(0)
    exact = centred(torch.randn(1, 100, 24, generator=generator))
    weight = torch.randn(5, 100, generator=generator)
    quantized = exact + 0.1 * torch.randn(1, 100, 24, generator=generator)
    moved = (refit(weight, quantized, exact) - weight).norm() / weight.norm()
    assert float(moved) < 0.02


# --- degenerate networks and images ----------------------------------------------------------------------------------


def assert_lowers(net: FixedPointNet, size: int = SIZE) -> None:
    enforce_bounds(net)
    images = bytes_of(3, size)
    expected, found = Interpreter(lower(net)).layers(images), TrainingGraph(net).layers(images)
    for name, codes in expected.items():
        np.testing.assert_array_equal(codes, found[name], err_msg=name)


@pytest.mark.parametrize("rule", ["std", "grid", "minmax"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("case", ["zero weights", "zero layer", "constant weights", "constant channel", "dead relu"])
def test_degenerate_layers(case: str, rule: str, granularity: str) -> None:
    float_net = randomise(residual_net())
    conv, norm = float_net[2].right[0][0], float_net[2].right[0][1]  # type: ignore[index]
    with torch.no_grad():
        if case in ("zero weights", "zero layer"):
            conv.weight.zero_()
        if case == "zero layer":
            norm.bias.zero_()
            norm.running_mean.zero_()
        if case == "constant weights":
            conv.weight.fill_(0.03)
        if case == "constant channel":
            conv.weight[2].zero_()
            conv.weight[3].fill_(0.01)
        if case == "dead relu":
            norm.bias.fill_(-100.0)
    net = calibrated(prepared(float_net), 16, format=rule, granularity=granularity)
    assert error(net, float_net) < 0.35
    assert_lowers(net)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_one_calibration_image(rounding: Any) -> None:
    float_net = randomise(depthwise_net())
    net = calibrated(prepared(float_net), 1, rounding=rounding)
    assert error(net, float_net) < 0.6
    assert_lowers(net)


def test_uniform_images() -> None:
    plan = prepared(randomise(residual_net()))
    net, _ = calibrate(plan, torch.full((4, 3, SIZE, SIZE), 128, dtype=torch.uint8), QuantConfig(), lambda *_: None)
    assert_lowers(net)


def test_standalone_batch_norm_with_equal_channels_keeps_its_weights() -> None:
    """Their deviation is rounding noise, which must not choose the format."""
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.ReLU(), *head(8))
    fixed = calibrated(prepared(randomise(nn.Sequential(*net[1:])) and net.eval()), 16, equalize=False, fit_ranges=False)
    weight = fixed.layer("0").rounded_weight()
    torch.testing.assert_close(weight.flatten(), torch.full((3,), 128 / 127.5 / math.sqrt(1 + 1e-5)), rtol=0.01, atol=0)


@pytest.mark.parametrize("rule", ["std", "minmax"])
@pytest.mark.parametrize("value", [0.3, -2.0, 1e-12, 127 / 8])
def test_equal_weights_do_not_saturate(rule: Any, value: float) -> None:
    cases: list[NDArray[np.float64]] = [np.full(9, value), np.full(1, value), value * (1 + 1e-9 * np.arange(9, dtype=np.float64))]
    for weights in cases:
        frac = propose_weight(weights, weight_format(0), rule)
        assert abs(value) * 2.0**frac <= 127 * (1 + 1e-6)
        assert abs(value) * 2.0**frac > 30
    assert propose_weight(np.zeros(9), weight_format(0), rule) == EMPTY_FRAC


def test_clipped_sums_do_not_saturate() -> None:
    """A residual sum of ReLU6 outputs exceeds 6; the clip is its operands' alone."""
    blocks = [Sum(nn.Identity(), nn.Sequential(conv_bn(8, 8, act=nn.ReLU6))) for _ in range(3)]
    float_net = randomise(nn.Sequential(conv_bn(3, 8, act=nn.ReLU6), *blocks, *head(8)))
    for rule in ("std", "minmax"):
        net = calibrated(prepared(float_net), 24, format=rule)
        assert error(net, float_net) < 0.1
        assert_lowers(net)


def test_pools_of_rectified_values_use_their_root_mean_square() -> None:
    """Their own deviation says nothing of their range: here they are nearly constant."""
    plan = prepared(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), *head(4)))
    pool = next(step.name for step in plan.steps if isinstance(step, GlobalPoolStep))
    for profile, constant in (("u8", UNSIGNED_RMS), ("s8", SIGNED_STD)):
        point = next(p for p in FixedPointNet(plan, profile=profile, per_channel=False).points if p.name == pool)
        for mean in (0.9, 3.0, 11.0):
            seen = TensorStatistics()
            seen.update(mean + 0.01 * torch.randn(50, 4, 1, 1, generator=torch.Generator().manual_seed(0)), keep=100)
            wanted = math.floor(math.log2(constant / mean)) if profile == "u8" else math.floor(math.log2(127 / mean))
            assert propose(plan, point, seen, "std") in (wanted, wanted - (profile == "s8"))


def test_statistics_by_hand() -> None:
    x = torch.tensor([[[[-1.0, 2.0], [3.0, 8.0]], [[0.0, 1.0], [-5.0, 0.5]]]])
    both = TensorStatistics(relu=True, clip=6.0)
    both.update(x, keep=100)
    both.update(-x, keep=100)
    assert both.sigma == pytest.approx(float(torch.cat([x, -x]).std(correction=0)))
    assert both.rms == pytest.approx(float(x.square().mean().sqrt()))
    assert both.peak.tolist() == [8.0, 5.0]
    assert both.clip_active.tolist() == [True, False]
    assert sorted(both.sample().tolist()) == sorted(torch.cat([x, -x]).clamp(max=6).flatten().tolist())


def test_statistics_do_not_depend_on_the_batch() -> None:
    plan = prepared(randomise(depthwise_net()))
    images = torch.from_numpy(bytes_of(7))
    whole, parts = collect(plan, images, 32), collect(plan, images, 2)
    for name in whole:
        assert whole[name].sigma == pytest.approx(parts[name].sigma, rel=1e-5)
        torch.testing.assert_close(whole[name].peak, parts[name].peak)
    assert run_float(plan, images).shape == (7, 5)


def test_scores_that_are_not_finite_are_refused() -> None:
    float_net = randomise(residual_net())
    with torch.no_grad():
        float_net[0][0].weight.fill_(3e38)  # type: ignore[index]
    with pytest.raises(UnsupportedError, match=r"layer '0\.0'"):
        calibrated(prepared(float_net))


@pytest.mark.parametrize("layer", ["conv", "linear", "norm"])
def test_weights_that_are_not_numbers_are_refused_by_name(layer: str) -> None:
    float_net = randomise(residual_net())
    with torch.no_grad():
        {"conv": float_net[2].right[0][0], "linear": float_net[7], "norm": float_net[2].right[0][1]}[layer].weight[0] = math.nan  # type: ignore[index]
    with pytest.raises(UnsupportedError, match="layer '7'" if layer == "linear" else r"layer '2\.right\.0\.0'"):
        prepare_plan(float_net, (3, SIZE, SIZE), HALF, HALF, "u8")


@pytest.mark.parametrize("rule", ["std", "search"])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_progress_advances_as_often_as_announced(rounding: Any, rule: Any) -> None:
    calls: list[tuple[Any, ...]] = []
    plan, config = prepared(randomise(depthwise_net())), QuantConfig(rounding=rounding, format=rule)
    calibrate(plan, torch.from_numpy(bytes_of(2)), config, lambda *a: calls.append(a))
    assert len(calls) == n_advances(plan, config)


def test_spread_of_weights_is_the_deviation_where_they_are_centred() -> None:
    weights = np.random.default_rng(0).normal(0, 0.1, 1000)
    assert weight_spread(weights) == float(weights.std())


def test_layers_too_wide_to_compensate_are_rounded_plainly_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeft.quant.calibration.calibrate.WIDEST", 0)
    plan = prepared(randomise(residual_net(), 1))
    notes: list[str] = []
    net, _ = calibrate(plan, torch.from_numpy(bytes_of(16)), QuantConfig(), lambda n=1, note="": notes.append(note))
    for step in plan.weighted():
        grid = torch.exp2(net.layer(step.name).body.frac)
        codes = (step.weight * grid).round().clamp(-127, 127)
        assert torch.equal(net.layer(step.name).rounded_weight() * grid, codes)
    assert sum("too wide to compensate" in note for note in notes) == len(plan.weighted())


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "flexround"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("rule", ["grid", "search"])
def test_one_or_two_images_do(rule: Any, granularity: Any, rounding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeft.quant.calibration.flexround.STEPS", 5)
    float_net = randomise(residual_net())
    for n in (1, 2):
        net = calibrated(prepared(float_net), n, format=rule, granularity=granularity, rounding=rounding)
        assert error(net, float_net, 12) < 0.6
        assert_lowers(net)


def test_no_image_is_refused() -> None:
    with pytest.raises(DataError, match="at least one image"):
        calibrate(prepared(randomise(residual_net())), torch.zeros(0, 3, SIZE, SIZE, dtype=torch.uint8), QuantConfig(), lambda *_: None)


def test_a_hessian_that_cannot_be_factored_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def degenerate(*_: Any, **__: Any) -> Any:
        raise torch.linalg.LinAlgError("not positive-definite")

    monkeypatch.setattr("edgeft.quant.calibration.layerfit.compensate_rounding", degenerate)
    with pytest.raises(UnsupportedError, match=r"layer '0\.0': its inputs"):
        calibrated(prepared(randomise(residual_net())))


@pytest.mark.parametrize("rule", ["std", "grid", "minmax"])
@pytest.mark.parametrize("magnitude", [1e-9, 1e6])
def test_ranges_far_from_one_are_held(rule: Any, magnitude: float) -> None:
    """The first layer's weights and bias are scaled, the next layer's divided: the same function in other units."""
    float_net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), *head(8))
    randomise(float_net)
    with torch.no_grad():
        first, second = float_net[0], float_net[2]
        assert isinstance(first, nn.Conv2d)
        assert isinstance(second, nn.Conv2d)
        assert first.bias is not None
        first.weight.mul_(magnitude)
        first.bias.mul_(magnitude)
        second.weight.div_(magnitude)
    net = calibrated(prepared(float_net), 12, format=rule)
    assert_lowers(net)
    assert error(net, float_net) < (0.3 if magnitude > 1 else 2.0)


def test_every_format_is_explained() -> None:
    plan = prepared(randomise(depthwise_net()))
    images = torch.from_numpy(bytes_of(8))
    for granularity in ("tensor", "channel"):
        found = calibrate_explained(plan, images, QuantConfig(format="grid", granularity=granularity), lambda *_: None)
        for point in found.net.points:
            entry = found.choices["activations"][point.name]
            frac = found.net.frac(point.name)
            assert set(entry["alternatives"]) == {str(frac - 1), str(frac), str(frac + 1)}
            if point.min_frac is None and point.group is None:  # nothing but the rule decided
                assert entry["alternatives"][str(frac)] <= min(entry["alternatives"].values()) * 1.02
        for step in plan.weighted():
            entry = found.choices["layers"][step.name]
            assert entry["reason"] == "grid"
            several = len(found.net.weight_fracs(step.name)) > 1
            errors = entry["alternatives_by_change" if several else "alternatives"]
            assert len(errors) == 3
            assert all(0 < value < 2 for value in errors.values())


def test_relative_errors_by_hand() -> None:
    found = alternatives(np.array([0.25, 1.0, 3.0]), FixedPointFormat(8, 0, signed=True))
    size = math.sqrt((0.0625 + 1 + 9) / 3)
    assert found["0"] == pytest.approx(0.25 / math.sqrt(3) / size)
    assert found["1"] == pytest.approx(0.25 / math.sqrt(3) / size)  # 0.25 is a tie and goes to the even code 0
    assert found["-1"] == pytest.approx(math.sqrt((0.0625 + 1 + 1) / 3) / size)  # 0.25, 1 and 3 become 0, 0 and 4
    assert alternatives(np.zeros(3), FixedPointFormat(8, 0, signed=True)) == {}
