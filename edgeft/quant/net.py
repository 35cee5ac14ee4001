"""FixedPointNet: the training graph, every layer hosted by Brevitas quantizers, the same integers as the interpreter."""

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeft.errors import VerificationError
from edgeft.fixedpoint import FixedPointFormat
from edgeft.quant.brevitas_bridge import ActivationQuant, FixedPointConv2d, FixedPointLinear
from edgeft.quant.formats import MAX_SHIFT, Groups, Point, activation_format, resolve
from edgeft.quant.plan import IMAGE, AddStep, ConvStep, FlattenStep, GlobalPoolStep, LinearStep, MaxPoolStep, Plan, Step, run_step
from edgeft.quant.rescale import CLIP_FRAC, image_format
from edgeft.runner import Images, Logits

Layer = FixedPointConv2d | FixedPointLinear
MAX_ACTIVATION_FRAC = 24


def module_key(name: str) -> str:
    """Tensor name as a ModuleDict key, which may not contain dots."""
    return name.replace(".", "/")


class FixedPointNet(nn.Module):
    """A plan whose weights, biases and activations are rounded to fixed point in the forward pass.

    forward: image bytes [n, 3, h, w] to logits. Formats live in buffers of the quantizers and are set by `set_fracs` and
    `set_weight_fracs`; until then every fraction is 0. Gradients pass rounding unchanged and stop outside the code range.
    """

    def __init__(self, plan: Plan, *, profile: str, per_channel: bool) -> None:
        super().__init__()
        self.plan = plan
        self.profile = profile
        self.layers = nn.ModuleDict()
        self.quantizers = nn.ModuleDict()
        for step in plan.steps:
            if isinstance(step, ConvStep):
                layer = FixedPointConv2d(step.weight, step.bias, step.stride, step.padding, step.dilation, step.groups,
                                         per_channel=per_channel and not step.fixed)  # fmt: skip
                layer.requires_grad_(not step.fixed)
                self.layers[module_key(step.name)] = layer
            elif isinstance(step, LinearStep):
                self.layers[module_key(step.name)] = FixedPointLinear(step.weight, step.bias)
        self.points = tuple(self._points())
        for point in self.points:
            self.quantizers[module_key(point.name)] = ActivationQuant(signed=point.format.signed, relu=point.relu)
        self._last_use = plan.last_use()

    def _points(self) -> Iterator[Point]:
        groups = Groups.of(self.plan.steps, AddStep, MaxPoolStep, FlattenStep)
        in_additions = {groups.find(step.name) for step in self.plan.steps if isinstance(step, AddStep)}
        numbers = {root: i for i, root in enumerate(sorted(in_additions))}
        for step in self.plan.steps:
            if not has_quantizer(step) or step.name == self.plan.output:
                continue
            readers = [reader for name in self._aliases(step.name) for reader in self.plan.consumers(name) if is_real(reader)]
            carried = isinstance(step, AddStep) or len(readers) > 1
            fmt = activation_format(self.profile, relu=self._nonnegative(step.name), frac=0)
            yield Point(
                step.name, fmt, step.relu, CLIP_FRAC[self.profile] if step.clip is not None else None,
                numbers.get(groups.find(step.name)), carried,
            )  # fmt: skip

    def _aliases(self, name: str) -> list[str]:
        """The tensor and everything that only moves its codes around."""
        moved = [step.name for step in self.plan.consumers(name) if not has_quantizer(step)]
        return [name, *(alias for child in moved for alias in self._aliases(child))]

    def _nonnegative(self, name: str) -> bool:
        step = self.plan.producer(name)
        if step is None:
            return not self.plan.signed_image
        if isinstance(step, MaxPoolStep | FlattenStep | GlobalPoolStep):
            return self._nonnegative(step.inputs[0])
        return step.relu

    def layer(self, name: str) -> Layer:
        """The Brevitas layer of a step."""
        layer = self.layers[module_key(name)]
        assert isinstance(layer, FixedPointConv2d | FixedPointLinear)
        return layer

    def quantizer(self, name: str) -> ActivationQuant:
        """The Brevitas quantizer of an activation."""
        quantizer = self.quantizers[module_key(name)]
        assert isinstance(quantizer, ActivationQuant)
        return quantizer

    def source(self, name: str) -> str:
        """The tensor whose codes `name` holds: itself, or the input of the pool or flattening that only moves them."""
        step = self.plan.producer(name)
        return name if step is None or has_quantizer(step) else self.source(step.inputs[0])

    def frac(self, name: str) -> int:
        """Current fraction of an activation (any tensor but the logits)."""
        name = self.source(name)
        return image_format(self.plan).frac if name == IMAGE else int(self.quantizer(name).body.frac.item())

    def format(self, name: str) -> FixedPointFormat:
        """Current format of an activation (any tensor but the logits)."""
        name = self.source(name)
        if name == IMAGE:
            return image_format(self.plan)
        return activation_format(self.profile, relu=self._nonnegative(name), frac=self.frac(name))

    def weight_fracs(self, name: str) -> tuple[int, ...]:
        """Current weight fractions of a layer: one, or one for each output channel."""
        return tuple(int(f) for f in self.layer(name).body.frac.flatten().tolist())

    def set_fracs(self, proposals: dict[str, int]) -> None:
        """Resolve what a rule proposes for each activation and put the fractions in force; weights keep to the limits that follow."""
        for name, frac in resolve(self.points, proposals).items():
            self.quantizer(name).body.frac.fill_(min(frac, MAX_ACTIVATION_FRAC))
        for step in self.plan.weighted():
            self.set_weight_fracs(step.name, self.weight_fracs(step.name))

    def set_weight_fracs(self, name: str, fracs: tuple[int, ...]) -> None:
        """Put weight fractions in force, lowered where the shift to the output would leave float32's exact range.

        Activation fractions must have been set before.
        """
        step = self.plan[name]
        limit = 30 if name == self.plan.output else self.frac(name) + MAX_SHIFT[self.format(name).signed]
        body = self.layer(name).body
        values = torch.tensor([min(f, limit - self.frac(step.inputs[0])) for f in fracs], dtype=body.frac.dtype, device=body.frac.device)
        body.frac.copy_(values.view(body.frac.shape) if body.frac.ndim else values[0])
        self._place_bias(step)

    def _place_bias(self, step: Step) -> None:
        layer = self.layer(step.name)
        layer.bias_frac.copy_(layer.body.frac.flatten().expand(layer.bias_frac.shape) + self.frac(step.inputs[0]))

    def run_step(self, step: Step, inputs: list[Tensor]) -> Tensor:
        """Output of a step from quantized inputs, before its activation quantizer."""
        if isinstance(step, ConvStep | LinearStep):
            out: Tensor = self.layer(step.name)(inputs[0])
            return out
        return run_step(step, inputs)

    def activate(self, step: Step, x: Tensor) -> Tensor:
        """Apply a step's activation quantizer, where it has one."""
        if step.name == self.plan.output or not has_quantizer(step):
            return x
        out: Tensor = self.quantizer(step.name)(x)
        return out

    def tensors(self, images: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by name in execution order, as real values; each is dropped after its last use."""
        env = {IMAGE: self.plan.encode(images).contiguous(memory_format=torch.channels_last)}
        yield IMAGE, env[IMAGE]
        for index, step in enumerate(self.plan.steps):
            env[step.name] = self.activate(step, self.run_step(step, [env[name] for name in step.inputs]))
            for name in set(step.inputs):
                if self._last_use[name] == index:
                    del env[name]
            yield step.name, env[step.name]

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        ((_, logits),) = deque(self.tensors(images), maxlen=1)
        return logits


def has_quantizer(step: Step) -> bool:
    """Whether a step computes new codes (max-pooling and flattening only move them)."""
    return not isinstance(step, MaxPoolStep | FlattenStep)


def is_real(step: Step) -> bool:
    """Whether a reader of a tensor computes with it, rather than being an alias."""
    return has_quantizer(step)


def _exact_sums() -> AbstractContextManager[None]:
    """On GPUs, convolutions by matrix products: cuDNN may pick a Winograd algorithm, whose transformed sums are not exact in float32."""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=False)
    return flags


class TrainingGraph:
    """LayerRunner over a FixedPointNet: what the QAT model computes in eval mode, as integers."""

    name = "fixed point"

    def __init__(self, net: FixedPointNet) -> None:
        self.net = net.eval()
        self.device = next(net.buffers()).device

    def logits(self, images: Images) -> Logits:
        """Scores of a batch."""
        with torch.inference_mode(), _exact_sums():
            out: Logits = self.net(torch.from_numpy(images).to(self.device)).float().cpu().numpy()
        return out

    def layers(self, images: Images) -> dict[str, NDArray[np.int64]]:
        """Codes of every tensor. Raises VerificationError when a value is not on the grid of its format."""
        net, codes = self.net, {}
        with torch.inference_mode(), _exact_sums():
            for name, value in net.tensors(torch.from_numpy(images).to(self.device)):
                last = net.plan[name] if name == net.plan.output else None
                frac = net.frac(last.inputs[0]) + net.weight_fracs(name)[0] if last is not None else net.frac(name)
                scaled = value.double() * 2.0**frac
                if not torch.equal(scaled, scaled.round()):
                    raise VerificationError(f"layer '{name}': {self.name} gives values that are no multiples of 2^-{frac}")
                codes[name] = scaled.to(torch.int64).cpu().numpy()
        return codes
