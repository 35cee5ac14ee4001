"""Suite qat: accuracy of a fine-tuned net after short quantized training, against its float form and against stock int8 training.

All variants start from the float weights of one finished run and train on the same images in the same order for as long. Top classes
of every test image are kept, so that differences are those between two models on the same images.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.int8_peer import calibrated_peer
from benchmarks.paired import Pair, text
from benchmarks.record import Machine, write
from edgeft.artifact import Artifact, json_bytes
from edgeft.bench.peers import float_peer, normalised
from edgeft.config import Config, build_config
from edgeft.context import TrainContext, make_accelerator
from edgeft.data import Dataset
from edgeft.data.loading import ImageCache, batches, load_dataset, subset
from edgeft.data.preprocess import Preprocessing
from edgeft.errors import ConfigError
from edgeft.export.float_onnx import FloatOnnxRunner, quantize_statically
from edgeft.models import Classifier, build_classifier
from edgeft.pipeline import FloatModel
from edgeft.progress import Progress
from edgeft.quant.calibration.calibrate import calibrate
from edgeft.quant.stage import Job, plan_of, quantize
from edgeft.quant.training_graph import TrainingGraph
from edgeft.runner import Runner
from edgeft.train import fit

SUITE = "qat"
EDGEFT, BREVITAS, STATIC = "edgeft", "Brevitas int8", "ORT static int8"
COLUMNS = (
    "net", "8-bit form", "weights per", "loss", "ID", "mean OOD", "ID - float", "OOD - float", "OOD - Brevitas int8", "flips %", "KL OOD",
    "epoch",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One way to 8 bits; `loss` "none" is calibration only, and the only one of STATIC."""

    form: str
    granularity: str
    loss: str

    @property
    def name(self) -> str:
        """As files and progress show it."""
        return f"{self.form} per {self.granularity}, {self.loss}"

    def config(self, base: Config) -> Config:
        """The run's configuration with this variant's quantization."""
        changes: dict[str, Any] = {"granularity": self.granularity, "loss": "labels" if self.loss == "none" else self.loss}
        changes |= {"recipe": "f8net-tiny", "epochs": None} if self.loss == "none" else {"recipe": "f8net-finetune"}
        if self.loss != "distill" and base.quant.headroom != "target":
            changes["unlabelled"] = ()
        quant = type(base.quant).model_validate(base.quant.model_dump() | changes)
        return base.model_copy(update={"quant": quant, "verify": base.verify.model_copy(update={"samples": 1})})


VARIANTS = tuple(
    Variant(form, granularity, loss)
    for granularity in ("tensor", "channel")
    for form in (EDGEFT, BREVITAS)
    for loss in ("none", "labels", "distill")
)


@dataclass(frozen=True)
class Subject:
    """A finished run: its data, and the classifier with the float weights that fine-tuning ended with."""

    name: str
    artifact: Artifact
    config: Config
    dataset: Dataset
    preprocessing: Preprocessing
    rate: float | None

    @classmethod
    def read(cls, name: str, path: Path, sets: Sequence[str], progress: Progress) -> "Subject":
        """Open a run; `sets` change its configuration. Raises ArtifactError or DataError when it or its images are not there."""
        artifact = Artifact.load(path)
        tree = artifact.manifest.config
        keys = {f"{section}.{key}": value for section, values in tree.items() if isinstance(values, dict) for key, value in values.items()}
        keys |= {"seed": tree["seed"], "quant.recipe": "f8net-finetune"}  # each variant brings its own recipe
        config = build_config(flags=keys, sets=list(sets))
        stages = artifact.document("training.json")["stages"]
        rates = [stage["result"]["lr"] for stage in stages if "lr" in stage["result"]]
        dataset = load_dataset(config, progress)
        return cls(name, artifact, config, dataset, Preprocessing.from_json(artifact.manifest.preprocessing), rates[-1] if rates else None)

    def classifier(self) -> Classifier:
        """A fresh copy of the float net, in eval mode."""
        config = self.config
        built = build_classifier(config.model, config.data, len(self.dataset.classes), self.dataset.size, config.seed)
        arrays = self.artifact.arrays("float.safetensors")
        with torch.no_grad():
            for name, tensor in {**dict(built.net.named_parameters()), **dict(built.net.named_buffers())}.items():
                tensor.copy_(torch.from_numpy(np.asarray(arrays[name])))
        return built.eval()


