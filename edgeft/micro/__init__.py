"""`edgeft_micro`: a MobileNetV2-shaped backbone of 0.1 million parameters for 48-pixel images, with its own weights.

Importing this module registers it with timm. It has only convolutions, batch normalisation, ReLU6, additions, one
average pool and one linear layer, so everything that training and fixed-point export need is exercised and nothing else.
"""

from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

STEM_WIDTH = 16
FEATURES = 192
STAGES = ((1, 16, 1, 1), (4, 24, 2, 2), (4, 40, 2, 2), (4, 64, 2, 1))
"""Inverted residuals in the notation of MobileNetV2's table 2: expansion, output channels, repeats, first stride."""

default_cfgs = generate_default_cfgs(
    {
        "edgeft_micro": {
            "input_size": (3, 48, 48),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "pool_size": (6, 6),
            "num_classes": 100,
            "first_conv": "conv_stem",
            "classifier": "classifier",
        }
    }
)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; added to the input where the shape stays the same."""

    def __init__(self, n_in: int, n_out: int, expansion: int, stride: int) -> None:
        super().__init__()
        width = n_in * expansion
        expand = [] if expansion == 1 else [nn.Conv2d(n_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6()]
        self.layers = nn.Sequential(
            *expand,
            nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(),
            nn.Conv2d(width, n_out, 1, bias=False),
            nn.BatchNorm2d(n_out),
        )
        self.shortcut = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        """[n, n_in, height, width] to [n, n_out, height / stride, width / stride]."""
        y: Tensor = self.layers(x)
        return x + y if self.shortcut else y


class EdgeftMicro(nn.Module):
    """The backbone with timm's head interface; 48-pixel images leave `forward_features` as [n, 192, 6, 6]."""

    pretrained_cfg: dict[str, Any]  # set by timm

    def __init__(self, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__()
        self.num_features = self.head_hidden_size = FEATURES
        self.conv_stem = nn.Conv2d(in_chans, STEM_WIDTH, 3, 2, 1, bias=False)
        self.bn_stem = nn.BatchNorm2d(STEM_WIDTH)
        self.act_stem = nn.ReLU6()
        blocks: list[nn.Module] = []
        width = STEM_WIDTH
        for expansion, channels, repeats, stride in STAGES:
            for repeat in range(repeats):
                blocks.append(InvertedResidual(width, channels, expansion, stride if repeat == 0 else 1))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.conv_head = nn.Conv2d(width, FEATURES, 1, bias=False)
        self.bn_head = nn.BatchNorm2d(FEATURES)
        self.act_head = nn.ReLU6()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier: nn.Module
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Names of parameters by layer, as timm groups its own nets': stem, stages (`coarse`) or blocks, last convolution, head."""
        owners = [stage for stage, (_, _, repeats, _) in enumerate(STAGES) for _ in range(repeats)] if coarse else range(len(self.blocks))
        blocks = [(rf"^blocks\.{block}\.", (owner,)) for block, owner in enumerate(owners)]
        return {"stem": r"^conv_stem|^bn_stem", "blocks": [*blocks, (r"^conv_head|^bn_head", (len(blocks),))]}

    def get_classifier(self) -> nn.Module:
        """The last layer: linear, or identity without classes."""
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer by a fresh one; 0 classes leave the pooled features."""
        self.num_classes = num_classes
        self.classifier = nn.Linear(FEATURES, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps [n, 192, height / 8, width / 8] of normalised images [n, 3, height, width]."""
        x = self.act_stem(self.bn_stem(self.conv_stem(x)))
        x = self.act_head(self.bn_head(self.conv_head(self.blocks(x))))
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [n, num_classes] of feature maps, or the pooled features [n, 192] before the last layer."""
        x = self.flatten(self.pool(x))
        if pre_logits:
            return x
        logits: Tensor = self.classifier(x)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, num_classes] of normalised images [n, 3, height, width]."""
        return self.forward_head(self.forward_features(x))


@register_model  # type: ignore[untyped-decorator, unused-ignore]
def edgeft_micro(pretrained: bool = False, **kwargs: Any) -> EdgeftMicro:
    """Constructor for timm. `pretrained` loads the bundled weights and leaves the head at random."""
    # timm's own loader wants a head and an address; the bundled file has neither.
    model: EdgeftMicro = build_model_with_cfg(EdgeftMicro, "edgeft_micro", False, **kwargs)
    if pretrained:
        load_pretrained_weights(model)
    return model


def weights_path() -> Traversable:
    """The bundled weights: all layers but the head, convolutions in half precision."""
    return files("edgeft.micro") / "edgeft_micro.safetensors"


def load_pretrained_weights(model: nn.Module) -> None:
    """Load the bundled weights into an `edgeft_micro`; its head keeps its values."""
    with as_file(weights_path()) as path:
        stored = load_file(path)
    head = {name: value for name, value in model.state_dict().items() if name.startswith("classifier.")}
    model.load_state_dict({name: value.to(torch.float32) for name, value in stored.items()} | head)
