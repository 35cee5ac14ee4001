"""Proof that a timm backbone lowers: random weights, then the training graph and the interpreter compared code for code."""

import zlib

import numpy as np
import timm
import torch
from timm.models._registry import model_entrypoint
from torch import Tensor, nn

from edgeft.config import DataConfig, ModelConfig, QuantConfig
from edgeft.errors import EdgeftError, VerificationError
from edgeft.interpret import Interpreter
from edgeft.models import Classifier, build_classifier
from edgeft.quant.backbones import ProvenBackbone
from edgeft.quant.calibration.calibrate import calibrate
from edgeft.quant.lower import enforce_bounds, lower
from edgeft.quant.plan import Plan, run_float
from edgeft.quant.rescale import prepare_plan
from edgeft.quant.tracing.trace import trace
from edgeft.quant.training_graph import TrainingGraph
from tests.nets import bytes_of

CLASSES = 10
SIZES = (64, 96, 128, 192, 256)
"""Image sides that are tried; small ones first, because a proof needs no detail."""
SIZE_DEPENDENT = ("does not run on", "windows", "differs from the network", "all alike")
"""What the message of an error says that another size may avoid."""
TOLERANCE = 0.02
"""Largest difference between plan and network as a share of the largest logit, unless half a grey level all over makes more."""
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def family_of(name: str) -> str:
    """timm's module that defines a backbone."""
    return model_entrypoint(name).__module__.rpartition(".")[2]


def native_size(name: str) -> int:
    """Side of the images that a backbone was made for."""
    record = timm.get_pretrained_cfg(name)
    return record.input_size[1] if record is not None else SIZES[-1]


def images_for(size: int, n: int, seed: int) -> Tensor:
    """Smooth random images with noise, bytes [n, 3, size, size]."""
    return torch.from_numpy(bytes_of(n + 2, size, seed)[2:].copy())


@torch.no_grad()
def settle(classifier: Classifier, seed: int) -> None:
    """Random affine parameters, layer scales and biases; batch-norm statistics are those of random images."""
    generator = torch.Generator().manual_seed(seed)
    net = classifier.net
    for parameter in net.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            # Initialised to a constant, often 0: gains, layer scales, biases, the last batch norm of a block.
            centre = 0.0 if parameter.flatten()[0] == 0 and parameter.ndim == 1 else 0.8
            parameter.copy_(centre + 0.4 * (torch.rand(parameter.shape, generator=generator) - 0.5))
        elif parameter.numel() == 1:
            parameter.fill_(0.8)
    norms = [module for module in net.modules() if isinstance(module, NORMS)]
    for norm in norms:
        if norm.affine:
            norm.weight.copy_(0.5 + torch.rand(norm.weight.shape, generator=generator))
            norm.bias.copy_(torch.rand(norm.bias.shape, generator=generator) - 0.3)
        norm.momentum = None
        norm.reset_running_stats()
        norm.train()
    classifier(images_for(classifier.preprocessing.size, 8, seed))
    classifier.eval()


def prove(name: str, size: int) -> ProvenBackbone:
    """Build, trace, calibrate and lower a backbone, and compare the two integer runs on every tensor; trace it at its own size, too.

    Raises UnsupportedError when it has no fixed-point form, VerificationError when something differs.
    """
    seed = zlib.crc32(name.encode())
    torch.manual_seed(seed)
    classifier = build_classifier(ModelConfig(backbone=name, pretrained=False), DataConfig(size=size), CLASSES, None, seed=0)
    settle(classifier, seed)
    plan = _checked_plan(classifier, images_for(size, 2, seed + 1))
    net, _ = calibrate(plan, images_for(size, 8, seed), QuantConfig(rounding="nearest"), lambda *_: None)
    enforce_bounds(net)
    graph = lower(net)
    images = images_for(size, 2, seed + 1).numpy()
    trained, integers = TrainingGraph(net).layers(images), Interpreter(graph).layers(images)
    different = [tensor for tensor in integers if not np.array_equal(trained[tensor], integers[tensor])]
    if different or trained.keys() != integers.keys():
        raise VerificationError(f"backbone '{name}': {len(different)} of {len(integers)} tensors differ, the first is '{different[:1]}'")
    if len(np.unique(integers[graph.output])) < CLASSES:
        raise VerificationError(f"backbone '{name}': its logits are all alike, so the comparison shows nothing")
    trace(classifier.net, (3, native := native_size(name), native))
    millions = sum(parameter.numel() for parameter in classifier.net.parameters()) / 1e6
    layers = sum(not getattr(step, "fixed", False) for step in plan.weighted())
    return ProvenBackbone(name, family_of(name), size, round(millions, 2), layers, len(graph.ops))


@torch.no_grad()
def _checked_plan(classifier: Classifier, images: Tensor) -> Plan:
    p = classifier.preprocessing
    plan = prepare_plan(classifier.net, (3, p.size, p.size), p.mean, p.std, "u8")
    normalised = classifier.normalise(images)
    wanted = classifier.net(normalised)
    moved = classifier.net(normalised + 0.5 / (255.0 * classifier.std))
    peak = wanted.abs().max()
    difference, response = (float((other - wanted).abs().max() / peak) for other in (run_float(plan, images), moved))
    if not difference <= max(TOLERANCE, response):
        raise VerificationError(f"the plan differs from the network by {difference:.3g} of the largest logit")
    return plan


def prove_at_smallest(name: str) -> ProvenBackbone:
    """Prove a backbone at the first of SIZES that it takes; the error of the last one if it takes none."""
    record, native = timm.get_pretrained_cfg(name), native_size(name)
    sizes = (native,) if record is not None and record.fixed_input_size else tuple(n for n in SIZES if n <= max(native, SIZES[0]))
    for size in sizes:
        try:
            return prove(name, size)
        except EdgeftError as error:
            if size == sizes[-1] or not any(text in str(error) for text in SIZE_DEPENDENT):
                raise
    raise AssertionError("there is a last size")
