"""Cells of the suite edge-cpu: one form of one method and seed on one data set, measured once and kept as an artifact.

Everything is the product's own: data, stages, training, quantization. What a cell chooses it chooses on the ID validation split;
test splits are read once, when the cell is scored.
"""

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from benchmarks import qat
from benchmarks.qat import BREVITAS, EDGEFT, STATIC, Subject, Variant
from edgeft.artifact import Artifact, installed_versions, is_finished, json_bytes, write_artifact
from edgeft.checkpoint import state_of
from edgeft.config import Config
from edgeft.data import Dataset, Split
from edgeft.data.folders import FolderImages
from edgeft.data.loading import ImageCache, load_dataset, subset
from edgeft.data.preprocess import Preprocessing
from edgeft.export.verify import verify
from edgeft.graph import IntegerGraph
from edgeft.interpret import Interpreter
from edgeft.layers import check_stages
from edgeft.methods import METHODS, Stage
from edgeft.methods.run import run_stages
from edgeft.models import build_classifier
from edgeft.pipeline import FloatModel
from edgeft.progress import Progress
from edgeft.quant.lower import lower
from edgeft.quant.training_graph import TrainingGraph

FLOAT = "float"
FORMS = {
    "ORT static": Variant(STATIC, "channel", "none"),
    "Brevitas QAT": Variant(BREVITAS, "channel", "labels"),
    "edgeft per tensor": Variant(EDGEFT, "tensor", "labels"),
    "edgeft per channel": Variant(EDGEFT, "channel", "labels"),
}
"""The 8-bit forms. Both peers have a scale per output channel, the more accurate of their two forms."""
LEAD = "lpft"
"""The method whose 8-bit forms come first, and whose latency is measured: the nets of all methods have one shape."""
FIRST = ("lp", "ft", LEAD)
"""Methods that the others are compared with."""
AVERAGING = ("wise", "soup")
"""Solvers that train nothing: methods that differ in these alone share what was trained."""
N_VERIFIED = 4
"""Test images on which every code of a net of ours is compared with the interpreter's before it is scored."""
WORK = "work"


@dataclass(frozen=True)
class Cell:
    """One measurement: `form` is FLOAT or a key of FORMS."""

    data: str
    method: str
    seed: int
    form: str = FLOAT

    @property
    def name(self) -> str:
        """As progress and --only show it."""
        return f"{self.data} {self.method} {self.seed} {self.form}"


class Records:
    """A folder of finished cells. One of another configuration, other versions, or another float net counts as not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, cell: Cell) -> Path:
        """Where a cell's artifact is, or will be."""
        return self.folder / f"{cell.data}-{cell.method}-{cell.seed}" / cell.form.replace(" ", "-")

    def find(self, cell: Cell, config: Config, parent: Artifact | None = None) -> Artifact | None:
        """A finished cell of this configuration, made of the float net `parent`. Settings that it does not know had their defaults."""
        path = self.path(cell)
        if not is_finished(path):
            return None
        found = Artifact.load(path)
        about = found.manifest
        try:
            before = Config.model_validate(about.config)
        except ValidationError:  # of a version with other settings
            return None
        same = about.versions == installed_versions() and about.parent == (parent and parent.digest)
        return found if same and _key(cell, before) == _key(cell, config) else None

    def find_all(self, configs: Mapping[Cell, Config]) -> dict[Cell, Artifact]:
        """Every recorded cell; the configurations are those of the float nets, which must come before what was made of them."""
        found: dict[Cell, Artifact] = {}
        for cell, config in configs.items():
            tuned = found.get(Cell(cell.data, cell.method, cell.seed))
            if cell.form == FLOAT:
                artifact = self.find(cell, config)
            else:
                artifact = self.find(cell, FORMS[cell.form].config(config), tuned) if tuned is not None else None
            if artifact is not None:
                found[cell] = artifact
        return found


def _key(cell: Cell, config: Config) -> dict[str, Any]:
    """What a cell depends on: float nets on nothing that quantizes them."""
    return config.model_dump(mode="json", exclude={"out", "quant", "verify"} if cell.form == FLOAT else {"out"})


