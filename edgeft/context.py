"""What every training stage of a run shares: device, seed, batch, folder of checkpoints, image preparation."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from edgeft.config import Config
from edgeft.data.loading import ImageCache
from edgeft.data.preprocess import Augmentation, Preprocessing
from edgeft.errors import ConfigError
from edgeft.progress import Progress


@dataclass
class TrainContext:
    """Where and on what a stage runs.

    `batch` is the number of images per optimizer step, over all processes and the `accumulate` micro-batches; `work` is the folder of
    checkpoints, on a disk that all processes share. The accelerator must leave gradient accumulation at 1, as `make_accelerator` does.
    """

    accelerator: Accelerator
    seed: int
    batch: int
    accumulate: int
    work: Path
    progress: Progress
    preprocessing: Preprocessing
    augment: Augmentation
    workers: int = 0
    cache: ImageCache | None = None

    def say(self, text: str) -> None:
        """One line of progress, from the main process only."""
        if self.accelerator.is_main_process:
            self.progress.line(text)

    def task(self, title: str, total: int) -> AbstractContextManager[Callable[..., None]]:
        """Progress of `total` units, shown by the main process only; yields advance(n=1, note="")."""
        return self.progress.task(title, total) if self.accelerator.is_main_process else nullcontext(_ignore)


def _ignore(n: int = 1, note: str = "") -> None:
    """Progress of the other processes."""


def make_accelerator(config: Config) -> Accelerator:
    """The accelerator for the configured device and precision. Raises ConfigError where this machine lacks them.

    A later call in the same process may choose another precision, and, unless several processes work together, another device.
    """
    precision = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[config.train.precision]
    cpu = config.device == "cpu"
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' is not available on this machine", "edgeft doctor says why; --device cpu works everywhere")
    if precision == "fp16" and (cpu or not torch.cuda.is_available()):
        raise ConfigError("train.precision 'fp16' needs a GPU", "--set train.precision=bf16 works on CPUs")
    if AcceleratorState._shared_state:
        # Accelerate keeps its settings for the whole process; the group of processes must outlive them.
        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    return Accelerator(mixed_precision=precision, cpu=cpu)
