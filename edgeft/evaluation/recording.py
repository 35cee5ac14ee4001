"""What models say of views of a set, on disk: computed once, image batches in order, corruptions made ahead.

Memory grows with the number of images no further than KEPT_MB. A file holds one model's scores of one view: float32 [n, classes], as
NumPy writes arrays.
"""

import contextlib
import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from edgeft.artifact import PARTIAL
from edgeft.data import Split
from edgeft.data.loading import ImageCache, batches
from edgeft.data.mixing import selected
from edgeft.data.preprocess import Preprocessing, prepare
from edgeft.errors import ArtifactError, DataError, TrainingError
from edgeft.evaluation import corruptions
from edgeft.evaluation.generating import Generators
from edgeft.evaluation.shifts import translated
from edgeft.progress import Advance
from edgeft.runner import Images

CLEAN, SHIFT = "clean", "shift"
KEPT_MB = 256
"""Prepared images that are kept for later views of the same set, in MiB: most sets of small images, a part of others."""
_FINGERPRINTED = 8

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class View:
    """A set as it is, corrupted at a severity, translated by `level` pixels, or (any other name) prepared otherwise by its source."""

    name: str = CLEAN
    level: int = 0

    def apply(self, images: Images, indices: NDArray[np.int64], seed: int) -> Images:
        """This view of prepared images whose numbers in their set are `indices`."""
        if self.name == SHIFT:
            return translated(images, self.level, indices)
        if self.name in corruptions.ALL:
            return corruptions.corrupt(images, self.name, self.level, indices, seed)
        return images

    def __str__(self) -> str:
        version = f"-v{corruptions.VERSION}" if self.name in corruptions.ALL else ""
        return f"{self.name}-{self.level}{version}" if self.level else self.name


@dataclass(frozen=True)
class Output:
    """One model's scores as evaluation records them: `name` and `digest` (of its artifact) say whose they are.

    A `concurrent` one may be called by several threads at a time, and keeps to one thread each.
    """

    name: str
    digest: str
    call: Callable[[Images], Scores]
    concurrent: bool = False


