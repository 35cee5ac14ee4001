"""FixedPointNet: the training graph, every layer hosted by Brevitas quantizers, the same integers as the interpreter."""

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from edgeft.fixedpoint import FixedPointFormat
from edgeft.quant.brevitas_bridge import ActivationQuant, FixedPointConv2d, FixedPointLinear
from edgeft.quant.formats import MAX_SHIFT, activation_format, resolve
from edgeft.quant.lookup import Table
from edgeft.quant.plan import IMAGE, ConvStep, LinearStep, Plan, Step, TableStep, run_step
from edgeft.quant.points import Storage, find_points, has_quantizer, is_wide
from edgeft.quant.rescale import image_format

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
        self.storage = Storage(plan, profile)
        self.layers = nn.ModuleDict()
        self.tables = nn.ModuleDict()
        self.quantizers = nn.ModuleDict()
        for step in plan.steps:
            if isinstance(step, ConvStep):
                layer = FixedPointConv2d(step.weight, step.bias, step.stride, step.padding, step.dilation, step.groups,
                                         per_channel=per_channel and not step.fixed)  # fmt: skip
                layer.requires_grad_(not step.fixed)
                layer.register_buffer("norm", step.norm)  # kept here so that a restored net has it in its own units
                self.layers[module_key(step.name)] = layer
            elif isinstance(step, LinearStep):
                self.layers[module_key(step.name)] = FixedPointLinear(step.weight, step.bias)
            elif isinstance(step, TableStep):
                self.tables[module_key(step.name)] = Table(step.function, step.input_gain, step.output_gain)
        self.points = tuple(find_points(self.storage))
        for point in self.points:
            self.quantizers[module_key(point.name)] = ActivationQuant(signed=point.format.signed, relu=point.relu)
        self._last_use = plan.last_use()

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

    def table(self, name: str) -> Table:
        """The look-up of a table step."""
        table = self.tables[module_key(name)]
        assert isinstance(table, Table)
        return table

    def frac(self, name: str) -> int:
        """Current fraction of an activation (any tensor but the logits)."""
        name = self.storage.sources(name)[0]
        step = self.plan.producer(name)
        if step is None:
            return image_format(self.plan).frac
        if is_wide(step):  # the finest of its accumulators' fractions, in which all of them are whole numbers
            return self.frac(step.inputs[0]) + max(self.weight_fracs(name))
        return int(self.quantizer(name).body.frac.item())

    def format(self, name: str) -> FixedPointFormat:
        """Current format of an activation (any tensor but the logits)."""
        name = self.storage.sources(name)[0]
        step = self.plan.producer(name)
        if step is None:
            return image_format(self.plan)
        if is_wide(step):
            return FixedPointFormat(32, self.frac(name), signed=True)
        return activation_format(self.profile, relu=self.storage.unsigned(name), frac=self.frac(name))

    def weight_fracs(self, name: str) -> tuple[int, ...]:
        """Current weight fractions of a layer: one, or one for each output channel."""
        return tuple(int(f) for f in self.layer(name).body.frac.flatten().tolist())

    def set_fracs(self, proposals: dict[str, int]) -> None:
        """Resolve what a rule proposes for each activation and put the fractions in force; weights keep to the limits that follow."""
        for name, frac in resolve(self.points, proposals).items():
            self.quantizer(name).body.frac.fill_(min(frac, MAX_ACTIVATION_FRAC))
        for step in self.plan.steps:
            if isinstance(step, TableStep):
                self.table(step.name).tabulate(self.format(step.inputs[0]))
        for step in self.plan.weighted():
            self.set_weight_fracs(step.name, self.weight_fracs(step.name))

    def set_weight_fracs(self, name: str, fracs: tuple[int, ...]) -> None:
        """Put weight fractions in force, lowered where the shift to the output would leave float32's exact range.

        Activation fractions must have been set before. Constant weights keep the fraction that they are made for: their sums are
        always within that range.
        """
        step = self.plan[name]
        if isinstance(step, ConvStep) and step.fixed_frac is not None:
            self.layer(name).body.frac.fill_(step.fixed_frac)
            self._place_bias(step)
            return
        rounded = self.plan.rounded_in(name)
        room = MAX_SHIFT[self.format(rounded).signed] - int(rounded != name) if name != self.plan.output else 0
        limit = 30 if name == self.plan.output else self.frac(rounded) + room
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
        if isinstance(step, TableStep):
            out = self.table(step.name)(inputs[0])
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
