"""The theory behind LP-FT as an experiment of milliseconds: two linear layers, of which fine-tuning distorts the first.

Setting after Kumar, Raghunathan, Jones, Ma, Liang: "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution", ICLR 2022; sizes and the size of the error are ours.

A model is f(x) = v . (B x), its features B a k x d matrix; the truth is linear, y = w . x with w = B*^T v*, without noise. Training
inputs lie in a subspace of m < d dimensions, shifted inputs in all d. The gradient of B is v r^T X, a matrix whose rows lie in the
training subspace: full fine-tuning turns the features there and leaves them as they were elsewhere. A head that fits already makes
the residual r, and with it that distortion, small.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeft.errors import ConfigError

Floats = NDArray[np.float64]

DIMENSIONS, FEATURES, SUBSPACE, SAMPLES = 40, 5, 20, 200
"""d, k, m and the number of training inputs."""
LEARNING_RATE, MAX_STEPS, CONVERGED = 0.05, 5000, 1e-10
"""Of gradient descent on the mean squared error, and the training error at which it ends."""
GOOD, BAD = 0.1, 1.0
"""Error of the pretrained features: weight of a random orthonormal matrix that is added to the right features."""
DEFAULT_SEEDS = tuple(range(20))


@dataclass(frozen=True)
class Errors:
    """Mean squared error of one method by seed: over inputs of the training subspace, and over inputs of the whole space."""

    id: tuple[float, ...]
    ood: tuple[float, ...]


@dataclass(frozen=True)
class Claim:
    """A statement about the errors and in how many seeds it holds. Where it is not required, it is shown as a limit of the theory."""

    text: str
    n_holds: int
    n_seeds: int
    required: bool

    @property
    def passed(self) -> bool:
        """Whether it holds wherever it must."""
        return self.n_holds == self.n_seeds or not self.required


@dataclass(frozen=True)
class Experiment:
    """All methods from features of one error: the linear probe, fine-tuning from a random head, and fine-tuning from the probe."""

    feature_error: float
    lp: Errors
    ft: Errors
    lpft: Errors
    claims: tuple[Claim, ...]


@dataclass(frozen=True)
class SelfCheck:
    """The experiment with good and with bad features, the same seeds in both."""

    seeds: tuple[int, ...]
    good: Experiment
    bad: Experiment

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The statements of both experiments."""
        return self.good.claims + self.bad.claims

    @property
    def passed(self) -> bool:
        """Whether every required statement holds in every seed."""
        return all(claim.passed for claim in self.claims)

    def to_json(self) -> dict[str, Any]:
        """Errors by seed and the statements, as plain JSON values."""
        return {"seeds": list(self.seeds), "passed": self.passed, "experiments": [_to_json(found) for found in (self.good, self.bad)]}


def selfcheck(seeds: Sequence[int] = DEFAULT_SEEDS) -> SelfCheck:
    """Run the experiment for each seed, with features of the errors GOOD and BAD; the same seeds give the same errors.

    Raises ConfigError without a seed and for a negative one.
    """
    if not seeds or min(seeds) < 0:
        given = ", ".join(map(str, seeds)) or "none"
        raise ConfigError(f"selfcheck needs seeds of 0 or more, at least one; given: {given}")
    lp, ft, lpft = good = _errors(seeds, GOOD)
    required = (
        _claim("in distribution, fine-tuning is better than the probe: FT < LP", lambda i: ft.id[i] < lp.id[i], seeds),
        _claim("in distribution, so is LP-FT: LP-FT < LP", lambda i: lpft.id[i] < lp.id[i], seeds),
        _claim("out of distribution, the probe is better than fine-tuning: LP < FT", lambda i: lp.ood[i] < ft.ood[i], seeds),
        _claim("out of distribution, LP-FT is better than both: LP-FT < LP < FT", lambda i: lpft.ood[i] < lp.ood[i] < ft.ood[i], seeds),
    )
    bad_lp, bad_ft, bad_lpft = bad = _errors(seeds, BAD)
    limits = (
        _claim("out of distribution, LP-FT is no worse than the probe: LP-FT <= LP", lambda i: bad_lpft.ood[i] <= bad_lp.ood[i], seeds),
        _claim("LP < FT is no longer sure", lambda i: bad_lp.ood[i] < bad_ft.ood[i], seeds, required=False),
        _claim("LP-FT < FT is no longer sure", lambda i: bad_lpft.ood[i] < bad_ft.ood[i], seeds, required=False),
    )
    return SelfCheck(tuple(seeds), Experiment(GOOD, *good, required), Experiment(BAD, *bad, limits))


