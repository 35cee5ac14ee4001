"""report.html: one file that a person can read, on any screen, in light or dark, without network and without scripts."""

import importlib.resources
from collections.abc import Sequence
from html import escape

from edgeft.bench.plots import Plot, inline_svg, plots
from edgeft.bench.results import BenchReport, Row, RunInfo
from edgeft.bench.text import ACCURACY, NAMES, NOTHING, SPEED, accuracy, cells, grouped, mean_ood, notes, points, summary

MOST_NAMES = 4
"""Of runs in the title."""
_WORDS = ("run", "model", "in float", "front", "accuracy from", "runtime", "why", "computes in float")
"""Heads of columns that hold words; numbers stand to the right."""
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>edgeft bench</title>
<style>
{style}</style>
</head>
<body>
<main>
"""


def page(report: BenchReport) -> str:
    """The whole page."""
    style = importlib.resources.files("edgeft.bench").joinpath("report.css").read_text(encoding="utf-8")
    body = [_top(report), _results(report), *_figures(report), *_details(report)]
    return "\n".join([_HEAD.replace("{style}", style), *body, "</main>\n</body>\n</html>\n"])


def _top(report: BenchReport) -> str:
    names = ", ".join(run.name for run in report.runs) if len(report.runs) <= MOST_NAMES else f"{len(report.runs)} runs"
    items = "\n".join(f'<li class="{_tone(line)}">{escape(line)}</li>' for line in summary(report))
    return (
        f"<h1>edgeft bench: {escape(names)}</h1>\n"
        f'<p class="soft">{escape(report.date)}; {escape(report.machine.place)}; load {report.machine.load} before, {report.load_after} '
        f'after</p>\n<ul class="summary">\n{items}\n</ul>'
    )


def _tone(line: str) -> str:
    if line.startswith(("FAILED", "Fell back")):
        return "bad"
    return "good" if line.startswith("Passed") else "plain"


def _results(report: BenchReport) -> str:
    parts = ["<h2>Speed and size</h2>"]
    for title, rows in grouped(report):
        parts += [f"<h3>{escape(title)}</h3>", _table(*_split(cells((*NAMES, *SPEED), rows)))]
    parts += ["<h2>Accuracy</h2>", _table(*_split(cells((*NAMES, *ACCURACY), _once(report))))]
    untimed = list(dict.fromkeys((row.run, row.label, row.problem) for row in report.rows if row.status != "timed"))
    if untimed:
        parts += ["<h2>Not timed</h2>", _table(["run", "model", "why"], untimed)]
    return "\n".join(parts)


def _split(lines: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    return lines[0], lines[1:]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls inside its box where the screen is narrower; a column of one and the same run is left out."""
    if heads[0] == "run" and len({row[0] for row in rows}) < 2:
        heads, rows = heads[1:], [row[1:] for row in rows]
    classes = [_class(name) for name in heads]
    top = "".join(f"<th{given}>{escape(name)}</th>" for given, name in zip(classes, heads, strict=True))
    lines = ["".join(f"<td{given}>{escape(cell)}</td>" for given, cell in zip(classes, row, strict=True)) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _class(head: str) -> str:
    if head in ("why", "computes in float"):
        return ' class="words wrap"'
    return ' class="words"' if head in _WORDS else ""


def _figures(report: BenchReport) -> list[str]:
    """Plots of all runs together; those of a run come with its details."""
    return ["<h2>Plots</h2>", *(_figure(plot) for plot in plots(report) if not plot.run)]


def _figure(plot: Plot) -> str:
    panels = "\n".join(f"<figure>{inline_svg(plot, index)}</figure>" for index in range(len(plot.panels)))
    return f'<h3>{escape(plot.title)}</h3>\n<div class="figures">\n{panels}\n</div>'


def _details(report: BenchReport) -> list[str]:
    parts = ["<h2>Accuracy of every set</h2>", _splits(report), "<h2>What was run</h2>", _artifacts(report)]
    for run in report.runs:
        parts += [f"<h2>Run {escape(run.name)}</h2>", _run(run), *(_figure(plot) for plot in plots(report) if plot.run == run.name)]
    parts += ["<h2>How it was measured</h2>", "<ul>", *(f"<li>{escape(line)}</li>" for line in notes(report)), "</ul>"]
    machine = {"machine": report.machine.place, "date": report.date} | report.versions
    return [*parts, "<h2>Hardware and versions</h2>", _pairs(machine)]


def _once(report: BenchReport) -> list[Row]:
    """One row for each run and backend that was timed."""
    return list({(row.run, row.backend): row for row in report.rows if row.status == "timed"}.values())


def _splits(report: BenchReport) -> str:
    labels = report.split_labels
    rows = []
    for row in _once(report):
        found = [row.scored.result.split(label) if row.scored else None for label in labels]
        flips = [split.flip_rate for split in found if split and split.flip_rate is not None]
        changed = points(sum(flips) / len(flips)) if flips else NOTHING
        rows.append([row.run, row.label, *map(accuracy, found), mean_ood(row), changed])
    counts = {split.label: split.n for row in _once(report) if row.scored for split in row.scored.result.splits}
    heads = ["run", "model", *(f"{label}, n = {counts[label]:,}" for label in labels), "mean OOD", "changed answers %"]
    return _table(heads, rows)


def _artifacts(report: BenchReport) -> str:
    heads = ["run", "model", "runtime", "digest", "compared images", "accuracy from", "computes in float"]
    rows = []
    for row in _once(report):
        origin = row.scored.source if row.scored else row.not_scored
        floats = "all of it, as meant" if row.in_float is None else ", ".join(row.in_float) or "nothing"
        rows.append([row.run, row.label, row.runtime, row.digest[:12], str(row.n_verified or NOTHING), origin, floats])
    return _table(heads, rows)


def _run(run: RunInfo) -> str:
    return _pairs({"path": run.path, "digest": run.digest, "classes": str(run.classes)} | run.recipe)


def _pairs(values: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in values.items()) + "</dl>"
