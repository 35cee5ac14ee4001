"""Suite runs: tabulate finished runs and their exports; nothing is measured again."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import Machine, write
from edgeft.artifact import Artifact, is_finished
from edgeft.config import Config
from edgeft.errors import ArtifactError, ConfigError
from edgeft.methods.baselines import epochs_of
from edgeft.report import EvalReport, ModelResult, SplitResult

Splits = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Finished:
    """One run under its name in the table, with its exports by target. `report` holds the run's models and every exported one."""

    name: str
    artifact: Artifact
    exports: dict[str, Artifact]
    report: EvalReport

    @classmethod
    def read(cls, name: str, path: Path) -> "Finished":
        """Open a run and what is in its export folder; a name "LP:float" keeps the float model only.

        Raises ArtifactError when one is damaged, or exported from another run, ConfigError for a model that the run does not have.
        """
        name, _, only = name.partition(":")
        artifact = Artifact.load(path)
        report, exports = artifact.report(), {}
        for folder in sorted(entry for entry in (path / "export").glob("*") if is_finished(entry)):
            exported = Artifact.load(folder)
            if exported.manifest.parent != artifact.digest:
                raise ArtifactError(
                    f"'{folder}' was not exported from the run as it is now", f"edgeft export {path} --target {folder.name}"
                )
            exports[folder.name] = exported
            for result in exported.report().models:
                report = report if report.model(result.model) else report.with_model(result)
        if only and report.model(only) is None:
            known = ", ".join(f"'{result.model}'" for result in report.models)
            raise ConfigError(f"run '{name}' has no model '{only}'", f"it has: {known}")
        kept = tuple(result for result in report.models if only in ("", result.model))
        return cls(name, artifact, {} if only else exports, EvalReport(kept))

    @property
    def config(self) -> Config:
        """The run's resolved configuration."""
        return Config.model_validate(self.artifact.manifest.config)

    @property
    def splits(self) -> Splits:
        """Labels of the test splits with their numbers of images."""
        return tuple((split.label, split.n) for split in self.report.models[0].splits)


def parse(text: str) -> tuple[str, Path]:
    """'NAME=DIR' or 'NAME:MODEL=DIR' to its two parts. Raises ConfigError when one is missing."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ConfigError(f"'{text}' is not of the form NAME=DIR or NAME:MODEL=DIR", "example: LP:float=runs/lp LP-FT=runs/lpft")
    return name, Path(path)


def columns_of(splits: Splits) -> list[str]:
    """Table columns: one for each split, with its number of images."""
    return ["method", "model", *(f"{label} (n={n})" for label, n in splits), "mean OOD", "flips %"]


def rows_of(runs: Sequence[Finished]) -> list[list[str]]:
    """A row for each method and model: top-1 in percent with its 95 % Wilson interval; flips over all test images together."""
    return [
        [run.name, result.model, *map(_accuracy, result.splits), _mean(result), _flips(result)]
        for run in runs
        for result in run.report.models
    ]


def _accuracy(split: SplitResult) -> str:
    low, high = split.interval
    return f"{100 * split.top1:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _mean(result: ModelResult) -> str:
    return "-" if result.mean_ood is None else f"{100 * result.mean_ood:.1f}"


def _flips(result: ModelResult) -> str:
    flips = [split.flips for split in result.splits if split.flips is not None]
    return f"{100 * sum(flips) / sum(split.n for split in result.splits):.1f}" if len(flips) == len(result.splits) else "-"


def check_comparable(runs: Sequence[Finished]) -> None:
    """Raises ConfigError when runs were measured on other images, trained on other data, or are of another backbone or seed."""
    first, *others = runs
    for run in others:
        same = {
            "test splits": (first.splits, run.splits),
            "data": (first.config.data, run.config.data),
            "backbone": (first.config.model, run.config.model),
            "seed": (first.config.seed, run.config.seed),
            "preprocessing": (first.artifact.manifest.preprocessing, run.artifact.manifest.preprocessing),
            "versions": (first.artifact.manifest.versions, run.artifact.manifest.versions),
        }
        different = [what for what, (one, other) in same.items() if one != other]
        if different:
            raise ConfigError(f"runs '{first.name}' and '{run.name}' cannot stand in one table: they differ in {', '.join(different)}")


def run(name: str, title: str, named: Sequence[tuple[str, Path]], out: Path) -> Path:
    """Write the table of the named runs as suite `name`.

    Raises ArtifactError for a run that is missing or damaged, ConfigError for runs that cannot be compared.
    """
    if not named:
        raise ConfigError("no run was given", "example: LP=runs/photos-lp-0 LP-FT=runs/photos-lpft-0")
    runs = [Finished.read(*pair) for pair in named]
    check_comparable(runs)
    first = runs[0]
    sizes = runs[-1].artifact.document("training.json")["images"]
    options = {"runs": {run.name: portable(run.artifact.manifest.config) for run in runs}}
    return write(
        out, Machine.look(1), suite=name, title=title, columns=columns_of(first.splits), rows=rows_of(runs),
        notes=_notes(runs, sizes), options=options, n=sizes | dict(first.splits),
        versions=first.artifact.manifest.versions,
        measurements=[
            {
                "name": run.name, "digest": run.artifact.digest, "report": run.report.to_json(),
                "exports": {target: export.digest for target, export in run.exports.items()},
            }
            for run in runs
        ],
    )  # fmt: skip


def portable(config: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration with the last part of every path: where the files lay says nothing about the result."""
    tree: dict[str, Any] = copy.deepcopy(config)
    tree["out"] = None
    data, model = tree["data"], tree["model"]
    named = [text.rpartition("=") for text in data["ood"]]
    data["source"], data["ood"] = Path(data["source"]).name, [f"{name}{equals}{Path(path).name}" for name, equals, path in named]
    model["weights"] = model["weights"] and Path(model["weights"]).name
    return tree


def _notes(runs: Sequence[Finished], sizes: dict[str, int]) -> list[str]:
    config, p = runs[0].config, runs[0].artifact.manifest.preprocessing
    counts = "".join(f", {n} {what} images" for what, n in sizes.items())
    digests = "; ".join(", ".join([f"{run.name} {run.artifact.digest[:12]}", *_exports(run)]) for run in runs)
    notes = [
        "Top-1 in percent with its 95 % Wilson interval; flips are test images whose class differs from the float model's.",
        f"Backbone {config.model.backbone} at {p['size']} px{counts}, seed {config.seed}; {epochs_of(config)} epochs per learning rate; "
        "learning rate, penalty and epoch are selected on the ID validation split.",
        *(f"{run.name} in fixed point: {_recipe(run)}." for run in runs if len(run.report.models) > 1),
        f"Digests: {digests}.",
    ]
    compared = [f"{run.name}: {n}" for run in runs for n in _compared(run)]
    if compared:
        notes.append(f"Exported models have 0 differing codes in any layer; test images compared: {', '.join(compared)}.")
    return notes


def _recipe(run: Finished) -> str:
    quant = run.config.quant
    kept = run.artifact.document("training.json")["qat"].get("epoch", 0)
    return f"profile {quant.profile}, formats {quant.format} per {quant.granularity}, {quant.qat_epochs} epochs of QAT, epoch {kept} kept"


def _exports(run: Finished) -> list[str]:
    return [f"{target} {export.digest[:12]}" for target, export in run.exports.items()]


def _compared(run: Finished) -> list[int]:
    """How many test images each export was compared on; those exported without the data are left out."""
    documents = [export.document("export.json") for export in run.exports.values()]
    return [document["compared_images"] for document in documents if "compared_images" in document]
