import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edgeft.config import QuantConfig
from edgeft.interpret import Interpreter
from edgeft.quant.calibration.calibrate import calibrate
from edgeft.quant.calibration.search import search
from edgeft.quant.lower import enforce_bounds, lower
from edgeft.quant.net import FixedPointNet
from edgeft.quant.plan import Plan, run_float
from edgeft.quant.training_graph import TrainingGraph
from tests.nets import bytes_of, depthwise_net, prepared, randomise, residual_net


def divergence(net: FixedPointNet, plan: Plan, images: torch.Tensor) -> float:
    with torch.no_grad():
        found, wanted = F.log_softmax(net(images), 1), F.log_softmax(run_float(plan, images), 1)
    return float(F.kl_div(found, wanted, log_target=True, reduction="batchmean"))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("build", [residual_net, depthwise_net])
def test_search_undoes_bad_formats_and_leaves_a_net_that_lowers(build: object, granularity: str) -> None:
    plan = prepared(randomise(build(), 1))  # type: ignore[operator]
    images = torch.from_numpy(bytes_of(32, seed=3))
    net, _ = calibrate(plan, images, QuantConfig(format="grid", granularity=granularity, fit_ranges=False), lambda *_: None)
    proposals = {point.name: net.frac(point.name) - 2 * (point.min_frac is None) for point in net.points}
    net.set_fracs(proposals)
    before, steps = divergence(net, plan, images), []
    result = search(net, images, {}, proposals, lambda *_: steps.append(1))
    assert len(steps) == len(plan.steps)
    assert 0 < result.n_kept <= result.n_tried
    assert sum(result.before) / 2 == pytest.approx(before, rel=1e-3)
    assert sum(result.after) / 2 == pytest.approx(divergence(net, plan, images), rel=1e-3)
    assert sum(result.after) < 0.9 * sum(result.before)
    enforce_bounds(net)
    expected, found = Interpreter(lower(net)).layers(bytes_of(2)), TrainingGraph(net).layers(bytes_of(2))
    for name, codes in expected.items():
        np.testing.assert_array_equal(codes, found[name], err_msg=name)


def test_moves_that_do_not_help_leave_no_trace() -> None:
    plan = prepared(randomise(depthwise_net()))
    images = torch.from_numpy(bytes_of(24, seed=3))
    first, _ = calibrate(plan, images, QuantConfig(format="grid"), lambda *_: None)
    state = {name: value.clone() for name, value in first.state_dict().items()}
    proposals = {point.name: first.frac(point.name) for point in first.points}
    result = search(first, images, {}, dict(proposals), lambda *_: None)
    if result.n_kept == 0:
        for name, value in first.state_dict().items():
            assert torch.equal(value, state[name]), name


def test_search_is_deterministic() -> None:
    nets = []
    for _ in range(2):
        plan = prepared(randomise(residual_net(), 2))
        nets.append(calibrate(plan, torch.from_numpy(bytes_of(24, seed=5)), QuantConfig(format="search"), lambda *_: None)[0])
    for first, second in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(first, second)
