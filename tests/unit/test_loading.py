"""Batches, subsets, training views and the image cache; which dataset a configuration names."""

import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from edgeft.config import Config, build_config
from edgeft.data import Split
from edgeft.data.folders import FolderImages
from edgeft.data.loading import ImageCache, TrainImages, batches, load_dataset, subset
from edgeft.data.preprocess import Preprocessing, augment, prepare
from edgeft.errors import ConfigError, DataError

P = Preprocessing(16, 0.8, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LARGE = Preprocessing(64, 1.0, "bicubic", P.mean, P.std)
KINDS: list[Literal["none", "flip", "crop-flip"]] = ["none", "flip", "crop-flip"]


class Rendered:
    """Images drawn by index; counts how often each was drawn."""

    def __init__(self, n: int, seed: int = 0) -> None:
        self.n, self.seed, self.drawn = n, seed, Counter[int]()

    def __len__(self) -> int:
        return self.n

    def image(self, index: int) -> NDArray[np.uint8]:
        self.drawn[index] += 1
        return np.random.default_rng((self.seed, index)).integers(0, 256, (30 + index, 40, 3), dtype=np.uint8)


def split(n: int, seed: int = 0) -> Split:
    return Split("train", "train", Rendered(n, seed), np.arange(n, dtype=np.int64) % 3)


def prepared(part: Split) -> list[NDArray[np.uint8]]:
    return [prepare(part.images.image(i), P) for i in range(len(part))]


def drawn(part: Split) -> Counter[int]:
    assert isinstance(part.images, Rendered)
    return part.images.drawn


# Batches and subsets


@pytest.mark.parametrize("cache_mb", [None, 0, 64])
@pytest.mark.parametrize(("n", "batch", "sizes"), [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 10, [3]), (25, 1, [1] * 25), (0, 4, [])])
def test_batches_come_in_order(n: int, batch: int, sizes: list[int], cache_mb: int | None) -> None:
    part, cache = split(n), None if cache_mb is None else ImageCache(cache_mb)
    for _ in range(2):
        found = list(batches(part, P, batch, cache))
        assert [len(images) for images, _ in found] == sizes
        assert all(images.dtype == np.uint8 and images.shape[1:] == (3, 16, 16) for images, _ in found)
        if n:
            np.testing.assert_array_equal(np.concatenate([images for images, _ in found]), prepared(part))
            np.testing.assert_array_equal(np.concatenate([labels for _, labels in found]), part.labels)


def test_stopping_early_leaves_most_images_undrawn() -> None:
    part = split(400)
    for _ in batches(part, P, 2):
        break
    assert len(drawn(part)) <= 2 * 10


def test_an_error_in_an_image_reaches_the_caller() -> None:
    class Broken(Rendered):
        def image(self, index: int) -> NDArray[np.uint8]:
            raise DataError(f"image {index} is gone")

    part = Split("val", "val", Broken(3), np.zeros(3, dtype=np.int64))
    with pytest.raises(DataError, match="image 0 is gone"):
        list(batches(part, P, 2))


@pytest.mark.parametrize(
    ("sizes", "n", "expected"),
    [((10, 10), 6, (3, 3)), ((2, 10, 10), 12, (2, 5, 5)), ((3, 4), 100, (3, 4)), ((5, 5, 5), 7, (2, 2, 3)), ((4,), 0, (0,))],
)
def test_a_subset_is_spread_evenly(sizes: tuple[int, ...], n: int, expected: tuple[int, ...]) -> None:
    parts = [split(size, seed) for seed, size in enumerate(sizes)]
    found = subset(parts, P, n, seed=0)
    assert tuple(len(drawn(part)) for part in parts) == expected
    assert found.shape == (sum(expected), 3, 16, 16)
    assert found.dtype == np.uint8
    chosen = [prepare(part.images.image(i), P) for part in parts for i in sorted(drawn(part))]
    np.testing.assert_array_equal(found, np.array(chosen, dtype=np.uint8).reshape(found.shape))


def test_a_subset_depends_on_its_seed() -> None:
    parts = [split(20)]
    np.testing.assert_array_equal(subset(parts, P, 5, 1), subset(parts, P, 5, 1))
    assert not np.array_equal(subset(parts, P, 5, 1), subset(parts, P, 5, 2))


# The cache


def test_a_cached_image_is_made_once() -> None:
    part, cache = split(6), ImageCache(64)
    views = TrainImages(part, P, "flip", seed=0, cache=cache)
    for epoch in range(3):
        list(batches(part, P, 4, cache))
        views.set_epoch(epoch)
        [views[i] for i in range(6)]
    assert set(drawn(part).values()) == {1}
    assert cache.n_bytes == 6 * 3 * 16 * 16


def test_the_cache_stops_at_its_limit_and_keeps_what_came_first() -> None:
    part, cache = split(110), ImageCache(1)
    for _ in range(2):
        list(batches(part, LARGE, 64, cache))
    fit = 2**20 // (3 * 64 * 64)
    assert cache.n_bytes == fit * 3 * 64 * 64
    assert Counter(drawn(part).values()) == {1: fit, 2: 110 - fit}


