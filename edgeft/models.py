"""timm backbones as classifiers of bytes: weights, a fresh head, and preprocessing from the model's own record."""

import zlib
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

import edgeft.micro
from edgeft.config import DataConfig, ModelConfig
from edgeft.data.preprocess import Preprocessing
from edgeft.errors import ConfigError, UnsupportedError
from edgeft.registry import nearest
from edgeft.weights import load_weights

RESERVED_ARGS = ("pretrained", "num_classes", "in_chans", "features_only", "checkpoint_path", "pretrained_cfg", "scriptable", "exportable")
"""Constructor arguments of timm that edgeft sets itself or that change what the model returns."""


class PooledLinear(nn.Linear):
    """What a 1x1 convolution computes on a pooled map [n, c, 1, 1], as the linear layer that it is; its logits are [n, classes]."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a pooled map or of a vector."""
        return super().forward(x.flatten(1))


class Classifier(nn.Module):
    """A timm net that takes image bytes: uint8 [n, 3, height, width] to float32 logits [n, classes].

    It normalises on the device, ((bytes / 255) - mean) / std, and runs in channels-last layout. Raises UnsupportedError when the net's
    last layer is not linear, or is not all there is between `features` and the logits.
    """

    def __init__(self, net: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)
        self.preprocessing = preprocessing
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(preprocessing.mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        _check_head(self)

    @property
    def head(self) -> nn.Linear:
        """The last layer."""
        return _head_of(self.net, type(self.net).__name__)

    def normalise(self, images: Tensor) -> Tensor:
        """Image bytes to the float32 input of the net."""
        pixels = images.to(dtype=torch.float32, memory_format=torch.channels_last)
        return (pixels / 255.0 - self.mean) / self.std

    def features(self, images: Tensor) -> Tensor:
        """The head's input, shape [n, features]: pooled and flattened, before the last layer."""
        pooled: Tensor = self.net.forward_head(self.net.forward_features(self.normalise(images)), pre_logits=True)  # type: ignore[operator]
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        """Logits of image bytes."""
        logits: Tensor = self.net(self.normalise(images))
        return logits


def build_classifier(model: ModelConfig, data: DataConfig, n_classes: int, native_size: int | None, seed: int) -> Classifier:
    """The configured backbone with weights and a head for `n_classes`, in eval mode on the CPU.

    The head is PyTorch's default initialisation drawn from `seed`, unless the weights bring one for as many classes. `native_size` is
    the size of rendered images, in pixels; without it the model's own record gives the input size. Raises ConfigError for unknown
    backbones, wrong arguments and weights that do not fit, UnsupportedError for a classifier that is not one linear layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"backbone {seed}".encode()))
        net = _create(model, n_classes)
        loaded = _load(net, model, net.get_classifier(), n_classes)  # type: ignore[operator]
        _make_head_linear(net)
        head = _head_of(net, model.backbone)
        if not loaded:
            torch.manual_seed(zlib.crc32(f"head {seed}".encode()))
            head.reset_parameters()
    classifier = Classifier(net.eval(), preprocessing_of(net, model.backbone, data, native_size))
    return classifier.eval()


def _create(model: ModelConfig, n_classes: int) -> nn.Module:
    """The net with a head for `n_classes`; its weights are timm's, or random."""
    name, args = model.backbone, model.args
    if not timm.is_model(name):
        close = nearest(name, timm.list_models())
        raise ConfigError(f"unknown backbone '{name}'", f"did you mean: {', '.join(close)}" if close else "edgeft list backbones")
    reserved = sorted(set(args) & set(RESERVED_ARGS))
    if reserved:
        raise ConfigError(f"model.args.{reserved[0]} cannot be set: edgeft sets it itself")
    try:
        net = timm.create_model(name, pretrained=False, num_classes=n_classes, **args)
    except Exception as error:  # A constructor may raise anything for a wrong value; all of it is the user's argument.
        given = ", ".join(f"{key}={value!r}" for key, value in args.items()) or "no arguments"
        raise ConfigError(
            f"backbone '{name}' cannot be built with {given}: {_one_line(error)}", "check --set model.args.KEY=VALUE"
        ) from error
    return _download(model, n_classes) if model.pretrained and not _bundled(model) else net


def _download(model: ModelConfig, n_classes: int) -> nn.Module:
    try:
        return timm.create_model(model.backbone, pretrained=True, num_classes=n_classes, **model.args)
    except Exception as error:  # The hub, the network and the disk fail in many ways; each means that there are no weights.
        raise ConfigError(
            f"no pretrained weights for backbone '{model.backbone}': {_one_line(error)}",
            "without a network, give a local file instead: --weights FILE",
        ) from error


def _bundled(model: ModelConfig) -> bool:
    return model.backbone == "edgeft_micro" and model.weights is None


def _load(net: nn.Module, model: ModelConfig, head: Any, n_classes: int) -> bool:
    """Load the weights that do not come from timm's hub; True when the net now has a trained head for these classes."""
    if _bundled(model):
        edgeft.micro.load_pretrained_weights(net)
        return False
    if model.weights is not None:
        name = next(name for name, module in net.named_modules() if module is head)
        return load_weights(net, name, model.weights)
    return model.pretrained and _record(net).get("num_classes") == n_classes


def _make_head_linear(net: nn.Module) -> None:
    """Replace a classifier that is linear in other words by a linear layer: a 1x1 convolution, or one that timm fuses into a Linear."""
    layer = net.get_classifier()  # type: ignore[operator]
    name = next((name for name, module in net.named_modules() if module is layer), "")
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
        head: Any = PooledLinear(layer.in_channels, layer.out_channels)
        with torch.no_grad():
            head.weight.copy_(layer.weight.flatten(1))
            head.bias.zero_() if layer.bias is None else head.bias.copy_(layer.bias)
    elif isinstance(layer, nn.Module) and name and callable(getattr(layer, "fuse", None)):
        head = layer.eval().fuse()  # type: ignore[operator]
    else:
        return
    if isinstance(head, nn.Linear):
        parent, _, attribute = name.rpartition(".")
        setattr(net.get_submodule(parent), attribute, head)


def _head_of(net: nn.Module, name: str) -> nn.Linear:
    layer = net.get_classifier()  # type: ignore[operator]
    if not isinstance(layer, nn.Linear):
        raise UnsupportedError(f"the classifier of backbone '{name}' is {type(layer).__name__}; only a single Linear layer is supported")
    return layer


def _record(net: nn.Module) -> dict[str, Any]:
    return dict(net.pretrained_cfg)  # type: ignore[arg-type]


def preprocessing_of(net: nn.Module, backbone: str, data: DataConfig, native_size: int | None) -> Preprocessing:
    """Preprocessing by the model's own record, with the overrides of `data`. Raises ConfigError when the record cannot be followed."""
    record = resolve_model_data_config(net)
    size = data.size or native_size
    if size is None:
        _, height, width = record["input_size"]
        if height != width:
            raise ConfigError(f"backbone '{backbone}' wants {height}x{width} images; only square ones are supported", "--set data.size=224")
        size = height
    interpolation = data.interpolation or record["interpolation"]
    if interpolation not in ("bilinear", "bicubic"):
        raise ConfigError(f"backbone '{backbone}' wants '{interpolation}' interpolation", "--set data.interpolation=bicubic")
    return Preprocessing(
        size=size,
        crop_pct=data.crop_pct or (1.0 if native_size is not None else float(record["crop_pct"])),
        interpolation=interpolation,
        mean=data.mean or tuple(record["mean"]),
        std=data.std or tuple(record["std"]),
    )


@torch.no_grad()
def _check_head(classifier: Classifier) -> None:
    """Show on two random images that the head is linear in `features`, so that a probe of the features is a probe of the net."""
    head, training = classifier.head, classifier.training
    classifier.eval()
    size = classifier.preprocessing.size
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    name = type(classifier.net).__name__
    try:
        logits, features = classifier(images), classifier.features(images)
    except (RuntimeError, ValueError, AttributeError, TypeError, AssertionError) as error:
        raise UnsupportedError(
            f"backbone '{name}' does not run on {size}x{size} images: {_one_line(error)}", "--set data.size=N"
        ) from error
    if features.ndim != 2 or not torch.allclose(head(features), logits, rtol=1e-4, atol=1e-4):
        raise UnsupportedError(f"backbone '{name}': its last layer applied to its pooled features does not give its logits")
    classifier.train(training)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
