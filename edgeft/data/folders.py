"""Any class-per-folder tree as a Dataset, with any number of shifted test folders beside it.

    root/cat/*.jpg, root/dog/*.png, ...                  train, validation and ID test are carved out by seed
    root/train/cat/..., root/val/cat/..., root/test/...  taken as they are; a missing val or test is carved out of train

A file is an image if Pillow can decode it, whatever its name. Files that it cannot decode are left out and listed in the
notes; more than one in twenty is an error. Folders and files that systems leave behind (.DS_Store, Thumbs.db) are ignored.
"""

import os
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeft.data import Dataset, Split, SplitKind
from edgeft.data.decode import SHORT_SIDE, decode, problem
from edgeft.errors import DataError
from edgeft.progress import Progress

MAX_UNREADABLE = 0.05
"""Share of undecodable files in a tree above which it is refused."""
_PARTS = ("train", "val", "test")
_RESERVED = ("train", "val", "id")
_LEFT_BEHIND = ("thumbs.db", "desktop.ini", "__macosx")
_LISTED = 10
_CHUNK = 256
_LAYOUT = "one sub-folder per class, with the images directly in it"

Tree = dict[str, list[Path]]
"""Image files by class name, both sorted by name."""


@dataclass(frozen=True)
class FolderImages:
    """Image files by index (an ImageSource); each is decoded anew, with its short side bounded as `decode` says."""

    paths: tuple[Path, ...]
    short_side: int = SHORT_SIDE

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> NDArray[np.uint8]:
        """RGB bytes of one file, shape [height, width, 3]. Raises DataError that names the file."""
        return decode(self.paths[index], self.short_side)


def load(
    root: Path,
    ood: Sequence[str] = (),
    *,
    seed: int,
    val_fraction: float,
    test_fraction: float,
    short_side: int = SHORT_SIDE,
    progress: Progress | None = None,
) -> Dataset:
    """Read a class-per-folder tree and its shifted test sets ("NAME=DIR" or "DIR").

    Every file is decoded once to see that it is an image. Which images are carved out depends on `seed`, the class name
    and the sorted file names only. Classes of a shifted set are matched by folder name. Raises DataError.
    """
    progress = progress or Progress(enabled=False)
    notes: list[str] = []
    shifted = _named(ood, root)
    parts = _listed_parts(root, notes)
    classes = tuple(sorted(parts["train"]))
    listed = {name: _listed(path, notes) for name, path in shifted.items()}
    _require_classes(parts, listed, shifted, root)
    parts = _checked(parts, root, notes, progress)
    for part, tree in parts.items():
        _require_images({label: tree.get(label, []) for label in classes}, part, root)
    missing = {part: share for part, share in (("val", val_fraction), ("test", test_fraction)) if part not in parts}
    parts = _carved(parts, missing, root, seed)
    trees = {name: _checked({name: tree}, shifted[name], notes, progress)[name] for name, tree in listed.items()}
    for name, tree in trees.items():
        _note_absent(tree, name, classes, shifted[name], notes)
    return Dataset(
        name=root.resolve().name,
        classes=classes,
        train=_split("train", "train", parts["train"], classes, short_side),
        val=_split("val", "val", parts["val"], classes, short_side),
        id_test=_split("id", "id", parts["test"], classes, short_side),
        ood=tuple(_split(name, "ood", tree, classes, short_side) for name, tree in trees.items()),
        augment="crop-flip",
        notes=tuple(notes),
    )


def _split(name: str, kind: SplitKind, tree: Tree, classes: Sequence[str], short_side: int) -> Split:
    paths = [path for label in classes for path in tree.get(label, [])]
    labels = [index for index, label in enumerate(classes) for _ in tree.get(label, [])]
    return Split(name, kind, FolderImages(tuple(paths), short_side), np.array(labels, dtype=np.int64))


# Listing: folder and file names only


def _listed_parts(root: Path, notes: list[str]) -> dict[str, Tree]:
    """Class folders of the parts that exist on disk: "train" alone, or with "val" and "test"."""
    if not any(path.name == "train" and _holds_folders(path) for path in entries(root)):
        return {"train": _listed(root, notes)}
    present = [part for part in _PARTS if os.path.isdir(root / part)]
    beside = [path.name for path in entries(root) if path.name not in present]
    if beside:
        notes.append(f"ignored in '{root}' beside its split folders: {_names(beside)}")
    return {part: _listed(root / part, notes) for part in present}


