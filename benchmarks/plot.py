"""The plot of a result: accuracy against latency, ID and mean OOD side by side, one row of panels for each data set; as SVG.

What is drawn is in the result. Its digest stands in the SVG's metadata, which tells whether a file is stale: its bytes also depend on
the version of matplotlib.
"""

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeft.bench.numbers import front

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL = (4.6, 3.4)
"""Inches of one panel."""
_COLOURS = ("#c9851a", "#d1495b", "#2f7fd0", "#2aa198", "#7a6ff0", "#6aa84f", "#b56bc2", "#8a8a8a")
_MARKS = ("s", "^", "o")
_OTHER = "."
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "edgeft", "axes.grid": True, "axes.spines.top": False, "axes.spines.right": False,
    "font.size": 8, "axes.titlesize": 9, "grid.linewidth": 0.4, "grid.color": "#dddddd", "path.simplify": True,
}  # fmt: skip


def digest(data: Mapping[str, Any]) -> str:
    """Of everything that is drawn."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def svg(data: Mapping[str, Any]) -> str:
    """An SVG image of `data`: "title", "methods" that have a mark of their own, and "rows" of panels ("title" and "points").

    A point has "form" (which gives its colour), "method" (its mark), "ms", "percent" and "spread" (standard deviation, 0 for none).
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = data["rows"]
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(PANEL[0] * 2, PANEL[1] * len(rows) + 0.7), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(len(rows), 2, squeeze=False)
        forms = list(dict.fromkeys(point["form"] for row in rows for panel in row for point in panel["points"]))
        colours = {form: _COLOURS[number % len(_COLOURS)] for number, form in enumerate(forms)}
        marks = dict(zip(data["methods"], _MARKS, strict=False))
        for line, row in zip(axes, rows, strict=True):
            for one, panel in zip(line, row, strict=True):
                _panel(one, panel, colours, marks)
        _legend(figure, colours, marks)
        figure.suptitle(data["title"], fontsize=10)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Description": digest(data)})
    return text.getvalue()


def _panel(axes: "Axes", panel: Mapping[str, Any], colours: Mapping[str, str], marks: Mapping[str, str]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    points = panel["points"]
    places = [(point["ms"], point["percent"]) for point in points]
    edge = sorted(place for place, keeps in zip(places, front(places), strict=True) if keeps)
    axes.plot([x for x, _ in edge], [y for _, y in edge], drawstyle="steps-post", linewidth=0.8, color="#444444", zorder=1)
    for form, colour in colours.items():
        ours = [point for point in points if point["form"] == form]
        _marks(axes, [point for point in ours if point["method"] not in marks], fmt=_OTHER, color=colour, markersize=3)
        for method, mark in marks.items():
            drawn = [point for point in ours if point["method"] == method]
            _marks(axes, drawn, [point["spread"] for point in drawn], fmt=mark, color=colour, markersize=5)
    axes.set_xscale("log")
    low, high = min(x for x, _ in places), max(x for x, _ in places)
    axes.set_xlim(low * 0.8, high * 1.25)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if math.log10(high / low) < 1 else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("median latency, ms")
    axes.set_ylabel("top-1, %")
    axes.set_title(panel["title"])


def _marks(axes: "Axes", points: Sequence[Mapping[str, Any]], spread: Sequence[float] | None = None, **style: Any) -> None:
    """Points with their spread, where one is given, as a bar."""
    axes.errorbar([point["ms"] for point in points], [point["percent"] for point in points], spread, linewidth=0.6, **style)


def _legend(figure: Any, colours: Mapping[str, str], marks: Mapping[str, str]) -> None:
    """Colours say the form, marks the method."""
    from matplotlib.lines import Line2D

    entries = [Line2D([], [], marker="o", linestyle="none", color=colour, label=form) for form, colour in colours.items()]
    entries += [Line2D([], [], marker=mark, linestyle="none", color="#444444", label=method) for method, mark in marks.items()]
    entries.append(Line2D([], [], marker=_OTHER, linestyle="none", color="#444444", label="other methods"))
    entries.append(Line2D([], [], linewidth=0.8, color="#444444", label="front of what is measured"))
    figure.legend(handles=entries, loc="outside lower center", ncols=4, frameon=False, fontsize=7)
