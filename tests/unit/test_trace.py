from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edgeft.micro
from edgeft.errors import UnsupportedError
from edgeft.quant.plan import AddStep, ConvStep, GlobalPoolStep, LinearStep, MaxPoolStep, Plan
from edgeft.quant.trace import trace
from tests.nets import SIZE, Sum, conv_bn, depthwise_net, head, randomise, residual_net, run_plan

assert edgeft.micro.STEM_WIDTH  # importing registers the backbone

TIMM: list[tuple[str, int, dict[str, Any]]] = [
    ("edgeft_micro", 48, {}),
    ("resnet18", 32, {}),
    ("resnet50", 32, {}),
    ("mobilenetv1_100", 32, {}),
    ("mobilenetv1_100", 32, {"pad_type": "same"}),
    ("mobilenetv2_100", 32, {}),
    ("mobilenetv2_100", 32, {"pad_type": "same"}),
]


def assert_same_function(net: nn.Module, size: int = SIZE) -> Plan:
    """The plan in float64 against the net in float64; pools are sums until their factor is folded."""
    net = randomise(net).double()
    x = torch.randn(3, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plan = trace(net, (3, size, size))
    for step in plan.steps:
        if isinstance(step, GlobalPoolStep):
            source = plan.producer(step.inputs[0])
            assert source is not None
            n = source.shape[1] * source.shape[2]
            for reader in plan.steps:
                if isinstance(reader, LinearStep | ConvStep):
                    reader.weight = reader.weight / (n if reader is plan.steps[-1] else 1)
    with torch.no_grad():
        env = run_plan(plan, x)
        wanted = net(x)
    assert wanted.std() > 0.1, "nothing to compare"
    torch.testing.assert_close(env[plan.output], wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))
    for step in plan.steps:
        assert tuple(env[step.name].shape[1:]) == step.shape
    return plan


@pytest.mark.parametrize(("name", "size", "args"), TIMM, ids=[f"{n}-{a.get('pad_type', '')}" for n, _, a in TIMM])
def test_folded_plan_is_the_network(name: str, size: int, args: dict[str, Any]) -> None:
    plan = assert_same_function(timm.create_model(name, num_classes=7, **args), size)
    asymmetric = [step for step in plan.steps if isinstance(step, ConvStep) and step.padding[:2] != step.padding[2:]]
    assert bool(asymmetric) == (args.get("pad_type") == "same")
    assert not [step for step in plan.steps if not isinstance(step, ConvStep) and step.relu and not isinstance(step, AddStep)]


@pytest.mark.parametrize("net", [residual_net, depthwise_net], ids=["residual", "depthwise"])
def test_hand_written_networks(net: Callable[[], nn.Module]) -> None:
    assert_same_function(net())


def test_global_name_of_an_operation_at_the_top() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4 * SIZE * SIZE, 5)

        def forward(self, x: Tensor) -> Tensor:
            out = self.a(x)
            out += self.b(x)
            out = F.dropout(F.relu(out), 0.2, training=self.training)
            return self.fc(torch.flatten(out, start_dim=1))  # type: ignore[no-any-return]

    plan = assert_same_function(Net())
    assert [type(step).__name__ for step in plan.steps] == ["ConvStep", "ConvStep", "AddStep", "FlattenStep", "LinearStep"]


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_without_a_convolution_is_a_depthwise_layer(affine: bool) -> None:
    net = nn.Sequential(nn.BatchNorm2d(3, affine=affine), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4, affine=affine), *head(4))
    if not affine:
        first = net[0]
        assert isinstance(first, nn.BatchNorm2d)
        assert first.running_var is not None
        first.running_var.fill_(2.0)
        plan = trace(net, (3, SIZE, SIZE))
        assert float(plan["0"].weight[0]) == pytest.approx((2.0 + 1e-5) ** -0.5)  # type: ignore[attr-defined]
        return
    plan = assert_same_function(net)
    assert [(step.name, step.groups) for step in plan.steps if isinstance(step, ConvStep)] == [("0", 3), ("1", 1), ("3", 4)]


def test_batch_norm_that_other_layers_bypass_is_not_folded() -> None:
    plan = assert_same_function(nn.Sequential(nn.Conv2d(3, 4, 3), Sum(nn.Identity(), nn.BatchNorm2d(4), nn.ReLU()), *head(4)))
    assert [step.name for step in plan.steps if isinstance(step, ConvStep)] == ["0", "1.right"]


