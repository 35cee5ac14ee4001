"""Rescale a traced plan without changing its function: image bytes, pooling ratio, ReLU6 clips, cross-layer equalisation."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgeft.errors import UnsupportedError
from edgeft.fixedpoint import FixedPointFormat
from edgeft.quant.formats import CLIP_FRAC, Groups, activation_format
from edgeft.quant.plan import IMAGE, MOVES, AddStep, ConvStep, GlobalPoolStep, LinearStep, MulStep, Plan, Step, TableStep
from edgeft.quant.points import separate
from edgeft.quant.scaling import channels_of, per_input, scale_output, scale_readers
from edgeft.quant.tracing.trace import trace

IMAGE_NORM = "image_norm"
"""Name of the depthwise 1x1 layer that normalises the image where that cannot be folded into the stem."""
IMAGE_NORM_FRAC = 6
IMAGE_VALUES = "image_values"
"""Name of the depthwise 1x1 layer that yields the normalised image where its factors cannot be folded into what reads it."""
SETTLED = 0.02
"""Octaves below which equalisation leaves a channel as it is: 1.4 %, far less than a format's step."""


def prepare_plan(
    net: nn.Module, image_shape: tuple[int, int, int], mean: Sequence[float], std: Sequence[float], profile: str, residual: str = "branch"
) -> Plan:
    """Plan of a float network, ready for quantization: reads image bytes, all foldable factors folded, float32.

    Raises UnsupportedError naming the layer when the network has no fixed-point form.
    """
    plan = trace(net, image_shape)
    fold_pooling(plan)
    fold_image(plan, mean, std, profile)
    scale_clips(plan, profile)
    separate(plan, profile)
    for step in plan.weighted():
        step.weight, step.bias = step.weight.float(), step.bias.float()
        if isinstance(step, ConvStep) and step.norm is not None:
            step.norm = step.norm.float()
        if not bool(torch.isfinite(step.weight).all() and torch.isfinite(step.bias).all()):
            raise UnsupportedError(f"layer '{step.name}' has weights that are not finite numbers")
    if residual == "wide":
        widen_additions(plan)
    return plan


def widen_additions(plan: Plan) -> None:
    """Let each addition take the accumulators of a convolution that nothing else reads, of two such the one that is computed last.

    The last one, because its accumulators can then be consumed as they are formed, and no 32-bit tensor is ever stored.
    """
    for add in plan.steps:
        if not isinstance(add, AddStep) or add.inputs[0] == add.inputs[1]:
            continue
        operands = [step for step in plan.steps if step.name in add.inputs and isinstance(step, ConvStep)]
        alone = [step for step in operands if not (step.fixed or step.relu) and plan.consumers(step.name) == [add]]
        for step in alone[-1:]:
            step.wide = True


def fold_pooling(plan: Plan) -> None:
    """Divide pools by a power of two, 2^round(log2 n), and multiply the consumers' weights by the rest, 2^m / n.

    Never the producer's: with a residual connection the identity branch would miss the factor. Where a consumer has nothing to take
    it into, a depthwise convolution with the constant 2^m / n (to 8 bits) follows the pool. The same is done with what the 8-bit
    constant of an averaging window lacks, if all its consumers can take it.
    """
    for step in list(plan.steps):
        if isinstance(step, GlobalPoolStep):
            source = plan.producer(step.inputs[0])
            _, height, width = source.shape if source is not None else plan.image_shape
            step.divisor_log2 = round(math.log2(height * width))
            ratio = 2.0**step.divisor_log2 / (height * width)
            if ratio != 1.0 and not scale_readers(plan, step.name, torch.full(step.shape[:1], ratio, dtype=torch.float64)):
                insert_factor(plan, step.name, ratio, plan.consumers(step.name))
        elif isinstance(step, ConvStep) and (ratio := _missing_in_window(step)) != 1.0:
            scale_readers(plan, step.name, torch.full(step.shape[:1], ratio, dtype=torch.float64))


def _missing_in_window(step: ConvStep) -> float:
    """True mean over what an averaging window with an 8-bit constant yields: at most 1/128 from 1."""
    value = float(step.weight.flatten()[0])
    pixels = step.weight.shape[2] * step.weight.shape[3]
    if not step.fixed or not depthwise(step) or pixels == 1 or bool((step.weight != value).any()):
        return 1.0
    ratio = 1.0 / (value * pixels)
    return ratio if abs(ratio - 1.0) <= 1 / 128 else 1.0


