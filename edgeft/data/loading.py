"""From splits to batches: the dataset of a configuration, evaluation in order, training views, images kept in memory."""

import os
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from edgeft.config import Config
from edgeft.data import DATASETS, Dataset, ImageSource, Split
from edgeft.data.decode import SHORT_SIDE
from edgeft.data.preprocess import REDUCING_GAP, Augmentation, Preprocessing, augment, mirror, prepare, shrink
from edgeft.data.unlabelled import load_unlabelled
from edgeft.errors import ConfigError, DataError
from edgeft.evaluation.sets import read_groups
from edgeft.progress import Progress
from edgeft.registry import nearest

_FOLDERS = "folders"
_AHEAD = 4
"""Batches that evaluation prepares ahead, each in its own thread."""

Form = Literal["shrunk", "prepared"]
"""What is kept of an image: its pixels for random crops, or the finished network input."""


def load_dataset(config: Config, progress: Progress | None = None, *, training: bool = True) -> Dataset:
    """The dataset that `data.source` names: a registered one, drawn by the run's seed, or a class-per-folder tree.

    A registered name wins over a folder of the same name (write "./shapes" for the folder). With `training`, the images of
    quant.unlabelled and the training images' groups of train.groups are in it. Raises ConfigError for an unknown name and for shifted
    folders beside a registered dataset, DataError for a folder or a CSV that does not fit.
    """
    dataset = _labelled(config, progress)
    if training and config.train.groups is not None:
        groups = read_groups(config.train.groups.expanduser(), dataset.train, dataset.classes)
        dataset = replace(dataset, train=replace(dataset.train, groups=np.unique(groups, return_inverse=True)[1].astype(np.int64)))
    if not (training and config.quant.unlabelled):
        return dataset
    split, notes = load_unlabelled(config.quant.unlabelled, short_side(config), progress or Progress(enabled=False))
    return replace(dataset, unlabelled=split, notes=(*dataset.notes, *notes, *_also_tested(config)))


def short_side(config: Config) -> int:
    """Bound of the decoded short side of image files in pixels."""
    return max(SHORT_SIDE, REDUCING_GAP * (config.data.size or 0))


def _also_tested(config: Config) -> list[str]:
    """A line for each shifted test set that holds images of quant.unlabelled."""
    given = [folder.expanduser().resolve() for folder in config.quant.unlabelled]
    tested = {text: Path(text.rpartition("=")[2]).expanduser().resolve() for text in config.data.ood}
    shared = [text for text, path in tested.items() if any(path == one or path in one.parents or one in path.parents for one in given)]
    return [f"shifted test set '{text}': images of it, without labels, take part in training (quant.unlabelled)" for text in shared]


def _labelled(config: Config, progress: Progress | None) -> Dataset:
    data = config.data
    named = [name for name in DATASETS.names() if name != _FOLDERS]
    if data.source in named:
        if data.ood:
            raise ConfigError(
                f"--ood '{data.ood[0]}' cannot be used with the dataset '{data.source}', which has its own shifted test sets",
                "give --data DIR too, or leave --ood out",
            )
        dataset: Dataset = DATASETS.get(data.source)(config.seed)
        return dataset
    root = Path(data.source).expanduser()
    if len(root.parts) == 1 and not os.path.exists(root):
        close = nearest(data.source, named, n=1)
        hint = f"known datasets: {', '.join(named)}; or a folder with one sub-folder per class"
        hint += f"\n  did you mean: {close[0]}" if close else ""
        raise DataError(f"no dataset is called '{data.source}', and no folder of that name exists here", hint)
    loaded: Dataset = DATASETS.get(_FOLDERS)(
        root,
        data.ood,
        seed=config.seed,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        short_side=short_side(config),
        progress=progress,
    )
    return loaded


