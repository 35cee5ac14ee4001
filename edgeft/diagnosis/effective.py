"""Effective robustness: accuracy out of distribution beyond what a family of baselines leads one to expect of that ID accuracy.

Over a family of models, accuracy under shift is often nearly linear in accuracy in distribution once both are probits, h = Phi^-1.
The line h(OOD) = a h(ID) + b is fitted to the baselines by least squares, and

    effective robustness = OOD - Phi(a h(ID) + b),        a difference of accuracies.

The line says nothing about a model that is more or less accurate in distribution than every baseline, nor where the relation is
curved, as it can be for shifts of subpopulations ("Accuracy on the Curve"); both are said.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from edgeft.diagnosis.intervals import Floats, Interval, density, inside, probit, share_of, student_p
from edgeft.errors import DataError

MIN_MODELS = 5
MIN_R2 = 0.9
"""A line that explains less of the baselines' variance is flagged."""
MIN_RELIABILITY = 0.9
"""Share of the variance of the baselines' ID accuracies that must not be chance; noise in them flattens the line."""
CURVED_P = 0.05
EXACT = 1e-9
"""What is nearer to the line than this, in probits or in accuracy, lies on it; what is left is rounding."""
DRAWS = 4000

Verdict = Literal["above", "on", "below"]


@dataclass(frozen=True)
class Point:
    """Accuracies of a model in and out of distribution, as shares, and of how many images, where that is known.

    Raises DataError for what is not a share, for counts below 1, and for 0 and 1 without a count: they have no probit.
    """

    name: str
    id: float
    ood: float
    n_id: int | None = None
    n_ood: int | None = None

    def __post_init__(self) -> None:
        for what, share, n in (("id", self.id, self.n_id), ("ood", self.ood, self.n_ood)):
            if not 0 <= share <= 1:
                raise DataError(f"the accuracy {what} of model '{self.name}' is {share:g}", "accuracies are shares from 0 to 1")
            if n is not None and n < 1:
                raise DataError(f"model '{self.name}' was measured on n_{what} = {n} images", "give a count of 1 or more, or none")
            if n is None and share in (0, 1):
                raise DataError(
                    f"the accuracy {what} of model '{self.name}' is exactly {share:g}, which has no probit",
                    f"give the number of images, n_{what}, or leave the model out",
                )

    @property
    def probits(self) -> tuple[float, float]:
        """Both accuracies as probits; 0 and 1 count as half an image away from them."""
        return float(probit(inside(self.id, self.n_id))), float(probit(inside(self.ood, self.n_ood)))

    @property
    def counted(self) -> bool:
        """Whether the chance in both accuracies is known."""
        return self.n_id is not None and self.n_ood is not None


