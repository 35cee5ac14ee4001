"""Fine-tuning methods that are LP-FT or full fine-tuning with one thing changed; the registry names their papers.

Every change is a setting of its own as well (train.l2sp, train.freeze_k, ...), so that methods combine: `wise` with `train.ema`, say.
The numbers here are the methods' defaults. WiSE and soups come before quantization: afterwards the formats of two nets differ from
layer to layer, and the average of their integers means nothing.
"""

from dataclasses import dataclass

from edgeft.config import Config
from edgeft.errors import ConfigError
from edgeft.methods import Stage
from edgeft.methods.baselines import RATES, FullFineTuning
from edgeft.methods.lpft import LinearProbeThenFineTuning

L2SP_WEIGHT = 0.01
"""The weight that LP-FT's authors took for their L2-SP baseline, by ID validation, for the penalty without a factor 1/2."""
STEM_AND_FIRST_STAGE = 2
"""Coarse layers of a convolutional net that the released runs of 'How to Fine-Tune Vision Models with SGD' leave as they are."""
LAYER_DECAY_FACTOR = 0.75
EMA_DECAY = 0.999
SMOOTHING, MIXUP = 0.1, 0.2
"""Enough of both that the fine-tuned net is less sure of itself, and does not outweigh the other one in the average."""


@dataclass(frozen=True)
class Surgical(LinearProbeThenFineTuning):
    """LP-FT of the configured layers alone; there is no choice that suits every shift, so that there is no default."""

    def stages(self, config: Config) -> list[Stage]:
        """As LP-FT. Raises ConfigError without `train.layers`."""
        if not config.train.layers:
            raise ConfigError("method 'surgical' trains the layers in train.layers, which is empty", "example: --set train.layers=blocks.0")
        return super().stages(config)


L2_SP = FullFineTuning({"l2sp": L2SP_WEIGHT})
FREEZE_BOTTOM = LinearProbeThenFineTuning({"freeze_k": STEM_AND_FIRST_STAGE})
SURGICAL = Surgical()
LAYER_DECAY = LinearProbeThenFineTuning({"layer_decay": LAYER_DECAY_FACTOR})
NORM_TUNE = LinearProbeThenFineTuning({"norms_only": True}, rates=RATES)
MOVING_AVERAGE = LinearProbeThenFineTuning({"ema": EMA_DECAY})
WISE = LinearProbeThenFineTuning(after=(Stage("wise", "wise"),))
BANG = LinearProbeThenFineTuning({"label_smoothing": SMOOTHING, "mixup": MIXUP}, after=(Stage("wise", "wise"),))
SOUP = LinearProbeThenFineTuning({"keep_rates": True}, after=(Stage("soup", "soup"),))
