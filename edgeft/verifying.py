"""verify(): exports against the interpreter, code for code, on golden, adversarial and fresh random images."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.artifact import Artifact
from edgeft.errors import ArtifactError
from edgeft.export import TARGETS
from edgeft.export.inputs import hard_inputs
from edgeft.export.verify import BATCH, LayerDifference, compare, golden
from edgeft.graph import IntegerGraph, Op
from edgeft.interpret import Codes, Interpreter
from edgeft.progress import Advance, Progress
from edgeft.runner import Images, LayerRunner
from edgeft.show import exports

SEED_BITS = 31


@dataclass
class Checked:
    """One export in one runtime: how many codes were compared, and which layers differ, the first one in execution order first."""

    export: Path
    runner: str
    images: int = 0
    codes: int = 0
    differing: dict[str, LayerDifference] = field(default_factory=dict)
    logits_differ: int = 0

    @property
    def exact(self) -> bool:
        """Whether nothing differs."""
        return not self.differing and not self.logits_differ

    def line(self) -> str:
        """The finding in words."""
        if self.exact:
            return f"exact: 0 of {self.codes:,} codes differ"
        if not self.differing:
            return f"DIFFERS: logits of {self.logits_differ} images, although every layer is equal when it is shown"
        first = next(iter(self.differing.values()))
        return (
            f"DIFFERS: first in layer '{first.layer}', in {first.differing:,} of {first.of:,} codes by up to {first.largest}; "
            f"in {len(self.differing)} layers in all"
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "export": str(self.export), "runner": self.runner, "exact": self.exact, "images": self.images, "codes": self.codes,
            "logits_differ": self.logits_differ, "differing": [vars(each) for each in self.differing.values()],
        }  # fmt: skip


@dataclass(frozen=True)
class Verification:
    """All exports and runtimes on the same images of each export; `seed` repeats the random ones, `ties` counts sums between two codes."""

    checked: tuple[Checked, ...]
    inputs: dict[str, str]
    ties: dict[str, int]
    seed: int

    @property
    def exact(self) -> bool:
        """Whether everything is."""
        return all(each.exact for each in self.checked)

    def lines(self) -> list[str]:
        """For people."""
        width, found = max(len(each.runner) for each in self.checked), []
        for export, inputs in self.inputs.items():
            found.append(f"{export}: {inputs}; seed {self.seed}; {self.ties[export]:,} sums were ties")
            found += [f"  {each.runner:{width}}  {each.line()}" for each in self.checked if str(each.export) == export]
        return found

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "exact": self.exact, "seed": self.seed, "inputs": self.inputs, "ties": self.ties,
            "checked": [each.to_json() for each in self.checked],
        }  # fmt: skip


def verify(
    path: Path, targets: Sequence[str] = (), *, n: int = 1000, seed: int | None = None, progress: Progress | None = None
) -> Verification:
    """Compare an export, or the exports of a run, with the interpreter in every runtime that is installed, on `n` images each.

    Differences are in the result. Raises ArtifactError for a damaged artifact, a run without the wanted exports, and exports that were
    made of another run than the one around them.
    """
    progress, seed = progress or Progress(False), secrets.randbits(SEED_BITS) if seed is None else seed
    checked: list[Checked] = []
    inputs, ties = {}, {}
    for export in _exports(path, targets):
        target, graph = export.document("export.json")["target"], export.graph()
        images = hard_inputs(graph, export.samples()["images"], n, seed)
        with progress.task(f"verify '{target}'", len(images.all)) as advance:
            _check_recorded(export, graph)
            found, ties[str(export.path)] = check(graph, TARGETS.get(target).runtimes(export.path), images.all, advance, export.path)
        checked += found
        inputs[str(export.path)] = images.summary
    return Verification(tuple(checked), inputs, ties, seed)


def check(
    graph: IntegerGraph, runners: Sequence[LayerRunner], images: Images, advance: Advance, export: Path = Path()
) -> tuple[list[Checked], int]:
    """Each runner against the interpreter of a graph on the same images; what was found, and how many sums were ties."""
    reference, found = _TieCounter(graph), [Checked(export, runner.name) for runner in runners]
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        shown = _Shown(reference, part)
        for checked, runner in zip(found, runners, strict=True):
            for difference in compare(shown, runner, part):
                _add(checked, difference, difference.of // len(part) * len(images))
            checked.logits_differ += int((shown.logits(part) != runner.logits(part)).any(axis=1).sum())
            checked.images += len(part)
            checked.codes += shown.size
        advance(len(part))
    order = [graph.input, *(op.output for op in graph.ops)]
    for checked in found:  # what comes first in the network may have differed first in a later batch
        checked.differing = {name: checked.differing[name] for name in order if name in checked.differing}
    return found, reference.ties


class _TieCounter(Interpreter):
    """An interpreter that counts sums which lie exactly between two codes: where a wrong rounding would show."""

    def __init__(self, graph: IntegerGraph) -> None:
        super().__init__(graph)
        self.ties = 0

    def rounded(self, op: Op, acc: Codes, shift: Codes) -> None:
        k = np.clip(shift, 1, 32)
        self.ties += int(np.count_nonzero(((acc & ((1 << k) - 1)) == (1 << (k - 1))) & (shift > 0)))


def _exports(path: Path, targets: Sequence[str]) -> list[Artifact]:
    artifact = Artifact.load(path)
    if artifact.manifest.kind == "exported":
        target = artifact.document("export.json")["target"]
        if targets and target not in targets:
            raise ArtifactError(f"'{path}' is an export to '{target}', not to {', '.join(map(repr, targets))}")
        return [artifact]
    for name in targets:
        TARGETS.entry(name)
    there = exports(artifact)
    missing = [name for name in targets if name not in there]
    if missing or not there:
        what = f"export to '{missing[0]}'" if missing else "export"
        hint = f"edgeft export {path} --target {missing[0] if missing else 'onnx'}"
        raise ArtifactError(f"the run '{path}' has no {what}; it has {', '.join(there) or 'none'}", hint)
    found = [Artifact.load(artifact.path / "export" / name) for name in targets or there]
    for export in found:
        if export.manifest.parent != artifact.digest:
            hint = f"edgeft export {path} --target {export.path.name} makes it again"
            raise ArtifactError(f"'{export.path}' was exported from another run than '{path}'", hint)
    return found


def _check_recorded(export: Artifact, graph: IntegerGraph) -> None:
    """The interpreter of this installation against the codes that were recorded with the export."""
    samples = export.samples()
    for key, codes in golden(graph, samples["images"]).items():
        if not np.array_equal(codes, samples[key]):
            raise ArtifactError(f"'{export.path}': the interpreter of this version does not give the logits that were recorded")


class _Shown:
    """What the reference gives for one batch, computed once for all runtimes."""

    def __init__(self, reference: Interpreter, images: Images) -> None:
        self.name = reference.name
        self._layers = reference.layers(images)
        self._logits = reference.scores(self._layers[reference.graph.output])
        self.size = sum(codes.size for codes in self._layers.values())

    def layers(self, images: Images) -> dict[str, Codes]:
        return self._layers

    def logits(self, images: Images) -> Any:
        return self._logits


def _add(checked: Checked, new: LayerDifference, of: int) -> None:
    """Count what differs in one batch; `of` is the number of the layer's codes for all images."""
    old = checked.differing.get(new.layer, LayerDifference(new.layer, 0, 0, of))
    checked.differing[new.layer] = LayerDifference(new.layer, old.differing + new.differing, max(old.largest, new.largest), of)