@dataclass(frozen=True)
class Line:
    """The least-squares line through the baselines in probits; `residual` is the standard deviation around it, in probits.

    `curvature_p` is the two-sided p-value of a quadratic term, `reliability` the share of the variance of the ID accuracies that is
    not chance (None where a count is missing).
    """

    points: tuple[Point, ...]
    slope: float
    intercept: float
    r2: float
    residual: float
    curvature_p: float
    reliability: float | None

    @property
    def id_range(self) -> Interval:
        """The smallest and the largest ID accuracy of a baseline."""
        shares = [point.id for point in self.points]
        return min(shares), max(shares)

    def expected(self, id_share: float, n_id: int | None = None) -> float:
        """OOD accuracy on the line at an ID accuracy."""
        return float(share_of(self.slope * probit(inside(id_share, n_id)) + self.intercept))

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against this line."""
        found = []
        if self.r2 < MIN_R2:
            found.append(f"poor fit: R² is {self.r2:.2f}, below {MIN_R2:g}; ID accuracy hardly says what to expect out of distribution")
        if self.slope <= 0:
            found.append(f"the line falls (slope {self.slope:.2f}): of these baselines the better ones are the worse ones under shift")
        if self.curvature_p < CURVED_P:
            found.append(f"the relation is curved (quadratic term, p = {self.curvature_p:.3f}); the line is wrong at its ends")
        if self.reliability is not None and self.reliability < MIN_RELIABILITY:
            found.append(
                f"only {max(self.reliability, 0):.0%} of the variance of the baselines' ID accuracies is not chance, which flattens the "
                "line: use more images, or baselines that differ more"
            )
        return tuple(found)

    def drawn(self, rng: np.random.Generator, n: int) -> tuple[Floats, Floats, Floats]:
        """n lines that the baselines leave possible: slope, intercept, and standard deviation around the line.

        The posterior of least squares with a flat prior; its marginals are the usual t intervals.
        """
        x = np.array([point.probits[0] for point in self.points])
        freedom = len(x) - 2
        sd = self.residual * np.sqrt(freedom / rng.chisquare(freedom, n))
        slope = self.slope + sd * rng.standard_normal(n) / math.sqrt(((x - x.mean()) ** 2).sum())
        middle = self.slope * x.mean() + self.intercept + sd * rng.standard_normal(n) / math.sqrt(len(x))
        return slope, middle - slope * x.mean(), sd


@dataclass(frozen=True)
class Robustness:
    """A model against the line; all numbers are shares.

    `interval` (95 %) covers the uncertainty of the line and, where counts are known, the chance in both of the model's accuracies,
    as if it were independent of the baselines'. `family` is the range in which one more baseline of that ID accuracy would lie with
    95 %.
    """

    point: Point
    expected: float
    effective: float
    interval: Interval
    family: Interval
    extrapolated: bool

    @property
    def verdict(self) -> Verdict:
        """Where the whole interval lies."""
        return "above" if self.interval[0] > EXACT else "below" if self.interval[1] < -EXACT else "on"

    @property
    def unlike_family(self) -> bool:
        """Whether the model lies outside the range of the baselines' own scatter."""
        return not self.family[0] - EXACT <= self.point.ood <= self.family[1] + EXACT


