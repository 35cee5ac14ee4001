"""Folders of images without labels: found at any depth, checked, joined to the training images."""

from pathlib import Path

import numpy as np
import pytest

from edgeft.config import build_config
from edgeft.data import NO_LABEL
from edgeft.data.loading import load_dataset
from edgeft.data.mixing import divided, joined
from edgeft.data.unlabelled import load_unlabelled
from edgeft.errors import DataError
from edgeft.progress import Progress
from tests.conftest import ImageFolder
from tests.tiny import DATA

SILENT = Progress(False)


def test_flat_and_nested_folders(image_folder: ImageFolder) -> None:
    nested = image_folder("nested", n=3)
    flat = nested / "red"
    (nested / "blue" / "deeper").mkdir()
    (nested / "green" / "000.png").rename(nested / "blue" / "deeper" / "x.png")
    (nested / "self").symlink_to(nested)
    split, notes = load_unlabelled([nested, flat], 1024, SILENT)
    assert notes == []
    assert len(split) == 9, "the files of `flat` come once"
    assert set(split.labels.tolist()) == {NO_LABEL}
    assert split.images.image(0).shape == (16, 20, 3)
    only, _ = load_unlabelled([flat], 1024, SILENT)
    assert len(only) == 3


def test_damaged_files_are_noted_and_many_are_refused(image_folder: ImageFolder) -> None:
    root = image_folder("target", n=8)
    (root / "broken.png").write_bytes(b"no image")
    split, notes = load_unlabelled([root], 1024, SILENT)
    assert len(split) == 24
    assert notes == [f"skipped 1 of 25 files in '{root}' that cannot be read as images: broken.png (not an image)"]
    for number in range(5):
        (root / f"broken{number}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="6 of 30 files"):
        load_unlabelled([root], 1024, SILENT)


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="of unlabelled images holds none"):
        load_unlabelled([tmp_path / "empty"], 1024, SILENT)
    with pytest.raises(DataError, match=r"'.*absent' does not exist") as caught:
        load_unlabelled([tmp_path / "absent"], 1024, SILENT)
    assert caught.value.hint == "expected: image files, directly or in folders"


def test_joined_splits_keep_order_and_labels(image_folder: ImageFolder) -> None:
    root, target = image_folder("photos", n=8), image_folder("target", ("a",), n=4, shift=90)
    sets = {"quant.loss": "distill", "quant.unlabelled": [str(target)]}
    dataset = load_dataset(build_config(flags={"data.source": str(root), **sets}))
    assert dataset.unlabelled is not None
    both = joined(dataset.train, dataset.unlabelled)
    n = len(dataset.train)
    assert (both.name, both.kind, len(both), len(both.images)) == ("train", "train", n + 4, n + 4)
    assert both.labels.tolist() == [*dataset.train.labels.tolist(), *[NO_LABEL] * 4]
    for index, (split, inner) in {0: (dataset.train, 0), n - 1: (dataset.train, n - 1), n: (dataset.unlabelled, 0)}.items():
        assert np.array_equal(both.images.image(index), split.images.image(inner))
    assert np.array_equal(both.images.image(n + 3), dataset.unlabelled.images.image(3))
    assert load_dataset(build_config(flags={"data.source": str(root), **sets}), training=False).unlabelled is None


def test_images_that_are_tested_on_too_are_said(image_folder: ImageFolder) -> None:
    root, target = image_folder("photos", n=8), image_folder("dark", n=4, shift=-60)
    flags = {"data.source": str(root), "quant.headroom": "target"}
    dataset = load_dataset(build_config(flags=flags | {"data.ood": [f"night={target}"], "quant.unlabelled": [str(target / "red")]}))
    assert dataset.notes == (f"shifted test set 'night={target}': images of it, without labels, take part in training (quant.unlabelled)",)


@pytest.mark.parametrize(("share", "n"), [(0.25, len(DATA.val) // 4), (0.01, 1)])
def test_divided_splits_are_disjoint_and_complete(share: float, n: int) -> None:
    rest, chosen = divided(DATA.val, share, seed=1)
    assert len(chosen) == n
    images = [split.images.image(index) for split in (rest, chosen) for index in range(len(split))]
    assert len({image.tobytes() for image in images}) == len(DATA.val)
    again = divided(DATA.val, share, seed=1)[1]
    assert np.array_equal(again.images.image(0), chosen.images.image(0))
    assert sorted([*rest.labels.tolist(), *chosen.labels.tolist()]) == sorted(DATA.val.labels.tolist())
