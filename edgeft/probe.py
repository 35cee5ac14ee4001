"""The linear probe: logistic regression on frozen features, by L-BFGS, copied into the model's head."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from edgeft.checkpoint import digest, read_checkpoint, restore, state_of, write_checkpoint
from edgeft.context import TrainContext
from edgeft.data import Split
from edgeft.data.loading import TrainImages, batches
from edgeft.epoch import EVALUATION_BATCH
from edgeft.errors import TrainingError
from edgeft.feed import TrainFeed, split_share, stream_seed
from edgeft.methods import Stage
from edgeft.models import Classifier

ROWS = 8192
"""Feature rows that are held in float64 at a time."""
ABSENT_MARGIN = 10.0
"""Logits by which a class without training images stays below the mean of the others."""
FINGERPRINT_IMAGES = 8


@dataclass(frozen=True)
class ProbeResult:
    """The chosen probe: its penalty and validation accuracy (0 ... 1); `history` has a JSON-able row for each penalty tried."""

    penalty: float
    val_accuracy: float
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class Features:
    """Float32 features [n, d] and int64 labels [n] of a split."""

    values: Tensor
    labels: Tensor


@dataclass(frozen=True)
class LinearHead:
    """Weights [classes, d] and bias [classes] in float64."""

    weight: Tensor
    bias: Tensor

    def n_correct(self, features: Features) -> int:
        """Rows whose top class is their label."""
        return sum(
            int(((rows.double() @ self.weight.T + self.bias).argmax(dim=1) == labels).sum())
            for rows, labels in zip(_chunks(features.values), _chunks(features.labels), strict=True)
        )


def fit_probe(classifier: Classifier, stage: Stage, train: Split, val: Split, context: TrainContext) -> ProbeResult:
    """Fit the head of `classifier` to its frozen eval-mode features and leave it in eval mode; only the head changes.

    One random view per training image, as the training augmentation gives it; validation images unaugmented. Features are normalised
    by one mean and one deviation over all their numbers, which is undone in the head. Penalties are tried from the largest to the
    smallest, each from the last one's solution; the best accuracy on `val` wins, the larger penalty on ties.

    Features and result are kept in `context.work`, so that a later call with the same model and data only reads them back. Raises
    TrainingError when features are not finite or all the same.
    """
    device = context.accelerator.device
    classifier.to(device).eval()
    key = _key(classifier, train, val, context)
    path = context.work / stage.name / "state.safetensors"
    stage_key = digest(key, asdict(stage))
    saved = read_checkpoint(path)
    context.accelerator.wait_for_everyone()
    if saved is not None and saved[0]["key"] == stage_key:
        restore(classifier.head, saved[1])
        context.say(f"{stage.name}: finished before")
        return ProbeResult(**saved[0]["result"])
    fitted = _features(classifier, train, val, context, key)
    head, result = _best_head(*fitted, len(classifier.head.bias), stage, context)
    restore(classifier.head, {"weight": head.weight, "bias": head.bias})
    if context.accelerator.is_main_process:
        write_checkpoint(path, {"key": stage_key, "result": asdict(result)}, state_of(classifier.head))
    context.accelerator.wait_for_everyone()
    return result


# --- features --------------------------------------------------------------------------------------------------------


def _key(classifier: Classifier, train: Split, val: Split, context: TrainContext) -> str:
    """What the features depend on: backbone, preprocessing, augmentation, seed and data, of which some images stand for all."""
    head = set(classifier.head.parameters())
    backbone = {name: value for name, value in state_of(classifier).items() if value not in head}
    precision = context.accelerator.mixed_precision
    parts: list[object] = [context.seed, context.augment, context.preprocessing.to_json(), precision, sorted(backbone)]
    for split in (train, val):
        seen = np.linspace(0, len(split) - 1, min(FINGERPRINT_IMAGES, len(split))).astype(int)
        parts += [split.labels.tolist(), *(split.images.image(int(index)).tobytes() for index in seen)]
    return digest(*parts, *(backbone[name] for name in sorted(backbone)))


def _features(classifier: Classifier, train: Split, val: Split, context: TrainContext, key: str) -> tuple[Features, Features]:
    """Features of both splits on the device, from `context.work/features.safetensors` where they are of this model and data."""
    path = context.work / "features.safetensors"
    device = context.accelerator.device
    saved = read_checkpoint(path)
    context.accelerator.wait_for_everyone()
    if saved is None or saved[0].get("key") != key:
        tensors = {"train": _train_features(classifier, train, context), "val": _val_features(classifier, val, context)}
        if context.accelerator.is_main_process:
            write_checkpoint(path, {"key": key}, tensors)
    else:
        tensors = saved[1]
    for name, values in tensors.items():
        if not bool(torch.isfinite(values).all()):
            raise TrainingError(f"the features of the {name} images are not finite", "check the weights, data.mean and data.std")
    labels = {"train": train.labels, "val": val.labels}
    fitted = {name: Features(values.to(device), torch.from_numpy(labels[name]).to(device)) for name, values in tensors.items()}
    return fitted["train"], fitted["val"]


def _train_features(classifier: Classifier, train: Split, context: TrainContext) -> Tensor:
    images = TrainImages(train, context.preprocessing, context.augment, stream_seed(context.seed, "probe"), context.cache)
    feed = TrainFeed(images, context.workers, context.accelerator.device)
    process, n_processes = context.accelerator.process_index, context.accelerator.num_processes
    mine = np.arange(process, len(train), n_processes).tolist()
    order = [mine[first : first + EVALUATION_BATCH] for first in range(0, len(mine), EVALUATION_BATCH)]
    return _gathered(classifier, (images for images, _ in feed.epoch(0, order)), len(train), "features of training images", context)


def _val_features(classifier: Classifier, val: Split, context: TrainContext) -> Tensor:
    mine = split_share(val, context.accelerator.process_index, context.accelerator.num_processes)
    images = (torch.from_numpy(images) for images, _ in batches(mine, context.preprocessing, EVALUATION_BATCH, context.cache))
    return _gathered(classifier, images, len(val), "features of validation images", context)


@torch.no_grad()
def _gathered(classifier: Classifier, images: Any, n: int, title: str, context: TrainContext) -> Tensor:
    """Features [n, d] of all processes' images, where process p of P computes images p, p + P, ...; on the device."""
    accelerator = context.accelerator
    n_mine = -(-n // accelerator.num_processes)
    values = torch.zeros((n_mine, classifier.head.in_features), device=accelerator.device)
    done = 0
    with context.task(title, n) as advance, accelerator.autocast():
        for batch in images:
            rows = classifier.features(batch.to(accelerator.device, non_blocking=True)).float()
            values[done : done + len(rows)] = rows
            done += len(rows)
            advance(len(rows) * accelerator.num_processes)
    gathered: Tensor = accelerator.gather(values)
    return gathered.reshape(accelerator.num_processes, n_mine, -1).transpose(0, 1).reshape(accelerator.num_processes * n_mine, -1)[:n]


# --- logistic regression ---------------------------------------------------------------------------------------------


def _best_head(train: Features, val: Features, n_classes: int, stage: Stage, context: TrainContext) -> tuple[LinearHead, ProbeResult]:
    """The head of the best penalty, for features as they are; the same on all processes."""
    mean, std = scalar_moments(train.values)
    if std == 0:
        raise TrainingError("all features are the same number: the backbone sees nothing", "check the weights, data.mean and data.std")
    present = torch.unique(train.labels)
    problem = LogisticRegression(train, present, mean, std)
    candidates: list[tuple[int, float, LinearHead]] = []
    history: list[dict[str, Any]] = []
    penalties = sorted(set(stage.penalties), reverse=True)
    with context.task(f"{stage.name}: {len(penalties)} penalties", len(penalties)) as advance:
        for penalty in penalties:
            loss, n_iterations = problem.solve(penalty, stage.max_iter)
            head = _agreed(with_absent_classes(unnormalised(problem.weight, problem.bias, mean, std), present, n_classes), context)
            correct = head.n_correct(val)
            history.append({"penalty": penalty, "loss": loss, "iterations": n_iterations, "val_accuracy": correct / len(val.labels)})
            candidates.append((correct, penalty, head))
            advance(1, note=f"penalty {penalty:g}: validation {correct / len(val.labels):.1%}")
    correct, penalty, head = max(candidates, key=lambda candidate: candidate[0])  # The first of equals: the larger penalty.
    return head, ProbeResult(penalty, correct / len(val.labels), history)


def _agreed(head: LinearHead, context: TrainContext) -> LinearHead:
    """The main process's head, so that a rounding difference between machines cannot lead to different choices."""
    if context.accelerator.num_processes == 1:
        return head
    return LinearHead(broadcast(head.weight.contiguous()), broadcast(head.bias.contiguous()))


def _chunks(values: Tensor) -> tuple[Tensor, ...]:
    """Rows in portions that may be widened to float64."""
    return torch.split(values, ROWS)


def scalar_moments(values: Tensor) -> tuple[float, float]:
    """One mean and one (population) standard deviation over all numbers of a matrix, summed in float64."""
    total = sum(float(rows.double().sum()) for rows in _chunks(values))
    mean = total / values.numel()
    variance = sum(float((rows.double() - mean).square().sum()) for rows in _chunks(values)) / values.numel()
    return mean, variance**0.5


def unnormalised(weight: Tensor, bias: Tensor, mean: float, std: float) -> LinearHead:
    """The head for features f whose scores equal those of `weight`, `bias` for (f - mean) / std."""
    return LinearHead(weight / std, bias - weight.sum(dim=1) * (mean / std))


def with_absent_classes(head: LinearHead, present: Tensor, n_classes: int) -> LinearHead:
    """Spread a head over the classes `present` to all classes; the others never win.

    A class without training images gets the mean row of the others and their mean bias less a margin: its score is always that
    margin below the mean score, hence below the highest, whatever the features, and without a huge bias that would cost an 8-bit format.
    """
    weight = head.weight.mean(dim=0).repeat(n_classes, 1)
    bias = (head.bias.mean() - ABSENT_MARGIN).repeat(n_classes)
    weight[present], bias[present] = head.weight, head.bias
    return LinearHead(weight, bias)


class LogisticRegression:
    """Minimises mean cross-entropy + penalty / 2 * |weight|^2 over the classes present; the bias is free.

    scikit-learn's C is 1 / (penalty * n). Arithmetic is float64; the gradient is (softmax - onehot)^T x / n + penalty * weight.
    """

    def __init__(self, train: Features, present: Tensor, mean: float, std: float) -> None:
        self._rows: Sequence[Tensor] = _chunks(train.values)
        self._labels: Sequence[Tensor] = _chunks(torch.searchsorted(present, train.labels))
        self._n, self._mean, self._std = len(train.labels), mean, std
        options: dict[str, Any] = {"dtype": torch.float64, "device": train.values.device}
        self.weight = torch.zeros(len(present), train.values.shape[1], **options)
        self.bias = torch.zeros(len(present), **options)

    def solve(self, penalty: float, max_iter: int) -> tuple[float, int]:
        """Go on from the last solution; returns the objective and the number of iterations."""
        weight, bias = nn.Parameter(self.weight), nn.Parameter(self.bias)
        solver = torch.optim.LBFGS(
            [weight, bias],
            lr=1.0,
            max_iter=max_iter,
            tolerance_grad=1e-6,
            tolerance_change=1e-10,
            history_size=30,
            line_search_fn="strong_wolfe",
        )

        def objective() -> Tensor:
            loss, weight.grad, bias.grad = self._evaluate(weight.data, bias.data, penalty)
            return loss

        solver.step(objective)
        self.weight, self.bias = weight.data, bias.data
        return float(self._evaluate(self.weight, self.bias, penalty)[0]), int(solver.state[weight]["n_iter"])

    @torch.no_grad()
    def _evaluate(self, weight: Tensor, bias: Tensor, penalty: float) -> tuple[Tensor, Tensor, Tensor]:
        """Objective and its gradients."""
        loss = penalty / 2 * weight.square().sum()
        weight_gradient, bias_gradient = penalty * weight, torch.zeros_like(bias)
        for rows, labels in zip(self._rows, self._labels, strict=True):
            x = (rows.double() - self._mean) / self._std
            log_p = torch.log_softmax(x @ weight.T + bias, dim=1)
            picked = labels[:, None]
            loss = loss - log_p.gather(1, picked).sum() / self._n
            residual = log_p.exp()
            residual.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=residual.dtype))
            weight_gradient = weight_gradient + residual.T @ x / self._n
            bias_gradient = bias_gradient + residual.sum(dim=0) / self._n
        return loss, weight_gradient, bias_gradient
