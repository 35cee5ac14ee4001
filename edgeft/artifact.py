"""Artifact: a run or export as a directory of safetensors and JSON, with a manifest that holds every file's hash.

The manifest is written last, so a directory with a manifest is complete. Nothing in it is pickled.
"""

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from edgeft import __version__
from edgeft.errors import ArtifactError
from edgeft.graph import IntegerGraph
from edgeft.report import EvalReport

SCHEMA = 1
MANIFEST = "manifest.json"
RUN = "run.json"
WORK = "work"
SWEEP = "sweep"
"""Stem of the table in the folder of a sweep."""
PARTIAL = ".partial"
"""Ending of a file that is being written; it is never read."""
PACKAGES = ("numpy", "torch", "torchvision", "timm", "brevitas", "accelerate", "onnx", "onnxruntime")
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)

Kind = Literal["finetuned", "quantized", "exported"]
Arrays = dict[str, NDArray[Any]]


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number; those not installed are left out."""
    found = {"edgeft": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that after a kill it is either the old one or the new one. Raises ArtifactError when it cannot be written."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise _write_error(path, error) from error


def _write_error(path: Path, error: OSError) -> ArtifactError:
    if error.errno in OUT_OF_SPACE:
        hint = "free some space, then repeat the command with --resume"
        return ArtifactError(f"no space left on the device while writing '{path}'", hint)
    return ArtifactError(f"cannot write '{path}': {error.strerror or error}", "choose another directory with --out")


@dataclass(frozen=True)
class Manifest:
    """What an artifact is and where it came from. `files` maps names to sha256, `file_bytes` to sizes; `parent` is a digest."""

    schema: int
    kind: Kind
    created: str
    parent: str | None
    config: dict[str, Any]
    seed: int
    versions: dict[str, str]
    preprocessing: dict[str, Any]
    classes: tuple[str, ...]
    files: dict[str, str]
    file_bytes: dict[str, int]

    @classmethod
    def from_json(cls, tree: Any, path: Path) -> "Manifest":
        """Read a manifest. Raises ArtifactError when it is not one of this version's."""
        if not isinstance(tree, dict) or tree.get("schema") != SCHEMA:
            found = tree.get("schema") if isinstance(tree, dict) else type(tree).__name__
            raise ArtifactError(f"'{path}' has schema {found!r}, this version reads {SCHEMA}", "use the edgeft version that wrote it")
        names = {field.name for field in dataclasses.fields(cls)}
        if names != set(tree):
            wrong = ", ".join(f"'{name}'" for name in sorted(names ^ set(tree)))
            raise ArtifactError(f"'{path}' has missing or unknown keys: {wrong}")
        if tree["kind"] not in get_args(Kind):
            raise ArtifactError(f"'{path}' is of kind '{tree['kind']}'; known: {', '.join(get_args(Kind))}")
        return cls(**{**tree, "classes": tuple(tree["classes"])})


class Artifact:
    """A verified, finished directory."""

    def __init__(self, path: Path, manifest: Manifest, digest: str) -> None:
        self.path, self.manifest, self.digest = path, manifest, digest
        """`digest` is the sha256 of the manifest file: it stands for everything in the artifact."""

    @classmethod
    def load(cls, path: Path) -> "Artifact":
        """Open a directory and check every file in it. Raises ArtifactError that names the file that is missing or was changed."""
        file = path / MANIFEST
        if not file.is_file():
            raise _not_an_artifact(path)
        data = _read(file)
        manifest = Manifest.from_json(_parse(file, data), file)
        for name, digest in manifest.files.items():
            _check_file(path, name, digest, manifest.file_bytes[name])
        return cls(path, manifest, hashlib.sha256(data).hexdigest())

    def graph(self) -> IntegerGraph:
        """The integer network. Raises ArtifactError when the artifact holds none."""
        return IntegerGraph.from_json(self.document("graph.json"), self.arrays("weights.safetensors"))

    def formats(self) -> dict[str, Any]:
        """The format table as written by the quantizer."""
        return cast(dict[str, Any], self.document("formats.json"))

    def report(self) -> EvalReport:
        """Accuracy of the models in the artifact."""
        return EvalReport.from_json(self.document("report.json"))

    def samples(self) -> Arrays:
        """Golden images and the integers they must give: "images" uint8 NCHW, "labels", "layer:<tensor>"."""
        return self.arrays("samples.safetensors")

    def document(self, name: str) -> Any:
        """A JSON file of the artifact."""
        file = self._file(name)
        return _parse(file, _read(file))

    def arrays(self, name: str) -> Arrays:
        """A safetensors file of the artifact."""
        file = self._file(name)
        try:
            return safetensors.load(_read(file))
        except SafetensorError as error:
            raise ArtifactError(f"'{file}' is not a safetensors file: {error}") from error

    @cached_property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(self.manifest.file_bytes.values())

    def _file(self, name: str) -> Path:
        if name not in self.manifest.files:
            raise ArtifactError(f"the {self.manifest.kind} artifact '{self.path}' has no file '{name}'")
        return self.path / name


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read '{file}': {error.strerror or error}") from error


