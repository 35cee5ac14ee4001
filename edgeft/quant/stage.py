"""The fixed-point stage of a run: a recipe calibrates and trains, then bound and lower; each part resumable."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgeft.checkpoint import read_checkpoint, restore, state_of, under_prefix, with_prefix, write_checkpoint
from edgeft.config import Config
from edgeft.context import TrainContext
from edgeft.data import Dataset, Split
from edgeft.data.loading import subset
from edgeft.data.mixing import divided, joined
from edgeft.errors import UnsupportedError
from edgeft.graph import IntegerGraph
from edgeft.methods import Stage
from edgeft.models import Classifier
from edgeft.objective import Distillation, Labels, Objective
from edgeft.quant import a2q
from edgeft.quant.calibration.calibrate import calibrate_explained, n_advances
from edgeft.quant.calibration.headroom import shifted_images
from edgeft.quant.control import FormatControl
from edgeft.quant.formats import FormatTable
from edgeft.quant.lower import enforce_bounds, format_table, lower
from edgeft.quant.net import FixedPointNet
from edgeft.quant.plan import ConvStep, Plan, run_float
from edgeft.quant.recipes import RECIPES
from edgeft.quant.rescale import prepare_plan
from edgeft.quant.saturation import saturation
from edgeft.train import FitResult, fit

CALIBRATED = "calibrated.safetensors"
"""Checkpoint of the calibrated net."""
QAT_RATE = 0.1
"""Default QAT learning rate as a share of the one that fine-tuning chose."""
FALLBACK_RATE = 3e-4
"""QAT learning rate after a method without an SGD stage."""


@dataclass(frozen=True)
class Quantized:
    """Result of the stage: the training graph, the same network as integers, its formats, how training went, and what saturates.

    `saturation` is the content of saturation.json, empty on all processes but the main one.
    """

    net: FixedPointNet
    graph: IntegerGraph
    formats: FormatTable
    record: dict[str, Any]
    saturation: dict[str, Any]


PLAN_TOLERANCE = 0.02
"""Largest difference between plan and network, as a share of the largest logit. Half a grey level at zero padding costs about 0.001."""


@torch.no_grad()
def plan_of(classifier: Classifier, profile: str, residual: str = "branch") -> Plan:
    """The float network as a plan of fixed-point steps, compared with the network on one random image.

    Raises UnsupportedError naming the layer that has no fixed-point form, or saying that tracing missed something.
    """
    p = classifier.preprocessing
    plan = prepare_plan(classifier.net, (3, p.size, p.size), p.mean, p.std, profile, residual)
    image = torch.randint(0, 256, (1, 3, p.size, p.size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = classifier(image.to(classifier.mean.device)).cpu()
    difference = float((run_float(plan, image) - wanted).abs().max())
    if not difference <= PLAN_TOLERANCE * float(wanted.abs().max()):
        raise UnsupportedError(
            f"the traced backbone differs from '{type(classifier.net).__name__}' by {difference:.3g} in a logit: tracing misses something",
            "see 'edgeft list backbones' for networks that are known to lower",
        )
    return plan


@dataclass(frozen=True)
class Job:
    """What a recipe starts from: the fine-tuned classifier (which it may move to a device, but not change), and the run around it.

    `rate` is the learning rate that fine-tuning chose, None when it had none.
    """

    classifier: Classifier
    dataset: Dataset
    context: TrainContext
    config: Config
    rate: float | None

    @property
    def learning_rate(self) -> float:
        """The configured QAT learning rate, or the default that follows from fine-tuning's."""
        chosen = self.config.quant.lr
        if chosen is not None:
            return chosen
        return self.rate * QAT_RATE if self.rate is not None else FALLBACK_RATE

    def stage(self) -> Stage:
        """The QAT stage: SGD with frozen batch norm from the calibrated weights, which compete."""
        train = self.config.train
        return Stage(
            name="qat", solver="sgd", epochs=self.config.quant.qat_epochs, learning_rates=(self.learning_rate,), batch_norm="frozen",
            momentum=train.momentum, weight_decay=train.weight_decay, keep_start=True,
        )  # fmt: skip

    def objective(self) -> Objective:
        """The configured loss; the teacher of distillation is the classifier."""
        if self.config.quant.loss == "labels":
            return Labels()
        return Distillation(self.classifier.to(self.context.accelerator.device))

    def splits(self) -> tuple[Split, Split]:
        """What QAT trains on and what selects its epoch. Where no label is read, each has its share of the unlabelled images as well."""
        train, val, extra = self.dataset.train, self.dataset.val, self.dataset.unlabelled
        if extra is None or self.config.quant.loss == "labels":
            return train, val
        more, held_out = divided(extra, self.config.data.val_fraction, self.config.seed)
        return joined(train, more), joined(val, held_out)


@dataclass(frozen=True)
class Trained:
    """What a recipe ends with: the training graph with its best weights, each activation's sigma, and a JSON-able record."""

    net: FixedPointNet
    sigmas: dict[str, float]
    record: dict[str, Any]


