"""Image packs and weight files of pretrained ImageNet nets, as NumPy archives."""

import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.models import efficientnet
from torch import nn

from edgeft.errors import ConfigError, DataError

TENSORFLOW: dict[str, Any] = {"pad_type": "same", "bn_eps": 1e-3}
"""What nets that were trained with Keras need in timm; their images are byte / 127.5 - 1."""

NETS: dict[str, Callable[[], nn.Module]] = {
    "mobilenetv2_100": lambda: timm.create_model("mobilenetv2_100", **TENSORFLOW),
    "mobilenetv1_100": lambda: timm.create_model("mobilenetv1_100", **TENSORFLOW),
    "mobilenetv1_025": lambda: efficientnet._gen_mobilenet_v1("mobilenetv1_100", channel_multiplier=0.25, **TENSORFLOW),
}


@dataclass(frozen=True)
class Pack:
    """Images uint8 [n, 3, size, size] with their class numbers [n]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def take(self, index: NDArray[np.int64]) -> "Pack":
        """The images with these numbers."""
        return Pack(self.images[index], self.labels[index])


def read_pack(file: Path) -> Pack:
    """An archive with `jpeg` (all files end to end), `offsets` [n + 1] and `labels` [n], renumbered by `imagenet_index` if there.

    Raises DataError when the file is not one, or its images are not square and of one size.
    """
    try:
        with np.load(file) as archive:
            tree = {name: archive[name] for name in archive.files}
        data, offsets, labels = tree["jpeg"].tobytes(), tree["offsets"], tree["labels"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"'{file}' is not an image pack: {error}") from error
    images = [_decode(data[start:stop]) for start, stop in itertools.pairwise(offsets)]
    sizes = {image.shape for image in images}
    if len(sizes) != 1 or len({*next(iter(sizes))[1:]}) != 1:
        raise DataError(f"images of '{file}' must be square and of one size; found {sorted(sizes)[:3]}")
    if "imagenet_index" in tree:
        labels = tree["imagenet_index"][labels]
    return Pack(np.stack(images), labels.astype(np.int64))


def _decode(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def read_net(name: str, file: Path) -> nn.Module:
    """A net of `NETS` in eval mode with the weights of an archive in timm's names; NAME|q holds the scale and zero point of bytes.

    Raises ConfigError for an unknown net, DataError when the weights do not fit.
    """
    if name not in NETS:
        raise ConfigError(f"no net is called '{name}'", f"known: {', '.join(NETS)}")
    net = NETS[name]()
    try:
        with np.load(file) as archive:
            state = {key: _tensor(archive, key) for key in archive.files if not key.endswith("|q")}
        found = net.load_state_dict(state, strict=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"'{file}' has no weights for '{name}': {str(error).splitlines()[0]}") from error
    wrong = [*found.unexpected_keys, *(key for key in found.missing_keys if not key.endswith("num_batches_tracked"))]
    if wrong:
        raise DataError(f"'{file}' does not fit '{name}': {', '.join(wrong[:5])}")
    return net.eval()


def _tensor(archive: Any, key: str) -> torch.Tensor:
    value = archive[key].astype(np.float32)
    if f"{key}|q" in archive.files:
        scale, zero = archive[f"{key}|q"]
        value = (value - zero) * scale
    return torch.from_numpy(value)
