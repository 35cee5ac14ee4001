"""Trace a timm network with torch.fx into a Plan: one rule for each operator, none for a model."""

import copy
import inspect
import math
import operator
from typing import Any

import torch
from timm.utils import reparameterize_model
from torch import fx, nn

from edgeft.errors import UnsupportedError
from edgeft.quant.plan import ConvStep, FlattenStep, LinearStep, Plan, Step
from edgeft.quant.tracing.builder import HINT, Builder, in_place, values_in
from edgeft.quant.tracing.functions import rule_for
from edgeft.quant.tracing.layers import LEAVES, MODULES
from edgeft.quant.tracing.values import Value


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LEAVES) or super().is_leaf_module(m, module_qualified_name)


@torch.no_grad()
def trace(net: nn.Module, image_shape: tuple[int, int, int]) -> Plan:
    """Plan of `net` (eval mode, frozen batch norm folded) for normalised float images of `image_shape`; `net` stays as it is.

    Layers that timm can reparameterise (RepVGG, MobileOne) are first merged into one convolution each. The returned plan still reads
    *normalised* images: `rescale.fold_image` turns it to bytes. Raises UnsupportedError that names the first layer with no fixed-point
    form, and its type.
    """
    net = reparameterize_model(copy.deepcopy(net).cpu().double().eval(), inplace=True)
    try:
        graph = _Tracer().trace(net)
    except Exception as error:  # tracing runs arbitrary model code, so any exception can come out of it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedError(f"the backbone '{type(net).__name__}' cannot be traced: {reason}", HINT) from error
    builder = Builder(net, image_shape)
    output: Any = None
    for node in graph.nodes:
        builder.enter(node)
        if node.op == "placeholder":
            builder.bind(node, node.args[0] if node.args else builder.image)
        elif node.op == "output":
            output = fx.node.map_arg(node.args[0], builder.env.__getitem__)
        elif node.users or in_place(node, builder.modules):
            _convert(builder, node)
    return Plan(_finished(builder, output), image_shape)


def _convert(b: Builder, node: fx.Node) -> None:
    args: Any = fx.node.map_arg(node.args, b.env.__getitem__)
    kwargs: Any = fx.node.map_arg(node.kwargs, b.env.__getitem__)
    if node.op == "get_attr":
        b.bind(node, operator.attrgetter(str(node.target))(b.net))
    elif not any(values_in([*args, *kwargs.values()])):
        b.bind(node, _evaluate(b, node, args, kwargs))
    else:
        changed = args[0] if in_place(node, b.modules) and isinstance(args[0], Value) else None
        if changed is not None and not changed.whole and b.read_again(changed):
            raise b.unsupported("changes in place a part of a tensor that is read again")
        result = _apply(b, node, args, kwargs)
        if changed is not None:
            b.rebind(changed, result)
        b.bind(node, result)


def _apply(b: Builder, node: fx.Node, args: Any, kwargs: dict[str, Any]) -> Any:
    if node.op == "call_module":
        module = b.modules[str(node.target)]
        rule = next((rule for kind, rule in MODULES if isinstance(module, kind)), None)
        if rule is None or len(args) != 1 or kwargs or not isinstance(args[0], Value):
            raise b.unsupported()
        return rule(b, args[0], module)
    function = rule_for(node.target)
    if function is None:
        raise b.unsupported()
    try:
        inspect.signature(function).bind(b, *args, **kwargs)
    except TypeError as error:
        raise b.unsupported(f"is called with arguments that have no fixed-point form: {error}") from error
    return function(b, *args, **kwargs)


def _evaluate(b: Builder, node: fx.Node, args: Any, kwargs: dict[str, Any]) -> Any:
    """Arithmetic on shapes and parameters, which are known."""
    if node.op == "call_module":
        return b.modules[str(node.target)](*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _finished(b: Builder, output: Any) -> list[Step]:
    """The steps that the logits need; the classifier, and linear layers straight before it, become linear layers again."""
    if not isinstance(output, Value):
        raise UnsupportedError("the network returns more than one tensor of logits", HINT)
    head = b.steps.get(output.name)
    if head is None or not output.plain or not _covers(b, head) or head.relu or _readers(b, head):
        raise UnsupportedError("the network does not end in a linear classifier", HINT)
    vectors = [head]
    while (before := b.steps.get(vectors[0].inputs[0])) is not None and before.name in b.linear and len(_readers(b, before)) == 1:
        vectors.insert(0, before)
    source = vectors[0].inputs[0]
    flat = FlattenStep(b.unique(f"{source}.flatten"), (source,), (math.prod(b.shape(source)),))
    for step in vectors:
        del b.steps[step.name]
    b.steps[flat.name] = flat
    for step in vectors:
        b.steps[step.name] = _linear(step, flat.name if step is vectors[0] else step.inputs[0])
    needed = {head.name}
    for step in reversed(b.steps.values()):
        if step.name in needed:
            needed.update(step.inputs)
    return [step for step in b.steps.values() if step.name in needed]


def _covers(b: Builder, step: Step) -> bool:
    """Whether a step is a convolution whose one window is all of its input."""
    return (
        isinstance(step, ConvStep) and not step.fixed and step.groups == 1 and not any(step.padding)
        and tuple(step.weight.shape[2:]) == b.shape(step.inputs[0])[1:]
    )  # fmt: skip


def _readers(b: Builder, step: Step) -> list[Step]:
    return [other for other in b.steps.values() if step.name in other.inputs]


def _linear(step: Step, source: str) -> LinearStep:
    assert isinstance(step, ConvStep)
    weight = step.weight.flatten(1)
    return LinearStep(step.name, (source,), step.shape[:1], step.relu, step.clip, weight=weight, bias=step.bias)
