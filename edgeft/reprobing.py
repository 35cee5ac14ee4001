"""reprobe(): a finished run for another target from a few labelled images of it; only the head changes, the integer backbone stays."""

import os
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeft.artifact import Artifact, write_artifact
from edgeft.config import Config
from edgeft.data import Dataset, Split
from edgeft.data.folders import FolderImages, entries, readable
from edgeft.data.loading import batches, short_side
from edgeft.data.preprocess import Preprocessing
from edgeft.errors import ArtifactError, DataError, UnsupportedError
from edgeft.evaluate import Predictions, evaluate
from edgeft.export import TARGETS
from edgeft.export.verify import golden
from edgeft.exporting import FIXED_POINT, FLOAT, dataset_of, stored
from edgeft.graph import IntegerGraph
from edgeft.heads import Candidate, head_of, last_linear, n_correct, refitted, to_json, with_head
from edgeft.interpret import Interpreter
from edgeft.progress import Progress
from edgeft.quant.formats import LayerFormats, weight_format
from edgeft.report import EvalReport, ModelResult
from edgeft.runner import Runner

DOCUMENT = "reprobe.json"
"""Of which run and which images the head was made, and what it was chosen from."""
_LISTED = 10


@dataclass(frozen=True)
class Reprobed:
    """The new artifact; `record` is the content of reprobe.json, `notes` are lines about images and measurements."""

    artifact: Artifact
    record: dict[str, Any]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """For people."""
        record, chosen = self.record, self.record["candidates"][0]
        before, after, n = record["correct_before"], record["correct_after"], record["images"]
        how = {
            "none": "the old head, which no other one predicts held-out target images better than",
            "head": f"changed along the {record['directions']} directions of the old head, penalty {chosen['penalty']}",
            "all": f"changed in all directions, penalty {chosen['penalty']}",
        }[chosen["directions"]]
        old = next(each for each in record["candidates"] if each["directions"] == "none")
        return [
            f"head       {how}",
            f"target     {n} images, held-out log-loss {old['log_loss']:.3f} -> {chosen['log_loss']:.3f} nats; "
            f"right on the images it was fitted to: {before} -> {after}",
            f"format     weights {record['weight_before']} -> {record['weight_after']}; every other layer is unchanged",
            *(f"note       {note}" for note in self.notes),
            f"wrote {self.artifact.path}",
        ]


def reprobe(run: Path, target: Path, out: Path | None = None, *, progress: Progress | None = None) -> Reprobed:
    """Fit the head of a quantized run again to the few labelled images in `target` (a folder per class); the backbone stays as it is.

    The features are the codes that the last layer reads in the interpreter. The new head is held near the old one; how near, and whether
    along the old head's directions only (after Pro^2, Chen et al., ICLR 2024, arXiv:2302.05441), is what predicts held-out target images
    best. It is rounded to the old weight format, or a coarser one that holds it. Writes an artifact of kind "quantized" to `out`
    (default RUN-reprobed) whose graph differs in the last layer only, measured again where the run's images are at hand.

    Raises ArtifactError for what is no quantized run and for an `out` that holds something, DataError for classes that are not the run's
    and folders without images, UnsupportedError for a network without a linear head or a head that no format holds.
    """
    progress = progress or Progress(False)
    artifact, out = Artifact.load(run), out or run.with_name(f"{run.name}-reprobed")
    if artifact.manifest.kind != "quantized":
        raise ArtifactError(f"'{run}' is an artifact of kind '{artifact.manifest.kind}'; only a quantized run has a head to fit again")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"'{out}' exists and is not an empty folder", "choose another one with --out")
    config, graph = Config.model_validate(artifact.manifest.config), artifact.graph()
    last_linear(graph)
    split, notes = target_images(target, artifact.manifest.classes, short_side(config), progress)
    features = _features(graph, split, Preprocessing.from_json(artifact.manifest.preprocessing), progress)
    old = head_of(graph)
    head, candidates = refitted(old, features, split.labels)
    changed = with_head(graph, head)
    record = _record(artifact, target, split, candidates, graph, changed) | {
        "directions": min(len(old.weight) - 1, old.weight.shape[1]),
        "correct_before": n_correct(old, features, split.labels), "correct_after": n_correct(head_of(changed), features, split.labels),
    }  # fmt: skip
    notes += _tested(config, target)
    with tempfile.TemporaryDirectory() as folder:
        unmeasured = _write(Path(folder) / "run", artifact, changed, record, None)
        measured = _measure(unmeasured, config, Path(folder) / "onnx", progress)
    if isinstance(measured, str):
        notes.append(f"not measured again: {measured}")
    return Reprobed(_write(out, artifact, changed, record, None if isinstance(measured, str) else measured), record, tuple(notes))


def target_images(folder: Path, classes: tuple[str, ...], short_side: int, progress: Progress) -> tuple[Split, list[str]]:
    """The images of a folder with one sub-folder for each of `classes`, and lines about what was left out.

    Raises DataError where the sub-folders are not exactly the classes, or one holds no image.
    """
    notes: list[str] = []
    root = folder.expanduser()
    folders = {unicodedata.normalize("NFC", path.name): path for path in entries(root) if os.path.isdir(path)}
    missing, extra = [name for name in classes if name not in folders], [name for name in folders if name not in classes]
    if missing or extra:
        said = [f"{what}: {_names(names)}" for what, names in (("missing", missing), ("unknown", extra)) if names]
        raise DataError(f"the classes in '{root}' are not those of the run; {'; '.join(said)}", f"the run has {_names(classes)}")
    found = [[path for path in entries(folders[name]) if not os.path.isdir(path)] for name in classes]
    good = set(readable([path for paths in found for path in paths], root, notes, progress))
    kept = [[path for path in paths if path in good] for paths in found]
    empty = [name for name, paths in zip(classes, kept, strict=True) if not paths]
    if empty:
        raise DataError(f"no images of {_names(empty)} in '{root}'", "a few of each class are needed")
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in kept])
    return Split("target", "train", FolderImages(tuple(path for paths in kept for path in paths), short_side), labels), notes


