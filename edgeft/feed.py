"""What each process sees and in which order: seeds, steps of an epoch, training loaders, shares of an evaluation split."""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from edgeft.data import Split
from edgeft.data.loading import TrainImages
from edgeft.data.mixing import selected
from edgeft.errors import ConfigError

Batch = tuple[Tensor, Tensor]
"""uint8 images [n, 3, height, width] in channels-last layout, int64 labels [n]."""
Step = list[list[int]]
"""Image indices of one optimizer step, one list per process and micro-batch."""


def stream_seed(*parts: object) -> int:
    """A 31-bit seed that depends on the parts alone, e.g. the run's seed, the stage's name and the epoch."""
    return zlib.crc32("/".join(map(str, parts)).encode()) & 0x7FFFFFFF


def balanced_order(strata: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """As many draws as there are images, in random order: every stratum (a number for each image) equally often, but for one draw.

    The images of a stratum come in turn, each once before one comes again.
    """
    rng, names = np.random.default_rng(seed), np.unique(strata)
    counts = np.full(len(names), len(strata) // len(names))
    counts[rng.permutation(len(names))[: len(strata) % len(names)]] += 1
    drawn: list[NDArray[np.int64]] = []
    for name, count in zip(names, counts, strict=True):
        images = np.flatnonzero(strata == name)
        drawn.append(np.concatenate([rng.permutation(images) for _ in range(-(-count // len(images)))] or [images])[:count])
    return rng.permutation(np.concatenate(drawn))


def epoch_steps(n: int, batch: int, parts: int, seed: int, strata: NDArray[np.int64] | None = None) -> list[Step]:
    """All `n` images in random order, in steps of at most `batch` images that differ by one image at most; each in `parts`.

    With `strata` the images are those of `balanced_order`. An equal split leaves no short last batch, which would disturb batch norm,
    and drops no image. Raises ConfigError when a step has fewer images than parts.
    """
    order = np.random.default_rng(seed).permutation(n) if strata is None else balanced_order(strata, seed)
    steps = np.array_split(order, -(-n // batch))
    smallest = n // len(steps)
    if smallest < parts:
        raise ConfigError(
            f"a step of {smallest} images cannot be split over {parts} processes and micro-batches",
            "raise train.batch, or lower train.accumulate or the number of processes",
        )
    return [[part.tolist() for part in np.array_split(step, parts)] for step in steps]


def share(steps: Sequence[Step], process: int, accumulate: int) -> list[list[int]]:
    """The micro-batches of one process, in order: `accumulate` for each step."""
    return [part for step in steps for part in step[process * accumulate : (process + 1) * accumulate]]


def collate(items: Sequence[tuple[Tensor, int]]) -> Batch:
    """Stack images and labels, images in channels-last layout."""
    images = torch.stack([image for image, _ in items]).contiguous(memory_format=torch.channels_last)
    return images, torch.tensor([label for _, label in items], dtype=torch.int64)


class TrainFeed:
    """Batches of a training dataset, by given lists of indices, decoded by `workers` processes (0: here) ahead of time.

    The images must depend on epoch and index alone, as `TrainImages` does: the order of decoding is then of no consequence.
    Workers live as long as the feed, and so do the images that they keep in memory.
    """

    def __init__(self, images: TrainImages, workers: int, device: torch.device) -> None:
        self._images = images
        self._order: list[list[int]] = []
        self._loader = DataLoader(
            images,
            batch_sampler=_Order(self._order),
            num_workers=workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # Its own, because a loader draws a number even when nothing is random.
        )

    def epoch(self, epoch: int, order: Sequence[list[int]]) -> Iterator[Batch]:
        """The views of one epoch, in batches of the given indices."""
        self._images.set_epoch(epoch)
        self._order[:] = order
        return iter(self._loader)


class _Order:
    """A batch sampler whose list is replaced between epochs."""

    def __init__(self, order: list[list[int]]) -> None:
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._order)


def split_share(split: Split, process: int, n_processes: int) -> Split:
    """The part of an evaluation split that one process sees: every image belongs to exactly one process."""
    if n_processes == 1:
        return split
    return selected(split, np.arange(process, len(split), n_processes))
