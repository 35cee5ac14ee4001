"""Builder: the plan in the making. Names, readers of a tensor, and maps put together from moved elements."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgeft.errors import UnsupportedError
from edgeft.quant.plan import IDENTITY_FRAC, IMAGE, ConvStep, Padding, Pair, ResizeStep, SelectStep, Step, TableStep
from edgeft.quant.tables import FUNCTIONS
from edgeft.quant.tracing.values import ZERO, Placement, Value, place

HINT = "see 'edgeft list backbones' for networks that are known to lower"


class Builder:
    """The steps so far, and what each node of the traced graph stands for: a Value, a tuple of them, or a plain Python object."""

    def __init__(self, net: nn.Module, image_shape: tuple[int, int, int]) -> None:
        self.net = net
        self.modules = dict(net.named_modules())
        self.steps: dict[str, Step] = {}
        self.env: dict[fx.Node, Any] = {}
        self.image = Value(IMAGE, image_shape, (1, *image_shape))
        self.linear: set[str] = set()
        """Convolutions that were linear layers."""
        self._nodes: dict[str, set[fx.Node]] = {}
        self._origin: dict[str, fx.Node] = {}
        self._current: fx.Node | None = None

    @property
    def node(self) -> fx.Node:
        """The node that is being converted."""
        assert self._current is not None
        return self._current

    def enter(self, node: fx.Node) -> None:
        """Make `node` the one that is being converted."""
        self._current = node

    def bind(self, node: fx.Node, result: Any) -> None:
        """Say what a node stands for."""
        self.env[node] = result
        for value in values_in(result):
            self._nodes.setdefault(value.name, set()).add(node)

    def read_again(self, value: Value) -> bool:
        """Whether a node after the one at hand reads a value's tensor."""
        nodes = self._nodes.get(value.name, set())
        return any(user not in self.env and user is not self.node and not queries(user) for node in nodes for user in node.users)

    def rebind(self, changed: Value, result: Value) -> None:
        """Let every node that shares memory with `changed` see what an operation in place made of it."""
        if result.name == changed.name or not self.read_again(changed):
            return
        if result.index is not changed.index or result.source != changed.source:
            raise self.unsupported("changes the shape of a tensor in place")
        for node in self._nodes[changed.name].copy():
            self.bind(node, _renamed(self.env[node], changed.name, result.name))

    def unsupported(self, why: str = "has no fixed-point form") -> UnsupportedError:
        """Error that names the layer at hand and its type."""
        node = self.node
        kind = (
            type(self.modules[str(node.target)]).__name__
            if node.op == "call_module"
            else f"operation {getattr(node.target, '__name__', node.target)}"
        )
        return UnsupportedError(f"layer '{self.layer_name()}' ({kind}) {why}", HINT)

    def layer_name(self) -> str:
        """Name of the layer at hand: the module's path, for other operations that of the module around it and the operation's."""
        node = self.node
        if node.op == "call_module":
            return str(node.target)
        scope = list(node.meta.get("nn_module_stack", {"": None}))[-1]
        return f"{scope}.{node.name}" if scope else node.name

    def unique(self, name: str) -> str:
        """`name`, numbered where a tensor has it already."""
        candidate, n = name, 1
        while candidate in self.steps or candidate == IMAGE:
            n += 1
            candidate = f"{name}_{n}"
        return candidate

    def add(self, step: Step) -> Value:
        """Append a step whose shape is set, and return its output."""
        if step.name in self.steps:
            raise UnsupportedError(f"layer '{step.name}' is used twice; shared layers have no fixed-point form", HINT)
        self.steps[step.name] = step
        self._origin[step.name] = self.node
        return Value(step.name, step.shape, (1, *step.shape))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor without the batch axis."""
        return self.image.source if name == IMAGE else self.steps[name].shape

    def only_reader(self, name: str, reader: fx.Node | None = None) -> bool:
        """Whether no node but `reader` (default: the one at hand) and what follows from it reads a tensor."""
        reader = reader or self.node
        nodes = self._nodes.get(name, set())
        readers = {user for node in nodes for user in node.users if not queries(user)} - nodes - {reader}
        if in_place(reader, self.modules):
            # What reads the tensor after a change in place, reads the changed one.
            readers = {user for user in readers if user in self.env}
        return not readers

    def sole_source(self, value: Value) -> Step | None:
        """The step that writes a value's tensor, if nothing but the node at hand reads it and it has no ReLU yet."""
        step = self.steps.get(value.name)
        return None if step is None or step.relu or not self.only_reader(value.name) else step

    def origin(self, name: str) -> fx.Node:
        """The node whose conversion made a tensor."""
        return self._origin[name]

    def nonnegative(self, name: str, known: dict[str, bool] | None = None) -> bool:
        """Whether a tensor can hold no value below 0."""
        known = {} if known is None else known
        if name not in known:
            step = self.steps.get(name)
            known[name] = step is not None and (step.relu or self._nonnegative(step, known))
        return known[name]

    def _nonnegative(self, step: Step, known: dict[str, bool]) -> bool:
        if isinstance(step, TableStep):
            return FUNCTIONS[step.function].nonnegative and step.output_gain >= 0
        if isinstance(step, ConvStep) and not (step.fixed and bool((step.weight >= 0).all() and (step.bias >= 0).all())):
            return False
        return all(self.nonnegative(source, known) for source in step.inputs)

    def fixed_conv(self, name: str, source: str, weight: Tensor, shape: tuple[int, ...], frac: int, **geometry: Any) -> Value:
        """A convolution with constant weights."""
        bias = weight.new_zeros(len(weight))
        return self.add(ConvStep(self.unique(name), (source,), shape, weight=weight, bias=bias, fixed_frac=frac, **geometry))

    def map(self, value: Value) -> str:
        """Name of a tensor [c, h, w] that is the value [1, c, h, w], or [c, 1, 1] for a vector [1, c]; made where there is none yet."""
        value = value.as_map()
        placed = place(value)
        if placed is None:
            raise self.unsupported(f"reads a tensor of shape {list(value.shape)} in an order that has no fixed-point form")
        if not (placed.keeps_pixels(value.source) or placed.repeat != (1, 1)) or ZERO in placed.channels:
            value, placed = self._picked(value, placed)
        name = value.name
        if not placed.picks_all(value.source):
            name = self._moved(SelectStep(f"{name}.select", (name,), (len(placed.channels), *value.source[1:]), index=placed.channels))
        if placed.repeat != (1, 1):
            name = self._enlarged(name, placed)
        if any(placed.padding):
            channels, height, width = self.shape(name)
            top, left, bottom, right = placed.padding
            shape = (channels, height + top + bottom, width + left + right)
            unit = torch.ones(channels, 1, 1, 1, dtype=torch.float64)
            name = self.fixed_conv(f"{name}.pad", name, unit, shape, IDENTITY_FRAC, padding=placed.padding, groups=channels).name
        return name

    def padded(self, value: Value) -> tuple[str, Padding]:
        """Like `map`, with zeros around the map left to the reader."""
        placed = place(value.as_map())
        if placed is None or not any(placed.padding):
            return self.map(value), (0, 0, 0, 0)
        top, left, bottom, right = placed.padding
        height, width = value.shape[2:]
        return self.map(value.moved(value.elements[:, :, top : height - bottom, left : width - right])), placed.padding

    def _moved(self, step: Step) -> str:
        """Add a step that only moves codes, or find the same one."""
        for other in self.steps.values():
            if (type(other), other.inputs, other.shape) == (type(step), step.inputs, step.shape) and _moves(other) == _moves(step):
                return other.name
        step.name = self.unique(step.name)
        return self.add(step).name

    def _enlarged(self, name: str, placed: Placement) -> str:
        """Every pixel repeated, and every few of those kept where the factor is a fraction."""
        channels, height, width = self.shape(name)
        if set(placed.offsets) != {(0, 0)}:
            raise self.unsupported("enlarges a part of a tensor, which has no fixed-point form")
        full = (channels, height * placed.repeat[0], width * placed.repeat[1])
        name = self._moved(ResizeStep(f"{name}.resize", (name,), full, factor=placed.repeat))
        if placed.size == full[1:]:
            return name
        whole = Value(name, full, (1, *full))
        same = Placement(tuple(range(channels)), ((0, 0),) * channels, placed.stride, (1, 1), (0, 0, 0, 0), placed.size)
        return self._picked(whole, same)[0].name

    def _picked(self, value: Value, placed: Placement) -> tuple[Value, Placement]:
        """Subsampling, cropping, pixels to channels, channels of zeros: a convolution whose weights are zeros and ones."""
        source_shape = value.source
        lasts = [max(axis) for axis in zip(*placed.offsets, strict=True)]
        kernel = [
            max(last + 1, n - count * stride + 1)
            for last, n, count, stride in zip(lasts, source_shape[1:], placed.size, placed.stride, strict=True)
        ]
        alone = placed.picks_all(source_shape)
        weight = torch.zeros(len(placed.channels), 1 if alone else source_shape[0], *kernel, dtype=torch.float64)
        offsets = iter(placed.offsets)
        for out, channel in enumerate(placed.channels):
            if channel != ZERO:
                row, column = next(offsets)
                weight[out, 0 if alone else channel, row, column] = 1.0
        shape = (len(placed.channels), *placed.size)
        groups = source_shape[0] if alone else 1
        picked = self.fixed_conv(f"{value.name}.pick", value.name, weight, shape, IDENTITY_FRAC, stride=placed.stride, groups=groups)
        rest = Placement(tuple(range(shape[0])), ((0, 0),) * shape[0], (1, 1), (1, 1), placed.padding, placed.size)
        return picked, rest


