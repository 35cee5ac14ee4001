"""Test sets beside a run's own: class-per-folder trees with other classes, masks of permitted answers, and groups from a CSV."""

import csv
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeft.data import NO_LABEL, Split
from edgeft.data.folders import FolderImages, entries, readable
from edgeft.errors import DataError
from edgeft.evaluation.labelmaps import LabelMap, read_map, read_mask
from edgeft.progress import Progress

COLUMNS = ("file", "group")
"""Columns that a CSV of groups must have; "label" may be there too."""


@dataclass(frozen=True, eq=False)
class TestSet:
    """A split to measure. `valid` are the permitted answers (None: all classes), `groups` the group of every image of the split.

    Images of a split of kind "ood" whose labels are NO_LABEL belong to other classes: they serve detection only.
    """

    __test__ = False  # not a test, whatever pytest thinks of the name

    split: Split
    valid: NDArray[np.int64] | None = None
    groups: tuple[str, ...] | None = None

    @property
    def labelled(self) -> bool:
        """Whether accuracy can be measured."""
        return bool((self.split.labels != NO_LABEL).all())


def load_sets(
    name: str, folder: Path, classes: Sequence[str], *, map_file: Path | None, mask_file: Path | None, short_side: int, progress: Progress
) -> tuple[list[TestSet], list[str]]:
    """A class-per-folder tree as a set of the classes that the run has, and one, "NAME other classes", of those that it has not.

    Returns lines about what was left out and which classes are unknown. Raises DataError for a folder without images.
    """
    notes: list[str] = []
    folders = [path for path in entries(folder) if os.path.isdir(path)]
    source = [unicodedata.normalize("NFC", path.name) for path in folders]
    if not source:
        raise DataError(f"the test set '{name}' has no class folders in '{folder}'", "expected: one sub-folder per class")
    paths: list[Path] = []
    labels: list[int] = []
    for number, inner in enumerate(folders):
        files = readable([path for path in entries(inner) if not os.path.isdir(path)], folder, notes, progress)
        paths += files
        labels += [number] * len(files)
    if not paths:
        raise DataError(f"the test set '{name}' has no images in '{folder}'", "expected: one sub-folder per class, with images in it")
    mapped = read_map(map_file, source, classes) if map_file else _by_name(name, source, classes)
    valid = read_mask(mask_file, classes) if mask_file else None
    return _sets(name, paths, np.array(labels, np.int64), source, mapped, valid, short_side, notes), notes


def _by_name(name: str, source: Sequence[str], classes: Sequence[str]) -> LabelMap | None:
    return LabelMap.by_name(name, source, classes) if set(source) & set(classes) else None


def _sets(
    name: str, paths: Sequence[Path], labels: NDArray[np.int64], source: Sequence[str], mapped: LabelMap | None,
    valid: NDArray[np.int64] | None, short_side: int, notes: list[str],
) -> list[TestSet]:  # fmt: skip
    """Known and unknown classes apart."""
    places, known = mapped.apply(labels) if mapped else (np.zeros(0, np.int64), np.zeros(0, np.int64))
    found = []
    if len(places):
        if valid is not None and not np.isin(known, valid).all():
            raise DataError(f"the mask of test set '{name}' leaves out classes of which it has images", "list every class of the set")
        found.append(TestSet(_split(name, [paths[i] for i in places], known, short_side), valid))
    others = np.setdiff1d(np.arange(len(paths)), places)
    if len(others):
        dropped = mapped.dropped if mapped else source
        listed = ", ".join(f"'{label}'" for label in dropped[:10]) + (f" and {len(dropped) - 10} more" if len(dropped) > 10 else "")
        notes.append(f"test set '{name}': {len(others)} images of classes that the run does not have, for detection only: {listed}")
        unknown = np.full(len(others), NO_LABEL, np.int64)
        found.append(TestSet(_split(f"{name} other classes", [paths[i] for i in others], unknown, short_side)))
    return found


def _split(name: str, paths: Sequence[Path], labels: NDArray[np.int64], short_side: int) -> Split:
    return Split(name, "ood", FolderImages(tuple(paths), short_side), labels)


# Groups


def read_groups(path: Path, split: Split, classes: Sequence[str]) -> tuple[str, ...]:
    """The group of every image of a split of files, from a CSV with the columns file, group and perhaps label.

    File names are relative to the folder of the CSV; rows of other files are ignored. Where there is a label it must be the name of the
    image's class. Raises DataError for missing columns, images without a row, and labels that differ.
    """
    if not isinstance(split.images, FolderImages):
        raise DataError(f"groups can be given for sets of image files only, and split '{split.name}' is not one")
    rows = _rows(path)
    groups, missing = [], []
    for file, label in zip(split.images.paths, split.labels, strict=True):
        row = rows.get(file.resolve())
        if row is None:
            missing.append(file)
            continue
        if row.get("label") and label != NO_LABEL and row["label"] != classes[label]:
            raise DataError(f"'{path}' says that '{file.name}' is '{row['label']}', its folder that it is '{classes[label]}'")
        groups.append(row["group"])
    if missing:
        raise DataError(
            f"'{path}' has no row for {len(missing)} of {len(split)} images of '{split.name}', the first '{missing[0]}'",
            "its column 'file' holds file names relative to the folder of the CSV",
        )
    return tuple(groups)


def _rows(path: Path) -> dict[Path, dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            absent = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if absent:
                raise DataError(
                    f"'{path}' has no column '{absent[0]}'; it has {list(reader.fieldnames or ())}", "columns: file,group[,label]"
                )
            return {(path.parent / row["file"]).resolve(): row for row in reader}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read '{path}': {getattr(error, 'strerror', None) or error}") from error
