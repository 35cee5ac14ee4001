"""diagnose() and effective_robustness(): what kind of shift two folders show, and whether runs are as robust as their ID accuracy says."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeft.artifact import Artifact
from edgeft.bench.peers import float_classifier
from edgeft.config import Config, DataConfig, ModelConfig
from edgeft.data import Dataset, Split
from edgeft.data.decode import SHORT_SIDE
from edgeft.data.loading import short_side
from edgeft.diagnosis.effective import EffectiveRobustness, Point, against, fit_line
from edgeft.diagnosis.family import answers
from edgeft.diagnosis.family import points as points_of_epochs
from edgeft.diagnosis.parts import PartRobustness, part_robustness
from edgeft.diagnosis.points import choose_split, points_of, read_points
from edgeft.diagnosis.quantization import QuantizationEffect, quantization_effect
from edgeft.diagnosis.reading import PartlyLabelled, class_folders, read_folder
from edgeft.diagnosis.report import Accuracy, Diagnosis, Parts
from edgeft.diagnosis.seeing import look
from edgeft.diagnosis.support import split_support
from edgeft.errors import ArtifactError, ConfigError, DataError
from edgeft.evaluate import Predictions
from edgeft.export import TARGETS
from edgeft.exporting import FIXED_POINT, FLOAT, dataset_of
from edgeft.models import Classifier, build_classifier
from edgeft.progress import Progress
from edgeft.report import EvalReport
from edgeft.runner import Runner
from edgeft.show import exports

_EXPORT = "onnx"
_LISTED = 10


def diagnose(
    ref: Path | None,
    shift: Path | str,
    *,
    run: Path | None = None,
    backbone: ModelConfig | None = None,
    baselines: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Diagnosis:
    """Split the images of `shift` into those in and out of the support of `ref`, and measure a run on both parts.

    With `run`, features are those of its float net, and accuracies are its float net's and, where it has an export "onnx", that
    one's; `ref` None, or the folder that the run was trained on, stands for its ID test images, and `shift` may also name one of its
    shifted splits. Without, features are those of a pretrained `backbone`, the bundled one for None, and there are no accuracies.
    Folders may hold class folders, other folders and files: accuracy is measured where there are labels. `baselines` is a run of the
    same classes that has kept epochs of its training: effective robustness is measured against them, on both parts. `seed` draws the folds.

    Raises DataError for folders that cannot be read, hold no or too few images, or are the same; ConfigError for a run beside a
    backbone, a backbone without weights, and baselines without a run; ArtifactError for a damaged run and for an export of another run.
    """
    progress = progress or Progress(False)
    if baselines is not None and run is None:
        raise ConfigError("baselines were given, and no run to hold against them", "give --run as well")
    if run is not None:
        if backbone is not None:
            raise ConfigError("features come from the run or from a backbone, and both were given", "give one of them")
        subject = _of_run(run)
    else:
        subject = _of_backbone(backbone or ModelConfig())
    family = None if baselines is None else _family(baselines, subject)
    images = _images(ref, shift, subject, progress)
    return _diagnosed(images, subject, family, seed, progress)


def effective_robustness(
    baselines: Path, runs: Sequence[Path], *, ood: str | None = None, progress: Progress | None = None
) -> EffectiveRobustness:
    """Hold every model of runs (float, fixed point, exports) against the line of baselines.

    `baselines` is a CSV file (name, id, ood, n_id, n_ood), or a run that has kept epochs of its training, which are measured on its own
    images. `ood` names the shifted split that is meant; it may be left out where there is only one. Raises DataError for a file or a
    run that does not serve, for fewer than five baselines, and for runs without that split; ArtifactError for a damaged run. The
    baselines themselves are what is compared where `runs` is empty.
    """
    reports = _reports(runs)
    if baselines.is_dir():
        family = Artifact.load(baselines)
        label = choose_split({**reports, str(baselines): family.report()}, ood)
        points = _points(family, label.removeprefix("ood:"), progress or Progress(False))
    else:
        points = read_points(baselines)
        label = choose_split(reports, ood) if runs else ""
    return against(fit_line(points), points_of(reports, label) if runs else points)


def _points(family: Artifact, ood: str, progress: Progress) -> list[Point]:
    dataset = _own_data(family, progress)
    (split,) = (split for split in dataset.ood if split.name == ood)
    return points_of_epochs(family, dataset.id_test, split, progress)


def quantization_robustness(runs: Sequence[Path], *, ood: str | None = None, model: str = FIXED_POINT) -> QuantizationEffect:
    """Hold the fixed-point models of at least five runs against the line of their float models.

    `ood` names the shifted split; it may be left out where there is only one. Raises DataError for too few runs or runs that were
    measured on different images, ArtifactError for a damaged run.
    """
    reports = _reports(runs)
    return quantization_effect(reports, choose_split(reports, ood), model)


def _reports(runs: Sequence[Path]) -> dict[str, EvalReport]:
    """Reports of runs by directory."""
    return {str(run): Artifact.load(run).report() for run in runs}


# What looks at the images


@dataclass(frozen=True)
class _Subject:
    """The net that gives features, the models that are measured, and the run that they are of."""

    classifier: Classifier
    name: str
    short_side: int
    run: Artifact | None = None
    export: Runner | None = None


def _of_run(path: Path) -> _Subject:
    artifact = Artifact.load(path)
    config = Config.model_validate(artifact.manifest.config)
    classifier = float_classifier(artifact)
    name = f"{config.model.backbone}, fine-tuned in float by the run '{path}'"
    return _Subject(classifier, name, short_side(config), artifact, _exported(artifact))


def _exported(run: Artifact) -> Runner | None:
    """The run's export "onnx", if there is one. Raises ArtifactError where it was made from another run."""
    if _EXPORT not in exports(run):
        return None
    artifact = Artifact.load(run.path / "export" / _EXPORT)
    if artifact.manifest.parent != run.digest:
        raise ArtifactError(f"'{artifact.path}' was exported from another run than '{run.path}' now holds", f"edgeft export {run.path}")
    runner: Runner = TARGETS.get(_EXPORT).load(artifact.path)
    return runner


