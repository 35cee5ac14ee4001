"""The one training procedure: run an SGD stage at every learning rate, keep the best epoch, survive a kill at any moment."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeft.averaging import MovingAverage
from edgeft.checkpoint import copy_of, digest, read_checkpoint, restore, state_of, under_prefix, with_prefix, write_checkpoint
from edgeft.context import TrainContext, make_accelerator
from edgeft.data import Split
from edgeft.epoch import EpochRunner, OnStep
from edgeft.errors import ArtifactError, TrainingError
from edgeft.methods import Stage
from edgeft.objective import Labels, Objective, Validation, rank

__all__ = ["FitResult", "TrainContext", "fit", "make_accelerator"]

START_TOLERANCE = 1e-3
"""Relative difference in the norm of all start weights up to which a checkpoint is taken up."""


@dataclass(frozen=True)
class FitResult:
    """The chosen weights of a stage: learning rate, epoch (from 1; rate and epoch 0 are the start) and validation accuracy (0 ... 1).

    `history` has a JSON-able row for each epoch of each rate: lr, epoch, train_loss, val_accuracy, val_correct, and with a teacher
    val_agreement and val_divergence; or lr, epoch and non_finite_step (from 1) where a rate diverged. The start has a row without
    train_loss where it competed.
    """

    lr: float
    epoch: int
    val_accuracy: float
    history: list[dict[str, Any]]


def fit(
    model: nn.Module, stage: Stage, train: Split, val: Split, context: TrainContext, on_step: OnStep | None = None,
    objective: Objective | None = None, rate_scales: Mapping[str, float] | None = None,
) -> FitResult:  # fmt: skip
    """Train `model` (image bytes to logits) by an SGD stage and leave its best weights in it, in eval mode.

    The loss is the objective's, by default cross-entropy to the labels. Parameters in `rate_scales` have that share of the learning
    rate, the others all of it. Every learning rate starts from the weights that `model` comes with. With a moving average it is the
    averaged weights that are validated and kept. The best epoch has the highest accuracy on `val`, or with a teacher the smallest
    divergence from it; the later one on ties, among rates the smaller one. `on_step(step, total)` is called before each optimizer step
    of a rate, from 0.

    After every epoch a checkpoint in `context.work/<stage name>` is replaced, and a later call goes on from there to the same weights
    as an uninterrupted one; a finished stage is only read back. What a model keeps outside its parameters and buffers is not in it.
    Data order, augmentation and dropout depend on the seed, the stage, the epoch and the image, not on global random state.

    Raises TrainingError when the only rate, or every rate before its first epoch ended, gives a loss that is not finite; ConfigError
    when a step cannot be split over the processes; ArtifactError when checkpoints cannot be read, written or used.
    """
    with _repeatable_convolutions():
        return _Fit(model, stage, train, val, context, objective or Labels(stage.label_smoothing), rate_scales or {}).run(on_step)


def rate_file(folder: Path, number: int) -> Path:
    """Where a stage with `keep_rates` and checkpoints in `folder` writes the best weights of its rate of that number, from 0."""
    return folder / f"rate-{number}.safetensors"


def epoch_file(folder: Path, number: int, epoch: int) -> Path:
    """Where a stage with `keep_epochs` writes the weights after an epoch (from 1) of its rate of that number."""
    return folder / f"rate-{number}-epoch-{epoch}.safetensors"


def kept_epochs(n_epochs: int, keep: int) -> list[int]:
    """At most `keep` epochs (from 1), evenly spaced; the last one is always among them."""
    return sorted({math.ceil(n_epochs * (place + 1) / keep) for place in range(keep)})


@contextmanager
def _repeatable_convolutions() -> Iterator[None]:
    # Not through cudnn.flags, which would also overrule what the caller has chosen for TF32.
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


class _Fit:
    """One stage under way: where it is, what was best, and the checkpoint that holds both."""

    def __init__(
        self, model: nn.Module, stage: Stage, train: Split, val: Split, context: TrainContext, objective: Objective,
        rate_scales: Mapping[str, float],
    ) -> None:  # fmt: skip
        self._stage, self._context, self._accelerator, self._objective = stage, context, context.accelerator, objective
        self._model = model.to(self._accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._train, self._val, self._rate_scales = train, val, rate_scales
        self._folder = context.work / stage.name
        self._state_file, self._start_file = self._folder / "state.safetensors", self._folder / "start.safetensors"
        self._key = self._digest()
        self._norm = sum(float(parameter.detach().double().square().sum()) for parameter in model.parameters()) ** 0.5
        self._first_scaler = self._scaler()
        self._rate = self._epoch = 0  # the next epoch to run
        self._history: list[dict[str, Any]] = []
        self._best: dict[str, Any] | None = None
        self._best_state: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}
        self._momentum: dict[str, Tensor] = {}
        self._average: dict[str, Tensor] = {}

    def run(self, on_step: OnStep | None) -> FitResult:
        """Go through the learning rates that are left."""
        finished = self._load()
        if finished is not None:
            return finished
        runner = EpochRunner(self._model, self._stage, self._train, self._val, self._context, on_step, self._objective)
        try:
            if self._stage.keep_start and self._best is None and self._rate == self._epoch == 0:
                self._try_start(runner)
            while self._rate < len(self._stage.learning_rates):
                self._run_rate(runner)
        finally:
            runner.close()
        return self._finish()

    def _try_start(self, runner: EpochRunner) -> None:
        """Let the untrained start compete."""
        found = runner.validate()
        if found is None:
            raise TrainingError(
                f"{self._stage.name}: the start weights give scores that are not finite", "check the weights, data.mean and data.std"
            )
        self._record({"lr": 0.0, "epoch": 0}, found)

    def _run_rate(self, runner: EpochRunner) -> None:
        """Train at one rate from its next epoch to its last, or until it diverges."""
        lr, first, n_steps = self._stage.learning_rates[self._rate], self._epoch, runner.steps_per_epoch
        optimizer = self._optimizer(lr)
        average, self._average = MovingAverage(self._model, self._stage.ema, self._average), {}
        title = f"{self._stage.name}, learning rate {lr:g} ({self._rate + 1}/{len(self._stage.learning_rates)})"
        with self._context.task(title, self._stage.epochs * n_steps) as advance:
            advance(first * n_steps)
            for epoch in range(first, self._stage.epochs):
                result = runner.train(optimizer, lr, epoch, average, advance)
                with average.shown():
                    found = runner.validate() if result.bad_step is None else None
                    if found is not None:
                        self._record({"lr": lr, "epoch": epoch + 1, "train_loss": result.loss}, found)
                if found is None:
                    last = (epoch + 1) * n_steps - 1  # The last step's update is what broke the scores.
                    self._give_up(epoch, last if result.bad_step is None else result.bad_step, self._stage.epochs * n_steps)
                    return
                self._move_on(epoch + 1, with_prefix("momentum", self._momentum_of(optimizer)) | with_prefix("average", average.values))
                advance(0, note=f"epoch {epoch + 1}: {found}")

    def _optimizer(self, lr: float) -> torch.optim.Optimizer:
        """A fresh optimizer over the start weights, or the checkpointed one over the checkpointed weights."""
        if self._epoch == 0:
            restore(self._model, self._start)
            self._set_scaler(self._first_scaler)
        trained = {name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad}
        by_scale: dict[float, list[nn.Parameter]] = {}
        for name, parameter in trained.items():
            by_scale.setdefault(self._rate_scales.get(name, 1.0), []).append(parameter)
        groups = [{"params": parameters, "scale": scale} for scale, parameters in by_scale.items()]
        sgd = torch.optim.SGD(groups, lr=lr, momentum=self._stage.momentum, weight_decay=self._stage.weight_decay)
        for name, buffer in self._momentum.items():
            sgd.state[trained[name]]["momentum_buffer"] = torch.empty_like(trained[name]).copy_(buffer)
        self._momentum = {}
        return sgd

    # --- choice ------------------------------------------------------------------------------------------------------

    def _record(self, row: dict[str, Any], found: Validation) -> None:
        """Note an epoch; keep its weights if they are the best so far."""
        row = row | found.row()
        self._history.append(row)
        # On ties: the start (rate 0), which distorts nothing; then the smaller rate, then the later epoch.
        best = self._best
        tie_won = best is not None and rank(row) == rank(best) and row["lr"] <= best["lr"]
        if best is None or rank(row) > rank(best) or tie_won:
            self._best = row
            self._best_state = copy_of(state_of(self._model))
        if self._stage.keep_rates and "train_loss" in row:
            self._keep_of_rate(row)
        kept = kept_epochs(self._stage.epochs, self._stage.keep_epochs)
        if "train_loss" in row and row["epoch"] in kept and self._accelerator.is_main_process:
            write_checkpoint(epoch_file(self._folder, self._rate, row["epoch"]), row, state_of(self._model))

    def _keep_of_rate(self, row: dict[str, Any]) -> None:
        """Write the weights of an epoch down if it is the best of its rate, the later one on ties."""
        same_rate = [rank(other) for other in self._history if other["lr"] == row["lr"] and "train_loss" in other]
        if rank(row) == max(same_rate) and self._accelerator.is_main_process:
            write_checkpoint(rate_file(self._folder, self._rate), row, state_of(self._model))

    def _give_up(self, epoch: int, step: int, total: int) -> None:
        """Leave this rate and say why; raise when it is the only one."""
        lr = self._stage.learning_rates[self._rate]
        text = f"{self._stage.name}: the loss is not finite at step {step + 1} of {total} with learning rate {lr:g}"
        if len(self._stage.learning_rates) == 1:
            raise self._failure(text)
        self._context.say(f"{text}; going on with the other rates")
        self._history.append({"lr": lr, "epoch": epoch + 1, "non_finite_step": step + 1})
        self._move_on(self._stage.epochs, {})

    def _failure(self, text: str) -> TrainingError:
        """The error to raise, with the last good weights put back into the model."""
        restore(self._model, self._best_state or self._start)
        kept = self._state_file if any("train_loss" in row for row in self._history) else self._start_file
        return TrainingError(
            f"{text}; the last good checkpoint is kept in '{kept}'", "use a lower learning rate (train.lr, or quant.lr) and another --out"
        )

    def _finish(self) -> FitResult:
        """Put the best weights into the model and note that the stage is done."""
        if self._best is None or not any("train_loss" in row for row in self._history):
            rows = ", ".join(f"step {row['non_finite_step']} with {row['lr']:g}" for row in self._history if "non_finite_step" in row)
            raise self._failure(f"{self._stage.name}: the loss is not finite in the first epoch of any learning rate ({rows})")
        restore(self._model, self._best_state)
        self._model.eval()
        result = FitResult(self._best["lr"], self._best["epoch"], self._best["val_accuracy"], self._history)
        self._save(with_prefix("best", self._best_state), result)
        if self._accelerator.is_main_process:
            self._start_file.unlink(missing_ok=True)
        return result

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _move_on(self, next_epoch: int, training: dict[str, Tensor]) -> None:
        """Advance to `next_epoch`, or past the last one to the next rate, and save; `training` is what goes on within a rate."""
        tensors = with_prefix("best", self._best_state)
        if next_epoch < self._stage.epochs:
            self._epoch = next_epoch
            tensors |= with_prefix("model", state_of(self._model)) | training
        else:
            self._rate, self._epoch = self._rate + 1, 0
        self._save(tensors, None)

    def _momentum_of(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """The optimizer's running averages by parameter name; empty without momentum."""
        averages = {name: optimizer.state.get(parameter, {}).get("momentum_buffer") for name, parameter in self._model.named_parameters()}
        return {name: average for name, average in averages.items() if average is not None}

    def _save(self, tensors: dict[str, Tensor], result: FitResult | None) -> None:
        """Replace the checkpoint."""
        note = {
            "key": self._key,
            "norm": self._norm,
            "rate": self._rate,
            "epoch": self._epoch,
            "history": self._history,
            "best": self._best,
            "scaler": self._scaler(),
            "result": None if result is None else asdict(result),
        }
        if self._accelerator.is_main_process:
            write_checkpoint(self._state_file, note, tensors)
        self._accelerator.wait_for_everyone()

    def _load(self) -> FitResult | None:
        """Take up what an earlier call left, or note the start; the result where the stage had finished."""
        saved, start = read_checkpoint(self._state_file), read_checkpoint(self._start_file)
        self._check_agreement(saved[0] if saved is not None else None)
        for found in (saved, start):
            if found is not None:
                self._check_origin(found[0])
        if saved is not None and saved[0]["result"] is not None:
            restore(self._model, under_prefix("best", saved[1]))
            self._model.eval()
            self._context.say(f"{self._stage.name}: finished before")
            return FitResult(**saved[0]["result"])
        self._start = copy_of(state_of(self._model)) if start is None else start[1]
        if start is None and self._accelerator.is_main_process:
            write_checkpoint(self._start_file, {"key": self._key, "norm": self._norm}, self._start)
        self._accelerator.wait_for_everyone()
        if saved is not None:
            self._take_up(*saved)
        return None

    def _take_up(self, note: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go to where a checkpoint was written."""
        self._rate, self._epoch, self._history, self._best = note["rate"], note["epoch"], note["history"], note["best"]
        self._best_state = under_prefix("best", tensors)
        if self._epoch > 0:
            restore(self._model, under_prefix("model", tensors))
            self._momentum, self._average = under_prefix("momentum", tensors), under_prefix("average", tensors)
            self._set_scaler(note["scaler"])
        if self._rate < len(self._stage.learning_rates):
            lr = self._stage.learning_rates[self._rate]
            self._context.say(f"{self._stage.name}: resuming at learning rate {lr:g}, epoch {self._epoch + 1}")

    def _check_origin(self, note: dict[str, Any]) -> None:
        """Raise ArtifactError when a checkpoint is not of this stage, these data and (but for rounding) these start weights."""
        if note.get("key") != self._key:
            raise ArtifactError(f"the checkpoints in '{self._folder}' belong to a run with other settings or data", "use another --out")
        # Not bit for bit: an earlier stage computed again on a GPU may round otherwise.
        if not math.isclose(note["norm"], self._norm, rel_tol=START_TOLERANCE):
            raise ArtifactError(f"the checkpoints in '{self._folder}' started from other weights than these", "use another --out")

    def _check_agreement(self, note: dict[str, Any] | None) -> None:
        """Raise ArtifactError when the processes found different checkpoints, as on disks that they do not share."""
        place = torch.tensor([[-1, -1] if note is None else [note["rate"], note["epoch"]]], device=self._accelerator.device)
        places = self._accelerator.gather(place)
        if bool((places != places[0]).any()):
            raise ArtifactError(f"the processes see different checkpoints in '{self._folder}'", "put --out on a disk that all share")

    def _digest(self) -> str:
        """What a checkpoint must have in common with this call."""
        context, accelerator = self._context, self._accelerator
        settings = [context.seed, context.batch, context.accumulate, accelerator.num_processes, accelerator.mixed_precision]
        data = [context.preprocessing.to_json(), context.augment, self._train.labels.tolist(), self._val.labels.tolist()]
        shapes = {name: list(tensor.shape) for name, tensor in state_of(self._model).items()}
        return digest(asdict(self._stage), self._objective.name, settings, data, shapes)

    def _scaler(self) -> dict[str, Any] | None:
        """State of the fp16 loss scaler, JSON-able."""
        return None if self._accelerator.scaler is None else self._accelerator.scaler.state_dict()

    def _set_scaler(self, state: dict[str, Any] | None) -> None:
        if self._accelerator.scaler is not None and state is not None:
            self._accelerator.scaler.load_state_dict(state)