def _holds_folders(path: Path) -> bool:
    """Tells the split folder "train" from a class of that name, which holds images."""
    return os.path.isdir(path) and any(os.path.isdir(inner) for inner in entries(path))


def entries(folder: Path, expected: str = _LAYOUT) -> list[Path]:
    """What a folder holds, sorted by name, without hidden and left-behind entries. Raises DataError that says what was expected."""
    try:
        found = sorted(folder.iterdir(), key=lambda path: path.name)
    except FileNotFoundError as error:
        raise DataError(f"the folder '{folder}' does not exist", f"expected: {expected}") from error
    except NotADirectoryError as error:
        raise DataError(f"'{folder}' is not a folder", f"expected: {expected}") from error
    except OSError as error:
        raise DataError(f"cannot read the folder '{folder}': {error.strerror}", "check its name and permissions") from error
    return [path for path in found if not path.name.startswith(".") and path.name.lower() not in _LEFT_BEHIND]


def _listed(folder: Path, notes: list[str]) -> Tree:
    """Files of each class folder, not yet known to be images."""
    inside = entries(folder)
    if not inside:
        raise DataError(f"the folder '{folder}' is empty", f"expected: {_LAYOUT}")
    stray = [path.name for path in inside if not os.path.isdir(path)]
    if len(stray) == len(inside):
        images = [path.name for path in inside[:_CHUNK] if problem(path) is None]
        what = f"but images directly in it ({_names(images)})" if images else f"only files ({_names(stray)})"
        raise DataError(f"'{folder}' has no class folders, {what}", f"expected: {_LAYOUT}")
    if stray:
        notes.append(f"ignored {_count(len(stray), 'file')} directly in '{folder}': {_names(stray)}")
    tree: Tree = {}
    for path in inside:
        if os.path.isdir(path):
            label = unicodedata.normalize("NFC", path.name)
            if label in tree:
                raise DataError(f"'{folder}' has two folders named '{label}', spelt with different code points", "merge them")
            tree[label] = _class_files(path, notes)
    return tree


def _class_files(folder: Path, notes: list[str]) -> list[Path]:
    inside = entries(folder)
    inner = [path.name for path in inside if os.path.isdir(path)]
    if inner and len(inner) == len(inside):
        raise DataError(
            f"'{folder}' holds folders ({_names(inner)}) where images of a class were expected",
            f"give the folder whose sub-folders are the classes, for example '{folder}'",
        )
    if inner:
        notes.append(f"ignored {_count(len(inner), 'folder')} inside the class folder '{folder}': {_names(inner)}")
    return [path for path in inside if not os.path.isdir(path)]


# Checking: every file once


def _checked(parts: Mapping[str, Tree], root: Path, notes: list[str], progress: Progress) -> dict[str, Tree]:
    """The same trees without undecodable files, which are noted. Raises DataError where they are more than MAX_UNREADABLE."""
    paths = [path for tree in parts.values() for files in tree.values() for path in files]
    good = set(readable(paths, root, notes, progress))
    return {part: {label: [path for path in files if path in good] for label, files in tree.items()} for part, tree in parts.items()}


def readable(paths: Sequence[Path], root: Path, notes: list[str], progress: Progress) -> list[Path]:
    """The files inside `root` that can be decoded; the others are noted. Raises DataError where they are more than MAX_UNREADABLE."""
    bad = {path: reason for path, reason in zip(paths, _problems(paths, root, progress), strict=True) if reason is not None}
    if not bad:
        return list(paths)
    lines = [f"{path.relative_to(root).as_posix()} ({reason})" for path, reason in bad.items()]
    more = f"; and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
    count, listed = f"{len(bad)} of {len(paths)} files in '{root}'", "; ".join(lines[:_LISTED]) + more
    if len(bad) > MAX_UNREADABLE * len(paths):
        hint = f"at most {MAX_UNREADABLE:.0%} may be unreadable: remove or convert them, or check the folder"
        raise DataError(f"{count} cannot be read as images: {listed}", hint)
    notes.append(f"skipped {count} that cannot be read as images: {listed}")
    return [path for path in paths if path not in bad]


