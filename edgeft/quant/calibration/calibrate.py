"""Calibration: formats from statistics, equalisation, and weights rounded with compensation; no labels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edgeft.config import QuantConfig
from edgeft.errors import DataError, UnsupportedError
from edgeft.quant import a2q
from edgeft.quant.calibration.compensate import channel_means, layer_inputs
from edgeft.quant.calibration.flexround import flexround
from edgeft.quant.calibration.layerfit import LayerFit, LayerSample, fit_layer, importance, put
from edgeft.quant.calibration.ranges import fit_ranges
from edgeft.quant.calibration.search import search
from edgeft.quant.calibration.statistics import TensorStatistics, collect, explain, propose, propose_weight
from edgeft.quant.f8net import POWERS, Rule
from edgeft.quant.formats import weight_format
from edgeft.quant.net import FixedPointNet
from edgeft.quant.plan import IMAGE, ConvStep, LinearStep, Plan, Weighted, rectify, run_step
from edgeft.quant.rescale import IMAGE_NORM, equalize

Advance = Callable[..., None]
Fits = dict[str, list[LayerFit]]

WIDEST = 8192
"""Weights per output up to which rounding errors are compensated."""


class Calibration(NamedTuple):
    """The calibrated net, each activation's sigma, and why each format was chosen (JSON values, by "activations" and "layers")."""

    net: FixedPointNet
    sigmas: dict[str, float]
    choices: dict[str, Any]


def calibrate(
    plan: Plan, images: Tensor, config: QuantConfig, advance: Advance, shifted: Tensor | None = None
) -> tuple[FixedPointNet, dict[str, float]]:
    """What `calibrate_explained` gives, without the reasons."""
    return calibrate_explained(plan, images, config, advance, shifted)[:2]


def n_advances(plan: Plan, config: QuantConfig) -> int:
    """How often calibration reports progress: once for each step, and once more where formats are searched."""
    return len(plan.steps) * (2 if config.format == "search" else 1)


@torch.no_grad()
def calibrate_explained(plan: Plan, images: Tensor, config: QuantConfig, advance: Advance, shifted: Tensor | None = None) -> Calibration:
    """FixedPointNet of a prepared plan with formats and weights chosen on image bytes [n, 3, h, w].

    Activation formats also have room for the `shifted` images, where there are any. `advance` is called `n_advances` times. The
    plan's weights are equalised in place. Raises DataError without images, UnsupportedError naming the layer whose values are not
    finite or that no format holds.
    """
    if len(images) == 0:
        raise DataError("calibration needs at least one image, and there is none")
    seen = _observe(plan, images, shifted, config)
    statistics = seen[0]
    net = FixedPointNet(plan, profile=config.profile, per_channel=config.granularity == "channel").eval()
    proposals = {p.name: min(propose_point(net, p.name, found, config) for found in seen) for p in net.points}
    net.set_fracs(proposals)
    for step in plan.weighted():
        net.set_weight_fracs(step.name, propose_layer(net, step, config))
    n_fit = len(images) if config.format != "search" else (len(images) + 1) // 2
    fits = _round_all(net, images[:n_fit], config, advance)
    if config.format == "search":
        search(net, images[n_fit:] if n_fit < len(images) else images, fits, proposals, advance)
    a2q.fit(net, images, config.accumulator_bits)
    return Calibration(net, {p.name: statistics[p.name].spread for p in net.points}, explain(net, statistics, rule_of(config)))


def _observe(plan: Plan, images: Tensor, shifted: Tensor | None, config: QuantConfig) -> list[dict[str, TensorStatistics]]:
    """Statistics of the plan, equalised and with ranges fitted as configured: on the calibration images, then on shifted ones if any."""
    statistics = collect(plan, images)
    if config.equalize and config.granularity == "tensor":
        peaks = {name: s.peak for name, s in statistics.items()}
        if equalize(plan, peaks, {name: s.clip_active for name, s in statistics.items()}):
            statistics = collect(plan, images)
    seen = [statistics] if shifted is None else [statistics, collect(plan, shifted)]
    return fit_ranges(plan, seen, config.profile, rule_of(config)) if config.fit_ranges else seen


def rule_of(config: QuantConfig) -> Rule:
    """The rule that proposes formats; a search and learned clips start from least error."""
    return "l4" if config.format == "search" or config.format == "pact" else config.format


