"""FLYP: the image tower of a CLIP is fine-tuned as it was pretrained, by contrast with the texts of its images.

Goyal, Kumar, Garg, Kolter, Raghunathan: "Finetune like you pretrain: Improved finetuning of zero-shot vision models", CVPR 2023. Image and
text tower and their scale are trained. The text of an image is its class in a prompt (the mean over prompts where there are several), so
that images of one class in a batch have the same text: each of them is a right answer, where the paper's code leaves them as negatives.

Afterwards the texts of the classes become the head: W = a T P, with the text embeddings T, the tower's projection P and the scale a
over the mean norm of an image embedding. CLIP divides every image embedding by its norm, which is a positive number and changes no
answer; without that division the net is convolutions and one linear layer, and becomes fixed-point numbers like any other. Confidences
do change a little from image to image; a temperature is fitted where they are looked at.

The optimizer is SGD as in all methods here; the paper's is AdamW.
"""

from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize

from edgeft.config import Config, TrainConfig
from edgeft.context import TrainContext
from edgeft.data import Dataset
from edgeft.data.loading import subset
from edgeft.errors import ConfigError, UnsupportedError
from edgeft.methods import Stage
from edgeft.methods.baselines import NEUTRAL, epochs_of
from edgeft.models import Classifier
from edgeft.train import FitResult, fit

RATES = (3e-4, 1e-3, 3e-3)
"""As LP-FT's: a pretrained net and a head that fits it."""
NORM_IMAGES = 256
"""Training images over which the norm of an embedding is averaged."""
_CLOSE = 1e-3


class Prompted(nn.Module):
    """Image bytes to scores of the classes: scale * cosine of the image's embedding and that of the class's texts."""

    def __init__(self, classifier: Classifier, clip: Any, projection: nn.Module, tokens: Tensor) -> None:
        super().__init__()
        self.classifier, self.projection, self.clip = classifier, projection, clip
        self.register_buffer("tokens", tokens)
        self.tokens: Tensor

    def texts(self) -> Tensor:
        """Embeddings [classes, d] of length 1: means over the prompts."""
        n_classes, n_prompts, length = self.tokens.shape
        each = self.clip.encode_text(self.tokens.reshape(-1, length), normalize=True)
        return normalize(each.reshape(n_classes, n_prompts, -1).mean(dim=1), dim=1)

    def embedded(self, images: Tensor) -> Tensor:
        """Embeddings of image bytes [n, d], as they come."""
        found: Tensor = self.projection(self.classifier.features(images))
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Scores [n, classes]."""
        scores: Tensor = self.clip.logit_scale.exp() * normalize(self.embedded(images), dim=1) @ self.texts().T
        return scores


class Contrast:
    """CLIP's loss: the cross-entropy of every image over the texts of the batch, and of every text over its images, in equal parts."""

    name = "contrast"

    def loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Summed over the batch; logits [n, classes] are those of the classes' texts."""
        pairs = logits[:, labels]  # image i with the text of image j
        right = (labels[:, None] == labels).to(pairs)
        right = right / right.sum(dim=1, keepdim=True)
        return -(right * (log_softmax(pairs, 1) + log_softmax(pairs, 0))).sum() / 2

    def compare(self, images: Tensor, logits: Tensor) -> None:
        """There is no teacher."""


@dataclass(frozen=True)
class FineTuneLikePretraining:
    """One stage that contrasts images with the texts of their classes."""

    def stages(self, config: Config) -> list[Stage]:
        """The stage. Raises ConfigError without a CLIP, and for settings that it does not know."""
        train = config.train
        if train.clip is None or train.clip_weights is None:
            raise ConfigError(
                "method 'flyp' needs a CLIP whose image tower is the backbone",
                "--set train.clip=NAME --set train.clip_weights=FILE, a model of open_clip and its weights",
            )
        fields, about = TrainConfig.model_fields, (*NEUTRAL, "layers", "sampler", "keep_checkpoints")
        given = [f"train.{key}" for key in about if getattr(train, key) != fields[key].default]
        if given:
            raise ConfigError(f"method 'flyp' does not know {', '.join(given)}", "leave them out, or use lpft")
        unfilled = [prompt for prompt in train.prompts if prompt.count("{}") != 1]
        if unfilled:
            raise ConfigError(
                f"the prompt '{unfilled[0]}' has no place for the class", "example: --set 'train.prompts=[\"a photo of a {}.\"]'"
            )
        return [
            Stage(
                "flyp", "flyp", epochs=epochs_of(config), learning_rates=train.lr if train.lr is not None else RATES, batch_norm="frozen",
                momentum=train.momentum, weight_decay=train.weight_decay, clip=train.clip, clip_weights=train.clip_weights,
                prompts=train.prompts,
            )
        ]  # fmt: skip

    def tune(self, classifier: Classifier, stage: Stage, dataset: Dataset, context: TrainContext) -> FitResult:
        """Load the CLIP into the classifier, train both towers, and leave the image tower with the texts as its head.

        Raises ConfigError for a CLIP that cannot be had or is prepared for otherwise, UnsupportedError for one whose image tower is not the
        backbone with a linear projection; and what `fit` raises.
        """
        clip, tokenizer = _loaded(stage)
        _require_preparation(classifier, clip.visual.preprocess_cfg, stage.clip)
        projection = _taken(classifier, clip, stage.clip)
        names = [label.replace("_", " ") for label in dataset.classes]
        tokens = torch.stack([tokenizer([prompt.format(name) for prompt in stage.prompts]) for name in names])
        classifier.head.requires_grad_(False)  # it is made of the texts in the end
        model = Prompted(classifier, clip, projection, tokens)
        result = fit(model, stage, dataset.train, dataset.val, context, objective=Contrast())
        _fold(model, torch.from_numpy(subset([dataset.train], context.preprocessing, NORM_IMAGES, context.seed)))
        classifier.head.requires_grad_(True)
        return result


