"""Small hand-written float nets, every building block that has a fixed-point form among them, and plans of them."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeft.config import QuantConfig
from edgeft.quant.calibration.calibrate import calibrate
from edgeft.quant.net import FixedPointNet
from edgeft.quant.plan import Plan, rectify, run_step
from edgeft.quant.rescale import prepare_plan

SIZE = 16
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Sum(nn.Module):
    """Two branches added, then an optional activation."""

    def __init__(self, left: nn.Module, right: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        self.left, self.right, self.act = left, right, act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Sum of the branches."""
        out: Tensor = self.act(self.left(x) + self.right(x))
        return out


def conv_bn(
    n_in: int, n_out: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU
) -> nn.Sequential:
    """Convolution, batch norm, activation."""
    layers = [nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(n_out)]
    return nn.Sequential(*layers, *([] if act is None else [act()]))


def head(n_in: int, n_classes: int = 5) -> list[nn.Module]:
    """Global pool, flatten, linear."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, n_classes)]


def residual_net() -> nn.Sequential:
    """ResNet-like: max-pool, identity and projected shortcuts, sums of unsigned and signed operands, with and without a ReLU after."""
    basic = Sum(nn.Identity(), nn.Sequential(conv_bn(8, 8), conv_bn(8, 8, act=None)), nn.ReLU())
    linear = Sum(nn.Identity(), nn.Sequential(conv_bn(8, 8, groups=4), conv_bn(8, 8, 1, act=None)))
    projected = Sum(conv_bn(8, 12, 1, 2, act=None), conv_bn(8, 12, 3, 2), nn.ReLU())
    return nn.Sequential(conv_bn(3, 8), nn.MaxPool2d(3, 2, 1), basic, linear, projected, *head(12))


def depthwise_net(act: type[nn.Module] = nn.ReLU6) -> nn.Sequential:
    """MobileNetV2-like: expand, depthwise, project, an identity shortcut, asymmetric padding in the stem, dilation."""
    stem = nn.Sequential(nn.ZeroPad2d(0), nn.Conv2d(3, 8, 3, 2, 1), act())
    block = nn.Sequential(conv_bn(8, 24, 1, act=act), conv_bn(24, 24, 3, 1, 24, act=act), conv_bn(24, 8, 1, act=None))
    return nn.Sequential(
        stem[1:], Sum(nn.Identity(), block), nn.Conv2d(8, 16, 3, padding=2, dilation=2), nn.BatchNorm2d(16), act(), *head(16)
    )


class Gate(nn.Module):
    """Squeeze-and-excite: the tensor times a gate per channel, computed from its mean."""

    def __init__(self, channels: int, gate: nn.Module) -> None:
        super().__init__()
        self.reduce, self.expand, self.gate = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        """Gated tensor."""
        out: Tensor = x * self.gate(self.expand(nn.functional.relu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return out


class Shuffle(nn.Module):
    """ShuffleNet-like: half of the channels pass by, the other half is convolved, both are concatenated and shuffled."""

    def __init__(self, channels: int, act: type[nn.Module]) -> None:
        super().__init__()
        half = channels // 2
        self.conv = nn.Sequential(conv_bn(half, half, 1, act=act), conv_bn(half, half, 3, groups=half, act=None))

    def forward(self, x: Tensor) -> Tensor:
        """Channels shuffled in two groups."""
        kept, changed = x.chunk(2, dim=1)
        joined = torch.cat([kept, self.conv(changed)], 1)
        n, c, h, w = joined.shape
        return joined.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Pyramid(nn.Module):
    """A coarse branch enlarged and added, then concatenated with a clipped, a rectified and a signed tensor."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.coarse = nn.Sequential(nn.AvgPool2d(2), conv_bn(channels, channels, 1, act=None), nn.Upsample(scale_factor=2, mode="nearest"))
        self.clipped, self.signed = conv_bn(channels, 6, 1, act=nn.ReLU6), conv_bn(channels, 6, 1, act=None)
        self.rectified = conv_bn(channels, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Channels of all three branches."""
        x = x + self.coarse(x)
        return torch.cat((self.clipped(x), self.rectified(x), self.signed(x)), dim=1)


def mixed_net() -> nn.Sequential:
    """Gates, tables, shuffles, slices, concatenations of mixed signs and clips, average pooling, enlargement, a convolution as head."""
    return nn.Sequential(
        conv_bn(3, 8, stride=2, act=nn.Hardswish), Gate(8, nn.Hardsigmoid()), conv_bn(8, 12, act=nn.SiLU), Gate(12, nn.Sigmoid()),
        Shuffle(12, nn.GELU), Pyramid(12), nn.BatchNorm2d(18), nn.ReLU(), nn.AvgPool2d(3, 1, 1), nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(18, 5, 1),
        nn.Flatten(),
    )  # fmt: skip


@torch.no_grad()
def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and batch-norm statistics drawn so that activations stay near one and channels differ in scale; eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.empty_like(like).uniform_(low, high, generator=generator)

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.normal_(0.0, math.sqrt(2.0 / module.weight[0].numel()), generator=generator)
            if module.bias is not None:
                module.bias.copy_(uniform(module.bias, -0.5, 0.5))
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(uniform(module.running_mean, -0.5, 0.5))
            module.running_var.copy_(uniform(module.running_var, 0.3, 3.0))
            module.weight.copy_(uniform(module.weight, 0.5, 1.5))
            module.bias.copy_(uniform(module.bias, -0.5, 0.8))
    return net.eval()


def bytes_of(n: int, size: int = SIZE, seed: int = 0) -> NDArray[np.uint8]:
    """Images [n, 3, size, size]: smooth colours plus noise, the first two all 0 and all 255."""
    rng = np.random.default_rng(seed)
    base = np.kron(rng.uniform(0, 200, (n, 3, math.ceil(size / 8), math.ceil(size / 8))), np.ones((8, 8)))[:, :, :size, :size]
    images = np.clip(base + rng.normal(25, 25, base.shape), 0, 255).astype(np.uint8)
    if n > 2:
        images[0], images[1] = 0, 255
    return images


def prepared(net: nn.Module, profile: str = "u8", size: int = SIZE, mean: tuple[float, ...] = HALF, std: tuple[float, ...] = HALF) -> Plan:
    """Plan of `net`, ready for calibration."""
    return prepare_plan(net, (3, size, size), mean, std, profile)


def calibrated(plan: Plan, n_images: int = 12, **quant: Any) -> FixedPointNet:
    """Calibrated net of a plan."""
    images = torch.from_numpy(bytes_of(n_images, plan.image_shape[1], seed=1))
    return calibrate(plan, images, QuantConfig(**quant), lambda *_: None)[0]


def run_plan(plan: Plan, x: Tensor, source: str = "image") -> dict[str, Tensor]:
    """Every tensor of the float plan, for the real values `x` of its input, in the precision of `x`."""
    env = {source: x}
    for step in plan.steps:
        env[step.name] = rectify(step, run_step(step, [env[name] for name in step.inputs]))
    return env


def double(plan: Plan) -> Plan:
    """The plan with weights in float64."""
    for step in plan.weighted():
        step.weight, step.bias = step.weight.double(), step.bias.double()
    return plan
