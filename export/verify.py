"""Compare a Runner with the interpreter, layer by layer; zero differing codes or an error that names the layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeft.errors import VerificationError
from edgeft.graph import IntegerGraph
from edgeft.interpret import Interpreter
from edgeft.runner import Images, LayerRunner

BATCH = 16
"""Images compared at a time: every tensor of both runners is held as int64."""


@dataclass(frozen=True)
class LayerDifference:
    """One tensor whose codes differ: how many `of` how many, and the largest absolute difference in codes."""

    layer: str
    differing: int
    largest: int
    of: int


def compare(reference: LayerRunner, candidate: LayerRunner, images: Images) -> list[LayerDifference]:
    """The layers that differ, in execution order. Raises VerificationError when a layer is missing or has another shape."""
    expected, found = reference.layers(images), candidate.layers(images)
    differences = []
    for layer, codes in expected.items():
        if layer not in found:
            raise VerificationError(f"{candidate.name} does not show layer '{layer}' of {reference.name}")
        if found[layer].shape != codes.shape:
            raise VerificationError(f"layer '{layer}': {candidate.name} has shape {found[layer].shape}, {reference.name} {codes.shape}")
        distance = np.abs(codes - found[layer])
        if distance.any():
            differences.append(LayerDifference(layer, int(np.count_nonzero(distance)), int(distance.max()), distance.size))
    return differences


def verify(reference: LayerRunner, candidate: LayerRunner, images: Images, batch: int = BATCH) -> int:
    """Compare all layers and the logits on every image; the number of images compared.

    Raises VerificationError naming the first layer that differs, or the logits when only they do.
    """
    for part in _batches(images, batch):
        differences = compare(reference, candidate, part)
        if differences:
            first = differences[0]
            raise VerificationError(
                f"layer '{first.layer}': {candidate.name} differs from {reference.name} in {first.differing} of {first.of} codes, "
                f"by up to {first.largest}",
                f"{len(differences)} layers differ; the earlier ones are equal, so look at the operator that writes '{first.layer}'",
            )
        if not np.array_equal(reference.logits(part), candidate.logits(part)):
            raise VerificationError(f"logits of {candidate.name} differ from {reference.name} although every layer is equal")
    return len(images)


def golden(graph: IntegerGraph, images: Images) -> dict[str, NDArray[Any]]:
    """What an artifact keeps to be verified without the run: images, and the logits' codes that they must give."""
    reference = Interpreter(graph)
    codes = np.concatenate([reference.layers(part)[graph.output] for part in _batches(images, BATCH)])
    return {"images": images, f"layer:{graph.output}": codes}


def verify_samples(graph: IntegerGraph, runner: LayerRunner, samples: Mapping[str, NDArray[Any]]) -> int:
    """Every layer against the interpreter, and against the codes recorded with the golden images; the number of images.

    Raises VerificationError naming the layer.
    """
    images: Images = samples["images"]
    n = verify(Interpreter(graph), runner, images)
    recorded = {key.removeprefix("layer:"): codes for key, codes in samples.items() if key.startswith("layer:")}
    for start in range(0, n, BATCH):
        found = runner.layers(images[start : start + BATCH])
        for layer, codes in recorded.items():
            if not np.array_equal(found[layer], codes[start : start + BATCH]):
                raise VerificationError(f"layer '{layer}': the exported model does not give the codes recorded in the artifact")
    return n


def _batches(images: Images, batch: int) -> Iterator[Images]:
    for start in range(0, len(images), batch):
        yield images[start : start + batch]
