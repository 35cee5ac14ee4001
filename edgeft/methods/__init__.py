"""Fine-tuning methods as lists of stages, and the method registry."""

import re
from dataclasses import dataclass
from typing import Literal, Protocol

from edgeft.config import Config
from edgeft.errors import ConfigError
from edgeft.registry import Entry, Registry


@dataclass(frozen=True)
class Stage:
    """One pass of training: what solves it, for how long, at which rates, under which batch-norm policy.

    `solver` "lbfgs" is a linear probe of the frozen features: it reads `penalties` and `max_iter` only. "sgd" trains every
    parameter that requires a gradient for `epochs` at each of `learning_rates`, cosine to 0 by epoch. `batch_norm` "frozen" keeps
    the whole net in eval mode (statistics do not move, dropout is off, scale and shift are trained), "train" puts it in training
    mode. With `keep_start` the untrained start competes with the trained epochs and wins ties. `name` also names the stage's checkpoints.
    Raises ConfigError for values that cannot be trained with.
    """

    name: str
    solver: Literal["lbfgs", "sgd"]
    epochs: int = 0
    learning_rates: tuple[float, ...] = ()
    batch_norm: Literal["frozen", "train"] = "frozen"
    momentum: float = 0.0
    weight_decay: float = 0.0
    penalties: tuple[float, ...] = ()
    max_iter: int = 0
    keep_start: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", self.name):
            raise ConfigError(f"stage name '{self.name}' is not lower-case letters, digits, '-' and '_'")
        if self.solver == "sgd":
            self._require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
            self._require(_all_positive(self.learning_rates), "learning rates", self.learning_rates, "at least one, all above 0")
        else:
            self._require(self.max_iter >= 1, "iterations", self.max_iter, "at least 1")
            self._require(_all_positive(self.penalties), "penalties", self.penalties, "at least one, all above 0")

    def _require(self, good: bool, what: str, found: object, allowed: str) -> None:
        if not good:
            raise ConfigError(f"stage '{self.name}': {what} {found!r} cannot be used; allowed: {allowed}")


def _all_positive(values: tuple[float, ...]) -> bool:
    return bool(values) and all(0 < value < float("inf") for value in values)


class Method(Protocol):
    """A way to fine-tune: stages that run one after the other on the same model."""

    def stages(self, config: Config) -> list[Stage]:
        """The stages for a resolved configuration; `config.train.lr` replaces the method's own learning rates."""
        ...


METHODS = Registry(
    "method",
    Entry("lp", "linear probe: only the head is fitted, to frozen features (baseline)", "edgeft.methods.baselines:LINEAR_PROBE"),
    Entry("ft", "full fine-tuning from a fresh head, batch norm in training mode (baseline)", "edgeft.methods.baselines:FULL_FINE_TUNING"),
    Entry(
        "lpft",
        "LP-FT: linear probe, then fine-tune with frozen batch norm (Kumar et al., ICLR 2022, "
        "'Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution')",
        "edgeft.methods.lpft:LP_FT",
    ),
)
