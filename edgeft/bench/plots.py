"""Plots of a bench, as files and as SVG for its page; matplotlib is imported when something is drawn."""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.bench.results import BenchReport, Row, RunInfo
from edgeft.bench.text import head
from edgeft.report import SplitResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (4.4, 4.0)
"""Inches of one panel: about as wide as a phone's screen."""
_DPI = 150
_SHORT_LABEL = 28
"""Characters of a label of which two fit beside one another."""
_STYLES = {
    "torch": ("#8a8a8a", "s"), "ort-float": ("#c9851a", "D"), "ort-static": ("#d1495b", "v"), "onnx": ("#2f7fd0", "o"),
    "openvino": ("#2aa198", "^"), "tensorrt": ("#6aa84f", "P"), "cuda": ("#b56bc2", "X"),
}  # fmt: skip
_OTHER_STYLE = ("#7a6ff0", "*")
"""Colour and mark of a backend; readable on white and on near black."""
_ID, _OOD = "#2f7fd0", "#d1495b"


@dataclass(frozen=True)
class Plot:
    """A figure of panels, each drawn on axes of its own: side by side in a file, one below the other on a narrow page.

    `run` is the name of the run that it is about, empty where it is about all.
    """

    name: str
    title: str
    panels: tuple[Callable[["Axes"], None], ...]
    size: tuple[float, float] = PANEL
    run: str = ""


def plots(report: BenchReport) -> list[Plot]:
    """Everything that there are numbers for."""
    found = [plot for threads, batch in report.groups for plot in _trade(report, threads, batch)]
    scored = [row for row in _artifacts(report) if row.scored and row.scored.id and row.scored.result.mean_ood is not None]
    if scored:
        found.append(Plot("id-ood", "In distribution against out of distribution", (partial(_scatter, rows=scored),)))
    for run in report.runs:
        found += _run_plots(run, [row for row in _artifacts(report) if row.run == run.name])
    return found


def _trade(report: BenchReport, threads: int, batch: int) -> list[Plot]:
    rows = [row for row in report.rows if (row.threads, row.batch) == (threads, batch) and row.latency and row.scored]
    if not rows:
        return []
    panels = tuple(partial(_trade_panel, rows=rows, kind=kind) for kind in ("id", "ood") if any(_share(row, kind) for row in rows))
    return [Plot(f"accuracy-latency-{threads}t-b{batch}", f"Accuracy and latency, {head(threads, batch)}", panels)]


def _run_plots(run: RunInfo, rows: list[Row]) -> list[Plot]:
    name = re.sub(r"[^\w.-]+", "-", run.name)
    found = []
    if run.formats:
        size = PANEL[0], max(2.5, 0.2 * len(run.formats) + 1.4)
        found.append(Plot(f"formats-{name}", f"Fractions of the formats of '{run.name}'", (partial(_formats, run=run),), size, run.name))
    if run.saturation:
        size = PANEL[0] + 0.6, max(2.5, 0.2 * len(run.saturation["tensors"]) + 1.4)
        panels = (partial(_heat, document=run.saturation),)
        found.append(Plot(f"saturation-{name}", f"Saturated values of '{run.name}'", panels, size, run.name))
    scored = [row for row in rows if row.scored and row.scored.reliability]
    kinds = [kind for kind in ("id", "ood") if any(row.scored and kind in row.scored.reliability for row in scored)]
    if kinds:
        both = tuple(partial(_reliability, rows=scored, kind=kind) for kind in kinds)
        found.append(Plot(f"reliability-{name}", f"Reliability of '{run.name}'", both, run=run.name))
    return found


def _artifacts(report: BenchReport) -> list[Row]:
    """One row for each run and backend."""
    return list({(row.run, row.backend): row for row in report.rows if row.status == "timed"}.values())


def style(row: Row) -> tuple[str, str]:
    """Colour and mark of a row's backend."""
    return _STYLES.get(row.backend, _OTHER_STYLE)