def context_of(
    config: Config, dataset: Dataset, preprocessing: Preprocessing, work: Path, cache: ImageCache, progress: Progress
) -> TrainContext:
    """As the pipeline makes it."""
    augment = dataset.augment if config.data.augment == "auto" else config.data.augment
    return TrainContext(
        make_accelerator(config), config.seed, config.train.batch, config.train.accumulate, work, progress, preprocessing, augment,
        config.data.workers, cache,
    )  # fmt: skip


Logits = dict[str, NDArray[np.float32]]
"""Scores of every test image by split."""


@dataclass(frozen=True)
class Outcome:
    """What one model gave: top class of every test image by split, mean divergence from float by split, and what training chose."""

    top: dict[str, NDArray[np.int64]]
    divergence: dict[str, float]
    chosen: dict[str, Any]


def measure(subject: Subject, variant: Variant, wanted: Logits, cache: ImageCache, progress: Progress) -> Outcome:
    """Train one variant and run it over all test images; `wanted` are the float net's scores."""
    start = time.perf_counter()
    runner, chosen = eight_bit(subject, variant, cache, progress)
    logits = scores(runner, subject.dataset, subject.preprocessing, cache)
    return Outcome(
        {split: found.argmax(1) for split, found in logits.items()},
        {split: divergence(wanted[split], found) for split, found in logits.items()},
        chosen | {"seconds": round(time.perf_counter() - start)},
    )


def eight_bit(subject: Subject, variant: Variant, cache: ImageCache, progress: Progress) -> tuple[Runner, dict[str, Any]]:
    """The trained or calibrated net of a variant, for edgeft a TrainingGraph; and what training chose."""
    config = variant.config(subject.config)
    with tempfile.TemporaryDirectory() as folder:
        context = context_of(config, subject.dataset, subject.preprocessing, Path(folder), cache, progress)
        job = Job(subject.classifier(), subject.dataset, context, config, subject.rate)
        return {EDGEFT: _edgeft, BREVITAS: _brevitas, STATIC: _static}[variant.form](job)


def _edgeft(job: Job) -> tuple[Runner, dict[str, Any]]:
    quantized = quantize(job.classifier, job.dataset, job.context, job.config, job.rate)
    return TrainingGraph(quantized.net), quantized.record


def _brevitas(job: Job) -> tuple[Runner, dict[str, Any]]:
    """The same equalised plan, calibration images, objective and stage."""
    config, context = job.config, job.context
    plan = plan_of(job.classifier.cpu(), config.quant.profile, config.quant.residual)
    images = torch.from_numpy(subset([job.dataset.train], context.preprocessing, config.quant.calibration_images, config.seed))
    nearest = config.quant.model_copy(update={"rounding": "nearest", "granularity": "tensor"})
    with context.task("calibrate", len(plan.steps)) as advance:
        net, _ = calibrate(plan, images, nearest, advance)
    peer = calibrated_peer(net, images, per_channel=config.quant.granularity == "channel")
    if config.quant.qat_epochs == 0:
        return Module(BREVITAS, peer), {}
    result = fit(peer, job.stage(), *job.splits(), context, objective=job.objective())
    return Module(BREVITAS, peer), asdict(result)


def _static(job: Job) -> tuple[Runner, dict[str, Any]]:
    """On the same calibration images."""
    p, quant = job.context.preprocessing, job.config.quant
    source, file = job.context.work / "float.onnx", job.context.work / "static.onnx"
    float_peer(job.classifier.cpu(), source)
    images = subset([job.dataset.train], p, quant.calibration_images, job.config.seed)
    quantize_statically(source, file, normalised(job.classifier, images), per_channel=quant.granularity == "channel")
    return FloatOnnxRunner(file, torch.get_num_threads(), p.mean, p.std, name=STATIC), {}


