"""EvaluationReport: everything the suite measured, as frozen records that become JSON."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from edgeft.evaluation.calibration import Calibration
from edgeft.evaluation.corruptions import MAIN
from edgeft.evaluation.metrics import Flips, Share, worst_group
from edgeft.evaluation.movement import Moved
from edgeft.evaluation.saturating import Saturation

SCHEMA = 1
WORST = 3
"""How many corruptions are named as the most expensive ones."""


@dataclass(frozen=True)
class Interval:
    """A difference in points with its 95 % bootstrap interval."""

    points: float
    low: float
    high: float


@dataclass(frozen=True)
class Against:
    """A model against the reference on the same images: difference in top-1, McNemar's exact p-value, flips."""

    top1: Interval
    mcnemar_p: float
    flips: Flips


@dataclass(frozen=True)
class SetResult:
    """One model on one labelled set. `top5` is None with five classes or fewer, `calibrated` (at the fitted temperature) without one."""

    name: str
    kind: Literal["id", "ood"]
    top1: Share
    top5: Share | None
    permitted_answers: int
    macro_f1: float
    calibration: Calibration
    calibrated: Calibration | None
    groups: dict[str, Share]
    against: Against | None

    @property
    def worst_group(self) -> tuple[str, Share] | None:
        """The group with the lowest accuracy, where groups are known."""
        if not self.groups:
            return None
        name = worst_group(self.groups)
        return name, self.groups[name]


@dataclass(frozen=True)
class CorruptionResult:
    """One model on one corruption of the ID test set; `severities` maps severity to top-1. `cost` and flips are against the reference."""

    corruption: str
    severities: dict[int, Share]
    cost: Interval | None
    flips: dict[int, Flips] | None

    @property
    def error(self) -> float:
        """Mean error over the severities, 0 ... 1."""
        return sum(1 - share.value for share in self.severities.values()) / len(self.severities)


@dataclass(frozen=True)
class Detection:
    """How well scores tell the ID test set from another set: AUROC and FPR at 95 % TPR by score, ID being positive."""

    name: str
    kind: Literal["shifted", "other classes"]
    n_id: int
    n_ood: int
    auroc: dict[str, float]
    fpr95: dict[str, float]


@dataclass(frozen=True)
class ShiftResult:
    """Share of ID test images whose answer stays when they are moved by `pixels`."""

    pixels: int
    same: Share


@dataclass(frozen=True)
class ResizeResult:
    """The ID test images resized by another filter: top-1, and flips against the run's own preprocessing."""

    filter: str
    top1: Share
    flips: Flips


@dataclass(frozen=True)
class FeatureMovement:
    """How far fine-tuning moved the float model's features of a set's images."""

    name: str
    kind: Literal["id", "ood"]
    n: int
    moved: Moved


@dataclass(frozen=True)
class Movement:
    """Movement since the pretrained net: of the features, by set, and of the head since fine-tuning began (None: not recorded)."""

    sets: tuple[FeatureMovement, ...]
    head: Moved | None


@dataclass(frozen=True)
class ModelEvaluation:
    """Everything about one model. `temperature` is fitted to it on the validation split; None where there are no such images.

    `temperature_at_bound` says that the fit ended at a bound of its search: there is no best temperature, and this one says little.
    """

    model: str
    digest: str
    temperature: float | None
    temperature_at_bound: bool
    sets: tuple[SetResult, ...]
    corruptions: tuple[CorruptionResult, ...] = ()
    detection: tuple[Detection, ...] = ()
    shifts: tuple[ShiftResult, ...] = ()
    resizes: tuple[ResizeResult, ...] = ()

    @property
    def mean_ood(self) -> float | None:
        """Unweighted mean of top-1 over the OOD sets."""
        shares = [found.top1.value for found in self.sets if found.kind == "ood"]
        return sum(shares) / len(shares) if shares else None

    @property
    def mean_corruption_error(self) -> float | None:
        """Mean error over the main corruptions that were measured, not normalised, 0 ... 1; extra ones have no part in it."""
        errors = [found.error for found in self.corruptions if found.corruption in MAIN]
        return sum(errors) / len(errors) if errors else None

    def worst(self) -> tuple[CorruptionResult, ...]:
        """At most WORST corruptions on which this model is below the reference, most expensive first."""
        priced = [(found.cost.points, found.corruption, found) for found in self.corruptions if found.cost and found.cost.points < 0]
        return tuple(found for _, _, found in sorted(priced, key=lambda one: one[:2])[:WORST])


@dataclass(frozen=True)
class Speed:
    """How many views of images the models answered, every model counted, in how many seconds; what was known already is not in it."""

    views: int
    seconds: float
    workers: int

    @property
    def views_per_s(self) -> float:
        """Views answered in a second, corruptions included."""
        return self.views / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class EvaluationReport:
    """Models side by side on the same images; the first is the reference of the others. Shares are fractions, differences points.

    `corruptions` says in words which part of the common corruptions was measured; `notes` what a reader must know of the numbers.
    `movement` is of the float model, `saturation` of the fixed-point one; None where they could not be measured.
    `speed` is that of this evaluation and no part of the result.
    """

    run: str
    n_classes: int
    settings: dict[str, Any]
    corruptions: str
    models: tuple[ModelEvaluation, ...]
    notes: tuple[str, ...] = ()
    movement: Movement | None = None
    saturation: Saturation | None = None
    speed: Speed | None = field(default=None, compare=False)

    def model(self, name: str) -> ModelEvaluation | None:
        """The results of one model, if it was measured."""
        return next((found for found in self.models if found.model == name), None)

    def relative_corruption_error(self, model: ModelEvaluation) -> float | None:
        """Mean over the main corruptions of this model's error as a share of the reference's; None where there is none to divide by."""
        own = {found.corruption: found.error for found in model.corruptions if found.corruption in MAIN}
        base = {found.corruption: found.error for found in self.models[0].corruptions}
        ratios = [error / base[name] for name, error in own.items() if base.get(name)]
        return sum(ratios) / len(ratios) if ratios else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: counts, and everything derived from them."""
        tree: dict[str, Any] = {"schema": SCHEMA, **_plain(self)}
        for entry, model in zip(tree["models"], self.models, strict=True):
            entry["mean_ood"] = model.mean_ood
            entry["mean_corruption_error"] = model.mean_corruption_error
            entry["relative_corruption_error"] = self.relative_corruption_error(model)
            entry["worst_corruptions"] = [found.corruption for found in model.worst()]
        if self.speed is not None:
            tree["speed"]["views_per_s"] = self.speed.views_per_s
        return tree


def _plain(value: Any) -> Any:
    """Records as dictionaries; a Share with its value and interval, a corruption with its error."""
    if isinstance(value, Share):
        return {"n": value.n, "correct": value.correct, "value": value.value, "interval": list(value.interval)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tree = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return tree | ({"error": value.error} if isinstance(value, CorruptionResult) else {})
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value
