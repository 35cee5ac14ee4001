import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from edgeft.bounds import accumulator_bound
from edgeft.config import QuantConfig
from edgeft.errors import UnsupportedError
from edgeft.fixedpoint import FixedPointFormat
from edgeft.interpret import Interpreter
from edgeft.quant import a2q
from edgeft.quant.calibration.calibrate import calibrate
from edgeft.quant.lower import enforce_bounds, integers, lower
from edgeft.quant.net import FixedPointNet
from edgeft.quant.plan import GlobalPoolStep, run_float
from tests.nets import bytes_of, calibrated, depthwise_net, prepared, randomise, residual_net

NETS = {"residual": residual_net, "depthwise": depthwise_net}


def net_of(name: str = "residual", profile: str = "u8", **quant: Any) -> FixedPointNet:
    return calibrated(prepared(randomise(NETS[name]()), profile), profile=profile, **quant)


def bound(net: FixedPointNet) -> int:
    return max(accumulator_bound(*integers(net, step), net.format(step.inputs[0])) for step in net.plan.weighted())


def logits(net: FixedPointNet) -> Tensor:
    with torch.no_grad():
        out: Tensor = net(torch.from_numpy(bytes_of(12, seed=5)))
    return out


# --- projection ------------------------------------------------------------------------------------------------------


def rows(n: int, k: int, size: float, seed: int = 0) -> Tensor:
    return size * torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) ** 3


@pytest.mark.parametrize("size", [0.9, 3.0, 127.0])
@pytest.mark.parametrize("budget", [0.0, 1.0, 7.0, 100.0, 1e9])
@pytest.mark.parametrize("on_grid", [False, True])
def test_rounded_sums_use_the_budget_and_nothing_else_moves(size: float, budget: float, on_grid: bool) -> None:
    sizes, allowed = rows(40, 50, size), torch.full((40,), budget, dtype=torch.float64)
    sizes = sizes.round() if on_grid else sizes
    found = a2q.shrink(sizes, allowed)
    for before, after in zip(sizes, found, strict=True):
        if float(before.round().sum()) <= budget:
            assert torch.equal(before, after)
        else:
            assert float(after.round().sum()) == budget
            kept = before.round() == after.round()
            assert torch.equal(before[kept], after[kept])
            assert bool((after[~kept] < before[~kept]).all())
            assert bool((after >= 0.0).all())


@pytest.mark.parametrize("seed", range(20))
def test_the_nearest_rows_of_all(seed: int) -> None:
    """Against every combination of codes: distance from each entry to the nearest value that rounds to its code."""
    sizes = 4.5 * torch.rand(1, 4, generator=torch.Generator().manual_seed(seed)).double()
    budget = float(seed % 7)
    costs = []
    for codes in itertools.product(range(6), repeat=4):
        if sum(codes) <= budget:
            low, high = torch.tensor(codes) - 0.5, torch.tensor(codes) + a2q.BELOW_HALF
            costs.append(float((sizes[0] - torch.maximum(low, torch.minimum(high, sizes[0]))).square().sum()))
    found = a2q.shrink(sizes, torch.tensor([budget], dtype=torch.float64))
    assert float((sizes - found).square().sum()) <= min(costs) + 0.01  # the margin below one half is a detail of either side


