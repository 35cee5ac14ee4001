"""load(): an export as something that looks at images: files, PIL images or arrays in, class names and probabilities out."""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeft.artifact import Artifact
from edgeft.config import Config
from edgeft.data import NO_LABEL, Split
from edgeft.data.decode import decode, pixels, problem, reason
from edgeft.data.loading import batches, short_side
from edgeft.data.preprocess import Preprocessing
from edgeft.data.unlabelled import files_below
from edgeft.errors import ArtifactError, DataError
from edgeft.export import TARGETS
from edgeft.progress import Progress
from edgeft.runner import Logits, Runner
from edgeft.show import exports

AnyImage = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]
"""A file, a PIL image of any mode, or bytes [height, width, 3] (RGB) or [height, width] (grey); of any size."""
_PREFERRED = "onnx"
_BATCH = 32
"""Images in memory at a time are a few times as many: batches are prepared ahead. Scores do not depend on it."""
_ACCEPTED = """accepted: a file name, a PIL image, an array uint8 [height, width, 3] or [height, width],
a list of these, or an array uint8 [n, height, width, 3]"""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model sees in n images: `logits` are its real-valued scores, shape [n, classes]."""

    classes: tuple[str, ...]
    logits: Logits

    @cached_property
    def labels(self) -> list[str]:
        """The most probable class of each image."""
        return [self.classes[index] for index in self.logits.argmax(axis=1)]

    @cached_property
    def probabilities(self) -> NDArray[np.float32]:
        """Softmax of the scores, shape [n, classes]; every row sums to 1."""
        scores = self.logits.astype(np.float64)
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares: NDArray[np.float32] = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
        return shares

    def top(self, k: int) -> list[list[tuple[str, float]]]:
        """The k most probable classes of each image with their probabilities, best first; all classes where there are fewer."""
        # Of the scores, because unequal scores can have probabilities that are equal in float32; equal ones in argmax's order.
        order = np.argsort(-self.logits, axis=1, kind="stable")[:, :k]
        return [
            [(self.classes[index], float(shares[index])) for index in best] for best, shares in zip(order, self.probabilities, strict=True)
        ]


class Predictor:
    """An exported model that takes images as they come; made by `load`.

    `target` is what it was exported to, `name` what reports call it, `path` the directory of the export, `classes` the class names
    in the order of the scores, `preprocessing` how images become network input.
    """

    def __init__(self, artifact: Artifact, target: str, runner: Runner) -> None:
        self.path, self.target, self.name = artifact.path, target, runner.name
        self.classes = artifact.manifest.classes
        self.preprocessing = Preprocessing.from_json(artifact.manifest.preprocessing)
        self._runner = runner
        self._short_side = short_side(Config.model_validate(artifact.manifest.config))

    def predict(self, images: AnyImage | Sequence[AnyImage]) -> Prediction:
        """Classify one image or several, of any size, prepared as the test images of training and evaluation are.

        An image is a file, a PIL image of any mode, or an array uint8 [height, width, 3] or [height, width]; an array
        [n, height, width, 3] is n images. A PIL image is turned as its EXIF record says. Raises DataError that names an image which
        is none of these or cannot be read.
        """
        given = _listed(images)
        split = Split("images", "id", _Given(given, self._short_side), np.full(len(given), NO_LABEL, np.int64))
        scores = [self._runner.logits(prepared) for prepared, _ in batches(split, self.preprocessing, _BATCH)]
        return Prediction(self.classes, np.concatenate([np.zeros((0, len(self.classes)), np.float32), *scores]))


def load(path: str | os.PathLike[str]) -> Predictor:
    """Open an export, or the export of a run: "onnx" where the run has several.

    Every file is checked against its hash first. Raises ArtifactError for an edited or incomplete directory and for a run without
    such an export, MissingExtraError when the target's runtime is not installed.
    """
    artifact = Artifact.load(Path(path))
    if artifact.manifest.kind != "exported":
        artifact = Artifact.load(_export_of(artifact))
    target = artifact.document("export.json")["target"]
    return Predictor(artifact, target, TARGETS.get(target).load(artifact.path))


def image_files(paths: Sequence[Path], progress: Progress) -> list[Path]:
    """Files as they are given; of a folder every image in it and in the folders inside it, in the order of the names.

    A file of a folder that cannot be decoded is left out, with a line of progress that says why. Raises DataError for a folder
    without an image.
    """
    return [file for path in paths for file in (_images_in(path, progress) if path.is_dir() else [path])]


def _images_in(folder: Path, progress: Progress) -> list[Path]:
    found: list[Path] = []
    for file in files_below(folder, set()):
        why = problem(file)
        if why is None:
            found.append(file)
        else:
            progress.line(f"skipped '{file}': {why}")
    if not found:
        raise DataError(f"the folder '{folder}' holds no images", "give image files, or a folder with images in it or in its folders")
    return found


def _export_of(run: Artifact) -> Path:
    found = exports(run)
    hint = f"edgeft export {run.path}"
    if not found:
        raise ArtifactError(f"the run '{run.path}' has no export yet", hint)
    if _PREFERRED not in found and len(found) > 1:
        listed = ", ".join(f"'{name}'" for name in found)
        raise ArtifactError(
            f"the run '{run.path}' has no export '{_PREFERRED}' but several others: {listed}",
            f"{hint}\nor give one of them, for example '{run.path / 'export' / found[0]}'",
        )
    return run.path / "export" / (_PREFERRED if _PREFERRED in found else found[0])


def _listed(images: AnyImage | Sequence[AnyImage]) -> list[AnyImage]:
    """The images one by one. Raises DataError that names the first which is of no accepted kind."""
    several = images.ndim == 4 if isinstance(images, np.ndarray) else isinstance(images, Sequence) and not isinstance(images, str)
    given: list[AnyImage] = list(images) if several else [images]  # type: ignore[arg-type, list-item]
    for number, image in enumerate(given, 1):
        if isinstance(image, np.ndarray):
            fits = image.dtype == np.uint8 and image.size > 0 and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3))
            found = f"an array {image.dtype} {list(image.shape)}"
        else:
            fits = isinstance(image, str | os.PathLike | Image.Image)
            found = f"of type '{type(image).__name__}'"
        if not fits:
            raise DataError(f"image {number} of {len(given)} is {found}", _ACCEPTED)
    return given


@dataclass(frozen=True)
class _Given:
    """Images that a caller handed over (an ImageSource)."""

    images: Sequence[AnyImage]
    short_side: int
    loading: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> NDArray[np.uint8]:
        """RGB bytes, shape [height, width, 3]; files are read as in evaluation. Raises DataError that names the image."""
        given = self.images[index]
        if isinstance(given, str | os.PathLike):
            return decode(Path(given), self.short_side)
        image = Image.fromarray(given) if isinstance(given, np.ndarray) else given
        try:
            with self.loading:  # Pillow loads on first use; the same image may come twice, in batches of two threads
                image.load()
            return pixels(image, self.short_side)
        except Exception as error:  # as in decode: a damaged file makes Pillow raise almost anything
            what = f"image {index + 1} of {len(self)}, a PIL image of mode '{image.mode}'"
            raise DataError(f"cannot read {what}: {reason(error)}", _ACCEPTED) from error
