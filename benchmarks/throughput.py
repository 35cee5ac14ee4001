"""Suite train-throughput: the product's float fine-tuning against a bare PyTorch loop, and QAT steps against float steps."""

import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from benchmarks.nets import N_CLASSES, Case, fixed_point, random_classifier, random_images
from benchmarks.record import Machine, write
from edgeft.bench.timing import shuffled
from edgeft.config import QuantConfig, build_config
from edgeft.context import TrainContext, make_accelerator
from edgeft.data import Split, SplitKind
from edgeft.data.loading import ImageCache
from edgeft.methods import Stage
from edgeft.models import Classifier
from edgeft.progress import Progress
from edgeft.quant.control import FormatControl
from edgeft.train import fit

SUITE = "train-throughput"
BARE, FLOAT, FROZEN, MOVING = "bare PyTorch loop", "float fine-tuning", "QAT, formats frozen", "QAT, formats moving"
VARIANTS = (BARE, FLOAT, FROZEN, MOVING)
RATE, MOMENTUM = 1e-6, 0.9
"""So low that random labels cannot make the loss diverge; the rate has no influence on time."""
WARM_UP_STEPS = 3
N_VAL = 8
COLUMNS = ("net", "batch", "variant", "images/s", "against bare", "against float", "peak MiB")

Round = Callable[[], float]
"""Runs some steps and returns images/s over those after the warm-up."""


class Pixels:
    """Images in memory."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def image(self, index: int) -> NDArray[np.uint8]:
        """RGB bytes of one image."""
        pixels: NDArray[np.uint8] = self._pixels[index]
        return pixels


class Clock:
    """Time stamps taken before each step; the rate is that of the steps between the last warm-up step and the last step."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._stamps: list[float] = []

    def stamp(self) -> None:
        """A step begins, or the last one has ended."""
        self._stamps.append(time.perf_counter())

    def images_per_s(self) -> float:
        """Over the steps after the warm-up."""
        n_steps = len(self._stamps) - 1 - WARM_UP_STEPS
        return n_steps * self._batch / (self._stamps[-1] - self._stamps[WARM_UP_STEPS])


def make_round(variant: str, case: Case, n_steps: int) -> Round:
    """What is timed: `n_steps` steps of a variant after WARM_UP_STEPS others, on random images in memory."""
    n = case.batch * (n_steps + WARM_UP_STEPS + 1)  # one more, whose beginning is the end of the last one that counts
    pixels = random_images(n, case.size)
    labels = np.random.default_rng(1).integers(0, N_CLASSES, n)
    classifier = random_classifier(case)
    if variant == BARE:
        return _bare(classifier, torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels), case)
    train = _split("train", pixels, labels)
    if variant == FLOAT:
        return _product(classifier, train, case, classifier, None)
    # A step that never freezes, or that always has, changes nothing else than whether statistics are taken.
    config = QuantConfig(format="std", freeze_at=1.0 if variant == MOVING else 0.0)
    net, sigmas = fixed_point(classifier)
    return _product(net, train, case, classifier, FormatControl(net, config, sigmas))


