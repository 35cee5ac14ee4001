"""evaluate(): a run or an export through the evaluation suite, float and fixed point side by side where both are at hand."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgeft.artifact import Artifact
from edgeft.bench.peers import float_classifier
from edgeft.config import Config
from edgeft.data import Dataset, Split
from edgeft.data.loading import short_side, subset
from edgeft.data.preprocess import Preprocessing
from edgeft.errors import ArtifactError, ConfigError, DataError, UnsupportedError
from edgeft.evaluation.corruptions import SEVERITIES, Selection, selected
from edgeft.evaluation.counting import count_shares
from edgeft.evaluation.movement import Moved
from edgeft.evaluation.results import EvaluationReport
from edgeft.evaluation.saturating import Saturation
from edgeft.evaluation.sets import TestSet, load_sets, read_groups
from edgeft.evaluation.suite import Settings, Subject, evaluate_subjects
from edgeft.export import TARGETS
from edgeft.exporting import FIXED_POINT, FLOAT, dataset_of
from edgeft.interpret import Interpreter
from edgeft.models import Classifier, build_classifier
from edgeft.pipeline import FloatModel
from edgeft.progress import Progress
from edgeft.runner import Images, Runner
from edgeft.show import exports

_EXPORT = "onnx"
SATURATION_IMAGES = 64
"""Images of each further set whose saturated values are counted: the interpreter that does it is slow."""


def evaluate(
    path: Path,
    *,
    corruptions: Selection = "none",
    severities: Sequence[int] = SEVERITIES,
    n: int | None = None,
    sets: Mapping[str, Path] | None = None,
    maps: Mapping[str, Path] | None = None,
    masks: Mapping[str, Path] | None = None,
    groups: Mapping[str, Path] | None = None,
    cache: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Evaluate a run, float and fixed point, or one export, beside the float model where its run is found around it.

    `corruptions` ("none", "subset", "all", or names) of the ID test set are measured at `severities`; at most `n` images of each set are
    (None: all). `sets` are further class-per-folder test sets by name; `maps` and `masks` are files that say what their classes mean
    (see labelmaps); `groups` are CSV files (file, group[, label]) for sets by name. Logits are kept in the folder `cache` and read from
    there the next time; without one they are thrown away. `workers` processes make the corruptions (None: as many as pay). Raises
    DataError when the run's data are not at hand or a set is empty, ConfigError for unknown corruptions, sets and severities,
    ArtifactError for a damaged run.
    """
    progress = progress or Progress(False)
    chosen = selected(corruptions)
    artifact = Artifact.load(path)
    p = Preprocessing.from_json(artifact.manifest.preprocessing)
    settings = Settings(chosen, tuple(dict.fromkeys(severities)), n, batch=_batch(p.size), workers=workers)
    config = Config.model_validate(artifact.manifest.config)
    dataset = _data(artifact, config, progress)
    _require_known(maps, masks, groups, sets or {}, dataset)
    extra, notes = _extra(sets or {}, maps or {}, masks or {}, dataset, config, progress)
    run = _run_of(artifact) if artifact.manifest.kind == "exported" else artifact
    with _folder(cache) as folder, _one_thread_each():
        subjects, how = _subjects(artifact, run, folder)
        found = evaluate_subjects(
            subjects, dataset, p, settings, run=str(path), cache=folder,
            extra=extra, groups=_groups(groups or {}, [*dataset.tests, *(one.split for one in extra)], dataset.classes),
            notes=[*dataset.notes, *how, *notes], progress=progress,
        )  # fmt: skip
    return found if run is None else _with_inside(found, run, [one.split for one in extra], p, progress)


