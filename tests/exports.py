"""Small runs to export, and nets that reach everything an export target writes."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgeft.artifact import MANIFEST, Arrays, Artifact, write_artifact
from edgeft.data.preprocess import Preprocessing
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import Conv, IntegerGraph, Profile
from edgeft.interpret import Interpreter
from edgeft.report import EvalReport
from tests.graphs import GraphBuilder, random_images

CLASSES = ("ant", "bee", "cat", "dog", "eel")
N_GOLDEN = 4
PREPROCESSING = Preprocessing(12, 0.875, "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)).to_json()

ImageFormat = Literal["u8.8", "s8.7"]


def write_run(path: Path, graph: IntegerGraph, *, seed: int = 0, wrong: int = 0, labelled: bool = False) -> Artifact:
    """A quantized run of a graph, as far as exports need it.

    `seed` draws its golden images, `wrong` is added to their recorded logits; with labels, the graph is right on the even images only.
    """
    images = random_images(graph, N_GOLDEN, seed)
    codes = Interpreter(graph).layers(images)[graph.output]
    samples: Arrays = {"images": images, f"layer:{graph.output}": codes + wrong}
    if labelled:
        samples["labels"] = (codes.argmax(axis=1) + np.arange(N_GOLDEN) % 2) % len(CLASSES)
    return write_artifact(
        path, kind="quantized", config={}, seed=0, preprocessing=PREPROCESSING, classes=CLASSES,
        arrays={"weights.safetensors": graph.constants, "samples.safetensors": samples},
        documents={"graph.json": graph.to_json(), "report.json": EvalReport(()).to_json()},
    )  # fmt: skip


def rewrite(artifact: Path, name: str, data: bytes) -> None:
    """Replace a file of an artifact and its hash in the manifest, so that loading it does not notice."""
    (artifact / name).write_bytes(data)
    manifest: dict[str, Any] = json.loads((artifact / MANIFEST).read_text())
    manifest["files"][name], manifest["file_bytes"][name] = hashlib.sha256(data).hexdigest(), len(data)
    (artifact / MANIFEST).write_text(json.dumps(manifest))


def widen(b: GraphBuilder, name: str) -> None:
    """Let a convolution hand out its accumulators instead of rounding them."""
    (op,) = (op for op in b.ops if op.output == name)
    assert isinstance(op, Conv)
    frac = max(op.weight_frac) + b.tensors[op.input].format.frac
    b.tensors[name] = dataclasses.replace(b.tensors[name], format=FixedPointFormat(32, frac, signed=True))


def plain_net(seed: int = 0, *, profile: Profile = "u8", image_format: ImageFormat = "u8.8", per_channel: bool = False) -> IntegerGraph:
    """Stem, depthwise and dense convolution, pool, classifier: no additions."""
    b = GraphBuilder(seed, (3, 12, 12), profile=profile, image_format=image_format, per_channel=per_channel)
    x = b.conv(b.conv("image", 8, stride=(2, 2)), 8, groups=8)
    return b.head(b.conv(x, 12, (1, 1), relu=False), len(CLASSES))


def wide_net(seed: int = 0, *, profile: Profile = "s8", image_format: ImageFormat = "s8.7", per_channel: bool = False) -> IntegerGraph:
    """Two residual blocks in mode `wide`, the accumulators on the right and on the left of the addition."""
    b = GraphBuilder(seed, (3, 12, 12), profile=profile, image_format=image_format, per_channel=per_channel)
    x = b.conv("image", 8)
    for index in range(2):
        y = b.conv(b.conv(x, 8), 8, (1, 1), relu=False)
        x = b.add(*((y, x) if index else (x, y)), relu=bool(index))
        widen(b, y)
    return dataclasses.replace(b.head(x, len(CLASSES)), residual="wide")


def every_op(
    seed: int = 0, *, profile: Profile = "u8", image_format: ImageFormat = "u8.8", per_channel: bool = False, additions: bool = True
) -> IntegerGraph:
    """Every op, twice where there are two ways to write it; `additions` False leaves them out."""
    b = GraphBuilder(seed, (3, 12, 12), profile=profile, image_format=image_format, per_channel=per_channel)
    x = b.max_pool(b.conv("image", 8, padding=(0, 1, 1, 0)), padding=(0, 1, 1, 0))
    y = b.conv(b.conv(x, 8, groups=8), 8, groups=2, dilation=(2, 2), relu=False)
    x = b.add(x, y) if additions else b.conv(y, 8, (1, 1))
    gate = b.lookup(b.conv(b.global_pool(x), 8, (1, 1), relu=False), FixedPointFormat(8, 8 if profile == "u8" else 7, profile == "s8"))
    x = b.conv(b.mul(x, gate), 8, relu=False)
    x = b.mul(b.lookup(x), b.conv(x, 8, (1, 1)))
    x = b.concat(b.select(x, (2, 3, 4)), b.select(x, (7, 0)), x)
    x = b.conv(b.resize(x, (2, 1)), 6, (3, 1), stride=(2, 1))
    x = b.linear(b.flatten(b.global_pool(x)), 7, relu=True, wide=False)
    b.linear(x, len(CLASSES))
    return b.graph()
