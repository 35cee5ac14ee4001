"""What an SGD stage minimises, and what its validation counts: agreement with labels, or with a float model."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Objective(Protocol):
    """A loss over training images, and sums over validation images that select an epoch; `name` is part of a checkpoint's key."""

    name: str

    def loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss summed over a batch: image bytes [n, 3, h, w], float32 logits [n, classes], int64 labels [n]."""
        ...

    def compare(self, images: Tensor, logits: Tensor) -> tuple[Tensor, Tensor] | None:
        """Validation sums over a batch, float64: images of the same class as the teacher's, and divergence from it. None without one."""
        ...


class Labels:
    """Cross-entropy to the labels; the epoch of most correct validation images is kept.

    `smoothing` (0 ... 1) of every label is spread evenly over all classes (Szegedy et al. 2015, arXiv:1512.00567).
    """

    name = "labels"

    def __init__(self, smoothing: float = 0.0) -> None:
        self._smoothing = smoothing

    def loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Summed cross-entropy."""
        return cross_entropy(logits, labels, reduction="sum", label_smoothing=self._smoothing)

    def compare(self, images: Tensor, logits: Tensor) -> None:
        """There is no teacher."""


class L2SP:
    """Another loss plus, for every image, weight * |w - w0|^2 over all parameters w of `model` but those of `head` (Li et al., ICML 2018).

    There is no factor 1/2, so that the gradient is 2 * weight * (w - w0). w0 is what the model holds now; the head, which may start
    from nothing, is told apart by identity, whatever its name. Parameters that are not trained are not looked at.
    """

    def __init__(self, inner: Objective, model: nn.Module, head: nn.Module, weight: float) -> None:
        self.name = f"{inner.name}, l2sp {weight:g}"
        self._inner, self._weight = inner, weight
        free = {id(parameter) for parameter in head.parameters()}
        pulled = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in free]
        self._pairs = [(parameter, parameter.detach().clone()) for parameter in pulled]

    def penalty(self) -> Tensor:
        """The penalty of one image, a float32 scalar."""
        return self._weight * torch.stack([(parameter - start).square().sum() for parameter, start in self._pairs]).sum()

    def loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """The other loss and the penalty, summed over the batch."""
        return self._inner.loss(images, logits, labels) + len(labels) * self.penalty()

    def compare(self, images: Tensor, logits: Tensor) -> tuple[Tensor, Tensor] | None:
        """As the other loss compares: the penalty selects nothing."""
        return self._inner.compare(images, logits)


class Distillation:
    """KL(teacher || model) at temperature 1 (Hinton et al. 2015, arXiv:1503.02531, without its labels); no label is read.

    Both see the same view of each image. The epoch nearest to the teacher on the validation images is kept. `teacher` maps image
    bytes to logits; it is put into eval mode and never trained.
    """

    name = "distill"

    def __init__(self, teacher: nn.Module) -> None:
        self._teacher = teacher.eval()

    def loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Summed divergence."""
        return divergence(self._targets(images), logits).sum()

    def compare(self, images: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Images with the teacher's class, and the summed divergence from it."""
        wanted = self._targets(images)
        return (wanted.argmax(1) == logits.argmax(1)).double().sum(), divergence(wanted.double(), logits.double()).sum()

    @torch.no_grad()
    def _targets(self, images: Tensor) -> Tensor:
        targets: Tensor = self._teacher(images)
        return targets.float()


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(softmax(wanted) || softmax(found)) of each row, in nats."""
    log_p, log_q = wanted.log_softmax(1), found.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


@dataclass(frozen=True)
class Validation:
    """Sums over the `n` validation images: labelled and correct ones, and with a teacher agreeing ones and the summed divergence."""

    n: int
    labelled: int
    correct: int
    agreeing: int | None = None
    divergence: float | None = None

    def row(self) -> dict[str, Any]:
        """As a stage's history shows it."""
        row: dict[str, Any] = {"val_accuracy": self.correct / self.labelled, "val_correct": self.correct}
        if self.agreeing is not None and self.divergence is not None:
            row |= {"val_agreement": self.agreeing / self.n, "val_divergence": self.divergence / self.n}
        return row

    def __str__(self) -> str:
        text = f"validation {self.correct / self.labelled:.1%}"
        if self.agreeing is None or self.divergence is None:
            return text
        return f"{text}, agreement {self.agreeing / self.n:.1%}, divergence {self.divergence / self.n:.4f}"


def rank(row: dict[str, Any]) -> float:
    """What the best row of a history has most of: nearness to the teacher where there is one, otherwise correct images."""
    return -float(row["val_divergence"]) if "val_divergence" in row else float(row["val_correct"])
