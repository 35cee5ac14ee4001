"""What only a GPU can show: kernels that round like the CPU's, and training that is exact, repeatable and runs in half precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeft.config import DataConfig, ModelConfig, QuantConfig, build_config
from edgeft.context import TrainContext, make_accelerator
from edgeft.export.verify import compare
from edgeft.graph import IntegerGraph
from edgeft.interpret import Interpreter
from edgeft.methods import Stage
from edgeft.models import build_classifier
from edgeft.quant.calibration.calibrate import calibrate
from edgeft.quant.control import FormatControl
from edgeft.quant.fakequant import (
    RoundFused,
    RoundPerChannel,
    RoundSaturate,
    RoundToGrid,
    has_fused_kernels,
    mask_bounds,
    power_of_two,
    round_constant,
)
from edgeft.quant.lower import enforce_bounds, lower
from edgeft.quant.net import FixedPointNet
from edgeft.quant.stage import plan_of
from edgeft.quant.training_graph import TrainingGraph
from edgeft.train import fit
from tests.nets import bytes_of, calibrated, depthwise_net, prepared, randomise, residual_net
from tests.tiny import DATA, STAGE, TinyNet, context, same, tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch.cuda.is_available() is False"),
]
FRACS = range(-24, 25)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """TF32 in convolutions and matrix products, or in neither."""
    conv, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = conv.allow_tf32, matmul.allow_tf32
    conv.allow_tf32 = matmul.allow_tf32 = allowed
    yield
    conv.allow_tf32, matmul.allow_tf32 = before


def cuda_context(work: Path, precision: str = "fp32") -> TrainContext:
    accelerator = make_accelerator(build_config(flags={"device": "cuda", "train.precision": precision}))
    return replace(context(work), accelerator=accelerator)


def lowered(net: FixedPointNet) -> IntegerGraph:
    enforce_bounds(net)
    return lower(net)


def assert_exact(net: FixedPointNet, images: np.ndarray) -> None:
    """The GPU's training graph gives the codes of the interpreter, whatever arithmetic the GPU may choose."""
    interpreter = Interpreter(lowered(net))
    for allowed in (False, True):
        with tf32(allowed):
            assert compare(interpreter, TrainingGraph(net), images) == []


# --- rounding ---


def test_powers_of_two_are_exact() -> None:
    fracs = torch.arange(-60, 61, dtype=torch.float32)
    wanted = torch.tensor([2.0**frac for frac in range(-60, 61)])
    assert torch.equal(power_of_two(fracs.cuda()).cpu(), wanted)
    assert torch.equal(torch.exp2(fracs.double().cuda()).cpu(), wanted.double())


def ties(frac: int) -> Tensor:
    """Every half code around the range, its float32 neighbours, and what lies far outside."""
    halves = torch.arange(-520, 521).float() / 2 * 2.0**-frac
    inf = torch.tensor(torch.inf)
    far = torch.tensor([1e30, -1e30, torch.inf, -torch.inf])
    return torch.cat([halves, torch.nextafter(halves, inf), torch.nextafter(halves, -inf), far])


