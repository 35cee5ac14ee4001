"""Every operator that has a fixed-point form, alone between a convolution and a classifier: the plan computes what the network does."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import AvgPool2dSame, EcaModule, GELUTanh, ScaledStdConv2d, ScaledStdConv2dSame, SEModule, StdConv2d, StdConv2dSame
from timm.layers.activations import HardMish, QuickGELU
from timm.layers.eca import CecaModule
from timm.layers.mixed_conv2d import MixedConv2d
from timm.layers.pool2d_same import MaxPool2dSame
from timm.layers.squeeze_excite import EffectiveSEModule, SqueezeExciteCl
from torch import Tensor, nn
from torch.nn import functional as F

from edgeft.quant.plan import ConvStep, Plan
from tests.nets import SIZE, conv_bn, head
from tests.traced import assert_same_function


class Net(nn.Module):
    """Convolution, body, classifier; parameters for functions in `gamma`."""

    def __init__(self, body: Callable[..., Tensor], channels: int = 8, out: int | None = None, act: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.conv, self.body, self.end = conv_bn(3, channels, act=act), body, nn.Sequential(*head(out or channels))
        self.gamma = nn.Parameter(torch.linspace(-1.0, 2.0, channels).view(-1, 1, 1))
        self.needs_gamma = not isinstance(body, nn.Module) and body.__code__.co_argcount == 2

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        out: Tensor = self.end(self.body(x, self.gamma) if self.needs_gamma else self.body(x))
        return out


class ChannelsLast(nn.Module):
    """A body that takes [n, h, w, c]."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def kinds(plan: Plan) -> list[str]:
    return [type(step).__name__[:-4] + ("!" if isinstance(step, ConvStep) and step.fixed else "") for step in plan.steps]


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def to_depth(x: Tensor) -> Tensor:
    n, c, h, w = x.size()
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).contiguous().view(n, c * 4, h // 2, w // 2)


def option_a(x: Tensor) -> Tensor:
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))


def focus(x: Tensor) -> Tensor:
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


def in_place(x: Tensor) -> Tensor:
    y = x * 1.0
    y += x[:, :8]
    y.relu_()
    y.mul_(0.5).add_(0.25)
    return y


def seen_afterwards(x: Tensor) -> Tensor:
    """What is read after a change in place has changed."""
    y = F.max_pool2d(x, 3, 1, 1)
    F.relu(x, inplace=True)
    return x + y


