"""Sentences below the tables of the suite edge-cpu: how it was measured, which papers' orderings hold here, and what is missing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from benchmarks.edge_cpu_cells import Cell
from edgeft.artifact import Artifact
from edgeft.config import Config
from edgeft.methods.baselines import epochs_of
from edgeft.report import wilson

Top1 = Mapping[Cell, Mapping[str, float]]
"""Percent by split and "mean OOD" of float cells."""
ID, OOD = "id", "mean OOD"
HOLDS, UNDECIDED, FAILS = (
    "Orderings of the papers that hold here in every seed", "Orderings that hold on average but not in every seed",
    "Orderings that do NOT reproduce here",
)  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """A paper's finding: `better` is above `worse` in accuracy on `where`."""

    better: str
    worse: str
    where: str
    paper: str


KUMAR, SGD, LI, WISE, BANG, SOUP = (
    "Kumar et al. 2022", "Kumar et al., arXiv:2211.09359", "Li et al. 2018", "Wortsman et al., arXiv:2109.01903", "Lin et al. 2024",
    "Wortsman et al., arXiv:2203.05482",
)  # fmt: skip
CLAIMS = (
    Claim("lp", "ft", OOD, KUMAR), Claim("lpft", "ft", OOD, KUMAR), Claim("lpft", "lp", OOD, KUMAR), Claim("ft", "lp", ID, KUMAR),
    Claim("lpft", "ft", ID, KUMAR), Claim("l2sp", "ft", ID, LI), Claim("freeze", "lpft", OOD, SGD), Claim("wise", "lpft", OOD, WISE),
    Claim("bang", "wise", OOD, BANG), Claim("soup", "lpft", ID, SOUP),
)  # fmt: skip
"""Averages over the data sets of the papers; of the other methods none claims to be more accurate in a setting like this one."""


def about_methods(
    data: str, top1: Top1, nets: Mapping[Cell, Artifact], configs: Mapping[Cell, Config], lacking: Sequence[str]
) -> list[str]:
    """Notes below a table of methods."""
    cell = next(iter(nets))
    config, counts = configs[cell], nets[cell].document("training.json")["images"]
    images = ", ".join(f"{name} {n}" for name, n in counts.items())
    intervals = [wilson(round(found[name] * n / 100), n) for found in top1.values() for name, n in counts.items() if name in found]
    widest = 100 * max(high - low for low, high in intervals)
    layers = next((configs[cell].train.layers for cell in configs if cell.method == "surgical"), ())
    return [
        "Top-1 and ECE (15 bins; OOD: mean over the sets) in percent, mean ± standard deviation over seeds. A seed draws the split of the "
        f"ID images, their order and the head; OOD images are the same for all. 95 % intervals of single cells are up to {widest:.1f} "
        f"points wide; chance is {100 / len(nets[cell].manifest.classes):.1f}.",
        f"{config.model.backbone}, ImageNet weights, {config.data.size} px; images: {images}. {epochs_of(config)} epochs at each learning "
        f"rate of the method's own grid, batch {config.train.batch}. Learning rate, penalty, epoch, share and members of averages are "
        f"chosen on the ID split val; surgical trains {', '.join(layers)}.",
        *orderings(data, top1),
        *lacking,
    ]


def orderings(data: str, top1: Top1) -> list[str]:
    """Which claims hold on a data set, over the seeds that both methods have: in every one, not even on average, or neither."""
    texts: dict[str, list[str]] = {HOLDS: [], UNDECIDED: [], FAILS: []}
    for claim in CLAIMS:
        seeds = [cell.seed for cell in top1 if (cell.data, cell.method) == (data, claim.better)]
        pairs = [(Cell(data, claim.better, seed), Cell(data, claim.worse, seed)) for seed in seeds]
        gains = [top1[one][claim.where] - top1[other][claim.where] for one, other in pairs if other in top1]
        if gains:
            verdict = HOLDS if min(gains) > 0 else UNDECIDED if mean(gains) > 0 else FAILS
            texts[verdict].append(_ordering(claim, gains))
    return [f"{verdict} (points, paired by seed): {'; '.join(found)}." for verdict, found in texts.items() if found]