@dataclass(frozen=True, eq=False)
class Chosen:
    """The images of a split that are measured, their numbers in the whole split, and a fingerprint of the images."""

    split: Split
    indices: NDArray[np.int64]
    fingerprint: str

    @classmethod
    def of(cls, split: Split, n: int | None, seed: int, p: Preprocessing) -> "Chosen":
        """At most `n` images (None: all), drawn by `seed`: a smaller `n` takes some of the images of a larger one.

        Raises DataError for a split without images.
        """
        if len(split) == 0:
            raise DataError(f"split '{split.name}' has no images", "leave it out, or add images")
        order = np.random.default_rng(seed).permutation(len(split))
        indices = np.sort(order[: len(split) if n is None else n]).astype(np.int64)
        few = [prepare(split.images.image(int(index)), p).tobytes() for index in indices[:: -(-len(indices) // _FINGERPRINTED)]]
        digest = hashlib.sha256(indices.tobytes() + b"".join(few)).hexdigest()
        return cls(selected(split, indices), indices, digest[:12])

    def __len__(self) -> int:
        return len(self.indices)


_Made = tuple[View, Images, dict[str, Scores]]
"""A view, its images, and scores of them by model."""


class Recorder:
    """Scores in a folder, by artifact, model, set and view; what is there already is not computed again.

    Corrupted views are made by `workers`, where there are any. `n_computed` counts views of images that were computed, by every model.
    """

    def __init__(self, folder: Path, p: Preprocessing, *, batch: int, seed: int, workers: Generators | None = None) -> None:
        self.folder, self.p, self.batch, self.seed, self.workers = folder, p, batch, seed, workers
        self.n_computed = 0
        self._kept = ImageCache(KEPT_MB)

    def path(self, output: Output, chosen: Chosen, view: View) -> Path:
        """The file of one model's scores."""
        seeded = f"-s{self.seed}" if view.name in corruptions.ALL else ""
        model = f"{output.digest[:16]}-{_slug(output.name)}"
        return self.folder / model / f"{_slug(chosen.split.name)}-{chosen.fingerprint}" / f"{view}{seeded}.npy"

    def load(self, output: Output, chosen: Chosen, view: View) -> Scores | None:
        """Scores [n, classes], mapped from the file; None where they have not been recorded or the file is damaged."""
        try:
            scores: Scores = np.load(self.path(output, chosen, view), mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return None
        fits = scores.dtype == np.float32 and scores.ndim == 2 and len(scores) == len(chosen)
        return scores if fits else None

    def record(self, outputs: Sequence[Output], chosen: Chosen, views: Sequence[View], advance: Advance) -> None:
        """Compute what is missing; `advance` is told of every view of an image by every model.

        Every view is made once for all models. Raises TrainingError when a score is not finite, ArtifactError when nothing can be written.
        """
        missing = {view: [output for output in outputs if self.load(output, chosen, view) is None] for view in views}
        done = sum(len(outputs) - len(those) for those in missing.values())
        advance(done * len(chosen), f"{chosen.split.name}: {done} views known")
        wanted = [view for view in views if missing[view]]
        if not wanted:
            return
        with ExitStack() as stack:
            files = {
                (output.name, view): stack.enter_context(_ScoresFile(self.path(output, chosen, view), len(chosen)))
                for view in wanted
                for output in missing[view]
            }
            for view, images, known in self._stream(chosen, wanted, missing):
                for output in missing[view]:
                    scores = known[output.name] if output.name in known else _checked(output, images, chosen.split.name)
                    files[output.name, view].add(scores)
                    self.n_computed += len(images)
                    advance(len(images), f"{chosen.split.name} {view}")

    def _stream(self, chosen: Chosen, views: Sequence[View], outputs: Mapping[View, Sequence[Output]]) -> Iterator[_Made]:
        """Every view of every batch, in order; a few are made ahead while the caller works."""
        ahead = max(2, os.cpu_count() or 1, 2 * self.workers.n if self.workers else 0)
        waiting: deque[Future[_Made]] = deque()
        start = 0
        with ThreadPoolExecutor(ahead) as pool:
            try:
                for images, _ in batches(chosen.split, self.p, self.batch, self._kept):
                    indices = chosen.indices[start : start + len(images)]
                    start += len(images)
                    for view in views:
                        waiting.append(pool.submit(self._made, view, images, indices, outputs[view], chosen.split.name))
                        if len(waiting) > ahead:
                            yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _made(self, view: View, images: Images, indices: NDArray[np.int64], outputs: Sequence[Output], split: str) -> _Made:
        """A view of a batch, and what the models that may be asked in a thread say of it."""
        if self.workers is not None and view.name in corruptions.ALL:
            changed = self.workers.corrupt(images, view.name, view.level, indices, self.seed)
        else:
            changed = view.apply(images, indices, self.seed)
        return view, changed, {output.name: _checked(output, changed, split) for output in outputs if output.concurrent}


def _checked(output: Output, images: Images, split: str) -> Scores:
    scores = np.ascontiguousarray(output.call(images), dtype=np.float32)
    if not np.isfinite(scores).all():
        raise TrainingError(f"'{output.name}' gives scores that are not finite on split '{split}'")
    return scores


def _slug(name: str) -> str:
    """A name as part of a file name; other letters than a-z, 0-9, '.' and '-' become '_', made unique by a hash."""
    plain = re.sub(r"[^a-z0-9.-]", "_", name.lower())[:60]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


class _ScoresFile:
    """A .npy file written row by row; it gets its name only when it is complete."""

    def __init__(self, path: Path, n: int) -> None:
        self._path, self._n, self._left = path, n, n
        self._partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")

    def __enter__(self) -> Self:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("wb")
        except OSError as error:
            raise _not_written(self._path, error) from error
        return self

    def add(self, scores: Scores) -> None:
        """Append rows."""
        try:
            if self._left == self._n:
                about = {"descr": npy.dtype_to_descr(scores.dtype), "fortran_order": False, "shape": (self._n, scores.shape[1])}
                npy.write_array_header_1_0(self._file, about)
            self._file.write(scores.data)
        except OSError as error:
            raise _not_written(self._path, error) from error
        self._left -= len(scores)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._file.close()
            if kind is None and self._left == 0:
                self._partial.replace(self._path)
        except OSError as failed:
            raise _not_written(self._path, failed) from failed
        finally:
            with contextlib.suppress(OSError):
                self._partial.unlink(missing_ok=True)


def _not_written(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(
        f"cannot write the predictions '{path}': {error.strerror or error}", "free some space, or give another cache folder"
    )