def _share(row: Row, kind: str) -> tuple[float, float, float] | None:
    """Accuracy in percent with the ends of its interval."""
    if row.scored is None:
        return None
    split: SplitResult | None = row.scored.id
    value = row.scored.result.mean_ood if kind == "ood" else split.top1 if split else None
    spread = row.scored.mean_ood_interval if kind == "ood" else split.interval if split else None
    return None if value is None or spread is None else (100 * value, 100 * spread[0], 100 * spread[1])


def _trade_panel(axes: "Axes", rows: list[Row], kind: str) -> None:
    known = [(row, row.latency.median_ms, share) for row in rows if row.latency and (share := _share(row, kind))]
    edge = sorted((ms, share[0]) for row, ms, share in known if kind in row.front)
    axes.plot([x for x, _ in edge], [y for _, y in edge], drawstyle="steps-post", linewidth=1, color=axes.xaxis.label.get_color())
    for row, ms, share in known:
        _point(axes, row, ms, share)
    axes.set_xscale("log")
    _plain_log_ticks(axes)
    axes.set_xlabel("median latency, ms")
    axes.set_ylabel("top-1, %")
    axes.set_title("in distribution" if kind == "id" else "out of distribution (mean)")
    _legend(axes)


def _point(axes: "Axes", row: Row, x: float, share: tuple[float, float, float]) -> None:
    colour, mark = style(row)
    value, low, high = share
    spread = [[value - low], [high - value]]
    # Three markers apart: an 8-bit model that fell back to float is drawn hollow.
    face = "none" if row.fell_back else colour
    label = row.label + (" (fell back to float)" if row.fell_back else "")
    axes.errorbar([x], [value], spread, fmt=mark, color=colour, markerfacecolor=face, markersize=6, linewidth=0.8, capsize=2, label=label)


def _scatter(axes: "Axes", rows: list[Row]) -> None:
    for row in rows:
        shares = [share for kind in ("id", "ood") if (share := _share(row, kind))]
        (x, y), (across, up) = [value for value, _, _ in shares], [[[value - low], [high - value]] for value, low, high in shares]
        colour, mark = style(row)
        axes.errorbar([x], [y], up, across, fmt=mark, color=colour, markersize=6, linewidth=0.6, capsize=2, label=row.label)
    ends = [share for row in rows for kind in ("id", "ood") if (share := _share(row, kind))]
    low, high = min(each[1] for each in ends) - 1, min(100.0, max(each[2] for each in ends) + 1)
    axes.plot([low, high], [low, high], linestyle=":", linewidth=1, color=axes.xaxis.label.get_color())
    axes.set_xlabel("in distribution, %")
    axes.set_ylabel("mean out of distribution, %")
    axes.set_title("dotted: no loss under shift")
    _legend(axes)


def _formats(axes: "Axes", run: RunInfo) -> None:
    """A bar from the smallest to the largest fraction of a layer's weights, and a mark for its output's."""
    names = [name for name, _, _ in run.formats]
    for index, (_, weights, output) in enumerate(run.formats):
        axes.barh(index, max(weights[-1] - weights[0], 0) + 0.5, left=weights[0] - 0.25, height=0.7, color=_ID, label="weights")
        if output is not None:
            axes.plot([output], [index], marker="D", markersize=4, linestyle="none", color=_OOD, label="output")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("fraction bits (more: finer steps, smaller range)")
    _legend(axes)


def _heat(axes: "Axes", document: dict[str, Any]) -> None:
    """Share of values past either end of the format, in percent: layers down, splits across."""
    from matplotlib.colors import LogNorm

    labels, tensors = list(document["images"]), document["tensors"]
    shares = [[100 * (entry["splits"][label]["top"] + entry["splits"][label]["bottom"]) for label in labels] for entry in tensors.values()]
    highest = max((value for line in shares for value in line), default=0.0)
    norm = LogNorm(1e-4, max(highest, 1e-2), clip=True)
    image = axes.imshow(shares, aspect="auto", cmap="magma", norm=norm, interpolation="nearest")
    axes.set_xticks(range(len(labels)), labels, rotation=40, ha="right", fontsize=7)
    names = [name + (" (clip)" if entry["clip"] else "") for name, entry in tensors.items()]
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.grid(visible=False)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.6, format="{x:g}")
    bar.ax.tick_params(labelsize=7)
    bar.set_label("% of values, 0.0001 or less is black", fontsize=7)


