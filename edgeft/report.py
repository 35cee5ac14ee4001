"""EvalReport: accuracy per split with its interval, in and out of distribution; text table and JSON. Standard library only."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from edgeft.errors import ArtifactError

SCHEMA = 1
Z_95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion, as fractions (Wilson 1927); (0, 1) when nothing was measured."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = correct / n, Z_95 * Z_95
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends the bound is exactly 0 or 1; float arithmetic would miss it by an ulp.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == n else centre + half)


@dataclass(frozen=True)
class SplitResult:
    """One model on one split. `flips` counts images whose top class differs from the float model's; None for the float model itself."""

    split: str
    kind: Literal["id", "ood"]
    n: int
    correct: int
    flips: int | None = None

    def __post_init__(self) -> None:
        if self.n < 1 or not 0 <= self.correct <= self.n or not 0 <= (self.flips or 0) <= self.n:
            raise ValueError(f"impossible counts in split '{self.split}': n={self.n}, correct={self.correct}, flips={self.flips}")

    @property
    def label(self) -> str:
        """The name in tables: "id", or "ood:" and the split's name."""
        return self.split if self.kind == "id" else f"ood:{self.split}"

    @property
    def top1(self) -> float:
        """Share of images whose top class is right."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of top1."""
        return wilson(self.correct, self.n)

    @property
    def flip_rate(self) -> float | None:
        """Share of images whose top class differs from the float model's."""
        return None if self.flips is None else self.flips / self.n


@dataclass(frozen=True)
class ModelResult:
    """One model on every test split."""

    model: str
    splits: tuple[SplitResult, ...]

    @property
    def mean_ood(self) -> float | None:
        """Unweighted mean of top1 over the OOD splits; None where there are none."""
        shares = [split.top1 for split in self.splits if split.kind == "ood"]
        return sum(shares) / len(shares) if shares else None

    def split(self, label: str) -> SplitResult | None:
        """The result on the split of that label, if it was measured."""
        return next((split for split in self.splits if split.label == label), None)


@dataclass(frozen=True)
class EvalReport:
    """Models side by side on the same splits, in the order they were measured."""

    models: tuple[ModelResult, ...] = ()

    def model(self, name: str) -> ModelResult | None:
        """The result of one model, if it was measured."""
        return next((result for result in self.models if result.model == name), None)

    def with_model(self, result: ModelResult) -> "EvalReport":
        """This report with one more model; a result of the same name is replaced in place."""
        if self.model(result.model) is None:
            return EvalReport((*self.models, result))
        return EvalReport(tuple(result if old.model == result.model else old for old in self.models))

    def to_json(self) -> dict[str, Any]:
        """Counts and everything derived from them, as plain JSON values; shares are fractions."""
        return {"schema": SCHEMA, "models": [_model_to_json(result) for result in self.models]}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "EvalReport":
        """Inverse of to_json; only the counts are read. Raises ArtifactError when they are missing or impossible."""
        if not isinstance(tree, dict) or tree.get("schema") != SCHEMA:
            raise ArtifactError(f"this is not an evaluation report of schema {SCHEMA}, the one this version reads")
        try:
            return cls(tuple(_model_from_json(entry) for entry in tree["models"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"the evaluation report is not complete: {error}") from error


def _model_to_json(result: ModelResult) -> dict[str, Any]:
    splits = [
        {
            "split": split.split, "kind": split.kind, "n": split.n, "correct": split.correct, "top1": split.top1,
            "interval": list(split.interval), "flips": split.flips, "flip_rate": split.flip_rate,
        }
        for split in result.splits
    ]  # fmt: skip
    return {"model": result.model, "mean_ood": result.mean_ood, "splits": splits}


def _model_from_json(entry: dict[str, Any]) -> ModelResult:
    splits = []
    for split in entry["splits"]:
        if split["kind"] not in ("id", "ood"):
            raise ValueError(f"kind '{split['kind']}' of split '{split['split']}' is neither 'id' nor 'ood'")
        splits.append(SplitResult(split["split"], split["kind"], split["n"], split["correct"], split["flips"]))
    return ModelResult(entry["model"], tuple(splits))


def render(report: EvalReport) -> str:
    """The report as an aligned table in percent: one row per split, for each model top-1, 95 % interval and flips against float."""
    labels = list(dict.fromkeys(split.label for result in report.models for split in result.splits))
    counts = {split.label: str(split.n) for result in report.models for split in result.splits}
    columns = [["", "split", *labels, "mean OOD"], ["", "n", *(counts[label] for label in labels), ""]]
    for result in report.models:
        found = [result.split(label) for label in labels]
        mean = "    -" if result.mean_ood is None else f"{100 * result.mean_ood:5.1f}"
        columns.append([result.model, "top-1 % [95 %]", *map(_accuracy, found), mean])
        if any(split.flips is not None for split in result.splits):
            columns.append(["", "flips %", *map(_flips, found), ""])
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in zip(*columns, strict=True)
    )


def _accuracy(split: SplitResult | None) -> str:
    if split is None:
        return "    -"
    low, high = split.interval
    return f"{100 * split.top1:5.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _flips(split: SplitResult | None) -> str:
    return "-" if split is None or split.flip_rate is None else f"{100 * split.flip_rate:.1f}"
