"""Averages of weights: exact ends, greedy choice, batch-norm statistics, and stages that are read back."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from edgeft import merging
from edgeft.checkpoint import copy_of, read_checkpoint, restore, state_of, write_checkpoint
from edgeft.data.loading import batches
from edgeft.errors import ArtifactError, TrainingError
from edgeft.merging import averaged, estimate_statistics, interpolated, soup, wise
from edgeft.methods import Stage
from edgeft.models import Classifier
from edgeft.train import rate_file
from tests.tiny import DATA, PREPROCESSING, context, same

WISE, SOUP = Stage("wise", "wise"), Stage("soup", "soup")
SWEPT = Stage("tune", "sgd", epochs=1, learning_rates=(0.1, 0.2, 0.3))
State = dict[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def _quick_collection() -> Iterator[None]:
    """Each stage ends with a garbage collection, which would look through all imported modules every time."""
    gc.freeze()
    yield
    gc.unfreeze()


def classifier() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier(timm.create_model("test_resnet", num_classes=3), PREPROCESSING)


def state(model: Classifier) -> State:
    return copy_of(state_of(model))


def disturbed(start: State, seed: int, statistics: bool = False) -> State:
    """Other weights; other batch-norm statistics only where asked for."""
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for name, value in start.items():
        fixed = name in ("mean", "std") or not value.is_floating_point() or ("running" in name and not statistics)
        changed[name] = value if fixed else value + 0.1 * torch.rand(value.shape, generator=generator)
    return changed


def test_the_ends_are_the_two_models_bit_for_bit() -> None:
    start = state(classifier())
    end = disturbed(start, 1, statistics=True)
    end["net.bn1.num_batches_tracked"] = torch.tensor(7)
    assert same(interpolated(start, end, 0.0), start)
    assert same(interpolated(start, end, 1.0), end)
    middle = interpolated(start, end, 0.3)
    torch.testing.assert_close(middle["net.fc.weight"], 0.7 * start["net.fc.weight"] + 0.3 * end["net.fc.weight"])
    assert int(middle["net.bn1.num_batches_tracked"]) == int(start["net.bn1.num_batches_tracked"])


def test_an_average_of_one_is_that_model_and_of_two_their_mean() -> None:
    start = state(classifier())
    other = disturbed(start, 1)
    assert same(averaged([start]), start)
    torch.testing.assert_close(averaged([start, other])["net.fc.weight"], (start["net.fc.weight"] + other["net.fc.weight"]) / 2)


@pytest.mark.parametrize(
    ("correct", "chosen"),
    [
        ([5, 6, 7, 8, 9, 10, 9, 8, 7, 6, 5], 0.5),
        ([5] * 11, 0.0),
        ([5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 6], 1.0),
        ([5, 6, 9, 9, 5, 5, 5, 5, 5, 5, 9], 0.2),
    ],
)
def test_the_smallest_of_the_best_alphas_is_taken(correct: list[int], chosen: float, tmp_path: Path, monkeypatch: Any) -> None:
    model = classifier()
    start = state(model)
    restore(model, disturbed(start, 1))
    end, counts = state(model), iter(correct)
    monkeypatch.setattr(merging._Kitchen, "score", lambda self: {"val_accuracy": (n := next(counts)) / 37, "val_correct": n})
    result = wise(model, WISE, start, DATA, context(tmp_path))
    assert (result.alpha, [row["alpha"] for row in result.history]) == (chosen, [number / 10 for number in range(11)])
    assert same(state(model), interpolated(start, end, chosen))
    assert not model.training


def test_an_alpha_that_is_hardly_better_does_not_win(tmp_path: Path, monkeypatch: Any) -> None:
    accuracies = iter([0.8, 0.8975, 0.9] + [0.5] * 8)
    monkeypatch.setattr(merging._Kitchen, "score", lambda self: {"val_accuracy": next(accuracies)})
    assert wise(classifier(), WISE, state(classifier()), DATA, context(tmp_path)).alpha == 0.1


def test_a_finished_choice_is_read_back(tmp_path: Path, monkeypatch: Any) -> None:
    model = classifier()
    start, end = state(model), disturbed(state(model), 1)
    restore(model, end)
    result, kept = wise(model, WISE, start, DATA, context(tmp_path)), state(model)
    restore(model, end)
    monkeypatch.setattr(merging._Kitchen, "score", lambda self: pytest.fail("scored again"))
    assert wise(model, WISE, start, DATA, context(tmp_path)) == result
    assert same(state(model), kept)
    restore(model, disturbed(start, 2))
    with pytest.raises(pytest.fail.Exception):
        wise(model, WISE, start, DATA, context(tmp_path))


def test_scores_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    model = classifier()
    start = {name: value * float("inf") if name == "net.fc.weight" else value for name, value in state(model).items()}
    with pytest.raises(TrainingError, match="wise: averaged weights give scores that are not finite"):
        wise(model, WISE, start, DATA, context(tmp_path))


def sweep(work: Path, correct: list[int], statistics: bool = False) -> list[State]:
    """Weights of three rates as a stage writes them down."""
    states = [disturbed(state(classifier()), seed, statistics) for seed in range(len(correct))]
    for number, (weights, n) in enumerate(zip(states, correct, strict=True)):
        row = {"lr": SWEPT.learning_rates[number], "epoch": 1, "train_loss": 1.0, "val_accuracy": n / 37, "val_correct": n}
        write_checkpoint(rate_file(work / SWEPT.name, number), row, weights)
    return states


@pytest.mark.parametrize(
    ("correct", "offered", "members"),
    [
        ([20, 30, 25], [31, 33], [0.2, 0.3, 0.1]),
        ([20, 30, 25], [30, 31], [0.2, 0.1]),
        ([20, 30, 25], [29, 30], [0.2]),
        ([30, 30, 30], [30, 31], [0.1, 0.3]),
    ],
)
def test_the_soup_takes_what_improves_it(
    correct: list[int], offered: list[int], members: list[float], tmp_path: Path, monkeypatch: Any
) -> None:
    states = dict(zip(SWEPT.learning_rates, sweep(tmp_path, correct), strict=True))
    counts, model = iter(offered), classifier()
    monkeypatch.setattr(merging._Kitchen, "score", lambda self: {"val_accuracy": (n := next(counts)) / 37, "val_correct": n})
    result = soup(model, SOUP, SWEPT, DATA, context(tmp_path))
    assert [row["lr"] for row in result.members] == members
    assert result.history[0]["taken"]
    assert result.val_accuracy == max([*correct, *offered]) / 37
    assert same(state(model), averaged([states[lr] for lr in members]))


def test_a_soup_of_one_is_the_model(tmp_path: Path) -> None:
    (only,) = sweep(tmp_path, [20])
    model = classifier()
    result = soup(model, SOUP, replace(SWEPT, learning_rates=(0.1,)), DATA, context(tmp_path))
    assert result.members == [{"lr": 0.1, "epoch": 1}]
    assert same(state(model), only)
    again = classifier()
    assert soup(again, SOUP, replace(SWEPT, learning_rates=(0.1,)), DATA, context(tmp_path)) == result
    assert same(state(again), only)


def test_rates_without_weights_are_left_out_and_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no longer holds the weights of its learning rates"):
        soup(classifier(), SOUP, SWEPT, DATA, context(tmp_path))
    sweep(tmp_path, [20, 30])
    assert len(soup(classifier(), SOUP, SWEPT, DATA, context(tmp_path)).history) == 2


def moving(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def test_statistics_that_differ_are_estimated_again(tmp_path: Path) -> None:
    model = classifier()
    start = state(model)
    end = disturbed(start, 1, statistics=True)
    kitchen = merging._Kitchen(model, WISE, DATA, context(tmp_path))
    kitchen.put(start, (start, start))
    assert same(state(model), start), "equal statistics are left alone"
    mixed = interpolated(start, end, 0.5)
    kitchen.put(mixed, (start, end))
    found = state(model)
    assert all(torch.equal(found[name], value) for name, value in mixed.items() if not moving(name))
    assert not torch.equal(found["net.bn1.running_mean"], mixed["net.bn1.running_mean"])
    estimate_statistics(model, DATA.train, context(tmp_path))
    assert same(state(model), found)


def test_estimated_statistics_are_those_of_the_training_images(tmp_path: Path) -> None:
    model = classifier()
    first, norm = model.net.get_submodule("conv1.0"), model.net.get_submodule("conv1.1")
    assert isinstance(norm, nn.BatchNorm2d)
    before = state(model)
    estimate_statistics(model, DATA.train, context(tmp_path))
    images = torch.from_numpy(np.concatenate([pictures for pictures, _ in batches(DATA.train, PREPROCESSING, 64)]))
    with torch.no_grad():
        maps = first(model.normalise(images))
    torch.testing.assert_close(norm.running_mean, maps.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, maps.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert norm.momentum == 0.1
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in state(model).items() if not moving(name))


def test_checkpoints_of_a_sweep_are_read_as_written(tmp_path: Path) -> None:
    states = sweep(tmp_path, [20, 30, 25])
    saved = read_checkpoint(rate_file(tmp_path / SWEPT.name, 1))
    assert saved is not None
    assert same(saved[1], states[1])
