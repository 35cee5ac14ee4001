"""Suite shapes-methods: LP, FT and LP-FT in float on the embedded data set, over seeds that were used for nothing else.

Everything is the product's own: data, classifier, stages, training, evaluation. Learning rate, penalty and epoch are selected on the
split `val` (in distribution); the test splits are measured once.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.record import Machine, write
from edgeft.config import Config, build_config
from edgeft.data import Dataset
from edgeft.data.loading import ImageCache, load_dataset
from edgeft.errors import ConfigError
from edgeft.evaluate import evaluate
from edgeft.methods import METHODS, Stage
from edgeft.methods.baselines import epochs_of
from edgeft.methods.run import run_stages
from edgeft.models import Classifier, build_classifier
from edgeft.pipeline import FloatModel
from edgeft.progress import Progress
from edgeft.report import EvalReport, ModelResult
from edgeft.train import TrainContext, make_accelerator

SUITE = "shapes-methods"
LP, FT, LPFT = "LP", "FT", "LP-FT"
SEEDS = (40, 41, 42, 43, 44)
"""Fresh: nothing was tuned on them."""

Load = Callable[[Config], Dataset]


@dataclass(frozen=True)
class Outcome:
    """One method on one seed: accuracy per split, and the stage that chose last."""

    seed: int
    method: str
    result: ModelResult
    chosen: dict[str, Any]

    @property
    def top1(self) -> dict[str, float]:
        """Percent on ID, every OOD split and in the OOD mean."""
        shares = {split.label: split.top1 for split in self.result.splits} | {"mean OOD": self.result.mean_ood}
        return {label: 100 * share for label, share in shares.items() if share is not None}

    @property
    def rate(self) -> str:
        """The learning rate or, of a probe, the penalty that validation chose."""
        return f"{self.chosen['lr']:g}" if "lr" in self.chosen else f"penalty {self.chosen['penalty']:g}"

    def to_json(self) -> dict[str, Any]:
        """Counts with their intervals, and what was chosen."""
        report = EvalReport((self.result,)).to_json()["models"][0]
        return {"seed": self.seed, "method": self.method, "chosen": self.chosen, "report": report}


def measure_seed(config: Config, dataset: Dataset, progress: Progress) -> list[Outcome]:
    """All three methods on one seed. LP is LP-FT before its second stage: the same probe of the same features."""
    probe, *rest = _stages(config, "lpft")
    if [probe] != _stages(config, "lp"):
        raise ConfigError("the first stage of 'lpft' is not the probe of 'lp', so LP cannot be measured on the way")
    with tempfile.TemporaryDirectory() as folder:
        classifier = _classifier(config, dataset)
        context = _context(config, dataset, classifier, Path(folder) / "lpft", progress)
        outcomes = [_outcome(LP, classifier, [probe], dataset, context), _outcome(LPFT, classifier, rest, dataset, context)]
        fresh = _classifier(config, dataset)
        context = _context(config, dataset, fresh, Path(folder) / "ft", progress, context.cache)
        outcomes.insert(1, _outcome(FT, fresh, _stages(config, "ft"), dataset, context))
    return outcomes


def _stages(config: Config, method: str) -> list[Stage]:
    stages: list[Stage] = METHODS.get(method).stages(config)
    return stages


def _classifier(config: Config, dataset: Dataset) -> Classifier:
    return build_classifier(config.model, config.data, len(dataset.classes), dataset.size, config.seed)


def _context(
    config: Config, dataset: Dataset, classifier: Classifier, work: Path, progress: Progress, cache: ImageCache | None = None
) -> TrainContext:
    return TrainContext(
        make_accelerator(config), config.seed, config.train.batch, config.train.accumulate, work, progress, classifier.preprocessing,
        dataset.augment, config.data.workers, cache or ImageCache(config.data.cache_mb),
    )  # fmt: skip


def _outcome(method: str, classifier: Classifier, stages: list[Stage], dataset: Dataset, context: TrainContext) -> Outcome:
    record = run_stages(classifier, stages, dataset, context)[-1]["result"]
    result, _ = evaluate(
        FloatModel(classifier), dataset, context.preprocessing, float_predictions=None, progress=context.progress, cache=context.cache
    )
    chosen = {key: value for key, value in record.items() if key in ("lr", "penalty", "epoch", "val_accuracy")}
    return Outcome(context.seed, method, ModelResult(method, result.splits), chosen)


def rows_of(outcomes: Sequence[Outcome]) -> tuple[list[list[str]], int]:
    """Table rows in percent: summary of each method and of the paired difference LP-FT - FT, then every seed; and how many are summary."""
    by_method = {method: [o for o in outcomes if o.method == method] for method in (LP, FT, LPFT)}
    seeds = [outcome.seed for outcome in by_method[LPFT]]
    labels = list(by_method[LPFT][0].top1)
    differences = [
        {label: lpft.top1[label] - ft.top1[label] for label in labels} for ft, lpft in zip(by_method[FT], by_method[LPFT], strict=True)
    ]
    pair = f"{LPFT} - {FT}"
    summary = [
        [method, f"{len(seeds)}", *(_spread([o.top1[label] for o in found]) for label in labels), ""] for method, found in by_method.items()
    ]
    summary.append([pair, f"{len(seeds)}", *(_spread([d[label] for d in differences], sign="+") for label in labels), ""])
    rows = [[o.method, f"seed {o.seed}", *(f"{o.top1[label]:.1f}" for label in labels), o.rate] for o in outcomes]
    rows += [[pair, f"seed {seed}", *(f"{d[label]:+.1f}" for label in labels), ""] for seed, d in zip(seeds, differences, strict=True)]
    return summary + rows, len(summary)


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and sample standard deviation; one value has none."""
    return f"{mean(values):{sign}.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def run(seeds: Sequence[int], out: Path, *, sets: Sequence[str] = (), progress: Progress, load: Load = load_dataset) -> Path:
    """Measure every seed and write the result file. `sets` are configuration keys, as of `edgeft train-quantize --set`.

    Raises ConfigError for wrong keys, before anything is trained.
    """
    configs = [build_config(flags={"seed": seed}, sets=list(sets)) for seed in seeds]
    machine, outcomes = Machine.look(torch.get_num_threads()), []
    sizes: dict[str, int] = {}
    for number, config in enumerate(configs, 1):
        progress.line(f"{SUITE}: seed {config.seed} ({number} of {len(configs)})")
        dataset = load(config)
        sizes = {split.name: len(split) for split in (dataset.train, dataset.val, *dataset.tests)}
        found = measure_seed(config, dataset, progress)
        for outcome in found:
            progress.line(f"  {outcome.method}: " + ", ".join(f"{label} {value:.1f}" for label, value in outcome.top1.items()))
        outcomes += found
    rows, n_lead_rows = rows_of(outcomes)
    labels = list(outcomes[0].top1)
    return write(
        out, machine, suite=SUITE, title="Methods on shapes, float", columns=("method", "seeds", *labels, "chosen"), rows=rows,
        notes=_notes(configs[0], outcomes, sizes), options={"seeds": list(seeds), "config": configs[0].model_dump(mode="json")},
        n={"seeds": len(seeds), **sizes}, measurements=[outcome.to_json() for outcome in outcomes], n_lead_rows=n_lead_rows,
    )  # fmt: skip