def both(function: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values and gradients on the CPU and on the GPU."""
    found = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        moved = [argument.to(device) if isinstance(argument, Tensor) else argument for argument in arguments]
        out = function.apply(leaf, *moved)
        (gradient,) = torch.autograd.grad(out, leaf, torch.linspace(-1, 1, x.numel(), device=device).view(x.shape))
        found += [out.detach().cpu(), gradient.cpu()]
    return found[0], found[1], found[2], found[3]


@pytest.mark.parametrize("frac", FRACS)
@pytest.mark.parametrize(("low", "high", "relu"), [(-128, 127, False), (-127, 127, False), (0, 255, True), (0, 255, False)])
def test_saturating_rounding_is_the_cpus(frac: int, low: int, high: int, relu: bool) -> None:
    step = 2.0**-frac
    value, gradient, on_gpu, gradient_on_gpu = both(
        RoundSaturate, ties(frac), low * step, high * step, round_constant(frac), *mask_bounds(low, high, frac, relu=relu)
    )
    assert torch.equal(value, on_gpu)
    assert torch.equal(gradient, gradient_on_gpu)


def test_rounding_to_many_grids_is_the_cpus() -> None:
    fracs = torch.tensor(list(FRACS), dtype=torch.float32)
    x = torch.stack([ties(frac)[:-4] for frac in FRACS])
    for function, arguments in ((RoundPerChannel, (-127, 127)), (RoundToGrid, ())):
        value, gradient, on_gpu, gradient_on_gpu = both(function, x, power_of_two(fracs)[:, None], *arguments)
        assert torch.equal(value, on_gpu)
        assert torch.equal(gradient, gradient_on_gpu)


needs_kernels = pytest.mark.skipif(not has_fused_kernels(torch.device("cuda")), reason="triton is not installed, or EDGEFT_TRITON is not 1")


@needs_kernels
@pytest.mark.parametrize("frac", FRACS)
@pytest.mark.parametrize(("low", "high", "relu"), [(-128, 127, False), (-127, 127, False), (0, 255, True), (0, 255, False)])
def test_kernels_round_as_the_cpu_does(frac: int, low: int, high: int, relu: bool) -> None:
    x, step = ties(frac), 2.0**-frac
    bounds = mask_bounds(low, high, frac, relu=relu)
    value, gradient, _, _ = both(RoundSaturate, x, low * step, high * step, round_constant(frac), *bounds)
    leaf, scale = x.cuda().requires_grad_(), torch.tensor(2.0**frac)
    out = RoundFused.apply(leaf, scale.cuda(), scale.reciprocal().cuda(), low, high, relu)
    (found,) = torch.autograd.grad(out, leaf, torch.linspace(-1, 1, x.numel(), device="cuda"))
    assert torch.equal(value, out.detach().cpu())
    assert torch.equal(gradient, found.cpu())


@needs_kernels
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernels_round_each_channel_as_the_cpu_does(layout: torch.memory_format) -> None:
    fracs = torch.tensor(list(FRACS), dtype=torch.float32).view(-1, 1, 1, 1)
    x = torch.stack([ties(frac)[: 4 * 25 * 31] for frac in FRACS]).view(len(FRACS), 4, 25, 31).contiguous(memory_format=layout)
    scale = power_of_two(fracs)
    value, gradient, _, _ = both(RoundPerChannel, x, scale, -127, 127)
    leaf = x.cuda().requires_grad_()
    out = RoundFused.apply(leaf, scale.cuda(), scale.reciprocal().cuda(), -127, 127, False)
    (found,) = torch.autograd.grad(out, leaf, torch.linspace(-1, 1, x.numel(), device="cuda").view(x.shape))
    assert torch.equal(value, out.detach().cpu())
    assert torch.equal(gradient, found.cpu())


# --- the training graph ---


@pytest.mark.parametrize("profile", ["u8", "s8"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("make", [residual_net, depthwise_net])
def test_random_nets_are_exact(make: Any, granularity: str, profile: str) -> None:
    net = calibrated(prepared(randomise(make()), profile), granularity=granularity)
    on_cpu = lowered(net)
    on_gpu = lowered(net.cuda())
    assert on_cpu.to_json() == on_gpu.to_json()
    assert all(np.array_equal(on_cpu.constants[name], on_gpu.constants[name]) for name in on_cpu.constants)
    assert_exact(net, bytes_of(16))


def test_the_bundled_backbone_is_exact() -> None:
    classifier = build_classifier(ModelConfig(), DataConfig(), 20, 48, seed=0)
    images = bytes_of(48, 48)
    net = calibrate(plan_of(classifier, "u8"), torch.from_numpy(images[:12]), QuantConfig(), lambda *_: None)[0]
    assert_exact(net.cuda(), images)


# --- training ---


def qat(work: Path) -> FixedPointNet:
    """A residual net after some quantized training on the GPU, in which formats move."""
    net = calibrated(prepared(randomise(residual_net())))
    net.cuda()
    sigmas = {point.name: 160.0 * 2.0 ** -net.frac(point.name) for point in net.points}  # too large: coarser formats come first
    control = FormatControl(net, QuantConfig(format="std", update_every=1), sigmas)
    fit(net, replace(STAGE, name="qat", epochs=2, learning_rates=(0.01,)), DATA.train, DATA.val, cuda_context(work), control.before_step)
    assert control.moves > 0, "otherwise nothing was seen of moving formats"
    return net


def test_quantized_training_is_exact_and_repeatable(tmp_path: Path) -> None:
    start = tensors(calibrated(prepared(randomise(residual_net()))))
    net = qat(tmp_path / "a")
    trained = {name: value.cpu() for name, value in tensors(net).items()}
    weights = [name for name in trained if name.endswith(".weight")]
    assert all(not torch.equal(trained[name], start[name]) for name in weights)
    assert same(trained, {name: value.cpu() for name, value in tensors(qat(tmp_path / "b")).items()})
    assert_exact(net, bytes_of(16))


class Watched(nn.Module):
    """TinyNet that notes the type of the scores which its head gives while gradients are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TinyNet()
        self.types: set[torch.dtype] = set()

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.net(images)
        if torch.is_grad_enabled():
            self.types.add(logits.dtype)
        return logits


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_float_training_runs_in_every_precision(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    stage: Stage = replace(STAGE, epochs=6)
    model = Watched()
    result = fit(model, stage, DATA.train, DATA.val, cuda_context(tmp_path, precision))
    assert model.types == {dtype}
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert result.val_accuracy > 0.6, "chance is a third"
    rows = [row for row in result.history if "train_loss" in row and row["lr"] == result.lr]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
