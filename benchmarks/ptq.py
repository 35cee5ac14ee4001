"""Suite ptq: pretrained nets in 8 bits by calibration alone, no labels and no training, beside ONNX Runtime's static quantization.

Calibration images are drawn several times from one part of a pack; scored are the rest of it and other packs, always the same images.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from benchmarks.packs import Pack, read_net, read_pack
from benchmarks.record import Machine, write
from edgeft.artifact import atomic_write, json_bytes
from edgeft.bench.peers import float_model
from edgeft.config import QuantConfig
from edgeft.errors import ConfigError
from edgeft.export.float_onnx import quantize_statically, session
from edgeft.export.verify import verify
from edgeft.interpret import Interpreter
from edgeft.progress import Progress
from edgeft.quant.calibration.calibrate import calibrate, n_advances
from edgeft.quant.lower import enforce_bounds, lower
from edgeft.quant.plan import IMAGE
from edgeft.quant.rescale import prepare_plan
from edgeft.quant.tracing.trace import trace
from edgeft.quant.training_graph import TrainingGraph

SUITE = "ptq"
COLUMNS = ("net", "8-bit form", "weights per", "float top-1", "8-bit top-1", "agreement %", "KL", "draws", "images")
HALF = (0.5, 0.5, 0.5)
POOL = 0.6
"""Share of the calibration pack that draws are taken from; the rest is scored."""
N_VERIFIED = 2
"""Scored images on which all codes are compared with the interpreter, for each calibrated net."""
BATCH = 16

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Variant:
    """One way to 8 bits: an activation profile of edgeft, or "ort" for ONNX Runtime's float scales."""

    form: Literal["u8", "s8", "ort"]
    granularity: Literal["tensor", "channel"]

    @property
    def label(self) -> str:
        """As tables show it."""
        return "ONNX Runtime static" if self.form == "ort" else f"edgeft {self.form}"


VARIANTS = tuple(Variant(form, granularity) for form in ("u8", "s8", "ort") for granularity in ("channel", "tensor"))


@dataclass(frozen=True)
class Split:
    """The pool that calibration images are drawn from, and what is scored."""

    pool: Images
    scored: Pack

    @classmethod
    def of(cls, calibration: Path, others: Sequence[Path], n_scored: int | None) -> "Split":
        """From packs; `n_scored` limits the scored images of each pack."""
        pack = read_pack(calibration)
        order = np.random.default_rng(12345).permutation(len(pack.labels))
        n_pool = round(POOL * len(order))
        parts = [pack.take(order[n_pool:]), *(read_pack(file) for file in others)]
        chosen = [part.take(np.linspace(0, len(part.labels) - 1, min(len(part.labels), n_scored or 10**9)).astype(int)) for part in parts]
        return cls(
            pack.images[order[:n_pool]], Pack(np.concatenate([p.images for p in chosen]), np.concatenate([p.labels for p in chosen]))
        )

    def draw(self, number: int, n: int) -> Images:
        """Calibration images. Raises ConfigError when the pool has not so many."""
        if n > len(self.pool):
            raise ConfigError(f"{n} calibration images were asked for, the pool has {len(self.pool)}")
        return self.pool[np.random.default_rng(number).permutation(len(self.pool))[:n]]


def measure(net: nn.Module, variant: Variant, images: Images, split: Split, wanted: NDArray[np.float32], quant: QuantConfig,
            progress: Progress) -> dict[str, Any]:  # fmt: skip
    """One calibrated net on all scored images: right answers, agreement with the float net's, and mean divergence from it."""
    if variant.form == "ort":
        found, n_verified = _ort_scores(net, variant, images, split), 0
    else:
        found, n_verified = _scores(net, variant, images, split, quant, progress)
    top, labels = found.argmax(1), split.scored.labels
    logs = [F.log_softmax(torch.from_numpy(scores), 1) for scores in (found, wanted)]
    return {
        "correct": int((top == labels).sum()), "float_correct": int((wanted.argmax(1) == labels).sum()), "n": len(labels),
        "agree": int((top == wanted.argmax(1)).sum()), "verified": n_verified,
        "divergence": float(F.kl_div(logs[0], logs[1], log_target=True, reduction="batchmean")),
    }  # fmt: skip


def _scores(
    net: nn.Module, variant: Variant, images: Images, split: Split, quant: QuantConfig, progress: Progress
) -> tuple[NDArray[np.float32], int]:
    size = images.shape[2]
    plan = prepare_plan(net, (3, size, size), HALF, HALF, variant.form)
    config = quant.model_copy(update={"profile": variant.form, "granularity": variant.granularity})
    with progress.task("calibrate", n_advances(plan, config)) as advance:
        fixed, _ = calibrate(plan, torch.from_numpy(images), config, advance)
    enforce_bounds(fixed)
    graph, scored = TrainingGraph(fixed), split.scored.images
    n_verified = verify(Interpreter(lower(fixed)), graph, scored[:N_VERIFIED], 1)
    return np.concatenate([graph.logits(scored[i : i + BATCH]) for i in range(0, len(scored), BATCH)]), n_verified


