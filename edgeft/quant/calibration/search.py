"""Search over formats: one coordinate at a time, in network order, by the divergence of the whole net's scores from the float net's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeft.quant.calibration.layerfit import LayerFit, put
from edgeft.quant.net import FixedPointNet
from edgeft.quant.plan import IMAGE, ConvStep, LinearStep, Step, run_float

IMAGES = 96
"""Images that the search looks at at most; half of them choose, half of them confirm."""
MARGIN = 0.01
"""Relative fall of the divergence that a move must bring on both halves."""
WORTH_TRYING = 4.0
"""A weight format whose output error is above this many times the best one's is not tried."""

Env = dict[str, Tensor]
Undo = Callable[[], None]


@dataclass
class SearchResult:
    """How many moves were tried and kept, and the divergence in nats before and after, on the choosing and the confirming half."""

    n_tried: int
    n_kept: int
    before: tuple[float, float]
    after: tuple[float, float]


@torch.no_grad()
def search(
    net: FixedPointNet, images: Tensor, fits: dict[str, list[LayerFit]], proposals: dict[str, int], advance: Callable[..., None]
) -> SearchResult:
    """Move fractions of activations by one, and of weights to the alternatives in `fits`, where that brings scores nearer to float.

    `images` should be others than those that weights were fitted on. A move is kept when the Kullback-Leibler divergence falls on both
    halves of them: a search on few images otherwise fits their noise. Deterministic; `advance` is called once for each step of the
    plan. Changes `net` and `proposals` in place.
    """
    walk = _Walk(net, images[:IMAGES], fits, proposals)
    start = walk.divergence
    for index, step in enumerate(net.plan.steps):
        for move in walk.moves(index, step):
            walk.attempt(index, move)
        walk.pass_on(index, step)
        advance()
    return SearchResult(walk.n_tried, walk.n_kept, start, walk.divergence)


class _Walk:
    """State of the search: tensors that the steps still to be visited read, and the divergence that is to be beaten."""

    def __init__(self, net: FixedPointNet, images: Tensor, fits: dict[str, list[LayerFit]], proposals: dict[str, int]) -> None:
        self.net, self.fits, self.proposals = net, fits, proposals
        self.wanted = F.log_softmax(torch.cat([run_float(net.plan, part) for part in images.split(16)]), 1)
        self.env: Env = {IMAGE: net.plan.encode(images)}
        self.order = {step.name: index for index, step in enumerate(net.plan.steps)}
        self.last_use = net.plan.last_use()
        self.n_tried = self.n_kept = 0
        self.divergence = self._measure(0)

    def moves(self, index: int, step: Step) -> Iterator[Callable[[], Undo | None]]:
        """Changes to try at a step; each puts itself in force and returns how to undo it, or None where it changes nothing."""
        if isinstance(step, ConvStep | LinearStep):
            fits = self.fits.get(step.name, [])
            for best, fit in ((fits[0], other) for other in fits[1:]):
                if not torch.equal(fit.fracs, best.fracs) and fit.error <= WORTH_TRYING * best.error:
                    yield lambda fit=fit: self._reweigh(step, fit)  # type: ignore[misc]
        if step.name in self.proposals:
            for change in (-1, 1):
                yield lambda change=change: self._shift(index, step.name, change)  # type: ignore[misc]

    def attempt(self, index: int, move: Callable[[], Undo | None]) -> None:
        """Keep a move that brings the scores of both halves nearer to float."""
        undo = move()
        if undo is None:
            return
        self.n_tried += 1
        found = self._measure(index)
        if all(new < (1.0 - MARGIN) * old for new, old in zip(found, self.divergence, strict=True)):
            self.divergence = found
            self.n_kept += 1
        else:
            undo()

    def pass_on(self, index: int, step: Step) -> None:
        """Compute a step's output for good."""
        self._run(step, index, self.env)

    def _run(self, step: Step, index: int, env: Env) -> None:
        env[step.name] = self.net.activate(step, self.net.run_step(step, [env[name] for name in step.inputs]))
        for name in set(step.inputs):
            if self.last_use[name] == index:
                del env[name]

    def _measure(self, index: int) -> tuple[float, float]:
        """Mean divergence of either half, from the step `index` on; images are split by their number, even and odd."""
        env = dict(self.env)
        for number, step in enumerate(self.net.plan.steps[index:], index):
            self._run(step, number, env)
        found = F.log_softmax(env[self.net.plan.output], 1)
        each = F.kl_div(found, self.wanted, log_target=True, reduction="none").sum(1)
        return float(each[::2].mean()), float(each[1::2].mean()) if len(each) > 1 else 0.0

    def _reweigh(self, step: ConvStep | LinearStep, fit: LayerFit) -> Undo:
        layer = self.net.layer(step.name)
        fracs, weight, bias = self.net.weight_fracs(step.name), layer.weight.data.clone(), layer.bias.data.clone()
        put(self.net, step, fit)

        def undo() -> None:
            self.net.set_weight_fracs(step.name, fracs)
            layer.weight.data.copy_(weight)
            layer.bias.data.copy_(bias)

        return undo

    def _shift(self, index: int, name: str, change: int) -> Undo | None:
        """Move an activation, with all that share its format; not where that changes tensors that are computed for good already."""
        before = {point.name: self.net.frac(point.name) for point in self.net.points}
        weights = {step.name: self.net.weight_fracs(step.name) for step in self.net.plan.weighted()}
        old = dict(self.proposals)
        members = {point.name for point in self.net.points if before[point.name] == before[name] and self._tied(point.name, name)}
        self.proposals |= dict.fromkeys(members, before[name] + change)

        def undo() -> None:
            self.proposals.clear()
            self.proposals.update(old)
            self.net.set_fracs(self.proposals)
            for layer, fracs in weights.items():
                self.net.set_weight_fracs(layer, fracs)

        self.net.set_fracs(self.proposals)
        changed = [other for other, frac in before.items() if self.net.frac(other) != frac]
        if changed and min(self.order[other] for other in changed) >= index:
            return undo
        undo()
        return None

    def _tied(self, first: str, second: str) -> bool:
        points = {point.name: point for point in self.net.points}
        a, b = points[first], points[second]
        return a is b or a.shared == b.shared or (a.group is not None and a.group == b.group and a.carried and b.carried)