@pytest.mark.parametrize("text", ["u8.6", "s8.4"])
@pytest.mark.parametrize("bits", [12, 13, 16, 20, 24])
@pytest.mark.parametrize("channels", [False, True])
def test_no_input_and_no_order_leaves_the_width(text: str, bits: int, channels: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    fmt = FixedPointFormat.parse(text)
    weight, bias = torch.randn(8, 5, 3, 3, generator=generator), 3 * torch.randn(8, generator=generator)
    frac = torch.arange(8.0).view(8, 1, 1, 1) if channels else torch.tensor(5.0)
    bias_frac = frac.flatten().expand(8) + fmt.frac
    fit, fit_bias = a2q.projected(weight, bias, frac, bias_frac, fmt, bits)
    codes = (fit * torch.exp2(frac)).round().flatten(1).long().numpy()
    offsets = (fit_bias * torch.exp2(bias_frac)).round().long().numpy()
    worst = 0
    for row, offset in zip(codes, offsets, strict=True):
        for extreme in (max, min):
            products = sorted((extreme(int(w) * fmt.min_code, int(w) * fmt.max_code) for w in row), reverse=extreme is max)
            for order in (products, products[::-1]):  # the best and the worst order, the bias first or last
                sums = [*itertools.accumulate([int(offset), *order]), *itertools.accumulate(order)]
                worst = max(worst, *map(abs, sums))
    assert worst <= 2 ** (bits - 1) - 1
    assert worst == accumulator_bound(codes.astype(np.int8), offsets.astype(np.int32), fmt)
    if bits <= 16:
        assert worst > 0.9 * 2 ** (bits - 1) - fmt.max_code  # the budget is used
    if bits == 24:
        assert torch.equal(fit * torch.exp2(frac), (weight * torch.exp2(frac)).clamp(-127, 127))
        assert torch.equal(fit_bias, bias)


def test_projection_twice_is_projection_once() -> None:
    fmt = FixedPointFormat.parse("u8.6")
    weight, bias = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)), torch.zeros(4)
    frac, bias_frac = torch.tensor(4.0), torch.tensor(10.0)
    once, offset = a2q.projected(weight, bias, frac, bias_frac, fmt, 14)
    assert not torch.equal(once, weight)
    assert torch.equal(a2q.projected(once, offset, frac, bias_frac, fmt, 14)[0], once)


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("profile", ["u8", "s8"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_prepared_networks_fit_and_compute_the_same_integers(name: str, profile: str, granularity: str) -> None:
    net = net_of(name, profile, granularity=granularity)
    before = logits(net)
    assert bound(net) > a2q.largest(16)
    with a2q.held(net, 16):
        pass
    assert enforce_bounds(net) == []
    a2q.check(net, 16)
    assert 0.8 * 2**15 < bound(net) < 2**15
    graph = lower(net)
    images = bytes_of(4)
    found = Interpreter(graph).layers(images)[graph.output] * graph.format(graph.output).step
    np.testing.assert_allclose(found, net(torch.from_numpy(images)).detach().numpy(), rtol=0, atol=1e-9)
    assert float((logits(net) - before).square().mean().sqrt() / before.std()) < 0.4  # without any training


def test_32_bits_change_nothing() -> None:
    net = net_of()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with a2q.held(net, 32):
        assert not net._forward_pre_hooks
    a2q.project(net, 32)
    assert a2q.choose_formats(net, 32) == []
    a2q.check(net, 32)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_coarser_formats_lose_less_than_few_fine_weights() -> None:
    def loss(choose: bool) -> float:
        net = net_of("depthwise")
        before = logits(net)
        if choose:
            old = {step.name: net.weight_fracs(step.name) for step in net.plan.weighted()}
            changed = a2q.choose_formats(net, 16)
            assert changed == [name for name, fracs in old.items() if net.weight_fracs(name) != fracs]
            assert all(net.weight_fracs(name) <= fracs for name, fracs in old.items())
        a2q.project(net, 16)
        a2q.check(net, 16)
        return float((logits(net) - before).square().mean())

    assert loss(choose=True) < 0.7 * loss(choose=False)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("name", NETS)
def test_calibration_keeps_channel_means_under_projection(name: str, granularity: str) -> None:
    def error(bits: int, **quant: Any) -> float:
        plan = prepared(randomise(NETS[name]()))
        images = torch.from_numpy(bytes_of(24, seed=5))
        net = calibrate(plan, torch.from_numpy(bytes_of(24, seed=1)), QuantConfig(granularity=granularity, **quant), lambda *_: None)[0]
        a2q.prepare(net, bits)
        a2q.check(net, bits)
        with torch.no_grad():
            return float((net(images) - run_float(plan, images)).square().mean())

    fitted, after = error(16, accumulator_bits=16), error(16)
    assert fitted < 0.6 * after
    assert error(32) < fitted


def test_fitted_nets_are_left_alone_by_what_follows() -> None:
    net = net_of(accumulator_bits=16)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    a2q.check(net, 16)
    with a2q.held(net, 16):
        pass
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_training_stays_within_the_width() -> None:
    net = net_of()
    images, labels = torch.from_numpy(bytes_of(12)), torch.arange(12) % 5
    losses = []
    with a2q.held(net, 16):
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
        for _ in range(15):
            loss = cross_entropy(net(images), labels)
            a2q.check(net, 16)  # what this step has computed with
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert not net._forward_pre_hooks
    a2q.check(net, 16)
    with torch.no_grad():
        net.layer("0.0").weight.mul_(4.0)
    with pytest.raises(UnsupportedError, match=r"layer '0\.0'"):
        a2q.check(net, 16)


def test_a_layer_that_cannot_fit_is_named_before_training() -> None:
    net = net_of()
    pool = next(step.name for step in net.plan.steps if isinstance(step, GlobalPoolStep))
    before = net.layer("0.0").weight.clone()
    with pytest.raises(
        UnsupportedError, match=f"layer '{pool}': its accumulator may need 13 bits; quant.accumulator_bits allows 12"
    ) as info:
        a2q.prepare(net, 12)
    assert info.value.hint == "--set quant.accumulator_bits=13"
    assert torch.equal(net.layer("0.0").weight, before)
    a2q.prepare(net, 13)


def test_additions_count_the_bits_that_align_their_operands() -> None:
    net = net_of()
    add = net.plan["2.add"]
    skip, branch = add.inputs
    net.quantizer(branch).body.frac.fill_(net.frac(net.storage.sources(skip)[0]) - 5)
    with pytest.raises(UnsupportedError, match=r"layer '2\.add': its accumulator may need 14 bits"):  # 255 * 1 + 128 * 1 with 2^5 on one
        a2q.prepare(net, 13)
    a2q.prepare(net, 14)


def test_the_error_names_what_is_needed() -> None:
    net = net_of()
    with pytest.raises(UnsupportedError) as info:
        a2q.check(net, 12)
    assert info.value.hint is not None
    needed = int(info.value.hint.rpartition("=")[2])
    assert needed == net_bits(net, str(info.value).split("'")[1])


def net_bits(net: FixedPointNet, name: str) -> int:
    step = next(step for step in net.plan.weighted() if step.name == name)
    return accumulator_bound(*integers(net, step), net.format(step.inputs[0])).bit_length() + 1
