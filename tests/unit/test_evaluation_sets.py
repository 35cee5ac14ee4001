"""Label maps, masks, sets of other classes, and groups from a CSV."""

from pathlib import Path

import numpy as np
import pytest

from edgeft.data import NO_LABEL
from edgeft.data.folders import FolderImages
from edgeft.errors import DataError
from edgeft.evaluation.labelmaps import CIFAR10, STL10, STL10_TO_CIFAR10, LabelMap, read_map, read_mask
from edgeft.evaluation.sets import TestSet, load_sets, read_groups
from edgeft.progress import Progress
from tests.conftest import ImageFolder
from tests.tiny import split

QUIET = Progress(False)
CLASSES = ("blue", "green", "red")


def loaded(name: str, folder: Path, *, map_file: Path | None = None, mask_file: Path | None = None) -> tuple[list[TestSet], list[str]]:
    return load_sets(name, folder, CLASSES, map_file=map_file, mask_file=mask_file, short_side=64, progress=QUIET)


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# Maps


@pytest.mark.parametrize(("n", "n_kept"), [(8000, 7200), (5000, 4500)])
def test_stl10_to_cifar10(n: int, n_kept: int) -> None:
    assert STL10_TO_CIFAR10.target == (0, 2, 1, 3, 4, 5, 7, -1, 8, 9)
    assert STL10_TO_CIFAR10.dropped == ("monkey",)
    labels = np.random.default_rng(0).permutation(n) % 10
    places, mapped = STL10_TO_CIFAR10.apply(labels, n=n, n_kept=n_kept)
    np.testing.assert_array_equal(np.bincount(mapped, minlength=10), [n // 10] * 6 + [0] + [n // 10] * 3)
    names = {"car": "automobile"}
    assert all(CIFAR10[new] == names.get(STL10[old], STL10[old]) for new, old in zip(mapped, labels[places], strict=True))


def test_counts_are_checked() -> None:
    labels = np.arange(7999) % 10
    with pytest.raises(DataError) as caught:
        STL10_TO_CIFAR10.apply(labels, n=8000)
    assert caught.value.message == "set 'STL-10' has 7999 images; 8000 were expected"
    with pytest.raises(DataError, match="set 'STL-10' has 7199 images of known classes; 7200 were expected"):
        STL10_TO_CIFAR10.apply(labels, n_kept=7200)
    with pytest.raises(DataError, match=r"set 'STL-10' has labels 1 \.\.\. 10; it has 10 classes"):
        STL10_TO_CIFAR10.apply(labels + 1)


def test_impossible_maps() -> None:
    for source, target, message in (
        (("a", "b"), (0,), "label map 'm' has 1 targets for 2 classes"),
        (("a", "b"), (0, 3), "label map 'm' names a class outside 0 ... 2"),
        (("a", "b"), (-1, -1), "label map 'm' keeps no class of the set"),
    ):
        with pytest.raises(DataError) as caught:
            LabelMap("m", source, target, CLASSES)
        assert caught.value.message == message


def test_maps_and_masks_from_files(tmp_path: Path) -> None:
    file = written(tmp_path / "names.txt", "# of the set = of the run\n\nazure = blue\n")
    assert read_map(file, ["azure", "green", "pink"], CLASSES).target == (0, 1, -1)
    assert read_mask(written(tmp_path / "mask.txt", "red\nblue\nred\n"), CLASSES).tolist() == [0, 2]
    for text, message, hint in (
        ("azur = blue", "line 1 of '{}' names 'azur', which is no class of the set", "known: azure, green\n  did you mean: azure"),
        ("azure = blu", "line 1 of '{}' names 'blu', which is no class of the run", "known: blue, green, red\n  did you mean: blue"),
        ("azure", "line 1 of '{}' is 'azure'", "expected: class of the set = class of the run"),
    ):
        with pytest.raises(DataError) as caught:
            read_map(written(file, text), ["azure", "green"], CLASSES)
        assert (caught.value.message, caught.value.hint) == (message.format(file), hint)
    with pytest.raises(DataError, match="permits 1 classes; at least two are needed"):
        read_mask(written(file, "red"), CLASSES)
    with pytest.raises(DataError, match=r"cannot read '.*missing.txt': No such file"):
        read_mask(tmp_path / "missing.txt", CLASSES)


# Folders


def test_classes_that_the_run_does_not_have_are_listed_and_kept_apart(image_folder: ImageFolder) -> None:
    (known, unknown), notes = loaded("web", image_folder("web", ("green", "pink", "red"), n=4))
    assert (known.split.name, known.split.kind, known.labelled, known.valid) == ("web", "ood", True, None)
    assert known.split.labels.tolist() == [1] * 4 + [2] * 4
    assert (unknown.split.name, unknown.labelled) == ("web other classes", False)
    assert unknown.split.labels.tolist() == [NO_LABEL] * 4
    assert notes == ["test set 'web': 4 images of classes that the run does not have, for detection only: 'pink'"]
    assert isinstance(unknown.split.images, FolderImages)
    assert {path.parent.name for path in unknown.split.images.paths} == {"pink"}


def test_a_set_may_have_no_known_class_at_all(image_folder: ImageFolder) -> None:
    (only,), notes = loaded("far", image_folder("far", ("cat", "dog"), n=3))
    assert (only.split.name, only.labelled, len(only.split)) == ("far other classes", False, 6)
    assert notes[0].endswith("for detection only: 'cat', 'dog'")


def test_maps_and_masks_of_folders(image_folder: ImageFolder, tmp_path: Path) -> None:
    folder = image_folder("other", ("azure", "red"), n=2)
    names = written(tmp_path / "names.txt", "azure = blue\n")
    (found,), notes = loaded("other", folder, map_file=names, mask_file=written(tmp_path / "mask.txt", "blue\nred\n"))
    assert (found.split.labels.tolist(), notes) == ([0, 0, 2, 2], [])
    assert found.valid is not None
    assert found.valid.tolist() == [0, 2]
    with pytest.raises(DataError, match="the mask of test set 'other' leaves out classes of which it has images"):
        loaded("other", folder, map_file=names, mask_file=written(tmp_path / "mask.txt", "blue\ngreen\n"))


def test_sets_without_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the test set 'x' has no class folders in"):
        loaded("x", tmp_path / "empty")
    (tmp_path / "empty" / "red").mkdir()
    with pytest.raises(DataError, match="the test set 'x' has no images in"):
        loaded("x", tmp_path / "empty")
    with pytest.raises(DataError, match="does not exist"):
        loaded("x", tmp_path / "nowhere")


# Groups


def test_groups_of_files(image_folder: ImageFolder, tmp_path: Path) -> None:
    folder = image_folder("web", ("green", "red"), n=2)
    (found,), _ = loaded("web", folder)
    rows = [
        "file,group,label",
        "web/red/001.png,night,red",
        "web/green/000.png,day,green",
        "web/green/001.png,night,",
        "web/red/000.png,day,",
    ]
    csv = written(tmp_path / "groups.csv", "\n".join([*rows, "elsewhere.png,day,"]))
    assert read_groups(csv, found.split, CLASSES) == ("day", "night", "day", "night")
    with pytest.raises(DataError, match=r"says that '001.png' is 'green', its folder that it is 'red'"):
        read_groups(written(csv, "\n".join(rows).replace("night,red", "night,green")), found.split, CLASSES)
    with pytest.raises(DataError) as caught:
        read_groups(written(csv, "\n".join(rows[:-1])), found.split, CLASSES)
    assert caught.value.message == f"'{csv}' has no row for 1 of 4 images of 'web', the first '{folder / 'red' / '000.png'}'"
    with pytest.raises(DataError, match=r"has no column 'group'; it has \['file', 'where'\]"):
        read_groups(written(csv, "file,where\na,b\n"), found.split, CLASSES)
    with pytest.raises(DataError, match="groups can be given for sets of image files only, and split 'id' is not one"):
        read_groups(csv, split("id", "id", 3, 1), CLASSES)
