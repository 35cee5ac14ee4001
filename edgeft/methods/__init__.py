"""Fine-tuning methods as lists of stages, and the method registry."""

import re
from dataclasses import dataclass
from typing import Literal, Protocol

from edgeft.config import Config
from edgeft.errors import ConfigError
from edgeft.registry import Entry, Registry


@dataclass(frozen=True)
class Stage:
    """One pass of training: what solves it, for how long, at which rates, which parameters, under which batch-norm policy.

    `solver` "lbfgs" is a linear probe of the frozen features: it reads `penalties` and `max_iter` only. "sgd" trains every
    parameter that requires a gradient for `epochs` at each of `learning_rates`, cosine to 0 by epoch. `batch_norm` "frozen" keeps
    the whole net in eval mode (statistics do not move, dropout is off, scale and shift are trained), "train" puts it in training
    mode. With `keep_start` the untrained start competes with the trained epochs and wins ties. `name` also names the stage's checkpoints.
    "flyp" is "sgd" of the image tower of an open_clip model (`clip`, `clip_weights`) and of its text tower, which reads the classes in
    `prompts`.
    "wise" and "soup" train nothing: they average weights of the SGD stage before them.

    Further of "sgd": `ema` is the decay of a moving average of the weights (0: none), which is then what is validated and kept;
    `label_smoothing` the share of a label that is spread over all classes; `mixup` the parameter of the Beta distribution that images
    are mixed by (0: none); `sampler` "balanced" draws every class (every group in it, where the data name groups) equally often;
    `keep_rates` also keeps the best weights of every rate, `keep_epochs` those of so many epochs of it, evenly spaced.
    What `run_stages` reads: `l2sp` is the weight of the squared distance from the start, all but the head; `freeze_k` the number of
    coarse layers that stay as they are, from the input; `layers` patterns of names that alone are trained (none: all); with `norms_only`
    only batch norms and the head are; `layer_decay` the factor of the rate from a layer to the one before it.
    Raises ConfigError for values that cannot be trained with.
    """

    name: str
    solver: Literal["lbfgs", "sgd", "wise", "soup", "flyp"]
    epochs: int = 0
    learning_rates: tuple[float, ...] = ()
    batch_norm: Literal["frozen", "train"] = "frozen"
    momentum: float = 0.0
    weight_decay: float = 0.0
    penalties: tuple[float, ...] = ()
    max_iter: int = 0
    keep_start: bool = False
    ema: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    keep_rates: bool = False
    keep_epochs: int = 0
    clip: str = ""
    clip_weights: str = ""
    prompts: tuple[str, ...] = ()
    l2sp: float = 0.0
    freeze_k: int = 0
    layers: tuple[str, ...] = ()
    norms_only: bool = False
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", self.name):
            raise ConfigError(f"stage name '{self.name}' is not lower-case letters, digits, '-' and '_'")
        if self.solver in ("sgd", "flyp"):
            self._require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
            self._require(_all_positive(self.learning_rates), "learning rates", self.learning_rates, "at least one, all above 0")
            self._require_one_choice()
        elif self.solver == "lbfgs":
            self._require(self.max_iter >= 1, "iterations", self.max_iter, "at least 1")
            self._require(_all_positive(self.penalties), "penalties", self.penalties, "at least one, all above 0")

    def _require(self, good: bool, what: str, found: object, allowed: str) -> None:
        if not good:
            raise ConfigError(f"stage '{self.name}': {what} {found!r} cannot be used; allowed: {allowed}")

    def _require_one_choice(self) -> None:
        chosen = {"freeze_k": self.freeze_k, "layers": self.layers, "norms_only": self.norms_only}
        given = [f"{name} {value!r}" for name, value in chosen.items() if value]
        if len(given) > 1:
            raise ConfigError(
                f"stage '{self.name}': {' and '.join(given)} both say which layers are trained", "leave train.freeze_k or train.layers out"
            )


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
    Entry(
        "flyp",
        "FLYP: a CLIP whose image tower is a timm net, by contrast with the texts of the classes (Goyal et al., CVPR 2023, "
        "'Finetune like you pretrain: Improved finetuning of zero-shot vision models')",
        "edgeft.methods.flyp:FLYP",
        extra="flyp",
    ),
    Entry(
        "l2sp",
        "full fine-tuning that is pulled back to the pretrained weights (Li et al., ICML 2018, "
        "'Explicit Inductive Bias for Transfer Learning with Convolutional Networks')",
        "edgeft.methods.variants:L2_SP",
    ),
    Entry(
        "freeze",
        "LP-FT that leaves the stem and the first stage as they are (Kumar et al., arXiv:2211.09359, "
        "'How to Fine-Tune Vision Models with SGD')",
        "edgeft.methods.variants:FREEZE_BOTTOM",
    ),
    Entry(
        "surgical",
        "LP-FT of the layers in train.layers alone (Lee et al., ICLR 2023, "
        "'Surgical Fine-Tuning Improves Adaptation to Distribution Shifts')",
        "edgeft.methods.variants:SURGICAL",
    ),
    Entry(
        "layer-decay",
        "LP-FT with a smaller learning rate for each layer nearer to the input (as Bao et al., arXiv:2106.08254, 'BEiT', fine-tune)",
        "edgeft.methods.variants:LAYER_DECAY",
    ),
    Entry(
        "norm-tune",
        "linear probe, then batch norm's scale and shift and the head alone (Frankle et al., ICLR 2021, "
        "'Training BatchNorm and Only BatchNorm')",
        "edgeft.methods.variants:NORM_TUNE",
    ),
    Entry(
        "ema",
        "LP-FT that keeps a moving average of its weights (Polyak and Juditsky, 1992, "
        "'Acceleration of Stochastic Approximation by Averaging')",
        "edgeft.methods.variants:MOVING_AVERAGE",
    ),
    Entry(
        "wise",
        "WiSE-FT of LP and LP-FT: weights between the two, chosen on validation (Wortsman et al., arXiv:2109.01903, "
        "'Robust fine-tuning of zero-shot models')",
        "edgeft.methods.variants:WISE",
    ),
    Entry(
        "bang",
        "wise after LP-FT with label smoothing and mixup (Lin et al., ICLR 2024, "
        "'Spurious Feature Diversification Improves Out-of-distribution Generalization')",
        "edgeft.methods.variants:BANG",
    ),
    Entry(
        "soup",
        "greedy soup: the average of LP-FT at several learning rates, as long as validation gains (Wortsman et al., ICML 2022, "
        "'Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time')",
        "edgeft.methods.variants:SOUP",
    ),
)
