"""train_quantize() and plan(): the stages in order."""

import shutil
from typing import Any

import torch

from edgeft.artifact import Artifact, claim_run, is_finished, write_artifact
from edgeft.checkpoint import read_checkpoint, state_of, under_prefix, with_prefix
from edgeft.config import Config
from edgeft.context import TrainContext, make_accelerator
from edgeft.data import Dataset
from edgeft.data.loading import ImageCache, load_dataset, subset
from edgeft.evaluate import Predictions
from edgeft.evaluate import evaluate as evaluate_runner
from edgeft.export.verify import golden, verify
from edgeft.exporting import FIXED_POINT, FLOAT, golden_images
from edgeft.interpret import Interpreter
from edgeft.layers import check_stages
from edgeft.methods import METHODS, Stage
from edgeft.methods.run import run_stages
from edgeft.models import Classifier, build_classifier
from edgeft.progress import Progress
from edgeft.quant.stage import Quantized, plan_of, quantize
from edgeft.quant.training_graph import TrainingGraph
from edgeft.report import EvalReport, ModelResult
from edgeft.runner import Images, Logits, Runner
from edgeft.train import epoch_file, kept_epochs

CHECKPOINTS = "checkpoints.safetensors"
"""Weights after some epochs of fine-tuning, in runs that keep them."""


class FloatModel:
    """Runner over the fine-tuned classifier."""

    name = FLOAT

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier.eval()
        self._device = classifier.mean.device

    def logits(self, images: Images) -> Logits:
        """Scores of a batch, float32."""
        with torch.inference_mode():
            out: Logits = self._classifier(torch.from_numpy(images).to(self._device)).float().cpu().numpy()
        return out


def plan(config: Config) -> list[str]:
    """What train_quantize would do, after checking data, backbone and every layer; writes nothing."""
    make_accelerator(config)
    dataset = load_dataset(config, Progress(False))
    classifier, stages = _prepare(config, dataset)
    steps = plan_of(classifier, config.quant.profile, config.quant.residual)
    counts = ", ".join(f"{split.name} {len(split)}" for split in (dataset.train, dataset.val, *dataset.tests))
    p = classifier.preprocessing
    lines = [
        f"data        {dataset.name}: {len(dataset.classes)} classes; images: {counts}",
        *(f"            {note}" for note in dataset.notes),
    ]
    n_parameters = sum(parameter.numel() for parameter in classifier.parameters())
    lines.append(f"backbone    {config.model.backbone}, {p.size} px {p.interpolation}, {n_parameters:,} parameters, {_origin(config)}")
    lines += [f"{stage.name:11} {_describe(stage)}" for stage in stages]
    q = config.quant
    lines.append(
        f"quantize    {len(steps.weighted())} layers, {q.recipe}; format {q.format} per {q.granularity}, profile {q.profile}, "
        f"{q.qat_epochs} epochs of QAT" + (f", loss {q.loss}" if q.qat_epochs else "")
    )
    lines.append(f"write       {config.run_dir}")
    return lines


def _origin(config: Config) -> str:
    """Where the backbone's weights come from."""
    model = config.model
    if model.weights is not None:
        return f"weights from '{model.weights}'"
    if model.pretrained:
        return "timm's pretrained weights"
    return "its own weights" if model.backbone == "edgeft_micro" else "RANDOM WEIGHTS (--pretrained or --weights FILE gives it others)"


def train_quantize(config: Config, *, resume: bool = False, progress: Progress | None = None) -> Artifact:
    """Fine-tune, quantize, lower, verify and measure; returns the artifact in `config.run_dir`.

    With `resume`, an interrupted run of the same configuration goes on where it was and ends with the same weights; a finished one
    is returned as it is. Everything that can be refused is refused before training: data, backbone, weights, layers, output
    directory (ConfigError, DataError, UnsupportedError, ArtifactError). Raises TrainingError when no learning rate converges
    and VerificationError when the interpreter and the training graph differ in any code.
    """
    progress = progress or Progress(False)
    if resume and is_finished(config.run_dir):
        claim_run(config.run_dir, config.model_dump(mode="json"), resume=True)
        return Artifact.load(config.run_dir)
    accelerator = make_accelerator(config)
    dataset = load_dataset(config, progress if accelerator.is_main_process else Progress(False))
    classifier, stages = _prepare(config, dataset)
    n_layers = len(plan_of(classifier, config.quant.profile, config.quant.residual).weighted())
    if accelerator.is_main_process:
        claim_run(config.run_dir, config.model_dump(mode="json"), resume=resume)
    accelerator.wait_for_everyone()
    context = TrainContext(
        accelerator, config.seed, config.train.batch, config.train.accumulate, config.run_dir / "work", progress,
        classifier.preprocessing, dataset.augment if config.data.augment == "auto" else config.data.augment,
        config.data.workers, ImageCache(config.data.cache_mb),
    )  # fmt: skip
    for note in dataset.notes:
        context.say(note)
    records = run_stages(classifier, stages, dataset, context)
    checkpoints = _checkpoints(records, context)
    float_state = {name: tensor.detach().cpu().numpy() for name, tensor in state_of(classifier.net).items()}
    measured = _measure(FloatModel(classifier), dataset, context, None)
    context.say(f"quantize {n_layers} layers, format {config.quant.format} per {config.quant.granularity}, profile {config.quant.profile}")
    rates = [record["result"]["lr"] for record in records if "lr" in record["result"]]
    quantized = quantize(classifier, dataset, context, config, rates[-1] if rates else None)
    context.say(f"formats: {quantized.formats.summary()}")
    _verify_lowering(quantized, dataset, context, config)
    fixed = _measure(TrainingGraph(quantized.net), dataset, context, measured[1])
    report = EvalReport((measured[0], fixed[0]))
    if accelerator.is_main_process:
        _write(config, dataset, context, quantized, report, float_state, checkpoints, records, {FLOAT: measured[1], FIXED_POINT: fixed[1]})
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(context.work, ignore_errors=True)
    return Artifact.load(config.run_dir)


