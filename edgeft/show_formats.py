"""The number formats of a run in words: a table of every operation, and a plot of fractions over layers."""

from collections.abc import Sequence
from typing import Any

from edgeft.graph import Conv, IntegerGraph, Linear, Op, op_inputs

WEIGHT, ACTIVATION, BOTH = "w", "a", "*"
"""Marks of the plot."""
COLUMNS = (
    "#", "layer", "operation", "input", "weight", "output", "shift", "accumulator bits", "weight sigma", "output sigma", "chosen by",
    "weight error %", "output error %",
)  # fmt: skip


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def format_table(graph: IntegerGraph, formats: dict[str, Any]) -> str:
    """One row per operation, numbered as in the plot; columns that say nothing for any operation are left out.

    `formats` is the content of formats.json: what the choice was made from, and the relative error at the chosen fraction and its
    neighbours where that was measured. Accumulator bits are what the widest sum needs, proven from the integer weights.
    """
    rows = [_row(number, graph, op, formats) for number, op in enumerate(graph.ops, 1)]
    used = [index for index in range(len(COLUMNS)) if any(row[index] for row in rows)]
    return aligned([[row[index] for index in used] for row in (COLUMNS, *rows)])


def _row(number: int, graph: IntegerGraph, op: Op, formats: dict[str, Any]) -> tuple[str, ...]:
    layer = formats.get("layers", {}).get(op.output, {})
    activation = formats.get("activations", {}).get(op.output, {})
    inputs = " ".join(str(graph.format(name)) for name in op_inputs(op))
    weight = bits = weight_error = ""
    if isinstance(op, Conv | Linear):
        weight = _span([f"w8.{frac}" for frac in sorted(set(op.weight_frac))])
        bits = str(graph.accumulator_bound(op).bit_length() + 1)
        weight_error = _errors(layer, min(op.weight_frac))
    reason = " / ".join(dict.fromkeys(entry.get("reason") or formats.get("rule", "") for entry in (layer, activation) if entry))
    return (
        str(number), op.output, type(op).__name__, inputs, weight, str(graph.format(op.output)),
        _span([str(value) for value in sorted(set(graph.shift(op).tolist()))]), bits, _number(layer.get("weight_sigma")),
        _number(activation.get("sigma")), reason, weight_error, _errors(activation, graph.format(op.output).frac),
    )  # fmt: skip


def _errors(entry: dict[str, Any], frac: int) -> str:
    """Relative error at a fraction, with those of the coarser and the finer neighbour: "0.41 (-1: 0.80, +1: 1.20)".

    Of a layer with a format for each channel, the mean over channels, each at its own fraction.
    """
    found = {int(key) - frac: float(value) for key, value in entry.get("alternatives", {}).items()}
    found = found or {int(key): float(value) for key, value in entry.get("alternatives_by_change", {}).items()}
    if 0 not in found:
        return ""
    beside = ", ".join(f"{step:+d}: {100 * found[step]:.2f}" for step in (-1, 1) if step in found)
    return f"{100 * found[0]:.2f}" + (f" ({beside})" if beside else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _span(values: list[str]) -> str:
    return values[0] if len(values) == 1 else f"{values[0]} ... {values[-1]}"


def format_plot(graph: IntegerGraph) -> str:
    """Fractions over layers, the finest at the top: one column for each operation that computes codes or has weights.

    A layer with formats for each output channel marks all that it uses. Logits, which keep their accumulator, have no mark.
    """
    columns = [marks for op in graph.ops if (marks := _marks(graph, op)) is not None]
    fracs = [frac for _, marks in columns for frac in marks]
    lines = [f"fractions by layer: {WEIGHT} weights, {ACTIVATION} output, {BOTH} both; numbers are those of the table"]
    for frac in range(max(fracs), min(fracs) - 1, -1):
        lines.append(f"{frac:4} |{''.join(marks.get(frac, ' ') for _, marks in columns)}".rstrip())
    numbers = [number for number, _ in columns]
    width = len(str(numbers[-1]))
    lines += [f"     +{'-' * len(columns)}"]
    lines += [f"      {''.join(str(number).rjust(width)[digit] for number in numbers)}".rstrip() for digit in range(width)]
    return "\n".join(lines)


def _marks(graph: IntegerGraph, op: Op) -> tuple[int, dict[int, str]] | None:
    """Number of an operation and its mark at each fraction; None where it only moves codes."""
    weights = set(op.weight_frac) if isinstance(op, Conv | Linear) else set()
    fmt = graph.format(op.output)
    moves = not weights and all(graph.format(name) == fmt for name in op_inputs(op))
    if moves:
        return None
    marks = dict.fromkeys(weights, WEIGHT)
    if fmt.width == 8:
        marks[fmt.frac] = BOTH if fmt.frac in weights else ACTIVATION
    return graph.ops.index(op) + 1, marks
