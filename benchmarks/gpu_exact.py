"""The training graph on a GPU against the NumPy interpreter: every code of every tensor, in every arithmetic the GPU may choose."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.nets import Case, fixed_point, random_classifier, random_images
from edgeft.artifact import Artifact
from edgeft.config import Config
from edgeft.data.loading import load_dataset, subset
from edgeft.data.preprocess import Preprocessing
from edgeft.graph import Conv, IntegerGraph, Linear
from edgeft.interpret import Interpreter
from edgeft.models import Classifier, build_classifier
from edgeft.progress import Progress
from edgeft.quant.lower import lower
from edgeft.quant.net import FixedPointNet
from edgeft.quant.stage import plan_of
from edgeft.quant.training_graph import TrainingGraph
from edgeft.runner import Images

RANDOM_NETS = ((Case("mobilenetv2_100", 128, 0), 64), (Case("resnet18", 128, 0), 32), (Case("resnet50", 224, 0), 16))
"""Nets with random weights, and on how many images they are compared."""
N_TRAINED = 512
BATCH = 16


@dataclass(frozen=True)
class Arithmetic:
    """What the GPU may do: TF32 in convolutions and matrix products, and any algorithm (the fastest, not only a repeatable one)."""

    tf32: bool
    any_algorithm: bool

    @property
    def label(self) -> str:
        """As tables show it."""
        return f"TF32 {'allowed' if self.tf32 else 'off'}, {'fastest' if self.any_algorithm else 'repeatable'} algorithms"


ARITHMETICS = tuple(Arithmetic(tf32, any_algorithm) for tf32 in (False, True) for any_algorithm in (False, True))


@contextmanager
def in_force(arithmetic: Arithmetic) -> Iterator[None]:
    """Allow what `arithmetic` says, for the length of the block."""
    matmul, free = torch.backends.cuda.matmul, arithmetic.any_algorithm
    before = matmul.allow_tf32
    matmul.allow_tf32 = arithmetic.tf32
    with torch.backends.cudnn.flags(enabled=True, benchmark=free, deterministic=not free, allow_tf32=arithmetic.tf32):
        yield
    matmul.allow_tf32 = before


@dataclass(frozen=True)
class Subject:
    """A net in its three forms, and the images it is compared on."""

    label: str
    classifier: Classifier
    net: FixedPointNet
    graph: IntegerGraph
    images: Images


def random_subject(case: Case, n_images: int) -> Subject:
    """A net with weights that mean nothing, on random images."""
    classifier = random_classifier(case)
    net = fixed_point(classifier)[0]
    images = random_images(n_images, case.size, seed=2).transpose(0, 3, 1, 2).copy()
    return Subject(f"{case.label}, random weights", classifier, net, lower(net), images)


def run_subject(run: Path, n_images: int = N_TRAINED) -> Subject:
    """The network of a finished run, on test images of all its splits. Raises ArtifactError when the run is damaged."""
    artifact = Artifact.load(run)
    config, p = Config.model_validate(artifact.manifest.config), Preprocessing.from_json(artifact.manifest.preprocessing)
    classifier = build_classifier(config.model, config.data, len(artifact.manifest.classes), p.size, config.seed)
    graph = artifact.graph()
    net = training_graph(FixedPointNet(plan_of(classifier, graph.profile), profile=graph.profile, per_channel=False), graph)
    images = subset(load_dataset(config, Progress(False)).tests, p, n_images, config.seed + 2)
    return Subject(f"{config.model.backbone} {p.size} px, trained on {config.data.source}", classifier, net, graph, images)


@torch.no_grad()
def training_graph(net: FixedPointNet, graph: IntegerGraph) -> FixedPointNet:
    """Put the formats, weights and biases of `graph` (one format per layer) into a net of the same structure."""
    net.set_fracs({point.name: graph.format(point.name).frac for point in net.points})
    for op in graph.ops:
        if isinstance(op, Conv | Linear):
            layer, (frac,) = net.layer(op.output), op.weight_frac
            net.set_weight_fracs(op.output, (frac,))
            layer.weight.copy_(torch.from_numpy(graph.constants[op.weight]) * 2.0**-frac)
            layer.bias.copy_(torch.from_numpy(graph.constants[op.bias]).double() * 2.0 ** -(frac + graph.format(op.input).frac))
    return net.eval()


def measure(subject: Subject, device: torch.device, progress: Progress) -> dict[str, Any]:
    """Differing codes of all tensors, logits included, by arithmetic; and how far TF32 moves the float logits. JSON-able."""
    interpreter, trained = Interpreter(subject.graph), TrainingGraph(subject.net.to(device))
    differing = {arithmetic.label: 0 for arithmetic in ARITHMETICS}
    n_codes = 0
    with progress.task(f"compare {subject.label}", len(subject.images)) as advance:
        for start in range(0, len(subject.images), BATCH):
            part = subject.images[start : start + BATCH]
            expected = interpreter.layers(part)
            n_codes += sum(codes.size for codes in expected.values())
            for arithmetic in ARITHMETICS:
                with in_force(arithmetic):
                    found = trained.layers(part)
                differing[arithmetic.label] += sum(int(np.count_nonzero(found[name] != codes)) for name, codes in expected.items())
            advance(len(part))
    return {
        "net": subject.label, "images": len(subject.images), "tensors": len(subject.graph.tensors), "codes": n_codes,
        "differing": differing, "float_shift": float_shift(subject, device),
    }  # fmt: skip


@torch.inference_mode()
def float_shift(subject: Subject, device: torch.device) -> float:
    """Largest change of a float logit when TF32 is allowed, relative to the largest logit: above 0, the GPU does use TF32."""
    classifier, images = subject.classifier.to(device), torch.from_numpy(subject.images[:BATCH]).to(device)
    scores = []
    for arithmetic in (Arithmetic(False, False), Arithmetic(True, False)):
        with in_force(arithmetic):
            scores.append(classifier(images))
    return float((scores[0] - scores[1]).abs().max() / scores[0].abs().max())


def rows_of(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """One table row for each arithmetic."""
    size = f"of {record['codes']:,} ({record['images']} images, {record['tensors']} tensors)"
    return [("differing codes", record["net"], label, f"{differing} {size}") for label, differing in record["differing"].items()]
