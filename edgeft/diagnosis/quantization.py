"""Whether quantization costs more accuracy under shift than its loss in distribution leads one to expect.

The float models of several runs give the line, and the fixed-point model of each is held against it:

    excess = (OOD fixed - OOD float) - (g(ID fixed) - g(ID float)),        g the line, as a map of accuracies.

It is the difference of the two models' effective robustness, so what is peculiar to the run cancels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeft.diagnosis.effective import DRAWS, EffectiveRobustness, Line, against, fit_line, middle_95
from edgeft.diagnosis.intervals import Floats, Interval, inside, probit, share_of, student_95
from edgeft.diagnosis.points import points_of, split_pair
from edgeft.errors import DataError
from edgeft.report import EvalReport, ModelResult, SplitResult

FLOAT = "float"
FAR = 0.1
"""The least accurate run always leaves the float models' range when it loses accuracy; by more of its width than this it is flagged."""


@dataclass(frozen=True)
class Excess:
    """One run: accuracies as shares, changes from float to fixed point, and what of the OOD change the line does not explain.

    `interval` (95 %) covers the chance of which images are in the test sets, given by the flips of the same images between both
    models, and the uncertainty of the line.
    """

    run: str
    id_change: float
    ood_change: float
    expected_change: float
    interval: Interval

    @property
    def excess(self) -> float:
        """Change under shift beyond the expected one; negative where quantization costs more than its ID loss says."""
        return self.ood_change - self.expected_change


@dataclass(frozen=True)
class QuantizationEffect:
    """All runs on one shifted split (`label`). `mean` is the mean excess, `interval` its 95 % t interval over the runs.

    The runs share their test images, so that the interval is about further runs on these images.
    """

    label: str
    model: str
    runs: tuple[Excess, ...]
    fixed: EffectiveRobustness
    mean: float
    interval: Interval

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against the line; runs whose ID loss leads far out of the float models' accuracies, where it says nothing."""
        low, high = self.fixed.line.id_range
        far = [f"'{model.point.name}'" for model in self.fixed.models if model.point.id < low - FAR * (high - low)]
        beyond = [f"far below the float models' ID accuracies {100 * low:.1f} ... {100 * high:.1f} %: {', '.join(far)}"] if far else []
        return (*self.fixed.line.warnings, *beyond)

    def to_json(self) -> dict[str, Any]:
        """Runs, mean, and the models against the line, as plain JSON values; all numbers are shares."""
        rows = [{**vars(run), "excess": run.excess, "interval": list(run.interval)} for run in self.runs]
        summary = {"split": self.label, "model": self.model, "mean_excess": self.mean, "interval": list(self.interval)}
        return {**summary, "runs": rows, "warnings": list(self.warnings), "effective_robustness": self.fixed.to_json()}


def quantization_effect(reports: Mapping[str, EvalReport], label: str, model: str) -> QuantizationEffect:
    """Hold the `model` of every run (its name in reports, "fixed point" for one) against the line of their float models.

    `label` is that of the shifted split, for example "ood:sketch". Raises DataError for too few runs, runs that lack the split or a
    model, and runs measured on other numbers of images, which cannot have seen the same test sets.
    """
    line = fit_line(points_of(reports, label, FLOAT))
    fixed = points_of(reports, label, model)
    _require_same_images(reports, label)
    rng = np.random.default_rng(0)
    rows = tuple(_excess(run, report, label, model, line, rng) for run, report in reports.items())
    values = np.array([row.excess for row in rows])
    half = student_95(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    mean = float(values.mean())
    return QuantizationEffect(label, model, rows, against(line, fixed), mean, (mean - half, mean + half))


def _require_same_images(reports: Mapping[str, EvalReport], label: str) -> None:
    counts = {run: [split.n for split in split_pair(run, report.models[0], label)] for run, report in reports.items()}
    first, *others = counts
    for run in others:
        if counts[run] != counts[first]:
            (id_a, ood_a), (id_b, ood_b) = counts[first], counts[run]
            raise DataError(
                f"the runs '{first}' and '{run}' were measured on other images: {id_a} and {id_b} ID, {ood_a} and {ood_b} of '{label}'",
                "compare runs on the same data and, where it is carved out, of the same seed",
            )


def _excess(run: str, report: EvalReport, label: str, model: str, line: Line, rng: np.random.Generator) -> Excess:
    """The interval is that of DRAWS lines and changes; a change of paired proportions has the variance that its flips allow at most."""
    float_id, float_ood = split_pair(run, _model(report, FLOAT), label)
    fixed_id, fixed_ood = split_pair(run, _model(report, model), label)
    slope, intercept, _ = line.drawn(rng, DRAWS)
    start = probit(inside(float_id.top1, float_id.n))
    id_changes = _changes(float_id, fixed_id, rng)
    moved = probit(inside(float_id.top1 + id_changes, float_id.n))
    expected = share_of(slope * moved + intercept) - share_of(slope * start + intercept)
    return Excess(
        run=run,
        id_change=fixed_id.top1 - float_id.top1,
        ood_change=fixed_ood.top1 - float_ood.top1,
        expected_change=line.expected(fixed_id.top1, fixed_id.n) - line.expected(float_id.top1, float_id.n),
        interval=middle_95(_changes(float_ood, fixed_ood, rng) - expected),
    )


def _changes(before: SplitResult, after: SplitResult, rng: np.random.Generator) -> Floats:
    """Changes of accuracy that the measured one leaves possible.

    With b images gained and c lost the variance is (b + c - (b - c)^2 / n) / n^2; no more than all flips can be gained or lost. Where
    flips were not counted, both accuracies vary on their own.
    """
    n, change = before.n, after.top1 - before.top1
    if after.flips is None:
        variance = (before.top1 * (1 - before.top1) + after.top1 * (1 - after.top1)) / n
    else:
        variance = (after.flips / n - change**2) / n
    return change + math.sqrt(max(variance, 0.0)) * rng.standard_normal(DRAWS)


def _model(report: EvalReport, name: str) -> ModelResult:
    found = report.model(name)
    assert found is not None, "points_of has found it"
    return found
