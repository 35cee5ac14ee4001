"""The two baselines of LP-FT: linear probe only, and full fine-tuning only; and the stages that other methods are made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from edgeft.config import Config, TrainConfig
from edgeft.errors import ConfigError
from edgeft.methods import Stage

SHAPES_PENALTIES = (1e-1, 1e-2)
"""Probe strengths for 'shapes': a weaker penalty fits the training images so well that fine-tuning no longer moves."""
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Probe strengths for real images, whose best value depends on the backbone and the number of images."""
RATES = (3e-3, 1e-2, 3e-2)
"""Learning rates of full fine-tuning."""
SHAPES_EPOCHS, EPOCHS = 40, 8
"""Epochs for 'shapes', whose 100 training images make an epoch of four steps, and for other data."""
NEUTRAL: dict[str, Any] = {"l2sp": 0.0, "freeze_k": 0, "layer_decay": 1.0, "ema": 0.0, "label_smoothing": 0.0, "mixup": 0.0}
"""Settings of fine-tuning that change nothing; a method may have others, and the configuration has the last word."""


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


def fine_tune_stage(config: Config, rates: tuple[float, ...], batch_norm: Literal["frozen", "train"], own: Mapping[str, Any]) -> Stage:
    """An SGD stage: what the configuration says, else the method's `own` settings (names of Stage), else the neutral ones.

    Raises ConfigError for settings that contradict one another.
    """
    train = config.train
    given = {key: value for key in NEUTRAL if (value := getattr(train, key)) is not None}
    return Stage(
        name="fine-tune",
        solver="sgd",
        epochs=epochs_of(config),
        learning_rates=train.lr if train.lr is not None else rates,
        batch_norm=batch_norm,
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        layers=train.layers,
        sampler=train.sampler,
        keep_epochs=train.keep_checkpoints,
        **{**NEUTRAL, **own, **given},
    )


@dataclass(frozen=True)
class LinearProbe:
    """Fit the head to frozen features and leave the backbone alone."""

    def stages(self, config: Config) -> list[Stage]:
        """One probe. Raises ConfigError for settings of fine-tuning, which it does not do."""
        fields, about = TrainConfig.model_fields, (*NEUTRAL, "layers", "sampler", "keep_checkpoints")
        given = [f"train.{key}" for key in about if getattr(config.train, key) != fields[key].default]
        if given:
            raise ConfigError(f"method 'lp' fits the head alone, and {', '.join(given)} is about fine-tuning", "--method lpft fine-tunes")
        return [probe_stage(config)]


@dataclass(frozen=True)
class FullFineTuning:
    """Train everything from a fresh head, batch-norm statistics included; `own` are settings of a method that differs."""

    own: Mapping[str, Any] = field(default_factory=dict)

    def stages(self, config: Config) -> list[Stage]:
        """One SGD stage in training mode."""
        return [fine_tune_stage(config, RATES, "train", self.own)]


LINEAR_PROBE = LinearProbe()
FULL_FINE_TUNING = FullFineTuning()