def test_max_pool_padding_never_wins() -> None:
    plan = assert_same_function(nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2, 1), *head(4)))
    assert [step.padding for step in plan.steps if isinstance(step, MaxPoolStep)] == [(1, 1, 1, 1)]


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.end = nn.Sequential(*head(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.conv(self.conv(x)))  # type: ignore[no-any-return]


class Rectified(nn.Module):
    """The convolution is read before and after its ReLU; `way` is how the ReLU comes to it."""

    def __init__(self, way: nn.Module) -> None:
        super().__init__()
        self.conv, self.way, self.act, self.end = nn.Conv2d(3, 3, 3), way, nn.ReLU(), nn.Sequential(*head(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.end(self.act(self.way(x)) + x)  # type: ignore[no-any-return]


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.end = nn.Conv2d(3, 3, 3), nn.Sequential(*head(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.conv(x) if x.sum() > 0 else x)  # type: ignore[no-any-return]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gamma, self.end = nn.Conv2d(3, 3, 3), nn.Parameter(torch.ones(1)), nn.Sequential(*head(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.conv(x) * self.gamma)  # type: ignore[no-any-return]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 3, 3), *head(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.net(x)
        return y, y


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "silu": (nn.Sequential(conv_bn(3, 4, act=nn.SiLU), *head(4)), r"layer '0\.2' \(SiLU\) has no fixed-point form"),
    "layer norm": (nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm([4, SIZE, SIZE]), *head(4)), r"layer '1' \(LayerNorm\)"),
    "batch norm act": (
        nn.Sequential(nn.Conv2d(3, 4, 1), timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU), *head(4)),
        r"layer '1' \(BatchNormAct2d\) has the activation SiLU",
    ),
    "no statistics": (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), *head(4)),
        r"layer '1' \(BatchNorm2d\) keeps no running statistics",
    ),
    "shared layer": (Shared(), r"layer 'conv' is used twice"),
    "padding mode": (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), *head(4)), r"'0' \(Conv2d\) pads with 'reflect'"),
    "pool size": (
        nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 5)),
        r"layer '0' \(AdaptiveAvgPool2d\) has output size 2, only global",
    ),
    "ceil mode": (nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), *head(3)), r"layer '0' \(MaxPool2d\) uses"),
    "average pool": (nn.Sequential(nn.AvgPool2d(2), *head(3)), r"layer '0' \(AvgPool2d\) has no fixed-point form"),
    "max head": (
        nn.Sequential(nn.Conv2d(3, 4, 1), timm.layers.SelectAdaptivePool2d(pool_type="max", flatten=True), nn.Linear(4, 5)),
        r"layer '1' \(SelectAdaptivePool2d\) pools by 'max'",
    ),
    "flatten": (nn.Sequential(nn.Flatten(2), nn.Linear(SIZE * SIZE, 5)), r"layer '0' \(Flatten\) must flatten everything"),
    "linear on maps": (nn.Sequential(nn.Linear(SIZE, 5)), r"layer '0' \(Linear\) reads a tensor of shape"),
    "relu of a tensor in use": (Rectified(nn.Sequential()), r"layer 'act' \(ReLU\) must directly follow"),
    "relu of a tensor in use, through dropout": (Rectified(nn.Dropout()), r"layer 'act' \(ReLU\) must directly follow"),
    "relu of the image": (nn.Sequential(nn.ReLU(), *head(3)), r"layer '0' \(ReLU\) must directly follow"),
    "multiplication": (Scaled(), r"layer 'gamma' \(operation gamma\) has no fixed-point form"),
    "no classifier": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), r"does not end in a linear classifier"),
    "relu after the classifier": (nn.Sequential(*head(3), nn.ReLU()), r"does not end in a linear classifier"),
    "two outputs": (Pair(), r"returns more than one tensor"),
    "control flow": (Branching(), r"the backbone 'Branching' cannot be traced: .*control flow"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_layer(case: str) -> None:
    net, message = REFUSED[case]
    with pytest.raises(UnsupportedError, match=message) as caught:
        trace(net, (3, SIZE, SIZE))
    assert "edgeft list backbones" in caught.value.hint
