"""An EvaluationReport as text: aligned tables, shares in percent with their 95 % intervals, differences in points."""

from collections.abc import Sequence

from edgeft.evaluation.corruptions import MAIN
from edgeft.evaluation.metrics import Share
from edgeft.evaluation.results import EvaluationReport, Interval, ModelEvaluation, SetResult
from edgeft.evaluation.saturating import ID
from edgeft.progress import duration

NONE = "-"
LAYERS = 10
"""How many activations are named as those that saturate most out of distribution."""


def render(report: EvaluationReport) -> str:
    """Every table that has content, each under a line that says what it shows, then the notes."""
    reference = report.models[0].model
    blocks = [
        (f"Accuracy (95 % Wilson intervals; differences against '{reference}' with 95 % bootstrap intervals)", _sets(report)),
        ("Calibration (15 equal-width bins; T fitted on the validation split, for each model)", _calibration(report)),
        ("Groups", _groups(report)),
        (f"Corruptions of the ID test set: {report.corruptions}", _corruptions(report)),
        ("", _corruption_summary(report)),
        ("Telling the ID test set from other sets (ID positive)", _detection(report)),
        ("Answers that stay when the ID test images move by 1 ... 8 pixels, %", _shifts(report)),
        ("Other resize filters (Pillow), against the run's own preprocessing", _resizes(report)),
        ("Movement by fine-tuning (mean distance of the head's input to that before, also as a share of its norm)", _movement(report)),
        ("Saturation of the fixed-point activations, mean over those without a clip of their own, %", _saturation(report)),
        ("Activations that saturate more out of distribution, the largest excess first (all: --json)", _saturated(report)),
    ]
    text = [part for title, rows in blocks if rows for part in ([title] if title else []) + [_aligned(rows), ""]]
    return "\n".join([f"run {report.run}", "", *text, *_speed(report), *(f"note: {line}" for line in report.notes)]).rstrip()


def _speed(report: EvaluationReport) -> list[str]:
    found = report.speed
    if found is None or not found.views:
        return []
    made = f"corruptions made by {found.workers} processes" if found.workers else "without worker processes"
    return [f"speed: {found.views:,} answers in {duration(found.seconds)}, {found.views_per_s:,.0f} views/s ({made})"]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def percent(value: float) -> str:
    """A fraction as "93.1"."""
    return f"{100 * value:.1f}"


def share(value: Share | None) -> str:
    """As "93.1 [91.0, 94.8]"; an asterisk where there are too few images."""
    if value is None:
        return NONE
    low, high = value.interval
    return f"{percent(value.value)} [{percent(low)}, {percent(high)}]{'*' if value.too_small else ''}"


def interval(value: Interval | None) -> str:
    """As "-0.4 [-1.1, +0.3]"."""
    return NONE if value is None else f"{value.points:+.1f} [{value.low:+.1f}, {value.high:+.1f}]"


def _label(found: SetResult) -> str:
    return found.name if found.kind == "id" else f"ood:{found.name}"


def _sets(report: EvaluationReport) -> list[list[str]]:
    rows = [["set", "n", "model", "top-1 %", "top-5 %", "macro-F1 %", "difference", "McNemar p", "flips %", "right -> wrong"]]
    for model in report.models:
        for found in model.sets:
            against = found.against
            compared = [NONE] * 4
            if against is not None:
                flips = against.flips
                compared = [interval(against.top1), f"{against.mcnemar_p:.2g}", percent(flips.rate), f"{flips.negative}/{flips.n}"]
            name = _label(found) + (f" ({found.permitted_answers} answers)" if found.permitted_answers != report.n_classes else "")
            rows.append([name, str(found.top1.n), model.model, share(found.top1), share(found.top5), percent(found.macro_f1), *compared])
        if model.mean_ood is not None:
            rows.append(["mean OOD", "", model.model, percent(model.mean_ood), *[""] * 6])
    return rows


def _calibration(report: EvaluationReport) -> list[list[str]]:
    rows = [["set", "model", "T", "ECE %", "ECE % at T", "NLL", "NLL at T", "Brier", "Brier at T"]]
    for model in report.models:
        for found in model.sets:
            before, after = found.calibration, found.calibrated
            cells = [percent(before.ece), NONE if after is None else percent(after.ece)]
            for name in ("nll", "brier"):
                cells += [f"{getattr(before, name):.3f}", NONE if after is None else f"{getattr(after, name):.3f}"]
            rows.append([_label(found), model.model, _temperature(model), *cells])
    return rows


def _temperature(model: ModelEvaluation) -> str:
    if model.temperature is None:
        return NONE
    return f"{model.temperature:.2f}" + (" (bound)" if model.temperature_at_bound else "")


