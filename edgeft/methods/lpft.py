"""LP-FT: a linear probe first, so that fine-tuning starts from a fitting head and distorts the features less.

Kumar, Raghunathan, Jones, Ma, Liang: "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution",
ICLR 2022. The second stage keeps the net in eval mode, as the paper's headline variant does.
"""

from dataclasses import dataclass

from edgeft.config import Config
from edgeft.methods import Stage
from edgeft.methods.baselines import epochs_of, probe_stage

RATES = (3e-4, 1e-3, 3e-3)
"""A tenth of full fine-tuning's: the probe has done most of the work, and a larger rate distorts the features again."""


@dataclass(frozen=True)
class LinearProbeThenFineTuning:
    """Probe the frozen features, copy the probe into the head, fine-tune everything with frozen batch norm."""

    def stages(self, config: Config) -> list[Stage]:
        """The probe and one SGD stage in eval mode."""
        train = config.train
        return [
            probe_stage(config),
            Stage(
                name="fine-tune",
                solver="sgd",
                epochs=epochs_of(config),
                learning_rates=train.lr if train.lr is not None else RATES,
                batch_norm="frozen",
                momentum=train.momentum,
                weight_decay=train.weight_decay,
            ),
        ]


LP_FT = LinearProbeThenFineTuning()
