"""One pass over images with a frozen net: what tells them apart, what models answer, and which images are the same.

The features are the head's input, which shows contents, and the mean and deviation of every channel of the first convolutions, which
show colour, contrast, noise and strokes. A net that was trained well ignores those in the end, and the head's input alone does not
show a shift of them: on the embedded data set it finds a fifth, or nothing, of five shifts that are out of support by construction.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeft.data import Split
from edgeft.data.loading import batches
from edgeft.evaluate import Predictions
from edgeft.models import Classifier
from edgeft.progress import Advance
from edgeft.runner import Runner

N_FIRST = 3
"""Convolutions from the input whose channels are looked at."""
BATCH = 64


@dataclass(frozen=True, eq=False)
class Seen:
    """Of the images of a split: features [n, d], top classes by model, and a digest of each as the net sees it."""

    features: NDArray[np.float32]
    tops: dict[str, Predictions]
    digests: list[bytes]


def look(split: Split, classifier: Classifier, own_name: str | None, runner: Runner | None, advance: Advance) -> Seen:
    """See all images of a split. With `own_name` the classifier's own answers are kept under it, with a `runner` also that one's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier = classifier.to(device).eval()
    features: list[NDArray[np.float32]] = []
    tops: dict[str, list[Predictions]] = {}
    digests: list[bytes] = []
    for images, _ in batches(split, classifier.preprocessing, BATCH):
        with torch.inference_mode(), _first_convolutions(classifier) as moments:
            pooled = classifier.features(torch.from_numpy(images).to(device))
            features.append(torch.cat([pooled, *moments], dim=1).float().cpu().numpy())
            if own_name is not None:
                tops.setdefault(own_name, []).append(classifier.head(pooled).argmax(dim=1).cpu().numpy())
        if runner is not None:
            tops.setdefault(runner.name, []).append(runner.logits(images).argmax(axis=1).astype(np.int64))
        digests += [hashlib.sha256(image.tobytes()).digest() for image in images]
        advance(len(images))
    return Seen(np.concatenate(features), {model: np.concatenate(found) for model, found in tops.items()}, digests)


@contextmanager
def _first_convolutions(classifier: Classifier) -> Iterator[list[Tensor]]:
    """A list that the next forward pass fills with the moments [n, 2 * channels] of the first convolutions' outputs."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, maps: Tensor) -> None:
        found.append(torch.cat([maps.mean((2, 3)), maps.std((2, 3), correction=0)], dim=1))

    first = [module for module in classifier.net.modules() if isinstance(module, nn.Conv2d)][:N_FIRST]
    hooks = [module.register_forward_hook(keep) for module in first]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