def _checkpoints(records: list[dict[str, Any]], context: TrainContext) -> dict[str, Any]:
    """Parameters and buffers of the net after the kept epochs of the rate that fine-tuning chose, as "EPOCH.NAME"."""
    tuned = [record for record in records if record["stage"]["solver"] == "sgd" and record["stage"]["keep_epochs"]]
    found: dict[str, Any] = {}
    for record in tuned[-1:]:
        stage, rates = record["stage"], list(record["stage"]["learning_rates"])
        folder, number = context.work / stage["name"], rates.index(record["result"]["lr"])
        for epoch in kept_epochs(stage["epochs"], stage["keep_epochs"]):
            saved = read_checkpoint(epoch_file(folder, number, epoch))
            if saved is not None:  # otherwise the rate diverged before
                found |= with_prefix(str(epoch), under_prefix("net", saved[1]))
    return {name: tensor.numpy() for name, tensor in found.items()}


def _prepare(config: Config, dataset: Dataset) -> tuple[Classifier, list[Stage]]:
    stages: list[Stage] = METHODS.get(config.train.method).stages(config)
    classifier = build_classifier(config.model, config.data, len(dataset.classes), dataset.size, config.seed)
    check_stages(classifier, stages)
    return classifier, stages


def _describe(stage: Stage) -> str:
    if stage.solver == "lbfgs":
        return f"L-BFGS, penalties {', '.join(f'{value:g}' for value in stage.penalties)}"
    if stage.solver == "wise":
        return "average of the weights before and after, shares chosen on validation"
    if stage.solver == "soup":
        return "average of the learning rates' weights, as long as validation gains"
    rates = ", ".join(f"{rate:g}" for rate in stage.learning_rates)
    if stage.solver == "flyp":
        return f"contrast with texts of CLIP {stage.clip}, SGD, {stage.epochs} epochs at each of {rates}; batch norm {stage.batch_norm}"
    usual = Stage(stage.name, "sgd", epochs=1, learning_rates=(1.0,))
    shown = ("l2sp", "freeze_k", "layers", "norms_only", "layer_decay", "ema", "label_smoothing", "mixup", "sampler")
    special = [f"; {name} {value}" for name in shown if (value := getattr(stage, name)) != getattr(usual, name)]
    return f"SGD, {stage.epochs} epochs at each of {rates}; batch norm {stage.batch_norm}{''.join(special)}"


def _measure(
    runner: Runner, dataset: Dataset, context: TrainContext, float_predictions: dict[str, Predictions] | None
) -> tuple[ModelResult, dict[str, Predictions]]:
    progress = context.progress if context.accelerator.is_main_process else Progress(False)
    return evaluate_runner(
        runner, dataset, context.preprocessing, float_predictions=float_predictions, progress=progress, cache=context.cache
    )


def _verify_lowering(quantized: Quantized, dataset: Dataset, context: TrainContext, config: Config) -> None:
    images = subset(dataset.tests, context.preprocessing, config.verify.samples, config.seed)
    with context.task(f"compare every layer on {len(images)} images", len(images)) as advance:
        interpreter, trained = Interpreter(quantized.graph), TrainingGraph(quantized.net)
        for start in range(0, len(images), 32):
            advance(verify(interpreter, trained, images[start : start + 32]))
    context.say(f"interpreter = training graph: 0 differing codes in {len(quantized.graph.tensors)} tensors on {len(images)} images")


def _write(
    config: Config, dataset: Dataset, context: TrainContext, quantized: Quantized, report: EvalReport,
    float_state: dict[str, Any], checkpoints: dict[str, Any], records: list[dict[str, Any]], predictions: dict[str, dict[str, Predictions]],
) -> None:  # fmt: skip
    images, labels = golden_images(dataset, context.preprocessing, config)
    write_artifact(
        config.run_dir, kind="quantized", config=config.model_dump(mode="json"), seed=config.seed,
        preprocessing=context.preprocessing.to_json(), classes=dataset.classes,
        arrays={
            "weights.safetensors": dict(quantized.graph.constants), "float.safetensors": float_state,
            "samples.safetensors": {**golden(quantized.graph, images), "labels": labels},
            "predictions.safetensors": {f"{model}/{split}": top for model, found in predictions.items() for split, top in found.items()},
            **({CHECKPOINTS: checkpoints} if checkpoints else {}),
        },
        documents={
            "graph.json": quantized.graph.to_json(), "formats.json": quantized.formats.to_json(),
            "saturation.json": quantized.saturation, "report.json": report.to_json(),
            "training.json": {"stages": records, "qat": quantized.record, "notes": list(dataset.notes),
                              "images": {"train": len(dataset.train), "val": len(dataset.val)}},
        },
    )  # fmt: skip
