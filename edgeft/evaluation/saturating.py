"""How much of each activation of a fixed-point net saturates in its format, in distribution and out of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

ID = "id"


@dataclass(frozen=True)
class Shares:
    """Of the values of one activation on one set: the share past either end of the format, and of the nonzero ones what becomes 0."""

    saturated: float
    underflow: float


@dataclass(frozen=True)
class Activation:
    """One activation and its shares by set ("id", "ood:NAME"). With `clip` saturation is the net's own (ReLU6), and no error."""

    name: str
    format: str
    clip: bool
    sets: dict[str, Shares]

    @property
    def worst(self) -> str | None:
        """The OOD set with most saturation; None where there is no such set."""
        others = {label: shares.saturated for label, shares in self.sets.items() if label != ID}
        return max(others, key=lambda label: others[label]) if others else None

    @property
    def excess(self) -> float:
        """Saturated share on the worst OOD set beyond that in distribution."""
        return self.sets[self.worst].saturated - self.sets[ID].saturated if self.worst is not None and ID in self.sets else 0.0


@dataclass(frozen=True)
class Saturation:
    """Every activation that is rounded to 8 bits, in the order of the net, and how many images of each set were looked at."""

    images: dict[str, int]
    activations: tuple[Activation, ...]

    @classmethod
    def of_run(cls, document: Mapping[str, Any]) -> "Saturation":
        """What a run wrote into its saturation.json."""
        activations = tuple(
            Activation(
                name, entry["format"], entry["clip"],
                {label: Shares(share["top"] + share["bottom"], share["underflow"]) for label, share in entry["splits"].items()},
            )
            for name, entry in document["tensors"].items()
        )  # fmt: skip
        return cls(dict(document["images"]), activations)

    def with_set(self, label: str, n: int, found: Mapping[str, Shares]) -> "Saturation":
        """The same with one more set, whose shares are known for some activations."""
        activations = tuple(
            replace(one, sets={**one.sets, label: found[one.name]}) if one.name in found else one for one in self.activations
        )
        return Saturation({**self.images, label: n}, activations)

    def mean(self, label: str) -> float | None:
        """Mean saturated share over the activations without a clip of their own; None where there is none."""
        shares = [one.sets[label].saturated for one in self.activations if not one.clip and label in one.sets]
        return sum(shares) / len(shares) if shares else None

    def most_beyond(self, n: int) -> tuple[Activation, ...]:
        """At most n activations without a clip that saturate more on an OOD set than in distribution, the largest excess first."""
        more = [one for one in self.activations if not one.clip and one.excess > 0]
        return tuple(sorted(more, key=lambda one: -one.excess)[:n])
