import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from edgeft.checkpoint import copy_of, restore, state_of
from edgeft.config import QuantConfig
from edgeft.interpret import Interpreter
from edgeft.methods import Stage
from edgeft.quant.brevitas_bridge import FixedPointQuant
from edgeft.quant.calibration.calibrate import calibrate
from edgeft.quant.control import FormatControl
from edgeft.quant.f8net import octaves
from edgeft.quant.formats import MAX_SHIFT
from edgeft.quant.lower import enforce_bounds, lower
from edgeft.quant.net import FixedPointNet
from edgeft.quant.rescale import IMAGE_NORM
from edgeft.quant.training_graph import TrainingGraph
from edgeft.train import fit
from tests import tiny
from tests.nets import IMAGENET_MEAN, IMAGENET_STD, bytes_of, depthwise_net, prepared, randomise, residual_net

QUICK = {"format": "std", "update_every": 2, "sigma_momentum": 0.5, "hysteresis": 0.15, "freeze_at": 0.5, "rounding": "nearest"}


def controlled(build: Any = residual_net, **quant: Any) -> tuple[FixedPointNet, FormatControl]:
    config = QuantConfig(**(QUICK | quant))
    plan = prepared(randomise(build()), config.profile, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    net, sigmas = calibrate(plan, torch.from_numpy(bytes_of(12, seed=1)), config, lambda *_: None)
    return net, FormatControl(net, config, sigmas)


def fracs(net: FixedPointNet) -> dict[str, tuple[int, ...]]:
    return {p.name: (net.frac(p.name),) for p in net.points} | {f"{s.name}.weight": net.weight_fracs(s.name) for s in net.plan.weighted()}


def train(net: FixedPointNet, control: FormatControl, steps: range, total: int, lr: float = 0.3) -> list[dict[str, tuple[int, ...]]]:
    """Plain gradient descent; the formats in force in each step."""
    history = []
    trained = [p for p in net.parameters() if p.requires_grad]
    for step in steps:
        control.before_step(step, total)
        images = torch.from_numpy(bytes_of(8, seed=100 + step))
        loss = cross_entropy(net(images), torch.arange(8) % 5)
        gradients = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.sub_(lr * gradient)
            for layer in map(net.layer, control.layers):  # drift that makes formats move
                layer.weight.mul_(1.06)
        history.append(fracs(net))
    return history


def test_formats_follow_the_statistics_by_single_steps_and_freeze() -> None:
    net, control = controlled()
    start = fracs(net)
    history = train(net, control, range(24), 24)
    assert control.moves > 0
    changes = 0
    for step, (before, after) in enumerate(zip([start, *history], history, strict=False)):
        for name in before:
            moved = [abs(b - a) for a, b in zip(before[name], after[name], strict=True)]
            assert max(moved) <= 1
            changes += sum(moved) > 0
            assert not any(moved) or (step <= 12 and (step - 1) % 2 == 0), "only after an observed step, and not once frozen"
    # One tensor counts once per change; pools and the image have fixed formats.
    assert control.moves == changes
    assert history[-1] == history[12] != start
    assert not any(body.observing for body in net.modules() if isinstance(body, FixedPointQuant))
    enforce_bounds(net)
    codes, found = Interpreter(lower(net)).layers(bytes_of(4)), TrainingGraph(net).layers(bytes_of(4))
    assert all((codes[name] == found[name]).all() for name in codes)


@pytest.mark.parametrize("quant", [{"format": "grid"}, {"format": "minmax"}, {"freeze_at": 0.0}], ids=str)
def test_other_rules_and_an_early_freeze_never_move(quant: dict[str, Any]) -> None:
    net, control = controlled(**quant)
    start = fracs(net)
    assert train(net, control, range(6), 6)[-1] == start
    assert control.moves == 0


def feed(control: FormatControl, name: str, sigmas: list[float]) -> list[int]:
    """Fractions after each update, when the tensor is seen with these deviations and everything else as it was."""
    body, found = control.net.quantizer(name).body, []
    for step, sigma in enumerate(sigmas):
        control.before_step(2 * step, 10_000)
        body.moments.copy_(torch.tensor([1.0, 0.0, sigma**2]))
        control.before_step(2 * step + 1, 10_000)
        found.append(control.net.frac(name))
    return found


def lone(net: FixedPointNet, control: FormatControl) -> str:
    """A tensor outside of every residual group."""
    return next(p.name for p in net.points if p.group is None and p.name in control.points)


def test_sigma_around_a_threshold_does_not_flip_the_format() -> None:
    net, control = controlled(sigma_momentum=0.9)
    name = lone(net, control)
    start = net.frac(name)
    threshold = control.points[name] * 2.0**-start
    net.quantizer(name).body.running_sigma.fill_(threshold)
    assert set(feed(control, name, [threshold * (1.3 if i % 2 else 1 / 1.3) for i in range(40)])) == {start}
    # Without averaging and hysteresis, the same sequence would flip it at every update.
    assert math.floor(octaves(control.points[name], threshold * 1.3)) != math.floor(octaves(control.points[name], threshold / 1.3))


@pytest.mark.parametrize(("factor", "direction"), [(1.05, 0), (1.2, -1), (0.5, 0), (0.43, 1), (64.0, -1), (1 / 64, 1)])
def test_moves_once_past_the_hysteresis(factor: float, direction: int) -> None:
    net, control = controlled(sigma_momentum=0.0)
    name = lone(net, control)
    start = net.frac(name)
    assert feed(control, name, [control.points[name] * 2.0**-start * factor]) == [start + direction]
    assert control.moves == abs(direction)


def test_sigma_is_averaged() -> None:
    net, control = controlled(sigma_momentum=0.5)
    name = lone(net, control)
    body = net.quantizer(name).body
    body.running_sigma.fill_(1.0)
    feed(control, name, [3.0])
    assert float(body.running_sigma) == 2.0
    feed(control, name, [2.0])
    assert float(body.running_sigma) == 2.0


def test_residual_groups_stay_together() -> None:
    net, control = controlled(sigma_momentum=0.0)
    name = "2.add"
    group = next(p.group for p in net.points if p.name == name)
    start = net.frac(name)
    feed(control, name, [control.points[name] * 2.0**-start * 1.5])
    for p in net.points:
        if p.group == group:
            assert net.frac(p.name) == start - 1 if p.carried else net.frac(p.name) <= start - 1


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_weights_and_biases_follow_the_activations(granularity: str) -> None:
    """Moved activation formats leave no shift beyond what float32 runtimes get right, and move the grid of biases."""
    net, _ = controlled(granularity=granularity)
    for step in net.plan.weighted()[1:-1]:
        net.set_weight_fracs(step.name, tuple(99 for _ in net.weight_fracs(step.name)))
    net.set_fracs({p.name: net.frac(p.name) - 2 * (i % 2) for i, p in enumerate(net.points)})
    for step in net.plan.weighted():
        frac = net.frac(step.inputs[0])
        biases = [int(f) for f in net.layer(step.name).bias_frac.tolist()]
        assert set(biases) == {frac + f for f in net.weight_fracs(step.name)}
        if step.name != net.plan.output:
            assert max(biases) - net.frac(step.name) <= MAX_SHIFT[net.format(step.name).signed]


def test_copied_buffers_resume_to_the_same_formats() -> None:
    whole, control = controlled(depthwise_net)
    expected = train(whole, control, range(16), 16)
    for cut in (5, 6):  # after an unobserved and after an observed step
        first, control_1 = controlled(depthwise_net)
        train(first, control_1, range(cut), 16)
        second, control_2 = controlled(depthwise_net)
        restore(second, copy_of(state_of(first)))
        assert train(second, control_2, range(cut, 16), 16) == expected[cut:]
        assert control_2.moves == control.moves > 0
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_validation_is_not_observed() -> None:
    net, control = controlled()
    control.before_step(0, 100)
    with torch.no_grad():
        net(torch.from_numpy(bytes_of(4)))
    TrainingGraph(net).logits(bytes_of(4))
    bodies = [body for body in net.modules() if isinstance(body, FixedPointQuant)]
    assert any(body.observing for body in bodies)
    assert all(float(body.moments.abs().sum()) == 0 for body in bodies)
    net(torch.from_numpy(bytes_of(4)))
    assert all((float(body.moments[0]) > 0) == body.observing for body in bodies)


def test_fixed_formats_are_left_alone() -> None:
    net, control = controlled()
    pools = {step.name for step in net.plan.steps if type(step).__name__ == "GlobalPoolStep"}
    assert pools
    assert not ({IMAGE_NORM, *pools} & (set(control.points) | set(control.layers)))
    assert net.layer(IMAGE_NORM).weight.requires_grad is False


def test_with_the_training_loop(tmp_path: Path) -> None:
    """The stage trains, formats are those of the kept epoch, and an interrupted stage ends in the same network."""
    stage = Stage("qat", "sgd", 3, (0.05,), "frozen", 0.9, 0.0, keep_start=True)
    data = tiny.dataset()

    def run(work: Path, fail_at: int | None = None) -> tuple[FixedPointNet, FormatControl]:
        net, control = controlled()

        def on_step(step: int, total: int) -> None:
            if step == fail_at:
                raise KeyboardInterrupt
            control.before_step(step, total)

        fit(net, stage, data.train, data.val, tiny.context(work), on_step=on_step)
        return net, control

    whole, control = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", fail_at=9)
    resumed, control_2 = run(tmp_path / "cut")
    assert tiny.same(tiny.tensors(whole), tiny.tensors(resumed))
    assert control.moves == control_2.moves
    enforce_bounds(whole)
    codes, found = Interpreter(lower(whole)).layers(bytes_of(4)), TrainingGraph(whole).layers(bytes_of(4))
    assert all((codes[name] == found[name]).all() for name in codes)
