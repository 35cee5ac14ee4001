"""Calibration: formats from statistics, equalisation, and weights rounded with compensation; no labels, no gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from edgeft.config import QuantConfig
from edgeft.errors import UnsupportedError
from edgeft.quant.compensate import centred, channel_means, compensate_rounding, layer_inputs, refit
from edgeft.quant.formats import weight_format
from edgeft.quant.net import FixedPointNet
from edgeft.quant.plan import IMAGE, ConvStep, LinearStep, Plan, Weighted, rectify, run_step
from edgeft.quant.rescale import IMAGE_NORM, IMAGE_NORM_FRAC, equalize
from edgeft.quant.statistics import TensorStatistics, collect, propose, propose_weight

Advance = Callable[..., None]

WIDEST = 8192
"""Weights per output up to which rounding errors are compensated."""


@torch.no_grad()
def calibrate(plan: Plan, images: Tensor, config: QuantConfig, advance: Advance) -> tuple[FixedPointNet, dict[str, float]]:
    """FixedPointNet of a prepared plan with formats and weights chosen on image bytes [n, 3, h, w]; and each tensor's sigma.

    `advance` is called once for each step of the plan. The plan's weights are equalised in place.
    """
    statistics = collect(plan, images)
    if config.equalize and config.granularity == "tensor":
        peaks = {name: s.peak for name, s in statistics.items()}
        if equalize(plan, peaks, {name: s.clip_active for name, s in statistics.items()}):
            statistics = collect(plan, images)
    net = FixedPointNet(plan, profile=config.profile, per_channel=config.granularity == "channel").eval()
    net.set_fracs({point.name: propose_point(net, point.name, statistics, config) for point in net.points})
    for step in plan.weighted():
        net.set_weight_fracs(step.name, propose_layer(net, step, config))
    if config.compensate:
        _compensate(net, images, advance)
    else:
        for _ in plan.steps:
            advance()
    return net, {point.name: statistics[point.name].spread for point in net.points}


def propose_point(net: FixedPointNet, name: str, statistics: dict[str, TensorStatistics], config: QuantConfig) -> int:
    """What the configured rule picks for an activation; the normalised image has a fixed format."""
    point = next(p for p in net.points if p.name == name)
    return 7 if name == IMAGE_NORM else propose(net.plan, point, statistics[name], config.format)


def propose_layer(net: FixedPointNet, step: Weighted, config: QuantConfig) -> tuple[int, ...]:
    """What the configured rule picks for the weights of a layer: one fraction, or one for each output channel."""
    if step.name == IMAGE_NORM:
        return (IMAGE_NORM_FRAC,)
    layer = net.layer(step.name)
    weight = layer.weight.detach().cpu().double().numpy()
    parts = list(weight) if layer.body.frac.ndim else [weight]
    return tuple(propose_weight(part, weight_format(0), config.format) for part in parts)


def _compensate(net: FixedPointNet, images: Tensor, advance: Advance) -> None:
    """Round layer by layer in network order, each layer seeing quantized inputs and aiming at the float net's outputs."""
    plan = net.plan
    last_use = plan.last_use()
    encoded = plan.encode(images)
    exact, rounded = {IMAGE: encoded}, {IMAGE: encoded}
    for index, step in enumerate(plan.steps):
        wanted = run_step(step, [exact[name] for name in step.inputs])
        if isinstance(step, ConvStep | LinearStep) and not (isinstance(step, ConvStep) and step.fixed):
            _repair(net, step, rounded[step.inputs[0]], exact[step.inputs[0]], wanted, seed=index)
        rounded[step.name] = net.activate(step, net.run_step(step, [rounded[name] for name in step.inputs]))
        exact[step.name] = rectify(step, wanted)
        for name in set(step.inputs):
            if last_use[name] == index:
                del exact[name], rounded[name]
        if isinstance(step, ConvStep | LinearStep) and not compensable(step):
            advance(note=f"{step.name} is too wide to compensate: plain rounding, corrected bias")
        else:
            advance()


def compensable(step: Weighted) -> bool:
    """Whether a layer is narrow enough for error compensation, whose cost is cubic in the weights per output."""
    return step.weight[0].numel() <= WIDEST


def _repair(net: FixedPointNet, step: Weighted, x: Tensor, exact: Tensor, wanted: Tensor, *, seed: int) -> None:
    layer = net.layer(step.name)
    if not compensable(step):
        _correct_bias(net, step, x, wanted)
        return
    scale = torch.exp2(layer.body.frac).flatten()
    columns = centred(layer_inputs(step, x, torch.Generator().manual_seed(seed)))
    try:
        weight = refit(step.weight, columns, centred(layer_inputs(step, exact, torch.Generator().manual_seed(seed))))
        weight = compensate_rounding(weight, scale, columns, layer.body.high)
    except torch.linalg.LinAlgError as error:
        raise UnsupportedError(
            f"layer '{step.name}': its inputs on the calibration images are degenerate ({error})",
            "use more images: --set quant.calibration_images=256, or --set quant.compensate=false",
        ) from error
    layer.weight.data.copy_(weight)
    _correct_bias(net, step, x, wanted)


def _correct_bias(net: FixedPointNet, step: Weighted, x: Tensor, wanted: Tensor) -> None:
    layer = net.layer(step.name)
    drift = channel_means(wanted) - channel_means(net.run_step(step, [x]))
    layer.bias.data.copy_(layer.rounded_bias() + drift.to(layer.bias.dtype))  # the drift was measured with the rounded bias
