"""Losses and what selects an epoch: the divergence against its definition, and distillation through the training loop."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from edgeft.data import NO_LABEL, Split
from edgeft.errors import ArtifactError
from edgeft.methods import Stage
from edgeft.objective import L2SP, Distillation, Labels, Objective, Validation, divergence, rank
from edgeft.train import FitResult, fit
from tests.tiny import DATA, TinyNet, context, same, tensors

STAGE = Stage("qat", "sgd", epochs=3, learning_rates=(0.05,), momentum=0.9, keep_start=True)


class Shifted(nn.Module):
    """A teacher whose logits are those of a TinyNet with other weights."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = TinyNet(dropout=0.5)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = 2 * self.net(images)
        return logits


def unlabelled(split: Split) -> Split:
    return Split(split.name, split.kind, split.images, np.full(len(split), NO_LABEL, dtype=np.int64))


def distilled(work: Path, train: Split = DATA.train, on_step: Any = None, **changes: Any) -> tuple[FitResult, nn.Module]:
    model = TinyNet()
    return fit(model, STAGE, train, DATA.val, context(work, **changes), on_step, Distillation(Shifted())), model


def test_divergence_is_the_sum_of_p_log_p_over_q() -> None:
    p, q = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]).double(), torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).double()
    expected = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(divergence(p.log() + 3.0, q.log() - 1.0), expected)
    assert float(divergence(p.log(), q.log())[1]) == pytest.approx(0.0, abs=1e-12)


def test_labels_are_summed_cross_entropy_and_have_no_teacher() -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    assert float(Labels().loss(torch.empty(0), logits, labels)) == pytest.approx(5 * float(cross_entropy(logits, labels)), rel=1e-6)
    objective: Objective = Labels()
    assert objective.compare(torch.empty(0), logits) is None


def test_smoothed_labels_share_the_loss_among_all_classes() -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    targets = 0.7 * nn.functional.one_hot(labels, 3) + 0.1
    expected = -(targets * logits.log_softmax(1)).sum()
    torch.testing.assert_close(Labels(0.3).loss(torch.empty(0), logits, labels), expected)


