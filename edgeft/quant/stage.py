"""The fixed-point stage of a run: calibrate, train quantized, bound, lower; each part resumable."""

from dataclasses import dataclass
from typing import Any

import torch

from edgeft.checkpoint import read_checkpoint, restore, state_of, write_checkpoint
from edgeft.config import Config
from edgeft.context import TrainContext
from edgeft.data import Dataset
from edgeft.data.loading import subset
from edgeft.errors import UnsupportedError
from edgeft.graph import IntegerGraph
from edgeft.methods import Stage
from edgeft.models import Classifier
from edgeft.quant.calibrate import calibrate
from edgeft.quant.control import FormatControl
from edgeft.quant.formats import FormatTable
from edgeft.quant.lower import enforce_bounds, format_table, lower
from edgeft.quant.net import FixedPointNet
from edgeft.quant.plan import Plan, run_float
from edgeft.quant.rescale import prepare_plan
from edgeft.train import fit

QAT_RATE = 0.1
"""Default QAT learning rate as a share of the one that fine-tuning chose."""
FALLBACK_RATE = 3e-4
"""QAT learning rate after a method without an SGD stage."""


@dataclass(frozen=True)
class Quantized:
    """Result of the stage: the training graph, the same network as integers, its formats, and how training went."""

    net: FixedPointNet
    graph: IntegerGraph
    formats: FormatTable
    record: dict[str, Any]


PLAN_TOLERANCE = 0.02
"""Largest difference between plan and network, as a share of the largest logit. Half a grey level at zero padding costs about 0.001."""


@torch.no_grad()
def plan_of(classifier: Classifier, profile: str) -> Plan:
    """The float network as a plan of fixed-point steps, compared with the network on one random image.

    Raises UnsupportedError naming the layer that has no fixed-point form, or saying that tracing missed something.
    """
    p = classifier.preprocessing
    plan = prepare_plan(classifier.net, (3, p.size, p.size), p.mean, p.std, profile)
    image = torch.randint(0, 256, (1, 3, p.size, p.size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = classifier(image.to(classifier.mean.device)).cpu()
    difference = float((run_float(plan, image) - wanted).abs().max())
    if not difference <= PLAN_TOLERANCE * float(wanted.abs().max()):
        raise UnsupportedError(
            f"the traced backbone differs from '{type(classifier.net).__name__}' by {difference:.3g} in a logit: tracing misses something",
            "see 'edgeft list backbones' for networks that are known to lower",
        )
    return plan


def quantize(classifier: Classifier, dataset: Dataset, context: TrainContext, config: Config, rate: float | None) -> Quantized:
    """Take a fine-tuned classifier to integers. `rate` is the learning rate that fine-tuning chose, None when it had none.

    Raises UnsupportedError when a format cannot hold a layer, TrainingError when QAT diverges.
    """
    net, sigmas = _calibrated(classifier, dataset, context, config)
    net.to(context.accelerator.device)
    record: dict[str, Any] = {"moves": 0}
    if config.quant.epochs > 0:
        control = FormatControl(net, config.quant, sigmas)
        result = fit(net, _stage(config, rate), dataset.train, dataset.val, context, on_step=control.before_step)
        record = {
            "moves": control.moves,
            "lr": result.lr,
            "epoch": result.epoch,
            "val_accuracy": result.val_accuracy,
            "history": result.history,
        }
        kept = f"epoch {result.epoch} of {config.quant.epochs}" if result.epoch else "the calibrated weights, which no epoch beat"
        context.say(f"qat: validation {result.val_accuracy:.1%}; kept {kept}")
    for name in enforce_bounds(net):
        context.say(f"layer '{name}': weight format coarsened to keep its accumulator exact in float32 runtimes")
    graph = lower(net)
    return Quantized(net, graph, format_table(net, graph, config.quant.format, config.quant.granularity, sigmas), record)


def _stage(config: Config, rate: float | None) -> Stage:
    chosen = config.quant.lr if config.quant.lr is not None else (rate * QAT_RATE if rate is not None else FALLBACK_RATE)
    return Stage(
        name="qat", solver="sgd", epochs=config.quant.epochs, learning_rates=(chosen,), batch_norm="frozen",
        momentum=config.train.momentum, weight_decay=config.train.weight_decay, keep_start=True,
    )  # fmt: skip


def _calibrated(classifier: Classifier, dataset: Dataset, context: TrainContext, config: Config) -> tuple[FixedPointNet, dict[str, float]]:
    """Calibrate on training images, on the CPU; or read back what an interrupted run had calibrated."""
    plan = plan_of(classifier.cpu(), config.quant.profile)
    file = context.work / "calibrated.safetensors"
    saved = read_checkpoint(file)
    if saved is not None:
        net = FixedPointNet(plan, profile=config.quant.profile, per_channel=config.quant.granularity == "channel").eval()
        restore(net, saved[1])
        return net, saved[0]["sigmas"]
    images = torch.from_numpy(subset([dataset.train], context.preprocessing, config.quant.calibration_images, config.seed))
    with context.task(f"calibrate on {len(images)} images", len(plan.steps)) as advance:
        net, sigmas = calibrate(plan, images, config.quant, advance)
    if context.accelerator.is_main_process:
        write_checkpoint(file, {"sigmas": sigmas}, state_of(net))
    context.accelerator.wait_for_everyone()
    return net, sigmas
