"""A bench in words: cells, the table, and the sentences that say what it means and how it was measured."""

from collections.abc import Callable, Sequence

from edgeft.bench.numbers import Cost
from edgeft.bench.results import BenchReport, Row
from edgeft.report import SplitResult
from edgeft.show import size
from edgeft.show_formats import aligned

NOTHING = "-"
NEAR = 0.03
"""Medians that differ by less than this share are not told apart."""
_FRONT = {"id": "ID", "ood": "OOD"}


def points(share: float | None) -> str:
    """A share in percent."""
    return NOTHING if share is None else f"{100 * share:.1f}"


def accuracy(split: SplitResult | None) -> str:
    """In percent with its interval: "89.5 [87.4, 91.3]"."""
    return NOTHING if split is None else f"{points(split.top1)} [{points(split.interval[0])}, {points(split.interval[1])}]"


def mean_ood(row: Row) -> str:
    """The same of mean OOD."""
    spread = row.scored and row.scored.mean_ood_interval
    if row.scored is None or not spread:
        return NOTHING
    return f"{points(row.scored.result.mean_ood)} [{points(spread[0])}, {points(spread[1])}]"


def times(factor: float | None) -> str:
    """How many times as fast."""
    return NOTHING if factor is None else f"{factor:.2f}"


def milliseconds(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def in_float(row: Row) -> str:
    """What computes in float."""
    if row.in_float is None:
        return "all of it" if row.status == "timed" else NOTHING
    return f"FELL BACK: {len(row.in_float)}" if row.in_float else "nothing"


Column = tuple[str, Callable[[Row], str]]
"""Head of a column, and the cell of a row."""
NAMES: tuple[Column, ...] = (("run", lambda row: row.run), ("model", lambda row: row.label))
SPEED: tuple[Column, ...] = (
    ("median ms", lambda row: milliseconds(row.latency.median_ms) if row.latency else NOTHING),
    ("p95 ms", lambda row: milliseconds(row.latency.p95_ms) if row.latency else NOTHING),
    ("images/s", lambda row: f"{row.images_per_s:,.0f}" if row.images_per_s else NOTHING),
    ("x fp32", lambda row: times(row.speed_to_float)),
    ("x static", lambda row: times(row.speed_to_static)),
    ("file", lambda row: size(row.file_bytes) if row.file_bytes else NOTHING),
    ("peak memory", lambda row: size(row.peak_bytes) if row.peak_bytes else NOTHING),
    ("in float", in_float),
    ("front", lambda row: " ".join(_FRONT[kind] for kind in row.front) or NOTHING),
)
"""Speeds are to ONNX Runtime's float32 and static int8."""
ACCURACY: tuple[Column, ...] = (
    ("ID % [95 %]", lambda row: accuracy(row.scored.id if row.scored else None)),
    ("mean OOD % [95 %]", mean_ood),
    ("ID cost", lambda row: row.id_cost.text if row.id_cost else NOTHING),
    ("OOD cost", lambda row: row.ood_cost.text if row.ood_cost else NOTHING),
)
"""Costs are points against the float model."""


def head(threads: int, batch: int) -> str:
    """What a group of rows has in common."""
    return f"{threads} thread{'s' if threads > 1 else ''}, batch {batch}"


def grouped(report: BenchReport) -> list[tuple[str, list[Row]]]:
    """Rows that may be compared with one another, under a heading; those that were not timed are not in it."""
    return [
        (head(*group), [row for row in report.rows if (row.threads, row.batch) == group and row.status == "timed"])
        for group in report.groups
    ]


def cells(columns: Sequence[Column], rows: Sequence[Row]) -> list[list[str]]:
    """The head, then a line of cells for each row; without what is the same run in all of them."""
    shown = [column for column in columns if column[0] != "run" or len({row.run for row in rows}) > 1]
    return [[name for name, _ in shown], *([cell(row) for _, cell in shown] for row in rows)]


def table(report: BenchReport) -> str:
    """All of it as text."""
    parts = []
    for title, rows in grouped(report):
        parts.append(f"{title}\n{aligned(cells((*NAMES, *SPEED, *ACCURACY), rows))}")
    untimed = [f"{row.run}: {row.label}: {row.problem}" for row in report.rows if row.status != "timed"]
    parts += ["\n".join(dict.fromkeys(untimed))] if untimed else []
    unknown = [f"{row.run}: {row.label}: accuracy {row.not_scored}" for row in report.rows if row.status == "timed" and not row.scored]
    parts += ["\n".join(dict.fromkeys(unknown))] if unknown else []
    parts.append("\n".join(summary(report)))
    parts.append(f"{report.machine.place}; load {report.machine.load} before, {report.load_after} after")
    return "\n\n".join(parts)


def summary(report: BenchReport) -> list[str]:
    """What a person should take away, the most important first."""
    return [*verdict(report), *best(report), *costs(report), *fallbacks(report), *busy(report)]


def verdict(report: BenchReport) -> list[str]:
    """Whether the gate and the comparison with the interpreter passed."""
    if report.failures:
        return [f"FAILED: {reason}" for reason in report.failures]
    compared = [row.n_verified for row in report.rows if row.status == "timed" and row.n_verified]
    found = [] if report.max_drop is None else [f"Passed: no fixed-point model is more than {report.max_drop:g} points below float."]
    if compared:
        n = min(compared)
        found.append(f"Before they were timed, all fixed-point models gave the interpreter's logits on all of {n} golden images.")
    return found


def best(report: BenchReport) -> list[str]:
    """Which artifact is best at what, in the first group of threads and batch."""
    if not report.groups:
        return ["Nothing was timed."]
    title, rows = grouped(report)[0]
    found = [
        _best(rows, f"Fastest ({title})", lambda row: 1 / row.latency.median_ms if row.latency else None, _speed, NEAR),
        _best(rows, "Most accurate in distribution", lambda row: row.scored.id.top1 if row.scored and row.scored.id else None, _id),
        _best(rows, "Most accurate out of distribution", lambda row: row.scored.result.mean_ood if row.scored else None, _ood),
        _best(rows, "Smallest file", lambda row: -row.file_bytes if row.file_bytes else None, lambda row: size(row.file_bytes or 0)),
        _best(rows, "Least memory", lambda row: -row.peak_bytes if row.peak_bytes else None, lambda row: size(row.peak_bytes or 0)),
    ]
    return [line for line in found if line]


def _best(rows: Sequence[Row], title: str, value: Callable[[Row], float | None], text: Callable[[Row], str], near: float = 0.0) -> str:
    """The row with the highest value, and those that come as near to it as that share, the best first. Of one row alone nothing is said."""
    known = sorted(((found, row) for row in rows if (found := value(row)) is not None), key=lambda pair: -pair[0])
    if len(known) < 2:
        return ""
    winners = [row for found, row in known if known[0][0] - found <= near * abs(found)]
    alike = f", within {100 * near:g} % of one another" if near and len(winners) > 1 else ""
    return f"{title}{alike}: {', '.join(name(row, rows) for row in winners)}: {text(winners[0])}."


def name(row: Row, rows: Sequence[Row]) -> str:
    """A row in a sentence; with its run where there are several."""
    return row.label if len({each.run for each in rows}) == 1 else f"{row.label} of '{row.run}'"


def _speed(row: Row) -> str:
    assert row.latency is not None
    against = f", {row.speed_to_float:.2f} times as fast as float32 in ONNX Runtime" if row.speed_to_float else ""
    return f"{milliseconds(row.latency.median_ms)} ms at the median, {milliseconds(row.latency.p95_ms)} ms at the 95th percentile{against}"


def _id(row: Row) -> str:
    split = row.scored and row.scored.id
    return f"{accuracy(split)} %, n = {split.n:,}" if split else ""


def _ood(row: Row) -> str:
    splits = [split for split in row.scored.result.splits if split.kind == "ood"] if row.scored else []
    return f"{mean_ood(row)} % as the mean of {len(splits)} shifted sets, n = {sum(split.n for split in splits):,}"


def costs(report: BenchReport) -> list[str]:
    """What 8 bits cost each model in points; once for what has the same numbers, as several runtimes of one file have."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in report.rows:
        if row.form != "float" and row.id_cost:
            names = found.setdefault((row.run, _cost(row.id_cost, row.ood_cost)), [])
            if row.label not in names:
                names.append(row.label)
    several = len(report.runs) > 1
    return [f"Cost of 8 bits{f' in {run!r}' if several else ''}, {', '.join(names)}: {text}." for (run, text), names in found.items()]


def _cost(id_cost: Cost, ood_cost: Cost | None) -> str:
    known = [each for each in (id_cost, ood_cost) if each]
    words = [f"{where} {each.text} points" for where, each in zip(("in distribution", "out of distribution"), known, strict=False)]
    lost = [each for each in known if each.high < 0]
    return ", ".join(words) + (
        "" if lost else ", a loss that these images do not show for certain" if min(e.points for e in known) < 0 else ""
    )


def fallbacks(report: BenchReport) -> list[str]:
    """What was meant to be integer and computes in float, or that nothing does."""
    integer = [row for row in report.rows if row.status == "timed" and row.form != "float"]
    fell = {f"{row.label} of '{row.run}': {', '.join(row.in_float or ())}" for row in integer if row.fell_back}
    if not integer:
        return []
    return [f"Fell back to float: {line}." for line in sorted(fell)] or ["No 8-bit model fell back to float anywhere."]


def busy(report: BenchReport) -> list[str]:
    """A warning where other programs had the processor."""
    load = max(report.machine.load, report.load_after)
    if load <= report.machine.n_cores:
        return []
    return [f"The machine was busy (load {load:g} on {report.machine.n_cores} cores): trust ratios more than milliseconds."]


def notes(report: BenchReport) -> list[str]:
    """How everything was measured."""
    several = len(report.runs) > 1
    origins = [(f"'{run.name}': " if several else "") + run.peers for run in report.runs if run.peers]
    return [
        f"Latency is of one call with a whole batch of image bytes in memory: median and 95th percentile over {report.n_rounds} rounds of "
        f"{report.n_calls} calls, after {report.n_calls} untimed ones. A round runs all models once, in a new random order, so that heat "
        "and other programs hit all alike.",
        "Speeds (x fp32, x static) are to ONNX Runtime's float32 and static int8 of the same run: the median over rounds of the ratio "
        "within a round.",
        "float32 and static int8 are given normalised floats and are not charged for normalising; edgeft's models take bytes.",
        "ORT static int8 is onnxruntime.quantization.quantize_static (QDQ, per channel, U8S8, min-max)"
        + (f"; {'; '.join(origins)}." if origins else "."),
        "file: the ONNX file; of PyTorch the weights, of C the constants that it is compiled with.",
        "Peak memory is the resident memory of a fresh process that opens the model and runs it, Python and libraries included.",
        "Accuracy is top-1 in percent of exactly the file that was timed, with 95 % Wilson intervals; that of mean OOD takes the shifted "
        "sets as given.",
        "Costs are differences to the float model on the same images, in points, with paired 95 % intervals (bootstrap). Changed answers "
        "that the difference does not explain count half as lost and half as gained: intervals are rather too wide than too narrow.",
        "front: no other model with the same threads and batch is at least as fast and at least as accurate (ID, or mean OOD).",
    ]