def test_no_cache_at_all() -> None:
    part, cache = split(3), ImageCache(0)
    list(batches(part, P, 2, cache))
    assert cache.n_bytes == 0


def test_splits_and_preprocessings_do_not_mix() -> None:
    first, second, cache = split(4, seed=0), split(4, seed=1), ImageCache(64)  # both are called "train"
    for part in (first, second):
        np.testing.assert_array_equal(next(batches(part, P, 4, cache))[0], prepared(part))
        assert next(batches(part, LARGE, 4, cache))[0].shape == (4, 3, 64, 64)


def test_threads_share_a_cache() -> None:
    part, cache = split(40), ImageCache(64)
    order = np.random.default_rng(0).integers(0, 40, 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: cache.image(part.images, i, P, "prepared"), order))
    expected = prepared(part)
    assert all(np.array_equal(image, expected[i]) for image, i in zip(found, order, strict=True))
    assert cache.n_bytes == 40 * 3 * 16 * 16


def test_a_pickled_cache_is_empty_with_the_same_limit() -> None:
    part, cache = split(110), ImageCache(1)
    list(batches(part, LARGE, 64, cache))
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.n_bytes == 0
    list(batches(part, LARGE, 64, copy))
    assert copy.n_bytes == cache.n_bytes


# Training views


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_views_are_those_of_augment(kind: Literal["none", "flip", "crop-flip"], cached: bool) -> None:
    part = split(6)
    views = TrainImages(part, P, kind, seed=5, cache=ImageCache(64) if cached else None)
    assert len(views) == 6
    for epoch in (0, 3, 3, 0):
        views.set_epoch(epoch)
        for i in (4, 0, 5):
            image, label = views[i]
            assert image.dtype == torch.uint8
            assert label == i % 3
            np.testing.assert_array_equal(image.numpy(), augment(part.images.image(i), P, kind, (5, epoch, i)))
            image.zero_()  # a caller may write to what it is given


def loader(views: TrainImages, workers: int) -> "torch.utils.data.DataLoader[tuple[torch.Tensor, int]]":
    return torch.utils.data.DataLoader(views, batch_size=4, num_workers=workers, persistent_workers=workers > 0)


def test_persistent_workers_give_the_same_epochs() -> None:
    def epochs(workers: int) -> list[torch.Tensor]:
        views = TrainImages(split(10), P, "crop-flip", seed=0, cache=ImageCache(8))
        batched = loader(views, workers)
        found = []
        for epoch in (0, 1, 2):
            views.set_epoch(epoch)
            found.append(torch.cat([images for images, _ in batched]))
        return found

    alone, helped = epochs(0), epochs(2)
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))
    assert not torch.equal(alone[0], alone[1])


# Which dataset


def config(source: str | Path, *ood: str, **data: object) -> Config:
    return build_config(flags={"data.source": str(source), "data.ood": ood, **{f"data.{key}": value for key, value in data.items()}})


def tree(root: Path) -> Path:
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(root / label / f"{i}.png")
    return root


def test_the_embedded_dataset_by_name() -> None:
    dataset = load_dataset(config("shapes"))
    assert dataset.name == "shapes"
    assert dataset.ood


def test_shifted_folders_beside_the_embedded_dataset() -> None:
    with pytest.raises(ConfigError) as caught:
        load_dataset(config("shapes", "x=y"))
    assert caught.value.message == "--ood 'x=y' cannot be used with the dataset 'shapes', which has its own shifted test sets"


def test_a_folder_and_its_shifted_sets(tmp_path: Path) -> None:
    dataset = load_dataset(config(tree(tmp_path / "d"), str(tree(tmp_path / "o")), val_fraction=0.4))
    assert dataset.name == "d"
    assert [len(part) for part in (dataset.train, dataset.val, dataset.id_test)] == [4, 2, 2]
    assert [part.name for part in dataset.ood] == ["o"]


def test_the_decoded_side_follows_a_large_input(tmp_path: Path) -> None:
    root = tree(tmp_path / "d")
    for size, bound in ((None, 1024), (512, 1024), (700, 1400)):
        images = load_dataset(config(root, size=size)).train.images
        assert isinstance(images, FolderImages)
        assert images.short_side == bound


def test_a_local_folder_by_its_plain_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree(tmp_path / "folders").parent)
    assert load_dataset(config("folders")).name == "folders"


@pytest.mark.parametrize(("name", "close"), [("shape", "\n  did you mean: shapes"), ("xyz", ""), ("folders", "")])
def test_an_unknown_name(name: str, close: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        load_dataset(config(name))
    assert caught.value.message == f"no dataset is called '{name}', and no folder of that name exists here"
    assert caught.value.hint == f"known datasets: shapes; or a folder with one sub-folder per class{close}"


def test_a_missing_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"the folder '{tmp_path}/no' does not exist"):
        load_dataset(config(tmp_path / "no"))
