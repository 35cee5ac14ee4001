from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from edgeft.config import QuantConfig, build_config
from edgeft.interpret import Interpreter
from edgeft.models import Classifier
from edgeft.quant import a2q
from edgeft.quant.conventional import ChannelMoments, ConventionalNet, FoldedNorm, conventional, conventional_stage
from edgeft.quant.lower import enforce_bounds, lower
from edgeft.quant.net import FixedPointNet
from edgeft.quant.plan import ConvStep
from edgeft.quant.stage import Job
from edgeft.quant.stage import calibrated as calibrated_stage
from edgeft.quant.training_graph import TrainingGraph
from edgeft.train import fit
from tests import tiny
from tests.nets import IMAGENET_MEAN, IMAGENET_STD, bytes_of, calibrated, depthwise_net, mixed_net, prepared, randomise, residual_net

NETS = {"residual": residual_net, "depthwise": depthwise_net, "mixed": mixed_net}
LABELS = torch.arange(12) % 5


def config_of(**quant: Any) -> QuantConfig:
    return QuantConfig(**({"recipe": "f8net-conventional", "update_every": 2, "rounding": "nearest"} | quant))


def model_of(name: str = "residual", **quant: Any) -> ConventionalNet:
    config = config_of(**quant)
    plan = prepared(randomise(NETS[name]()), config.profile, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    net = calibrated(plan, recipe=config.recipe, profile=config.profile, format=config.format, granularity=config.granularity,
                     rounding=config.rounding, fit_ranges=config.fit_ranges)  # fmt: skip
    a2q.prepare(net, config.accumulator_bits)
    return ConventionalNet(net, config)


def norm_of(model: ConventionalNet, key: str) -> FoldedNorm:
    norm = model.norms[key]
    assert isinstance(norm, FoldedNorm)
    return norm


def images(seed: int = 5) -> Tensor:
    return torch.from_numpy(bytes_of(12, seed=seed))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(images())
    return out


def train(model: ConventionalNet, steps: int = 8, lr: float = 0.02) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    losses = []
    for step in range(steps):
        model.train()
        model.before_step(step, steps)
        loss = cross_entropy(model(images()), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- batch norm ------------------------------------------------------------------------------------------------------


def folded(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> tuple[Tensor, FoldedNorm]:
    """Weight of the convolution with `norm` folded in, and what the recipe puts behind it."""
    assert norm.running_var is not None
    assert norm.running_mean is not None
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    bias = norm.bias - norm.running_mean * factor
    return conv.weight * factor.view(-1, 1, 1, 1), FoldedNorm(torch.stack((norm.bias, norm.weight.abs())).detach(), bias.detach()).double()


def test_it_is_batch_norm_reparametrised() -> None:
    """Outputs, their gradients to the input, and the running statistics are those of the batch norm that was folded."""
    conv = nn.Conv2d(3, 6, 3, bias=False).double()
    norm = nn.BatchNorm2d(6).double()
    randomise(nn.Sequential(conv, norm))
    weight, ours = folded(norm, conv)
    weight = weight.detach().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    norm.train()
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = (weight / conv.weight).detach()[:, 0, 0, 0]
    start = mean.clone(), variance.clone(), ours.mean.clone(), ours.variance.clone()
    for _ in range(4):
        x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        factor, shift = ours(nn.functional.conv2d(mine, weight))
        found = nn.functional.conv2d(mine, weight * factor.view(-1, 1, 1, 1), shift)
        wanted = norm(conv(theirs))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        (found**3).sum().backward()
        (wanted**3).sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3)
    rest = 0.9**4
    torch.testing.assert_close(ours.mean - rest * start[2], scale * (mean - rest * start[0]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.variance - rest * start[3], scale**2 * (variance - rest * start[1]), rtol=1e-6, atol=1e-6)


def test_channel_moments_and_their_gradients() -> None:
    x = torch.randn(3, 4, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    mean, variance = ChannelMoments.apply(x)
    wanted = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close((variance, mean), wanted)
    assert torch.autograd.gradcheck(ChannelMoments.apply, (x,))


def test_start_is_the_identity_on_folded_weights() -> None:
    norm = torch.tensor([[0.3, -2.0, 0.0, 5.0], [1.5, 1e-3, 0.0, 1e-20]])
    bias = torch.tensor([0.1, 0.2, -0.3, 4.0])
    factor, shift = FoldedNorm(norm, bias)(None)
    assert factor.tolist() == [1.0] * 4
    torch.testing.assert_close(shift, bias)


def test_dead_channels_stay_finite() -> None:
    ours = FoldedNorm(torch.zeros(2, 3), torch.zeros(3))
    factor, shift = ours(torch.zeros(1, 3, 1, 1, requires_grad=True))
    (factor.sum() + shift.sum()).backward()
    assert factor.tolist() == [1.0] * 3
    assert ours.weight.grad is not None
    assert bool(torch.isfinite(ours.weight.grad).all())


@pytest.mark.parametrize("name", ["residual", "depthwise"])
def test_training_mode_is_the_float_net_in_training_mode(name: str) -> None:
    """Batch statistics of the whole network, on images whose statistics are not the folded ones."""
    float_net = randomise(NETS[name]())
    net = calibrated(prepared(float_net), 24, rounding="nearest")
    model = ConventionalNet(net, config_of()).train()
    with torch.no_grad():
        wanted = float_net.train()(images().float() / 127.5 - 1)
        other = float_net.eval()(images().float() / 127.5 - 1)
        found = model(images())
    error, shift = (float((found - x).square().mean().sqrt() / wanted.std()) for x in (wanted, other))
    assert error < 0.25
    assert shift > 2 * error


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["u8", "s8"])
@pytest.mark.parametrize("name", NETS)
def test_start_is_the_calibrated_net(name: str, profile: str) -> None:
    model = model_of(name, profile=profile).eval()
    before = logits(model.net)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0.02 * float(before.std()))  # a bias may round the other way
    assert len(model.norms) > 2


@pytest.mark.parametrize(
    "quant",
    [{}, {"profile": "s8"}, {"granularity": "channel"}, {"format": "grid"}, {"format": "pact"},
     {"format": "pact", "granularity": "channel"}, {"accumulator_bits": 19}, {"accumulator_bits": 19, "format": "pact", "profile": "s8"}],
    ids=lambda quant: "-".join(map(str, quant.values())),
)  # fmt: skip
@pytest.mark.parametrize("name", NETS)
def test_training_ends_in_an_ordinary_fixed_point_net(name: str, quant: dict[str, Any]) -> None:
    model = model_of(name, **quant)
    with torch.no_grad():
        model.clips.alpha.mul_(0.7 + 0.5 * torch.rand(model.clips.alpha.shape, generator=torch.Generator().manual_seed(0)))
    start = model.clips.alpha.detach().clone()
    losses = train(model)
    assert losses[-1] < losses[0]
    gradient = model.clips.alpha.grad  # that of a gate may be too small to show in a few steps
    assert gradient is not None
    assert bool((gradient != 0).all())
    assert bool((model.clips.alpha != start).any())
    expected = logits(model.eval())
    net = model.finish()
    assert isinstance(net, FixedPointNet)
    assert torch.equal(logits(net), expected)  # bit for bit
    a2q.check(net, quant.get("accumulator_bits", 32))
    fixed = {step.name for step in net.plan.weighted() if isinstance(step, ConvStep) and step.fixed}
    for step in net.plan.weighted():
        assert all(p.requires_grad == (step.name not in fixed) for p in net.layer(step.name).parameters())
    enforce_bounds(net)
    codes, found = Interpreter(lower(net)).layers(bytes_of(4)), TrainingGraph(net).layers(bytes_of(4))
    assert all((codes[name] == found[name]).all() for name in codes)


def test_everything_that_should_learn_does_and_nothing_else() -> None:
    model = model_of()
    before = tiny.tensors(model)
    train(model, steps=3)
    changed = {name for name, value in tiny.tensors(model).items() if not torch.equal(value, before[name])}
    for step in model.net.plan.weighted():
        key = step.name.replace(".", "/")
        fixed, normed = isinstance(step, ConvStep) and step.fixed, key in model.norms
        assert (f"net.layers.{key}.weight" in changed) == (not fixed)
        assert (f"net.layers.{key}.bias" in changed) == (not fixed and not normed)
        assert ({f"norms.{key}.{part}" for part in ("weight", "bias", "mean", "variance")} <= changed) == normed
    assert bool((model.clips.alpha != before["clips.alpha"]).all())


def test_weight_formats_follow_the_folded_weights_until_they_freeze() -> None:
    model = model_of()
    key = next(iter(model.norms))
    name = key.replace("/", ".")
    start = model.net.weight_fracs(name)[0]
    with torch.no_grad():
        norm_of(model, key).weight.mul_(2.0**-3)
    model.before_step(1, 10)  # not due
    assert model.net.weight_fracs(name)[0] == start
    model.before_step(2, 10)
    assert model.net.weight_fracs(name)[0] == start + 3
    assert int(model.moves) == 1
    with torch.no_grad():
        norm_of(model, key).weight.mul_(2.0**3)
    model.before_step(6, 10)  # frozen from step 5
    assert model.net.weight_fracs(name)[0] == start + 3
    assert int(model.moves) == 1


def test_weight_formats_have_hysteresis() -> None:
    model = model_of(hysteresis=0.45, fit_ranges=False)
    key = next(iter(model.norms))
    name = key.replace("/", ".")
    weight = norm_of(model, key).weight
    original, start = weight.detach().clone(), model.net.weight_fracs(name)[0]
    moves = []
    with torch.no_grad():
        for octave in torch.linspace(0.0, 3.0, 31).tolist():
            weight.copy_(original * 2.0**octave)
            model.before_step(0, 10)
            moves.append(model.net.weight_fracs(name)[0] - start)
        for octave in torch.linspace(3.0, 0.0, 31).tolist():
            weight.copy_(original * 2.0**octave)
            model.before_step(0, 10)
            moves.append(model.net.weight_fracs(name)[0] - start)
    up, down = moves[:31], moves[31:][::-1]
    assert sum(a != b for a, b in zip(up, down, strict=True)) >= 20  # the way back lags by twice the hysteresis
    assert up == sorted(up, reverse=True)
    assert max(abs(a - b) for a, b in pairwise(up)) == 1


# --- the recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["std", "pact"])
def test_an_interrupted_training_ends_in_the_same_net(rule: str, tmp_path: Path) -> None:
    data = tiny.dataset()
    config = build_config(sets=["quant.recipe=f8net-conventional", "quant.epochs=2", "quant.lr=0.02"])
    stage = conventional_stage(config)
    assert stage.batch_norm == "train"

    def run(work: Path, fail_at: int | None = None) -> ConventionalNet:
        model = model_of(format=rule)

        def on_step(step: int, total: int) -> None:
            if step == fail_at:
                raise tiny.Killed
            model.before_step(step, total)

        fit(model, stage, data.train, data.val, tiny.context(work), on_step=on_step)
        return model

    whole = run(tmp_path / "whole")
    with pytest.raises(tiny.Killed):
        run(tmp_path / "cut", fail_at=9)
    resumed = run(tmp_path / "cut")
    assert tiny.same(tiny.tensors(whole), tiny.tensors(resumed))
    assert torch.equal(logits(whole.finish()), logits(resumed.finish()))


def test_published_settings() -> None:
    stage = conventional_stage(build_config(sets=["quant.recipe=f8net-conventional", "train.batch=64"]))
    assert stage.epochs == 30
    assert stage.learning_rates == (0.05 * 64 / 256,)
    assert (stage.momentum, stage.weight_decay, stage.batch_norm) == (0.9, 4e-5, "train")
    stage = conventional_stage(build_config(sets=["quant.recipe=f8net-conventional", "quant.lr=0.1", "train.weight_decay=1e-3"]))
    assert stage.learning_rates == (0.1,)
    assert stage.weight_decay == 1e-3


def job_of(work: Path) -> Job:
    settings = {"recipe": "f8net-conventional", "epochs": 1, "calibration_images": 12, "lr": 0.01, "rounding": "nearest"}
    config = build_config(sets=[f"quant.{key}={value}" for key, value in settings.items()])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = Classifier(randomise(timm.create_model("edgeft_micro", num_classes=3)), tiny.PREPROCESSING)
    return Job(classifier.eval(), tiny.dataset(24, 12), tiny.context(work), config, None)


def test_the_recipe_and_a_kill_after_calibration(tmp_path: Path) -> None:
    trained = conventional(job_of(tmp_path / "whole"))
    assert {"moves", "loss", "lr", "epoch", "val_accuracy", "history", "clips"} == trained.record.keys()
    assert trained.record["history"][0]["lr"] == 0.0  # the calibrated start has competed
    assert all(level > 0 for level in trained.record["clips"].values())
    enforce_bounds(trained.net)
    assert lower(trained.net).output == trained.net.plan.output
    # Calibration equalises depthwise layers, which a resumed run does not repeat.
    calibrated_stage(job_of(tmp_path / "cut"))
    resumed = conventional(job_of(tmp_path / "cut"))
    assert resumed.record == trained.record
    assert tiny.same(tiny.tensors(resumed.net), tiny.tensors(trained.net))
