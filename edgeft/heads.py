"""The last layer of an integer network as a linear head, fitted again to a few images of a target and rounded to its old format.

Project and Probe (Chen et al., ICLR 2024, arXiv:2302.05441) probes a target on a few orthogonal directions that are predictive on the
source. Here these are the directions that the source's own head tells classes apart by, so that no source image is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeft.bounds import FLOAT32_EXACT, accumulator_bounds
from edgeft.errors import DataError, UnsupportedError
from edgeft.fixedpoint import FixedPointFormat, dequantize
from edgeft.graph import IntegerGraph, Linear
from edgeft.graph import Tensor as GraphTensor
from edgeft.quant.formats import weight_format

Real = NDArray[np.float64]
Codes = NDArray[np.int64]

PENALTIES = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Strengths of the pull to the old head, largest first."""
FOLDS = 5
MAX_ITER = 100
MAX_NARROWING = 8
"""Bits that the weight format may lose to a head with larger weights."""


@dataclass(frozen=True)
class Head:
    """Weights [classes, d] and bias [classes] in real values."""

    weight: Real
    bias: Real

    def logits(self, features: Real) -> Real:
        """Scores [n, classes] of features [n, d]."""
        scores: Real = features @ self.weight.T + self.bias
        return scores


@dataclass(frozen=True)
class Candidate:
    """A way to refit: along which directions ("head": those of the old head, "all"; "none": not at all), how strongly held back.

    `log_loss` is the mean over held-out target images, in nats.
    """

    directions: str
    penalty: float
    log_loss: float


def last_linear(graph: IntegerGraph) -> Linear:
    """The layer that gives the logits. Raises UnsupportedError where it is not linear, with one format for all classes."""
    op = graph.ops[-1]
    if not isinstance(op, Linear) or op.relu or len(set(op.weight_frac)) != 1:
        raise UnsupportedError(f"the last layer, '{op.output}', is not a linear layer with one weight format: no head to fit again")
    return op


def head_of(graph: IntegerGraph) -> Head:
    """The real values of the last layer's integers."""
    op = last_linear(graph)
    frac = graph.format(op.input).frac + op.weight_frac[0]
    bias = FixedPointFormat(32, frac, signed=True)
    return Head(dequantize(graph.constants[op.weight], weight_format(op.weight_frac[0])), dequantize(graph.constants[op.bias], bias))


def refitted(old: Head, features: Real, labels: Codes) -> tuple[Head, list[Candidate]]:
    """The head that predicts held-out target images best, fitted to all of them; and all candidates, the chosen one first.

    `features` [n, d], `labels` [n]. The old head competes, and wins ties; then fewer directions and a larger penalty do. Images are held
    out in FOLDS parts that share each class as evenly as they can. Raises DataError for fewer than two images.
    """
    if len(labels) < 2:
        raise DataError(f"a head cannot be fitted to {len(labels)} images", "give a few of each class")
    folds = _folds(labels)
    found = [Candidate("none", float("inf"), _log_loss(old.logits(features), labels))]
    for directions in ("head", "all"):
        for penalty in PENALTIES:
            losses = np.zeros(len(labels))
            for fold in range(folds.max() + 1):
                rest, held = folds != fold, folds == fold
                head = fitted(old, features[rest], labels[rest], directions, penalty)
                losses[held] = _log_losses(head.logits(features[held]), labels[held])
            found.append(Candidate(directions, penalty, float(losses.mean())))
    best = min(found, key=lambda candidate: candidate.log_loss)
    head = old if best.directions == "none" else fitted(old, features, labels, best.directions, best.penalty)
    return head, [best, *(candidate for candidate in found if candidate is not best)]


