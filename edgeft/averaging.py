"""A moving average of a model's weights while it is trained."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from edgeft.checkpoint import copy_of

WARM_UP = 10
"""In step t (from 0) the decay is at most (1 + t) / (WARM_UP + t): short trainings too forget where they started."""


class MovingAverage:
    """Exponential moving average of the parameters that a model trains, and of its running statistics.

    After each step: average += (1 - decay) * (weights - average), decay warmed up; a decay of 0 averages nothing and holds nothing.
    `values` are the averages by name, on the model's device; they start from `saved` where it has any, otherwise from the model.
    """

    def __init__(self, model: nn.Module, decay: float, saved: Mapping[str, Tensor]) -> None:
        self._decay = decay
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        moving = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
        self._live: dict[str, Tensor] = {**trained, **moving} if decay else {}
        self.values = copy_of(self._live)
        _put(self.values, saved)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the model after a step, counted from 0 over all epochs."""
        decay = min(self._decay, (1 + step) / (WARM_UP + step))
        for name, value in self.values.items():
            value.lerp_(self._live[name].detach(), 1 - decay)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The model has the averages in place of its own weights, and these back afterwards."""
        own = copy_of(self._live)
        _put(self._live, self.values)
        try:
            yield
        finally:
            _put(self._live, own)


@torch.no_grad()
def _put(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        tensors[name].copy_(value)
