from typing import Any

import pytest
import torch
from torch import Tensor

from edgeft.quant.calibration.compensate import compensate_rounding
from edgeft.quant.calibration.flexround import flexround
from edgeft.quant.calibration.layerfit import LayerFit, LayerSample, fit_layer, importance
from edgeft.quant.plan import AddStep, ConvStep, Plan
from tests.nets import depthwise_net, prepared, randomise

HIGH = 127


def sample_of(weight: Tensor, *, clip: float | None = None, relu: bool = True, n: int = 800, noise: float = 0.0, k: int = 9) -> LayerSample:
    """A depthwise 3x3 layer on correlated inputs that are 0 or more, its own float outputs as the target."""
    generator = torch.Generator().manual_seed(3)
    base = torch.rand(len(weight), 1, n, generator=generator) + 0.3 * torch.randn(len(weight), k, n, generator=generator)
    exact = base.clamp(min=0.0)
    step = ConvStep("dw", ("x",), (len(weight), 4, 4), relu, clip, weight=weight.view(-1, 1, 3, 3), bias=torch.full((len(weight),), -0.2),
                    groups=len(weight))  # fmt: skip
    return LayerSample(step, exact + noise * torch.randn(exact.shape, generator=generator), exact, torch.ones(len(weight)))


def random_weight(n_out: int) -> Tensor:
    return torch.randn(n_out, 9, generator=torch.Generator().manual_seed(1)) * 0.4


def on_the_grid(fit: LayerFit) -> bool:
    codes = fit.weight.flatten(1) * torch.exp2(fit.fracs).view(-1, 1)
    return torch.equal(codes, codes.round()) and float(codes.abs().max()) <= HIGH


def test_the_best_of_all_candidates_comes_first() -> None:
    fits = fit_layer(sample_of(random_weight(6)), None, HIGH, per_channel=False)
    assert len(fits) > 1
    assert fits[0].error == min(fit.error for fit in fits)
    for fit in fits:
        assert on_the_grid(fit)
        assert len(fit.fracs) == 1


def test_no_channel_alone_is_clipped_even_where_that_gains_on_its_columns() -> None:
    weight = random_weight(6)
    weight /= weight.abs().amax(1, keepdim=True) * 127 / 128  # at the next fraction one weight would be clipped, from 129 to 127
    sample = sample_of(weight * torch.exp2(torch.arange(6.0)).view(-1, 1), clip=0.2)
    (fit,) = fit_layer(sample, None, HIGH, per_channel=True)
    assert fit.fracs.tolist() == [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    assert on_the_grid(fit)
    finer = fit_layer(sample, fit.fracs + 1, HIGH, per_channel=True)[0]
    assert bool((finer.errors < fit.errors).any())


def test_a_channel_that_is_never_read_does_not_choose_the_format() -> None:
    weight = random_weight(6)
    alone = fit_layer(sample_of(weight[:5]), None, HIGH, per_channel=False)[0]
    weight[5] = 80.0
    sample = sample_of(weight)
    sample.importance[5] = 0.0
    assert abs(int(fit_layer(sample, None, HIGH, per_channel=False)[0].fracs) - int(alone.fracs)) <= 1


def test_a_row_that_only_switches_between_0_and_the_clip_may_saturate() -> None:
    """Its weights could be a tenth without changing the output much; the format is better spent on the others."""
    weight = random_weight(6)
    weight[5] = 400.0
    sample = sample_of(weight, clip=2.0)
    best = fit_layer(sample, None, HIGH, per_channel=False)[0]
    unclipped = fit_layer(sample, torch.tensor(-2.0), HIGH, per_channel=False)[0]
    assert int(best.fracs) >= 0
    assert best.error < 0.5 * unclipped.error


def test_mean_outputs_are_those_of_the_float_layer() -> None:
    sample = sample_of(random_weight(6), clip=0.8, noise=0.05)
    for fracs in (torch.tensor(3.0), None):
        fit = fit_layer(sample, fracs, HIGH, per_channel=False)[0]
        found = sample.rows(fit.weight) @ sample.inputs + sample.rows(fit.bias)
        drift = (found.clamp(0.0, 0.8) - sample.wanted).mean(2).abs()
        assert float(drift.max()) < 0.01


def test_given_formats_are_kept() -> None:
    fracs = torch.tensor([3.0, 4.0, 5.0, 6.0, 5.0, 4.0])
    fit, *others = fit_layer(sample_of(random_weight(6)), fracs, HIGH, per_channel=True)
    assert not others
    assert torch.equal(fit.fracs, fracs)


def test_flexround_is_deterministic_stays_on_the_grid_and_never_loses_on_held_out_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeft.quant.calibration.flexround.STEPS", 120)
    sample = sample_of(random_weight(6), noise=0.02, n=1600)
    start = fit_layer(sample, torch.tensor(3.0), HIGH, per_channel=False)[0]
    first, second = (flexround(sample, start, HIGH, seed=4) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    codes = first.weight * 8.0
    assert torch.equal(codes, codes.round())

    def held_out(fit: Any) -> float:
        out = (sample.rows(fit.weight) @ sample.columns + fit.offset).relu()[:, :, 1400:]
        return float((out - sample.wanted[:, :, 1400:]).square().mean())

    assert held_out(first) <= held_out(start) * (1 + 1e-6)


def test_flexround_repairs_plain_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a start without compensation, where there is something to gain."""
    sample = sample_of(random_weight(8), n=2400)
    start = fit_layer(sample, torch.tensor(2.0), HIGH, per_channel=False)[0]
    nearest = (sample.step.weight * 4.0).round() / 4.0
    plain = type(start).of(sample, nearest, start.fracs, sample.offset(nearest))
    assert flexround(sample, plain, HIGH, seed=0).error < 0.95 * plain.error
    assert not torch.equal(nearest, compensate_rounding(sample.step.weight, torch.tensor(4.0), sample.columns, HIGH))


def test_importance_is_the_energy_of_the_reading_weights() -> None:
    grouped = ConvStep(
        "r", ("x",), (4, 2, 2), weight=torch.tensor([[1.0, 2.0], [0.0, 2.0], [3.0, 0.0], [0.0, 0.0]]).view(4, 2, 1, 1), groups=2
    )
    producer = ConvStep("x", ("image",), (4, 2, 2), weight=torch.ones(4, 3, 1, 1), bias=torch.zeros(4))
    plan = Plan([producer, grouped], (3, 2, 2))
    torch.testing.assert_close(importance(plan, producer), torch.tensor([1.0, 8.0, 9.0, 0.0]) / 4.5)
    plan.steps.append(AddStep("sum", ("x", "r"), (4, 2, 2)))
    torch.testing.assert_close(importance(plan, producer), torch.ones(4))
    net = prepared(randomise(depthwise_net()))
    assert len(importance(net, net.weighted()[0])) == 8
