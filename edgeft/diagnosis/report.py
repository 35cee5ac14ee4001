"""Diagnosis of a shift: how much of it the reference has never seen, what a model loses there and elsewhere, and one sentence."""

from dataclasses import dataclass
from typing import Any

from edgeft.diagnosis.intervals import Interval, difference
from edgeft.diagnosis.parts import PartRobustness
from edgeft.diagnosis.parts import render as render_parts
from edgeft.report import wilson
from edgeft.show_formats import aligned

WIDE = 0.2
"""A part of the shifted images whose accuracy has a wider 95 % interval than this has too few images; that is said."""
NOT_NOTHING = 0.05
"""A smaller share of the shifted images out of support is called nearly none."""


@dataclass(frozen=True)
class Accuracy:
    """Images of a part that have a label, and how many of them a model classifies rightly; n may be 0."""

    correct: int
    n: int

    @property
    def top1(self) -> float | None:
        """Share that is right; None where nothing was measured."""
        return self.correct / self.n if self.n else None

    @property
    def interval(self) -> Interval:
        """95 % Wilson interval of top1."""
        return wilson(self.correct, self.n)

    def below(self, other: "Accuracy") -> tuple[float, Interval] | None:
        """How much lower than another's top1 this one is, and the 95 % interval of that; None where one was not measured."""
        if self.top1 is None or other.top1 is None:
            return None
        return other.top1 - self.top1, difference(other.correct, other.n, self.correct, self.n)

    def to_json(self) -> dict[str, Any]:
        """Counts and what follows from them; shares are fractions."""
        return {"n": self.n, "correct": self.correct, "top1": self.top1, "interval": list(self.interval) if self.n else None}


@dataclass(frozen=True)
class Parts:
    """A model on the reference, on the shifted images, and on those in and out of the reference's support."""

    model: str
    ref: Accuracy
    shift: Accuracy
    inside: Accuracy
    outside: Accuracy


@dataclass(frozen=True)
class Diagnosis:
    """All that was found. `n_outside` counts shifted images out of support, `n_ref_outside` reference images mistaken for such.

    `unknown` are folders of the shifted set that are no classes of the reference: their images are split by support, and never
    counted in accuracies. `models` holds the float net and, where the run has its export, the fixed-point one; it is empty without a
    run. Intervals are of the sampling of images, the classifier of the split being given. `robustness` is measured where baselines are
    given.
    """

    ref: str
    shift: str
    backbone: str
    n_ref: int
    n_shift: int
    n_outside: int
    n_ref_outside: int
    auc: float
    auc_interval: Interval
    unknown: tuple[str, ...] = ()
    models: tuple[Parts, ...] = ()
    notes: tuple[str, ...] = ()
    robustness: tuple[PartRobustness, ...] = ()

    @property
    def outside(self) -> float:
        """Share of the shifted images out of support."""
        return self.n_outside / self.n_shift

    @property
    def outside_interval(self) -> Interval:
        """Its 95 % Wilson interval."""
        return wilson(self.n_outside, self.n_shift)

    @property
    def verdict(self) -> str:
        """What it means, in one sentence, for the last of the models."""
        return _verdict(self)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Parts with too few labelled images to say much of their accuracy."""
        if not self.models:
            return ()
        last = self.models[-1]
        parts = (("the reference", last.ref), ("the part in support", last.inside), ("the part out of support", last.outside))
        return tuple(
            f"accuracy of {name} rests on {part.n} labelled images: its interval is {100 * (high - low):.0f} points wide"
            for name, part in parts
            for low, high in [part.interval]
            if part.n and high - low > WIDE
        )

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values; shares are fractions."""
        return {
            "ref": self.ref, "shift": self.shift, "backbone": self.backbone, "n_ref": self.n_ref, "n_shift": self.n_shift,
            "auc": self.auc, "auc_interval": list(self.auc_interval),
            "out_of_support": {"n": self.n_outside, "share": self.outside, "interval": list(self.outside_interval)},
            "ref_out_of_support": {"n": self.n_ref_outside, "share": self.n_ref_outside / self.n_ref},
            "unknown_classes": list(self.unknown),
            "models": [
                {
                    "model": parts.model, "ref": parts.ref.to_json(), "shift": parts.shift.to_json(),
                    "in_support": parts.inside.to_json(), "out_of_support": parts.outside.to_json(),
                }
                for parts in self.models
            ],
            "effective_robustness": [part.to_json() for part in self.robustness],
            "verdict": self.verdict, "notes": list(self.notes), "warnings": list(self.warnings),
        }  # fmt: skip