def _family(path: Path, subject: _Subject) -> Artifact:
    """The run whose epochs are the baselines. Raises DataError where its classes are not those of the run that is diagnosed."""
    family = Artifact.load(path)
    assert subject.run is not None
    if family.manifest.classes != subject.run.manifest.classes:
        raise DataError(f"the run '{path}' has other classes than '{subject.run.path}'", "baselines answer the same question")
    return family


def _of_backbone(model: ModelConfig) -> _Subject:
    bundled = model.backbone == ModelConfig().backbone
    if not (bundled or model.pretrained or model.weights):
        raise ConfigError(
            f"backbone '{model.backbone}' has no weights here: features of a random net say nothing about images",
            "take pretrained ones (model.pretrained), a file of them (model.weights), or a run",
        )
    # The head is not looked at; two classes are the fewest that every backbone can be built with.
    classifier = build_classifier(model, DataConfig(), 2, None, 0)
    return _Subject(classifier, f"{model.backbone}, {'bundled' if bundled else 'pretrained'} weights", SHORT_SIDE)


# What is looked at


@dataclass(frozen=True)
class _Images:
    """Both sets with their names, the folders of the shifted one that are no classes, and lines that the user should see."""

    ref: Split
    shift: Split
    ref_name: str
    shift_name: str
    unknown: tuple[str, ...]
    notes: tuple[str, ...]


def _images(ref: Path | None, shift: Path | str, subject: _Subject, progress: Progress) -> _Images:
    """Read both sets: folders, or test splits of the run's own data."""
    if subject.run is None:
        if ref is None:
            raise ConfigError("a reference folder is needed where no run is given", "give a folder of reference images, or a run")
        return _of_folders(ref, Path(shift), class_folders(ref), subject, progress)
    own_shift = any(split.kind == "ood" and split.split == str(shift) for model in subject.run.report().models for split in model.splits)
    source = Config.model_validate(subject.run.manifest.config).data.source
    own_ref = ref is None or ref.expanduser().resolve() == Path(source).expanduser().resolve()
    classes = subject.run.manifest.classes
    if not (own_shift or own_ref):
        assert ref is not None
        images = _of_folders(ref, Path(shift), classes, subject, progress)
        return replace(images, notes=(*images.notes, *_trained_on(ref, source)))
    dataset = _own_data(subject.run, progress)
    own = {split.name: split for split in dataset.ood}
    kept = "the reference are the run's ID test images: features of images that it was trained on would tell all others apart"
    ref_set = PartlyLabelled(dataset.id_test, (), (kept,)) if own_ref else _read(ref, classes, subject, progress)
    shift_set = PartlyLabelled(own[str(shift)], (), ()) if own_shift else _read(Path(shift), classes, subject, progress)
    names = f"ID test images of '{source}'" if own_ref else f"'{ref}'", f"'{shift}'"
    return _joined(ref_set, shift_set, *names)


def _of_folders(ref: Path, shift: Path, classes: Sequence[str], subject: _Subject, progress: Progress) -> _Images:
    if ref.expanduser().resolve() == shift.expanduser().resolve():
        raise DataError(f"the shifted folder '{shift}' is the reference folder itself", "give a folder with other images")
    return _joined(_read(ref, classes, subject, progress), _read(shift, classes, subject, progress), f"'{ref}'", f"'{shift}'")