class Renamed(nn.Module):
    """A body, and a head whose name says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.fc(x))
        return logits


def test_l2sp_is_nothing_at_the_start_and_pulls_everything_but_the_head_back() -> None:
    model, weight = Renamed(), 0.3
    objective = L2SP(Labels(), model, model.last, weight)
    images, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    assert float(objective.penalty().detach()) == 0.0
    logits = model(images)
    assert torch.equal(objective.loss(images, logits, labels), Labels().loss(images, logits, labels))
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape))
    objective.penalty().backward()
    for name, parameter in model.fc.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * weight * (parameter - start[f"fc.{name}"]).detach())
    assert all(parameter.grad is None for parameter in model.last.parameters())
    moved = sum(float((value.detach() - start[f"fc.{name}"]).square().sum()) for name, value in model.fc.named_parameters())
    loss = objective.loss(images, logits.detach(), labels) - Labels().loss(images, logits.detach(), labels)
    assert float(loss.detach()) == pytest.approx(5 * weight * moved, rel=1e-5)


def test_l2sp_holds_the_body_nearer_to_its_start(tmp_path: Path) -> None:
    distances = []
    for weight in (0.0, 1.0):
        model = TinyNet()
        start, stage = tensors(model), Stage("tune", "sgd", epochs=2, learning_rates=(0.1,), momentum=0.9)
        fit(model, stage, DATA.train, DATA.val, context(tmp_path / str(weight)), objective=L2SP(Labels(), model, model.head, weight))
        distances.append(sum(float((value.detach() - start[f"body.{name}"]).norm()) for name, value in model.body.named_parameters()))
    assert distances[1] < 0.5 * distances[0]


def test_gradients_are_the_difference_of_probabilities() -> None:
    teacher = Shifted()
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    logits = torch.randn(4, 3, requires_grad=True)
    Distillation(teacher).loss(images, logits, torch.full((4,), NO_LABEL)).backward()
    assert not teacher.training
    expected = logits.detach().softmax(1) - teacher(images).detach().softmax(1)
    torch.testing.assert_close(logits.grad, expected)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_rank_prefers_nearness_where_it_is_known() -> None:
    near = Validation(12, 10, 5, 9, 0.6).row() | {"lr": 0.1}
    right = Validation(12, 10, 8, 8, 0.7).row() | {"lr": 0.1}
    assert near == {"lr": 0.1, "val_accuracy": 0.5, "val_correct": 5, "val_agreement": 0.75, "val_divergence": pytest.approx(0.05)}
    assert rank(near) > rank(right)
    assert rank(Validation(10, 10, 8).row()) > rank(Validation(10, 10, 5).row())
    assert str(Validation(12, 10, 5, 9, 0.6)) == "validation 50.0%, agreement 75.0%, divergence 0.0500"


def test_distillation_comes_nearer_to_the_teacher_without_labels(tmp_path: Path) -> None:
    result, model = distilled(tmp_path / "a")
    rows = [row["val_divergence"] for row in result.history]
    assert len(rows) == 4
    assert min(rows[1:]) < 0.5 * rows[0]
    best = min(result.history, key=lambda row: row["val_divergence"])
    assert (result.lr, result.epoch) == (best["lr"], best["epoch"])
    assert result.val_accuracy == best["val_accuracy"]
    blind, other = distilled(tmp_path / "b", unlabelled(DATA.train))
    assert same(tensors(model), tensors(other))
    assert [row["train_loss"] for row in blind.history[1:]] == [row["train_loss"] for row in result.history[1:]]


def test_images_without_labels_select_but_do_not_count_as_wrong(tmp_path: Path) -> None:
    plain, _ = distilled(tmp_path / "plain")
    labels = np.where(np.arange(len(DATA.val)) % 2 == 0, DATA.val.labels, NO_LABEL)
    stage = Stage("qat", "sgd", epochs=1, learning_rates=(0.05,), keep_start=True)
    val = Split("val", "val", DATA.val.images, labels)
    (row, *_) = fit(TinyNet(), stage, DATA.train, val, context(tmp_path / "b"), objective=Distillation(Shifted())).history
    assert row["val_divergence"] == plain.history[0]["val_divergence"]
    assert row["val_correct"] <= plain.history[0]["val_correct"]
    assert row["val_accuracy"] == row["val_correct"] / int((labels >= 0).sum())


def test_the_start_is_kept_when_training_leads_away(tmp_path: Path) -> None:
    model, teacher = TinyNet(), TinyNet()
    stage = Stage("qat", "sgd", epochs=2, learning_rates=(1e-12,), keep_start=True)
    result = fit(model, stage, DATA.train, DATA.val, context(tmp_path), objective=Distillation(teacher))
    assert (result.lr, result.epoch) == (0.0, 0)
    assert result.history[0]["val_divergence"] == pytest.approx(0.0, abs=1e-12)
    assert result.history[0]["val_agreement"] == 1.0


def test_a_killed_distillation_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole, model = distilled(tmp_path / "whole")

    def kill(step: int, total: int) -> None:
        if step == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distilled(tmp_path / "cut", on_step=kill)
    resumed, other = distilled(tmp_path / "cut")
    assert resumed == whole
    assert same(tensors(model), tensors(other))


def test_checkpoints_of_another_loss_are_refused(tmp_path: Path) -> None:
    distilled(tmp_path)
    with pytest.raises(ArtifactError, match="belong to a run with other settings or data"):
        fit(TinyNet(), STAGE, DATA.train, DATA.val, context(tmp_path))


def test_micro_batches_give_the_same_step(tmp_path: Path) -> None:
    _, whole = distilled(tmp_path / "whole")
    _, parts = distilled(tmp_path / "parts", accumulate=2)
    for name, value in tensors(whole).items():
        assert torch.allclose(tensors(parts)[name].float(), value.float(), rtol=1e-3, atol=1e-5), name