def render(found: Diagnosis) -> str:
    """The diagnosis for people: the split, accuracies in percent with losses in points, the verdict, notes."""
    low, high = found.auc_interval
    lines = [
        f"reference  {found.n_ref} images, {found.ref}",
        f"shifted    {found.n_shift} images, {found.shift}",
        f"features   {found.backbone}",
        "",
        f"a shifted image is told from a reference image with AUC {found.auc:.3f} [{low:.3f}, {high:.3f}]",
        f"out of support: {found.n_outside} of {found.n_shift} shifted images, {_percent(found.outside, found.outside_interval)}"
        f" (reference images mistaken for such: {found.n_ref_outside} of {found.n_ref})",
    ]
    lines += ["", *_table(found)] if found.models else []
    lines += ["", *render_parts(found.robustness)] if found.robustness else []
    lines += ["", f"verdict: {found.verdict}"]
    lines += [f"note: {note}" for note in found.notes]
    return "\n".join([*lines, *(f"warning: {text}" for text in found.warnings)])


def _table(found: Diagnosis) -> list[str]:
    rows = [["model", "part", "n", "top-1 % [95 %]", "below reference, points [95 %]"]]
    for parts in found.models:
        named = (("reference", parts.ref), ("shifted", parts.shift), ("  in support", parts.inside), ("  out of support", parts.outside))
        for number, (name, part) in enumerate(named):
            accuracy = "-" if part.top1 is None else _points(part.top1, part.interval)
            lost = part.below(parts.ref) if number else None
            rows.append(["" if number else parts.model, name, str(part.n), accuracy, _points(*lost) if lost else ""])
    return aligned(rows).splitlines()


def _percent(share: float, interval: Interval) -> str:
    return f"{_tenth(share)} % [{_tenth(interval[0])}, {_tenth(interval[1])}]"


def _points(value: float, interval: Interval) -> str:
    return _percent(value, interval).replace(" %", "")


def _tenth(share: float) -> str:
    """In percent or points, without a sign on what rounds to nothing."""
    return f"{100 * share:.1f}".replace("-0.0", "0.0") if abs(share) < 0.01 else f"{100 * share:.1f}"


def _verdict(found: Diagnosis) -> str:
    parts = found.models[-1] if found.models else None
    share = _percent(found.outside, found.outside_interval)
    if found.outside < NOT_NOTHING:
        start = f"nearly all shifted images lie in the support of the reference, {share} do not"
        start += " (the features hardly tell them apart)" if found.auc_interval[0] <= 0.5 else ""
        return start + "; " + _inside(parts)
    start = f"{share} of the shifted images lie out of the reference's support{_outside(parts)}"
    return start if found.n_outside == found.n_shift else f"{start}; {_inside(parts)}"


def _outside(parts: Parts | None) -> str:
    """What is lost where the reference has nothing alike, and what can help there."""
    help_ = "pre-training that knows such images, or a few of them in training, can help"
    lost = parts.outside.below(parts.ref) if parts is not None else None
    if lost is None:
        return f", where {help_}"
    value, interval = lost
    if interval[0] <= 0:
        return f", where no loss of accuracy shows ({_points(value, interval)} points)"
    return f", where accuracy is {_points(value, interval)} points lower: {help_}"


def _inside(parts: Parts | None) -> str:
    """What is lost among images like those of the reference, where extrapolation is not what is lacking."""
    help_ = "look for bias or label shift, re-weight or curate the training images"
    lost = parts.inside.below(parts.ref) if parts is not None else None
    if parts is None:
        return "no run was given, so that there are no accuracies to say what is lost in support"
    if lost is None:
        return "there are no labelled images in support, or none in the reference, to say what is lost there"
    value, interval = lost
    if interval[0] <= 0:
        return f"in support no loss of accuracy shows ({_points(value, interval)} points, {parts.inside.n} images)"
    return f"in support accuracy is {_points(value, interval)} points lower, which better pre-training is not expected to mend: {help_}"