def _reliability(axes: "Axes", rows: list[Row], kind: str) -> None:
    axes.plot([0, 100], [0, 100], linestyle=":", linewidth=1, color=axes.xaxis.label.get_color())
    curves = [(row, row.scored.reliability[kind]) for row in rows if row.scored and kind in row.scored.reliability]
    for row, found in curves:
        filled = [(100 * confidence, 100 * right) for n, confidence, right in found.bins if n]
        colour, mark = style(row)
        label = f"{row.label}, ECE {100 * found.ece:.1f} %"
        axes.plot([x for x, _ in filled], [y for _, y in filled], marker=mark, markersize=4, linewidth=1, color=colour, label=label)
    n = max(found.n for _, found in curves)
    axes.set_xlabel("confidence, %")
    axes.set_ylabel("right, %")
    axes.set_title(f"{'in distribution' if kind == 'id' else 'out of distribution'}, n = {n:,}")
    _legend(axes)


def _legend(axes: "Axes") -> None:
    """Below the axes, where it hides nothing; one entry for each label, in two columns where they fit."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    columns = 2 if max(map(len, unique), default=0) <= _SHORT_LABEL else 1
    axes.figure.legend(list(unique.values()), list(unique), fontsize=8, ncols=columns, loc="outside lower center", frameon=False)


def _plain_log_ticks(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


@contextmanager
def _drawn(panels: tuple[Callable[["Axes"], None], ...], size: tuple[float, float], settings: dict[Any, Any]) -> Iterator["Figure"]:
    """A figure with the panels side by side. Drawn without pyplot, which would choose a backend for the whole process."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({**_SETTINGS, **settings}):
        figure = Figure(figsize=(size[0] * len(panels), size[1]), layout="constrained")
        FigureCanvasAgg(figure)
        # A part of its own for each panel, so that each has its legend below it.
        for part, draw in zip(figure.subfigures(1, len(panels), squeeze=False)[0], panels, strict=True):
            axes = part.add_subplot()
            axes.set_axisbelow(True)
            draw(axes)
        yield figure


_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "edgeft", "axes.grid": True, "axes.spines.top": False, "axes.spines.right": False,
    "font.size": 9, "axes.titlesize": 10, "grid.linewidth": 0.5,
}  # fmt: skip


def _colours(ink: str, paper: str, line: str) -> dict[Any, Any]:
    return {
        "text.color": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink, "axes.edgecolor": ink, "grid.color": line,
        "figure.facecolor": paper, "axes.facecolor": paper,
    }  # fmt: skip


def write_plots(report: BenchReport, folder: Path) -> list[Path]:
    """Each plot as <name>.png and <name>.svg; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for plot in plots(report):
        with _drawn(plot.panels, plot.size, _colours("#222222", "#ffffff", "#dddddd")) as figure:
            figure.suptitle(plot.title)
            for suffix in ("png", "svg"):
                file = folder / f"{plot.name}.{suffix}"
                figure.savefig(file, dpi=_DPI, metadata={"Date": None} if suffix == "svg" else None)
                written.append(file)
    return written


_INK, _PAPER, _LINE = "#010203", "#fcfdfe", "#d3d4d5"
"""Stand for the page's colours, which follow the reader's choice of light or dark."""
_VARIABLES = {_INK: "var(--ink)", _PAPER: "var(--card)", _LINE: "var(--line)"}


def inline_svg(plot: Plot, panel: int) -> str:
    """One panel as an <svg> element for an HTML page: in the page's colours, without anything that is loaded from elsewhere."""
    text = io.StringIO()
    settings = {**_colours(_INK, _PAPER, _LINE), "svg.hashsalt": f"{plot.name}-{panel}"}  # ids must differ between the plots of a page
    with _drawn((plot.panels[panel],), plot.size, settings) as figure:
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{escape(plot.title)}">', svg, count=1)
    used = set(re.findall(r"#([\w.-]+)", svg))  # groups have ids that nothing refers to, the same ones in every plot
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg
