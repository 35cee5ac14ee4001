"""A family of baselines from one run: its float net after some epochs of one training, as far as the run has kept them."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from edgeft.artifact import Artifact
from edgeft.bench.peers import float_classifier
from edgeft.data import Split
from edgeft.diagnosis.effective import MIN_MODELS, Point
from edgeft.errors import DataError
from edgeft.evaluate import Predictions, predictions
from edgeft.pipeline import CHECKPOINTS, FloatModel
from edgeft.progress import Progress

BATCH = 64


def answers(run: Artifact, splits: Sequence[Split], progress: Progress) -> dict[str, list[Predictions]]:
    """Top classes of the images of each split, by kept epoch ("RUN: epoch 3") of the run.

    Raises DataError for a run that has kept fewer epochs than a line needs.
    """
    states = _states(run)
    found: dict[str, list[Predictions]] = {}
    with progress.task(f"baselines of '{run.path}'", len(states) * sum(map(len, splits))) as advance:
        for epoch, state in sorted(states.items()):
            classifier = float_classifier(run, state)
            model, p = FloatModel(classifier), classifier.preprocessing
            found[f"{run.path}: epoch {epoch}"] = [predictions(model, split, p, BATCH, advance) for split in splits]
    return found


def points(run: Artifact, id_test: Split, ood: Split, progress: Progress) -> list[Point]:
    """The kept epochs of a run as points, on all images of two labelled splits. Raises DataError as `answers`."""
    found = []
    for name, (of_id, of_ood) in answers(run, (id_test, ood), progress).items():
        shares = float((of_id == id_test.labels).mean()), float((of_ood == ood.labels).mean())
        found.append(Point(name, *shares, len(id_test), len(ood)))
    return found


def _states(run: Artifact) -> dict[int, dict[str, NDArray[Any]]]:
    """Weights by epoch."""
    states: dict[int, dict[str, NDArray[Any]]] = {}
    for key, value in (run.arrays(CHECKPOINTS) if CHECKPOINTS in run.manifest.files else {}).items():
        epoch, _, name = key.partition(".")
        states.setdefault(int(epoch), {})[name] = value
    if len(states) < MIN_MODELS:
        raise DataError(
            f"the run '{run.path}' has kept {len(states)} epochs of its training, and a line of baselines needs {MIN_MODELS}",
            f"train it with --set train.keep_checkpoints={2 * MIN_MODELS} and at least as many epochs",
        )
    return states
