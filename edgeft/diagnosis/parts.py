"""Effective robustness on a part of the shifted images: in the reference's support, out of it, or all.

A line of its own belongs to each part: "Ask Your Distribution Shift" finds the effective robustness of pretrained nets out of support, and
next to none in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeft.diagnosis.effective import EffectiveRobustness, Point, against, fit_line
from edgeft.diagnosis.effective_text import points as in_points
from edgeft.errors import DataError
from edgeft.show_formats import aligned

Hits = NDArray[np.bool_]
"""One flag per labelled image: whether a model is right."""


@dataclass(frozen=True)
class PartRobustness:
    """A part of the shifted images, how many of it have a label, and models against the line there; or why there is none."""

    part: str
    n: int
    found: EffectiveRobustness | None
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"part": self.part, "n": self.n, "why": self.why, **(self.found.to_json() if self.found else {"line": None, "models": []})}


def part_robustness(
    baselines: Mapping[str, tuple[Hits, Hits]], models: Mapping[str, tuple[Hits, Hits]], outside: NDArray[np.bool_]
) -> tuple[PartRobustness, ...]:
    """Models against baselines, each given by its hits on the labelled reference images and on the labelled shifted ones.

    `outside` says which of the latter are out of the reference's support.
    """
    parts = (("shifted", np.ones(len(outside), bool)), ("in support", ~outside), ("out of support", outside))
    return tuple(_part(name, baselines, models, chosen) for name, chosen in parts)


def _part(
    name: str, baselines: Mapping[str, tuple[Hits, Hits]], models: Mapping[str, tuple[Hits, Hits]], chosen: NDArray[np.bool_]
) -> PartRobustness:
    n = int(chosen.sum())
    if n == 0:
        return PartRobustness(name, 0, None, "no labelled images")
    line_points, own = ([_point(label, *hits, chosen) for label, hits in family.items()] for family in (baselines, models))
    try:
        return PartRobustness(name, n, against(fit_line(line_points), own))
    except DataError as error:
        return PartRobustness(name, n, None, error.message)


def _point(name: str, ref: Hits, shift: Hits, chosen: NDArray[np.bool_]) -> Point:
    return Point(name, float(ref.mean()), float(shift[chosen].mean()), len(ref), int(chosen.sum()))


def render(parts: Sequence[PartRobustness]) -> list[str]:
    """A table of all parts; accuracies in percent, differences in points. Warnings come under it."""
    rows = [["part", "n", "model", "reference %", "part %", "expected %", "effective robustness, points [95 %]"]]
    warnings: list[str] = []
    for part in parts:
        if part.found is None:
            rows.append([part.part, str(part.n), "-", "-", "-", "-", part.why])
            continue
        for model in part.found.models:
            shares = [f"{100 * share:.1f}" for share in (model.point.id, model.point.ood, model.expected)]
            low, high = model.interval
            value = f"{in_points(model.effective)} [{in_points(low)}, {in_points(high)}]"
            rows.append([part.part, str(part.n), model.point.name, *shares, value])
        warnings += [f"warning: {part.part}: {text}" for text in part.found.warnings]
    return [*aligned(rows).splitlines(), *warnings]
