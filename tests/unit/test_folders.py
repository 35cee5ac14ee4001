"""Class-per-folder trees: what is read, what is carved out, and what each mistake is answered with."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeft.data import Dataset, Split
from edgeft.data.folders import FolderImages, load
from edgeft.errors import DataError

LAYOUT = "expected: one sub-folder per class, with the images directly in it"


def fill(folder: Path, classes: Mapping[str, int], first: int = 0) -> Path:
    """Write tiny images, each of its own colour."""
    for position, (label, n) in enumerate(classes.items()):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.new("RGB", (3, 2), (first + i, position, 7)).save(folder / label / f"{i:03d}.png")
    return folder


def read(root: Path, *ood: str, seed: int = 0, val: float = 0.1, test: float = 0.2, **rest: Any) -> Dataset:
    return load(root, ood, seed=seed, val_fraction=val, test_fraction=test, **rest)


def names(split: Split) -> list[str]:
    assert isinstance(split.images, FolderImages)
    return [f"{path.parent.name}/{path.name}" for path in split.images.paths]


def error(act: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(DataError) as caught:
        act()
    assert caught.value.exit_code == 2
    return caught.value.message, caught.value.hint


# What is read


def test_a_single_tree_is_carved_by_class(tmp_path: Path) -> None:
    dataset = read(fill(tmp_path / "pets", {"dog": 30, "cat": 20, "ärger 猫": 3}))
    assert dataset.name == "pets"
    assert dataset.classes == ("cat", "dog", "ärger 猫")
    assert (dataset.augment, dataset.size, dataset.notes, dataset.ood) == ("crop-flip", None, (), ())
    assert [(split.name, split.kind) for split in (dataset.train, dataset.val, dataset.id_test)] == [
        ("train",) * 2,
        ("val",) * 2,
        ("id",) * 2,
    ]
    counts = [np.bincount(split.labels).tolist() for split in (dataset.train, dataset.val, dataset.id_test)]
    assert counts == [[14, 21, 1], [2, 3, 1], [4, 6, 1]]
    everything = [name for split in (dataset.train, dataset.val, dataset.id_test) for name in names(split)]
    assert len(everything) == len(set(everything)) == 53
    for split in (dataset.train, dataset.val, dataset.id_test):
        assert split.labels.dtype == np.int64
        assert len(split.images) == len(split)
        assert [dataset.classes[label] for label in split.labels] == [name.split("/")[0] for name in names(split)]
        assert names(split) == sorted(names(split))
    assert dataset.train.images.image(0).shape == (2, 3, 3)


def test_carving_depends_on_seed_and_names_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = {"a": 40, "b": 40}
    first = read(fill(tmp_path / "one", classes))
    listing = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(listing(self), reverse=True)))
    second = read(fill(tmp_path / "two", {"b": 40, "a": 40, "c": 5}))
    assert [name for name in names(second.id_test) if name[0] != "c"] == names(first.id_test)
    assert [name for name in names(second.val) if name[0] != "c"] == names(first.val)
    assert names(read(tmp_path / "one", seed=1).id_test) != names(first.id_test)


@pytest.mark.parametrize(
    ("n", "val", "test", "expected"), [(3, 0.49, 0.49, [1, 1, 1]), (4, 0.49, 0.49, [2, 1, 1]), (100, 0.29, 0.1, [61, 29, 10])]
)
def test_every_part_gets_an_image(tmp_path: Path, n: int, val: float, test: float, expected: list[int]) -> None:
    dataset = read(fill(tmp_path, {"a": n, "b": n}), val=val, test=test)
    assert [np.bincount(split.labels)[0] for split in (dataset.train, dataset.val, dataset.id_test)] == expected


def test_split_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    for part, n in (("train", 4), ("val", 2), ("test", 3)):
        fill(tmp_path / part, {"a": n, "b": n})
    (tmp_path / "extra").mkdir()
    dataset = read(tmp_path)
    assert [len(split) for split in (dataset.train, dataset.val, dataset.id_test)] == [8, 4, 6]
    assert isinstance(dataset.id_test.images, FolderImages)
    assert dataset.id_test.images.paths[0] == tmp_path / "test" / "a" / "000.png"
    assert dataset.notes == (f"ignored in '{tmp_path}' beside its split folders: 'extra'",)


@pytest.mark.parametrize(("present", "expected"), [("val", [16, 4, 4]), ("test", [18, 2, 4])])
def test_a_missing_split_folder_is_carved_out_of_train(tmp_path: Path, present: str, expected: list[int]) -> None:
    fill(tmp_path / "train", {"a": 10, "b": 10})
    fill(tmp_path / present, {"a": 2, "b": 2})
    dataset = read(tmp_path)
    assert [len(split) for split in (dataset.train, dataset.val, dataset.id_test)] == expected


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert read(fill(tmp_path, {"car": 3, "train": 3})).classes == ("car", "train")


def test_shifted_sets_are_matched_by_folder_name(tmp_path: Path) -> None:
    root = fill(tmp_path / "photo", {"a": 3, "b": 3, "c": 3})
    fill(tmp_path / "sketch", {"c": 2, "b": 1})
    (tmp_path / "sketch" / "a").mkdir()
    fill(tmp_path / "x=y", {"a": 1, "b": 1, "c": 1})
    dataset = read(root, f"{tmp_path}/sketch/", f"drawn={tmp_path}/x=y")
    assert [(split.name, split.kind, split.labels.tolist()) for split in dataset.ood] == [
        ("sketch", "ood", [1, 2, 2]),
        ("drawn", "ood", [0, 1, 2]),
    ]
    assert dataset.notes == ("shifted test set 'sketch' has no images of 1 of 3 classes: 'a'",)


def test_an_equals_sign_after_a_slash_belongs_to_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "data", {"a": 3, "b": 3})
    fill(tmp_path / "q=1", {"a": 1})
    assert [split.name for split in read(Path("data"), "./q=1").ood] == ["q=1"]


def test_left_behind_files_are_ignored_and_links_followed(tmp_path: Path) -> None:
    root = fill(tmp_path / "root", {"a": 3})
    fill(tmp_path / "elsewhere", {"b": 3})
    (root / "b").symlink_to(tmp_path / "elsewhere" / "b")
    for name in (".DS_Store", "Thumbs.db", "a/.DS_Store", "a/Thumbs.db", "a/desktop.ini"):
        (root / name).write_bytes(b"x")
    (root / "__MACOSX").mkdir()
    (root / ".git").mkdir()
    dataset = read(root)
    assert (dataset.classes, dataset.notes) == (("a", "b"), ())


def test_other_things_in_the_way_are_noted(tmp_path: Path) -> None:
    root = fill(tmp_path, {"a": 3, "b": 3})
    (root / "README.txt").write_text("hello")
    fill(root / "a", {"inner": 1})
    assert read(root).notes == (
        f"ignored 1 file directly in '{root}': 'README.txt'",
        f"ignored 1 folder inside the class folder '{root}/a': 'inner'",
    )


def test_composed_and_decomposed_names_are_one_class(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", {"caf\u00e9": 3, "tea": 3})
    dataset = read(root, str(fill(tmp_path / "other", {"cafe\u0301": 2, "tea": 1})))
    assert dataset.ood[0].labels.tolist() == [0, 0, 1]


def test_unreadable_files_are_skipped_and_listed(tmp_path: Path) -> None:
    root = fill(tmp_path, {"a": 30, "b": 28})
    (root / "a" / "000.png").write_bytes((root / "a" / "001.png").read_bytes()[:50])
    (root / "b" / "notes.txt").write_text("hello")
    dataset = read(root)
    assert sum(map(len, (dataset.train, dataset.val, dataset.id_test))) == 57
    [note] = dataset.notes
    assert note.startswith(f"skipped 2 of 59 files in '{root}' that cannot be read as images: a/000.png (")
    assert note.endswith("b/notes.txt (not an image)")


def test_the_decoded_side_is_bounded(tmp_path: Path) -> None:
    root = fill(tmp_path, {"a": 3, "b": 3})
    for path in root.glob("*/*.png"):
        Image.new("RGB", (40, 30)).save(path)
    assert read(root, short_side=15).train.images.image(0).shape == (15, 20, 3)


# What mistakes are answered with


def test_missing_empty_or_no_folder(tmp_path: Path) -> None:
    assert error(lambda: read(tmp_path / "no")) == (f"the folder '{tmp_path}/no' does not exist", LAYOUT)
    (tmp_path / ".hidden").mkdir()
    assert error(lambda: read(tmp_path)) == (f"the folder '{tmp_path}' is empty", LAYOUT)
    (tmp_path / "file").write_text("x")
    assert error(lambda: read(tmp_path / "file")) == (f"'{tmp_path}/file' is not a folder", LAYOUT)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_unreadable_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0)
    try:
        assert error(lambda: read(tmp_path)) == (
            f"cannot read the folder '{tmp_path}': Permission denied",
            "check its name and permissions",
        )
    finally:
        tmp_path.chmod(0o700)


def test_no_class_folders(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert error(lambda: read(tmp_path)) == (f"'{tmp_path}' has no class folders, only files ('notes.txt')", LAYOUT)
    Image.new("RGB", (2, 2)).save(tmp_path / "cat.png")
    assert error(lambda: read(tmp_path)) == (f"'{tmp_path}' has no class folders, but images directly in it ('cat.png')", LAYOUT)


def test_a_level_too_high(tmp_path: Path) -> None:
    fill(tmp_path / "photo", {"a": 3, "b": 3})
    assert error(lambda: read(tmp_path)) == (
        f"'{tmp_path}/photo' holds folders ('a', 'b') where images of a class were expected",
        f"give the folder whose sub-folders are the classes, for example '{tmp_path}/photo'",
    )


def test_a_single_class(tmp_path: Path) -> None:
    assert error(lambda: read(fill(tmp_path, {"a": 9}))) == (f"'{tmp_path}' has a single class, 'a'; at least two are needed", LAYOUT)


def test_classes_without_images(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 9, "b": 0, "c": 0})
    assert error(lambda: read(tmp_path)) == (
        f"no images of classes 'b', 'c' for train in '{tmp_path}'",
        "add images or remove the class everywhere",
    )


@pytest.mark.parametrize(("n", "count"), [(1, "1 image"), (2, "2 images")])
def test_too_few_images_of_a_class(tmp_path: Path, n: int, count: str) -> None:
    assert error(lambda: read(fill(tmp_path, {"a": 9, "b": n}))) == (
        f"class 'b' in '{tmp_path}' has {count}; 3 are needed, one each for train, val and test",
        "add images or remove the class",
    )


def test_split_folders_that_do_not_fit(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 3, "b": 3})
    fill(tmp_path / "val", {"a": 1})
    assert error(lambda: read(tmp_path))[0] == f"no images of class 'b' for val in '{tmp_path}'"
    fill(tmp_path / "val", {"b": 1, "z": 1})
    assert error(lambda: read(tmp_path)) == (
        f"'{tmp_path}/val' has classes that the training images do not have: 'z'",
        "rename or remove them; training classes: 'a', 'b'",
    )


def test_shifted_sets_that_do_not_fit(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", {"a": 3, "b": 3})
    other = fill(tmp_path / "other", {"a": 1, "y": 1, "z": 1})
    assert error(lambda: read(root, str(other))) == (
        f"'{other}' has classes that the training images do not have: 'y', 'z'",
        "rename or remove them; training classes: 'a', 'b'",
    )
    bare = fill(tmp_path / "bare", {"a": 0})
    assert error(lambda: read(root, str(bare))) == (f"the shifted test set 'bare' has no images in '{bare}'", LAYOUT)
    assert error(lambda: read(root, "x=nowhere")) == ("the folder 'nowhere' does not exist", LAYOUT)


def test_names_of_shifted_sets(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", {"a": 3, "b": 3})
    assert error(lambda: read(root, "s=one/x", "two/s")) == (
        "two shifted test sets are called 's': 'one/x' and 'two/s'",
        "example: --ood other=two/s",
    )
    assert error(lambda: read(root, "val=x")) == (
        "--ood 'val=x': the name 'val' is taken by a split of the training folder",
        "example: --ood other=x",
    )
    assert error(lambda: read(root, "s=")) == ("--ood 's=' names no folder", "example: --ood sketch=data/sketch")
    assert error(lambda: read(root, f"same={root}")) == (
        f"--ood 'same={root}' is the training folder itself",
        "give a folder with other images",
    )


def test_too_many_unreadable_files(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 120, "b": 120})
    for i in range(13):
        (tmp_path / "a" / f"x{i:02d}.jpg").write_bytes(b"")
    message, hint = error(lambda: read(tmp_path))
    listed = "; ".join(f"a/x{i:02d}.jpg (not an image)" for i in range(10))
    assert message == f"13 of 253 files in '{tmp_path}' cannot be read as images: {listed}; and 3 more"
    assert hint == "at most 5% may be unreadable: remove or convert them, or check the folder"
    (tmp_path / "a" / "x12.jpg").unlink()
    assert len(read(tmp_path).notes) == 1


def test_a_file_that_vanishes_later_is_named(tmp_path: Path) -> None:
    dataset = read(fill(tmp_path, {"a": 3, "b": 3}))
    assert isinstance(dataset.train.images, FolderImages)
    path = dataset.train.images.paths[0]
    path.unlink()
    assert error(lambda: dataset.train.images.image(0)) == (
        f"cannot read the image '{path}': no such file",
        "remove the file or restore it",
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_class_folder_that_cannot_be_entered(tmp_path: Path) -> None:
    root = fill(tmp_path, {"a": 3, "b": 3})
    (root / "b").chmod(0)
    try:
        assert error(lambda: read(root)) == (f"cannot read the folder '{root}/b': Permission denied", "check its name and permissions")
    finally:
        (root / "b").chmod(0o700)


def test_a_name_longer_than_the_file_system_allows() -> None:
    assert error(lambda: read(Path("x" * 300))) == (
        f"cannot read the folder '{'x' * 300}': File name too long",
        "check its name and permissions",
    )
