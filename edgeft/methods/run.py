"""Run the stages of a method one after the other on one model."""

from dataclasses import asdict
from typing import Any

from edgeft.context import TrainContext
from edgeft.data import Dataset
from edgeft.methods import Stage
from edgeft.models import Classifier
from edgeft.probe import fit_probe
from edgeft.train import fit


def run_stages(classifier: Classifier, stages: list[Stage], dataset: Dataset, context: TrainContext) -> list[dict[str, Any]]:
    """Train `classifier` by each stage in turn; it ends with the last stage's best weights, in eval mode.

    Returns a JSON-able record for each stage: its name and settings under "stage" and its choice and history under "result".
    Finished stages are read back from `context.work`. Raises what `fit_probe` and `fit` raise.
    """
    records: list[dict[str, Any]] = []
    for stage in stages:
        solve = fit_probe if stage.solver == "lbfgs" else fit
        result = solve(classifier, stage, dataset.train, dataset.val, context)
        context.say(f"{stage.name}: validation {result.val_accuracy:.1%}")
        if records and result.val_accuracy < records[-1]["result"]["val_accuracy"]:
            context.say(f"{stage.name}: below its start on validation; lower learning rates (train.lr) may do better")
        records.append({"stage": asdict(stage), "result": asdict(result)})
    return records
