"""What there is to measure: every run in every backend, with the digest of exactly the file that is run, or why it cannot be."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgeft.artifact import Artifact
from edgeft.bench import BACKENDS, NOT_TIMED_BY_DEFAULT, Backend, backend
from edgeft.bench.opening import Spec, open_model
from edgeft.bench.peers import Peers, peers_of
from edgeft.bench.results import Row
from edgeft.bench.store import PEER_FILES
from edgeft.config import Config
from edgeft.data import Dataset
from edgeft.data.loading import subset
from edgeft.data.preprocess import Preprocessing
from edgeft.errors import ArtifactError, ConfigError, EdgeftError, MissingExtraError
from edgeft.export import TARGETS
from edgeft.exporting import DOCUMENTS, FLOAT, dataset_of
from edgeft.progress import Progress
from edgeft.show import exports

WEIGHTS = "float.safetensors"


@dataclass(frozen=True)
class Run:
    """A run to measure: `dataset` is its data, or why they are not at hand."""

    name: str
    artifact: Artifact
    config: Config
    dataset: Dataset | str

    @property
    def preprocessing(self) -> Preprocessing:
        """Of its images."""
        return Preprocessing.from_json(self.artifact.manifest.preprocessing)


@dataclass(frozen=True)
class Candidate:
    """A file of a run in a backend. `artifact` holds its golden images: the export, or the run for what is not exported."""

    run: Run
    backend: Backend
    artifact: Artifact
    folder: Path
    digest: str
    file_bytes: int

    def spec(self, threads: int) -> Spec:
        """How to open it."""
        return Spec(self.backend.name, str(self.folder), threads)

    def row(self, threads: int, batch: int) -> Row:
        """Its row, without numbers."""
        about = self.backend
        return Row(
            self.run.name, about.name, about.label, about.form, self.digest, threads, batch, file_bytes=self.file_bytes
        )  # fmt: skip


def runs_of(paths: Sequence[Path], progress: Progress) -> list[Run]:
    """Open the runs; each is called by the last part of its path, or by all of it where two would have one name.

    Raises ArtifactError for a damaged one, and for an export: that is measured with the run that it is of.
    """
    names = [path.resolve().name for path in paths]
    found = []
    for path, name in zip(paths, names, strict=True):
        artifact = Artifact.load(path)
        if artifact.manifest.kind == "exported":
            raise ArtifactError(f"'{path}' is an export, not a run", "give the run: its exports are found in it")
        config = Config.model_validate(artifact.manifest.config)
        measured = artifact.report().model(FLOAT) is not None
        dataset = dataset_of(artifact, config, progress) if measured else "the run has not been measured"
        found.append(Run(str(path) if names.count(name) > 1 else name, artifact, config, dataset))
    return found


def backends_of(names: Sequence[str], runs: Sequence[Run]) -> list[Backend]:
    """The named backends; by default all that are known, and each target that a run has been exported to and that is no proof."""
    targets = TARGETS.names()
    if names:
        return [backend(name, targets) for name in dict.fromkeys(names)]
    exported = {name for run in runs for name in exports(run.artifact) if name in targets}
    return [*BACKENDS.values(), *(backend(name, targets) for name in sorted(exported - NOT_TIMED_BY_DEFAULT - BACKENDS.keys()))]


def candidates_of(run: Run, backends: Sequence[Backend], out: Path) -> tuple[list[Candidate], list[Row], str]:
    """What of a run can be measured, a row for each backend that cannot, and what its peers were made from."""
    peers, origin = _peers(run, backends, out)
    found: list[Candidate] = []
    missing = []
    for one in backends:
        try:
            candidate = _candidate(run, one, peers)
            open_model(candidate.spec(1))
            found.append(candidate)
        except EdgeftError as error:
            empty = Row(run.name, one.name, one.label, one.form, "", 0, 0, status="missing", problem=_reason(error))
            missing.append(replace(empty, not_scored="not available"))
    return found, missing, origin


def _peers(run: Run, backends: Sequence[Backend], out: Path) -> tuple[Peers | EdgeftError | None, str]:
    """Training images calibrate, as they do for the run itself; without its data the golden images, which are test images."""
    if not any(one.name in PEER_FILES for one in backends):
        return None, ""
    if isinstance(run.dataset, Dataset):
        n = run.config.quant.calibration_images
        images, origin = subset([run.dataset.train], run.preprocessing, n, run.config.seed), "training images"
    else:
        images, origin = run.artifact.samples()["images"], "golden test images, as the training images are not at hand"
    try:
        peers = peers_of(run.artifact, out / "peers" / run.artifact.digest[:16], images)
        equal = f"its float32 file equals PyTorch to {peers.difference:.0e} of the largest score"
        return peers, f"calibrated on {len(images)} {origin}; {equal}"
    except EdgeftError as error:
        return error, ""


def _candidate(run: Run, one: Backend, peers: Peers | EdgeftError | None) -> Candidate:
    if one.target is not None:
        return _exported(run, one, one.target)
    if one.name in PEER_FILES:
        if not isinstance(peers, Peers):
            raise peers or ConfigError("no peers were made")
        size = (peers.folder / PEER_FILES[one.name]).stat().st_size
        return Candidate(run, one, run.artifact, peers.folder, peers.digests[one.name], size)
    size = run.artifact.manifest.file_bytes.get(WEIGHTS, 0)
    return Candidate(run, one, run.artifact, run.artifact.path, run.artifact.digest, size)


def _exported(run: Run, one: Backend, target: str) -> Candidate:
    folder = run.artifact.path / "export" / target
    if target not in exports(run.artifact):
        raise ArtifactError(f"'{run.name}' is not exported to '{target}'", f"edgeft export {run.artifact.path} --target {target}")
    export = Artifact.load(folder)
    if export.manifest.parent != run.artifact.digest:
        raise ArtifactError(f"'{folder}' was made of another run", f"edgeft export {run.artifact.path} --target {target}")
    return Candidate(run, one, export, folder, export.digest, _size(export))


def _size(export: Artifact) -> int:
    """Bytes of the file that is run, or of the constants of what is compiled; else of all the target's own files."""
    sizes, about = export.manifest.file_bytes, export.document("export.json")
    if about.get("file") in sizes:
        return sizes[about["file"]]
    return int(about.get("constant_bytes") or sum(n for name, n in sizes.items() if name not in DOCUMENTS))


def _reason(error: EdgeftError) -> str:
    hint = error.hint.splitlines()[0].strip() if error.hint else ""
    what = "not available" if isinstance(error, MissingExtraError) else error.message
    return f"{what}: {hint}" if hint else what