def _ordering(claim: Claim, gains: Sequence[float]) -> str:
    spread = f" ± {stdev(gains):.1f}" if len(gains) > 1 else ""
    where = "ID" if claim.where == ID else claim.where
    n_seeds = f"{sum(gain > 0 for gain in gains)} of {len(gains)} seeds"
    return f"{claim.better} over {claim.worse} in {where} {mean(gains):+.1f}{spread} ({n_seeds}; {claim.paper})"


def about_eight_bit(configs: Mapping[Cell, Config], lacking: Sequence[str]) -> list[str]:
    """Notes below a table of 8-bit forms."""
    quant = next(iter(configs.values())).quant
    return [
        "Differences in points on the same images, with 95 % bootstrap intervals over images, each drawn with all seeds and methods that "
        "were measured on it (mean OOD: unweighted over the sets); they do not say what other seeds would give. Flips: images whose class "
        "differs from the float net's.",
        "ORT static: onnxruntime.quantization.quantize_static, U8S8, min-max, float scales per channel, no training. Brevitas QAT: its "
        "stock quantizers, float scales per channel learned by gradient, float biases, no deployable file. edgeft: power-of-two formats, "
        "integers only, equal to the interpreter code by code. All from the same float net and calibration images; the last three train "
        f"on labels with the same data order and rate for {quant.qat_epochs} epochs; the calibrated start competes on val and wins ties. "
        "They train on where a short float training ended, which can bring them above float.",
        *lacking,
    ]


def about_latency(times: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Notes below the table of latencies."""
    records = list(times.values())
    rounds, calls = records[0]["key"]["rounds"], records[0]["key"]["calls"]
    loads = ", ".join(f"{record['load']} ({record['date']})" for record in records)
    return [
        f"One image, {records[0]['key']['threads']} thread; {rounds} interleaved rounds in random order of {calls} calls after as many "
        f"untimed ones; ratios are medians over rounds. Load at start {loads}. All methods have the same net, so that one stands for all.",
        "Exported files were first compared with the interpreter, the float one with PyTorch. edgeft takes bytes and normalises them "
        "itself; the other two are given normalised floats. kB: the file, or in C the constants. C is the freestanding bundle, built here. "
        "Brevitas QAT has no deployable file and therefore no latency.",
    ]


def missing_cells(data: str, forms: Sequence[str], configs: Mapping[Cell, Config], found: Mapping[Cell, object]) -> list[str]:
    """One sentence that names every cell of a data set in these forms that is not recorded; none where all are."""
    cells = [cell for cell in configs if cell.data == data]
    absent: dict[str, str] = {}
    for form in forms:
        text = _absent([cell for cell in cells if cell.form == form], lambda cell: cell in found)
        if text:
            absent[form] = text
    grouped: dict[str, list[str]] = {}
    for form, text in absent.items():
        grouped.setdefault(text, []).append(form)
    listed = "; ".join(f"{', '.join(forms)} of {text}" for text, forms in grouped.items())
    return [f"Not measured yet: {listed}."] if listed else []


def _absent(cells: Sequence[Cell], known: Callable[[Cell], bool]) -> str:
    """Methods with a missing seed; the seeds are named where others of the method are there."""
    seeds: dict[str, list[int]] = {cell.method: [] for cell in cells}
    for cell in cells:
        if not known(cell):
            seeds[cell.method].append(cell.seed)
    n = {method: sum(cell.method == method for cell in cells) for method in seeds}
    parts = [
        method if len(missing) == n[method] else f"{method} (seed{'s' * (len(missing) > 1)} {', '.join(map(str, missing))})"
        for method, missing in seeds.items()
        if missing
    ]  # fmt: skip
    return ", ".join(parts)
