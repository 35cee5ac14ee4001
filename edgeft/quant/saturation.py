"""How much of each activation saturates in its format or vanishes in it, in distribution and out of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgeft.data import Dataset, Split
from edgeft.data.loading import subset
from edgeft.data.preprocess import Preprocessing
from edgeft.quant.net import FixedPointNet
from edgeft.quant.plan import IMAGE
from edgeft.runner import Images

SCHEMA = 1
BATCH = 32


@dataclass
class Counts:
    """Values of one tensor before rounding: all, those past the top or the bottom code, and of the nonzero ones those that become 0.

    A rectified value has no bottom, and its negative values count as 0.
    """

    n: int = 0
    top: int = 0
    bottom: int = 0
    nonzero: int = 0
    vanished: int = 0

    def add(self, x: Tensor, frac: int, low: int, high: int, *, relu: bool) -> None:
        """Count a batch of real values that become codes low ... high of 2^-frac."""
        x = x.clamp(min=0.0) if relu else x
        codes = (x * 2.0**frac).round()
        nonzero = x != 0.0
        found = torch.stack([(codes > high).sum(), (codes < low).sum(), nonzero.sum(), (nonzero & (codes == 0.0)).sum()]).tolist()
        self.n += x.numel()
        self.top += found[0]
        self.bottom += found[1]
        self.nonzero += found[2]
        self.vanished += found[3]

    def to_json(self) -> dict[str, float]:
        """Shares: saturated ones of all values, vanished ones of the nonzero values."""
        return {
            "top": self.top / max(self.n, 1), "bottom": self.bottom / max(self.n, 1), "underflow": self.vanished / max(self.nonzero, 1),
        }  # fmt: skip


@torch.inference_mode()
def count(net: FixedPointNet, images: Images) -> dict[str, Counts]:
    """Counts of every activation that is rounded, for image bytes [n, 3, h, w], in the eval-mode training graph."""
    net.eval()
    device = next(net.buffers()).device
    points = {point.name: (Counts(), net.format(point.name), point.relu) for point in net.points}
    last_use = net.plan.last_use()
    for start in range(0, len(images), BATCH):
        env = {IMAGE: net.plan.encode(torch.from_numpy(images[start : start + BATCH]).to(device))}
        for index, step in enumerate(net.plan.steps):
            before = net.run_step(step, [env[name] for name in step.inputs])
            if step.name in points:
                counts, fmt, relu = points[step.name]
                counts.add(before, fmt.frac, 0 if relu else fmt.min_code, fmt.max_code, relu=relu)
            env[step.name] = net.activate(step, before)
            for name in set(step.inputs):
                if last_use[name] == index:
                    del env[name]
    return {name: counts for name, (counts, _, _) in points.items()}


def saturation(
    net: FixedPointNet, dataset: Dataset, p: Preprocessing, n_images: int, seed: int, advance: Callable[..., None]
) -> dict[str, Any]:
    """The content of saturation.json: for each activation its format, whether saturation is its clip (ReLU6), and shares by test split.

    At most `n_images` images of each split are looked at, drawn by `seed`; `advance` is told of each split's.
    """
    images: dict[str, int] = {}
    found: dict[str, dict[str, Counts]] = {}
    for split in dataset.tests:
        chosen = subset([split], p, n_images, seed)
        images[_label(split)] = len(chosen)
        found[_label(split)] = count(net, chosen)
        advance(len(chosen), split.name)
    tensors = {
        point.name: {
            "format": str(net.format(point.name)),
            "clip": net.plan[point.name].clip is not None and net.frac(point.name) == point.min_frac,
            "splits": {label: counts[point.name].to_json() for label, counts in found.items()},
        }
        for point in net.points
    }
    return {"schema": SCHEMA, "images": images, "tensors": tensors}


def _label(split: Split) -> str:
    """As reports call a split: "id", or "ood:" and its name."""
    return f"ood:{split.name}" if split.kind == "ood" else "id"