def _groups(report: EvaluationReport) -> list[list[str]]:
    rows = [["set", "group", "n", "model", "top-1 %", ""]]
    for model in report.models:
        for found in model.sets:
            worst = found.worst_group
            for name, value in found.groups.items():
                mark = "worst group" if worst is not None and worst[0] == name else ""
                rows.append([_label(found), name, str(value.n), model.model, share(value), mark])
    return rows if len(rows) > 1 else []


def _corruptions(report: EvaluationReport) -> list[list[str]]:
    levels = report.settings["severities"]
    rows = [["corruption", "model", *(f"{level}" for level in levels), "mean %", "cost", "flips %"]]
    for model in report.models:
        for found in model.corruptions:
            flips = NONE
            if found.flips:
                flips = percent(sum(one.rate for one in found.flips.values()) / len(found.flips))
            name = found.corruption + ("" if found.corruption in MAIN else " (extra)")
            cells = [percent(found.severities[level].value) for level in levels]
            rows.append([name, model.model, *cells, percent(1 - found.error), interval(found.cost), flips])
    return rows if len(rows) > 1 else []


def _corruption_summary(report: EvaluationReport) -> list[list[str]]:
    rows = []
    for model in report.models:
        if model.mean_corruption_error is None:
            continue
        text = f"{model.model}: mean error over the main corruptions, not normalised, {percent(model.mean_corruption_error)} %"
        relative = report.relative_corruption_error(model)
        if model is not report.models[0] and relative is not None:
            text += f"; relative to '{report.models[0].model}' {percent(relative)} %"
        rows.append([text + _worst(model)])
    return rows


def _worst(model: ModelEvaluation) -> str:
    named = ", ".join(f"{found.corruption} {interval(found.cost)}" for found in model.worst())
    return f"; costs most on {named}" if named else ""


def _detection(report: EvaluationReport) -> list[list[str]]:
    rows = [["set", "holds", "n ID", "n", "model", "score", "AUROC %", "FPR@95 %"]]
    for model in report.models:
        for found in model.detection:
            about = [found.name, found.kind, str(found.n_id), str(found.n_ood), model.model]
            rows += [[*about, name, percent(found.auroc[name]), percent(found.fpr95[name])] for name in found.auroc]
    return rows if len(rows) > 1 else []


def _shifts(report: EvaluationReport) -> list[list[str]]:
    rows = [["model", "n", *(str(found.pixels) for found in report.models[0].shifts)]]
    for model in report.models:
        if model.shifts:
            rows.append([model.model, str(model.shifts[0].same.n), *(percent(found.same.value) for found in model.shifts)])
    return rows if len(rows) > 1 else []


def _resizes(report: EvaluationReport) -> list[list[str]]:
    rows = [["filter", "n", "model", "top-1 %", "flips %", "right -> wrong"]]
    for model in report.models:
        for found in model.resizes:
            flips = found.flips
            rows.append([found.filter, str(flips.n), model.model, share(found.top1), percent(flips.rate), f"{flips.negative}/{flips.n}"])
    return rows if len(rows) > 1 else []


def _movement(report: EvaluationReport) -> list[list[str]]:
    """One row for each set, features in the order of the sets, then the head."""
    found = report.movement
    if found is None:
        return []
    inside = next((one.moved.relative for one in found.sets if one.kind == "id"), 0.0)
    rows = [["of", "n", "distance", "share %", "OOD / ID"]]
    for one in found.sets:
        ratio = f"{one.moved.relative / inside:.2f}" if one.kind == "ood" and inside else NONE
        name = one.name if one.kind == "id" else f"ood:{one.name}"
        rows.append([f"features, {name}", str(one.n), f"{one.moved.distance:.3g}", percent(one.moved.relative), ratio])
    if found.head is not None:
        rows.append(["head, since fine-tuning began", NONE, f"{found.head.distance:.3g}", percent(found.head.relative), NONE])
    return rows


def _saturation(report: EvaluationReport) -> list[list[str]]:
    found = report.saturation
    if found is None:
        return []
    means = [found.mean(label) for label in found.images]
    rows = [["", *found.images], ["images", *map(str, found.images.values())]]
    return [*rows, ["saturated", *(NONE if mean is None else f"{100 * mean:.4f}" for mean in means)]]


def _saturated(report: EvaluationReport) -> list[list[str]]:
    rows = [["activation", "format", "% ID", "% OOD", "of set", "OOD / ID"]]
    for one in report.saturation.most_beyond(LAYERS) if report.saturation else ():
        assert one.worst is not None, "it saturates more on an OOD set"
        inside, outside = one.sets[ID].saturated, one.sets[one.worst].saturated
        ratio = f"{outside / inside:.1f}" if inside else "only OOD"
        rows.append([one.name, one.format, f"{100 * inside:.4f}", f"{100 * outside:.4f}", one.worst, ratio])
    return rows if len(rows) > 1 else []
