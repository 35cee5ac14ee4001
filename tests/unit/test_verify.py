import re

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeft.errors import VerificationError
from edgeft.export.verify import LayerDifference, compare, verify
from edgeft.runner import Images, Logits

IMAGES: Images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)


class Fake:
    """A runner of two layers whose codes are the pixels; `wrong` maps a layer to what is added to its codes of image 33."""

    def __init__(self, name: str, wrong: dict[str, int] | None = None, layers: tuple[str, ...] = ("a", "b"), logit: float = 0) -> None:
        self.name, self.wrong, self.names, self.logit = name, wrong or {}, layers, logit
        self.batches: list[int] = []

    def logits(self, images: Images) -> Logits:
        return np.asarray(images[:, :, 0, 0] + self.logit, np.float32)

    def layers(self, images: Images) -> dict[str, NDArray[np.int64]]:
        self.batches.append(len(images))
        codes = images.astype(np.int64)
        return {name: codes + self.wrong.get(name, 0) * (codes == 33) for name in self.names}


def test_equal_runners_have_no_difference() -> None:
    assert compare(Fake("x"), Fake("y"), IMAGES) == []
    candidate = Fake("y")
    assert verify(Fake("x"), candidate, IMAGES, batch=16) == 40
    assert candidate.batches == [16, 16, 8]


def test_only_the_layers_that_differ_are_listed_in_execution_order() -> None:
    assert compare(Fake("x"), Fake("y", {"b": -3}), IMAGES) == [LayerDifference("b", 1, 3, 40)]
    assert [each.layer for each in compare(Fake("x"), Fake("y", {"b": 1, "a": 1}), IMAGES)] == ["a", "b"]


def test_the_first_differing_layer_is_named() -> None:
    with pytest.raises(VerificationError) as caught:
        verify(Fake("interpreter"), Fake("onnx", {"a": 2, "b": 1}), IMAGES, batch=20)
    assert caught.value.message == "layer 'a': onnx differs from interpreter in 1 of 20 codes, by up to 2"
    assert caught.value.hint.startswith("2 layers differ;")
    assert caught.value.exit_code == 1


def test_logits_are_compared_too() -> None:
    with pytest.raises(VerificationError, match=r"^logits of onnx differ from interpreter although every layer is equal$"):
        verify(Fake("interpreter"), Fake("onnx", logit=0.5), IMAGES)


def test_a_missing_layer_is_an_error() -> None:
    with pytest.raises(VerificationError, match=r"^onnx does not show layer 'b' of interpreter$"):
        verify(Fake("interpreter"), Fake("onnx", layers=("a",)), IMAGES)


def test_another_shape_is_an_error() -> None:
    class Flat(Fake):
        def layers(self, images: Images) -> dict[str, NDArray[np.int64]]:
            return {name: codes.reshape(len(images)) for name, codes in super().layers(images).items()}

    message = re.escape("layer 'a': onnx has shape (40,), interpreter (40, 1, 1, 1)")
    with pytest.raises(VerificationError, match=f"^{message}$"):
        compare(Fake("interpreter"), Flat("onnx"), IMAGES)
