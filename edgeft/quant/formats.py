"""LayerFormats and FormatTable; which tensors must agree, and how far a fraction may go. No torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from edgeft.fixedpoint import FixedPointFormat

MAX_SHIFT = {False: 16, True: 17}
"""Largest right shift (by signedness of the output) at which an accumulator beyond float32's exact range saturates anyway."""

CLIP_FRAC = {"u8": 5, "s8": 4}
"""Fraction at which the top code means the (rescaled) ReLU6 bound, by profile: 255/32 or 127/16."""


def activation_format(profile: str, *, relu: bool, frac: int) -> FixedPointFormat:
    """8-bit storage of an activation: unsigned after a ReLU in profile `u8`, signed everywhere else."""
    return FixedPointFormat(8, frac, signed=not (relu and profile == "u8"))


def weight_format(frac: int) -> FixedPointFormat:
    """8-bit narrow signed weight."""
    return FixedPointFormat(8, frac, signed=True, narrow=True)


@dataclass(frozen=True)
class LayerFormats:
    """Formats around one layer with weights, and why the weight format was chosen.

    `weight` has one entry, or one for each output channel; the accumulator's fraction is frac_input + frac_weight, the bias has the same.
    """

    weight: tuple[FixedPointFormat, ...]
    input: FixedPointFormat
    output: FixedPointFormat | None
    sigma: float
    accumulator_bits: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "weight": [str(fmt) for fmt in self.weight], "input": str(self.input),
            "output": str(self.output) if self.output is not None else "logits", "weight_sigma": self.sigma,
            "accumulator_frac": [self.input.frac + fmt.frac for fmt in self.weight], "accumulator_bits": self.accumulator_bits,
        }  # fmt: skip


@dataclass(frozen=True)
class FormatTable:
    """Everything that was chosen: `rule`, per-layer formats, and each activation's format with the deviation it was chosen from.

    `choices` says for "layers" and "activations" by name why calibration chose what it did, and what the neighbours would have cost.
    """

    rule: str
    granularity: str
    layers: dict[str, LayerFormats]
    activations: dict[str, FixedPointFormat]
    sigmas: dict[str, float]
    choices: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, the content of formats.json."""
        layers, activations = self.choices.get("layers", {}), self.choices.get("activations", {})
        return {
            "rule": self.rule, "granularity": self.granularity,
            "layers": {name: layer.to_json() | layers.get(name, {}) for name, layer in self.layers.items()},
            "activations": {
                name: {"format": str(fmt), "sigma": self.sigmas.get(name)} | activations.get(name, {})
                for name, fmt in self.activations.items()
            },
        }  # fmt: skip

    def summary(self) -> str:
        """Ranges of fractions, for one line of output."""
        weights = [fmt.frac for layer in self.layers.values() for fmt in layer.weight]
        fracs = [fmt.frac for fmt in self.activations.values()]
        return f"weights frac {min(weights)} ... {max(weights)}, activations frac {min(fracs)} ... {max(fracs)}"


class Named(Protocol):
    """A step of a plan, as far as this module needs it: the tensors that it reads, and the one that it writes."""

    name: str
    inputs: tuple[str, ...]


class Groups:
    """Disjoint sets of tensor names."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    @classmethod
    def of(cls, steps: Iterable[Named], *kinds: type) -> "Groups":
        """Tie the inputs and the output of every step of the given kinds together."""
        groups = cls()
        for step in steps:
            tied = isinstance(step, kinds)
            groups.find(step.name)
            for name in step.inputs:
                groups.find(name)
                if tied:
                    groups.join(name, step.name)
        return groups

    def find(self, name: str) -> str:
        """Representative of a name's set."""
        parent = self._parent.setdefault(name, name)
        if parent != name:
            parent = self._parent[name] = self.find(parent)
        return parent

    def join(self, first: str, second: str) -> None:
        """Merge two sets."""
        self._parent[self.find(first)] = self.find(second)

    def sets(self) -> list[set[str]]:
        """All sets, in order of first appearance."""
        found: dict[str, set[str]] = {}
        for name in self._parent:
            found.setdefault(self.find(name), set()).add(name)
        return list(found.values())


@dataclass(frozen=True)
class Point:
    """An activation whose format is chosen.

    `min_frac` bounds it from below (a ReLU6 clip); points with the same `shared` must have the same format, because their codes are
    concatenated; `carried` marks members of a residual group that run along the identity
    path, the others are operands that only one addition reads.
    """

    name: str
    format: FixedPointFormat
    relu: bool
    min_frac: int | None
    shared: str
    group: int | None
    carried: bool


def resolve(points: Sequence[Point], proposals: dict[str, int]) -> dict[str, int]:
    """Fractions that satisfy all constraints, from what a rule proposes for each tensor alone.

    Tensors that share a format take the smallest fraction that one of them needs. Members of a residual group share the smallest
    fraction proposed along the identity path, so that additions round nothing; a branch operand may be coarser, never finer (finer
    would round twice). ReLU6 tensors keep their clip even where that makes them finer than their group: the sums around them have
    no clip, and would saturate at it.
    """
    members: dict[str, list[Point]] = {}
    for point in points:
        members.setdefault(point.shared, []).append(point)
    needed = {shared: min(proposals[p.name] for p in same) for shared, same in members.items()}
    carried = {shared: any(p.carried for p in same) for shared, same in members.items()}
    along: dict[int, int] = {}
    for shared, same in members.items():
        group = same[0].group
        if group is not None and carried[shared]:
            along[group] = min(along.get(group, needed[shared]), needed[shared])
    fracs = {}
    for shared, same in members.items():
        frac, group = needed[shared], same[0].group
        if group is not None:
            frac = along[group] if carried[shared] else min(frac, along.get(group, frac))
        floors = [p.min_frac for p in same if p.min_frac is not None]
        fracs.update({p.name: max(frac, *floors) if floors else frac for p in same})
    return {point.name: fracs[point.name] for point in points}