def _problems(paths: Sequence[Path], root: Path, progress: Progress) -> list[str | None]:
    reasons: list[str | None] = []
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool, progress.task(f"check the images in '{root}'", len(paths)) as advance:
        for start in range(0, len(paths), _CHUNK):
            chunk = paths[start : start + _CHUNK]
            reasons.extend(pool.map(problem, chunk))
            advance(len(chunk))
    return reasons


def _require_classes(parts: Mapping[str, Tree], listed: Mapping[str, Tree], shifted: Mapping[str, Path], root: Path) -> None:
    """At least two classes, and none outside the training images that is not among them."""
    classes = sorted(parts["train"])
    if len(classes) == 1:
        raise DataError(f"'{root}' has a single class, '{classes[0]}'; at least two are needed", f"expected: {_LAYOUT}")
    folders = {root / part: tree for part, tree in parts.items()} | {shifted[name]: tree for name, tree in listed.items()}
    for folder, tree in folders.items():
        extra = [label for label in tree if label not in parts["train"]]
        if extra:
            raise DataError(
                f"'{folder}' has classes that the training images do not have: {_names(extra)}",
                f"rename or remove them; training classes: {_names(classes)}",
            )


def _require_images(tree: Tree, part: str, root: Path) -> None:
    empty = [label for label, files in tree.items() if not files]
    if empty:
        kind = "class" if len(empty) == 1 else "classes"
        raise DataError(f"no images of {kind} {_names(empty)} for {part} in '{root}'", "add images or remove the class everywhere")


def _note_absent(tree: Tree, name: str, classes: Sequence[str], folder: Path, notes: list[str]) -> None:
    """A shifted set may lack classes, but not all of them."""
    absent = [label for label in classes if not tree.get(label)]
    if len(absent) == len(classes):
        raise DataError(f"the shifted test set '{name}' has no images in '{folder}'", f"expected: {_LAYOUT}")
    if absent:
        notes.append(f"shifted test set '{name}' has no images of {len(absent)} of {len(classes)} classes: {_names(absent)}")


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(f"'{name}'" for name in names[:_LISTED]) + more


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _named(ood: Sequence[str], root: Path) -> dict[str, Path]:
    """Shifted sets by name. In "NAME=DIR" the name holds no slash; a folder with "=" in its name is written "./a=b"."""
    shifted: dict[str, Path] = {}
    for text in ood:
        name, equals, folder = text.partition("=")
        if not equals or "/" in name or os.sep in name:
            name, folder = "", text
        path = Path(folder).expanduser()
        name = name or path.resolve().name
        if not folder:
            raise DataError(f"--ood '{text}' names no folder", "example: --ood sketch=data/sketch")
        example = f"example: --ood other={folder}"
        if name in _RESERVED:
            raise DataError(f"--ood '{text}': the name '{name}' is taken by a split of the training folder", example)
        if name in shifted:
            raise DataError(f"two shifted test sets are called '{name}': '{shifted[name]}' and '{path}'", example)
        if path.resolve() == root.resolve():
            raise DataError(f"--ood '{text}' is the training folder itself", "give a folder with other images")
        shifted[name] = path
    return shifted


# Carving


def _carved(parts: dict[str, Tree], missing: Mapping[str, float], root: Path, seed: int) -> dict[str, Tree]:
    """Take the missing parts out of "train", class by class, at least one image each."""
    carved: dict[str, Tree] = {**parts, "train": {}, **{part: {} for part in missing}}
    needed = 1 + len(missing)
    for label, files in parts["train"].items():
        if len(files) < needed:
            raise DataError(
                f"class '{label}' in '{root}' has {_count(len(files), 'image')}; "
                f"{needed} are needed, one each for train, {' and '.join(missing)}",
                "add images or remove the class",
            )
        order = np.random.default_rng((seed, zlib.crc32(os.fsencode(label)))).permutation(len(files))
        for part, fraction in missing.items():
            n = max(1, int(len(files) * fraction + 1e-9))  # rounded down; the term undoes 0.29 * 100 = 28.999...
            chosen, order = order[:n], order[n:]
            carved[part][label] = [files[i] for i in sorted(chosen)]
        carved["train"][label] = [files[i] for i in sorted(order)]
    return carved
