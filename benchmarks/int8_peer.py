"""The usual 8-bit training to compare with: the same plan with the float scales that Brevitas brings along, learned by gradient."""

import warnings

import torch
from brevitas import nn as qnn
from brevitas.quant import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFloat,
    Uint8ActPerTensorFloat,
)
from torch import Tensor, nn

from benchmarks.qat_peers import PlanNet, filled, geometry
from edgeft.quant.net import FixedPointNet, module_key
from edgeft.quant.plan import ConvStep, LinearStep, Step, rectify

BATCH = 32


class Int8Net(PlanNet):
    """Stock int8: weights with a float scale per tensor or per output channel, activations per tensor, biases in float.

    Quantizers stand where those of `net` stand, and weights are the (equalised) float weights of its plan. Constant weights stay
    in float, which favours this net.
    """

    def __init__(self, net: FixedPointNet, *, per_channel: bool) -> None:
        self._weight_quant = Int8WeightPerChannelFloat if per_channel else Int8WeightPerTensorFloat
        super().__init__(net.plan)
        self.quantizers = nn.ModuleDict()
        for point in net.points:
            quant = Int8ActPerTensorFloat if point.format.signed else Uint8ActPerTensorFloat
            self.quantizers[module_key(point.name)] = qnn.QuantIdentity(act_quant=quant)

    def make_layer(self, step: ConvStep | LinearStep) -> nn.Module:
        """A stock quantized layer."""
        if isinstance(step, LinearStep):
            return filled(qnn.QuantLinear(step.weight.shape[1], step.weight.shape[0], bias=True, weight_quant=self._weight_quant), step)
        channels = step.weight.shape[1] * step.groups, step.weight.shape[0]
        quant = None if step.fixed else self._weight_quant
        return filled(qnn.QuantConv2d(*channels, bias=True, weight_quant=quant, **geometry(step)), step)

    def activate(self, step: Step, x: Tensor) -> Tensor:
        """ReLU or clip, then the quantizer where the FixedPointNet has one."""
        key = module_key(step.name)
        rectified = rectify(step, x)
        out: Tensor = self.quantizers[key](rectified) if key in self.quantizers else rectified
        return out


@torch.no_grad()
def calibrated_peer(net: FixedPointNet, images: Tensor, *, per_channel: bool) -> Int8Net:
    """The peer with the activation scales that Brevitas derives from image bytes [n, 3, h, w]; they are trained from there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an optional package for something else is missing, a module of its own is deprecated
        from brevitas.graph.calibrate import calibration_mode

    peer = Int8Net(net, per_channel=per_channel).train()
    with calibration_mode(peer):
        for batch in images.split(BATCH):
            peer(batch)
    return peer.eval()
