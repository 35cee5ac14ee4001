"""Folders of images without labels as a split."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgeft.data import NO_LABEL, Split
from edgeft.data.folders import FolderImages, entries, readable
from edgeft.errors import DataError
from edgeft.progress import Progress

NAME = "unlabelled"


def load_unlabelled(folders: Sequence[Path], short_side: int, progress: Progress) -> tuple[Split, list[str]]:
    """Every image in the folders and the folders inside them, in the order of the names, and lines about what was left out.

    Files that cannot be decoded are left out and noted; more than one in twenty of a folder is an error, as is a folder without an
    image. A file that two of the folders hold comes once. Raises DataError.
    """
    notes: list[str] = []
    found: dict[Path, Path] = {}
    for folder in folders:
        root = folder.expanduser()
        paths = readable(files_below(root, set()), root, notes, progress)
        if not paths:
            raise DataError(f"the folder '{root}' of unlabelled images holds none", "quant.unlabelled takes folders of image files")
        for path in paths:
            found.setdefault(path.resolve(), path)
    labels = np.full(len(found), NO_LABEL, dtype=np.int64)
    return Split(NAME, "train", FolderImages(tuple(found.values()), short_side), labels), notes


def files_below(folder: Path, seen: set[Path]) -> list[Path]:
    """Files of a folder and, folder by folder, of those inside it; links may lead to a folder again, which is not listed twice."""
    seen.add(folder.resolve())
    inside = entries(folder, "image files, directly or in folders")
    nested = [path for path in inside if os.path.isdir(path)]
    files = [path for path in inside if path not in nested]
    for inner in nested:
        if inner.resolve() not in seen:
            files += files_below(inner, seen)
    return files