def _names(names: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(f"'{name}'" for name in names[:_LISTED]) + more


def _features(graph: IntegerGraph, split: Split, p: Preprocessing, progress: Progress) -> NDArray[np.float64]:
    """Real values [n, d] of what the last layer reads."""
    interpreter, name = Interpreter(graph), last_linear(graph).input
    rows = []
    with progress.task(f"integer features of {len(split)} target images", len(split)) as advance:
        for images, _ in batches(split, p, 8):
            rows.append(interpreter.layers(images)[name])
            advance(len(images))
    features: NDArray[np.float64] = np.ldexp(np.concatenate(rows).astype(np.float64), -graph.format(name).frac)
    return features


def _tested(config: Config, target: Path) -> list[str]:
    """A line for each shifted test set that holds images which the head was fitted to."""
    here, found = target.expanduser().resolve(), []
    for text in config.data.ood:
        there = Path(text.rpartition("=")[2]).expanduser().resolve()
        if here == there or here in there.parents or there in here.parents:
            found.append(f"shifted test set '{text}' holds images that the head was fitted to: its accuracy is not that of new images")
    return found


def _record(
    artifact: Artifact, target: Path, split: Split, candidates: list[Candidate], graph: IntegerGraph, changed: IntegerGraph
) -> dict[str, Any]:
    formats = [str(weight_format(last_linear(each).weight_frac[0])) for each in (graph, changed)]
    return {
        "parent": artifact.digest, "run": str(artifact.path), "target": str(target), "images": len(split),
        "images_per_class": np.bincount(split.labels).tolist(), "candidates": to_json(candidates),
        "weight_before": formats[0], "weight_after": formats[1],
    }  # fmt: skip


def _measure(artifact: Artifact, config: Config, folder: Path, progress: Progress) -> tuple[ModelResult, dict[str, Predictions]] | str:
    """The fixed-point model on the run's test splits; or why they cannot be had any more."""
    dataset = dataset_of(artifact, config, progress)
    if not isinstance(dataset, Dataset):
        return dataset
    p = Preprocessing.from_json(artifact.manifest.preprocessing)
    result, found = evaluate(_runner(artifact, folder), dataset, p, float_predictions=stored(artifact, FLOAT), progress=progress)
    return ModelResult(FIXED_POINT, result.splits), found


def _runner(artifact: Artifact, folder: Path) -> Runner:
    """The network in ONNX Runtime, which is faster than the interpreter and was just compared with it; else the interpreter."""
    onnx = TARGETS.get("onnx")
    try:
        onnx.export(artifact, folder)
    except UnsupportedError:
        return Interpreter(artifact.graph())
    runner: Runner = onnx.load(folder)
    return runner


def _write(
    out: Path, parent: Artifact, graph: IntegerGraph, record: dict[str, Any], measured: tuple[ModelResult, dict[str, Predictions]] | None
) -> Artifact:
    """The parent with another graph; the float model, which is not changed, keeps its measurements."""
    manifest = parent.manifest
    names = {kind: [name for name in manifest.files if name.endswith(kind)] for kind in (".safetensors", ".json")}
    arrays = {name: parent.arrays(name) for name in names[".safetensors"]}
    documents = {name: parent.document(name) for name in names[".json"]} | {DOCUMENT: record}
    report = EvalReport(tuple(result for result in parent.report().models if result.model == FLOAT))
    arrays["predictions.safetensors"] = {f"{FLOAT}/{split}": top for split, top in stored(parent, FLOAT).items()}
    if measured is not None:
        report = report.with_model(measured[0])
        arrays["predictions.safetensors"] |= {f"{FIXED_POINT}/{split}": top for split, top in measured[1].items()}
    samples = parent.samples()
    arrays |= {"weights.safetensors": dict(graph.constants)}
    arrays["samples.safetensors"] = {"labels": samples["labels"], **golden(graph, samples["images"])}
    documents |= {"graph.json": graph.to_json(), "report.json": report.to_json(), "formats.json": _formats(parent, graph)}
    return write_artifact(
        out, kind="quantized", config=manifest.config, seed=manifest.seed, preprocessing=manifest.preprocessing,
        classes=manifest.classes, arrays=arrays, documents=documents, parent=parent.digest,
    )  # fmt: skip


def _formats(parent: Artifact, graph: IntegerGraph) -> dict[str, Any]:
    """The parent's table with the last layer's row made anew."""
    op, table = last_linear(graph), parent.formats()
    weights = tuple(weight_format(frac) for frac in op.weight_frac)
    sigma, bits = float(head_of(graph).weight.std()), graph.accumulator_bound(op).bit_length() + 1
    row = LayerFormats(weights, graph.format(op.input), None, sigma, bits).to_json()
    return table | {"layers": table["layers"] | {op.output: row}}
