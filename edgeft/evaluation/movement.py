"""How far fine-tuning moved a classifier: its features on given images, and its head (the distortion measure of the LP-FT paper)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgeft.errors import UnsupportedError
from edgeft.models import Classifier
from edgeft.runner import Images

_BATCH = 64


@dataclass(frozen=True)
class Movement:
    """On `n` images: the mean Euclidean distance of an image's features before and after, absolute and relative to the features before.

    `head` is the Frobenius distance of the head's weight and bias, taken together, and `head_relative` the same over their norm before.
    """

    n: int
    features: float
    features_relative: float
    head: float
    head_relative: float


@torch.inference_mode()
def movement(before: Classifier, after: Classifier, images: Images) -> Movement:
    """Compare two classifiers of the same architecture on image bytes [n, 3, size, size] (Kumar et al. 2022).

    Both are put in eval mode. Raises UnsupportedError when the features or the heads have different shapes.
    """
    if before.head.weight.shape != after.head.weight.shape:
        shapes = [list(net.head.weight.shape) for net in (before, after)]
        raise UnsupportedError(f"the movement of heads of different shapes is not defined: {shapes[0]} and {shapes[1]}")
    distances, relative = [], []
    for start in range(0, len(images), _BATCH):
        batch = torch.from_numpy(images[start : start + _BATCH])
        old, new = _features(before, batch), _features(after, batch)
        moved = (new - old).norm(dim=1)
        distances.append(moved)
        relative.append(moved / old.norm(dim=1).clamp(min=1e-12))
    start_head, end_head = _head(before), _head(after)
    head = float((end_head - start_head).norm())
    return Movement(
        len(images), _mean(distances), _mean(relative), head, head / max(float(start_head.norm()), 1e-12)
    )  # fmt: skip


def _features(net: Classifier, images: Tensor) -> Tensor:
    return net.eval().features(images.to(net.mean.device)).double().cpu()


def _head(net: Classifier) -> Tensor:
    """Weight and bias as one vector."""
    bias = net.head.bias
    parts = [net.head.weight.flatten()] + ([bias] if bias is not None else [])
    return torch.cat(parts).double().cpu()


def _mean(parts: list[Tensor]) -> float:
    return float(np.concatenate([part.numpy() for part in parts]).mean()) if parts else 0.0
