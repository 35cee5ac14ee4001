"""Folders of images of which some have a label: class folders that are known, others, and files in none."""

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeft.data import NO_LABEL, Split
from edgeft.data.folders import FolderImages, entries, readable
from edgeft.data.unlabelled import files_below
from edgeft.errors import DataError
from edgeft.progress import Progress

_EXPECTED = "a folder with one sub-folder per class, or with image files"


@dataclass(frozen=True)
class PartlyLabelled:
    """Images of a folder; those of folders that are no class (`unknown`) and of none have NO_LABEL. `notes` say what was left out."""

    split: Split
    unknown: tuple[str, ...]
    notes: tuple[str, ...]


def read_folder(folder: Path, classes: Sequence[str], short_side: int, progress: Progress) -> PartlyLabelled:
    """Every image in a folder and in the folders inside it, labelled by the folders directly in it that are `classes`.

    Files that cannot be decoded are left out and noted; more than one in twenty is an error, as is a folder without an image. Raises
    DataError.
    """
    known = {name: index for index, name in enumerate(classes)}
    listed: dict[Path, int] = {}
    unknown: list[str] = []
    for path in entries(folder, _EXPECTED):
        if not os.path.isdir(path):
            listed[path] = NO_LABEL
            continue
        name = unicodedata.normalize("NFC", path.name)
        files = files_below(path, set())
        listed |= dict.fromkeys(files, known.get(name, NO_LABEL))
        unknown += [name] if files and name not in known else []
    notes: list[str] = []
    good = readable(list(listed), folder, notes, progress)
    if not good:
        raise DataError(f"the folder '{folder}' holds no images", f"expected: {_EXPECTED}")
    labels = np.array([listed[path] for path in good], np.int64)
    split = Split(folder.resolve().name, "ood", FolderImages(tuple(good), short_side), labels)
    return PartlyLabelled(split, tuple(unknown), tuple(notes))


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the folders in a folder. Raises DataError when it cannot be read."""
    return tuple(unicodedata.normalize("NFC", path.name) for path in entries(folder, _EXPECTED) if os.path.isdir(path))
