"""evaluate(): a run or an export through the evaluation suite, float and fixed point side by side where both are at hand."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgeft.artifact import Artifact
from edgeft.bench.peers import float_classifier
from edgeft.config import Config
from edgeft.data import Dataset, Split
from edgeft.data.loading import short_side
from edgeft.data.preprocess import Preprocessing
from edgeft.errors import ArtifactError, ConfigError, DataError, UnsupportedError
from edgeft.evaluation.corruptions import SEVERITIES, Selection, selected
from edgeft.evaluation.results import EvaluationReport
from edgeft.evaluation.sets import TestSet, load_sets, read_groups
from edgeft.evaluation.suite import Settings, Subject, evaluate_subjects
from edgeft.export import TARGETS
from edgeft.exporting import FIXED_POINT, FLOAT, dataset_of
from edgeft.interpret import Interpreter
from edgeft.pipeline import FloatModel
from edgeft.progress import Progress
from edgeft.runner import Images, Runner
from edgeft.show import exports

_EXPORT = "onnx"


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
    progress: Progress | None = None,
) -> EvaluationReport:
    """Evaluate a run, float and fixed point, or one export, beside the float model where its run is found around it.

    `corruptions` ("none", "subset", "all", or names) of the ID test set are measured at `severities`; at most `n` images of each set are
    (None: all). `sets` are further class-per-folder test sets by name; `maps` and `masks` are files that say what their classes mean
    (see labelmaps); `groups` are CSV files (file, group[, label]) for sets by name. Logits are kept in the folder `cache` and read from
    there the next time; without one they are thrown away. Raises DataError when the run's data are not at hand or a set is empty,
    ConfigError for unknown corruptions, sets and severities, ArtifactError for a damaged run.
    """
    progress = progress or Progress(False)
    settings = Settings(selected(corruptions), tuple(dict.fromkeys(severities)), n)
    artifact = Artifact.load(path)
    config = Config.model_validate(artifact.manifest.config)
    dataset = _data(artifact, config, progress)
    _require_known(maps, masks, groups, sets or {}, dataset)
    extra, notes = _extra(sets or {}, maps or {}, masks or {}, dataset, config, progress)
    with _folder(cache) as folder:
        subjects, how = _subjects(artifact, folder)
        return evaluate_subjects(
            subjects, dataset, Preprocessing.from_json(artifact.manifest.preprocessing), settings, run=str(path), cache=folder,
            extra=extra, groups=_groups(groups or {}, [*dataset.tests, *(one.split for one in extra)], dataset.classes),
            notes=[*dataset.notes, *how, *notes], progress=progress,
        )  # fmt: skip


@contextlib.contextmanager
def _folder(cache: Path | None) -> Iterator[Path]:
    if cache is not None:
        yield cache
        return
    with tempfile.TemporaryDirectory(prefix="edgeft-evaluate-") as name:
        yield Path(name)


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

    @torch.inference_mode()
    def features(self, images: Images) -> NDArray[np.float32]:
        """Input of the last layer, [n, d]."""
        found: NDArray[np.float32] = self._classifier.features(torch.from_numpy(images).to(self._device)).float().cpu().numpy()
        return found


def _subjects(artifact: Artifact, scratch: Path) -> tuple[list[Subject], list[str]]:
    """The float model first, where there is one, and lines about what computes the fixed-point one."""
    if artifact.manifest.kind == "exported":
        target = artifact.document("export.json")["target"]
        run = _run_of(artifact)
        runner: Runner = TARGETS.get(target).load(artifact.path)
        note = [] if run else ["the run around the export was not found: no float model to compare with"]
        return [*([_float(run)] if run else []), Subject(target, artifact.digest, runner)], note
    runner, how = _fixed_point(artifact, scratch)
    return [_float(artifact), Subject(FIXED_POINT, artifact.digest, runner)], [how]


def _float(run: Artifact) -> Subject:
    model = FloatFeatures(float_classifier(run))
    return Subject(FLOAT, run.digest, model, model.features)


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
            return target.load(export.path), f"'{FIXED_POINT}' is computed by the run's export '{_EXPORT}'"
    folder = scratch / f"{run.digest[:16]}-{_EXPORT}"
    try:
        target.export(run, folder)
    except UnsupportedError as error:
        return Interpreter(run.graph()), f"'{FIXED_POINT}' is computed by the interpreter, slowly: {error.message}"
    return target.load(folder), f"'{FIXED_POINT}' is computed in ONNX Runtime by an export made for this evaluation"