@dataclass(frozen=True)
class EffectiveRobustness:
    """The line of a family of baselines and the models that were held against it."""

    line: Line
    models: tuple[Robustness, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against the line, and what was not accounted for."""
        found = list(self.line.warnings)
        low, high = self.line.id_range
        outside = [f"'{model.point.name}'" for model in self.models if model.extrapolated]
        if outside:
            found.append(f"extrapolated beyond the baselines' ID accuracies {100 * low:.1f} ... {100 * high:.1f} %: {', '.join(outside)}")
        uncounted = [f"'{model.point.name}'" for model in self.models if not model.point.counted]
        if uncounted:
            found.append(f"numbers of images not given: the intervals leave out the chance in the accuracies of {', '.join(uncounted)}")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Line, models and warnings as plain JSON values; accuracies and differences of them are shares."""
        line = self.line
        return {
            "line": {
                "slope": line.slope, "intercept": line.intercept, "r2": line.r2, "residual": line.residual,
                "curvature_p": line.curvature_p, "reliability": line.reliability, "n": len(line.points),
                "id_range": list(line.id_range), "baselines": [vars(point) for point in line.points],
            },
            "models": [
                {
                    **vars(model.point), "expected": model.expected, "effective": model.effective, "interval": list(model.interval),
                    "family": list(model.family), "extrapolated": model.extrapolated, "verdict": model.verdict,
                }
                for model in self.models
            ],
            "warnings": list(self.warnings),
        }  # fmt: skip


def fit_line(points: Sequence[Point]) -> Line:
    """Fit the line of a family of baselines.

    Raises DataError for fewer than MIN_MODELS of them, and where they all have the same ID accuracy.
    """
    if len(points) < MIN_MODELS:
        names = ", ".join(f"'{point.name}'" for point in points) or "none"
        raise DataError(
            f"a line of baselines needs at least {MIN_MODELS} models, found {len(points)}: {names}",
            "add models of the same family: other sizes, checkpoints of one training from scratch, or probes of other strengths",
        )
    x, y = np.array([point.probits for point in points]).T
    if np.ptp(x) < EXACT:
        raise DataError(
            f"all {len(points)} baselines have the ID accuracy {100 * points[0].id:.1f} %: no line goes through one column of points",
            "add baselines that are better or worse in distribution",
        )
    (intercept, slope), error = _fitted(x, y, 1)
    total = float(((y - y.mean()) ** 2).sum())
    return Line(
        points=tuple(points),
        slope=float(slope),
        intercept=float(intercept),
        r2=1 - error / total if total > EXACT**2 else 1.0,
        residual=math.sqrt(error / (len(x) - 2)),
        curvature_p=_curvature(x, y, error),
        reliability=_reliability(points, x),
    )


def against(line: Line, models: Sequence[Point], seed: int = 0) -> EffectiveRobustness:
    """Hold models against a line; the same seed gives the same intervals."""
    rng = np.random.default_rng(seed)
    low, high = line.id_range
    return EffectiveRobustness(line, tuple(_robustness(line, point, rng, not low <= point.id <= high) for point in models))


def _robustness(line: Line, point: Point, rng: np.random.Generator, extrapolated: bool) -> Robustness:
    """Intervals are quantiles over DRAWS lines, each with accuracies drawn from what the model's counts leave possible."""
    slope, intercept, sd = line.drawn(rng, DRAWS)
    scattered = share_of(slope * point.probits[0] + intercept + sd * rng.standard_normal(DRAWS))
    on_line = share_of(slope * probit(_possible(point.id, point.n_id, rng)) + intercept)
    expected = line.expected(point.id, point.n_id)
    return Robustness(
        point,
        expected,
        point.ood - expected,
        middle_95(_possible(point.ood, point.n_ood, rng) - on_line),
        middle_95(scattered),
        extrapolated,
    )


def middle_95(values: Floats) -> Interval:
    """The 2.5 % and 97.5 % quantiles."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _possible(share: float, n: int | None, rng: np.random.Generator) -> Floats:
    """Accuracies that a measured share leaves possible: Jeffreys' posterior of a proportion, or the share itself without a count."""
    if n is None:
        return np.full(DRAWS, share)
    return np.clip(rng.beta(share * n + 0.5, (1 - share) * n + 0.5, DRAWS), 1e-12, 1 - 1e-12)


def _fitted(x: Floats, y: Floats, degree: int) -> tuple[Floats, float]:
    """Coefficients of a least-squares polynomial, lowest power first, and its sum of squared errors."""
    powers = np.vander(x, degree + 1, increasing=True)
    coefficients: Floats = np.linalg.lstsq(powers, y, rcond=None)[0].astype(np.float64)
    return coefficients, float(((y - powers @ coefficients) ** 2).sum())


def _curvature(x: Floats, y: Floats, straight: float) -> float:
    """p-value of the quadratic term: how much less error it leaves than the line, against what it leaves itself."""
    freedom = len(x) - 3
    curved = _fitted(x - x.mean(), y, 2)[1]
    if straight < EXACT**2 * len(x) or len(np.unique(x)) < 3:
        return 1.0
    if curved <= 0:
        return 0.0
    return student_p(math.sqrt(max(straight - curved, 0.0) * freedom / curved), freedom)


def _reliability(points: Sequence[Point], x: Floats) -> float | None:
    """1 - (mean binomial variance of the ID probits) / (their variance); None where a count is missing."""
    counts = [point.n_id for point in points]
    if None in counts:
        return None
    n = np.array(counts, np.float64)
    shares = share_of(x)
    chance = shares * (1 - shares) / (n * density(x) ** 2)  # Delta method: the probit's slope is 1 / density.
    return float(1 - chance.mean() / x.var(ddof=1))
