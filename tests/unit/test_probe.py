from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from edgeft.checkpoint import read_checkpoint
from edgeft.config import build_config
from edgeft.data.loading import batches
from edgeft.errors import TrainingError
from edgeft.methods import METHODS, Stage
from edgeft.methods.run import run_stages
from edgeft.models import Classifier
from edgeft.probe import Features, LinearHead, LogisticRegression, fit_probe, scalar_moments, unnormalised, with_absent_classes
from tests.tiny import PREPROCESSING, context, dataset, same, split, tensors

DATA = dataset(n_train=60, n_val=41)
STAGE = Stage("probe", "lbfgs", penalties=(1e-3, 1e-1), max_iter=100)


def classifier(n_classes: int = 3, seed: int = 0) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Classifier(timm.create_model("test_resnet", num_classes=n_classes), PREPROCESSING)


def images(part: Any) -> tuple[Tensor, Tensor]:
    pixels, labels = zip(*batches(part, PREPROCESSING, 64), strict=True)
    return torch.from_numpy(np.concatenate(pixels)), torch.from_numpy(np.concatenate(labels))


def random_features(n: int = 200, d: int = 5, n_classes: int = 3) -> Features:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % n_classes
    return Features(torch.randn(n, d, generator=generator) * 2 + 3 + labels[:, None] * torch.arange(d) / 4, labels)


def solved(features: Features, penalty: float) -> LinearHead:
    mean, std = scalar_moments(features.values)
    problem = LogisticRegression(features, torch.unique(features.labels), mean, std)
    problem.solve(penalty, 500)
    return LinearHead(problem.weight, problem.bias)


@pytest.mark.parametrize("penalty", [1e-3, 1e-1, 10.0])
def test_the_solution_is_stationary_for_autograd(penalty: float) -> None:
    features = random_features()
    mean, std = scalar_moments(features.values)
    head = solved(features, penalty)
    weight, bias = head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()
    x = (features.values.double() - mean) / std
    loss = nn.functional.cross_entropy(x @ weight.T + bias, features.labels) + penalty / 2 * weight.square().sum()
    loss.backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert float(weight.grad.abs().max()) < 1e-5
    assert float(bias.grad.abs().max()) < 1e-5
    value, weight_gradient, _ = LogisticRegression(features, torch.arange(3), mean, std)._evaluate(head.weight + 0.1, head.bias, penalty)
    moved = (head.weight + 0.1).requires_grad_()
    wanted = nn.functional.cross_entropy(x @ moved.T + head.bias, features.labels) + penalty / 2 * moved.square().sum()
    wanted.backward()
    assert moved.grad is not None
    assert float(value) == pytest.approx(float(wanted.detach()))
    assert torch.allclose(weight_gradient, moved.grad)


def test_a_larger_penalty_gives_smaller_weights() -> None:
    norms = [float(solved(random_features(), penalty).weight.norm()) for penalty in (1e-3, 1e-2, 1e-1, 1.0)]
    assert norms == sorted(norms, reverse=True)


def test_large_splits_are_solved_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = solved(random_features(), 1e-2)
    monkeypatch.setattr("edgeft.probe.ROWS", 17)
    parts = solved(random_features(), 1e-2)
    assert torch.allclose(whole.weight, parts.weight, atol=1e-4)
    assert parts.n_correct(random_features()) == whole.n_correct(random_features())


def test_unnormalised_head_gives_the_same_scores() -> None:
    features = random_features().values.double()
    mean, std = scalar_moments(features)
    assert [mean, std] == pytest.approx([float(features.mean()), float(features.std(correction=0))])
    head = solved(random_features(), 1e-2)
    raw = unnormalised(head.weight, head.bias, mean, std)
    assert torch.allclose(features @ raw.weight.T + raw.bias, (features - mean) / std @ head.weight.T + head.bias)


def test_absent_classes_never_win() -> None:
    generator = torch.Generator().manual_seed(0)
    few = LinearHead(torch.randn(3, 5, generator=generator).double(), torch.randn(3, generator=generator).double())
    head = with_absent_classes(few, torch.tensor([0, 2, 3]), 5)
    scores = (torch.randn(10_000, 5, generator=generator) * 1e4).double() @ head.weight.T + head.bias
    assert set(scores.argmax(dim=1).tolist()) == {0, 2, 3}
    assert torch.equal(head.weight[2], few.weight[1])


def test_only_the_head_changes_and_carries_the_probe(tmp_path: Path) -> None:
    model = classifier()
    start = tensors(model)
    result = fit_probe(model, STAGE, DATA.train, DATA.val, context(tmp_path))
    changed = {name for name, value in tensors(model).items() if not torch.equal(value, start[name])}
    assert changed == {"net.fc.weight", "net.fc.bias"}
    assert [row["penalty"] for row in result.history] == [1e-1, 1e-3]
    best = max(row["val_accuracy"] for row in result.history)
    assert result.val_accuracy == best
    assert result.penalty == next(row["penalty"] for row in result.history if row["val_accuracy"] == best)
    pictures, labels = images(DATA.val)
    with torch.no_grad():
        assert float((model(pictures).argmax(1) == labels).double().mean()) == pytest.approx(best)


