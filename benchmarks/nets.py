"""Nets to time: what to build, random weights that behave like trained ones, and the fixed-point form without training."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgeft.config import DataConfig, ModelConfig, QuantConfig
from edgeft.errors import ConfigError
from edgeft.models import Classifier, build_classifier
from edgeft.progress import Progress
from edgeft.quant.calibration.calibrate import calibrate
from edgeft.quant.lower import enforce_bounds
from edgeft.quant.net import FixedPointNet
from edgeft.quant.stage import plan_of

N_CLASSES = 20
N_CALIBRATION = 8
N_SETTLING = 16


@dataclass(frozen=True)
class Case:
    """A backbone (timm name) at an input size in pixels and a training batch size."""

    backbone: str
    size: int
    batch: int

    @property
    def label(self) -> str:
        """As tables show it, without the batch."""
        return f"{self.backbone} {self.size} px"


CASES = (Case("edgeft_micro", 48, 32), Case("mobilenetv2_100", 128, 32), Case("resnet18", 128, 32))


def chosen(backbone: str | None, size: int | None, batch: int | None = None) -> tuple[Case, ...]:
    """All cases, or the one that the options describe. Raises ConfigError when a size or batch is given without a backbone."""
    if backbone is None:
        if size is not None or batch is not None:
            raise ConfigError("--size and --batch need --backbone", "without the three, the suite's own cases are measured")
        return CASES
    return (Case(backbone, size or 128, batch or 32),)


def random_images(n: int, size: int, seed: int = 0) -> NDArray[np.uint8]:
    """Random image bytes [n, size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def random_classifier(case: Case) -> Classifier:
    """A classifier whose weights mean nothing, in eval mode, with activations of ordinary size in every layer.

    Batch-norm statistics are those of random images and its scales are 1: as timm initialises them, signals would fade from
    layer to layer into numbers so small that processors compute more slowly with them, or vanish in a residual branch.
    """
    model = ModelConfig(backbone=case.backbone)
    classifier = build_classifier(model, DataConfig(size=case.size), N_CLASSES, None, seed=0)
    norms = [module for module in classifier.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.weight.data.fill_(1.0)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # a plain average of what follows
    with torch.no_grad():
        classifier.train()(torch.from_numpy(random_images(N_SETTLING, case.size).transpose(0, 3, 1, 2).copy()))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return classifier.eval()


def fixed_point(classifier: Classifier, **quant: Any) -> tuple[FixedPointNet, dict[str, float]]:
    """The fixed-point form on random images, weights rounded to nearest; and each tensor's sigma. `quant`: keys of QuantConfig."""
    config = QuantConfig(rounding="nearest", **quant)
    images = random_images(N_CALIBRATION, classifier.preprocessing.size, seed=1).transpose(0, 3, 1, 2).copy()
    plan = plan_of(classifier, config.profile, config.residual)
    with Progress(False).task("calibrate", len(plan.steps)) as advance:
        net, sigmas = calibrate(plan, torch.from_numpy(images), config, advance)
    enforce_bounds(net)
    return net, sigmas
