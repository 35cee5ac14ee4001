"""Plan: a traced network as a list of steps with folded float weights; the common ground of calibration, QAT and lowering."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeft.quant.tables import apply_function

Pair = tuple[int, int]
Padding = tuple[int, int, int, int]
"""(top, left, bottom, right)."""

IDENTITY_FRAC = 6
"""Fraction at which a constant weight of 1 has the code 64."""

IMAGE = "image"
"""Name of the input tensor of every plan."""


@dataclass
class Step:
    """One operation; `name` is also its output tensor, `shape` that tensor's shape without the batch axis.

    `relu` rectifies the output; `clip` additionally bounds it from above (ReLU6), in the units of the (possibly rescaled) tensor.
    """

    name: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...] = ()
    relu: bool = False
    clip: float | None = None


@dataclass
class ConvStep(Step):
    """Convolution with its batch norm folded; weight [out, in/groups, kh, kw], bias [out].

    With `fixed_frac` the weights are constants of the network's structure (an averaging window, a change of format): multiples of
    2^-fixed_frac that no rule chooses, no step trains and no compensation touches. `norm` [2, out] holds the mean and the deviation
    that the folded batch norm gave each output channel, in the units of the (possibly rescaled) output; None where there was none.
    A `wide` convolution hands its accumulators to the addition that alone reads it, which rounds the sum once (eq. 21).
    """

    weight: Tensor = field(default_factory=lambda: torch.empty(0))
    bias: Tensor = field(default_factory=lambda: torch.empty(0))
    stride: Pair = (1, 1)
    padding: Padding = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    fixed_frac: int | None = None
    norm: Tensor | None = None
    wide: bool = False

    @property
    def fixed(self) -> bool:
        """Whether the weights are constants."""
        return self.fixed_frac is not None


@dataclass
class LinearStep(Step):
    """Linear layer; weight [out, in], bias [out]."""

    weight: Tensor = field(default_factory=lambda: torch.empty(0))
    bias: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class MulStep(Step):
    """Product of two tensors of one shape, or of a tensor [c, h, w] and a gate [c, 1, 1]."""


@dataclass
class ConcatStep(Step):
    """Tensors one after the other along the channel axis; all share one format."""


@dataclass
class SelectStep(Step):
    """Channels by number: a slice, a chunk or a shuffle."""

    index: tuple[int, ...] = ()


@dataclass
class ResizeStep(Step):
    """Every pixel repeated `factor` times in each direction (nearest-neighbour enlargement)."""

    factor: Pair = (1, 1)


@dataclass
class TableStep(Step):
    """output_gain * function(input_gain * x), on the device a look-up of 256 entries; `function` names an entry of `tables.FUNCTIONS`.

    The gains are where rescaling of the tensors around it goes.
    """

    function: str = ""
    input_gain: float = 1.0
    output_gain: float = 1.0


@dataclass
class AddStep(Step):
    """Residual addition of two tensors of one shape."""


@dataclass
class MaxPoolStep(Step):
    """Maximum over windows."""

    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Padding = (0, 0, 0, 0)


@dataclass
class GlobalPoolStep(Step):
    """Sum over all pixels times 2^-divisor_log2; `rescale.fold_pooling` puts the ratio to the true mean into the consumer."""

    divisor_log2: int = 0


@dataclass
class FlattenStep(Step):
    """[c, h, w] to a vector."""


MOVES = (MaxPoolStep, FlattenStep, ConcatStep, SelectStep, ResizeStep)
"""Steps that compute no new codes: they only move those of their inputs around."""

Weighted = ConvStep | LinearStep


@dataclass
class Plan:
    """Steps in execution order. The last one is the linear layer that yields the logits.

    `signed_image`: the image enters as (byte - 128) / 128 (format s8.7), otherwise as byte / 256 (u8.8).
    """

    steps: list[Step]
    image_shape: tuple[int, int, int]
    signed_image: bool = True

    def __getitem__(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)

    @property
    def output(self) -> str:
        """Name of the logits."""
        return self.steps[-1].name

    def consumers(self, name: str) -> list[Step]:
        """Steps that read a tensor."""
        return [step for step in self.steps if name in step.inputs]

    def producer(self, name: str) -> Step | None:
        """The step that writes a tensor; None for the image."""
        return None if name == IMAGE else self[name]

    def weighted(self) -> list[Weighted]:
        """Convolutions and linear layers in execution order."""
        return [step for step in self.steps if isinstance(step, ConvStep | LinearStep)]

    def encode(self, images: Tensor) -> Tensor:
        """Image bytes [n, 3, h, w] as the real values of their codes, float32."""
        x = images.float()
        return (x - 128.0) / 128.0 if self.signed_image else x / 256.0

    def rounded_in(self, name: str) -> str:
        """The tensor whose format rounds what a step sums up: its own, or that of the addition behind a wide convolution."""
        step = self.producer(name)
        return self.consumers(name)[0].name if isinstance(step, ConvStep) and step.wide else name

    def insert_identity(self, reader: Step, position: int) -> None:
        """Put a change of format before one input of a step: a depthwise convolution with the constant weight 1."""
        read = reader.inputs[position]
        shape = self.image_shape if read == IMAGE else self[read].shape
        name = f"{reader.name}.input{position}"
        self.steps.insert(self.steps.index(reader), ConvStep(
            name, (read,), shape, weight=torch.ones(shape[0], 1, 1, 1), bias=torch.zeros(shape[0]), groups=shape[0],
            fixed_frac=IDENTITY_FRAC,
        ))  # fmt: skip
        reader.inputs = tuple(name if i == position else other for i, other in enumerate(reader.inputs))

    def last_use(self) -> dict[str, int]:
        """Index of the last step that reads each tensor, so that the others can be dropped."""
        return {name: index for index, step in enumerate(self.steps) for name in step.inputs}


def run_step(step: Step, inputs: list[Tensor]) -> Tensor:
    """Float output of a step *before* its rectification."""
    x = inputs[0]
    match step:
        case ConvStep():
            return F.conv2d(_pad(x, step.padding), step.weight, step.bias, step.stride, 0, step.dilation, step.groups)
        case LinearStep():
            return F.linear(x, step.weight, step.bias)
        case AddStep():
            return inputs[0] + inputs[1]
        case MulStep():
            return inputs[0] * inputs[1]
        case ConcatStep():
            return torch.cat(inputs, 1)
        case SelectStep():
            return x[:, list(step.index)]
        case ResizeStep():
            return x.repeat_interleave(step.factor[0], 2).repeat_interleave(step.factor[1], 3)
        case TableStep():
            return step.output_gain * apply_function(step.function, step.input_gain * x)
        case MaxPoolStep():
            top, left, bottom, right = step.padding
            if (top, left) == (bottom, right):
                return F.max_pool2d(x, step.kernel, step.stride, (top, left))
            return F.max_pool2d(_pad(x, step.padding, float("-inf")), step.kernel, step.stride)
        case GlobalPoolStep():
            return x.sum((2, 3), keepdim=True) * 2.0**-step.divisor_log2
        case FlattenStep():
            return x.flatten(1)
    raise TypeError(f"no float rule for {type(step).__name__}")


def rectify(step: Step, x: Tensor) -> Tensor:
    """Apply a step's ReLU or clip."""
    return x.clamp(0.0, step.clip) if step.relu else x


def run_float(plan: Plan, images: Tensor) -> Tensor:
    """Logits of the float plan for image bytes."""
    env = {IMAGE: plan.encode(images)}
    for step in plan.steps:
        env[step.name] = rectify(step, run_step(step, [env[name] for name in step.inputs]))
    return env[plan.output]


def _pad(x: Tensor, padding: Padding, value: float = 0.0) -> Tensor:
    top, left, bottom, right = padding
    return F.pad(x, (left, right, top, bottom), value=value) if any(padding) else x
