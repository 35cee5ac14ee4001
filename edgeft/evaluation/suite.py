"""The evaluation suite: Runners on the test sets of a run, on corruptions of its ID test set, and on small shifts of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeft.data import Dataset, Split
from edgeft.data.preprocess import Preprocessing
from edgeft.errors import ConfigError
from edgeft.evaluation.calibration import N_BINS, calibration, fit_temperature
from edgeft.evaluation.corruptions import ALL, DIFFERENCES, SEVERITIES
from edgeft.evaluation.detection import GaussianFit, Gaussians, auroc, energy, fpr_at_tpr, max_softmax
from edgeft.evaluation.generating import generators, worker_count
from edgeft.evaluation.metrics import MIN_IMAGES, Classes, Flips, Share, by_group, in_top, macro_f1, row_parts
from edgeft.evaluation.movement import moved_features
from edgeft.evaluation.paired import Pair, difference, mcnemar, mean_difference
from edgeft.evaluation.recording import SHIFT, Chosen, Output, Recorder, Scores, View
from edgeft.evaluation.results import (
    Against,
    CorruptionResult,
    Detection,
    EvaluationReport,
    FeatureMovement,
    Interval,
    ModelEvaluation,
    Movement,
    ResizeResult,
    SetResult,
    ShiftResult,
    Speed,
)
from edgeft.evaluation.sets import TestSet
from edgeft.evaluation.shifts import DISTANCES, FILTERS, Refiltered, as_is, is_resized
from edgeft.progress import Progress
from edgeft.runner import Images, Runner

TOP = 5
SENSITIVITY_IMAGES = 1000
"""ID test images that are translated and resized otherwise."""
TOGETHER = 5
"""Corruptions that are made of an image at a time: it is decoded once for them, and an interruption loses no more."""
MAHALANOBIS_IMAGES = 5000
"""Training images from which class means and covariance are estimated."""


@dataclass(frozen=True)
class Subject:
    """A Runner to evaluate, its name in the report and the digest of the artifact that it comes from.

    `features` gives its last layer's input [n, d], where that can be had; Mahalanobis scores need it. `features_before` gives that of
    the net that fine-tuning started from. A `concurrent` subject may be asked by several threads at a time, and keeps to one thread each.
    """

    name: str
    digest: str
    runner: Runner
    features: Callable[[Images], NDArray[np.float32]] | None = None
    features_before: Callable[[Images], NDArray[np.float32]] | None = None
    concurrent: bool = False

    @property
    def output(self) -> Output:
        """Its logits."""
        return Output(self.name, self.digest, self.runner.logits, self.concurrent)

    @property
    def feature_output(self) -> Output | None:
        """Its features."""
        return self._output("features", self.features)

    @property
    def before_output(self) -> Output | None:
        """Its features before fine-tuning."""
        return self._output("features before", self.features_before)

    def _output(self, what: str, call: Callable[[Images], NDArray[np.float32]] | None) -> Output | None:
        return None if call is None else Output(f"{self.name} {what}", self.digest, call, self.concurrent)


@dataclass(frozen=True)
class Settings:
    """What is measured: corruptions and severities of the ID test set; at most `n` images of each set, drawn by `seed`.

    `workers` processes make the corruptions (0: threads of this one; None: as many as pay). Raises ConfigError for severities outside
    1 ... 5 and `n` below 1.
    """

    corruptions: tuple[str, ...] = ()
    severities: tuple[int, ...] = SEVERITIES
    n: int | None = None
    seed: int = 0
    batch: int = 64
    workers: int | None = None

    def __post_init__(self) -> None:
        wrong = [level for level in self.severities if level not in SEVERITIES]
        if wrong or not self.severities:
            raise ConfigError(f"severities {list(self.severities)} cannot be measured", "severities are 1, 2, 3, 4 and 5")
        if self.n is not None and self.n < 1:
            raise ConfigError(f"n = {self.n} images cannot be measured", "give at least 1, or nothing for all images")


def evaluate_subjects(
    subjects: Sequence[Subject],
    dataset: Dataset,
    p: Preprocessing,
    settings: Settings,
    *,
    run: str,
    cache: Path,
    extra: Sequence[TestSet] = (),
    groups: dict[str, tuple[str, ...]] | None = None,
    notes: Sequence[str] = (),
    progress: Progress,
) -> EvaluationReport:
    """Measure every subject on the validation split (temperature), the test sets, `extra` sets and the views that `settings` name.

    The first subject is the reference of the others. `groups` names the groups of the images of a split. Logits go to `cache` and
    are read from there the next time. Raises DataError for an empty split, TrainingError for scores that are not finite.
    """
    sets = [TestSet(split, groups=_own_groups(split)) for split in dataset.tests] + list(extra)
    sets = [replace(one, groups=(groups or {}).get(one.split.name, one.groups)) for one in sets]
    with generators(_n_workers(settings, len(dataset.id_test))) as workers:
        recorder = Recorder(cache, p, batch=settings.batch, seed=settings.seed, workers=workers)
        suite = _Suite(subjects, dataset, p, settings, recorder, progress)
        start = time.perf_counter()
        suite.record(sets)
        speed = Speed(recorder.n_computed, time.perf_counter() - start, workers.n if workers else 0)
    models = tuple(suite.model(subject) for subject in subjects)
    about: dict[str, Any] = {"severities": list(settings.severities), "n": settings.n, "seed": settings.seed, "ece_bins": N_BINS}
    lines = [*notes, *suite.notes(models)]
    return EvaluationReport(run, len(dataset.classes), about, _described(settings), models, tuple(lines), suite.movement(), speed=speed)


def _n_workers(settings: Settings, n_images: int) -> int:
    if settings.workers is not None:
        return settings.workers
    return worker_count(min(n_images, settings.n or n_images) * len(settings.corruptions) * len(settings.severities))


def _own_groups(split: Split) -> tuple[str, ...] | None:
    """Groups that the data name themselves, by number."""
    return None if split.groups is None else tuple(map(str, split.groups))


def _described(settings: Settings) -> str:
    """Which part of the common corruptions was measured, never under the name of the published sets."""
    names = settings.corruptions
    if not names:
        return "none"
    part = "all" if set(names) == set(ALL) else "a subset:"
    listed = "" if part == "all" else " " + ", ".join(names)
    levels = ", ".join(map(str, settings.severities))
    return f"{part} {len(names)} of the {len(ALL)} common corruptions (edgeft's own){listed}; severities {levels}"


@dataclass
class _Measured:
    """One set and its chosen images."""

    chosen: Chosen
    labels: Classes
    kind: Literal["id", "ood"]
    labelled: bool
    valid: NDArray[np.int64] | None
    groups: tuple[str, ...] | None

    @property
    def name(self) -> str:
        return self.chosen.split.name


@dataclass
class _Suite:
    subjects: Sequence[Subject]
    dataset: Dataset
    p: Preprocessing
    settings: Settings
    recorder: Recorder
    progress: Progress
    sets: list[_Measured] = field(default_factory=list)
    val: Chosen | None = None
    few: Chosen | None = None
    train: Chosen | None = None
    refiltered: dict[str, Chosen] = field(default_factory=dict)

    # Recording

    def choose(self, split: Split, n: int | None = None) -> Chosen:
        limit = self.settings.n if n is None else min(n, self.settings.n or n)
        return Chosen.of(split, limit, self.settings.seed, self.p)

    def record(self, sets: Sequence[TestSet]) -> None:
        """Fill the cache with everything that the report needs, one set and a few corruptions at a time."""
        self._prepare(sets)
        plain = Recorder(self.recorder.folder, as_is(self.p), batch=self.settings.batch, seed=self.settings.seed)
        outputs = [subject.output for subject in self.subjects]
        both = [*outputs, *(output for subject in self.subjects if (output := subject.feature_output))]
        tests = [found.chosen for found in self.sets]
        before = [output for subject in self.subjects if (output := subject.before_output)]
        jobs = [(self.recorder, both + before, chosen, [View()]) for chosen in tests]
        jobs += [(self.recorder, outputs, self.val, [View()])] if self.val else []
        jobs += [(self.recorder, both[len(outputs) :], self.train, [View()])] if self.train else []
        names = self.settings.corruptions
        jobs += [
            (self.recorder, outputs, tests[0], [view for name in names[start : start + TOGETHER] for view in self._severities(name)])
            for start in range(0, len(names), TOGETHER)
        ]
        if self.few:
            jobs += [(self.recorder, outputs, self.few, [View(), *(View(SHIFT, pixels) for pixels in DISTANCES)])]
        jobs += [(plain, outputs, chosen, [View(f"pil-{name}")]) for name, chosen in self.refiltered.items()]
        total = sum(len(which) * len(chosen) * len(views) for _, which, chosen, views in jobs)
        with self.progress.task(f"evaluate {', '.join(output.name for output in outputs)}", total) as advance:
            for recorder, which, chosen, views in jobs:
                recorder.record(which, chosen, views, advance)

    def _prepare(self, sets: Sequence[TestSet]) -> None:
        for found in sets:
            chosen = self.choose(found.split)
            groups = None if found.groups is None else tuple(found.groups[index] for index in chosen.indices)
            kind: Literal["id", "ood"] = "ood" if found.split.kind == "ood" else "id"
            self.sets.append(_Measured(chosen, chosen.split.labels, kind, found.labelled, found.valid, groups))
        test = self.dataset.id_test
        self.val = self.choose(self.dataset.val) if len(self.dataset.val) else None
        self.few = self.choose(test, SENSITIVITY_IMAGES)
        if any(subject.features for subject in self.subjects) and len(sets) > 1 and len(self.dataset.train):
            self.train = Chosen.of(self.dataset.train, MAHALANOBIS_IMAGES, self.settings.seed, self.p)
        if is_resized(test.images, self.p):
            for name in FILTERS:
                split = replace(self.few.split, images=Refiltered(self.few.split.images, self.p, name))
                self.refiltered[name] = replace(self.few, split=split)

    def _severities(self, name: str) -> list[View]:
        return [View(name, level) for level in self.settings.severities]

    def scores(self, output: Output, chosen: Chosen, view: View | None = None) -> Scores:
        found = self.recorder.load(output, chosen, view or View())
        assert found is not None, "record() has written it"
        return found

    # Measuring

    def model(self, subject: Subject) -> ModelEvaluation:
        """Everything about one model, from the recorded scores."""
        val = self.val
        fitted = None if val is None else fit_temperature(self.scores(subject.output, val), val.split.labels)
        temperature = None if fitted is None else fitted.value
        return ModelEvaluation(
            subject.name, subject.digest, temperature, fitted is not None and fitted.at_bound,
            tuple(self._set(subject, found, temperature) for found in self.sets if found.labelled),
            tuple(self._corruption(subject, name) for name in self.settings.corruptions),
            tuple(self._detection(subject)), tuple(self._shifts(subject)), tuple(self._resizes(subject)),
        )  # fmt: skip

    def _set(self, subject: Subject, found: _Measured, temperature: float | None) -> SetResult:
        scores, labels = self._permitted(subject, found)
        top = _top(scores)
        hits = top == labels
        n_answers = scores.shape[1]
        return SetResult(
            found.name, found.kind, Share.of(hits), Share.of(in_top(scores, labels, TOP)) if n_answers > TOP else None, n_answers,
            macro_f1(top, labels, n_answers), calibration(scores, labels),
            None if temperature is None else calibration(scores, labels, temperature),
            {} if found.groups is None else by_group(hits, found.groups), self._against(subject, found, top, labels),
        )  # fmt: skip

    def _permitted(self, subject: Subject, found: _Measured) -> tuple[Scores, Classes]:
        """Scores of the permitted answers, and labels as places among them."""
        scores = self.scores(subject.output, found.chosen)
        if found.valid is None:
            return scores, found.labels
        return scores[:, found.valid], np.searchsorted(found.valid, found.labels)

    def _against(self, subject: Subject, found: _Measured, top: Classes, labels: Classes) -> Against | None:
        reference = self.subjects[0]
        if subject is reference:
            return None
        other = _top(self._permitted(reference, found)[0])
        pair = Pair.of(top, other, labels)
        return Against(Interval(*difference([pair])), mcnemar(pair), Flips.of(top, other, labels))

    def _corruption(self, subject: Subject, name: str) -> CorruptionResult:
        test, reference = self.sets[0], self.subjects[0]
        shares, flips = {}, {}
        more_right = np.zeros(len(test.labels), np.int64)
        for view in self._severities(name):
            top, other = (_top(self.scores(one.output, test.chosen, view)) for one in (subject, reference))
            shares[view.level] = Share.of(top == test.labels)
            flips[view.level] = Flips.of(top, other, test.labels)
            more_right += (top == test.labels).astype(np.int64) - (other == test.labels)
        if subject is reference:
            return CorruptionResult(name, shares, None, None)
        return CorruptionResult(name, shares, Interval(*mean_difference(more_right, len(shares))), flips)

    def _detection(self, subject: Subject) -> list[Detection]:
        inside = self._scored(subject, self.sets[0])
        found = []
        for other in self.sets[1:]:
            outside = self._scored(subject, other)
            areas = {name: auroc(inside[name], outside[name]) for name in inside}
            rates = {name: fpr_at_tpr(inside[name], outside[name]) for name in inside}
            kind: Literal["shifted", "other classes"] = "shifted" if other.labelled else "other classes"
            found.append(Detection(other.name, kind, len(self.sets[0].chosen), len(other.chosen), areas, rates))
        return found

    def _scored(self, subject: Subject, found: _Measured) -> dict[str, NDArray[np.float64]]:
        """Scores that are higher in distribution, by name; Mahalanobis where features can be had."""
        logits = self.scores(subject.output, found.chosen)
        by_name = {"msp": max_softmax(logits), "energy": energy(logits)}
        gaussians = self._gaussians(subject)
        if gaussians is not None and subject.feature_output is not None:
            by_name["mahalanobis"] = gaussians.scores(self.scores(subject.feature_output, found.chosen))
        return by_name

    def _gaussians(self, subject: Subject) -> Gaussians | None:
        if subject.feature_output is None or self.train is None:
            return None
        features = self.scores(subject.feature_output, self.train)
        fit = GaussianFit(len(self.dataset.classes), features.shape[1])
        for part in row_parts(len(features)):
            fit.add(features[part], self.train.split.labels[part])
        return fit.fitted()

    def _shifts(self, subject: Subject) -> list[ShiftResult]:
        assert self.few is not None
        base = _top(self.scores(subject.output, self.few))
        moved = {pixels: _top(self.scores(subject.output, self.few, View(SHIFT, pixels))) for pixels in DISTANCES}
        return [ShiftResult(pixels, Share.of(top == base)) for pixels, top in moved.items()]

    def _resizes(self, subject: Subject) -> list[ResizeResult]:
        assert self.few is not None
        base, labels = _top(self.scores(subject.output, self.few)), self.few.split.labels
        tops = {name: _top(self.scores(subject.output, chosen, View(f"pil-{name}"))) for name, chosen in self.refiltered.items()}
        return [ResizeResult(name, Share.of(top == labels), Flips.of(top, base, labels)) for name, top in tops.items()]

    def movement(self) -> Movement | None:
        """Of the first subject whose features before fine-tuning can be had."""
        for subject in self.subjects:
            before, after = subject.before_output, subject.feature_output
            if before is not None and after is not None:
                sets = (self._movement(before, after, found) for found in self.sets)
                return Movement(tuple(sets), None)
        return None

    def _movement(self, before: Output, after: Output, found: _Measured) -> FeatureMovement:
        moved = moved_features(self.scores(before, found.chosen), self.scores(after, found.chosen))
        return FeatureMovement(found.name, found.kind, len(found.chosen), moved)

    def notes(self, models: Sequence[ModelEvaluation]) -> list[str]:
        """What a reader must know of the numbers."""
        lines = [
            f"set '{found.name}': n = {len(found.chosen)} is too small for a 95 % interval that says much (*: fewer than {MIN_IMAGES})"
            for found in self.sets
            if len(found.chosen) < MIN_IMAGES
        ]
        if self.val is None:
            lines.append("no validation images: no temperature was fitted")
        lines += [_at_bound(model) for model in models if model.temperature_at_bound]
        if not self.refiltered:
            lines.append("resize filters not measured: the images come in the network's size")
        lines += [f"{name}: {DIFFERENCES[name]}" for name in self.settings.corruptions if name in DIFFERENCES]
        return lines


def _at_bound(model: ModelEvaluation) -> str:
    assert model.temperature is not None, "it was fitted"
    why = "it is right on every image there" if model.temperature < 1 else "its scores say nothing about the classes there"
    return (
        f"the temperature of '{model.model}' ended at the bound {model.temperature:.4g} of its search, there is no best one for the "
        f"validation images ({why}): calibration at it says little"
    )


def _top(scores: Scores) -> Classes:
    top: Classes = scores.argmax(axis=1).astype(np.int64)
    return top