def _split(kind: SplitKind, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> Split:
    return Split(kind, kind, Pixels(pixels), labels)


def _bare(classifier: Classifier, images: torch.Tensor, labels: torch.Tensor, case: Case) -> Round:
    """The shortest loop that trains the same net in the same way: no validation, no checkpoint, no look at the loss."""
    net, mean, std = classifier.net, classifier.mean, classifier.std
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM)

    def one_round() -> float:
        clock = Clock(case.batch)
        for index in torch.randperm(len(images)).split(case.batch):
            clock.stamp()
            x = (images[index].to(torch.float32, memory_format=torch.channels_last) / 255.0 - mean) / std
            cross_entropy(net(x), labels[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
        return clock.images_per_s()

    return one_round


def _product(model: torch.nn.Module, train: Split, case: Case, classifier: Classifier, control: FormatControl | None) -> Round:
    """`edgeft.train.fit`, one epoch from the same weights each time; its validation and checkpoints lie outside the time stamps."""
    stage = Stage("timed", "sgd", epochs=1, learning_rates=(RATE,), batch_norm="frozen", momentum=MOMENTUM)
    accelerator = make_accelerator(build_config(flags={"device": "cpu"}))
    val = _split("val", random_images(N_VAL, case.size, seed=2), np.arange(N_VAL) % N_CLASSES)
    cache = ImageCache(1024)

    def one_round() -> float:
        clock = Clock(case.batch)

        def on_step(step: int, total: int) -> None:
            clock.stamp()
            if control is not None:
                control.before_step(step, total)

        with tempfile.TemporaryDirectory() as folder:
            context = TrainContext(
                accelerator, 0, case.batch, 1, Path(folder), Progress(False), classifier.preprocessing, "none", cache=cache
            )  # fmt: skip
            fit(model, stage, train, val, context, on_step)
        return clock.images_per_s()

    return one_round


def peak_mib(variant: str, case: Case, threads: int) -> float | None:
    """Peak resident memory of a fresh process that runs one short round of a variant, in MiB; None where the system does not tell."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_here, variant, case, threads).result()


def _peak_here(variant: str, case: Case, threads: int) -> float | None:
    torch.set_num_threads(threads)
    make_round(variant, case, 3)()
    # Not getrusage: a child starts with the peak of the process that made it.
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"), re.MULTILINE) if status.is_file() else None
    return int(found[1]) / 1024 if found else None


def measure(case: Case, *, n_rounds: int, n_steps: int, threads: int, progress: Progress) -> dict[str, Any]:
    """Interleaved rounds of every variant after one untimed round of each, and each one's peak memory; a JSON-able record."""
    torch.set_num_threads(threads)
    memory = {variant: peak_mib(variant, case, threads) for variant in VARIANTS}
    rounds = {variant: make_round(variant, case, n_steps) for variant in VARIANTS}
    found: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with progress.task(f"{SUITE}: {case.label}", (n_rounds + 1) * len(VARIANTS)) as advance:
        for number, order in enumerate(shuffled(list(VARIANTS), n_rounds + 1)):
            for variant in order:
                rate = rounds[variant]()
                if number > 0:
                    found[variant].append(rate)
                advance(note=f"{variant}: {rate:.0f} images/s")
    return {"case": asdict(case), "images_per_s": found, "peak_mib": memory}


def rows_of(record: dict[str, Any]) -> list[tuple[str | float, ...]]:
    """Table rows of one net: median rates, and medians over the rounds of the ratio within a round."""
    case, rates = Case(**record["case"]), {variant: np.array(found) for variant, found in record["images_per_s"].items()}
    rows: list[tuple[str | float, ...]] = []
    for variant, found in rates.items():
        ratios = [round(float(np.median(found / rates[other])), 2) for other in (BARE, FLOAT)]
        peak = record["peak_mib"][variant]
        rows.append((case.label, case.batch, variant, round(float(np.median(found)), 1), *ratios, "-" if peak is None else round(peak)))
    return rows


def run(cases: Sequence[Case], out: Path, *, n_rounds: int, n_steps: int, threads: int, progress: Progress) -> Path:
    """Measure each case and write the result file."""
    machine = Machine.look(threads)
    records = [measure(case, n_rounds=n_rounds, n_steps=n_steps, threads=threads, progress=progress) for case in cases]
    notes = [
        f"{n_rounds} interleaved rounds in random order of {n_steps} steps each after {WARM_UP_STEPS} untimed ones; rates are medians over "
        f"rounds, ratios are medians over rounds of the ratio within a round. Load at start {machine.load}.",
        "Random weights, random images in memory, no augmentation; SGD with momentum, frozen batch norm, channels-last, fp32. Time stamps "
        "are taken before each step: data feed, loss check and progress are in them, validation and checkpoints between epochs are not.",
        "Peak MiB: resident memory of a fresh process that runs a few steps, libraries and images included.",
    ]  # fmt: skip
    return write(
        out, machine, suite=SUITE, title="Training throughput", columns=COLUMNS,
        rows=[row for record in records for row in rows_of(record)], notes=notes,
        options={"rounds": n_rounds, "steps": n_steps, "warm_up_steps": WARM_UP_STEPS, "threads": threads, "learning_rate": RATE},
        n={"rounds": n_rounds, "steps": n_rounds * n_steps}, measurements=records,
    )  # fmt: skip
