"""Room in activation formats for images unlike the training images: strong corruptions of those, or unlabelled target images."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from edgeft.data import Dataset
from edgeft.data.loading import subset
from edgeft.data.preprocess import Preprocessing
from edgeft.errors import DataError
from edgeft.feed import stream_seed

CORRUPTIONS = ("brighter", "darker", "contrast", "flat", "noise", "blur", "invert", "posterize", "solarize", "saturate", "gray", "rotate")
"""One of them for each image, in turn; every strength is drawn."""


def shifted_images(
    kind: Literal["none", "augmented", "target"], dataset: Dataset, p: Preprocessing, n: int, seed: int
) -> NDArray[np.uint8] | None:
    """At most `n` prepared images [n', 3, size, size] that formats must have room for besides the calibration images; None for "none".

    "augmented": training images, corrupted; "target": of the dataset's unlabelled ones. Raises DataError where there are none.
    """
    if kind == "none":
        return None
    if kind == "augmented":
        return corrupted(subset([dataset.train], p, n, seed + 1), seed)
    if dataset.unlabelled is None:
        raise DataError("headroom target needs unlabelled images, and the dataset has none", "--set quant.unlabelled=DIR")
    return subset([dataset.unlabelled], p, n, seed)


def corrupted(images: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Image bytes [n, 3, h, w], each changed beyond what training augmentation does; the same for the same seed."""
    result = np.empty_like(images)
    for index, image in enumerate(images):
        rng = np.random.default_rng((stream_seed(seed, "headroom"), index))
        result[index] = corrupt(CORRUPTIONS[index % len(CORRUPTIONS)], torch.from_numpy(image), rng).numpy()
    return result


def corrupt(kind: str, image: Tensor, rng: np.random.Generator) -> Tensor:
    """One corruption of bytes [3, h, w], at a strength that `rng` draws."""
    match kind:
        case "brighter":
            changed = F.adjust_brightness(image, rng.uniform(1.6, 3.0))
        case "darker":
            changed = F.adjust_brightness(image, rng.uniform(0.1, 0.5))
        case "contrast":
            changed = F.adjust_contrast(image, rng.uniform(2.0, 4.0))
        case "flat":
            changed = F.adjust_contrast(image, rng.uniform(0.1, 0.4))
        case "noise":
            noise = torch.from_numpy(rng.normal(0.0, rng.uniform(20.0, 60.0), image.shape))
            changed = (image + noise).round().clamp(0, 255).to(torch.uint8)
        case "blur":
            sigma = rng.uniform(1.0, 3.0)
            kernel = min(2 * round(2 * sigma) + 1, 2 * (min(image.shape[1:]) // 2) - 1)
            changed = F.gaussian_blur(image, [max(kernel, 1)] * 2, [sigma, sigma])
        case "invert":
            changed = F.invert(image)
        case "posterize":
            changed = F.posterize(image, int(rng.integers(1, 4)))
        case "solarize":
            changed = F.solarize(image, float(rng.uniform(64, 192)))
        case "saturate":
            changed = F.adjust_saturation(image, rng.uniform(2.0, 4.0))
        case "gray":
            changed = F.adjust_contrast(F.rgb_to_grayscale(image, 3), rng.uniform(1.0, 3.0))
        case "rotate":
            changed = F.rotate(image, float(rng.uniform(20, 340)))
        case _:
            raise ValueError(f"unknown corruption '{kind}'")
    result: Tensor = changed
    return result
