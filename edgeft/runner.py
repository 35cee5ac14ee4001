"""Runner: what evaluation, verification and benchmarks consume; a model in, images to logits out."""

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
"""RGB bytes, shape [n, 3, height, width], already resized and cropped."""
Logits = NDArray[np.float32]
"""Real-valued scores, shape [n, classes]. For a fixed-point model: accumulator * 2^-frac, exact in float32."""


class Runner(Protocol):
    """Anything that classifies images: the float model, the training graph, the interpreter, an exported artifact."""

    name: str

    def logits(self, images: Images) -> Logits:
        """Scores of a batch. Pure: the same images give the same scores."""
        ...


@runtime_checkable
class LayerRunner(Runner, Protocol):
    """A fixed-point Runner that can show every layer, so that a difference can be located."""

    def layers(self, images: Images) -> dict[str, NDArray[np.int64]]:
        """Integer codes of every tensor of the IntegerGraph, by tensor name, in execution order."""
        ...