class Module:
    """Runner over a module that takes image bytes."""

    def __init__(self, name: str, module: torch.nn.Module) -> None:
        self.name, self._module = name, module.eval()

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Scores of a batch."""
        with torch.inference_mode():
            out: NDArray[np.float32] = self._module(torch.from_numpy(images)).float().numpy()
        return out


def scores(runner: Runner, dataset: Dataset, p: Preprocessing, cache: ImageCache) -> Logits:
    """Logits of every test image by split."""
    return {split.name: np.concatenate([runner.logits(images) for images, _ in batches(split, p, 64, cache)]) for split in dataset.tests}


def divergence(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Mean KL(wanted || found) in nats."""
    log_p, log_q = (torch.from_numpy(values).double().log_softmax(1) for values in (wanted, found))
    return float((log_p.exp() * (log_p - log_q)).sum(1).mean())


def outcomes(
    subject: Subject, variants: Sequence[Variant], wanted: Logits, cache: ImageCache, records: Path | None, progress: Progress
) -> dict[Variant, Outcome]:
    """Every variant, read back where `records` already has it; `wanted` are the float net's scores."""
    found = {}
    for number, variant in enumerate(variants, 1):
        progress.line(f"{SUITE}: {subject.name}, {variant.name} ({number} of {len(variants)})")
        file = records / f"{subject.name}, {variant.name}.json" if records is not None else None
        key = {"digest": subject.artifact.digest, "config": variant.config(subject.config).model_dump(mode="json")}
        outcome = _read(file, key)
        if outcome is None:
            outcome = measure(subject, variant, wanted, cache, progress)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                tree = {"key": key, "divergence": outcome.divergence, "chosen": outcome.chosen}
                file.write_bytes(json_bytes(tree | {"top": {split: top.tolist() for split, top in outcome.top.items()}}))
        found[variant] = outcome
    return found


def _read(file: Path | None, key: dict[str, Any]) -> Outcome | None:
    if file is None or not file.is_file():
        return None
    tree = json.loads(file.read_bytes())
    if tree["key"] != key:
        return None
    return Outcome({split: np.array(top, dtype=np.int64) for split, top in tree["top"].items()}, tree["divergence"], tree["chosen"])


def rows_of(subject: Subject, float_top: dict[str, NDArray[np.int64]], found: dict[Variant, Outcome]) -> list[list[str]]:
    """Table rows of one run: float first, then each variant with its paired differences."""
    rows = [[subject.name, "float", "-", "-", *_accuracies(subject, float_top), "-", "-", "-", "-", "-", "-"]]
    for variant, outcome in found.items():
        peer = found.get(replace(variant, form=BREVITAS)) if variant.form == EDGEFT else None
        id_pairs, ood_pairs = _pairs(subject, outcome.top, float_top)
        against = "-" if peer is None else text(_pairs(subject, outcome.top, peer.top)[1])
        flips = sum(int((outcome.top[split] != top).sum()) for split, top in float_top.items())
        n = sum(map(len, float_top.values()))
        shifted = [outcome.divergence[split.name] for split in subject.dataset.ood]
        rows.append([
            subject.name, variant.form, variant.granularity, variant.loss, *_accuracies(subject, outcome.top), text(id_pairs),
            text(ood_pairs) if ood_pairs else "-", against, f"{100 * flips / n:.1f}", f"{np.mean(shifted):.4f}" if shifted else "-",
            str(outcome.chosen.get("epoch", "-")),
        ])  # fmt: skip
    return rows


