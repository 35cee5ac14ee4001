"""An artifact in words: what `edgeft show` and the end of a run print."""

from typing import Any

from edgeft.artifact import Artifact, is_finished
from edgeft.graph import Conv, IntegerGraph, Linear, Op, op_inputs
from edgeft.report import render

_RECIPE = (
    "data.source",
    "data.ood",
    "model.backbone",
    "model.weights",
    "train.method",
    "quant.profile",
    "quant.format",
    "quant.granularity",
)


def size(n_bytes: int) -> str:
    """Bytes as "312 B", "4.5 kB" or "1.2 MB" (powers of 1000)."""
    if n_bytes < 1000:
        return f"{n_bytes} B"
    return f"{n_bytes / 1000:.1f} kB" if n_bytes < 1_000_000 else f"{n_bytes / 1_000_000:.1f} MB"


def one_line(artifact: Artifact) -> str:
    """Path, kind and size."""
    return f"{artifact.path} ({artifact.manifest.kind}, {size(artifact.size_bytes)})"


def describe(artifact: Artifact) -> str:
    """Everything a person asks about an artifact: recipe, origin, versions, exports and, where it was measured, accuracy."""
    manifest = artifact.manifest
    rows = [("created", manifest.created), ("digest", artifact.digest[:16]), ("parent", manifest.parent[:16] if manifest.parent else "")]
    rows += [(key, _text(_dig(manifest.config, key))) for key in _RECIPE]
    rows += [("seed", str(manifest.seed)), ("classes", f"{len(manifest.classes)}: {_shorten(manifest.classes)}")]
    rows += [("image", ", ".join(f"{key} {_text(value)}" for key, value in manifest.preprocessing.items()))]
    rows += [("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))]
    rows += [("exports", ", ".join(exports(artifact)))]
    lines = [one_line(artifact), *(f"  {key:17} {value}" for key, value in rows if value)]
    if "report.json" in manifest.files:
        lines += ["", render(artifact.report())]
    return "\n".join(lines)


def exports(artifact: Artifact) -> list[str]:
    """Names of the finished exports inside a run."""
    folder = artifact.path / "export"
    return sorted(entry.name for entry in folder.iterdir() if is_finished(entry)) if folder.is_dir() else []


def to_json(artifact: Artifact) -> dict[str, Any]:
    """The same for machines: manifest, digest, exports and, where there are any, formats and report."""
    manifest = artifact.manifest
    tree: dict[str, Any] = {"path": str(artifact.path), "digest": artifact.digest, "exports": exports(artifact)}
    tree["manifest"] = {**vars(manifest), "classes": list(manifest.classes)}
    for key, name in (("formats", "formats.json"), ("report", "report.json")):
        if name in manifest.files:
            tree[key] = artifact.document(name)
    return tree


def format_table(graph: IntegerGraph) -> str:
    """One row per operation: its formats, how far its accumulator is shifted, and the bits the accumulator needs at most."""
    rows: list[tuple[str, ...]] = [("layer", "operation", "input", "weight", "output", "shift", "accumulator bits")]
    rows += [_format_row(graph, op) for op in graph.ops]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _format_row(graph: IntegerGraph, op: Op) -> tuple[str, ...]:
    inputs = " ".join(str(graph.format(name)) for name in op_inputs(op))
    weight = bits = ""
    if isinstance(op, Conv | Linear):
        weight = _span([f"w8.{frac}" for frac in sorted(set(op.weight_frac))])
        bits = str(graph.accumulator_bound(op).bit_length() + 1)
    shift = _span([str(value) for value in sorted(set(graph.shift(op).tolist()))])
    return op.output, type(op).__name__, inputs, weight, str(graph.format(op.output)), shift, bits


def _span(values: list[str]) -> str:
    return values[0] if len(values) == 1 else f"{values[0]} ... {values[-1]}"


def _dig(tree: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return tree.get(section, {}).get(name)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(map(_text, value)) if isinstance(value, list | tuple) else "" if value is None else str(value)


def _shorten(names: tuple[str, ...], most: int = 10) -> str:
    return " ".join(names[:most]) + (" ..." if len(names) > most else "")