def insert_factor(plan: Plan, name: str, factor: float, readers: list[Step]) -> None:
    """Let some readers of a tensor read `factor` times it: a depthwise convolution with that constant, to 8 bits, goes in between."""
    frac = math.floor(math.log2(127.5 / factor))
    channels = channels_of(plan, name)
    producer = plan.producer(name)
    weight = torch.full((channels, 1, 1, 1), round(factor * 2.0**frac) * 2.0**-frac, dtype=torch.float64)
    shape = plan.image_shape if producer is None else producer.shape
    taken = {step.name for step in plan.steps}
    scaled = next(new for n in itertools.count(1) if (new := f"{name}.factor" + (f"_{n}" if n > 1 else "")) not in taken)
    step = ConvStep(scaled, (name,), shape, weight=weight, bias=weight.new_zeros(channels), groups=channels, fixed_frac=frac)
    plan.steps.insert(0 if producer is None else plan.steps.index(producer) + 1, step)
    for reader in readers:
        reader.inputs = tuple(scaled if other == name else other for other in reader.inputs)


def fold_image(plan: Plan, mean: Sequence[float], std: Sequence[float], profile: str = "u8") -> None:
    """Make the plan read bytes. x = (byte/255 - mean)/std is folded into the consumers where zero padding stays (nearly) zero.

    mean = 1/2: code = byte - 128 (s8.7), exact but for half a level at zero padding. mean = 0: code = byte (u8.8), exact.
    Otherwise the layer `image_norm` subtracts the mean: code = round(byte * w - o), an 8-bit multiplication and a shift for each
    channel, whose gain w / 2^6 uses the range and is divided out of the consumers' weights. Where a consumer has no weights to fold
    into, the layer `image_values` yields the normalised values themselves. In profile `s8`, which has no unsigned tensor, the image is
    always byte - 128, and `image_norm` yields the same codes from that.
    """
    mean_t, std_t = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    levels = 255.0 * mean_t
    centred = bool((128.0 - levels).abs().max() <= 1.0)
    plan.signed_image = centred or profile == "s8"
    if plan.signed_image:
        factor, offset = 128.0 / (255.0 * std_t), (128.0 - levels) / (255.0 * std_t)
    else:
        factor, offset = 256.0 / (255.0 * std_t), -mean_t / std_t
    if centred or (not plan.signed_image and bool(levels.abs().max() <= 1.0)):
        if not scale_readers(plan, IMAGE, factor, offset if bool((offset != 0.0).any()) else None):
            _insert_before_image_readers(plan, IMAGE_VALUES, factor, offset, None)
    elif not _insert_image_norm(plan, levels, std_t):
        _insert_before_image_readers(plan, IMAGE_VALUES, factor, offset, None)


def _insert_image_norm(plan: Plan, levels: Tensor, std: Tensor) -> bool:
    # code = byte * w - o; w is the largest gain that keeps bytes 0 and 255 inside -128 ... 127.
    gain = torch.minimum(127.0 / (255.0 - levels).clamp(min=1.0), 128.0 / levels.clamp(min=1.0))
    codes = (gain * 2.0 ** (IMAGE_NORM_FRAC + 1)).floor().clamp(max=127.0)
    weight = codes * 2.0**-IMAGE_NORM_FRAC
    if not scale_readers(plan, IMAGE, 256.0 / (weight * 255.0 * std)):
        return False
    bias = -weight * levels / 256.0
    if plan.signed_image:  # byte / 256 = value / 2 + 1 / 2
        _insert_before_image_readers(plan, IMAGE_NORM, weight / 2.0, bias + weight / 2.0, IMAGE_NORM_FRAC + 1)
    else:
        _insert_before_image_readers(plan, IMAGE_NORM, weight, bias, IMAGE_NORM_FRAC)
    return True


def _insert_before_image_readers(plan: Plan, name: str, weight: Tensor, bias: Tensor, fixed_frac: int | None) -> None:
    for step in plan.steps:
        step.inputs = tuple(name if source == IMAGE else source for source in step.inputs)
    channels = plan.image_shape[0]
    plan.steps.insert(0, ConvStep(
        name, (IMAGE,), plan.image_shape, weight=weight.view(channels, 1, 1, 1), bias=bias, groups=channels, fixed_frac=fixed_frac,
    ))  # fmt: skip


