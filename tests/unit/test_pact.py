from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgeft.config import QuantConfig
from edgeft.quant.conventional import ConventionalNet
from edgeft.quant.formats import Groups
from edgeft.quant.net import FixedPointNet
from edgeft.quant.pact import ClipLevels, PublishedFormats, published_limit, reach
from edgeft.quant.plan import IMAGE, ConvStep, LinearStep, MulStep, Plan, TableStep
from tests.nets import bytes_of, calibrated, depthwise_net, head, prepared, randomise, residual_net

NETS = {"residual": residual_net, "depthwise": depthwise_net}


def net_of(name: str = "residual", profile: str = "u8") -> FixedPointNet:
    return calibrated(prepared(randomise(NETS[name]()), profile), profile=profile)


def model_of(net: FixedPointNet, **quant: Any) -> ConventionalNet:
    return ConventionalNet(net, QuantConfig(recipe="f8net-conventional", **quant))


def logits(model: nn.Module, seed: int = 5) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(torch.from_numpy(bytes_of(12, seed=seed)))
    return out


# --- which tensors share a unit --------------------------------------------------------------------------------------


def test_a_residual_group_has_one_unit() -> None:
    net = net_of()
    sets = reach(net.plan)
    assert {"0.0", "1", "2.right.1.0", "2.add", "3.right.1.0", "3.add_1"} in sets  # stem, pool and two blocks
    assert {"2.right.0.0"} in sets  # inside a branch
    last = next(members for members in sets if "4.add_2" in members)
    assert {"4.left.0", "4.right.0", "5"} <= last  # down to the global pool
    assert all(net.plan.output not in members and IMAGE not in members for members in sets)
    assert sum(map(len, sets)) == len(set().union(*sets))


def test_units_are_given_at_the_ends_and_around_products_and_tables() -> None:
    weight, bias = torch.ones(2, 2, 1, 1), torch.zeros(2)
    shape = (2, 4, 4)

    def conv(name: str, source: str, **changes: Any) -> ConvStep:
        return ConvStep(name, (source,), shape, **({"weight": weight, "bias": bias} | changes))

    plan = Plan(
        [
            conv("a", IMAGE), TableStep("b", ("a",), shape, function="sigmoid"), conv("c", "b"), conv("d", "c"),
            MulStep("e", ("d", "b"), shape), conv("f", "e"), conv("g", "f", fixed_frac=6), conv("h", "g"),
            conv("i", "h", fixed_frac=6, bias=torch.ones(2)), LinearStep("out", ("i",), (2,), weight=torch.ones(2, 2), bias=bias),
        ],
        shape,
    )  # fmt: skip
    assert reach(plan) == [{"c"}, {"f", "g"}]


@pytest.mark.parametrize("profile", ["u8", "s8"])
@pytest.mark.parametrize("name", NETS)
def test_every_gain_starts_at_one(name: str, profile: str) -> None:
    net = net_of(name, profile)
    levels = ClipLevels(net)
    gains = levels.gains()
    assert gains.tolist() == [1.0] * len(levels.references) != []
    assert levels.to_json() == {point: net.format(point).max_value for point in levels.references}
    assert levels.gain(net.plan.output, gains) == levels.gain(IMAGE, gains) == 1.0
    groups = {levels.gain(point.name, torch.arange(len(gains))).item() for point in net.points}  # type: ignore[union-attr]
    assert groups == set(range(len(gains)))


