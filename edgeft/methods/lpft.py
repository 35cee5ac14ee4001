"""LP-FT: a linear probe first, so that fine-tuning starts from a fitting head and distorts the features less.

Kumar, Raghunathan, Jones, Ma, Liang: "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution",
ICLR 2022. The second stage keeps the net in eval mode, as the paper's headline variant does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeft.config import Config
from edgeft.methods import Stage
from edgeft.methods.baselines import fine_tune_stage, probe_stage

RATES = (3e-4, 1e-3, 3e-3)
"""A tenth of full fine-tuning's: the probe has done most of the work, and a larger rate distorts the features again."""


@dataclass(frozen=True)
class LinearProbeThenFineTuning:
    """Probe the frozen features, copy the probe into the head, fine-tune everything with frozen batch norm.

    Methods that differ have settings of their `own` (names of Stage), other learning `rates`, or stages that come `after`.
    """

    own: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = RATES
    after: tuple[Stage, ...] = ()

    def stages(self, config: Config) -> list[Stage]:
        """The probe, one SGD stage in eval mode, and what comes after."""
        return [probe_stage(config), fine_tune_stage(config, self.rates, "frozen", self.own), *self.after]


LP_FT = LinearProbeThenFineTuning()
