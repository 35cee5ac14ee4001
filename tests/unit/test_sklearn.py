"""Probe and detection against scikit-learn, which neither is made with."""

from typing import Any

import numpy as np
import pytest
import torch

from edgeft.evaluation.detection import auroc
from edgeft.methods import Stage
from edgeft.probe import Features, LinearHead, LogisticRegression, scalar_moments, unnormalised, with_absent_classes
from edgeft.probe import fit_probe as fit
from tests.tiny import context, dataset
from tests.unit.test_probe import classifier, images

linear_model: Any = pytest.importorskip("sklearn.linear_model")
metrics: Any = pytest.importorskip("sklearn.metrics")


def features(n_classes: int, n: int = 240, d: int = 7) -> Features:
    generator = torch.Generator().manual_seed(n_classes)
    labels = torch.arange(n) % n_classes
    return Features(torch.randn(n, d, generator=generator) * 2 + 3 + labels[:, None] * torch.linspace(-1, 1, d), labels)


def theirs(values: torch.Tensor, labels: torch.Tensor, c: float) -> Any:
    return linear_model.LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(values.double().numpy(), labels.numpy())


def ours(found: Features, penalty: float) -> LinearHead:
    mean, std = scalar_moments(found.values)
    problem = LogisticRegression(found, torch.unique(found.labels), mean, std)
    problem.solve(penalty, 1000)
    return unnormalised(problem.weight, problem.bias, mean, std)


@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_scores_are_those_of_its_multinomial_regression(penalty: float) -> None:
    found = features(4)
    mean, std = scalar_moments(found.values)
    model = theirs((found.values.double() - mean) / std, found.labels, 1 / (penalty * len(found.labels)))
    head = ours(found, penalty)
    scores = (found.values.double() @ head.weight.T + head.bias).numpy()
    wanted = model.decision_function(((found.values.double() - mean) / std).numpy())
    # A constant that is added to all scores changes no probability, and neither side fixes it.
    np.testing.assert_allclose(scores - scores.mean(axis=1, keepdims=True), wanted - wanted.mean(axis=1, keepdims=True), atol=1e-4)


def test_two_classes_have_the_probabilities_of_its_one_row() -> None:
    penalty, found = 1e-2, features(2)
    mean, std = scalar_moments(found.values)
    x = (found.values.double() - mean) / std
    # Rows -w/2 and w/2 have half of the squared norm of the one row w.
    model = theirs(x, found.labels, 2 / (penalty * len(found.labels)))
    head = ours(found, penalty)
    scores = found.values.double() @ head.weight.T + head.bias
    np.testing.assert_allclose((scores[:, 1] - scores[:, 0]).numpy(), model.decision_function(x.numpy()), atol=1e-4)
    np.testing.assert_allclose(torch.softmax(scores, dim=1).numpy(), model.predict_proba(x.numpy()), atol=1e-4)
    spread = with_absent_classes(head, torch.tensor([0, 2]), 3)
    absent = torch.softmax(found.values.double() @ spread.weight.T + spread.bias, dim=1)
    np.testing.assert_allclose(
        (absent[:, [0, 2]] / absent[:, [0, 2]].sum(dim=1, keepdim=True)).numpy(), model.predict_proba(x.numpy()), atol=1e-4
    )


def test_the_net_with_the_copied_head_gives_its_decision_function(tmp_path: Any) -> None:
    data, penalty = dataset(n_train=60, n_val=30), 1e-1
    net = classifier()
    fit(net, Stage("probe", "lbfgs", penalties=(penalty,), max_iter=2000), data.train, data.val, context(tmp_path))
    pixels, labels = images(data.train)
    with torch.inference_mode():
        values, logits = net.features(pixels), net(pixels).double().numpy()
    mean, std = scalar_moments(values)
    x = ((values.double() - mean) / std).numpy()
    wanted = theirs(torch.from_numpy(x), labels, 1 / (penalty * len(labels))).decision_function(x)
    np.testing.assert_allclose(logits - logits.mean(axis=1, keepdims=True), wanted - wanted.mean(axis=1, keepdims=True), atol=1e-4)


@pytest.mark.parametrize("digits", [0, 1, 6])
def test_areas_are_those_of_its_roc_curve(digits: int) -> None:
    rng = np.random.default_rng(digits)
    inside, outside = np.round(rng.normal(1, 1, 301), digits), np.round(rng.normal(0, 1, 200), digits)
    truth = np.repeat([1, 0], [len(inside), len(outside)])
    assert auroc(inside, outside) == pytest.approx(metrics.roc_auc_score(truth, np.concatenate([inside, outside])), abs=1e-12)
