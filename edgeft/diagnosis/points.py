"""Accuracies of models as points: from a CSV file, or from the evaluation reports of runs."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeft.diagnosis.effective import Point
from edgeft.errors import DataError
from edgeft.report import EvalReport, ModelResult, SplitResult

REQUIRED = ("name", "id", "ood")
COUNTS = ("n_id", "n_ood")
_EXAMPLE = "the first line names the columns: name,id,ood and, where known, n_id,n_ood (numbers of test images)"
_ID = "id"


def read_points(path: Path) -> list[Point]:
    """Models of a CSV file with the columns name, id, ood and, where known, n_id and n_ood; others are ignored.

    Accuracies are shares (0 ... 1) or percent (all of them above 1). Raises DataError that names missing columns, or the line of a
    value that is not a number or does not fit the others.
    """
    rows = _rows(path)
    shares = [[_number(row, key, where) for key in ("id", "ood")] for where, row in rows]
    unit = _unit([(where, share) for (where, _), pair in zip(rows, shares, strict=True) for share in pair])
    points = []
    for (where, row), (id_, ood) in zip(rows, shares, strict=True):
        n_id, n_ood = (_count(row, key, where) for key in COUNTS)
        try:
            points.append(Point((row["name"] or "").strip(), id_ / unit, ood / unit, n_id, n_ood))
        except DataError as error:
            raise DataError(f"{where}: {error.message}", error.hint) from error
    return points


def _rows(path: Path) -> list[tuple[str, dict[str, str | None]]]:
    """Rows with the place that names them in errors."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [column.strip() for column in reader.fieldnames or []]
            reader.fieldnames = columns
            rows = [(f"'{path}', line {reader.line_num}", row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the CSV file '{path}': {getattr(error, 'strerror', None) or error}", _EXAMPLE) from error
    missing = [f"'{column}'" for column in REQUIRED if column not in columns]
    if missing:
        found = ", ".join(f"'{column}'" for column in columns) or "none"
        raise DataError(f"'{path}' has no column {' and no column '.join(missing)}; found: {found}", _EXAMPLE)
    return rows


def _number(row: Mapping[str, str | None], key: str, where: str) -> float:
    text = (row[key] or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: {key} is '{text}', not a number", _EXAMPLE)
    return value


def _count(row: Mapping[str, str | None], key: str, where: str) -> int | None:
    text = (row.get(key) or "").strip()
    if text and not text.isdigit():
        raise DataError(f"{where}: {key} is '{text}', not a number of images", _EXAMPLE)
    return int(text) if text else None


def _unit(accuracies: Sequence[tuple[str, float]]) -> float:
    """1 for shares, 100 for percent. Raises DataError for a mixture: guessing would move a model by a factor of a hundred."""
    percent = [value > 1 for _, value in accuracies]
    if any(percent) and not all(percent):
        where, value = accuracies[percent.index(not percent[0])]
        raise DataError(
            f"{where}: the accuracy {value:g} and others of the file do not have the same unit",
            "write all accuracies as shares (0.85), or all in percent (85)",
        )
    return 100.0 if any(percent) else 1.0


def choose_split(reports: Mapping[str, EvalReport], ood: str | None) -> str:
    """The label of the shifted split to look at: the one named `ood`, or the only one there is.

    Raises DataError where there are several and none is named, or where a report lacks it.
    """
    shared = _shared_splits(reports)
    if ood is None and len(shared) == 1:
        return f"ood:{shared[0]}"
    listed = ", ".join(f"'{name}'" for name in shared) or "none"
    if ood is None:
        raise DataError(f"which shifted split? measured in every run: {listed}", "name one of them")
    if ood not in shared:
        raise DataError(f"the shifted split '{ood}' was not measured in every run; those that were: {listed}", "name one of them")
    return f"ood:{ood}"


def _shared_splits(reports: Mapping[str, EvalReport]) -> list[str]:
    """Names of the OOD splits that every report has for every model."""
    found = [[split.split for split in model.splits if split.kind == "ood"] for report in reports.values() for model in report.models]
    return [name for name in found[0] if all(name in names for names in found)] if found else []


def points_of(reports: Mapping[str, EvalReport], label: str, model: str | None = None) -> list[Point]:
    """Every model of every run, or the one called `model`, on "id" and on the split of that label; points are called "run: model".

    Raises DataError for a run without such a model.
    """
    points: list[Point] = []
    for run, report in reports.items():
        chosen = [result for result in report.models if model in (None, result.model)]
        if not chosen:
            raise DataError(f"the run '{run}' was not measured as '{model}'", "leave the run out, or repeat it")
        points += [_point(run, result, label) for result in chosen]
    return points


def split_pair(run: str, result: ModelResult, label: str) -> tuple[SplitResult, SplitResult]:
    """The results of a model on "id" and on the split of that label. Raises DataError where one was not measured."""
    id_, ood = result.split(_ID), result.split(label)
    if id_ is None or ood is None:
        lacking = _ID if id_ is None else label
        raise DataError(f"the model '{result.model}' of the run '{run}' was not measured on '{lacking}'", "leave the run out")
    return id_, ood


def _point(run: str, result: ModelResult, label: str) -> Point:
    id_, ood = split_pair(run, result, label)
    return Point(f"{run}: {result.model}", id_.top1, ood.top1, id_.n, ood.n)