def _accuracies(subject: Subject, top: dict[str, NDArray[np.int64]]) -> list[str]:
    shares = {split.name: 100 * float((top[split.name] == split.labels).mean()) for split in subject.dataset.tests}
    shifted = [shares[split.name] for split in subject.dataset.ood]
    return [f"{shares[subject.dataset.id_test.name]:.1f}", f"{np.mean(shifted):.1f}" if shifted else "-"]


def _pairs(subject: Subject, first: dict[str, NDArray[np.int64]], second: dict[str, NDArray[np.int64]]) -> tuple[list[Pair], list[Pair]]:
    """Of the ID test split, and of each shifted one."""
    pairs = {split.name: Pair.of(first[split.name], second[split.name], split.labels) for split in subject.dataset.tests}
    return [pairs[subject.dataset.id_test.name]], [pairs[split.name] for split in subject.dataset.ood]


def run(
    named: Sequence[tuple[str, Path]], out: Path, *, sets: Sequence[str], variants: Sequence[Variant], records: Path | None,
    progress: Progress,
) -> Path:  # fmt: skip
    """Measure every variant of every run and write the result file.

    Raises ConfigError without a run, and what opening a run raises.
    """
    if not named:
        raise ConfigError("no run was given", "example: PACS=runs/pacs-lpft-0")
    machine = Machine.look(torch.get_num_threads())
    rows: list[list[str]] = []
    measurements: list[dict[str, Any]] = []
    options: dict[str, Any] = {}
    n: dict[str, int] = {}
    for name, path in named:
        subject = Subject.read(name, path, sets, progress)
        cache = ImageCache(2048)
        wanted = scores(FloatModel(subject.classifier()), subject.dataset, subject.preprocessing, cache)
        float_top = {split: logits.argmax(1) for split, logits in wanted.items()}
        found = outcomes(subject, variants, wanted, cache, records, progress)
        rows += rows_of(subject, float_top, found)
        quant = subject.config.quant.model_dump(mode="json")
        options[name] = {"digest": subject.artifact.digest, "backbone": subject.config.model.backbone, "quant": quant}
        n |= {f"{name} {split.name}": len(split) for split in (subject.dataset.train, subject.dataset.val, *subject.dataset.tests)}
        measurements += [_measurement(subject, variant, outcome, float_top) for variant, outcome in found.items()]
    return write(
        out, machine, suite=SUITE, title="Accuracy after short quantized training", columns=COLUMNS, rows=rows,
        notes=_notes(n, options), options={"runs": options, "sets": list(sets)}, n=n, measurements=measurements,
    )  # fmt: skip


def _measurement(subject: Subject, variant: Variant, outcome: Outcome, float_top: dict[str, NDArray[np.int64]]) -> dict[str, Any]:
    splits = {
        split.name: asdict(Pair.of(outcome.top[split.name], float_top[split.name], split.labels))
        | {"correct": int((outcome.top[split.name] == split.labels).sum()), "divergence": outcome.divergence[split.name]}
        for split in subject.dataset.tests
    }
    return {"net": subject.name, **asdict(variant), "splits": splits, "chosen": outcome.chosen}


def _notes(n: dict[str, int], options: dict[str, Any]) -> list[str]:
    first = next(iter(options.values()))["quant"]
    backbones = ", ".join(f"{name} {entry['backbone']} ({entry['digest'][:12]})" for name, entry in options.items())
    epochs = first["epochs"] if first["epochs"] is not None else "3"
    return [
        "Top-1 in percent; differences in points, on the same images, with 95 % bootstrap intervals over images (unweighted mean over "
        "shifted sets); flips are images whose class differs from float's; KL is the mean divergence from float in nats.",
        f"edgeft: power-of-two 8-bit formats everywhere, integers only. {BREVITAS}: float scales, stock quantizers, learned by gradient, "
        "float biases, on the same equalised weights. Both: same calibration images, data order, rate and "
        f"{epochs} epochs; the start competes and wins ties, the epoch is chosen on validation (accuracy, or KL for distill).",
        f"One training seed. Nets: {backbones}. Images: {', '.join(f'{what} {count}' for what, count in n.items())}.",
    ]