def quantize(classifier: Classifier, dataset: Dataset, context: TrainContext, config: Config, rate: float | None) -> Quantized:
    """Take a fine-tuned classifier to integers by the configured recipe. `rate` is the learning rate that fine-tuning chose, if any.

    Raises UnsupportedError when a format cannot hold a layer, TrainingError when QAT diverges.
    """
    trained: Trained = RECIPES.get(config.quant.recipe)(Job(classifier, dataset, context, config, rate))
    for name in enforce_bounds(trained.net):
        context.say(f"layer '{name}': weight format coarsened to keep its accumulator exact in float32 runtimes")
    graph = lower(trained.net)
    formats = format_table(trained.net, graph, config.quant.format, config.quant.granularity, trained.sigmas, _choices(context))
    return Quantized(trained.net, graph, formats, trained.record, _saturation(trained.net, dataset, context, config))


def _saturation(net: FixedPointNet, dataset: Dataset, context: TrainContext, config: Config) -> dict[str, Any]:
    if not context.accelerator.is_main_process:
        return {}
    n = config.verify.samples
    with context.task("count saturated values", sum(min(n, len(split)) for split in dataset.tests)) as advance:
        return saturation(net, dataset, context.preprocessing, n, config.seed, advance)


def tiny(job: Job) -> Trained:
    """Recipe f8net-tiny: what calibration gives."""
    net, sigmas = calibrated(job)
    net.to(job.context.accelerator.device)
    with a2q.held(net, job.config.quant.accumulator_bits):
        return Trained(net, sigmas, {"moves": 0})


def finetune(job: Job) -> Trained:
    """Recipe f8net-finetune: calibration, then a few epochs that start from it and have to beat it."""
    if job.config.quant.qat_epochs == 0:
        return tiny(job)
    net, sigmas = calibrated(job)
    net.to(job.context.accelerator.device)
    bits = job.config.quant.accumulator_bits
    with a2q.held(net, bits):
        control = FormatControl(net, job.config.quant, sigmas)
        follow = control.before_step if bits == a2q.UNLIMITED else None  # weights are projected for the formats in force
        result = fit(net, job.stage(), *job.splits(), job.context, follow, job.objective())
    job.context.say(f"qat: {described(result, job.config.quant.qat_epochs)}")
    record = {"moves": control.moves, "loss": job.config.quant.loss, "lr": result.lr, "epoch": result.epoch,
              "val_accuracy": result.val_accuracy, "history": result.history}  # fmt: skip
    return Trained(net, sigmas, record)


def described(result: FitResult, n_epochs: int) -> str:
    """The outcome of QAT for one line of output."""
    kept = f"epoch {result.epoch} of {n_epochs}" if result.epoch else "the calibrated weights, which no epoch beat"
    best = next(row for row in result.history if (row["lr"], row["epoch"]) == (result.lr, result.epoch))
    near = f", divergence from float {best['val_divergence']:.4f}" if "val_divergence" in best else ""
    return f"validation {result.val_accuracy:.1%}{near}; kept {kept}"


def _choices(context: TrainContext) -> dict[str, Any]:
    """Why calibration chose what it did, out of the checkpoint that every recipe begins with."""
    saved = read_checkpoint(context.work / CALIBRATED)
    return saved[0]["choices"] if saved is not None else {}


def calibrated(job: Job) -> tuple[FixedPointNet, dict[str, float]]:
    """Calibrate on training images, on the CPU; or read back what an interrupted run had calibrated. The net, and each tensor's sigma."""
    dataset, context, config = job.dataset, job.context, job.config
    plan = plan_of(job.classifier.cpu(), config.quant.profile, config.quant.residual)
    file = context.work / CALIBRATED
    saved = read_checkpoint(file)
    if saved is not None:
        net = FixedPointNet(plan, profile=config.quant.profile, per_channel=config.quant.granularity == "channel").eval()
        restore(net, under_prefix("net", saved[1]))
        _put_norms(plan, under_prefix("norm", saved[1]))
        return net, saved[0]["sigmas"]
    images = torch.from_numpy(subset([dataset.train], context.preprocessing, config.quant.calibration_images, config.seed))
    beyond = shifted_images(config.quant.headroom, dataset, context.preprocessing, config.quant.calibration_images, config.seed)
    with context.task(f"calibrate on {len(images)} images", n_advances(plan, config.quant)) as advance:
        shifted = None if beyond is None else torch.from_numpy(beyond)
        net, sigmas, choices = calibrate_explained(plan, images, config.quant, advance, shifted)
    if context.accelerator.is_main_process:
        tensors = with_prefix("net", state_of(net)) | with_prefix("norm", _norms(plan))
        write_checkpoint(file, {"sigmas": sigmas, "choices": choices}, tensors)
    context.accelerator.wait_for_everyone()
    return net, sigmas


def _norms(plan: Plan) -> dict[str, Tensor]:
    """Statistics of the folded batch norms, which equalisation has scaled together with the weights."""
    return {step.name: step.norm for step in plan.weighted() if isinstance(step, ConvStep) and step.norm is not None}


def _put_norms(plan: Plan, norms: dict[str, Tensor]) -> None:
    for step in plan.weighted():
        if isinstance(step, ConvStep) and step.norm is not None:
            step.norm = norms[step.name]
