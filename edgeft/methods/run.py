"""Run the stages of a method one after the other on one model."""

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from edgeft.checkpoint import copy_of, state_of
from edgeft.context import TrainContext
from edgeft.data import Dataset
from edgeft.evaluation.movement import moved_head
from edgeft.layers import rate_scales, trained_only
from edgeft.merging import SoupResult, WiseResult, soup, wise
from edgeft.methods import METHODS, Stage
from edgeft.models import Classifier
from edgeft.objective import L2SP, Labels, Objective
from edgeft.probe import ProbeResult, fit_probe
from edgeft.train import FitResult, fit

Result = ProbeResult | FitResult | WiseResult | SoupResult


def run_stages(classifier: Classifier, stages: list[Stage], dataset: Dataset, context: TrainContext) -> list[dict[str, Any]]:
    """Train `classifier` by each stage in turn; it ends with the last stage's best weights, in eval mode.

    Returns a JSON-able record for each stage: its name and settings under "stage", its choice and history under "result" and, for what
    moves a head, under "head_moved" how far the head is from where fine-tuning found it. Finished stages are read back from
    `context.work`. Raises what `check_stages`, `fit_probe`, `fit`, `wise` and `soup` raise.
    """
    run = _Run(classifier, dataset, context)
    start = _head(classifier)
    records: list[dict[str, Any]] = []
    for stage in stages:
        result = run.stage(stage)
        context.say(f"{stage.name}: validation {result.val_accuracy:.1%}")
        if records and result.val_accuracy < records[-1]["result"]["val_accuracy"] and stage.solver == "sgd":
            context.say(f"{stage.name}: below its start on validation; lower learning rates (train.lr) may do better")
        record = {"stage": asdict(stage), "result": asdict(result)}
        if stage.solver == "lbfgs":
            start = _head(classifier)
        elif stage.solver != "flyp":  # which makes a new head
            record["head_moved"] = asdict(moved_head(start, _head(classifier)))
        records.append(record)
    return records


def _head(classifier: Classifier) -> NDArray[np.float32]:
    """Weight and bias of the head as one vector."""
    return np.concatenate([parameter.detach().float().cpu().numpy().ravel() for parameter in classifier.head.parameters()])


class _Run:
    """A classifier on its way through the stages, and the last SGD stage with the weights that it started from."""

    def __init__(self, classifier: Classifier, dataset: Dataset, context: TrainContext) -> None:
        self._classifier, self._dataset, self._context = classifier, dataset, context
        self._start: dict[str, Tensor] = {}
        self._tuned: Stage | None = None

    def stage(self, stage: Stage) -> Result:
        """One stage."""
        if stage.solver == "lbfgs":
            return fit_probe(self._classifier, stage, self._dataset.train, self._dataset.val, self._context)
        if stage.solver == "sgd":
            return self._tune(stage)
        if stage.solver == "flyp":
            found: FitResult = METHODS.get("flyp").tune(self._classifier, stage, self._dataset, self._context)
            return found
        assert self._tuned is not None, "averages come after an SGD stage"
        if stage.solver == "wise":
            return wise(self._classifier, stage, self._start, self._dataset, self._context)
        return soup(self._classifier, stage, self._tuned, self._dataset, self._context)

    def _tune(self, stage: Stage) -> FitResult:
        self._classifier.to(self._context.accelerator.device)
        self._start, self._tuned = copy_of(state_of(self._classifier)), stage
        with trained_only(self._classifier, stage):
            scales = rate_scales(self._classifier, stage)
            train, val = self._dataset.train, self._dataset.val
            return fit(self._classifier, stage, train, val, self._context, objective=self._objective(stage), rate_scales=scales)

    def _objective(self, stage: Stage) -> Objective:
        labels = Labels(stage.label_smoothing)
        return L2SP(labels, self._classifier, self._classifier.head, stage.l2sp) if stage.l2sp else labels
