"""Datasets as named splits of lazily produced images, and the dataset registry."""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeft.registry import Entry, Registry

SplitKind = Literal["train", "val", "id", "ood"]
NO_LABEL = -1
"""Label of an image that has none."""


class ImageSource(Protocol):
    """Images by index: rendered, or read from files. The same index always gives the same bytes."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> NDArray[np.uint8]:
        """RGB bytes of one image as stored or rendered, shape [height, width, 3]."""
        ...


@dataclass(frozen=True)
class Split:
    """One named part of a dataset. `name` is "train", "val", "id" or the name of a shifted set; `note` explains a shift.

    `groups` number the group of each image within the data (where they were taken, say), where the data name groups.
    """

    name: str
    kind: SplitKind
    images: ImageSource
    labels: NDArray[np.int64]
    note: str = ""
    groups: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def strata(self) -> NDArray[np.int64]:
        """A number for each image: the same for images of the same class and, where there are groups, of the same group."""
        columns = [self.labels] if self.groups is None else [self.labels, self.groups]
        strata: NDArray[np.int64] = np.unique(np.stack(columns), axis=1, return_inverse=True)[1].reshape(-1)
        return strata


@dataclass(frozen=True)
class Dataset:
    """Classes and splits. Only `train` is trained on and only `val` selects; `id` and `ood` are measured once, at the end.

    `size` is the native square image size where there is one (rendered sets), `augment` the default augmentation and
    `notes` are lines about the data that the user should see (skipped files, classes without images in a shifted set).
    `unlabelled` images, where there are any, belong to the training of the fixed-point net; their labels are NO_LABEL.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    id_test: Split
    ood: tuple[Split, ...]
    size: int | None = None
    augment: Literal["none", "flip", "crop-flip"] = "none"
    notes: tuple[str, ...] = ()
    unlabelled: Split | None = None

    @property
    def tests(self) -> tuple[Split, ...]:
        """The ID test split followed by every OOD split."""
        return (self.id_test, *self.ood)


DATASETS = Registry(
    "dataset",
    Entry("shapes", "embedded: rendered shape classes with six shifted test sets", "edgeft.data.shapes:load"),
    Entry("folders", "any class-per-folder tree (--data DIR, --ood NAME=DIR)", "edgeft.data.folders:load"),
)
