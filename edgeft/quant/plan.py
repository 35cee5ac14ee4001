"""Plan: a traced network as a list of steps with folded float weights; the common ground of calibration, QAT and lowering."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[int, int]
Padding = tuple[int, int, int, int]
"""(top, left, bottom, right)."""

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
    """Convolution with its batch norm folded; weight [out, in/groups, kh, kw], bias [out]. `fixed` ones are not trained."""

    weight: Tensor = field(default_factory=lambda: torch.empty(0))
    bias: Tensor = field(default_factory=lambda: torch.empty(0))
    stride: Pair = (1, 1)
    padding: Padding = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    fixed: bool = False


@dataclass
class LinearStep(Step):
    """Linear layer; weight [out, in], bias [out]."""

    weight: Tensor = field(default_factory=lambda: torch.empty(0))
    bias: Tensor = field(default_factory=lambda: torch.empty(0))


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
