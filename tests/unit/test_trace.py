from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edgeft.micro
from edgeft.errors import UnsupportedError
from edgeft.quant.plan import AddStep, ConvStep, MaxPoolStep
from edgeft.quant.tracing.trace import trace
from tests.nets import SIZE, Sum, depthwise_net, head, residual_net
from tests.traced import assert_same_function

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


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.end = nn.Conv2d(3, 3, 3), nn.Sequential(*head(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.conv(x) if x.sum() > 0 else x)  # type: ignore[no-any-return]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 3, 3), *head(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.net(x)
        return y, y


def slopes() -> nn.PReLU:
    layer = nn.PReLU(4)
    layer.weight.data.copy_(torch.arange(4.0))
    return layer


def changed_part(x: Tensor) -> Tensor:
    x[:, :2].relu_()
    return x


class Function(nn.Module):
    """A convolution, a function, a classifier."""

    def __init__(self, function: Callable[[Tensor], Any], channels: int = 4) -> None:
        super().__init__()
        self.conv, self.function, self.end = nn.Conv2d(3, channels, 3, padding=1), function, nn.Sequential(*head(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.function(self.conv(x)))  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "layer norm": (nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm([4, SIZE, SIZE]), *head(4)), r"layer '1' \(LayerNorm\)"),
    "group norm": (nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), *head(4)), r"layer '1' \(GroupNorm\) has no fixed-point form"),
    "batch norm act": (
        nn.Sequential(nn.Conv2d(3, 4, 1), timm.layers.BatchNormAct2d(4, act_layer=nn.Hardtanh), *head(4)),
        r"layer '1' \(BatchNormAct2d\) has the activation Hardtanh",
    ),
    "no statistics": (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), *head(4)),
        r"layer '1' \(BatchNorm2d\) keeps no running statistics",
    ),
    "slopes": (nn.Sequential(nn.Conv2d(3, 4, 1), slopes(), *head(4)), r"layer '1' \(PReLU\) has a slope for each channel"),
    "shared layer": (Shared(), r"layer 'conv' is used twice"),
    "padding mode": (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), *head(4)), r"'0' \(Conv2d\) pads with 'reflect'"),
    "reflection": (Function(lambda x: F.pad(x, (1, 1, 1, 1), "reflect")), r"layer 'pad' \(operation pad\) pads with 'reflect'"),
    "padding with ones": (Function(lambda x: F.pad(x, (1, 1), value=1.0)), r"layer 'pad' \(operation pad\) pads with '1.0'"),
    "softmax": (Function(lambda x: torch.softmax(x, 1) * x), r"layer 'softmax' \(operation softmax\) has no fixed-point form"),
    "matrix product": (Function(lambda x: x @ x.transpose(2, 3)), r"\(operation matmul\) has no fixed-point form"),
    "division": (Function(lambda x: x / x.mean((2, 3), keepdim=True)), r"\(operation truediv\) divides by a tensor"),
    "unequal windows": (Function(lambda x: F.adaptive_avg_pool2d(x, 3)), r"makes 3x3 windows of unequal size from a map of 16x16"),
    "border windows": (
        nn.Sequential(nn.AvgPool2d(3, 2, 1, ceil_mode=True), *head(3)),
        r"layer '0' \(AvgPool2d\) divides windows at the border of a map of 16x16 by numbers",
    ),
    "dilated pool": (nn.Sequential(nn.MaxPool2d(2, dilation=2), *head(3)), r"layer '0' \(MaxPool2d\) uses dilation"),
    "bilinear": (Function(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")), r"interpolates by 'bilinear'"),
    "enlarged part": (Function(lambda x: F.interpolate(x[:, :, 1:5], size=(8, 32))), r"enlarges a part of a tensor"),
    "transposed map": (Function(lambda x: x.transpose(2, 3)), r"in an order that has no fixed-point form"),
    "mean of channels": (Function(lambda x: x * x.mean(1, keepdim=True)), r"reduces axes \[1\] of 4"),
    "joined rows": (Function(lambda x: torch.cat([x, x], 2)), r"joins tensors along axis 2"),
    "constant image": (Function(lambda x: x + torch.arange(16.0)), r"has a constant that differs from pixel to pixel"),
    "changed part": (Function(changed_part), r"changes in place a part of a tensor that is read again"),
    "flatten": (nn.Sequential(nn.Flatten(2), nn.Linear(SIZE * SIZE, 5)), r"layer '1' \(Linear\) reads a tensor of shape"),
    "linear on rows": (nn.Sequential(nn.Linear(SIZE, 5)), r"layer '0' \(Linear\) reads a tensor of shape"),
    "convolution of tokens": (nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 5, 1)), r"must run over the channels of a globally pooled"),
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