def test_logits_of_the_net_are_those_of_the_solution(tmp_path: Path) -> None:
    model = classifier()
    fit_probe(model, replace(STAGE, penalties=(1.0,), max_iter=500), DATA.train, DATA.val, context(tmp_path))
    pictures, labels = images(DATA.train)
    with torch.no_grad():
        features = Features(model.features(pictures), labels)
        logits = model(pictures)
    mean, std = scalar_moments(features.values)
    head = solved(features, 1.0)
    wanted = ((features.values.double() - mean) / std) @ head.weight.T + head.bias
    assert float((logits - wanted).abs().max()) < 1e-3
    kept = nn.functional.linear(features.values, model.head.weight, model.head.bias).detach()
    assert float((logits - kept).abs().max()) < 1e-4


def test_ties_go_to_the_larger_penalty(tmp_path: Path) -> None:
    hopeless = replace(DATA.val, labels=np.full(len(DATA.val), 99))
    result = fit_probe(classifier(), STAGE, DATA.train, hopeless, context(tmp_path))
    assert (result.penalty, result.val_accuracy) == (1e-1, 0.0)


def test_features_are_computed_once_and_results_read_back(tmp_path: Path) -> None:
    first, again = classifier(), classifier()
    one = fit_probe(first, STAGE, DATA.train, DATA.val, context(tmp_path))
    train = split("train", "train", 60, 1)
    two = fit_probe(again, STAGE, train, DATA.val, context(tmp_path))
    assert one == two
    assert same(tensors(first), tensors(again))
    few = train.images.n_read  # type: ignore[attr-defined]
    assert few < 10  # only the images that stand for the others in the key
    other = fit_probe(again, replace(STAGE, name="second", penalties=(1.0,)), train, DATA.val, context(tmp_path))
    assert other.penalty == 1.0
    assert train.images.n_read == 2 * few  # type: ignore[attr-defined]


@pytest.mark.parametrize("change", ["weights", "data", "augment", "preprocessing"])
def test_features_of_something_else_are_not_used(tmp_path: Path, change: str) -> None:
    fit_probe(classifier(), STAGE, DATA.train, DATA.val, context(tmp_path))
    before = read_checkpoint(tmp_path / "features.safetensors")
    model, train, place = classifier(seed=int(change == "weights")), DATA.train, context(tmp_path)
    if change == "data":
        train = split("train", "train", 60, 9)
    elif change == "augment":
        place.augment = "flip"
    elif change == "preprocessing":
        place.preprocessing = replace(PREPROCESSING, interpolation="bicubic")
    fit_probe(model, STAGE, train, DATA.val, place)
    after = read_checkpoint(tmp_path / "features.safetensors")
    assert before is not None
    assert after is not None
    assert before[0]["key"] != after[0]["key"]


def test_training_images_are_augmented_once(tmp_path: Path) -> None:
    model = classifier()
    fit_probe(model, STAGE, DATA.train, DATA.val, context(tmp_path, augment="flip"))
    pictures, _ = images(DATA.train)
    saved = read_checkpoint(tmp_path / "features.safetensors")
    assert saved is not None
    with torch.no_grad():
        plain, mirrored = model.features(pictures), model.features(pictures.flip(3))
    is_plain = torch.isclose(saved[1]["train"], plain, atol=1e-4).all(dim=1)
    is_mirrored = torch.isclose(saved[1]["train"], mirrored, atol=1e-4).all(dim=1)
    assert bool((is_plain | is_mirrored).all())
    assert 0 < int(is_plain.sum()) < len(pictures)


def test_useless_features_are_errors(tmp_path: Path) -> None:
    blind = classifier()
    with torch.no_grad():
        for parameter in blind.net.parameters():
            parameter.zero_()
    with pytest.raises(TrainingError, match="all features are the same number"):
        fit_probe(blind, STAGE, DATA.train, DATA.val, context(tmp_path / "blind"))
    broken = classifier()
    with torch.no_grad():
        next(broken.net.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="the features of the train images are not finite"):
        fit_probe(broken, STAGE, DATA.train, DATA.val, context(tmp_path / "broken"))


def test_lpft_runs_its_stages_and_is_read_back(tmp_path: Path) -> None:
    config = build_config(flags={"train.epochs": 1, "train.lr": [1e-3], "probe.penalties": [0.1]})
    stages = METHODS.get("lpft").stages(config)
    first, again = classifier(), classifier()
    records = run_stages(first, stages, DATA, context(tmp_path))
    assert [record["stage"]["name"] for record in records] == ["probe", "fine-tune"]
    assert records[1]["result"]["history"][0]["lr"] == 1e-3
    assert run_stages(again, stages, DATA, context(tmp_path)) == records
    assert same(tensors(first), tensors(again))
    assert not first.training
