"""One epoch of training and one pass of validation, on one process or several."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgeft.averaging import MovingAverage
from edgeft.context import TrainContext
from edgeft.data import NO_LABEL, Split
from edgeft.data.loading import TrainImages, batches
from edgeft.feed import Batch, Step, TrainFeed, epoch_steps, share, split_share, stream_seed
from edgeft.methods import Stage
from edgeft.objective import Objective, Validation

EVALUATION_BATCH = 64
LOOK_EVERY = 20
"""Steps between looks at the loss where a look makes the device or other processes wait."""

OnStep = Callable[[int, int], None]
"""on_step(step, total): called before the forward pass of each optimizer step of a rate, `step` from 0."""


class Prepared(nn.Module):
    """What accelerate patches and wraps in place of the caller's model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Logits of image bytes."""
        logits: Tensor = self.model(images)
        return logits


@dataclass(frozen=True)
class EpochResult:
    """Mean loss over an epoch, or the step of the rate (from 0) at which it was first not finite."""

    loss: float
    bad_step: int | None


class EpochRunner:
    """Trains and validates one model by one stage's settings; keeps no state between epochs."""

    def __init__(
        self, model: nn.Module, stage: Stage, train: Split, val: Split, context: TrainContext, on_step: OnStep | None, objective: Objective
    ) -> None:
        self._model, self._stage, self._context, self._on_step, self._objective = model, stage, context, on_step, objective
        self._accelerator = context.accelerator
        self._n_train = len(train)
        self._strata = train.strata if stage.sampler == "balanced" else None
        images = TrainImages(train, context.preprocessing, context.augment, stream_seed(context.seed, stage.name), context.cache)
        self._feed = TrainFeed(images, context.workers, self._accelerator.device)
        self._val = split_share(val, self._accelerator.process_index, self._accelerator.num_processes)
        self.steps_per_epoch = len(self._steps(0))
        self._prepared = self._accelerator.prepare_model(Prepared(model))

    def close(self) -> None:
        """Let the accelerator forget the model."""
        self._accelerator.free_memory()

    def train(
        self, optimizer: torch.optim.Optimizer, lr: float, epoch: int, average: MovingAverage, advance: Callable[..., None]
    ) -> EpochResult:
        """One pass over the training images at the cosine rate of `epoch` (from 0) out of the peak rate `lr`, times each group's "scale".

        Ends early at a loss that is not finite; `average` and `advance` are told of each step.
        """
        for group in optimizer.param_groups:
            group["lr"] = lr / 2 * (1 + math.cos(math.pi * epoch / self._stage.epochs)) * group["scale"]
        steps = self._steps(epoch)
        feed = self._feed.epoch(epoch, share(steps, self._accelerator.process_index, self._context.accumulate))
        self._model.train(self._stage.batch_norm == "train")
        _hold_frozen_norms(self._model)
        meter = _LossMeter(self._accelerator, len(steps))
        with self._dropout_seed(lr, epoch):
            for number, step in enumerate(steps):
                if self._on_step is not None:
                    self._on_step(epoch * len(steps) + number, self._stage.epochs * len(steps))
                meter.add(self._backward(feed, sum(map(len, step))))
                if meter.bad_step(number) is not None:
                    break
                self._update(optimizer)
                average.update(epoch * len(steps) + number)
                advance()
        optimizer.zero_grad()
        self._agree_on_buffers(average)
        return EpochResult(meter.total() / self._n_train, None if meter.bad is None else epoch * len(steps) + meter.bad)

    def validate(self) -> Validation | None:
        """How the model does on the validation images, over all processes; None when a score is not finite."""
        # Not through the data-parallel wrapper, which would wait for processes that have fewer batches.
        return validate(self._accelerator.unwrap_model(self._prepared), self._val, self._context, self._objective)

    def _steps(self, epoch: int) -> list[Step]:
        parts, seed = self._accelerator.num_processes * self._context.accumulate, self._context.seed
        order = stream_seed(seed, self._stage.name, "order", epoch)
        return epoch_steps(self._n_train, self._context.batch, parts, order, self._strata)

    def _backward(self, feed: Iterator[Batch], n: int) -> Tensor:
        """Gradients of the mean loss over the `n` images of a step; returns this process's part of the summed loss."""
        device, accumulate = self._accelerator.device, self._context.accumulate
        summed = torch.zeros((), device=device)
        for micro in range(accumulate):
            images, labels = (tensor.to(device, non_blocking=True) for tensor in next(feed))
            with nullcontext() if micro + 1 == accumulate else self._accelerator.no_sync(self._prepared):
                images, targets = self._mixed(images, labels)
                logits = self._prepared(images).float()
                loss = torch.stack([share * self._objective.loss(images, logits, mine) for share, mine in targets]).sum()
                # Data-parallel training averages gradients over processes; wanted is their sum over the step's images.
                self._accelerator.backward(loss * (self._accelerator.num_processes / n))
            summed += loss.detach()
        return summed

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, list[tuple[float, Tensor]]]:
        """The batch and its labels with the share of the loss that each has; with mixup, images and labels of two (arXiv:1710.09412)."""
        if not self._stage.mixup:
            return images, [(1.0, labels)]
        concentration = torch.tensor(self._stage.mixup)
        share = float(torch.distributions.Beta(concentration, concentration).sample())
        partners = torch.randperm(len(labels)).to(labels.device)
        mixed = share * images.float() + (1 - share) * images[partners].float()
        return mixed, [(share, labels), (1 - share, labels[partners])]

    def _update(self, optimizer: torch.optim.Optimizer) -> None:
        """One optimizer step, through the loss scaler where fp16 has one.

        Not through accelerate's optimizer wrapper, which looks for optional packages at every step: 2 ms, a tenth of a small net's.
        """
        scaler = self._accelerator.scaler
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()

    @contextmanager
    def _dropout_seed(self, lr: float, epoch: int) -> Iterator[None]:
        """Random numbers drawn while training depend on the place in training only, and leave the caller's generator alone."""
        device = self._accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(stream_seed(self._context.seed, self._stage.name, lr, epoch, self._accelerator.process_index))
            yield

    @torch.no_grad()
    def _agree_on_buffers(self, average: MovingAverage) -> None:
        """Batch-norm statistics of the main process everywhere; each process has seen other images."""
        if self._accelerator.num_processes > 1:
            for buffer in (*self._model.buffers(), *average.values.values()):
                buffer.copy_(broadcast(buffer.contiguous()))