def fitted(old: Head, features: Real, labels: Codes, directions: str, penalty: float) -> Head:
    """The head next to the old one that minimises mean cross-entropy + penalty / 2 * |change|^2, by L-BFGS from no change.

    The change of the weights lies in `directions`, orthonormal rows; it is measured, with the bias's, for features of deviation 1.
    """
    # Among all directions the smallest change lies in those of the images, of which there may be far fewer.
    basis = _span(old.weight - old.weight.mean(axis=0)) if directions == "head" else _span(features)
    scale = float(features.std()) or 1.0
    change = _solve(old.logits(features), features @ basis.T / scale, labels, penalty)
    return Head(old.weight + change[:, :-1] @ basis / scale, old.bias + change[:, -1])


def with_head(graph: IntegerGraph, head: Head) -> IntegerGraph:
    """The same network with another last layer: its weight format is the old one, or the finest below it that holds the new head.

    It holds it when no weight saturates and every sum is exact in float32. Raises UnsupportedError where no format does.
    """
    op, tensors = last_linear(graph), dict(graph.tensors)
    source = graph.format(op.input)
    for frac in range(op.weight_frac[0], op.weight_frac[0] - MAX_NARROWING - 1, -1):
        weight, bias = np.rint(np.ldexp(head.weight, frac)), np.rint(np.ldexp(head.bias, source.frac + frac))
        if np.abs(weight).max() > weight_format(frac).max_code or np.abs(bias).max() > FLOAT32_EXACT:
            continue
        codes = weight.astype(np.int8), bias.astype(np.int32)
        if int(accumulator_bounds(*codes, source).max()) <= FLOAT32_EXACT:
            tensors[op.output] = GraphTensor(op.output, tensors[op.output].shape, FixedPointFormat(32, source.frac + frac, signed=True))
            changed = replace(op, weight_frac=(frac,) * len(op.weight_frac))
            constants = {**graph.constants, op.weight: codes[0], op.bias: codes[1]}
            return replace(graph, tensors=tensors, ops=(*graph.ops[:-1], changed), constants=constants)
    raise UnsupportedError(f"no 8-bit format holds the new weights of layer '{op.output}'", "give more target images")


def _span(rows: Real) -> Real:
    """Orthonormal rows that span the given ones."""
    _, strengths, rows = np.linalg.svd(rows, full_matrices=False)
    kept: Real = rows[strengths > strengths[0] * 1e-9]
    return kept


def _solve(offset: Real, z: Real, labels: Codes, penalty: float) -> Real:
    """Change [classes, r + 1] of weights and bias for inputs z [n, r], on top of the scores `offset` [n, classes]."""
    base, target = torch.from_numpy(offset), torch.from_numpy(labels)
    inputs = torch.cat([torch.from_numpy(z), torch.ones(len(z), 1, dtype=torch.float64)], dim=1)
    change = nn.Parameter(torch.zeros(base.shape[1], inputs.shape[1], dtype=torch.float64))
    solver = torch.optim.LBFGS([change], max_iter=MAX_ITER, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = nn.functional.cross_entropy(base + inputs @ change.T, target) + penalty / 2 * change.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    solved: Real = change.detach().numpy()
    return solved


def _folds(labels: Codes) -> Codes:
    """A part for each image, 0 ... FOLDS - 1; images of a class go to the parts in turn."""
    folds = np.empty(len(labels), np.int64)
    folds[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % min(FOLDS, len(labels))
    return folds


def _log_losses(scores: Real, labels: Codes) -> Real:
    shifted = scores - scores.max(axis=1, keepdims=True)
    losses: Real = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
    return losses


def _log_loss(scores: Real, labels: Codes) -> float:
    return float(_log_losses(scores, labels).mean())


def n_correct(head: Head, features: Real, labels: Codes) -> int:
    """Images whose top class is their label."""
    return int((head.logits(features).argmax(axis=1) == labels).sum())


def to_json(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Plain JSON values; the penalty of a head that is not changed is None."""
    return [
        {"directions": each.directions, "penalty": each.penalty if np.isfinite(each.penalty) else None, "log_loss": each.log_loss}
        for each in candidates
    ]
