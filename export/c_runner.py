"""Run a C bundle on the machine at hand: its own sources, built by the C compiler and loaded as a shared library."""

import ctypes
import json
from collections.abc import Callable
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeft.errors import ArtifactError, VerificationError
from edgeft.export.c_build import Compiler, build, find_compiler
from edgeft.fixedpoint import FixedPointFormat, dequantize
from edgeft.runner import Images, Logits

if TYPE_CHECKING:
    from edgeft.export.ort_runner import Fusion

DESCRIPTION = "bundle.json"
_BYTE_OFFSET = {"EDGEFT_U8": 0, "EDGEFT_S8": 0, "EDGEFT_OFFSET": 128}


class CRunner:
    """A bundle as a LayerRunner, on one thread.

    `logits` runs the sources as they are shipped. `layers` runs a second library of the same sources that shows every tensor.
    """

    name = "c"

    def __init__(self, folder: Path, compiler: Compiler | None = None) -> None:
        """Build and load. Raises ArtifactError when there is no bundle, MissingExtraError when there is no compiler."""
        file = folder / DESCRIPTION
        if not file.is_file():
            raise ArtifactError(f"'{file}' does not exist", "edgeft export RUN --target c")
        self._folder = folder
        self._about: dict[str, Any] = json.loads(file.read_text())
        self._compiler = compiler or find_compiler()
        self.runtime = f"C, {self._compiler.text}"
        self._run = ctypes.CDLL(str(self._library(traced=False))).edgeft_run

    def logits(self, images: Images) -> Logits:
        """Scores [n, classes]: accumulator * 2^-frac."""
        codes = np.empty((len(images), *self._about["tensors"][-1]["shape"]), np.int32)
        arena = self._arena()
        for image, row in zip(self._pixels(images), codes, strict=True):
            _checked(self._run, image, row, arena)
        real = dequantize(codes, FixedPointFormat.parse(self._about["tensors"][-1]["format"]))
        return real.astype(np.float32)

    def layers(self, images: Images) -> dict[str, NDArray[np.int64]]:
        """Codes of every tensor."""
        source, *tensors = self._about["tensors"]
        sizes = [_n_bytes(each) for each in tensors]
        shown = np.empty((len(images), sum(sizes)), np.uint8)
        codes, arena = np.empty(prod(tensors[-1]["shape"]), np.int32), self._arena()
        for image, row in zip(self._pixels(images), shown, strict=True):
            _checked(self._run_traced, image, codes, arena, row)
        parts = np.split(shown, np.cumsum(sizes)[:-1], axis=1)
        found = {each["name"]: _codes(part, each) for part, each in zip(parts, tensors, strict=True)}
        return {source["name"]: images.astype(np.int64) - self._about["image_offset"], **found}

    def prepared(self, image: Images) -> Callable[[], int]:
        """One image [1, channels, rows, columns] as a call that only runs the network, for timing; it returns the status."""
        (pixels,), arena = self._pixels(image), self._arena()
        codes = np.empty(prod(self._about["tensors"][-1]["shape"]), np.int32)
        pointers = [ctypes.c_void_p(each.ctypes.data) for each in (pixels, codes, arena)]

        def run(kept: Any = (pixels, codes, arena)) -> int:
            status: int = self._run(*pointers, ctypes.c_uint32(kept[2].size))
            return status

        return run

    def executes(self) -> "Fusion":
        """The kernels that are called, and how often. None computes in float."""
        from edgeft.export.ort_runner import Fusion

        return Fusion(dict(self._about["kernels"]), ())

    @cached_property
    def _run_traced(self) -> Callable[..., int]:
        traced: Callable[..., int] = ctypes.CDLL(str(self._library(traced=True))).edgeft_run_traced
        return traced

    def _library(self, *, traced: bool) -> Path:
        return build(self._folder, self._about["sources"], self._compiler, traced=traced)

    def _arena(self) -> NDArray[np.uint8]:
        """Memory that starts where the model wants it to; NumPy promises 16 bytes at most."""
        n, alignment = self._about["arena_bytes"], self._about["arena_alignment"]
        memory = np.empty(n + alignment, np.uint8)
        start = -memory.ctypes.data % alignment
        return memory[start : start + n]

    def _pixels(self, images: Images) -> NDArray[np.uint8]:
        """Images as the model reads them: channels last."""
        expected = tuple(self._about["tensors"][0]["shape"])
        if images.dtype != np.uint8 or images.shape[1:] != expected:
            raise ArtifactError(f"images must be uint8 {[*expected]}, not {images.dtype} {list(images.shape[1:])}")
        return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def _checked(run: Callable[..., int], image: NDArray[np.uint8], logits: NDArray[np.int32], arena: NDArray[np.uint8], *more: Any) -> None:
    pointers = [ctypes.c_void_p(each.ctypes.data) for each in (image, logits, arena)]
    status = run(*pointers, ctypes.c_uint32(arena.size), *(ctypes.c_void_p(each.ctypes.data) for each in more))
    if status != 0:
        raise VerificationError(f"the C bundle returned status {status}; kernels/edgeft_status.h says what it means")


def _n_bytes(tensor: dict[str, Any]) -> int:
    n: int = prod(tensor["shape"])
    return n * (4 if tensor["storage"] == "int32_t" else 1)


def _codes(part: NDArray[np.uint8], tensor: dict[str, Any]) -> NDArray[np.int64]:
    """Codes [n, *shape] from the bytes of a tensor as kernels store them: maps have their channels last."""
    storage, n = tensor["storage"], len(part)
    kind = np.dtype({"int32_t": "int32", "EDGEFT_S8": "int8"}.get(storage, "uint8"))
    codes: NDArray[np.int64] = np.ascontiguousarray(part).view(kind).astype(np.int64) - _BYTE_OFFSET.get(storage, 0)
    channels, *size = tensor["map_shape"] or tensor["shape"]
    return np.moveaxis(codes.reshape(n, *size, channels), -1, 1).reshape(n, *tensor["shape"])