@torch.no_grad()
def validate(model: nn.Module, val: Split, context: TrainContext, objective: Objective) -> Validation | None:
    """How a model (image bytes to logits) does on this process's share `val` of the validation images, summed over all processes.

    It is left in eval mode. None when a score is not finite.
    """
    model.eval()
    device = context.accelerator.device
    sums = torch.zeros(6, dtype=torch.float64, device=device)  # images, labelled, broken, correct, agreeing, divergence
    compared = False
    for images, labels in batches(val, context.preprocessing, EVALUATION_BATCH, context.cache):
        pictures = torch.from_numpy(images).to(device)
        logits = model(pictures)
        right = (logits.argmax(dim=1) == torch.from_numpy(labels).to(device)).sum()
        known = (right.new_tensor(n) for n in (len(labels), int((labels != NO_LABEL).sum())))
        sums[:4] += torch.stack([*known, (~torch.isfinite(logits)).any().long(), right])
        found = objective.compare(pictures, logits)
        if found is not None:
            compared = True
            sums[4:] += torch.stack(found)
    *counts, agreeing, divergence = context.accelerator.reduce(sums, "sum").tolist()
    n, labelled, broken, correct = map(int, counts)
    if broken:
        return None
    return Validation(n, labelled, correct, int(agreeing), divergence) if compared else Validation(n, labelled, correct)


def _hold_frozen_norms(model: nn.Module) -> None:
    """Batch norms whose scale and shift are not trained stay in eval mode: a layer that is left as it is keeps its statistics too."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.weight is not None and not module.weight.requires_grad:
            module.eval()


class _LossMeter:
    """Sums the loss on the device and looks at it rarely enough not to slow the device down."""

    def __init__(self, accelerator: Accelerator, n_steps: int) -> None:
        self._accelerator, self._n_steps = accelerator, n_steps
        self._every = 1 if accelerator.device.type == "cpu" and accelerator.num_processes == 1 else LOOK_EVERY
        self._sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        self._n_finite = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        self.bad: int | None = None

    def add(self, loss: Tensor) -> None:
        """Count one step's summed loss."""
        self._sum += loss
        self._n_finite += torch.isfinite(self._sum)  # A sum that is once not finite stays so.

    def bad_step(self, number: int) -> int | None:
        """The first step of the epoch up to `number` with a bad loss on any process; looked up now and then and on the last step."""
        if (number + 1) % self._every == 0 or number + 1 == self._n_steps:
            n_finite = int(self._accelerator.gather(self._n_finite.reshape(1)).min())
            self.bad = n_finite if n_finite <= number else None
        return self.bad

    def total(self) -> float:
        """The loss summed over all images and processes."""
        return float(self._accelerator.reduce(self._sum, "sum"))
