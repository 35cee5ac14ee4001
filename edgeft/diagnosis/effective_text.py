"""Effective robustness for people: a table of models against the line, and one of what quantization cost."""

from collections.abc import Sequence

from edgeft.diagnosis.effective import EffectiveRobustness, Robustness
from edgeft.diagnosis.intervals import Interval
from edgeft.diagnosis.quantization import QuantizationEffect
from edgeft.show_formats import aligned

_VERDICTS = {"above": "more robust than expected", "on": "as expected", "below": "less robust than expected"}


def render(found: EffectiveRobustness) -> str:
    """Line, table of models, and warnings; accuracies in percent, differences in points."""
    head = ["model", "ID %", "OOD %", "expected %", "baselines' range %", "effective robustness [95 %]", ""]
    rows = [head, *(_row(model) for model in found.models)]
    return "\n".join([*_line(found), "", aligned(rows), *_warnings(found.warnings)])


def render_quantization(found: QuantizationEffect) -> str:
    """Table of runs, their mean, and the line of the float models; changes in points."""
    head = ["run", "ID change", "OOD change", "expected", "excess [95 %]"]
    rows = [
        [row.run, *map(points, (row.id_change, row.ood_change, row.expected_change)), _with(row.excess, row.interval)] for row in found.runs
    ]
    mean = f"mean excess over {len(found.runs)} runs: {_with(found.mean, found.interval)} points ({_meaning(found)})"
    title = f"'{found.model}' against the line of the float models, {found.label}"
    return "\n".join([title, *_line(found.fixed), "", aligned([head, *rows]), "", mean, *_warnings(found.warnings)])


def points(difference: float) -> str:
    """A difference of shares in points, with its sign; what rounds to nothing has none."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def _meaning(found: QuantizationEffect) -> str:
    low, high = found.interval
    if high < 0:
        return "quantization costs more under shift than its loss in distribution says"
    return "quantization costs less under shift than its loss in distribution says" if low > 0 else "no excess that these runs can show"


def _line(found: EffectiveRobustness) -> list[str]:
    line = found.line
    low, high = line.id_range
    formula = f"probit(OOD) = {line.slope:.2f} probit(ID) {'-' if line.intercept < 0 else '+'} {abs(line.intercept):.2f}"
    return [f"{len(line.points)} baselines, ID {100 * low:.1f} ... {100 * high:.1f} %: {formula}, R² {line.r2:.3f}"]


def _row(model: Robustness) -> list[str]:
    point = model.point
    low, high = model.family
    verdict = _VERDICTS[model.verdict]
    if model.verdict != "on" and not model.unlike_family:
        verdict += ", by no more than baselines scatter"
    shares = [f"{100 * share:.1f}" for share in (point.id, point.ood, model.expected)]
    family = f"{100 * low:.1f} ... {100 * high:.1f}"
    return [
        point.name,
        *shares,
        family,
        _with(model.effective, model.interval),
        verdict + (" (extrapolated)" if model.extrapolated else ""),
    ]


def _with(value: float, interval: Interval) -> str:
    return f"{points(value)} [{points(interval[0])}, {points(interval[1])}]"


def _warnings(warnings: Sequence[str]) -> list[str]:
    return ["", *(f"warning: {text}" for text in warnings)] if warnings else []