def render(check: SelfCheck) -> str:
    """The errors as a table of medians, the statements, and what they do not say."""
    lines = [f"two linear layers, {len(check.seeds)} seeds, median of the mean squared error", ""]
    for title, found in (("good features", check.good), ("bad features", check.bad)):
        lines.append(f"{f'{title} (error {found.feature_error:g})':30} {'ID':>9} {'OOD':>9}")
        rows = (("linear probe (LP)", found.lp), ("fine-tuning (FT)", found.ft), ("LP-FT", found.lpft))
        lines += [f"  {name:28} {np.median(errors.id):9.1e} {np.median(errors.ood):9.2g}" for name, errors in rows]
        lines += [f"  {_mark(claim)} {claim.n_holds}/{claim.n_seeds}  {claim.text}" for claim in found.claims]
        lines.append("")
    lines.append("passed" if check.passed else "FAILED: a statement that must hold in every seed does not")
    lines.append("It says how gradient descent distorts features, on linear models without noise. It does not say that LP-FT wins on your")
    lines.append("data: with features that do not fit the task nothing is sure out of distribution.")
    return "\n".join(lines)


def _mark(claim: Claim) -> str:
    return "limit " if not claim.required else "ok    " if claim.passed else "FAILED"


def _claim(text: str, holds: Callable[[int], bool], seeds: Sequence[int], *, required: bool = True) -> Claim:
    return Claim(text, sum(holds(index) for index in range(len(seeds))), len(seeds), required)


def _to_json(found: Experiment) -> dict[str, Any]:
    methods = {"lp": found.lp, "ft": found.ft, "lpft": found.lpft}
    return {
        "feature_error": found.feature_error,
        "methods": {name: {"id": list(errors.id), "ood": list(errors.ood)} for name, errors in methods.items()},
        "claims": [{**vars(claim), "passed": claim.passed} for claim in found.claims],
    }


# The experiment: arrays hold all seeds, in their first dimension


def _errors(seeds: Sequence[int], feature_error: float) -> tuple[Errors, Errors, Errors]:
    """Errors of the probe, of fine-tuning and of LP-FT."""
    drawn = [_draw(seed, feature_error) for seed in seeds]
    subspace, inputs, truth, features, random_head = (np.stack(arrays) for arrays in zip(*drawn, strict=True))
    covariance = inputs.swapaxes(1, 2) @ inputs / SAMPLES
    targets = inputs @ truth[..., None]
    probe = np.stack([np.linalg.lstsq(x @ b.T, y, rcond=None)[0][:, 0] for x, b, y in zip(inputs, features, targets, strict=True)])
    weights = (
        _predictor(features, probe),
        _predictor(*_descend(features, random_head, covariance, truth)),
        _predictor(*_descend(features, probe, covariance, truth)),
    )
    lp, ft, lpft = (_measured(w - truth, subspace) for w in weights)
    return lp, ft, lpft


def _draw(seed: int, feature_error: float) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Rows of the training subspace, training inputs, the true w, the pretrained features and a random head."""
    rng = np.random.default_rng(seed)
    right, wrong = _orthonormal_rows(rng, FEATURES), _orthonormal_rows(rng, FEATURES)
    subspace = _orthonormal_rows(rng, SUBSPACE)
    inputs = rng.standard_normal((SAMPLES, SUBSPACE)) @ subspace
    head = rng.standard_normal(FEATURES)
    truth = right.T @ (head / np.linalg.norm(head))
    rotation = np.linalg.qr(rng.standard_normal((FEATURES, FEATURES)))[0]
    features = np.linalg.qr((rotation @ right + feature_error * wrong).T)[0].T
    return subspace, inputs, truth, features, rng.standard_normal(FEATURES) / np.sqrt(FEATURES)


def _orthonormal_rows(rng: np.random.Generator, n: int) -> Floats:
    rows: Floats = np.linalg.qr(rng.standard_normal((DIMENSIONS, n)))[0].T
    return rows


def _predictor(features: Floats, head: Floats) -> Floats:
    """B^T v of every seed: the linear function that both layers are."""
    product: Floats = (head[:, None] @ features)[:, 0]
    return product


def _descend(features: Floats, head: Floats, covariance: Floats, truth: Floats) -> tuple[Floats, Floats]:
    """Gradient descent on both layers until the training error is below CONVERGED, which ends each seed on its own, or for MAX_STEPS.

    Without noise the training error is (w - w*)^T C (w - w*) with C the second moments of the inputs, which spares the inputs.
    """
    for _ in range(MAX_STEPS):
        deviation = _predictor(features, head) - truth
        gradient = 2 * (deviation[:, None] @ covariance)[:, 0]
        going = (deviation * gradient).sum(axis=1) / 2 >= CONVERGED
        if not going.any():
            break
        gradient *= going[:, None]
        step = (features @ gradient[..., None])[..., 0]
        features = features - LEARNING_RATE * head[..., None] * gradient[:, None]
        head = head - LEARNING_RATE * step
    return features, head


def _measured(deviation: Floats, subspace: Floats) -> Errors:
    """Errors for inputs of independent unit variance, in the subspace and in the whole space."""
    inside = (subspace @ deviation[..., None])[..., 0]
    return Errors(tuple((inside**2).sum(axis=1).tolist()), tuple((deviation**2).sum(axis=1).tolist()))