def propose_point(net: FixedPointNet, name: str, statistics: dict[str, TensorStatistics], config: QuantConfig) -> int:
    """What the configured rule picks for an activation; the normalised image has a fixed format."""
    point = next(p for p in net.points if p.name == name)
    return 7 if name == IMAGE_NORM else propose(net.plan, point, statistics[name], rule_of(config))


def propose_layer(net: FixedPointNet, step: Weighted, config: QuantConfig) -> tuple[int, ...]:
    """What the configured rule picks for the weights of a layer: one fraction, or one for each output channel."""
    if isinstance(step, ConvStep) and step.fixed_frac is not None:
        return (step.fixed_frac,)
    layer = net.layer(step.name)
    weight = layer.weight.detach().cpu().double().numpy()
    parts = list(weight) if layer.body.frac.ndim else [weight]
    return tuple(propose_weight(part, weight_format(0), rule_of(config)) for part in parts)


def _round_all(net: FixedPointNet, images: Tensor, config: QuantConfig, advance: Advance) -> Fits:
    """Round layer by layer in network order, each layer seeing quantized inputs and aiming at the float net's outputs."""
    plan, fits = net.plan, {}
    if config.rounding == "nearest":
        for _ in plan.steps:
            advance()
        return {}
    last_use = plan.last_use()
    encoded = plan.encode(images)
    exact, rounded = {IMAGE: encoded}, {IMAGE: encoded}
    for index, step in enumerate(plan.steps):
        wanted = run_step(step, [exact[name] for name in step.inputs])
        note = ""
        if isinstance(step, ConvStep | LinearStep) and not constant(step):
            if compensable(step):
                fits[step.name] = _fit(net, step, rounded[step.inputs[0]], exact[step.inputs[0]], config, seed=index)
                put(net, step, fits[step.name][0])
            else:
                _correct_bias(net, step, rounded[step.inputs[0]], wanted)
                note = f"{step.name} is too wide to compensate: plain rounding, corrected bias"
        rounded[step.name] = net.activate(step, net.run_step(step, [rounded[name] for name in step.inputs]))
        exact[step.name] = rectify(step, wanted)
        for name in set(step.inputs):
            if last_use[name] == index:
                del exact[name], rounded[name]
        advance(note=note) if note else advance()
    return fits


def constant(step: Weighted) -> bool:
    """Whether the weights belong to the network's structure and are exact as they are."""
    return isinstance(step, ConvStep) and step.fixed


def compensable(step: Weighted) -> bool:
    """Whether a layer is narrow enough for error compensation, whose cost is cubic in the weights per output."""
    return step.weight[0].numel() <= WIDEST


def _fit(net: FixedPointNet, step: Weighted, x: Tensor, exact: Tensor, config: QuantConfig, *, seed: int) -> list[LayerFit]:
    layer = net.layer(step.name)
    columns = [layer_inputs(step, source, torch.Generator().manual_seed(seed)) for source in (x, exact)]
    sample = LayerSample(step, columns[0], columns[1], importance(net.plan, step))
    per_channel = bool(layer.body.frac.ndim)
    fracs = None if rule_of(config) in POWERS else layer.body.frac
    try:
        fits = fit_layer(sample, fracs, layer.body.high, per_channel=per_channel)
    except torch.linalg.LinAlgError as error:
        raise UnsupportedError(
            f"layer '{step.name}': its inputs on the calibration images are degenerate ({error})",
            "use more images: --set quant.calibration_images=256, or --set quant.rounding=nearest",
        ) from error
    limited = _within_limits(net, step, fits[0].fracs)
    if not torch.equal(limited, fits[0].fracs):
        fits = fit_layer(sample, limited, layer.body.high, per_channel=per_channel)
    if config.rounding == "flexround":
        fits[0] = flexround(sample, fits[0], layer.body.high, seed)
    return fits


def _within_limits(net: FixedPointNet, step: Weighted, fracs: Tensor) -> Tensor:
    """What the shift to the output leaves of weight fractions."""
    net.set_weight_fracs(step.name, tuple(int(frac) for frac in fracs))
    return net.layer(step.name).body.frac.flatten().clone()


def _correct_bias(net: FixedPointNet, step: Weighted, x: Tensor, wanted: Tensor) -> None:
    layer = net.layer(step.name)
    drift = channel_means(wanted) - channel_means(net.run_step(step, [x]))
    layer.bias.data.copy_(layer.rounded_bias() + drift.to(layer.bias.dtype))  # the drift was measured with the rounded bias