def _read(folder: Path | None, classes: Sequence[str], subject: _Subject, progress: Progress) -> PartlyLabelled:
    assert folder is not None
    return read_folder(folder.expanduser(), classes, subject.short_side, progress)


def _joined(ref: PartlyLabelled, shift: PartlyLabelled, ref_name: str, shift_name: str) -> _Images:
    notes = [*ref.notes, *shift.notes]
    if ref.unknown:
        notes.append(f"folders of the reference that are no classes of the run, taken without labels: {_names(ref.unknown)}")
    if shift.unknown:
        notes.append(f"shifted folders that are no classes of the reference, taken without labels: {_names(shift.unknown)}")
    return _Images(ref.split, shift.split, ref_name, shift_name, shift.unknown, tuple(notes))


def _trained_on(ref: Path, source: str) -> list[str]:
    """A line where the reference folder lies in the training folder or holds it."""
    given, trained = ref.expanduser().resolve(), Path(source).expanduser().resolve()
    if given not in trained.parents and trained not in given.parents:
        return []
    return [
        f"the run was trained on images in '{source}': what it has learned by heart makes other images look more different than they are"
    ]


def _own_data(run: Artifact, progress: Progress) -> Dataset:
    dataset = dataset_of(run, Config.model_validate(run.manifest.config), progress)
    if not isinstance(dataset, Dataset):
        raise DataError(f"the run's own images cannot be used: {dataset}", "give folders of other images as reference and shift")
    return dataset


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(f"'{name}'" for name in names[:_LISTED]) + more


# Looking


def _diagnosed(images: _Images, subject: _Subject, family: Artifact | None, seed: int, progress: Progress) -> Diagnosis:
    with progress.task("features", len(images.ref) + len(images.shift)) as advance:
        own_name = FLOAT if subject.run is not None else None
        ref, shift = (look(split, subject.classifier, own_name, subject.export, advance) for split in (images.ref, images.shift))
    copies = np.unique([*ref.digests, *shift.digests], return_inverse=True)[1]
    progress.line("cross-fit the classifier of reference and shifted images")
    support = split_support(ref.features, shift.features, copies, seed)
    n_common = int(np.isin(copies[len(images.ref) :], copies[: len(images.ref)]).sum())
    notes = [*images.notes, *([f"{n_common} shifted images are also in the reference"] if n_common else [])]
    outside = support.out_of_support
    return Diagnosis(
        ref=images.ref_name, shift=images.shift_name, backbone=subject.name, n_ref=len(images.ref), n_shift=len(images.shift),
        n_outside=int(outside.sum()), n_ref_outside=int(support.ref_out_of_support.sum()),
        auc=support.auc, auc_interval=support.auc_interval, unknown=images.unknown,
        models=tuple(_parts(model, ref.tops[model], shift.tops[model], images, outside) for model in ref.tops), notes=tuple(notes),
        robustness=() if family is None else _robustness(images, ref.tops, shift.tops, outside, family, progress),
    )  # fmt: skip


def _robustness(
    images: _Images, ref: dict[str, Predictions], shift: dict[str, Predictions], outside: NDArray[np.bool_], family: Artifact,
    progress: Progress,
) -> tuple[PartRobustness, ...]:  # fmt: skip
    """The models and the family on the labelled images of both sets."""

    def hits(tops: Sequence[Predictions]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        of_ref, of_shift = ((top == split.labels)[split.labels >= 0] for top, split in zip(tops, (images.ref, images.shift), strict=True))
        return of_ref, of_shift

    if not (images.ref.labels >= 0).any():
        raise DataError("the reference has no labelled images: no accuracy can be expected of it", "give class folders as reference")
    baselines = {name: hits(tops) for name, tops in answers(family, (images.ref, images.shift), progress).items()}
    models = {name: hits((ref[name], shift[name])) for name in ref}
    return part_robustness(baselines, models, outside[images.shift.labels >= 0])


def _parts(model: str, ref: Predictions, shift: Predictions, images: _Images, outside: NDArray[np.bool_]) -> Parts:
    everything = np.ones(len(shift), bool)
    of_shift = (_accuracy(shift, images.shift, chosen) for chosen in (everything, ~outside, outside))
    return Parts(model, _accuracy(ref, images.ref, np.ones(len(ref), bool)), *of_shift)


def _accuracy(top: Predictions, split: Split, chosen: NDArray[np.bool_]) -> Accuracy:
    """Over the chosen images that have a label."""
    counted = chosen & (split.labels >= 0)
    return Accuracy(int((top == split.labels)[counted].sum()), int(counted.sum()))
