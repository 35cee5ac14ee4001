"""Suite qat-step: the time of one quantization-aware training step against the float step of the same net, on a CPU."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.nets import N_CLASSES, Case, fixed_point, random_classifier, random_images
from benchmarks.qat_peers import AFTER_COLLECTION, FoldedNet, StockNet
from benchmarks.record import Machine, write
from edgeft.bench.timing import shuffled
from edgeft.config import QuantConfig
from edgeft.progress import Progress
from edgeft.quant.control import FormatControl

SUITE = "qat-step"
CASES = tuple(Case(backbone, size, batch) for backbone in ("mobilenetv2_100", "resnet18") for size, batch in ((64, 64), (128, 32)))
FLOAT = "float, batch norm in eval mode"
FLOAT_TRAIN = "float, batch norm in train mode"
FOLDED = "float, batch norm folded"
FROZEN = "QAT, formats frozen"
FORMATS = "QAT, the step that measures and the step that moves formats"
MOVING = "QAT, formats moving"
CHANNEL = "QAT, frozen, weight formats per channel"
STOCK = "stock Brevitas, statistics collected"
COLLECTING = "stock Brevitas, collecting statistics"
TIMED = (FLOAT, FLOAT_TRAIN, FOLDED, FROZEN, FORMATS, CHANNEL, STOCK, COLLECTING)
SHOWN = (FLOAT, FLOAT_TRAIN, FOLDED, FROZEN, MOVING, CHANNEL, STOCK, COLLECTING)
EVERY = QuantConfig().update_every
"""Steps between two measurements while formats move: one step measures, the next one moves formats, the others are as when frozen."""
RATE, MOMENTUM = 1e-6, 0.9
"""So low that random labels cannot make the loss diverge; the rate has no influence on time."""
WARM_UP_STEPS = 3
ENDLESS = 10**9
"""Steps of the training that the timed steps are the beginning of."""
COLUMNS = ("net", "batch", "variant", "ms a step", "against float", "kept MiB")


@dataclass
class Variant:
    """Optimizer steps of one net on one batch of random images; `hooks` are called in turn before each, within the timed span."""

    net: nn.Module
    case: Case
    hooks: tuple[Callable[[], None], ...] = (lambda: None,)

    def __post_init__(self) -> None:
        trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.SGD(trained, lr=RATE, momentum=MOMENTUM)
        self._images = torch.from_numpy(random_images(self.case.batch, self.case.size, seed=3)).permute(0, 3, 1, 2)
        self._labels = torch.arange(self.case.batch) % N_CLASSES

    def loss(self) -> Tensor:
        """The forward pass."""
        return cross_entropy(self.net(self._images), self._labels)

    def ms_per_step(self) -> float:
        """Make one step for each hook."""
        start = time.process_time()
        for hook in self.hooks:
            hook()
            self.loss().backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        return 1e3 * (time.process_time() - start) / len(self.hooks)

    def kept_bytes(self) -> int:
        """What a forward pass keeps for the backward pass, parameters excepted."""
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.loss()
        for parameter in self.net.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
        del loss
        return sum(kept.values())


def make_variants(case: Case) -> dict[str, Variant]:
    """Everything that is timed, with the same weights."""
    classifier = random_classifier(case)
    net, sigmas = fixed_point(classifier)
    moving = copy.deepcopy(net)
    control = FormatControl(moving, QuantConfig(format="std", freeze_at=1.0), sigmas)
    hooks = (lambda: control.before_step(0, ENDLESS)), (lambda: control.before_step(1, ENDLESS))
    return {
        FLOAT: Variant(classifier.eval(), case),
        FLOAT_TRAIN: Variant(copy.deepcopy(classifier).train(), case),
        FOLDED: Variant(FoldedNet(net.plan), case),
        FROZEN: Variant(net.eval(), case),
        FORMATS: Variant(moving.eval(), case, hooks),
        CHANNEL: Variant(fixed_point(classifier, granularity="channel")[0].eval(), case),
        STOCK: Variant(StockNet(net, collect_steps=AFTER_COLLECTION).train(), case),
        COLLECTING: Variant(StockNet(net).train(), case),
    }


def measure(case: Case, *, n_rounds: int, progress: Progress, only: Sequence[str] = TIMED) -> dict[str, Any]:
    """Interleaved rounds of one step of each variant after WARM_UP_STEPS untimed ones; a JSON-able record."""
    timed = {name: variant for name, variant in make_variants(case).items() if name in only}
    found: dict[str, list[float]] = {name: [] for name in timed}
    kept = {}
    with progress.task(f"{SUITE}: {case.label}", n_rounds + WARM_UP_STEPS) as advance:
        for number, order in enumerate(shuffled(list(timed), n_rounds + WARM_UP_STEPS)):
            for name in order:
                ms = timed[name].ms_per_step()
                if number >= WARM_UP_STEPS:
                    found[name].append(ms)
            advance()
        for name, variant in timed.items():
            kept[name] = variant.kept_bytes()
    return {"case": asdict(case), "ms": found, "kept_bytes": kept}


def rows_of(record: dict[str, Any]) -> list[tuple[str | float, ...]]:
    """Table rows of one net: median times, and medians over the rounds of the ratio within a round."""
    case, ms = Case(**record["case"]), {name: np.array(found) for name, found in record["ms"].items()}
    kept = dict(record["kept_bytes"])
    if FORMATS in ms:
        ms[MOVING] = (2 * ms[FORMATS] + (EVERY - 2) * ms[FROZEN]) / EVERY
        kept[MOVING] = kept[FORMATS]
    return [
        (case.label, case.batch, name, round(float(np.median(ms[name])), 1), round(float(np.median(ms[name] / ms[FLOAT])), 2),
         round(kept[name] / 2**20))
        for name in SHOWN if name in ms
    ]  # fmt: skip


def run(cases: Sequence[Case], out: Path, *, n_rounds: int, progress: Progress) -> Path:
    """Measure each case on one thread and write the result file."""
    torch.set_num_threads(1)
    machine = Machine.look(1)
    records = [measure(case, n_rounds=n_rounds, progress=progress) for case in cases]
    notes = [
        f"One step of each variant in turn, in random order, {n_rounds} rounds after {WARM_UP_STEPS} untimed ones; times are medians over "
        f"rounds, ratios are medians over rounds of the ratio within a round. Load at start {machine.load}.",
        "A step: forward and backward pass and SGD update with momentum on one batch of random image bytes in memory; random weights, "
        "channels-last, fp32, affine parameters of batch norm trained. Times are processor time of the one thread, which other programs "
        "disturb less than time on the clock; where nothing else runs, the two are the same.",
        f"Formats moving: of {EVERY} steps one measures statistics and one moves formats. These two are timed; the other {EVERY - 2} "
        "are as with frozen formats.",
        "Stock Brevitas: Int8WeightPerTensorFixedPoint, Int8ActPerTensorFixedPoint and Uint8ActPerTensorFixedPoint in the same places of "
        "the same net with batch norm folded; while it collects statistics (its first 300 steps) it takes a percentile of each tensor.",
        "Kept MiB: what the forward pass keeps for the backward pass, parameters excepted.",
    ]  # fmt: skip
    return write(
        out, machine, suite=SUITE, title="Time of a quantization-aware training step", columns=COLUMNS,
        rows=[row for record in records for row in rows_of(record)], notes=notes,
        options={"rounds": n_rounds, "warm_up_steps": WARM_UP_STEPS, "learning_rate": RATE, "update_every": EVERY},
        n={"rounds": n_rounds}, measurements=records,
    )  # fmt: skip