class Bench:
    """Measures cells. The images of one data set and seed are held at a time, so cells should come in that order."""

    def __init__(self, records: Records, progress: Progress) -> None:
        self._records, self._progress = records, progress
        self._held: tuple[Config, Dataset, ImageCache] | None = None

    def float_net(self, cell: Cell, config: Config) -> Artifact:
        """Fine-tune by the cell's method and score; an interrupted stage goes on from its last epoch.

        Raises what loading data, building the classifier and training raise.
        """
        dataset, cache = self.images(config)
        stages: list[Stage] = METHODS.get(config.train.method).stages(config)
        classifier = build_classifier(config.model, config.data, len(dataset.classes), dataset.size, config.seed)
        check_stages(classifier, stages)
        work = self.work(cell) / _digest(config, stages)
        context = qat.context_of(config, dataset, classifier.preprocessing, work, cache, self._progress)
        start = time.perf_counter()
        done = run_stages(classifier, stages, dataset, context)
        seconds = round(time.perf_counter() - start)
        logits = qat.scores(FloatModel(classifier), dataset, classifier.preprocessing, cache)
        state = {name: tensor.detach().cpu().numpy() for name, tensor in state_of(classifier.net).items()}
        counts = {split.name: len(split) for split in (dataset.train, dataset.val, *dataset.tests)}
        return write_artifact(
            self._records.path(cell), kind="finetuned", config=config.model_dump(mode="json"), seed=config.seed,
            preprocessing=classifier.preprocessing.to_json(), classes=dataset.classes,
            arrays={"float.safetensors": state, "logits.safetensors": logits},
            documents={
                "training.json": {"stages": done, "images": counts, "seconds": seconds},
                "splits.json": {split.name: _about(split) for split in dataset.tests},
            },
        )  # fmt: skip

    def eight_bit(self, cell: Cell, config: Config, tuned: Artifact) -> Artifact:
        """Quantize the float net `tuned` and score. Raises VerificationError where a net of ours and its integers differ in a code."""
        dataset, cache = self.images(config)
        variant = FORMS[cell.form]
        subject = Subject(cell.name, tuned, config, dataset, Preprocessing.from_json(tuned.manifest.preprocessing), rate_of(tuned))
        start = time.perf_counter()
        runner, chosen = qat.eight_bit(subject, variant, cache, self._progress)
        seconds = round(time.perf_counter() - start)
        graph = self._verified(runner, subject) if isinstance(runner, TrainingGraph) else None
        integers = {} if graph is None else {"weights.safetensors": dict(graph.constants)}
        return write_artifact(
            self._records.path(cell), kind="quantized", config=variant.config(config).model_dump(mode="json"), seed=config.seed,
            preprocessing=tuned.manifest.preprocessing, classes=dataset.classes, parent=tuned.digest,
            arrays={"logits.safetensors": qat.scores(runner, dataset, subject.preprocessing, cache), **integers},
            documents={"training.json": {"chosen": chosen, "seconds": seconds}} | ({"graph.json": graph.to_json()} if graph else {}),
        )  # fmt: skip

    def _verified(self, runner: TrainingGraph, subject: Subject) -> IntegerGraph:
        graph = lower(runner.net)
        images = subset(subject.dataset.tests, subject.preprocessing, N_VERIFIED, subject.config.seed)
        verify(Interpreter(graph), runner, images)
        return graph

    def images(self, config: Config) -> tuple[Dataset, ImageCache]:
        """The data of a configuration; those of the one before are let go."""
        if self._held is None or (self._held[0].data, self._held[0].seed) != (config.data, config.seed):
            self._held = (config, load_dataset(config, self._progress), ImageCache(config.data.cache_mb))
        return self._held[1:]

    def work(self, cell: Cell) -> Path:
        """Folder of the checkpoints of all methods on one data set and seed."""
        return self._records.folder / WORK / f"{cell.data}-{cell.seed}"

    def clear(self, cell: Cell) -> None:
        """Delete these checkpoints."""
        shutil.rmtree(self.work(cell), ignore_errors=True)


def rate_of(tuned: Artifact) -> float | None:
    """The learning rate that fine-tuning chose last, None where there was none."""
    rates = [stage["result"]["lr"] for stage in tuned.document("training.json")["stages"] if "lr" in stage["result"]]
    return rates[-1] if rates else None


def _digest(config: Config, stages: Sequence[Stage]) -> str:
    """Of what is trained, and on what; averages of it do not count."""
    trained = [asdict(stage) for stage in stages if stage.solver not in AVERAGING]
    tree = config.model_dump(mode="json", exclude={"out": True, "quant": True, "verify": True, "train": {"method"}})
    return hashlib.sha256(json_bytes(tree | {"stages": trained})).hexdigest()[:16]


def _about(split: Split) -> dict[str, Any]:
    """Kind, labels, and names by which an image is known again in another seed's split."""
    assert isinstance(split.images, FolderImages), "the suite reads image folders only"
    return {"kind": split.kind, "labels": split.labels.tolist(), "images": ["/".join(path.parts[-2:]) for path in split.images.paths]}