def _notes(config: Config, outcomes: Sequence[Outcome], sizes: dict[str, int]) -> list[str]:
    pairs = list(zip(*([o for o in outcomes if o.method == method] for method in (FT, LPFT)), strict=True))
    wins = sum(lpft.top1["mean OOD"] > ft.top1["mean OOD"] for ft, lpft in pairs)
    grids = "; ".join(f"{name} {_grid(_stages(config, method)[-1])}" for name, method in ((LP, "lp"), (FT, "ft"), (LPFT, "lpft")))
    widest = max(high - low for outcome in outcomes for low, high in [split.interval for split in outcome.result.splits])
    counts = ", ".join(f"{name} {n}" for name, n in sizes.items())
    return [
        "Top-1 in percent, mean ± standard deviation over seeds; each seed draws its own classes, images, order and head.",
        f"Images per seed: {counts}; no 95 % interval of a single cell is wider than {100 * widest:.1f} points.",
        f"Backbone {config.model.backbone}; {epochs_of(config)} epochs per learning rate, batch {config.train.batch}. Tried: {grids}. "
        "Learning rate, penalty and epoch are those with the best accuracy on the ID split val.",
        f"Of {len(pairs)} paired seeds {LPFT} is above {FT} in mean OOD in {wins}.",
        "A constructed demonstration: the backbone was pretrained on other classes over all these domains.",
    ]


def _grid(stage: Stage) -> str:
    return "/".join(f"{value:g}" for value in asdict(stage)["penalties" if stage.solver == "lbfgs" else "learning_rates"])
