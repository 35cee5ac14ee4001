"""The timm backbones that are known to lower: each was lowered and compared code for code, see tests/backbones. No torch."""

import csv
from importlib import resources
from typing import NamedTuple

TABLE = "backbones.csv"


class ProvenBackbone(NamedTuple):
    """A network that was lowered with random weights, and whose training graph and integers then agreed on every tensor."""

    name: str
    family: str
    """timm's module that defines it."""
    pixels: int
    """Side of the square images it was compared on; most networks take others, too."""
    parameters_m: float
    """Millions of parameters, with a head for 10 classes."""
    layers: int
    """Convolutions and linear layers after folding, without constant ones."""
    operators: int
    """Integer operations in all."""

    @property
    def summary(self) -> str:
        """One line for lists."""
        return f"{self.family}: {self.parameters_m:.1f} M parameters, {self.layers} layers"


def proven_backbones() -> tuple[ProvenBackbone, ...]:
    """All of them, sorted by family and name."""
    lines = resources.files("edgeft.quant").joinpath(TABLE).read_text(encoding="utf-8").splitlines()
    rows = [ProvenBackbone(r[0], r[1], int(r[2]), float(r[3]), int(r[4]), int(r[5])) for r in list(csv.reader(lines))[1:]]
    return tuple(sorted(rows, key=lambda row: (row.family, row.name)))
