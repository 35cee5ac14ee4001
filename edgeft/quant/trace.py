"""Trace a timm network with torch.fx into a Plan: one rule for each operator, none for a model."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, DropPath, SelectAdaptivePool2d, get_same_padding
from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool
from timm.layers.pool2d_same import MaxPool2dSame
from torch import fx, nn
from torch.nn import functional as F

from edgeft.errors import UnsupportedError
from edgeft.quant.plan import IMAGE, AddStep, ConvStep, FlattenStep, GlobalPoolStep, LinearStep, MaxPoolStep, Padding, Pair, Plan, Step

PASS_THROUGH: tuple[type[nn.Module], ...] = (nn.Identity, nn.Dropout, nn.Dropout2d, DropPath)
LEAVES: tuple[type[nn.Module], ...] = (BatchNormAct2d, Conv2dSame, MaxPool2dSame, SelectAdaptivePool2d, *PASS_THROUGH)
_ADDS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_RELUS: tuple[Any, ...] = (F.relu, torch.relu, "relu", "relu_")
_FLATTENS: tuple[Any, ...] = (torch.flatten, "flatten")
_DROPOUTS: tuple[Any, ...] = (F.dropout,)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LEAVES) or super().is_leaf_module(m, module_qualified_name)


def trace(net: nn.Module, image_shape: tuple[int, int, int]) -> Plan:
    """Plan of `net` (eval mode, frozen batch norm folded) for normalised float images of `image_shape`.

    The returned plan still reads *normalised* images: `rescale.fold_image` turns it to bytes.
    Raises UnsupportedError that names the first layer with no fixed-point form, and its type.
    """
    try:
        graph = _Tracer().trace(net.eval())
    except Exception as error:  # tracing runs arbitrary model code, so any exception can come out of it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedError(f"the backbone '{type(net).__name__}' cannot be traced: {reason}", _HINT) from error
    return _Builder(net, graph, image_shape).build()


_HINT = "see 'edgeft list backbones' for networks that are known to lower"


class _Builder:
    """Walks the fx graph once; `env` maps an fx node to the name of the tensor that it stands for."""

    def __init__(self, net: nn.Module, graph: fx.Graph, image_shape: tuple[int, int, int]) -> None:
        self.modules = dict(net.named_modules())
        self.graph = graph
        self.image_shape = image_shape
        self.steps: dict[str, Step] = {}
        self.env: dict[fx.Node, str] = {}

    def build(self) -> Plan:
        output = ""
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = IMAGE
            elif node.op == "output":
                output = self._returned(node)
            elif node.users:
                self.env[node] = self._convert(node)
        steps = list(self.steps.values())
        if not steps or steps[-1].name != output or not isinstance(steps[-1], LinearStep) or steps[-1].relu:
            raise UnsupportedError("the network does not end in a linear classifier", _HINT)
        return Plan(steps, self.image_shape)

    def _returned(self, node: fx.Node) -> str:
        value = node.args[0]
        if not isinstance(value, fx.Node):
            raise UnsupportedError("the network returns more than one tensor of logits", _HINT)
        return self.env[value]

    def _convert(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return self._module(node, self.modules[str(node.target)])
        if node.op in ("call_function", "call_method"):
            target = node.target
            if target in _ADDS and all(isinstance(a, fx.Node) for a in node.args[:2]) and not node.kwargs:
                return self._add_step(AddStep(self._name(node), self._inputs(node)))
            if target in _RELUS:
                return self._rectify(node, None)
            if target in _FLATTENS and _arguments(node, "start_dim", "end_dim") in ({"start_dim": 1}, {"start_dim": 1, "end_dim": -1}):
                return self._flatten(node, self._inputs(node)[0])
            if target in _DROPOUTS:
                return self._inputs(node)[0]
        raise self._unsupported(node)

    def _module(self, node: fx.Node, module: nn.Module) -> str:
        rules: list[tuple[type[nn.Module], Callable[[fx.Node, Any], str]]] = [
            (nn.Conv2d, self._conv), (BatchNormAct2d, self._batch_norm_act), (nn.BatchNorm2d, self._batch_norm),
            (nn.ReLU6, lambda n, m: self._rectify(n, 6.0)), (nn.ReLU, lambda n, m: self._rectify(n, None)),
            (nn.MaxPool2d, self._max_pool), (nn.AdaptiveAvgPool2d, self._adaptive_pool), (SelectAdaptivePool2d, self._select_pool),
            (nn.Flatten, self._flatten_module), (nn.Linear, self._linear),
        ]  # fmt: skip
        if isinstance(module, PASS_THROUGH):
            return self._inputs(node)[0]
        for kind, rule in rules:
            if isinstance(module, kind):
                return rule(node, module)
        raise self._unsupported(node)

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return str(node.target)
        scope = list(node.meta.get("nn_module_stack", {"": None}))[-1]
        return f"{scope}.{node.name}" if scope else node.name

    def _inputs(self, node: fx.Node) -> tuple[str, ...]:
        return tuple(self.env[a] for a in node.args if isinstance(a, fx.Node))

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.image_shape if name == IMAGE else self.steps[name].shape

    def _unsupported(self, node: fx.Node, why: str = "has no fixed-point form") -> UnsupportedError:
        kind = (
            type(self.modules[str(node.target)]).__name__
            if node.op == "call_module"
            else f"operation {getattr(node.target, '__name__', node.target)}"
        )
        return UnsupportedError(f"layer '{self._name(node)}' ({kind}) {why}", _HINT)

    def _add_step(self, step: Step) -> str:
        if step.name in self.steps:
            raise UnsupportedError(f"layer '{step.name}' is used twice; shared layers have no fixed-point form", _HINT)
        step.shape = step.shape or self._shape(step.inputs[0])
        self.steps[step.name] = step
        return step.name

    def _conv(self, node: fx.Node, module: nn.Conv2d) -> str:
        (source,) = self._inputs(node)
        if module.padding_mode != "zeros":
            raise self._unsupported(node, f"pads with '{module.padding_mode}', only zeros are supported")
        kernel, stride, dilation = _pair(module.kernel_size), _pair(module.stride), _pair(module.dilation)
        same = isinstance(module, Conv2dSame) or module.padding == "same"
        padding = self._padding(module, source, kernel, stride, dilation, same)
        bias = module.bias.detach().double() if module.bias is not None else torch.zeros(module.out_channels, dtype=torch.float64)
        shape = (module.out_channels, *_window_shape(self._shape(source), kernel, stride, padding, dilation))
        return self._add_step(ConvStep(
            self._name(node), (source,), shape, weight=module.weight.detach().double(), bias=bias, stride=stride,
            padding=padding, dilation=dilation, groups=module.groups,
        ))  # fmt: skip

    def _padding(self, module: Any, source: str, kernel: Pair, stride: Pair, dilation: Pair, same: bool) -> Padding:
        if same:
            _, height, width = self._shape(source)
            total = [max(0, get_same_padding(n, k, s, d)) for n, k, s, d in zip((height, width), kernel, stride, dilation, strict=True)]
            return (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
        if module.padding == "valid":
            return (0, 0, 0, 0)
        vertical, horizontal = _pair(module.padding)
        return (vertical, horizontal, vertical, horizontal)

    def _only_use(self, node: fx.Node) -> Step | None:
        """The step that feeds `node`, if nothing else reads it and nothing follows it yet (so that `node` can join it)."""
        (name,) = self._inputs(node)
        # A tensor has several nodes: the convolution, its batch norm, and whatever passes it through.
        nodes = {other for other, tensor in self.env.items() if tensor == name}
        readers = {user for other in nodes for user in other.users} - nodes
        step = self.steps.get(name)
        return None if step is None or step.relu or readers != {node} else step

    def _batch_norm(self, node: fx.Node, module: nn.BatchNorm2d) -> str:
        if module.running_mean is None or module.running_var is None:
            raise self._unsupported(node, "keeps no running statistics, so it cannot be folded")
        factor = (module.running_var.double() + module.eps).rsqrt()
        if module.affine:
            factor = factor * module.weight.detach().double()
        offset = -module.running_mean.double() * factor
        if module.affine:
            offset = offset + module.bias.detach().double()
        step = self._only_use(node)
        if isinstance(step, ConvStep):
            step.weight = step.weight * factor.view(-1, 1, 1, 1)
            step.bias = step.bias * factor + offset
            return step.name
        # A batch norm with no convolution before it is a depthwise 1x1 convolution.
        channels = module.num_features
        return self._add_step(ConvStep(self._name(node), self._inputs(node), weight=factor.view(-1, 1, 1, 1), bias=offset, groups=channels))

    def _batch_norm_act(self, node: fx.Node, module: BatchNormAct2d) -> str:
        name = self._batch_norm(node, module)
        step = self.steps[name]
        for part in (module.drop, module.act):
            if isinstance(part, nn.ReLU6):
                step.relu, step.clip = True, 6.0
            elif isinstance(part, nn.ReLU):
                step.relu = True
            elif not isinstance(part, PASS_THROUGH):
                raise self._unsupported(node, f"has the activation {type(part).__name__}, which has no fixed-point form")
        return name

    def _rectify(self, node: fx.Node, clip: float | None) -> str:
        step = self._only_use(node)
        if not isinstance(step, ConvStep | AddStep | LinearStep):
            raise self._unsupported(node, "must directly follow a convolution, a linear layer or an addition that nothing else reads")
        step.relu, step.clip = True, clip
        return step.name

    def _max_pool(self, node: fx.Node, module: nn.MaxPool2d) -> str:
        (source,) = self._inputs(node)
        kernel, stride, dilation = _pair(module.kernel_size), _pair(module.stride), _pair(module.dilation)
        if dilation != (1, 1) or module.ceil_mode or module.return_indices:
            raise self._unsupported(node, "uses dilation, ceil_mode or indices, which have no fixed-point form")
        padding = self._padding(module, source, kernel, stride, dilation, isinstance(module, MaxPool2dSame))
        shape = (self._shape(source)[0], *_window_shape(self._shape(source), kernel, stride, padding, dilation))
        return self._add_step(MaxPoolStep(self._name(node), (source,), shape, kernel=kernel, stride=stride, padding=padding))

    def _adaptive_pool(self, node: fx.Node, module: nn.AdaptiveAvgPool2d) -> str:
        if module.output_size not in (1, (1, 1)):
            raise self._unsupported(node, f"has output size {module.output_size}, only global pooling is supported")
        return self._global_pool(node)

    def _global_pool(self, node: fx.Node) -> str:
        (source,) = self._inputs(node)
        return self._add_step(GlobalPoolStep(self._name(node), (source,), (self._shape(source)[0], 1, 1)))

    def _select_pool(self, node: fx.Node, module: SelectAdaptivePool2d) -> str:
        if module.pool_type and not isinstance(module.pool, nn.AdaptiveAvgPool2d | FastAdaptiveAvgPool):
            raise self._unsupported(node, f"pools by '{module.pool_type}', only 'avg' is supported")
        name = self._global_pool(node) if module.pool_type else self._inputs(node)[0]
        flattens = isinstance(module.flatten, nn.Flatten) or (isinstance(module.pool, FastAdaptiveAvgPool) and module.pool.flatten)
        return self._flatten(node, name) if flattens else name

    def _flatten_module(self, node: fx.Node, module: nn.Flatten) -> str:
        if module.start_dim != 1 or module.end_dim != -1:
            raise self._unsupported(node, "must flatten everything but the batch")
        return self._flatten(node, self._inputs(node)[0])

    def _flatten(self, node: fx.Node, source: str) -> str:
        shape = self._shape(source)
        if len(shape) == 1:
            return source
        return self._add_step(FlattenStep(f"{self._name(node)}.flatten", (source,), (int(torch.tensor(shape).prod()),)))

    def _linear(self, node: fx.Node, module: nn.Linear) -> str:
        (source,) = self._inputs(node)
        if len(self._shape(source)) != 1:
            raise self._unsupported(node, f"reads a tensor of shape {self._shape(source)}, only vectors are supported")
        weight = module.weight.detach().double()
        bias = module.bias.detach().double() if module.bias is not None else weight.new_zeros(module.out_features)
        return self._add_step(LinearStep(self._name(node), (source,), (module.out_features,), weight=weight, bias=bias))


def _arguments(node: fx.Node, *names: str) -> dict[str, Any]:
    """Arguments after the first one by name, however they were given."""
    return {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}


def _pair(value: Any) -> Pair:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _window_shape(shape: tuple[int, ...], kernel: Pair, stride: Pair, padding: Padding, dilation: Pair) -> Pair:
    padded = (shape[1] + padding[0] + padding[2], shape[2] + padding[1] + padding[3])
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(padded, kernel, stride, dilation, strict=True)]
    return sizes[0], sizes[1]
