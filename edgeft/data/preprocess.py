"""From a decoded image to the bytes a network sees: resize, centre crop, random crop and mirror.

Everything is bytes in and bytes out (mean and deviation belong to the network's stem), antialiased, and done by
torchvision's v2 functions on uint8 tensors. Random choices come from a NumPy generator seeded per image, never from a
global one, so that an epoch is the same with any number of workers.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from edgeft.errors import ArtifactError, ConfigError

Augmentation = Literal["none", "flip", "crop-flip"]

REDUCING_GAP = 2
"""Images are first averaged down by a whole factor that leaves this many times the resized side (Pillow's `reducing_gap`)."""
MAX_ASPECT = 8
"""Of a longer image only the central part of this aspect ratio is looked at, so that a 1 x 20,000 strip stays small."""
CROP_AREA = (0.5, 1.0)
"""Share of the image's area that a random crop keeps. Milder than the (0.08, 1) of training from scratch."""
CROP_RATIO = (3 / 4, 4 / 3)
"""Aspect ratios of random crops; the customary values of torchvision's RandomResizedCrop."""
_CROP_TRIES = 10


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes network input; stored in the artifact.

    `size` is the side of the square input in pixels, `crop_pct` the share of the resized short side that the centre crop
    keeps, `mean` and `std` apply to pixels in 0 ... 1.
    """

    size: int
    crop_pct: float
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 < self.crop_pct <= 1 or min(self.std) <= 0:
            raise ConfigError(f"impossible preprocessing: {self}", "size >= 1, 0 < crop_pct <= 1 and std > 0 are needed")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ConfigError(f"unknown interpolation '{self.interpolation}'", "known: bilinear, bicubic")

    @property
    def resize_side(self) -> int:
        """Short side in pixels before the centre crop, rounded down as timm does."""
        return math.floor(self.size / self.crop_pct)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the manifest."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        """Inverse of `to_json`. Raises ArtifactError when keys are missing or unknown."""
        names = {field.name for field in fields(cls)}
        if set(tree) != names:
            raise ArtifactError(f"preprocessing record has the keys {sorted(tree)}; needed are {sorted(names)}")
        (r, g, b), (dr, dg, db) = tree["mean"], tree["std"]
        return cls(tree["size"], tree["crop_pct"], tree["interpolation"], (r, g, b), (dr, dg, db))


def shrink(image: NDArray[np.uint8], p: Preprocessing) -> NDArray[np.uint8]:
    """Average an image down by a whole factor where it is far larger than needed, and cut extreme aspect ratios.

    Shape [h, w, 3] in and out. Shrinking again changes nothing, so shrunk images can be cached: `prepare` and `augment`
    give the same bytes for them.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    longest = MAX_ASPECT * short
    if max(height, width) > longest:
        top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
        image = image[top : top + longest, left : left + longest].copy()  # a view would keep the whole image alive
    factor = short // (REDUCING_GAP * p.resize_side)
    if factor > 1:
        from PIL import Image

        image = np.array(Image.fromarray(np.ascontiguousarray(image)).reduce(factor))
    return image


def prepare(image: NDArray[np.uint8], p: Preprocessing) -> NDArray[np.uint8]:
    """Resize the short side to `p.resize_side`, cut out the centre: [h, w, 3] to [3, size, size]."""
    if image.shape[:2] == (p.size, p.size) and p.resize_side == p.size:
        return _planes(image)
    resized = _resized(shrink(image, p), [p.resize_side], p)
    top, left = (round((side - p.size) / 2) for side in resized.shape[:2])  # as torchvision's center_crop
    return _planes(resized[top : top + p.size, left : left + p.size])


def augment(image: NDArray[np.uint8], p: Preprocessing, kind: Augmentation, seed: tuple[int, ...]) -> NDArray[np.uint8]:
    """A training view of an image, [h, w, 3] to [3, size, size], the same for the same `seed` (seed, epoch, index).

    "none" is `prepare`; "flip" mirrors it half of the time; "crop-flip" resizes a random crop instead of the centre
    (the algorithm of torchvision's RandomResizedCrop) and mirrors half of the time.
    """
    if kind != "crop-flip":
        return mirror(prepare(image, p), kind, seed)
    image = shrink(image, p)
    rng = np.random.default_rng(seed)
    flip = rng.random() < 0.5
    top, left, height, width = _random_box(image.shape[0], image.shape[1], rng)
    crop = _resized(image[top : top + height, left : left + width], [p.size, p.size], p)
    return _planes(crop[:, ::-1] if flip else crop)


def mirror(prepared: NDArray[np.uint8], kind: Literal["none", "flip"], seed: tuple[int, ...]) -> NDArray[np.uint8]:
    """The part of `augment` that comes after `prepare`, for prepared images kept in memory. [3, size, size], a copy or the input."""
    if kind == "flip" and np.random.default_rng(seed).random() < 0.5:
        return np.ascontiguousarray(prepared[:, :, ::-1])
    return prepared


def _random_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height, width of a random crop; where no shape fits, the centre at the nearest allowed ratio."""
    low, high = CROP_RATIO
    for _ in range(_CROP_TRIES):
        area = height * width * rng.uniform(*CROP_AREA)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h = min(height, max(1, round(width / low)))
    w = min(width, max(1, round(height * high)))
    return (height - h) // 2, (width - w) // 2, h, w


def _resized(image: NDArray[np.uint8], size: list[int], p: Preprocessing) -> NDArray[np.uint8]:
    """[h, w, 3] to the given [h, w], or to the given short side.

    NumPy does all copying and cropping: torch wakes its thread pool for copies of this size, which on a busy machine takes
    far longer than the copy. The view is channels-last, the layout of torch's fast byte resize.
    """
    import torch
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    resized = F.resize(tensor, size, interpolation=InterpolationMode(p.interpolation), antialias=True)
    array: NDArray[np.uint8] = resized[0].permute(1, 2, 0).numpy()
    return array


def _planes(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(image.transpose(2, 0, 1))