def _loaded(stage: Stage) -> tuple[Any, Any]:
    """The CLIP and its tokenizer."""
    try:
        with torch.random.fork_rng(devices=[]):
            clip = open_clip.create_model(stage.clip, pretrained=stage.clip_weights, require_pretrained=True)
        return clip, open_clip.get_tokenizer(stage.clip)
    except Exception as error:  # Unknown names, hubs, networks and files fail in many ways; each means that there is no CLIP.
        raise ConfigError(
            f"the CLIP '{stage.clip}' cannot be had: {' '.join(str(error).split())[:300]}",
            "train.clip is a model of open_clip, train.clip_weights a file or a tag of its weights",
        ) from error


def _taken(classifier: Classifier, clip: Any, name: str) -> nn.Module:
    """Move the image tower into the classifier; returns its projection."""
    tower = clip.visual
    if not isinstance(tower, open_clip.timm_model.TimmModel) or getattr(clip, "logit_bias", None) is not None:
        kind = type(tower).__name__ if getattr(clip, "logit_bias", None) is None else "trained with a sigmoid loss"
        raise UnsupportedError(
            f"the image tower of CLIP '{name}' is {kind}; only timm nets with average pooling and a linear projection become fixed-point",
            "CLIPs with a timm_model_name in open_clip's configuration, timm_pool avg, timm_proj linear or none",
        )
    layers = [layer for layer in tower.head if not isinstance(layer, nn.Dropout)]
    if len(layers) > 1 or not all(isinstance(layer, nn.Linear) for layer in layers):
        raise UnsupportedError(
            f"the image tower of CLIP '{name}' ends with {', '.join(type(layer).__name__ for layer in layers)}, not Linear"
        )
    head = next(path for path, module in classifier.net.named_modules() if module is classifier.head)
    trunk = tower.trunk.state_dict()
    own = {key: value.shape for key, value in classifier.net.state_dict().items() if not key.startswith(f"{head}.")}
    if own != {key: value.shape for key, value in trunk.items()}:
        raise UnsupportedError(
            f"the image tower of CLIP '{name}' is not the backbone '{type(classifier.net).__name__}'", "give --backbone its timm_model_name"
        )
    classifier.net.load_state_dict(trunk, strict=False)
    _require_same_features(classifier, tower.trunk, name)
    clip.visual = nn.Identity()
    return layers[0] if layers else nn.Identity()


@torch.no_grad()
def _require_same_features(classifier: Classifier, trunk: nn.Module, name: str) -> None:
    size = classifier.preprocessing.size
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found, wanted = classifier.eval().cpu().features(images), trunk.eval()(classifier.normalise(images))
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=_CLOSE, atol=_CLOSE):
        raise UnsupportedError(f"the image tower of CLIP '{name}' pools its features in another way than the backbone")


def _require_preparation(classifier: Classifier, wanted: dict[str, Any], name: str) -> None:
    """Raise ConfigError where the images would be normalised in another way than the CLIP was trained with."""
    p = classifier.preprocessing
    for key in ("mean", "std"):
        if max(abs(a - b) for a, b in zip(wanted[key], getattr(p, key), strict=True)) > _CLOSE:
            values, found = (", ".join(f"{value:g}" for value in three) for three in (wanted[key], getattr(p, key)))
            raise ConfigError(
                f"the CLIP '{name}' takes images of {key} {values}, and the run prepares them with {found}",
                f"--set 'data.{key}=[{values}]'",
            )


@torch.no_grad()
def _fold(model: Prompted, images: Tensor) -> None:
    """Make the texts the head of the classifier."""
    classifier, device = model.classifier, model.tokens.device
    norm = torch.cat([model.embedded(part.to(device)).norm(dim=1) for part in images.split(32)]).mean()
    texts = model.texts() * (model.clip.logit_scale.exp() / norm)
    projection = model.projection
    if isinstance(projection, nn.Linear):
        bias = texts @ projection.bias if projection.bias is not None else torch.zeros(len(texts), device=device)
        classifier.head.bias.copy_(bias)
        texts = texts @ projection.weight
    else:
        classifier.head.bias.zero_()
    classifier.head.weight.copy_(texts)
    classifier.eval()


FLYP = FineTuneLikePretraining()
