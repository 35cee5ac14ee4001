"""Averages of weights in place of one model: WiSE-FT between two stages, greedy soups of several learning rates.

Both choose on the ID validation split. Batch-norm statistics of an average are estimated again where those of the averaged
models differ; after LP-FT, which leaves them alone, they do not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgeft.checkpoint import copy_of, digest, read_checkpoint, restore, state_of, write_checkpoint
from edgeft.context import TrainContext
from edgeft.data import Dataset, Split
from edgeft.data.loading import batches
from edgeft.data.mixing import selected
from edgeft.epoch import EVALUATION_BATCH, validate
from edgeft.errors import ArtifactError, TrainingError
from edgeft.feed import split_share, stream_seed
from edgeft.methods import Stage
from edgeft.models import Classifier
from edgeft.objective import Labels
from edgeft.train import rate_file

State = Mapping[str, Tensor]
"""Every parameter and buffer by name."""
ALPHAS = tuple(number / 10 for number in range(11))
CLOSE_ENOUGH = 0.003
"""A smaller alpha wins against one whose validation accuracy is better by no more than this: it stays nearer to the pretrained features."""
STATISTICS_IMAGES = 2048
"""Training images that batch-norm statistics are estimated from."""
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class WiseResult:
    """The chosen place between start (0) and end (1), its validation accuracy (0 ... 1), and a row for every place tried."""

    alpha: float
    val_accuracy: float
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class SoupResult:
    """The models in the soup (lr, epoch), best first, its validation accuracy (0 ... 1), and a row for every model offered."""

    members: list[dict[str, Any]]
    val_accuracy: float
    history: list[dict[str, Any]]


Result = TypeVar("Result", WiseResult, SoupResult)


def wise(classifier: Classifier, stage: Stage, start: State, dataset: Dataset, context: TrainContext) -> WiseResult:
    """Put (1 - alpha) * `start` + alpha * the classifier's weights into it, for the best of 11 alphas on validation, in eval mode.

    WiSE-FT (Wortsman et al., arXiv:2109.01903) with the linear probe in the place of the zero-shot model. The smallest alpha within
    CLOSE_ENOUGH of the best accuracy is taken; 0 and 1 are the two models bit for bit. A finished stage is only read back.
    Raises TrainingError when a score is not finite.
    """
    kitchen = _Kitchen(classifier, stage, dataset, context)
    end = copy_of(state_of(classifier))
    key = kitchen.key(start, end)
    done = kitchen.finished(key, WiseResult)
    if done is not None:
        return done
    history: list[dict[str, Any]] = []
    with context.task(f"{stage.name}: {len(ALPHAS)} places between", len(ALPHAS)) as advance:
        for alpha in ALPHAS:
            kitchen.put(interpolated(start, end, alpha), (start, end) if 0 < alpha < 1 else ())
            history.append({"alpha": alpha, **kitchen.score()})
            advance(1, note=f"alpha {alpha:g}: validation {history[-1]['val_accuracy']:.1%}")
    needed = max(row["val_accuracy"] for row in history) - CLOSE_ENOUGH
    chosen = next(row for row in history if row["val_accuracy"] >= needed)
    kitchen.put(interpolated(start, end, chosen["alpha"]), (start, end) if 0 < chosen["alpha"] < 1 else ())
    return kitchen.finish(key, WiseResult(chosen["alpha"], chosen["val_accuracy"], history))


def soup(classifier: Classifier, stage: Stage, swept: Stage, dataset: Dataset, context: TrainContext) -> SoupResult:
    """Put a greedy soup of the best epoch of every learning rate of the stage `swept` into the classifier, in eval mode.

    Model soups (Wortsman et al., arXiv:2203.05482): beginning with the best model on validation, each next one is averaged in if the
    average has more correct validation images than the soup before it. A soup of one is that model bit for bit. A finished stage is
    only read back. Raises ArtifactError when the sweep's weights are gone, TrainingError when a score is not finite.
    """
    kitchen = _Kitchen(classifier, stage, dataset, context)
    rows, states = _sweep(context.work / swept.name, len(swept.learning_rates))
    key = kitchen.key(*states)
    done = kitchen.finished(key, SoupResult)
    if done is not None:
        return done
    taken = [0]
    history = [_member(rows[0]) | {"val_correct": rows[0]["val_correct"], "val_accuracy": rows[0]["val_accuracy"], "taken": True}]
    best = history[0]
    for number in range(1, len(rows)):
        used = [states[index] for index in (*taken, number)]
        kitchen.put(averaged(used), used)
        row = _member(rows[number]) | kitchen.score()
        row["taken"] = row["val_correct"] > best["val_correct"]
        history.append(row)
        if row["taken"]:
            taken.append(number)
            best = row
    used = [states[index] for index in taken]
    kitchen.put(averaged(used), used)
    return kitchen.finish(key, SoupResult([_member(rows[index]) for index in taken], best["val_accuracy"], history))


def interpolated(start: State, end: State, alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) * start + alpha * end, exact at 0 and 1; counters, which are integers, are those of the nearer end."""
    nearer = start if alpha < 0.5 else end
    return {
        name: torch.lerp(value, end[name].to(value), alpha) if value.is_floating_point() else nearer[name] for name, value in start.items()
    }


