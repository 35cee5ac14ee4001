"""Range fitting changes formats and weights, and neither the function nor anything that has a scale of its own."""

from typing import Any

import numpy as np
import pytest
import torch

from edgeft.config import QuantConfig
from edgeft.interpret import Interpreter
from edgeft.quant.calibration.calibrate import calibrate
from edgeft.quant.calibration.ranges import fit_ranges
from edgeft.quant.calibration.statistics import collect
from edgeft.quant.lower import enforce_bounds, lower
from edgeft.quant.net import FixedPointNet
from edgeft.quant.plan import IMAGE, run_float
from edgeft.quant.rescale import scale_group, ties
from edgeft.quant.training_graph import TrainingGraph
from tests.nets import bytes_of, depthwise_net, mixed_net, prepared, randomise, residual_net

IMAGES = torch.from_numpy(bytes_of(24, seed=1))
NETS = {"residual": residual_net, "depthwise": depthwise_net, "mixed": mixed_net}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("profile", ["u8", "s8"])
@torch.no_grad()
def test_the_function_stays_and_the_statistics_are_those_of_the_scaled_tensors(name: str, profile: str) -> None:
    plan = prepared(randomise(NETS[name]()), profile)
    before = collect(plan, IMAGES)
    wanted = run_float(plan, IMAGES)
    (found,) = fit_ranges(plan, [before], profile, "grid")
    torch.testing.assert_close(run_float(plan, IMAGES), wanted, rtol=1e-4, atol=1e-5)
    scaled = {tensor for tensor in found if found[tensor] is not before[tensor]}
    assert scaled or name == "depthwise", "otherwise nothing was tried"
    for tensor, statistics in collect(plan, IMAGES).items():
        torch.testing.assert_close(found[tensor].peak, statistics.peak, rtol=1e-4, atol=1e-6)
        assert found[tensor].spread == pytest.approx(statistics.spread, rel=1e-4)
        np.testing.assert_allclose(found[tensor].sample(), statistics.sample(), rtol=1e-3, atol=1e-4)


def test_clips_logits_and_the_image_keep_their_scale() -> None:
    plan = prepared(randomise(depthwise_net()), "u8")
    before = collect(plan, IMAGES)
    (found,) = fit_ranges(plan, [before], "u8", "minmax")
    assert any(step.clip is not None for step in plan.steps)
    for step in plan.steps:
        if step.clip is not None or step.name == plan.output:
            assert found[step.name] is before[step.name]


@pytest.mark.parametrize("rule", ["std", "grid", "minmax"])
@pytest.mark.parametrize("change", [1.05, 1.3, 1.7])
@torch.no_grad()
def test_the_scale_that_a_net_comes_with_does_not_matter(rule: Any, change: float) -> None:
    """A rectified net times a constant is the same net: what it loses must not depend on where its ranges lie between powers of two."""
    losses = []
    for factor in (1.0, change):
        plan = prepared(randomise(residual_net()))
        first = plan.weighted()[0]
        scale_group(plan, next(members for members in ties(plan).sets() if first.name in members), torch.tensor(factor))
        (found,) = fit_ranges(plan, [collect(plan, IMAGES)], "u8", rule)
        losses.append(float(found[first.name].peak.max()))
    octaves = np.log2(losses[1] / losses[0])
    assert abs(octaves - round(octaves)) <= 1 / 8 + 1e-6


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_integers_are_those_of_the_training_graph(name: str) -> None:
    plan = prepared(randomise(NETS[name]()))
    net, _ = calibrate(plan, IMAGES, QuantConfig(fit_ranges=True), lambda *_: None)
    enforce_bounds(net)
    images = bytes_of(6, seed=9)
    wanted, found = TrainingGraph(net).layers(images), Interpreter(lower(net)).layers(images)
    assert all(np.array_equal(wanted[tensor], found[tensor]) for tensor in found)


@torch.no_grad()
def test_a_restored_net_computes_tables_in_its_own_units() -> None:
    """The gains of tables move with the ranges; whoever restores a net starts from a plan that has not been scaled."""
    net, _ = calibrate(prepared(randomise(mixed_net())), IMAGES, QuantConfig(), lambda *_: None)
    fresh = FixedPointNet(prepared(randomise(mixed_net())), profile="u8", per_channel=False).eval()
    fresh.load_state_dict(net.state_dict())
    proposals = {point.name: net.frac(point.name) for point in net.points if point.name != IMAGE}
    fresh.set_fracs(proposals)
    net.set_fracs(proposals)
    assert any(key.endswith("gains") for key in net.state_dict())
    assert torch.equal(fresh(IMAGES), net(IMAGES))
