"""What the classes of another labelled set mean to a run: names to names, dropped classes, and masks of permitted answers.

A map keeps every class of the run as a possible answer (an image of a cat that is called a frog is an error, even if the set has no frogs),
a mask does not: it is for sets such as ImageNet-R and ImageNet-A, which are scored over their own 200 classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeft.errors import DataError
from edgeft.registry import nearest

DROPPED = -1
"""Target of a class that the run does not have."""
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
_SHOWN = 5


@dataclass(frozen=True)
class LabelMap:
    """From the classes of a set, `source`, to those of a run, `classes`: `target` [source] holds indices into `classes`, or DROPPED.

    Raises DataError when the lengths differ, a target does not exist, or nothing is kept.
    """

    name: str
    source: tuple[str, ...]
    target: tuple[int, ...]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.source) != len(self.target):
            raise DataError(f"label map '{self.name}' has {len(self.target)} targets for {len(self.source)} classes")
        if not all(index == DROPPED or 0 <= index < len(self.classes) for index in self.target):
            raise DataError(f"label map '{self.name}' names a class outside 0 ... {len(self.classes) - 1}")
        if not self.kept:
            raise DataError(f"label map '{self.name}' keeps no class of the set", f"classes of the set: {_shown(self.source)}")

    @classmethod
    def by_name(cls, name: str, source: Sequence[str], classes: Sequence[str], renamed: Mapping[str, str] | None = None) -> "LabelMap":
        """Classes of equal names belong together; `renamed` gives the run's name of a class of the set where it is another."""
        index = {label: number for number, label in enumerate(classes)}
        target = tuple(index.get((renamed or {}).get(label, label), DROPPED) for label in source)
        return cls(name, tuple(source), target, tuple(classes))

    @property
    def kept(self) -> tuple[str, ...]:
        """Classes of the set that the run has."""
        return tuple(label for label, index in zip(self.source, self.target, strict=True) if index != DROPPED)

    @property
    def dropped(self) -> tuple[str, ...]:
        """Classes of the set that the run does not have; their images can only serve to tell known classes from others."""
        return tuple(label for label, index in zip(self.source, self.target, strict=True) if index == DROPPED)

    def apply(self, labels: NDArray[np.int64], *, n: int | None = None, n_kept: int | None = None) -> tuple[NDArray[np.int64], ...]:
        """Places of the kept images, and their labels in the run.

        Raises DataError for labels that the set cannot have, and when the counts are not the expected `n` and `n_kept`.
        """
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.source):
            raise DataError(f"set '{self.name}' has labels {labels.min()} ... {labels.max()}; it has {len(self.source)} classes")
        mapped = np.asarray(self.target, np.int64)[labels]
        places = np.flatnonzero(mapped != DROPPED)
        for what, found, expected in (("images", len(labels), n), ("images of known classes", len(places), n_kept)):
            if expected is not None and found != expected:
                raise DataError(f"set '{self.name}' has {found} {what}; {expected} were expected", "is the download complete?")
        return places, mapped[places]


STL10_TO_CIFAR10 = LabelMap.by_name("STL-10", STL10, CIFAR10, {"car": "automobile"})
"""[0, 2, 1, 3, 4, 5, 7, -1, 8, 9]: no frogs, and monkeys are dropped (8000 test images become 7200). Frog stays a possible answer."""


def read_map(path: Path, source: Sequence[str], classes: Sequence[str]) -> LabelMap:
    """A map from a text file of lines "class of the set = class of the run"; classes of equal names need no line.

    Empty lines and lines that begin with "#" are skipped. Raises DataError for a line that names an unknown class.
    """
    renamed: dict[str, str] = {}
    for number, line in _lines(path):
        left, equals, right = (part.strip() for part in line.partition("="))
        if not equals:
            raise DataError(f"line {number} of '{path}' is '{line}'", "expected: class of the set = class of the run")
        _require(left, source, f"line {number} of '{path}'", "class of the set")
        _require(right, classes, f"line {number} of '{path}'", "class of the run")
        renamed[left] = right
    return LabelMap.by_name(path.stem, source, classes, renamed)


def read_mask(path: Path, classes: Sequence[str]) -> NDArray[np.int64]:
    """Indices of the classes that are permitted as answers, sorted, from a text file with one class name a line.

    Raises DataError for an unknown class and for fewer than two.
    """
    names = []
    for number, line in _lines(path):
        _require(line, classes, f"line {number} of '{path}'", "class of the run")
        names.append(line)
    chosen = np.array(sorted({list(classes).index(name) for name in names}), np.int64)
    if len(chosen) < 2:
        raise DataError(f"the mask '{path}' permits {len(chosen)} classes; at least two are needed", f"known: {_shown(classes)}")
    return chosen


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read '{path}': {getattr(error, 'strerror', None) or error}") from error
    stripped = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return [(number, line) for number, line in stripped if line and not line.startswith("#")]


def _require(name: str, known: Sequence[str], where: str, what: str) -> None:
    if name not in known:
        close = nearest(name, list(known), n=1)
        hint = f"known: {_shown(known)}" + (f"\n  did you mean: {close[0]}" if close else "")
        raise DataError(f"{where} names '{name}', which is no {what}", hint)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