class ImageCache:
    """Images kept in memory, shrunk or prepared, up to `cache_mb` MiB; safe to use from several threads.

    What comes first stays: epochs go round all images, so that throwing out the oldest would never hit. In the worker
    processes of a DataLoader each worker keeps its own share of the limit.
    """

    def __init__(self, cache_mb: int) -> None:
        self._cache_mb = cache_mb
        self._bytes = 0
        self._kept: dict[Hashable, NDArray[np.uint8]] = {}
        self._sources: dict[int, ImageSource] = {}  # holding them keeps their ids from being reused
        self._lock = threading.Lock()

    @property
    def n_bytes(self) -> int:
        """Bytes of all images kept."""
        return self._bytes

    def image(self, source: ImageSource, index: int, p: Preprocessing, form: Form) -> NDArray[np.uint8]:
        """One image as `shrink` or `prepare` makes it; kept if there is room. Not to be written to."""
        key = (id(source), index, form, p)
        found = self._kept.get(key)
        if found is None:
            found = _made(source, index, p, form)
            self._keep(key, source, found)
        return found

    def _keep(self, key: Hashable, source: ImageSource, image: NDArray[np.uint8]) -> None:
        worker = torch.utils.data.get_worker_info()
        limit_bytes = self._cache_mb * 2**20 // (worker.num_workers if worker is not None else 1)
        with self._lock:
            if key not in self._kept and self._bytes + image.nbytes <= limit_bytes:
                self._kept[key] = image
                self._sources[id(source)] = source
                self._bytes += image.nbytes

    def __reduce__(self) -> tuple[Callable[[int], "ImageCache"], tuple[int]]:
        """Another process starts with an empty cache: the ids of its sources are others."""
        return ImageCache, (self._cache_mb,)


def _made(source: ImageSource, index: int, p: Preprocessing, form: Form) -> NDArray[np.uint8]:
    image = source.image(index)
    return prepare(image, p) if form == "prepared" else shrink(image, p)


def _fetch(source: ImageSource, index: int, p: Preprocessing, form: Form, cache: ImageCache | None) -> NDArray[np.uint8]:
    return _made(source, index, p, form) if cache is None else cache.image(source, index, p, form)


def batches(
    split: Split, p: Preprocessing, batch: int, cache: ImageCache | None = None
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Prepared images [n, 3, size, size] and labels [n] of a split in order; the last batch may be smaller.

    A few batches are prepared ahead in threads while the caller works.
    """

    def made(start: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        stop = min(start + batch, len(split))
        images = [_fetch(split.images, index, p, "prepared", cache) for index in range(start, stop)]
        return np.stack(images), split.labels[start:stop]

    ahead = min(_AHEAD, os.cpu_count() or 1)
    waiting: deque[Future[tuple[NDArray[np.uint8], NDArray[np.int64]]]] = deque()
    with ThreadPoolExecutor(ahead) as pool:
        try:
            for start in range(0, len(split), batch):
                waiting.append(pool.submit(made, start))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def subset(splits: Sequence[Split], p: Preprocessing, n: int, seed: int) -> NDArray[np.uint8]:
    """Prepared images [n', 3, size, size], drawn by `seed` and spread evenly over the splits, in their order.

    A split with fewer images than its share gives all, and the others give more; n' is the smaller of `n` and the total.
    """
    images = [_made(split.images, index, p, "prepared") for split, index in drawn(splits, n, seed)]
    return np.stack(images) if images else np.zeros((0, 3, p.size, p.size), dtype=np.uint8)


def drawn(splits: Sequence[Split], n: int, seed: int) -> list[tuple[Split, int]]:
    """The images of `subset`: their splits and their numbers there."""
    rng = np.random.default_rng(seed)
    shares = _shares([len(split) for split in splits], n)
    return [
        (split, int(index)) for split, share in zip(splits, shares, strict=True) for index in np.sort(rng.permutation(len(split))[:share])
    ]


def _shares(available: Sequence[int], n: int) -> list[int]:
    """How many to take of each so that the total is min(n, sum) and no share is smaller than it must be."""
    shares = [0] * len(available)
    left = n
    for position, index in enumerate(sorted(range(len(available)), key=lambda i: available[i])):
        shares[index] = min(available[index], left // (len(available) - position))
        left -= shares[index]
    return shares


class TrainImages(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Training views of a split for a DataLoader: uint8 [3, size, size] and a label.

    A view depends on (seed, epoch, index) alone. The epoch lives in shared memory, so that `set_epoch` reaches persistent
    workers too; call it before iterating, as workers fetch ahead.
    """

    def __init__(self, split: Split, p: Preprocessing, kind: Augmentation, seed: int, cache: ImageCache | None = None) -> None:
        self._split, self._p, self._kind, self._seed, self._cache = split, p, kind, seed, cache
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self._split)

    def set_epoch(self, epoch: int) -> None:
        """Choose the views of another epoch."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        seed = (self._seed, int(self._epoch), index)
        if self._kind == "crop-flip":
            view = augment(_fetch(self._split.images, index, self._p, "shrunk", self._cache), self._p, self._kind, seed)
        else:
            view = mirror(_fetch(self._split.images, index, self._p, "prepared", self._cache), self._kind, seed)
        return torch.from_numpy(view.copy()), int(self._split.labels[index])
