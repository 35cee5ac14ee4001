"""Corrupted views made in worker processes: most of the work holds Python's lock, so that threads would take turns.

A worker is this module run as a program. It reads requests from its standard input (a line of JSON, then the image bytes and the
indices) and answers each with the bytes of the view; it ends when its input does. NumPy and Pillow are all that it loads.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

import edgeft
from edgeft.errors import EdgeftError
from edgeft.evaluation import corruptions
from edgeft.runner import Images

MOST_WORKERS = 32
MIN_VIEWS = 20_000
"""Fewer views than this are made in threads: workers take a quarter of a second to start."""


def worker_count(n_views: int) -> int:
    """How many workers pay for so many views on this machine: one for each CPU that may be used, or none."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(n_cores, MOST_WORKERS) if n_views >= MIN_VIEWS else 0


KEEP_MEMORY = {"MALLOC_TOP_PAD_": str(2**26), "MALLOC_MMAP_THRESHOLD_": str(2**28), "MALLOC_TRIM_THRESHOLD_": str(2**29)}
"""Makes glibc keep what an array has freed for the next one: to be given the pages anew takes longer than most arithmetic on them."""


class Generators:
    """`n` workers, started when they are needed; `corrupt` is called by as many threads as may wait."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._workers: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes] | None] = queue.SimpleQueue()
        for _ in range(n):
            self._idle.put(None)

    def corrupt(self, images: Images, corruption: str, severity: int, indices: NDArray[np.int64], seed: int) -> Images:
        """As `corruptions.corrupt`, by the next worker that is free. Raises EdgeftError when it has ended."""
        worker = self._idle.get() or self._started()
        assert worker.stdin is not None
        assert worker.stdout is not None
        about = {"corruption": corruption, "severity": severity, "seed": seed, "shape": images.shape}
        try:
            for part in (json.dumps(about).encode() + b"\n", np.ascontiguousarray(images).data, indices.astype(np.int64).data):
                worker.stdin.write(part)
            worker.stdin.flush()
            return _images(worker.stdout, images.shape)
        except (OSError, EOFError) as error:
            raise EdgeftError(
                f"a process that makes corruptions ended (code {worker.poll()})",
                "is there enough memory? --workers 0 does without processes",
            ) from error
        finally:
            self._idle.put(worker)

    def _started(self) -> subprocess.Popen[bytes]:
        # The package as it was imported here, and one thread each: the images are the parallel work.
        path = os.pathsep.join([str(Path(edgeft.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
        env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | KEEP_MEMORY
        command = [sys.executable, "-m", "edgeft.evaluation.generating"]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        self._workers.append(worker)
        return worker

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.kill()
            worker.wait()
            for stream in (worker.stdin, worker.stdout):
                with contextlib.suppress(OSError):  # what was not sent is of no use any more
                    assert stream is not None
                    stream.close()


@contextmanager
def generators(n: int) -> Iterator[Generators | None]:
    """Workers that end with the block; None for n = 0."""
    if n == 0:
        yield None
        return
    workers = Generators(n)
    try:
        yield workers
    finally:
        workers.close()


def _images(stream: IO[bytes], shape: tuple[int, ...]) -> Images:
    """Image bytes of a shape. Raises EOFError where the stream ends before."""
    found = np.empty(shape, np.uint8)
    if stream.readinto(found.data.cast("B")) != found.nbytes:  # type: ignore[attr-defined]
        raise EOFError
    return found


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until there are no more."""
    while line := requests.readline():
        about = json.loads(line)
        images = _images(requests, tuple(about["shape"]))
        indices = np.frombuffer(requests.read(8 * len(images)), np.int64)
        view = corruptions.corrupt(images, about["corruption"], about["severity"], indices, about["seed"])
        answers.write(np.ascontiguousarray(view).data)
        answers.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted evaluation closes the pipes, which ends this
    serve(sys.stdin.buffer, sys.stdout.buffer)
