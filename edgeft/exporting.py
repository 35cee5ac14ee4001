"""export(): a run to each target, verified code for code, and measured where the run's images are at hand."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeft.artifact import Artifact, write_artifact
from edgeft.config import Config
from edgeft.data import Dataset
from edgeft.data.loading import drawn, load_dataset, subset
from edgeft.data.preprocess import Preprocessing
from edgeft.errors import ConfigError, DataError, VerificationError
from edgeft.evaluate import Predictions
from edgeft.evaluate import evaluate as evaluate_runner
from edgeft.export import TARGETS, ExportResult
from edgeft.export.verify import golden, verify
from edgeft.interpret import Interpreter
from edgeft.progress import Progress
from edgeft.report import ModelResult, render
from edgeft.runner import Images

FLOAT, FIXED_POINT = "float", "fixed point"
"""Names of the two models that every run has been measured with."""
DOCUMENTS = ("manifest.json", "report.json", "export.json", "graph.json", "weights.safetensors", "samples.safetensors")
"""What every export has beside its target's own files."""


def export(
    run: Path, targets: Sequence[str] = ("onnx",), out: Path | None = None, *, evaluate: bool = True, progress: Progress | None = None
) -> list[ExportResult]:
    """Export a run to each target, verify it code for code, and measure the exported model where the run's data are at hand.

    Writes `out`/<target> (default RUN/export/<target>), each an artifact of kind "exported" that can be verified and used without the
    run. Raises VerificationError when a single code differs, UnsupportedError when a target cannot express the network, ArtifactError
    for a damaged run.
    """
    progress = progress or Progress(False)
    for name in targets:
        TARGETS.entry(name)
    artifact = Artifact.load(run)
    config = Config.model_validate(artifact.manifest.config)
    dataset = dataset_of(artifact, config, progress) if evaluate else None
    return [_export_one(artifact, name, (out or artifact.path / "export") / name, dataset, config, progress) for name in targets]


def golden_images(dataset: Dataset, p: Preprocessing, config: Config) -> tuple[Images, NDArray[np.int64]]:
    """The test images that a run's artifact keeps, and their labels."""
    n, seed = config.verify.golden, config.seed + 1
    labels = [split.labels[index] for split, index in drawn(dataset.tests, n, seed)]
    return subset(dataset.tests, p, n, seed), np.array(labels, np.int64)


def stored(artifact: Artifact, model: str) -> dict[str, Predictions]:
    """Top classes that a model gave when the run was measured, by split."""
    arrays = artifact.arrays("predictions.safetensors")
    return {key.removeprefix(f"{model}/"): top for key, top in arrays.items() if key.startswith(f"{model}/")}


def _export_one(
    artifact: Artifact, name: str, out: Path, dataset: Dataset | str | None, config: Config, progress: Progress
) -> ExportResult:
    result: ExportResult = TARGETS.get(name).export(artifact, out)
    dataset = result.not_run or dataset
    report, lines, summary = artifact.report(), list(result.lines), dict(result.summary)
    if isinstance(dataset, Dataset):
        n = _compare(artifact, result, dataset, config, progress)
        measured, found = _measure(artifact, result, dataset, progress)
        if not result.converted:
            _check_predictions(name, found, stored(artifact, FIXED_POINT))
        report = report.with_model(measured)
        summary |= {"compared_images": n, "report": report.to_json()}
        lines += [f"       0 differing codes in {len(result.graph.tensors)} tensors on {n} test images", "", render(report)]
    elif dataset is not None:
        lines.append(f"       accuracy not measured: {dataset}")
    samples = artifact.samples()
    kept = {key: samples[key] for key in ("labels",) if key in samples} | golden(result.graph, samples["images"])
    summary["runtimes"] = [] if result.not_run else _runtimes(result, samples["images"])
    lines[len(result.lines) : len(result.lines)] = [_line(row, len(samples["images"])) for row in summary["runtimes"][1:]]
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and path.name not in DOCUMENTS)
    write_artifact(
        out, kind="exported", config=artifact.manifest.config, seed=artifact.manifest.seed, preprocessing=artifact.manifest.preprocessing,
        classes=artifact.manifest.classes, existing=files, parent=artifact.digest,
        arrays={"weights.safetensors": dict(result.graph.constants), "samples.safetensors": kept},
        documents={"graph.json": result.graph.to_json(), "report.json": report.to_json(), "export.json": {"target": name, **summary}},
    )  # fmt: skip
    return ExportResult(result.target, result.path, result.graph, summary, tuple(lines))


def _runtimes(result: ExportResult, images: Images) -> list[dict[str, Any]]:
    """What every runtime at hand executes, and on how many golden images it gives other logits than the interpreter."""
    expected = Interpreter(result.graph).logits(images)
    rows = []
    for runner in TARGETS.get(result.target).runtimes(result.path):
        differing = int((runner.logits(images) != expected).any(axis=1).sum())
        about = {"runner": runner.name, "runtime": runner.runtime, "golden_images_that_differ": differing}
        rows.append(about | dataclasses.asdict(runner.executes()))
    return rows


def _line(row: dict[str, Any], n: int) -> str:
    """One runtime for people."""
    differing, in_float = row["golden_images_that_differ"], len(row["in_float"])
    verdict = "the same logits" if not differing else f"OTHER logits on {differing} of them"
    return f"       {row['runtime']}: {verdict} on {n} golden images" + (f"; {in_float} operations in float" if in_float else "")


def _compare(artifact: Artifact, result: ExportResult, dataset: Dataset, config: Config, progress: Progress) -> int:
    """Every layer of the exported model against the interpreter on test images; how many there were."""
    runner, p = TARGETS.get(result.target).load(result.path), Preprocessing.from_json(artifact.manifest.preprocessing)
    images = subset(dataset.tests, p, config.verify.samples, config.seed)
    reference = Interpreter(result.graph)
    with progress.task(f"compare every layer of '{result.target}' on {len(images)} images", len(images)) as advance:
        for start in range(0, len(images), 32):
            advance(verify(reference, runner, images[start : start + 32]))
    return len(images)


def _measure(artifact: Artifact, result: ExportResult, dataset: Dataset, progress: Progress) -> tuple[ModelResult, dict[str, Predictions]]:
    runner, p = TARGETS.get(result.target).load(result.path), Preprocessing.from_json(artifact.manifest.preprocessing)
    return evaluate_runner(runner, dataset, p, float_predictions=stored(artifact, FLOAT), progress=progress)


def _check_predictions(target: str, found: dict[str, Predictions], expected: dict[str, Predictions]) -> None:
    for split, top in expected.items():  # A run whose head was fitted again away from its data has none.
        differing = int((top != found[split]).sum())
        if differing:
            raise VerificationError(
                f"'{target}' classifies {differing} of {len(top)} images of '{split}' otherwise than the run did",
                "every layer is equal on the compared images; if other images changed since the run, repeat it or use --no-evaluate",
            )


def dataset_of(artifact: Artifact, config: Config, progress: Progress) -> Dataset | str:
    """The data that the run was measured on; or why they cannot be had any more."""
    try:
        dataset = load_dataset(config, progress, training=False)
    except (DataError, ConfigError) as error:
        return error.message
    counts = {split.split: split.n for split in artifact.report().models[0].splits}
    p = Preprocessing.from_json(artifact.manifest.preprocessing)
    same = {split.name: len(split) for split in dataset.tests} == counts
    if not same or not np.array_equal(golden_images(dataset, p, config)[0], artifact.samples()["images"]):
        return f"the images of '{config.data.source}' are not those that the run was measured on"
    return dataset
