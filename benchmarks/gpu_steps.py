"""Training steps on a GPU: images/s and memory of float and quantized steps, on images that are on the device already."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.nets import N_CLASSES, Case, fixed_point, random_classifier, random_images
from edgeft.bench.timing import shuffled
from edgeft.config import QuantConfig
from edgeft.models import Classifier
from edgeft.progress import Progress
from edgeft.quant.control import FormatControl
from edgeft.quant.net import FixedPointNet

CASES = (Case("mobilenetv2_100", 128, 128), Case("resnet50", 224, 128))
FLOAT, BF16, FROZEN, MOVING = "float fp32", "float bf16", "QAT, formats frozen", "QAT, formats moving"
VARIANTS = (FLOAT, BF16, FROZEN, MOVING)
RATE, MOMENTUM = 1e-6, 0.9
"""So low that random labels cannot make the loss diverge; the rate has no influence on time."""
WARM_UP_STEPS = 5
ENDLESS = 10**9
"""Steps of the training that the timed steps are the beginning of."""


@contextmanager
def as_in_training() -> Iterator[None]:
    """cuDNN as `edgeft.train.fit` sets it; TF32 as PyTorch allows it by default: in convolutions only."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
        yield


@dataclass
class Steps:
    """Optimizer steps of one variant, as `edgeft.epoch` makes them with frozen batch norm, on one batch of random images."""

    model: nn.Module
    case: Case
    device: torch.device
    bf16: bool = False
    control: FormatControl | None = None

    def __post_init__(self) -> None:
        self.model.to(self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.SGD(trained, lr=RATE, momentum=MOMENTUM)
        pixels = torch.from_numpy(random_images(self.case.batch, self.case.size, seed=3)).to(self.device)
        self._images = pixels.permute(0, 3, 1, 2)
        self._labels = torch.arange(self.case.batch, device=self.device) % N_CLASSES
        self._n_done = 0

    def __call__(self, n: int) -> None:
        """Make `n` steps and wait for the device."""
        for _ in range(n):
            if self.control is not None:
                self.control.before_step(self._n_done, ENDLESS)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                logits = self.model(self._images)
            loss = cross_entropy(logits.float(), self._labels, reduction="sum")
            (loss / self.case.batch).backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._n_done += 1
        synchronize(self.device)


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_steps(
    variant: str, case: Case, classifier: Classifier, net: FixedPointNet, sigmas: dict[str, float], device: torch.device
) -> Steps:
    """The steps of a variant, on copies of the nets."""
    if variant in (FLOAT, BF16):
        return Steps(copy.deepcopy(classifier), case, device, bf16=variant == BF16)
    own = copy.deepcopy(net).to(device)
    # Training that never freezes formats, or always has: nothing else differs.
    control = FormatControl(own, QuantConfig(format="std", freeze_at=1.0 if variant == MOVING else 0.0), sigmas)
    return Steps(own, case, device, control=control)


def measure(case: Case, device: torch.device, *, n_rounds: int, n_steps: int, progress: Progress) -> dict[str, Any]:
    """Peak memory of each variant, then interleaved rounds of `n_steps` steps; a JSON-able record."""
    classifier = random_classifier(case)
    net, sigmas = fixed_point(classifier)
    steps: dict[str, Callable[[int], None]] = {}
    peaks: dict[str, int] = {}
    found: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with as_in_training():
        for variant in VARIANTS:
            with peak_of(variant, peaks, device):
                steps[variant] = make_steps(variant, case, classifier, net, sigmas, device)
                steps[variant](WARM_UP_STEPS)
        for order in shuffled(list(VARIANTS), n_rounds):
            for variant in order:
                steps[variant](1)  # another variant's kernels ran last
                start = time.perf_counter()
                steps[variant](n_steps)
                found[variant].append(n_steps * case.batch / (time.perf_counter() - start))
    for variant, rates in found.items():
        progress.line(f"{case.label}, {variant}: {np.median(rates):.0f} images/s, peak {peaks[variant] / 2**30:.2f} GiB")
    return {"case": asdict(case), "images_per_s": found, "peak_bytes": peaks, "rounds": n_rounds, "steps": n_steps}


@contextmanager
def peak_of(name: str, peaks: dict[str, int], device: torch.device) -> Iterator[None]:
    """Note under `name` by how many bytes the block raised the device's peak allocation above what was allocated before it."""
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    yield
    peaks[name] = torch.cuda.max_memory_allocated(device) - before if on_gpu else 0


def rows_of(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Table rows: median rate, median over the rounds of the ratio to the float step of the same round, and peak memory."""
    case, rates = Case(**record["case"]), {variant: np.array(found) for variant, found in record["images_per_s"].items()}
    rows: list[tuple[str, ...]] = []
    for variant, found in rates.items():
        ratio, peak = float(np.median(found / rates[FLOAT])), record["peak_bytes"][variant] / 2**30
        result = f"{np.median(found):.0f} images/s ({ratio:.2f} of fp32), {peak:.2f} GiB"
        rows.append(("training step", f"{case.label}, batch {case.batch}", variant, result))
    return rows