def values_in(result: Any) -> Iterator[Value]:
    """The values in what a node stands for."""
    if isinstance(result, Value):
        yield result
    elif isinstance(result, tuple | list):
        for part in result:
            yield from values_in(part)


def queries(node: fx.Node) -> bool:
    """Whether a node asks for a tensor's shape or type only."""
    if node.op == "call_function":
        return node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")
    return node.op == "call_method" and node.target in ("size", "dim")


def in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node changes its first argument."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_function":
        name = str(getattr(node.target, "__name__", ""))
        return node.kwargs.get("inplace") is True or name in ("iadd", "imul", "isub", "itruediv") or name.endswith("_")
    return node.op == "call_module" and getattr(modules[str(node.target)], "inplace", False) is True


def _renamed(result: Any, old: str, new: str) -> Any:
    if isinstance(result, Value):
        return result.of(new) if result.name == old else result
    return type(result)(_renamed(part, old, new) for part in result) if isinstance(result, tuple | list) else result


def _moves(step: Step) -> tuple[int, ...]:
    return step.index if isinstance(step, SelectStep) else step.factor if isinstance(step, ResizeStep) else ()


def window_shape(size: Pair, kernel: Pair, stride: Pair, padding: Padding, dilation: Pair = (1, 1)) -> Pair:
    """Height and width that windows over a map of `size` yield."""
    padded = (size[0] + padding[0] + padding[2], size[1] + padding[1] + padding[3])
    height, width = (math.floor((n - d * (k - 1) - 1) / s) + 1 for n, k, s, d in zip(padded, kernel, stride, dilation, strict=True))
    return height, width
