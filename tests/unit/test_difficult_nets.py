"""Weights and calibration sets at the edge of what can be quantized: exact all the same, or refused with the layer's name."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgeft.config import QuantConfig
from edgeft.errors import UnsupportedError
from edgeft.interpret import Interpreter
from edgeft.quant.calibration.calibrate import calibrate
from edgeft.quant.lower import enforce_bounds, lower
from edgeft.quant.net import FixedPointNet
from edgeft.quant.training_graph import TrainingGraph
from tests.nets import bytes_of, prepared, randomise, residual_net

Change = Callable[[nn.Module], object]


def conv(net: nn.Module, number: int) -> torch.Tensor:
    return [module for module in net.modules() if isinstance(module, nn.Conv2d)][number].weight


def last(net: nn.Module) -> nn.Linear:
    return next(module for module in net.modules() if isinstance(module, nn.Linear))


def quantized(change: Change, n_images: int = 8, **quant: Any) -> FixedPointNet:
    net = randomise(residual_net())
    with torch.no_grad():
        change(net)
    images = torch.from_numpy(bytes_of(n_images, seed=1))
    fixed, _ = calibrate(prepared(net), images, QuantConfig(**quant), lambda *_, **__: None)
    enforce_bounds(fixed)
    return fixed


def assert_exact(net: FixedPointNet) -> None:
    images = bytes_of(4, seed=3)
    wanted, found = TrainingGraph(net).layers(images), Interpreter(lower(net)).layers(images)
    assert [name for name in found if not np.array_equal(wanted[name], found[name])] == []


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(
    "change",
    [
        lambda net: conv(net, 1)[0].zero_(),
        lambda net: conv(net, 1).zero_(),
        lambda net: conv(net, 0)[0].zero_(),  # a channel that is constant behind its batch norm
        lambda net: conv(net, 1).mul_(1e-20),
        lambda net: conv(net, 1)[0].mul_(1e12),
    ],
    ids=["zero-row", "zero-layer", "constant-channel", "tiny-weights", "one-huge-row"],
)
def test_odd_weights_stay_exact(change: Change, granularity: str) -> None:
    assert_exact(quantized(change, granularity=granularity))


@pytest.mark.parametrize("settings", [{}, {"format": "std"}, {"format": "search"}, {"rounding": "flexround"}, {"granularity": "channel"}])
def test_one_calibration_image_is_enough(settings: dict[str, Any]) -> None:
    assert_exact(quantized(lambda net: None, n_images=1, **settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: conv(net, 1)[0].fill_(float("nan")), r"layer '2.right.0.0' has weights that are not finite numbers"),
        (lambda net: conv(net, 1)[0].fill_(float("inf")), r"layer '2.right.0.0' has weights that are not finite numbers"),
        (lambda net: conv(net, 1).mul_(1e20), r"layer '2.right.0.0' gives values that are not finite numbers on the calibration images"),
        (lambda net: last(net).bias.fill_(1e15), r"layer '7': no weight format keeps its accumulator exact"),
        (lambda net: last(net).weight.mul_(1e30), r"layer '7' gives values that are not finite numbers on the calibration images"),
    ],
    ids=["nan", "inf", "range-overflows", "bias-too-large", "logits-overflow"],
)
def test_what_no_format_holds_is_refused_by_name(change: Change, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        quantized(change)
