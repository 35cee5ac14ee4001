"""A dataset and nets small enough to train in tests: coloured squares of 16 pixels, and two convolutions."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeft.config import build_config
from edgeft.data import Dataset, Split, SplitKind
from edgeft.data.preprocess import Preprocessing
from edgeft.methods import Stage
from edgeft.progress import Progress
from edgeft.train import FitResult, TrainContext, fit, make_accelerator

SIZE = 16
CLASSES = ("blue", "green", "red")
PREPROCESSING = Preprocessing(SIZE, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class Squares:
    """Noise with a brighter square whose colour channel is the class."""

    def __init__(self, labels: NDArray[np.int64], seed: int, contrast: int = 40) -> None:
        rng = np.random.default_rng(seed)
        self._pixels = rng.integers(0, 200, (len(labels), SIZE, SIZE, 3), dtype=np.uint8)
        for pixels, label in zip(self._pixels, labels, strict=True):
            top, left = rng.integers(0, SIZE // 2, 2)
            pixels[top : top + SIZE // 2, left : left + SIZE // 2, label] += np.uint8(contrast)
        self.n_read = 0

    def __len__(self) -> int:
        return len(self._pixels)

    def image(self, index: int) -> NDArray[np.uint8]:
        self.n_read += 1
        pixels: NDArray[np.uint8] = self._pixels[index]
        return pixels


def split(name: str, kind: SplitKind, n: int, seed: int, n_classes: int = len(CLASSES), contrast: int = 40) -> Split:
    """A split of `n` images, classes in turn."""
    labels = np.arange(n) % n_classes
    return Split(name, kind, Squares(labels, seed, contrast), labels)


def dataset(n_train: int = 50, n_val: int = 37) -> Dataset:
    """All splits, train and val of the given sizes."""
    parts = split("train", "train", n_train, 1), split("val", "val", n_val, 2), split("id", "id", 30, 3)
    return Dataset("squares", CLASSES, *parts, (split("dim", "ood", 30, 4, contrast=20),), size=SIZE)


class TinyNet(nn.Module):
    """Image bytes to logits through two convolutions with batch norm, and dropout on request."""

    def __init__(self, n_classes: int = len(CLASSES), dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.body = nn.Sequential(
                nn.Conv2d(3, 8, 3, 2, 1, bias=False),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Conv2d(8, 16, 3, 2, 1, bias=False),
                nn.BatchNorm2d(16),
                nn.ReLU(),
            )
            self.dropout = nn.Dropout(dropout)
            self.head = nn.Linear(16, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of uint8 [n, 3, 16, 16]."""
        maps = self.body(images.float() / 64 - 2)
        logits: Tensor = self.head(self.dropout(maps.mean((2, 3))))
        return logits


def context(work: Path, **changes: Any) -> TrainContext:
    """A silent context on the CPU: batch 8, seed 3, no augmentation."""
    settings: dict[str, Any] = {"seed": 3, "batch": 8, "accumulate": 1, "augment": "none"} | changes
    accelerator = make_accelerator(build_config(flags={"device": "cpu"}))
    return TrainContext(accelerator=accelerator, work=work, progress=Progress(False), preprocessing=PREPROCESSING, **settings)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


STAGE = Stage("tune", "sgd", epochs=3, learning_rates=(0.02, 0.1), batch_norm="train", momentum=0.9)
DATA = dataset()
STEPS = 3 * 7
"""Steps of STAGE at one rate: 50 images in batches of at most 8, three times."""


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def trained(
    work: Path, stage: Stage = STAGE, model: nn.Module | None = None, on_step: Any = None, **changes: Any
) -> tuple[FitResult, nn.Module]:
    model = TinyNet() if model is None else model
    return fit(model, stage, DATA.train, DATA.val, context(work, **changes), on_step), model


def kill_at(count: int) -> Any:
    """An on_step that kills at its `count`-th call, from 1."""
    calls = iter(range(1, count + 1))

    def on_step(step: int, total: int) -> None:
        if next(calls) == count:
            raise Killed

    return on_step
