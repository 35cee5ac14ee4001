"""What saturates and what vanishes in a run, in words."""

from typing import Any

from edgeft.show_formats import aligned

NO_RATIO, ONLY_OOD = "-", "only OOD"


def saturation_table(document: dict[str, Any]) -> str:
    """One row for each activation: saturated values in percent by split, their OOD to ID ratio, then vanished ones likewise.

    `document` is the content of saturation.json. Where saturation is the network's own clip (ReLU6) the ratio is left out: it is no
    error. The ratio is that of the OOD split with most saturation.
    """
    labels = list(document["images"])
    head = ["activation", "format", *(f"saturated % {label}" for label in labels), "OOD / ID"]
    head += [f"underflow % {label}" for label in labels]
    rows = [_row(name, entry, labels) for name, entry in document["tensors"].items()]
    images = ", ".join(f"{label} {n}" for label, n in document["images"].items())
    return aligned([head, *rows]) + f"\nimages: {images}; underflow: share of the nonzero values that become 0"


def _row(name: str, entry: dict[str, Any], labels: list[str]) -> list[str]:
    shares = {label: entry["splits"][label] for label in labels}
    saturated = {label: share["top"] + share["bottom"] for label, share in shares.items()}
    cells = [_percent(saturated[label]) for label in labels]
    return [name, entry["format"], *cells, _ratio(entry["clip"], saturated), *(_percent(shares[label]["underflow"]) for label in labels)]


def _percent(share: float) -> str:
    return f"{100 * share:.3f}" if share else "0"


def _ratio(clip: bool, saturated: dict[str, float]) -> str:
    shifted = [share for label, share in saturated.items() if label != "id"]
    if clip:
        return "clip"
    if not shifted or max(shifted) == 0:
        return NO_RATIO
    return f"{max(shifted) / saturated['id']:.1f}" if saturated["id"] else ONLY_OOD
