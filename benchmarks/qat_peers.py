"""What a QAT step is compared with: the same folded net in float, and the same net with the quantizers that Brevitas brings along."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from brevitas import nn as qnn
from brevitas.quant import Int8ActPerTensorFixedPoint, Int8WeightPerTensorFixedPoint, Uint8ActPerTensorFixedPoint
from torch import Tensor, nn
from torch.nn import functional as F

from edgeft.quant.net import FixedPointNet, module_key
from edgeft.quant.plan import IMAGE, ConvStep, LinearStep, Plan, Step, run_step

AFTER_COLLECTION = 1
"""Steps of collecting statistics for a variant that is timed after it; Brevitas' default is 300."""


class PlanNet(nn.Module, ABC):
    """Runs a plan with trainable layers; subclasses say what layers and activations are. Image bytes [n, 3, h, w] to logits."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.layers = nn.ModuleDict({module_key(step.name): self.make_layer(step) for step in plan.weighted()})
        self._last_use = plan.last_use()

    @abstractmethod
    def make_layer(self, step: ConvStep | LinearStep) -> nn.Module:
        """The layer of a step, without padding."""

    @abstractmethod
    def activate(self, step: Step, x: Tensor) -> Tensor:
        """What follows a step."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        env = {IMAGE: self.plan.encode(images).contiguous(memory_format=torch.channels_last)}
        for index, step in enumerate(self.plan.steps):
            inputs = [env[name] for name in step.inputs]
            out = self._weighted(step, inputs[0]) if isinstance(step, ConvStep | LinearStep) else run_step(step, inputs)
            env[step.name] = self.activate(step, out)
            for name in set(step.inputs):
                if self._last_use[name] == index:
                    del env[name]
        return env[self.plan.output]

    def _weighted(self, step: ConvStep | LinearStep, x: Tensor) -> Tensor:
        layer = self.layers[module_key(step.name)]
        if isinstance(step, ConvStep) and not _is_symmetric(step):
            top, left, bottom, right = step.padding
            x = F.pad(x, (left, right, top, bottom))
        out: Tensor = layer(x)
        return out


class FoldedNet(PlanNet):
    """Float, batch norm folded into weights and biases: what remains of the quantized net when nothing is rounded."""

    def make_layer(self, step: ConvStep | LinearStep) -> nn.Module:
        """A plain layer."""
        if isinstance(step, LinearStep):
            return filled(nn.Linear(step.weight.shape[1], step.weight.shape[0]), step)
        return filled(nn.Conv2d(step.weight.shape[1] * step.groups, step.weight.shape[0], **geometry(step)), step)

    def activate(self, step: Step, x: Tensor) -> Tensor:
        """ReLU or clip, in place."""
        if not step.relu:
            return x
        return F.relu_(x) if step.clip is None else F.hardtanh_(x, 0.0, step.clip)


class StockNet(PlanNet):
    """The quantizers of a FixedPointNet, each in Brevitas' own fixed-point form: power-of-two scales, learned by gradient."""

    def __init__(self, net: FixedPointNet, *, collect_steps: int | None = None) -> None:
        super().__init__(net.plan)
        options = {} if collect_steps is None else {"collect_stats_steps": collect_steps}
        self.quantizers = nn.ModuleDict()
        for point in net.points:
            signed = Int8ActPerTensorFixedPoint.let(**options)
            self.quantizers[module_key(point.name)] = (
                qnn.QuantReLU(act_quant=Uint8ActPerTensorFixedPoint.let(**options)) if point.relu else qnn.QuantIdentity(act_quant=signed)
            )

    def make_layer(self, step: ConvStep | LinearStep) -> nn.Module:
        """A stock quantized layer."""
        options = {"weight_quant": Int8WeightPerTensorFixedPoint}
        if isinstance(step, LinearStep):
            return filled(qnn.QuantLinear(step.weight.shape[1], step.weight.shape[0], bias=True, **options), step)
        channels = step.weight.shape[1] * step.groups, step.weight.shape[0]
        return filled(qnn.QuantConv2d(*channels, bias=True, **geometry(step), **options), step)

    def activate(self, step: Step, x: Tensor) -> Tensor:
        """The quantizer, where the FixedPointNet has one."""
        key = module_key(step.name)
        out: Tensor = self.quantizers[key](x) if key in self.quantizers else x
        return out


def _is_symmetric(step: ConvStep) -> bool:
    top, left, bottom, right = step.padding
    return (top, left) == (bottom, right)


def geometry(step: ConvStep) -> dict[str, Any]:
    """Arguments of a convolution layer for a step; padding that is not symmetric is left to the caller."""
    return {
        "kernel_size": tuple(step.weight.shape[2:]), "stride": step.stride, "dilation": step.dilation, "groups": step.groups,
        "padding": step.padding[:2] if _is_symmetric(step) else (0, 0),
    }  # fmt: skip


def filled(layer: nn.Module, step: ConvStep | LinearStep) -> nn.Module:
    """A layer with the weights and bias of a step; constants are not trained."""
    # In place: assigning a new Parameter makes Brevitas rebuild its quantizer.
    for name, value in (("weight", step.weight), ("bias", step.bias)):
        layer.get_parameter(name).data.copy_(value)
    layer.requires_grad_(not (isinstance(step, ConvStep) and step.fixed))
    return layer