def averaged(states: Sequence[State]) -> dict[str, Tensor]:
    """Mean of the same tensors of several models, summed in float64; counters, which are integers, are those of the first."""
    first = states[0]
    return {
        name: (sum(state[name].double() for state in states) / len(states)).to(value.dtype) if value.is_floating_point() else value  # type: ignore[union-attr]
        for name, value in first.items()
    }


@torch.no_grad()
def estimate_statistics(model: nn.Module, train: Split, context: TrainContext) -> None:
    """Batch-norm statistics of `model` from up to STATISTICS_IMAGES training images, unaugmented, in random order; then eval mode.

    Every batch of EVALUATION_BATCH images counts equally. Everything else stays in eval mode while the images pass.
    """
    norms = [module for module in model.eval().modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # PyTorch's word for a plain mean over batches.
        norm.train()
    rng = np.random.default_rng(stream_seed(context.seed, "statistics"))
    images = selected(train, rng.permutation(len(train))[:STATISTICS_IMAGES])
    for pictures, _ in batches(images, context.preprocessing, EVALUATION_BATCH, context.cache):
        if len(pictures) > 1 or len(train) == 1:  # A single image has no spread where its maps are one pixel.
            model(torch.from_numpy(pictures).to(context.accelerator.device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


class _Kitchen:
    """Where weights are put into a classifier and tasted: one merging stage, its validation and its checkpoint."""

    def __init__(self, classifier: Classifier, stage: Stage, dataset: Dataset, context: TrainContext) -> None:
        self._classifier, self._stage, self._train, self._context = classifier, stage, dataset.train, context
        accelerator = context.accelerator
        self._val = split_share(dataset.val, accelerator.process_index, accelerator.num_processes)
        self._val_labels = dataset.val.labels.tolist()
        self._file = context.work / stage.name / "state.safetensors"
        classifier.to(accelerator.device).eval()

    def key(self, *states: State) -> str:
        """What a checkpoint of this stage must have been made of."""
        return digest(asdict(self._stage), self._val_labels, *(state[name] for state in states for name in sorted(state)))

    def finished(self, key: str, kind: type[Result]) -> Result | None:
        """The result of an earlier call, whose weights are then in the classifier."""
        saved = read_checkpoint(self._file)
        self._context.accelerator.wait_for_everyone()
        if saved is None or saved[0]["key"] != key:
            return None
        restore(self._classifier, saved[1])
        self._context.say(f"{self._stage.name}: finished before")
        return kind(**saved[0]["result"])

    def put(self, state: State, made_of: Sequence[State]) -> None:
        """Weights into the classifier, with new batch-norm statistics where those of the models that they are made of differ."""
        restore(self._classifier, state)
        if any(_statistics_differ(made_of[0], other) for other in made_of[1:]):
            estimate_statistics(self._classifier, self._train, self._context)

    def score(self) -> dict[str, Any]:
        """How the classifier does on validation. Raises TrainingError when a score is not finite."""
        with self._context.accelerator.autocast():
            found = validate(self._classifier, self._val, self._context, Labels())
        if found is None:
            raise TrainingError(
                f"{self._stage.name}: averaged weights give scores that are not finite", "lower the learning rates (train.lr)"
            )
        return found.row()

    def finish(self, key: str, result: Result) -> Result:
        """Write down what is in the classifier, and why."""
        if self._context.accelerator.is_main_process:
            write_checkpoint(self._file, {"key": key, "result": asdict(result)}, state_of(self._classifier))
        self._context.accelerator.wait_for_everyone()
        return result


def _statistics_differ(first: State, second: State) -> bool:
    return any(name.endswith(_STATISTICS) and not torch.equal(value, second[name].to(value)) for name, value in first.items())


def _member(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"lr": row["lr"], "epoch": row["epoch"]}


def _sweep(folder: Path, n_rates: int) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]]]:
    """Rows and weights of the rates that did not diverge in their first epoch; most correct first, then the smaller rate."""
    found = [saved for number in range(n_rates) if (saved := read_checkpoint(rate_file(folder, number))) is not None]
    if not found:
        raise ArtifactError(f"'{folder}' no longer holds the weights of its learning rates", "use another --out")
    found.sort(key=lambda saved: (-saved[0]["val_correct"], saved[0]["lr"]))
    return [row for row, _ in found], [state for _, state in found]
