"""A head fitted again to a few images: what is minimised, what is chosen, and how it becomes integers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from edgeft.bounds import FLOAT32_EXACT
from edgeft.errors import DataError, UnsupportedError
from edgeft.graph import IntegerGraph, Linear
from edgeft.heads import PENALTIES, Codes, Head, Real, fitted, head_of, last_linear, n_correct, refitted, to_json, with_head
from edgeft.interpret import Interpreter
from tests.graphs import random_images, residual_net


def problem(n: int = 40, d: int = 12, n_classes: int = 4, seed: int = 0) -> tuple[Head, Real, Codes]:
    """An old head, and images whose classes are those that it gives, but for the names: each is called as the next one."""
    rng = np.random.default_rng(seed)
    old = Head(rng.normal(size=(n_classes, d)), rng.normal(size=n_classes))
    features = 3 * rng.normal(size=(n, d)) + 1
    return old, features, (old.logits(features).argmax(axis=1) + 1) % n_classes


@pytest.mark.parametrize("directions", ["head", "all"])
@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_the_solution_is_stationary_for_autograd(directions: str, penalty: float) -> None:
    old, features, labels = problem()
    head, scale = fitted(old, features, labels, directions, penalty), features.std()
    weight, bias = torch.from_numpy(head.weight * scale).requires_grad_(), torch.from_numpy(head.bias).requires_grad_()
    loss = nn.functional.cross_entropy(torch.from_numpy(features / scale) @ weight.T + bias, torch.from_numpy(labels))
    change = (weight - torch.from_numpy(old.weight * scale)).square().sum() + (bias - torch.from_numpy(old.bias)).square().sum()
    (loss + penalty / 2 * change).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert float(bias.grad.abs().max()) < 1e-4
    gradient = weight.grad.numpy()
    if directions == "head":
        span = np.linalg.svd(old.weight - old.weight.mean(0), full_matrices=False)[2][: len(old.weight) - 1]
        outside = (head.weight - old.weight) - (head.weight - old.weight) @ span.T @ span
        assert np.abs(outside).max() < 1e-9, "the change stays within the old head's directions"
        gradient = gradient @ span.T
    assert np.abs(gradient).max() < 1e-4


def test_a_larger_penalty_stays_nearer_to_the_old_head() -> None:
    old, features, labels = problem()
    distances = [np.linalg.norm(fitted(old, features, labels, "all", penalty).weight - old.weight) for penalty in PENALTIES]
    assert distances == sorted(distances)
    assert np.linalg.norm(fitted(old, features, labels, "all", 1e6).weight - old.weight) < 1e-3


def test_another_naming_of_the_classes_is_learned() -> None:
    old, features, labels = problem()
    assert n_correct(old, features, labels) == 0
    head, candidates = refitted(old, features, labels)
    assert n_correct(head, features, labels) == len(labels)
    assert candidates[0].directions == "head", "it takes no direction that the old head does not have"
    assert candidates[0].log_loss == min(candidate.log_loss for candidate in candidates)
    assert len(candidates) == 1 + 2 * len(PENALTIES)
    assert {row["penalty"] for row in to_json(candidates) if row["directions"] == "none"} == {None}


def test_a_head_that_is_right_already_is_kept() -> None:
    old, features, _ = problem()
    sure = Head(1e5 * old.weight, 1e5 * old.bias)  # No loss is left to lower.
    head, candidates = refitted(sure, features, sure.logits(features).argmax(axis=1))
    assert candidates[0].directions == "none"
    assert head is sure


@pytest.mark.parametrize("n", [2, 4])
def test_one_image_of_a_class_is_enough(n: int) -> None:
    old, features, _ = problem(n, n_classes=n)
    head, _ = refitted(old, features, np.arange(n))
    assert np.isfinite(head.weight).all()
    with pytest.raises(DataError, match="a head cannot be fitted to 1 images"):
        refitted(old, features[:1], np.arange(1))


# --- integers ---


def graph_and_head() -> tuple[IntegerGraph, Head]:
    graph = residual_net(0)
    return graph, head_of(graph)


def test_the_old_head_gives_the_old_integers() -> None:
    graph, head = graph_and_head()
    op = last_linear(graph)
    again = with_head(graph, head)
    assert again.ops == graph.ops
    assert again.tensors == graph.tensors
    assert np.array_equal(again.constants[op.weight], graph.constants[op.weight])
    assert np.array_equal(again.constants[op.bias], graph.constants[op.bias])
    images = random_images(graph, 3)
    layers = Interpreter(graph).layers(images)
    features = np.ldexp(layers[op.input].astype(np.float64), -graph.format(op.input).frac)
    np.testing.assert_array_equal(head.logits(features), Interpreter(graph).logits(images))


@pytest.mark.parametrize("factor", [0.3, 2.5, 10.0])
def test_larger_weights_coarsen_the_format_and_nothing_saturates(factor: float) -> None:
    graph, head = graph_and_head()
    op = last_linear(graph)
    new = Head(factor * head.weight, factor * head.bias)
    changed = with_head(graph, new)
    assert changed.ops[:-1] == graph.ops[:-1]
    (frac, *_), codes = last_linear(changed).weight_frac, changed.constants[op.weight]
    assert frac <= op.weight_frac[0]
    assert (frac < op.weight_frac[0]) == (factor > 1)
    assert np.abs(np.ldexp(codes.astype(float), -frac) - new.weight).max() <= 2.0 ** -(frac + 1), "rounded, not cut off"
    assert changed.accumulator_bound(last_linear(changed)) <= FLOAT32_EXACT
    assert changed.format(changed.output).frac == graph.format(op.input).frac + frac
    assert {name for name in graph.constants if not np.array_equal(graph.constants[name], changed.constants[name])} <= {op.weight, op.bias}


def test_a_head_that_no_format_holds_is_refused() -> None:
    graph, head = graph_and_head()
    with pytest.raises(UnsupportedError, match="no 8-bit format holds the new weights of layer"):
        with_head(graph, Head(1e6 * head.weight, head.bias))


def test_a_network_that_does_not_end_in_a_linear_layer_is_refused() -> None:
    graph = residual_net(0)
    assert isinstance(graph.ops[-1], Linear)
    with pytest.raises(UnsupportedError, match="is not a linear layer with one weight format: no head to fit again"):
        last_linear(replace(graph, ops=graph.ops[:-1]))
