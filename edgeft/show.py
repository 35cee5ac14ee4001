"""An artifact in words: what `edgeft show` and the end of a run print."""

from typing import Any

from edgeft.artifact import Artifact, is_finished
from edgeft.report import render
from edgeft.show_formats import format_plot, format_table
from edgeft.show_saturation import saturation_table

_RECIPE = (
    "data.source",
    "data.ood",
    "model.backbone",
    "model.weights",
    "train.method",
    "quant.recipe",
    "quant.profile",
    "quant.format",
    "quant.granularity",
    "quant.loss",
    "quant.headroom",
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
    """The same for machines: manifest, digest, exports and, where there are any, formats, saturation and report."""
    manifest = artifact.manifest
    tree: dict[str, Any] = {"path": str(artifact.path), "digest": artifact.digest, "exports": exports(artifact)}
    tree["manifest"] = {**vars(manifest), "classes": list(manifest.classes)}
    for key, name in (("formats", "formats.json"), ("saturation", "saturation.json"), ("report", "report.json")):
        if name in manifest.files:
            tree[key] = artifact.document(name)
    return tree


def formats(artifact: Artifact) -> str:
    """Table and plot of the number formats of every layer. Raises ArtifactError for an artifact without a graph."""
    graph = artifact.graph()
    return f"{format_table(graph, artifact.formats())}\n\n{format_plot(graph)}"


def saturation(artifact: Artifact) -> str:
    """Table of what saturates in and out of distribution. Raises ArtifactError for an artifact in which that was not measured."""
    return saturation_table(artifact.document("saturation.json"))


def _dig(tree: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return tree.get(section, {}).get(name)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(map(_text, value)) if isinstance(value, list | tuple) else "" if value is None else str(value)


def _shorten(names: tuple[str, ...], most: int = 10) -> str:
    return " ".join(names[:most]) + (" ..." if len(names) > most else "")
