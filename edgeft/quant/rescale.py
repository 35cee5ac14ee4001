"""Rescale a traced plan without changing its function: image bytes, pooling ratio, ReLU6 clips, cross-layer equalisation."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from edgeft.errors import UnsupportedError
from edgeft.fixedpoint import FixedPointFormat
from edgeft.quant.formats import Groups, activation_format
from edgeft.quant.plan import IMAGE, AddStep, ConvStep, FlattenStep, GlobalPoolStep, LinearStep, MaxPoolStep, Plan, Step
from edgeft.quant.trace import trace

IMAGE_NORM = "image_norm"
"""Name of the depthwise 1x1 layer that normalises the image where that cannot be folded into the stem."""
IMAGE_NORM_FRAC = 6
CLIP_FRAC = {"u8": 5, "s8": 4}
"""Fraction at which the top code means the (rescaled) ReLU6 bound: 255/32 or 127/16."""


def prepare_plan(net: nn.Module, image_shape: tuple[int, int, int], mean: Sequence[float], std: Sequence[float], profile: str) -> Plan:
    """Plan of a float network, ready for quantization: reads image bytes, all foldable factors folded, float32.

    Raises UnsupportedError naming the layer when the network has no fixed-point form.
    """
    plan = trace(net, image_shape)
    fold_pooling(plan)
    fold_image(plan, mean, std)
    scale_clips(plan, profile)
    for step in plan.weighted():
        step.weight, step.bias = step.weight.float(), step.bias.float()
        if not bool(torch.isfinite(step.weight).all() and torch.isfinite(step.bias).all()):
            raise UnsupportedError(f"layer '{step.name}' has weights that are not finite numbers")
    return plan


def fold_pooling(plan: Plan) -> None:
    """Divide pools by a power of two, 2^round(log2 n), and multiply the consumers' weights by the rest, 2^m / n.

    Never the producer's: with a residual connection the identity branch would miss the factor.
    """
    for step in plan.steps:
        if isinstance(step, GlobalPoolStep):
            source = plan.producer(step.inputs[0])
            _, height, width = source.shape if source is not None else plan.image_shape
            step.divisor_log2 = round(math.log2(height * width))
            _scale_input(plan, step.name, torch.tensor(2.0**step.divisor_log2 / (height * width), dtype=torch.float64))


def fold_image(plan: Plan, mean: Sequence[float], std: Sequence[float]) -> None:
    """Make the plan read bytes. x = (byte/255 - mean)/std is folded into the consumers where zero padding stays (nearly) zero.

    mean = 1/2: code = byte - 128 (s8.7), exact but for half a level at zero padding. mean = 0: code = byte (u8.8), exact.
    Otherwise the layer `image_norm` subtracts the mean: code = round(byte * w - o), an 8-bit multiplication and a shift for each
    channel, whose gain w / 2^6 uses the range and is divided out of the consumers' weights.
    """
    mean_t, std_t = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    levels = 255.0 * mean_t
    if bool((128.0 - levels).abs().max() <= 1.0):
        plan.signed_image = True
        _scale_input(plan, IMAGE, 128.0 / (255.0 * std_t), (128.0 - levels) / (255.0 * std_t))
    elif bool(levels.abs().max() <= 1.0):
        plan.signed_image = False
        _scale_input(plan, IMAGE, 256.0 / (255.0 * std_t), -mean_t / std_t)
    else:
        plan.signed_image = False
        _insert_image_norm(plan, levels, std_t)


def _insert_image_norm(plan: Plan, levels: Tensor, std: Tensor) -> None:
    # value = (byte/256) * w - o with codes at frac 7; the largest gain that keeps bytes 0 and 255 inside -128 ... 127.
    gain = torch.minimum(127.0 / (255.0 - levels).clamp(min=1.0), 128.0 / levels.clamp(min=1.0))
    codes = (gain * 2.0 ** (IMAGE_NORM_FRAC + 1)).floor().clamp(max=127.0)
    weight = codes * 2.0**-IMAGE_NORM_FRAC
    for step in plan.steps:
        step.inputs = tuple(IMAGE_NORM if name == IMAGE else name for name in step.inputs)
    channels = plan.image_shape[0]
    plan.steps.insert(0, ConvStep(
        IMAGE_NORM, (IMAGE,), plan.image_shape, weight=weight.view(channels, 1, 1, 1), bias=-weight * levels / 256.0,
        groups=channels, fixed=True,
    ))  # fmt: skip
    _scale_input(plan, IMAGE_NORM, 256.0 / (weight * 255.0 * std))


def scale_clips(plan: Plan, profile: str) -> None:
    """Scale every ReLU6 tensor so that the top code of its format means exactly 6: saturation is then the clip.

    Tensors tied to it by additions and pools take the same factor; producers are multiplied, consumers divided.
    """
    groups = Groups.of(plan.steps, AddStep, MaxPoolStep, GlobalPoolStep, FlattenStep)
    for members in groups.sets():
        clipped = [step for step in plan.steps if step.name in members and step.clip is not None]
        if not clipped:
            continue
        if IMAGE in members:
            raise UnsupportedError(f"layer '{clipped[0].name}' (ReLU6) is added to the image itself, which cannot be rescaled")
        top = activation_format(profile, relu=True, frac=CLIP_FRAC[profile]).max_value
        factor = torch.tensor(top / min(step.clip for step in clipped if step.clip is not None), dtype=torch.float64)
        for step in plan.steps:
            if step.name in members:
                if isinstance(step, ConvStep | LinearStep):
                    step.weight, step.bias = step.weight * factor, step.bias * factor
                step.clip = None if step.clip is None else step.clip * float(factor)
        # Convolutions inside the group, too, read what has been scaled; only what ties its members passes the factor on.
        ties = [step.name for step in plan.steps if step.name in members and not isinstance(step, ConvStep | LinearStep)]
        for name in members:
            _scale_input(plan, name, 1.0 / factor, skip=ties)


def _scale_input(plan: Plan, name: str, factor: Tensor, offset: Tensor | None = None, skip: Iterable[str] = ()) -> None:
    """Make the consumers of `name` read x * factor + offset (a scalar or one entry per channel) by changing their weights."""
    for step in plan.consumers(name):
        if step.name in skip:
            continue
        if isinstance(step, FlattenStep | MaxPoolStep) and offset is None and factor.ndim == 0:
            _scale_input(plan, step.name, factor)
        elif isinstance(step, ConvStep) or (isinstance(step, LinearStep) and factor.ndim == 0 and offset is None):
            _scale_weights(step, factor, offset)
        else:
            raise UnsupportedError(f"layer '{step.name}' reads '{name}', whose scale can only be folded into a convolution or linear layer")


def _scale_weights(step: ConvStep | LinearStep, factor: Tensor, offset: Tensor | None) -> None:
    if factor.ndim and isinstance(step, ConvStep):
        inputs = _per_input(step, factor)
        if offset is not None:
            step.bias = step.bias + (step.weight * _per_input(step, offset)).sum((1, 2, 3))
        step.weight = step.weight * inputs
    else:
        step.weight = step.weight * factor


def _per_input(step: ConvStep, values: Tensor) -> Tensor:
    """Values per input channel, laid out to multiply [out, in/groups, kh, kw] weights."""
    per_group = values.view(step.groups, -1)
    return per_group.repeat_interleave(step.weight.shape[0] // step.groups, 0)[:, :, None, None]


def depthwise(step: Step) -> bool:
    """One input channel and one output channel in each group."""
    return isinstance(step, ConvStep) and step.groups == step.weight.shape[0] and step.weight.shape[1] == 1


def equalize(plan: Plan, peaks: dict[str, Tensor], clipped: dict[str, Tensor], rounds: int = 10) -> int:
    """Power-of-two cross-layer equalisation (Nagel et al. 2019, arXiv:1906.04721, with factors rounded to 2^n); returns the pairs changed.

    For a convolution whose output feeds exactly one other convolution, at least one of the two depthwise, channel c is scaled
    by s_c = 2^round(log2 sqrt(r2_c / r1_c)), r the channel's largest weights on either side. `peaks` holds each tensor's largest
    value per channel before its clip, `clipped` marks channels whose clip is active: those stay, and no other channel is
    raised past half of the clip or, without one, past the tensor's own peak. Exact in float: the factors are powers of two.
    """
    pairs = [(step, after[0]) for step in plan.steps if isinstance(step, ConvStep) and not step.fixed
             and len(after := plan.consumers(step.name)) == 1 and isinstance(after[0], ConvStep)
             and (depthwise(step) or depthwise(after[0])) and (after[0].groups == 1 or depthwise(after[0]))]  # fmt: skip
    peaks = {name: peak.clone() for name, peak in peaks.items()}
    changed: set[str] = set()
    for _ in range(rounds):
        moved = False
        for first, second in pairs:
            assert isinstance(second, ConvStep)
            factor = _equalizing_factor(first, second, peaks[first.name], clipped[first.name])
            if bool((factor != 1.0).any()):
                first.weight, first.bias = first.weight * factor.view(-1, 1, 1, 1), first.bias * factor
                second.weight = second.weight / _per_input(second, factor)
                peaks[first.name] *= factor
                changed.add(first.name)
                moved = True
        if not moved:
            break
    return len(changed)


def _equalizing_factor(first: ConvStep, second: ConvStep, peak: Tensor, clipped: Tensor) -> Tensor:
    floor = 1e-8
    r1 = first.weight.abs().amax((1, 2, 3)).clamp(min=floor)
    by_input = second.weight.abs().amax((1, 2, 3) if depthwise(second) else (0, 2, 3)).clamp(min=floor)
    ceiling = first.clip / 2.0 if first.clip is not None else float(peak.max())
    headroom = torch.floor(torch.log2(torch.full_like(peak, max(ceiling, floor)) / peak.clamp(min=floor))).clamp(min=0.0)
    exponent = torch.minimum(torch.round(0.5 * torch.log2(by_input / r1)), headroom)
    dead = (r1 <= floor) | (by_input <= floor) | (peak <= floor) | clipped
    return torch.exp2(torch.where(dead, torch.zeros_like(exponent), exponent))


def image_format(plan: Plan) -> FixedPointFormat:
    """Format of the input tensor: bytes minus 128, or raw bytes."""
    return FixedPointFormat(8, 7, signed=True) if plan.signed_image else FixedPointFormat(8, 8, signed=False)