BODIES: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "relu twice read": (lambda x: F.relu(x) + x, {}, ["Conv", "Conv!", "Add"]),
    "relu of a sum": (lambda x: F.relu6(x + F.relu(x)), {}, ["Conv", "Conv!", "Add"]),
    "relu of a concatenation": (lambda x: F.relu(torch.cat([x, x * 2.0], 1)), {"out": 16}, ["Conv", "Conv!", "Concat", "Conv!"]),
    "relu of a pool": (lambda x: F.relu(F.max_pool2d(x, 2)), {}, ["Conv", "MaxPool"]),
    "relu of something positive": (lambda x: F.relu(x), {"act": nn.ReLU}, ["Conv"]),
    "clamp": (lambda x: x.clamp(min=0, max=1.5), {}, ["Conv"]),
    "silu": (nn.SiLU(inplace=True), {}, ["Conv", "Table"]),
    "hard swish": (nn.Hardswish(), {}, ["Conv", "Table"]),
    "leaky relu": (nn.LeakyReLU(0.1), {}, ["Conv", "Table"]),
    "one slope": (nn.PReLU(), {}, ["Conv", "Table"]),
    "elu": (nn.ELU(0.5), {}, ["Conv", "Table"]),
    "gelu": (lambda x: F.gelu(x), {}, ["Conv", "Table"]),
    "gelu tanh": (GELUTanh(), {}, ["Conv", "Table"]),
    "quick gelu": (QuickGELU(), {}, ["Conv", "Table"]),
    "hard mish": (HardMish(), {}, ["Conv", "Table"]),
    "softplus": (nn.Softplus(2.0), {}, ["Conv", "Table"]),
    "sigmoid, tanh, mish": (lambda x: F.mish(x) * torch.sigmoid(x) + x.tanh(), {}, ["Conv", "Table", "Table", "Mul", "Table", "Add"]),
    "squeeze and excite": (SEModule(8), {}, ["Conv", "GlobalPool", "Conv", "Conv", "Table", "Mul"]),
    "effective squeeze": (EffectiveSEModule(8), {}, ["Conv", "GlobalPool", "Conv", "Table", "Mul"]),
    "efficient channel attention": (EcaModule(8), {}, ["Conv", "GlobalPool", "Conv", "Table", "Mul"]),
    "circular channel attention": (CecaModule(8), {}, ["Conv", "GlobalPool", "Conv", "Table", "Mul"]),
    "channel attention, two layers": (EcaModule(8, use_mlp=True), {}, ["Conv", "GlobalPool", "Conv", "Conv", "Table", "Mul"]),
    "gate of linear layers": (ChannelsLast(SqueezeExciteCl(8)), {}, ["Conv", "GlobalPool", "Conv", "Conv", "Table", "Mul"]),
    "pooled gate": (lambda x: x * x.mean((2, 3), keepdim=True), {}, ["Conv", "GlobalPool", "Mul"]),
    "pixel gate": (lambda x: x * x[:, :1].sigmoid(), {}, ["Conv", "Select", "Table", "Select", "Mul"]),
    "wide gate": (lambda x: x + x.amax((2, 3), keepdim=True), {}, ["Conv", "MaxPool", "Resize", "Add"]),
    "difference": (lambda x: 1.0 - (x - F.relu(x)), {}, ["Conv", "Conv!", "Conv!", "Add", "Conv!"]),
    "layer scale": (lambda x, gamma: x * gamma, {}, ["Conv"]),
    "layer scale of a tensor in use": (lambda x, gamma: x * gamma + x, {}, ["Conv", "Conv", "Add"]),
    "layer scale of a relu": (lambda x, gamma: x * gamma, {"act": nn.ReLU}, ["Conv", "Conv"]),
    "scaled table": (lambda x: F.silu(x) * 1.7, {}, ["Conv", "Table"]),
    "scaled gate": (lambda x: x * x.mean((2, 3), keepdim=True).sigmoid() * 2.0, {}, ["Conv", "GlobalPool", "Table", "Mul"]),
    "scaled sum": (lambda x: (F.silu(x) + torch.tanh(x)) / 3.0, {}, ["Conv", "Table", "Table", "Add"]),
    "scaled pool": (lambda x, gamma: F.interpolate(F.max_pool2d(x, 2), scale_factor=2) * gamma.abs(), {}, ["Conv", "MaxPool", "Resize"]),
    "added constant": (lambda x, gamma: x + gamma, {}, ["Conv"]),
    "constant added to a relu": (lambda x, gamma: F.relu(x) + gamma, {}, ["Conv", "Conv!"]),
    "negative": (lambda x: -x, {}, ["Conv"]),
    "shuffle": (shuffle, {}, ["Conv", "Select"]),
    "channel shuffle": (nn.ChannelShuffle(4), {}, ["Conv", "Select"]),
    "chunk": (lambda x: x.chunk(2, 1)[0] + x.chunk(2, dim=1)[1], {"out": 4}, ["Conv", "Select", "Select", "Add"]),
    "split": (lambda x: torch.cat(torch.split(x, [5, 3], dim=1)[::-1], dim=1), {}, ["Conv", "Select", "Select", "Concat"]),
    "narrow": (lambda x: x.narrow(1, 2, 4), {"out": 4}, ["Conv", "Select"]),
    "slice twice": (lambda x: F.gelu(x[:, :4])[:, 1:] + x[:, 1:4], {"out": 3}, ["Conv", "Select", "Table", "Select", "Select", "Add"]),
    "order undone": (lambda x: x.permute(0, 2, 3, 1).unsqueeze(1).squeeze(1).permute(0, 3, 1, 2), {}, ["Conv"]),
    "function of a view": (lambda x: F.silu(x.flatten(2)).view(x.shape), {}, ["Conv", "Table"]),
    "sum of views": (lambda x: (x.flatten(2) + F.silu(x.flatten(2))).view(x.shape), {}, ["Conv", "Table", "Add"]),
    "product of views": (lambda x: (x.flatten(2) * F.silu(x.flatten(2))).view(x.shape), {}, ["Conv", "Table", "Mul"]),
    "to depth": (to_depth, {"out": 32}, ["Conv", "Conv!"]),
    "focus": (focus, {"out": 32}, ["Conv", "Conv!", "Conv!", "Conv!", "Conv!", "Concat"]),
    "option A": (option_a, {"out": 12}, ["Conv", "Conv!"]),
    "crop": (lambda x: x[:, :, 1:-2, 3:], {}, ["Conv", "Conv!"]),
    "upsample": (nn.Upsample(scale_factor=2, mode="nearest"), {}, ["Conv", "Resize"]),
    "interpolate": (lambda x: F.interpolate(x, size=(32, 48), mode="nearest"), {}, ["Conv", "Resize"]),
    "interpolate by fractions": (lambda x: F.interpolate(x[:, :, :7, :6], size=(10, 4)), {}, ["Conv", "Resize", "Conv!"]),
    "pad before convolution": (nn.Sequential(nn.ZeroPad2d((1, 2, 0, 3)), nn.Conv2d(8, 8, 3, 2, padding=1)), {}, ["Conv", "Conv"]),
    "pad alone": (lambda x: F.pad(x, (1, 0, 2, 1)), {}, ["Conv", "Conv!"]),
    "pad before max pool": (lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 3, 2), {"act": nn.ReLU}, ["Conv", "MaxPool"]),
    "pad before max pool, signed": (lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 3, 2), {}, ["Conv", "Conv!", "MaxPool"]),
    "max pool of ceilings": (nn.MaxPool2d(3, 2, ceil_mode=True), {}, ["Conv", "MaxPool"]),
    "max pool of ceilings, padded": (nn.MaxPool2d(2, 3, 1, ceil_mode=True), {}, ["Conv", "MaxPool"]),
    "max pool same": (MaxPool2dSame(3, 2), {}, ["Conv", "MaxPool"]),
    "average pool": (nn.AvgPool2d(2), {}, ["Conv", "Conv!"]),
    "average pool of a window of all": (nn.AvgPool2d(SIZE), {}, ["Conv"]),
    "average pool of ceilings": (nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), {}, ["Conv", "Conv!"]),
    "average pool of cut windows": (
        nn.AvgPool2d(3, 2, ceil_mode=True), {}, ["Conv", "Conv!", "Conv!", "Conv!", "Table", "Select", "Mul"],
    ),
    "average pool of pixels inside": (
        nn.AvgPool2d(3, 2, 1, count_include_pad=False), {"act": nn.ReLU}, ["Conv", "Conv!", "Conv!", "Conv!", "Table", "Select", "Mul"],
    ),
    "average pool of pixels inside, cut": (nn.AvgPool2d(2, 3, 1, ceil_mode=True, count_include_pad=False), {}, []),
    "average pool same": (AvgPool2dSame(2, 2), {}, ["Conv", "Conv!"]),
    "adaptive pool": (nn.AdaptiveAvgPool2d(4), {}, ["Conv", "Conv!"]),
    "adaptive pool, one axis": (nn.AdaptiveAvgPool2d((None, 1)), {}, ["Conv", "Conv!"]),
    "adaptive max pool": (nn.AdaptiveMaxPool2d(2), {}, ["Conv", "MaxPool"]),
    "max head": (lambda x: F.adaptive_max_pool2d(x, 1), {}, ["Conv", "MaxPool"]),
    "sum of pixels": (lambda x: x.sum((2, 3), keepdim=True) * 0.01, {}, []),
    "std convolution": (StdConv2d(8, 8, 3), {}, ["Conv", "Conv"]),
    "std convolution same": (StdConv2dSame(8, 8, 3, 2), {}, ["Conv", "Conv"]),
    "scaled std convolution": (ScaledStdConv2d(8, 8, 3, groups=2), {}, ["Conv", "Conv"]),
    "scaled std convolution same": (ScaledStdConv2dSame(8, 8, 3, 2), {}, ["Conv", "Conv"]),
    "convolution same": (nn.Conv2d(8, 8, (3, 5), padding="same", dilation=(1, 2)), {}, ["Conv", "Conv"]),
    "convolution valid": (nn.Conv2d(8, 8, (1, 3), padding="valid", dilation=2), {}, ["Conv", "Conv"]),
    "mixed convolution": (MixedConv2d(8, 8, [3, 5], depthwise=True), {}, ["Conv", "Select", "Conv", "Select", "Conv", "Concat"]),
    "blur": (timm.layers.BlurPool2d(8, pad_mode="constant"), {}, ["Conv", "Conv!"]),
    "linear on channels last": (ChannelsLast(nn.Sequential(nn.Linear(8, 6), nn.GELU())), {"out": 6}, ["Conv", "Conv", "Table"]),
    "in place": (in_place, {}, []),
    "seen after a change in place": (seen_afterwards, {}, ["Conv", "MaxPool", "Conv!", "Add"]),
}  # fmt: skip
ENDS = (["GlobalPool", "Flatten", "Linear"], ["Flatten", "Linear"])


@pytest.mark.parametrize("name", BODIES)
def test_operator(name: str) -> None:
    body, args, steps = BODIES[name]
    found = kinds(assert_same_function(Net(body, **args)))
    assert any(found[-len(end) :] == end for end in ENDS)
    assert not steps or found[: len(steps)] == steps
    assert not steps or found[len(steps) :] in ENDS