# --- one tensor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frac", [2, 4, 7])
@pytest.mark.parametrize("alpha", [6.0, -6.0, 1.37])
def test_value_and_gradient_are_those_of_pact(frac: int, alpha: float) -> None:
    """eta * round(x / eta) is alpha / 255 * round(255 x / alpha), clipped; the fraction cancels out."""
    net = calibrated(prepared(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), *head(4))))
    levels = ClipLevels(net)
    name = levels.references[0]
    with torch.no_grad():
        levels.alpha[0] = alpha
        net.quantizer(name).body.frac.fill_(frac)
    x = torch.linspace(-2.0, 10.0, 41).requires_grad_()
    gain = levels.gain(name, levels.gains())
    y = gain * net.quantizer(name)(x / gain)
    step = abs(alpha) / 255
    wanted = (x.detach() / step).round().clamp(0, 255) * step
    torch.testing.assert_close(y.detach(), wanted, rtol=1e-5, atol=1e-5)
    slopes = [torch.autograd.grad(part, levels.alpha, retain_graph=True)[0][0].item() for part in y]
    for value, rounded, slope in zip(x.tolist(), wanted.tolist(), slopes, strict=True):
        sign = 1.0 if alpha > 0 else -1.0
        expected = 0.0 if value < 0 else 1.0 if value > abs(alpha) else (rounded - value) / abs(alpha)
        assert slope == pytest.approx(sign * expected, abs=2e-4)
    passed = torch.autograd.grad(y.sum(), x)[0]
    assert passed.tolist() == pytest.approx(((x.detach() > 0) & (x.detach() < abs(alpha) + step / 2)).float().tolist(), abs=1e-6)


# --- networks --------------------------------------------------------------------------------------------------------


def disturb(model: ConventionalNet) -> None:
    """Clip levels away from where gains are 1."""
    with torch.no_grad():
        factors = 0.6 + torch.rand(model.clips.alpha.shape, generator=torch.Generator().manual_seed(0))
        model.clips.alpha.mul_(factors)


@pytest.mark.parametrize("profile", ["u8", "s8"])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("delta", [-2, 1])
def test_the_fraction_is_only_a_unit(name: str, profile: str, delta: int) -> None:
    """Moving the formats of a whole set changes no logit: in a residual group, the identity's gain stays 1."""
    net = net_of(name, profile)
    model = model_of(net, profile=profile).eval()
    disturb(model)
    before = logits(model)
    moved = set().union(*reach(net.plan))
    for point in net.points:
        if point.name in moved:
            net.quantizer(point.name).body.frac += delta
    for step in net.plan.weighted():
        change = delta * ((net.storage.sources(step.name)[0] in moved) - (net.storage.sources(step.inputs[0])[0] in moved))
        net.set_weight_fracs(step.name, tuple(frac + change for frac in net.weight_fracs(step.name)))
    assert torch.equal(logits(model), before)


def test_a_private_fraction_inside_a_residual_group_is_no_gain() -> None:
    """The published code doubles or halves the identity path there; here it changes range and rounding only."""
    net = net_of()
    model = model_of(net).eval()
    before = logits(model)
    for name in ("2.right.1.0", "2.add"):
        net.quantizer(name).body.frac -= 1
    for step in net.plan.weighted():
        net.set_weight_fracs(step.name, net.weight_fracs(step.name))
    assert 0.0 < float((logits(model) - before).abs().max()) < 0.1 * float(before.std())


@pytest.mark.parametrize("name", NETS)
def test_gains_cancel_in_real_values(name: str) -> None:
    """Clip levels above every value change rounding only, and the clipped values are those of the float net with clips."""
    net = net_of(name)
    model = model_of(net).eval()
    before = logits(model)
    with torch.no_grad():
        model.clips.alpha.mul_(1.3)
    model.before_step(0, 100)
    difference = float((logits(model) - before).square().mean().sqrt() / before.std())
    assert 0.0 < difference < 0.2


# --- the published formats -------------------------------------------------------------------------------------------


def chain(signed: bool) -> tuple[ConventionalNet, str, Tensor]:
    """Two layers with nothing else between them, the tensor between them, and images."""
    middle: list[nn.Module] = [] if signed else [nn.ReLU()]
    net = nn.Sequential(nn.Conv2d(3, 8, 1), *middle, nn.Conv2d(8, 8, 1), nn.ReLU(), *head(8))
    fixed = calibrated(prepared(randomise(net), size=16))
    return model_of(fixed, format="pact"), "0", torch.from_numpy(bytes_of(8, 16, seed=1))