@contextlib.contextmanager
def _folder(cache: Path | None) -> Iterator[Path]:
    if cache is not None:
        yield cache
        return
    with tempfile.TemporaryDirectory(prefix="edgeft-evaluate-") as name:
        yield Path(name)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let torch compute in the thread that asks: there are as many as CPUs, each with images of its own, which wastes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _batch(size: int) -> int:
    """Images at a time: fewer large ones, as a batch is in work in every thread."""
    return max(4, min(64, 64 * 64 * 64 // (size * size)))


# Data


def _data(artifact: Artifact, config: Config, progress: Progress) -> Dataset:
    if not artifact.report().models:
        raise ArtifactError(f"'{artifact.path}' has never been measured, so there is no telling which images belong to it")
    dataset = dataset_of(artifact, config, progress)
    if isinstance(dataset, str):
        raise DataError(f"the data of '{artifact.path}' are not at hand: {dataset}", "restore them where the run found them")
    return dataset


def _require_known(
    maps: Mapping[str, Path] | None,
    masks: Mapping[str, Path] | None,
    groups: Mapping[str, Path] | None,
    sets: Mapping[str, Path],
    dataset: Dataset,
) -> None:
    own = [split.name for split in dataset.tests]
    for name in sets:
        if name in own:
            raise ConfigError(f"the test set '{name}' has the name of one of the run's own", f"taken: {', '.join(own)}")
    for what, given, known in (("map", maps, list(sets)), ("mask", masks, list(sets)), ("groups", groups, [*own, *sets])):
        for name in given or {}:
            if name not in known:
                raise ConfigError(
                    f"{what} given for the test set '{name}', which is not measured", f"measured: {', '.join(known) or 'none'}"
                )


def _extra(
    sets: Mapping[str, Path], maps: Mapping[str, Path], masks: Mapping[str, Path], dataset: Dataset, config: Config, progress: Progress
) -> tuple[list[TestSet], list[str]]:
    found: list[TestSet] = []
    notes: list[str] = []
    bound = short_side(config)
    for name, folder in sets.items():
        files = {"map_file": maps.get(name), "mask_file": masks.get(name)}
        loaded, lines = load_sets(name, folder, dataset.classes, **files, short_side=bound, progress=progress)
        found += loaded
        notes += lines
    return found, notes


def _groups(files: Mapping[str, Path], splits: Sequence[Split], classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    return {split.name: read_groups(files[split.name], split, classes) for split in splits if split.name in files}


# Models


class FloatFeatures(FloatModel):
    """The float model, whose features can be looked at."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How its images are prepared."""
        return self._classifier.preprocessing

    @property
    def on_cpu(self) -> bool:
        """Whether it runs on the CPU."""
        return self._device.type == "cpu"

    @torch.inference_mode()
    def features(self, images: Images) -> NDArray[np.float32]:
        """Input of the last layer, [n, d]."""
        found: NDArray[np.float32] = self._classifier.features(torch.from_numpy(images).to(self._device)).float().cpu().numpy()
        return found


def _subjects(artifact: Artifact, run: Artifact | None, scratch: Path) -> tuple[list[Subject], list[str]]:
    """The float model of the run first, where there is one, and lines about what computes the fixed-point one."""
    before, notes = _float(run) if run else (None, ["the run around the export was not found: no float model to compare with"])
    if artifact.manifest.kind == "exported":
        target = artifact.document("export.json")["target"]
        runner: Runner = TARGETS.get(target).load(artifact.path, threads=1)
        name = target
    else:
        runner, how = _fixed_point(artifact, scratch)
        name, notes = FIXED_POINT, [how, *notes]
    subject = Subject(name, artifact.digest, runner, concurrent=not isinstance(runner, Interpreter))
    return [*([before] if before else []), subject], notes


def _float(run: Artifact) -> tuple[Subject, list[str]]:
    """The float model, with the features that fine-tuning started from where the pretrained weights are at hand; a line where not."""
    model = FloatFeatures(float_classifier(run))
    subject = Subject(FLOAT, run.digest, model, model.features, concurrent=model.on_cpu)
    config = Config.model_validate(run.manifest.config)
    if config.train.method == "flyp":
        return subject, ["movement by fine-tuning not measured: the run started from the image tower of a CLIP"]
    try:
        start = build_classifier(config.model, config.data, len(run.manifest.classes), model.preprocessing.size, config.seed)
    except ConfigError as error:
        return subject, [f"movement by fine-tuning not measured: {error.message}"]
    before = FloatFeatures(Classifier(start.net, model.preprocessing))
    return replace(subject, features_before=before.features), []


def _run_of(export: Artifact) -> Artifact | None:
    """The run that an export lies in, if it is the one that it was made from."""
    with contextlib.suppress(ArtifactError):
        run = Artifact.load(export.path.resolve().parent.parent)
        return run if run.digest == export.manifest.parent else None
    return None


def _fixed_point(run: Artifact, scratch: Path) -> tuple[Runner, str]:
    """The run's integers in ONNX Runtime: its own export, or one made here; the slow interpreter for nets that ONNX cannot express."""
    target = TARGETS.get(_EXPORT)
    if _EXPORT in exports(run):
        export = Artifact.load(run.path / "export" / _EXPORT)
        if export.manifest.parent == run.digest:
            return target.load(export.path, threads=1), f"'{FIXED_POINT}' is computed by the run's export '{_EXPORT}'"
    folder = scratch / f"{run.digest[:16]}-{_EXPORT}"
    try:
        target.export(run, folder)
    except UnsupportedError as error:
        return Interpreter(run.graph()), f"'{FIXED_POINT}' is computed by the interpreter, slowly: {error.message}"
    return target.load(folder, threads=1), f"'{FIXED_POINT}' is computed in ONNX Runtime by an export made for this evaluation"


# Inside the nets


def _with_inside(found: EvaluationReport, run: Artifact, extra: Sequence[Split], p: Preprocessing, progress: Progress) -> EvaluationReport:
    """The report with what happens inside the run's nets: how far its head moved, what saturates."""
    movement, notes = found.movement, list(found.notes)
    if movement is not None:
        tuned = [stage for stage in run.document("training.json")["stages"] if stage["stage"]["solver"] != "lbfgs"]
        if tuned and "head_moved" in tuned[-1]:
            movement = replace(movement, head=Moved(**tuned[-1]["head_moved"]))
        else:
            why = "not recorded by the run" if tuned else "none since the linear probe, which is its head"
            notes.append(f"movement of the head: {why}")
    if "saturation.json" not in run.manifest.files:
        return replace(found, movement=movement, notes=(*notes, "saturation: not recorded by the run"))
    saturation = Saturation.of_run(run.document("saturation.json"))
    graph = run.graph()
    with progress.task("count saturated values", sum(min(len(split), SATURATION_IMAGES) for split in extra)) as advance:
        for split in extra:
            images = subset([split], p, SATURATION_IMAGES, Config.model_validate(run.manifest.config).seed)
            saturation = saturation.with_set(f"ood:{split.name}", len(images), count_shares(graph, images))
            advance(len(images), split.name)
    return replace(found, movement=movement, saturation=saturation, notes=tuple(notes))
