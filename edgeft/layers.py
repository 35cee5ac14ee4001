"""Which parameters of a classifier a stage trains, and at which share of the learning rate."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgeft.errors import ConfigError, UnsupportedError
from edgeft.methods import Stage
from edgeft.models import Classifier

_LISTED = 30


def check_stages(classifier: Classifier, stages: Sequence[Stage]) -> None:
    """Refuse what the stages could not do with this backbone, before anything is trained.

    Raises ConfigError for layers that there are not, and for a head that nothing would train; UnsupportedError for a backbone without
    the layers that a setting is about.
    """
    probed = False
    for stage in stages:
        probed |= stage.solver == "lbfgs"
        if stage.solver != "sgd":
            continue
        names = trained_names(classifier, stage)
        rate_scales(classifier, stage)
        head = next(name for name, parameter in classifier.named_parameters() if parameter is classifier.head.weight)
        if not probed and head not in names:
            short = head.removeprefix("net.").removesuffix(".weight")
            raise ConfigError(
                f"stage '{stage.name}' starts from a fresh head, '{short}', and would leave it as it is",
                f"add '{short}' to train.layers, or use a method that fits the head first, such as lpft",
            )


@contextmanager
def trained_only(classifier: Classifier, stage: Stage) -> Iterator[None]:
    """Only the stage's parameters require a gradient; all do afterwards. Raises as `check_stages` does."""
    names = trained_names(classifier, stage)
    try:
        for name, parameter in classifier.named_parameters():
            parameter.requires_grad_(name in names)
        yield
    finally:
        classifier.requires_grad_(True)


def trained_names(classifier: Classifier, stage: Stage) -> set[str]:
    """Names, within the classifier, of the parameters that a stage trains.

    Raises ConfigError for a pattern that fits no layer and for more frozen layers than there are below the head; UnsupportedError for a
    backbone without batch norm, or without groups of layers in timm, where the stage is about these.
    """
    net = classifier.net
    if stage.norms_only:
        return _prefixed(_norms(net) | _names_of(net, classifier.head))
    if stage.layers:
        return _prefixed(set().union(*(_matching(net, pattern) for pattern in stage.layers)))
    frozen = _bottom(net, stage.freeze_k) if stage.freeze_k else set()
    return _prefixed({name for name, _ in net.named_parameters()} - frozen)


def rate_scales(classifier: Classifier, stage: Stage) -> dict[str, float]:
    """Share of the learning rate of each trained parameter, by its name within the classifier; empty where all have the whole rate.

    `layer_decay`^d for a layer d layers before the head's, layers as timm tells them apart. Raises UnsupportedError for a backbone that
    timm does not divide into layers.
    """
    if stage.layer_decay == 1.0:
        return {}
    _matcher(classifier.net, coarse=False)
    groups = param_groups_layer_decay(classifier.net, layer_decay=stage.layer_decay)
    scales = {id(parameter): float(group["lr_scale"]) for group in groups for parameter in group["params"]}
    return {name: scales[id(parameter)] for name, parameter in classifier.named_parameters() if id(parameter) in scales}


def _prefixed(names: set[str]) -> set[str]:
    return {f"net.{name}" for name in names}


def _names_of(net: nn.Module, module: nn.Module) -> set[str]:
    """Names of a module's parameters, found by identity."""
    own = {id(parameter) for parameter in module.parameters()}
    return {name for name, parameter in net.named_parameters() if id(parameter) in own}


def _norms(net: nn.Module) -> set[str]:
    names = set().union(*(_names_of(net, module) for module in net.modules() if isinstance(module, _BatchNorm)))
    if not names:
        raise UnsupportedError(f"backbone '{_name(net)}' has no batch norm to train", "--method lpft trains all layers")
    return names


def _matching(net: nn.Module, pattern: str) -> set[str]:
    """Parameters that a pattern fits, or that are in a module that it fits."""
    fitting = [module for name, module in net.named_modules() if name and fnmatchcase(name, pattern)]
    names = {name for name, _ in net.named_parameters() if fnmatchcase(name, pattern)}.union(*(_names_of(net, each) for each in fitting))
    if not names:
        layers = _outline(net)
        shown = ", ".join(layers[:_LISTED]) + (f" and {len(layers) - _LISTED} more" if len(layers) > _LISTED else "")
        raise ConfigError(f"train.layers: no layer of backbone '{_name(net)}' is called '{pattern}'", f"it has {shown}; or what they hold")
    return names


def _outline(net: nn.Module) -> list[str]:
    """Names of the layers at the top, and of what is in lists of layers."""
    found: list[str] = []
    for name, child in net.named_children():
        if _has_parameters(child):
            listed = isinstance(child, nn.Sequential | nn.ModuleList)
            found += [f"{name}.{inner}" for inner, module in child.named_children() if _has_parameters(module)] if listed else [name]
    return found


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _bottom(net: nn.Module, k: int) -> set[str]:
    """Parameters of the first k coarse layers."""
    groups = group_parameters(net, _matcher(net, coarse=True))
    layers = [groups[number] for number in sorted(groups)]
    if k >= len(layers):
        starts = ", ".join(f"{number}: {names[0]}" for number, names in enumerate(layers, 1))
        raise ConfigError(
            f"train.freeze_k {k}: backbone '{_name(net)}' has {len(layers)} coarse layers, and the last one, with the head, is trained",
            f"1 ... {len(layers) - 1}; the layers begin with {starts}",
        )
    return set().union(*layers[:k])


def _matcher(net: nn.Module, *, coarse: bool) -> Any:
    """How timm groups the parameters of a net."""
    matcher = getattr(net, "group_matcher", None)
    if matcher is None:
        raise UnsupportedError(
            f"timm does not divide backbone '{_name(net)}' into layers, which train.freeze_k and train.layer_decay are about",
            "train.layers chooses layers by name",
        )
    return matcher(coarse=coarse)


def _name(net: nn.Module) -> str:
    return type(net).__name__