@pytest.mark.parametrize(
    ("signed", "ratio", "end"),
    [(False, 3.3, 0), (False, 4.0, 6), (False, 7.0, 6), (False, 7.9, 8), (False, 12.0, 8), (True, 2.9, 0), (True, 3.6, 6), (True, 7.0, 7)],
)
def test_published_rule_feeds_back_into_itself(signed: bool, ratio: float, end: int) -> None:
    """The fraction depends on alpha / sigma only: it runs to an end of its range, or stays where it started (here at 6)."""
    model, name, images = chain(signed)
    assert model.published is not None
    step = model.net.plan[name]
    sigma = float(model.net.run_step(step, [model.net.plan.encode(images)]).detach().std())
    number = [point.name for point in model.net.points].index(name)
    with torch.no_grad():
        model.published.running[number] = 6.0
        model.clips.alpha[model.clips.references.index(name)] = ratio * sigma
        model.train()
        for _ in range(80):
            model(images)
    model.eval()
    assert model.net.frac(name) == end


@pytest.mark.parametrize("ratio", [3.3, 5.0, 12.0])
def test_default_formats_have_no_feedback(ratio: float) -> None:
    net = net_of("depthwise")
    model = model_of(net, update_every=1, freeze_at=1.0).train()
    start = {point.name: net.frac(point.name) for point in net.points}
    with torch.no_grad():
        model.clips.alpha.mul_(ratio / 5.0)
        for step in range(20):
            model.before_step(step, 20)
            model(torch.from_numpy(bytes_of(8)))
    assert {point.name: net.frac(point.name) for point in net.points} == start


def test_published_average_is_of_fractions_and_the_batch_has_its_own() -> None:
    model, name, images = chain(signed=True)
    assert model.published is not None
    number = [point.name for point in model.net.points].index(name)
    with torch.no_grad():
        model.published.running[number] = 2.0
        model.clips.alpha[model.clips.references.index(name)] *= 4.0  # out of the band in which the batch agrees with the average
        model.train()
        model(images)
    batch = model.net.frac(name)
    assert batch > 2
    assert float(model.published.running[number]) == pytest.approx(0.9 * 2.0 + 0.1 * batch)
    model.eval()
    assert model.net.frac(name) == round(float(model.published.running[number])) == 2


def test_published_average_is_rounded_half_to_even_and_limited() -> None:
    net = net_of()
    formats = PublishedFormats(net)
    for value, wanted in ((5.5, 6), (4.5, 4), (-3.0, 0), (11.0, 8)):
        formats.running.fill_(value)
        formats.settle()
        assert {net.frac(p.name) for p in net.points if not p.format.signed and p.group is None} == {wanted}
    assert published_limit(11, next(p.format for p in net.points if p.format.signed)) == 7


def test_published_weight_formats_follow_every_forward() -> None:
    model, name, images = chain(signed=False)
    layer = model.net.layer(name)
    with torch.no_grad():
        model.train()
        model(images)
        before = model.net.weight_fracs(name)[0]
        layer.weight.div_(4.0)
        model(images)
        assert model.net.weight_fracs(name)[0] == min(before + 2, 7)
        layer.weight.mul_(1e4)
        model.eval()
        assert model.net.weight_fracs(name)[0] == 0


def test_published_formats_keep_residual_groups_together() -> None:
    net = net_of()
    model = model_of(net, format="pact").train()
    disturb(model)
    groups = Groups.of(net.plan.steps)
    assert len(groups.sets()) > 1
    with torch.no_grad():
        for seed in range(5):
            model(torch.from_numpy(bytes_of(8, seed=seed)))
            for number in {p.group for p in net.points if p.group is not None}:
                assert len({net.frac(p.name) for p in net.points if p.group == number and p.carried}) == 1
