"""Accuracy of a Runner over the test splits of a Dataset."""

import numpy as np
from numpy.typing import NDArray

from edgeft.data import Dataset, Split
from edgeft.data.loading import ImageCache, batches
from edgeft.data.preprocess import Preprocessing
from edgeft.errors import TrainingError
from edgeft.progress import Advance, Progress
from edgeft.report import ModelResult, SplitResult
from edgeft.runner import Runner

Predictions = NDArray[np.int64]
"""Top class of every image of a split, in the split's order."""


def predictions(
    runner: Runner, split: Split, p: Preprocessing, batch: int, advance: Advance, cache: ImageCache | None = None
) -> Predictions:
    """Top class of every image of a split; `advance` is told of each batch.

    Raises TrainingError when a score is not finite: it would pass for a class.
    """
    found: list[Predictions] = []
    for images, _ in batches(split, p, batch, cache):
        logits = runner.logits(images)
        if not np.isfinite(logits).all():
            raise TrainingError(f"'{runner.name}' gives scores that are not finite on split '{split.name}'")
        found.append(logits.argmax(axis=1).astype(np.int64))
        advance(len(images), split.name)
    return np.concatenate(found)


def evaluate(
    runner: Runner,
    dataset: Dataset,
    p: Preprocessing,
    *,
    batch: int = 64,
    float_predictions: dict[str, Predictions] | None,
    progress: Progress,
    cache: ImageCache | None = None,
) -> tuple[ModelResult, dict[str, Predictions]]:
    """Measure a Runner on the ID test split and every OOD split.

    Flips are counted where `float_predictions` (by split name) are given. Returns the result and this runner's predictions.
    """
    with progress.task(f"evaluate {runner.name}", sum(map(len, dataset.tests))) as advance:
        found = {split.name: predictions(runner, split, p, batch, advance, cache) for split in dataset.tests}
    results = []
    for split in dataset.tests:
        top = found[split.name]
        flips = None if float_predictions is None else int((top != float_predictions[split.name]).sum())
        results.append(SplitResult(split.name, "ood" if split.kind == "ood" else "id", len(split), int((top == split.labels).sum()), flips))
    return ModelResult(runner.name, tuple(results)), found