def _ort_scores(net: nn.Module, variant: Variant, images: Images, split: Split) -> NDArray[np.float32]:
    size = images.shape[2]
    with tempfile.TemporaryDirectory() as folder:
        source, file = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(float_model(trace(net, (3, size, size))), source)
        quantize_statically(source, file, _normalised(images), per_channel=variant.granularity == "channel")
        opened = session(file, torch.get_num_threads())
        scored = split.scored.images
        return np.concatenate([opened.run(None, {IMAGE: _normalised(scored[i : i + BATCH])})[0] for i in range(0, len(scored), BATCH)])


def _normalised(images: Images) -> NDArray[np.float32]:
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def float_scores(net: nn.Module, images: Images) -> NDArray[np.float32]:
    """Logits of the float net."""
    with torch.inference_mode():
        parts = [net(torch.from_numpy(_normalised(images[i : i + BATCH]))).numpy() for i in range(0, len(images), BATCH)]
    return np.concatenate(parts)


def rows_of(name: str, variant: Variant, found: Sequence[dict[str, Any]]) -> list[str]:
    """A table row from the measurements of all draws: means and sample standard deviations."""
    n = found[0]["n"]
    shares = {key: [100 * record[key] / n for record in found] for key in ("float_correct", "correct", "agree")}
    divergence = [record["divergence"] for record in found]
    spread = f" ± {stdev(divergence):.4f}" if len(found) > 1 else ""
    return [
        name, variant.label, variant.granularity, f"{shares['float_correct'][0]:.1f}", _spread(shares["correct"]), _spread(shares["agree"]),
        f"{mean(divergence):.4f}{spread}", str(len(found)), str(n),
    ]  # fmt: skip


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def run(
    nets: Sequence[tuple[str, Path]], out: Path, *, calibration: Path, scored: Sequence[Path], quant: QuantConfig, draws: Sequence[int],
    variants: Sequence[Variant], n_scored: int | None, records: Path | None, progress: Progress,
) -> Path:  # fmt: skip
    """Measure every variant of every net on every draw and write the result file.

    Measurements are kept in the folder `records`, where one is given, and not repeated. Raises ConfigError, DataError or
    UnsupportedError for nets, images or layers that do not fit, VerificationError when a code differs from the interpreter's.
    """
    machine, split = Machine.look(torch.get_num_threads()), Split.of(calibration, scored, n_scored)
    rows: list[list[str]] = []
    measurements: list[dict[str, Any]] = []
    for name, file in nets:
        net = read_net(name, file)
        wanted = float_scores(net, split.scored.images)
        for variant in variants:
            found = []
            for draw in draws:
                kept = records / f"{name}-{variant.form}-{variant.granularity}-{draw}.json" if records is not None else None
                if kept is not None and kept.is_file():
                    found.append(json.loads(kept.read_text(encoding="utf-8")))
                else:
                    images = split.draw(draw, quant.calibration_images)
                    found.append(measure(net, variant, images, split, wanted, quant, progress))
                    if kept is not None:
                        kept.parent.mkdir(parents=True, exist_ok=True)
                        atomic_write(kept, json_bytes(found[-1]))
            rows.append(rows_of(name, variant, found))
            progress.line(f"{SUITE}: " + ", ".join(rows[-1]))
            measurements += [{"net": name, "form": variant.form, "granularity": variant.granularity, "draw": draw, **record}
                             for draw, record in zip(draws, found, strict=True)]  # fmt: skip
    return write(
        out, machine, suite=SUITE, title="Calibration alone: ImageNet nets without training", columns=COLUMNS, rows=rows,
        notes=_notes(quant, split, measurements), options={"quant": quant.model_dump(mode="json"), "draws": list(draws)},
        n={"scored": len(split.scored.labels), "pool": len(split.pool), "calibration": quant.calibration_images, "draws": len(draws)},
        measurements=measurements,
    )  # fmt: skip


def _notes(quant: QuantConfig, split: Split, measurements: Sequence[dict[str, Any]]) -> list[str]:
    ours = [record["verified"] for record in measurements if record["form"] != "ort"]
    verified = f" Training graph and interpreter: 0 differing codes on {min(ours)} scored images of each net." if ours else ""
    return [
        "1000-way top-1 in percent, mean ± standard deviation over draws of "
        f"{quant.calibration_images} unlabelled calibration images out of {len(split.pool)}; the {len(split.scored.labels)} scored images "
        "are never among them. Agreement is the share of images with the float net's class, KL the mean divergence from its scores in "
        "nats; they tell methods apart better than top-1 does.",
        f"edgeft: power-of-two formats only, rule {quant.format}, rounding {quant.rounding}.{verified}",
        "ONNX Runtime: quantize_static with float scales and zero points, min-max, on the same calibration images.",
    ]
