"""ResNet-20 for 32-pixel images (He et al. 2016, arXiv:1512.03385, section 4.2) as a timm backbone, with parameter-free shortcuts."""

from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS, N_BLOCKS = (16, 32, 64), 3


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut; where the shape changes it takes every second pixel and pads channels with zeros."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.margin = (n_out - n_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Rectified sum of the shortcut and the convolutions."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.margin:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.margin, self.margin))
        return F.relu(x + y)


class ResNet20(nn.Module):
    """[n, 3, 32, 32] to logits, with the methods that timm's backbones have."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, WIDTHS[-1]
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        n_in = WIDTHS[0]
        for number, width in enumerate(WIDTHS, 1):
            blocks = []
            for index in range(N_BLOCKS):
                blocks.append(Block(n_in, width, 2 if index == 0 and number > 1 else 1))
                n_in = width
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(WIDTHS[-1], num_classes)
        self.pretrained_cfg = {
            "input_size": (3, 32, 32), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 1.0,
            "interpolation": "bilinear", "num_classes": 10, "classifier": "linear", "first_conv": "conv1",
        }  # fmt: skip

    def get_classifier(self) -> nn.Linear:
        """The last layer."""
        return self.linear

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps [n, 64, 8, 8]."""
        x = F.relu(self.bn1(self.conv1(x)))
        for number in range(1, len(WIDTHS) + 1):
            x = getattr(self, f"layer{number}")(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled features, or logits."""
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        out: Tensor = pooled if pre_logits else self.linear(pooled)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.forward_head(self.forward_features(x))


@register_model
def resnet20_cifar10(pretrained: bool = False, num_classes: int = 10, **_: object) -> ResNet20:
    """ResNet-20; weights come from a file."""
    return ResNet20(num_classes)