def _parse(file: Path, data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise ArtifactError(f"'{file}' is truncated or is not JSON: {error}") from error


def _not_an_artifact(path: Path) -> ArtifactError:
    if not path.is_dir():
        return ArtifactError(f"there is no run at '{path}'", "edgeft train-quantize makes one")
    if (path / RUN).is_file():
        return ArtifactError(f"the run in '{path}' is not finished", "repeat its train-quantize command with --resume")
    return ArtifactError(f"'{path}' is not an edgeft run: it has no {MANIFEST}", "give the directory that train-quantize wrote")


def _check_file(path: Path, name: str, digest: str, n_bytes: int) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise ArtifactError(f"the manifest of '{path}' names '{name}', which lies outside of it")
    file = path / name
    hint = "restore the file, or make the artifact again"
    if not file.is_file():
        raise ArtifactError(f"'{file}' is missing", hint)
    found = file.stat().st_size
    if found != n_bytes:
        raise ArtifactError(f"'{file}' has {found} bytes, its manifest says {n_bytes}: it was truncated or changed", hint)
    with file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
            raise ArtifactError(f"'{file}' was changed after it was written: its hash is not the one in the manifest", hint)


def json_bytes(tree: Any) -> bytes:
    """JSON text as artifacts store it. NaN and infinity are refused with ValueError."""
    return (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode()


def write_artifact(
    path: Path,
    *,
    kind: Kind,
    config: dict[str, Any],
    seed: int,
    preprocessing: dict[str, Any],
    classes: Sequence[str],
    arrays: Mapping[str, Arrays],
    documents: Mapping[str, Any],
    existing: Sequence[str] = (),
    parent: str | None = None,
) -> Artifact:
    """Write an artifact, the manifest last; `existing` names files that are already in `path` and belong to it.

    A killed write leaves a directory without a manifest. Raises ArtifactError when the disk is full or cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / MANIFEST).unlink(missing_ok=True)
    except OSError as error:
        raise _write_error(path, error) from error
    files = {name: _read(path / name) for name in existing}
    for name, tensors in arrays.items():
        files[name] = safetensors.save({key: np.asarray(value, order="C") for key, value in tensors.items()})
    files |= {name: json_bytes(tree) for name, tree in documents.items()}
    for name in (*arrays, *documents):
        atomic_write(path / name, files[name])
    manifest = Manifest(
        schema=SCHEMA,
        kind=kind,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        parent=parent,
        config=config,
        seed=seed,
        versions=installed_versions(),
        preprocessing=preprocessing,
        classes=tuple(classes),
        files={name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        file_bytes={name: len(data) for name, data in files.items()},
    )
    data = json_bytes(dataclasses.asdict(manifest))
    atomic_write(path / MANIFEST, data)
    return Artifact(path, manifest, hashlib.sha256(data).hexdigest())


def claim_run(path: Path, config: dict[str, Any], *, resume: bool) -> Path:
    """Make `path` the directory of a run of `config` (JSON values) and return its work directory.

    Raises ArtifactError when it holds a run and `resume` is off, when a resumed run has another configuration (the keys are
    named), and when it holds files of something else.
    """
    run = path / RUN
    config = {key: value for key, value in json.loads(json_bytes(config)).items() if key != "out"}
    if run.is_file():
        _check_resumable(path, config, resume=resume)
    elif path.exists() and not path.is_dir():
        raise ArtifactError(f"'{path}' is a file, not a directory", "choose another one with --out")
    elif path.is_dir() and (foreign := sorted(entry.name for entry in path.iterdir() if not entry.name.endswith(PARTIAL))):
        shown = ", ".join(f"'{name}'" for name in foreign[:3]) + (" ..." if len(foreign) > 3 else "")
        raise ArtifactError(f"'{path}' is not empty and is not a run: it holds {shown}", "choose another directory with --out")
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not run.is_file():
            atomic_write(run, json_bytes(config))
        (path / WORK).mkdir(exist_ok=True)
    except OSError as error:
        raise _write_error(path, error) from error
    return path / WORK


def _check_resumable(path: Path, config: dict[str, Any], *, resume: bool) -> None:
    if not resume:
        state = "a finished run" if is_finished(path) else "an unfinished run"
        raise ArtifactError(f"'{path}' already holds {state}", "continue it with --resume, or choose another directory with --out")
    before = _flat(_parse(path / RUN, _read(path / RUN)))
    after = _flat(config)
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    if changed:
        lines = [f"{key}: was {before.get(key)!r}, now {after.get(key)!r}" for key in changed]
        raise ArtifactError(
            f"'{path}' was started with another configuration:\n  " + "\n  ".join(lines),
            "repeat the original flags with --resume, or choose another directory with --out",
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def is_finished(path: Path) -> bool:
    """Whether a run or export in `path` was written to its end."""
    return (path / MANIFEST).is_file()


def runs_of_sweep(folder: Path) -> list[Path]:
    """The finished runs in the folder of a sweep, from its table; none where it is no such folder."""
    file = folder / f"{SWEEP}.json"
    tree = _parse(file, _read(file)) if file.is_file() else {"runs": []}
    return [folder / row["run"] for row in tree["runs"] if row["state"] == "finished"]


def latest_run(root: Path = Path("runs")) -> Path:
    """The newest finished run in a directory of runs. Raises ArtifactError when there is none."""
    found = [entry for entry in root.iterdir() if is_finished(entry)] if root.is_dir() else []
    if not found:
        raise ArtifactError(f"there is no finished run in '{root}'", "edgeft train-quantize --method lpft makes one")
    return max(found, key=lambda run: ((run / MANIFEST).stat().st_mtime_ns, run.name))
