"""The two baselines of LP-FT: linear probe only, and full fine-tuning only."""

from dataclasses import dataclass

from edgeft.config import Config
from edgeft.methods import Stage

SHAPES_PENALTIES = (1e-1, 1e-2)
"""Probe strengths for 'shapes': a weaker penalty fits the training images so well that fine-tuning no longer moves."""
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Probe strengths for real images, whose best value depends on the backbone and the number of images."""
RATES = (3e-3, 1e-2, 3e-2)
"""Learning rates of full fine-tuning."""
SHAPES_EPOCHS, EPOCHS = 40, 8
"""Epochs for 'shapes', whose 100 training images make an epoch of four steps, and for other data."""


def epochs_of(config: Config) -> int:
    """Epochs of a fine-tuning run: the configured ones, or the data's own."""
    default = SHAPES_EPOCHS if config.data.source == "shapes" else EPOCHS
    return config.train.epochs if config.train.epochs is not None else default


def probe_stage(config: Config) -> Stage:
    """The linear probe, with the configured penalties or the data's own."""
    default = SHAPES_PENALTIES if config.data.source == "shapes" else PENALTIES
    return Stage(
        name="probe",
        solver="lbfgs",
        penalties=config.probe.penalties if config.probe.penalties is not None else default,
        max_iter=config.probe.max_iter,
    )


@dataclass(frozen=True)
class LinearProbe:
    """Fit the head to frozen features and leave the backbone alone."""

    def stages(self, config: Config) -> list[Stage]:
        """One probe."""
        return [probe_stage(config)]


@dataclass(frozen=True)
class FullFineTuning:
    """Train everything from a fresh head, batch-norm statistics included."""

    def stages(self, config: Config) -> list[Stage]:
        """One SGD stage in training mode."""
        train = config.train
        return [
            Stage(
                name="fine-tune",
                solver="sgd",
                epochs=epochs_of(config),
                learning_rates=train.lr if train.lr is not None else RATES,
                batch_norm="train",
                momentum=train.momentum,
                weight_decay=train.weight_decay,
            )
        ]


LINEAR_PROBE = LinearProbe()
FULL_FINE_TUNING = FullFineTuning()
