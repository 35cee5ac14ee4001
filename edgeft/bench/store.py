"""Finished measurements as JSON records, so that an interrupted bench goes on where it was."""

import contextlib
import importlib.metadata
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeft.artifact import atomic_write, installed_versions, json_bytes
from edgeft.bench import FLOAT, STATIC
from edgeft.bench.machine import Machine

ACCURACY = "accuracy"
ABOUT = "peers.json"
PEER_FILES = {FLOAT: "float.onnx", STATIC: "static.onnx"}
"""What the bench makes of a run to compare it with, by backend; ABOUT beside them says of which run and how."""


@dataclass(frozen=True)
class Key:
    """What is measured: the artifact with this digest, in a backend, with so many threads and images of a batch."""

    digest: str
    backend: str
    threads: int
    batch: int

    @property
    def file(self) -> str:
        """Name of its record."""
        return f"{self.digest[:16]}-{self.backend}-{self.threads}t-b{self.batch}.json"


class Store:
    """The records in a folder. One that was made on another machine or with other versions of a library counts as not there."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        self._folder = folder
        about = asdict(machine)
        del about["load"], about["n_threads"]  # the load passes, the threads are in the key
        self._place = json.loads(json.dumps({"machine": about, "versions": versions()}))
        folder.mkdir(parents=True, exist_ok=True)

    def timing(self, key: Key) -> dict[str, Any]:
        """Record of latency and memory; empty where there is none."""
        return self._read(key.file, key.digest)

    def keep_timing(self, key: Key, record: dict[str, Any]) -> None:
        """Write such a record."""
        self._write(key.file, {"key": asdict(key), **record}, key.digest)

    def accuracy(self, digest: str, backend: str) -> dict[str, Any]:
        """Record of the accuracy of an artifact in a backend; empty where there is none."""
        return self._read(f"{digest[:16]}-{backend}-{ACCURACY}.json", digest)

    def keep_accuracy(self, digest: str, backend: str, record: dict[str, Any]) -> None:
        """Write such a record."""
        self._write(f"{digest[:16]}-{backend}-{ACCURACY}.json", record, digest)

    def _read(self, name: str, digest: str) -> dict[str, Any]:
        try:
            tree = json.loads((self._folder / name).read_bytes())
        except (OSError, ValueError):  # not there, or not written by us: it is measured
            return {}
        fits = isinstance(tree, dict) and tree.get("place") == self._place and tree.get("digest") == digest
        return {key: value for key, value in tree.items() if key not in ("place", "digest", "key")} if fits else {}

    def _write(self, name: str, record: dict[str, Any], digest: str) -> None:
        atomic_write(self._folder / name, json_bytes({"digest": digest, "place": self._place, **record}))


def versions() -> dict[str, str]:
    """As artifacts record them, and OpenVINO's."""
    found = installed_versions()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["openvino"] = importlib.metadata.version("openvino")
    return found