def scale_clips(plan: Plan, profile: str) -> None:
    """Scale every ReLU6 tensor so that the top code of its format means exactly 6: saturation is then the clip.

    Tensors tied to it by additions, pools, moves, products and constant convolutions take the same factor; producers are multiplied,
    consumers divided.
    """
    for members in ties(plan).sets():
        clipped = [step for step in plan.steps if step.name in members and step.clip is not None]
        if not clipped:
            continue
        if IMAGE in members:
            raise UnsupportedError(f"layer '{clipped[0].name}' (ReLU6) is added to the image itself, which cannot be rescaled")
        top = activation_format(profile, relu=True, frac=CLIP_FRAC[profile]).max_value
        factor = torch.tensor(top / min(step.clip for step in clipped if step.clip is not None), dtype=torch.float64)
        scale_group(plan, members, factor)


def ties(plan: Plan) -> Groups:
    """Tensors that can only be scaled together. The gate of a product is not among them, its other factor is."""
    groups = Groups.of(plan.steps, AddStep, GlobalPoolStep, *MOVES)
    for step in plan.steps:
        if isinstance(step, MulStep) or (isinstance(step, ConvStep) and step.fixed):
            groups.join(step.inputs[0], step.name)
    return groups


def scale_group(plan: Plan, members: set[str], factor: Tensor) -> None:
    """Multiply all tensors of a set of `ties` by `factor`, 0-dim and above 0, and make everything that reads them take it back."""
    for step in list(plan.steps):
        if isinstance(step, MulStep) and step.inputs[1] in members:
            _unscale_gate(plan, step, 1.0 / float(factor))
    for step in plan.steps:
        if step.name in members:
            if isinstance(step, ConvStep) and step.fixed:
                step.bias = step.bias * factor
            else:
                scale_output(step, factor)
            step.clip = None if step.clip is None else step.clip * float(factor)
        # Layers inside the group, too, read what has been scaled; only what ties its members passes the factor on.
        read = [name for name in step.inputs if name in members]
        if isinstance(step, TableStep) and read:
            step.input_gain /= float(factor)
        elif isinstance(step, LinearStep) or (isinstance(step, ConvStep) and not step.fixed):
            step.weight = step.weight / factor if read else step.weight


def _unscale_gate(plan: Plan, step: MulStep, factor: float) -> None:
    left, gate = step.inputs
    insert_factor(plan, gate, factor, [step])
    step.inputs = (left, step.inputs[1])


def depthwise(step: Step) -> bool:
    """One input channel and one output channel in each group."""
    return isinstance(step, ConvStep) and step.groups == step.weight.shape[0] and step.weight.shape[1] == 1


def equalize(plan: Plan, peaks: dict[str, Tensor], clipped: dict[str, Tensor], rounds: int = 10) -> int:
    """Cross-layer equalisation (Nagel et al. 2019, arXiv:1906.04721); returns the number of pairs changed.

    For a convolution whose output feeds exactly one other convolution, at least one of the two depthwise, channel c is scaled
    by s_c = sqrt(r2_c / r1_c), r the channel's largest weights on either side. `peaks` holds each tensor's largest value per channel
    before its clip, `clipped` marks channels whose clip is active: those stay, and no other channel is raised past the clip or,
    without one, past the tensor's own peak. Exact in float but for the rounding of scaled weights.
    """
    pairs = [(step, after[0]) for step in plan.steps if isinstance(step, ConvStep) and not step.fixed
             and len(after := plan.consumers(step.name)) == 1 and isinstance(after[0], ConvStep) and not after[0].fixed
             and (depthwise(step) or depthwise(after[0])) and (after[0].groups == 1 or depthwise(after[0]))]  # fmt: skip
    peaks = {name: peak.clone() for name, peak in peaks.items()}
    changed: set[str] = set()
    for _ in range(rounds):
        moved = False
        for first, second in pairs:
            assert isinstance(second, ConvStep)
            factor = _equalizing_factor(first, second, peaks[first.name], clipped[first.name])
            if bool((factor != 1.0).any()):
                scale_output(first, factor)
                second.weight = second.weight / per_input(second, factor)
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
    ceiling = first.clip if first.clip is not None else float(peak.max())
    headroom = torch.log2(torch.full_like(peak, max(ceiling, floor)) / peak.clamp(min=floor)).clamp(min=0.0)
    exponent = torch.minimum(0.5 * torch.log2(by_input / r1), headroom)
    stays = (r1 <= floor) | (by_input <= floor) | (peak <= floor) | clipped | (exponent.abs() < SETTLED)
    return torch.exp2(torch.where(stays, torch.zeros_like(exponent), exponent))


def image_format(plan: Plan) -> FixedPointFormat:
    """Format of the input tensor: bytes minus 128, or raw bytes."""
    return FixedPointFormat(8, 7, signed=True) if plan.signed_image else FixedPointFormat(8, 8, signed=False)
