"""Accuracy of exactly the artifact that is timed: from its own report, or measured now where that does not say it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeft.artifact import Artifact
from edgeft.bench.numbers import Cost, Reliability
from edgeft.bench.results import Scored
from edgeft.bench.store import Store
from edgeft.data import Dataset
from edgeft.data.loading import ImageCache
from edgeft.data.preprocess import Preprocessing
from edgeft.evaluate import Predictions
from edgeft.evaluate import evaluate as evaluate_runner
from edgeft.evaluation.calibration import log_softmax
from edgeft.evaluation.paired import Pair, difference
from edgeft.exporting import FLOAT, stored
from edgeft.progress import Progress
from edgeft.report import EvalReport, ModelResult
from edgeft.runner import Images, Logits, Runner

BATCH = 64


def cost(base: ModelResult, other: ModelResult, kind: str) -> Cost | None:
    """The difference in ID accuracy or in mean OOD accuracy ("id", "ood"); None where a split of the two does not match.

    Reports hold how many answers changed but not how many of these from right to wrong or back: all that the difference does not
    explain count as half each, which makes the interval, if anything, too wide.
    """
    pairs = []
    for split in (split for split in other.splits if split.kind == kind):
        before = base.split(split.label)
        if before is None or before.n != split.n or split.flips is None:
            return None
        change = split.correct - before.correct
        if abs(change) > split.flips:  # these are not answers of models that were compared with each other
            return None
        spare = (split.flips - abs(change)) // 2
        pairs.append(Pair(split.n, spare + max(change, 0), spare + max(-change, 0)))
    return Cost(*difference(pairs)) if pairs else None


def score(runner: Runner, artifact: Artifact, dataset: Dataset, cache: ImageCache, progress: Progress) -> dict[str, Any]:
    """Measure a model on the run's test splits; the record of it, as JSON values."""
    watched = _Watched(runner)
    p = Preprocessing.from_json(artifact.manifest.preprocessing)
    before: dict[str, Predictions] | None = stored(artifact, FLOAT) if "predictions.safetensors" in artifact.manifest.files else None
    result, _ = evaluate_runner(watched, dataset, p, batch=BATCH, float_predictions=before, progress=progress, cache=cache)
    confidence, top = np.concatenate(watched.confidence), np.concatenate(watched.top)
    labels = np.concatenate([split.labels for split in dataset.tests])
    kinds = np.repeat([split.kind for split in dataset.tests], [len(split) for split in dataset.tests])
    bins = {kind: Reliability.of(confidence[kinds == kind], (top == labels)[kinds == kind]).bins for kind in sorted(set(kinds.tolist()))}
    return {"report": EvalReport((result,)).to_json(), "reliability": bins}


def read_score(record: dict[str, Any], source: str) -> Scored:
    """A record that `score` made."""
    bins = {kind: Reliability(tuple((n, c, r) for n, c, r in found)) for kind, found in record["reliability"].items()}
    return Scored(EvalReport.from_json(record["report"]).models[0], source, bins)


class _Watched:
    """A Runner that keeps the answered class of every image and its probability."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.name = runner.name
        self.confidence: list[NDArray[np.float64]] = []
        self.top: list[NDArray[np.int64]] = []

    def logits(self, images: Images) -> Logits:
        """Those of the runner."""
        found = self._runner.logits(images)
        self.confidence.append(np.exp(log_softmax(found).max(axis=1)))
        self.top.append(found.argmax(axis=1))
        return found


def scored_by(
    runner: Runner, artifact: Artifact, dataset: Dataset, cache: ImageCache, store: Store, key: tuple[str, str], progress: Progress
) -> dict[str, Any]:
    """`score`, or what an earlier bench measured of the same artifact; `key` is its digest and its backend."""
    record = store.accuracy(*key)
    if not record:
        record = score(runner, artifact, dataset, cache, progress)
        store.keep_accuracy(*key, record)
    return record
