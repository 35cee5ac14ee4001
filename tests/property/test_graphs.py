"""Random graphs of products, tables and moves: the interpreter equals plain Python and ONNX Runtime, code for code."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeft.export.onnx_qdq import build_model, check_fusion
from edgeft.export.ort_runner import OnnxRunner, fusion
from edgeft.export.verify import verify
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import IntegerGraph, Profile
from edgeft.interpret import Interpreter
from tests import naive
from tests.graphs import GraphBuilder, random_images

KINDS = ("gate", "square", "product", "table", "concat", "image", "choice", "run", "resize", "pool", "depthwise", "strided")
MOST_CHANNELS, MOST_PIXELS = 6, 60


@st.composite
def formats(draw: st.DrawFn) -> FixedPointFormat:
    return FixedPointFormat(8, draw(st.integers(3, 7)), draw(st.booleans()))


@st.composite
def graphs(draw: st.DrawFn) -> IntegerGraph:
    """A stem, then up to five random blocks around the new operations, then pool and classifier."""
    profile: Profile = draw(st.sampled_from(("u8", "s8")))
    image_format: Literal["u8.8", "s8.7"] = draw(st.sampled_from(("u8.8", "s8.7")))
    b = GraphBuilder(draw(st.integers(0, 2**16)), (2, 5, 4), profile=profile, image_format=image_format, jitter=draw(st.integers(0, 2)))
    x = b.conv("image", 4, relu=draw(st.booleans()), fmt=draw(st.none() | formats()))
    for kind in draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=5)):
        x = block(draw, b, x, kind)
    return b.head(x, 3)


def block(draw: st.DrawFn, b: GraphBuilder, x: str, kind: str) -> str:
    channels, rows, columns = b.tensors[x].shape
    fmt, relu = b.tensors[x].format, draw(st.booleans())
    match kind:
        case "gate":
            return b.mul(x, b.lookup(b.global_pool(x), draw(formats())))
        case "square":
            return b.mul(x, x)
        case "product":
            return b.mul(x, b.conv(x, channels, (1, 1), relu=relu))
        case "table":
            return b.lookup(x, draw(formats()))
        case "concat":
            members = [x, *(b.conv(x, 2, (1, 1), relu=draw(st.booleans()), fmt=fmt) for _ in range(draw(st.integers(0, 2))))]
            x = b.concat(*draw(st.permutations(members)))
        case "image":
            extra = b.conv("image", 2, relu=relu, fmt=b.tensors["image"].format)
            x = b.concat(x, extra) if fmt == b.tensors["image"].format and (rows, columns) == (5, 4) else b.concat("image", extra)
        case "choice":
            x = b.select(x, tuple(draw(st.lists(st.integers(0, channels - 1), min_size=1, max_size=MOST_CHANNELS))))
        case "run":
            first = draw(st.integers(0, channels - 1))
            x = b.select(x, tuple(range(first, draw(st.integers(first, channels - 1)) + 1)))
        case "resize":
            factor = draw(st.integers(1, 3)), draw(st.integers(1, 3))
            return b.resize(x, factor) if rows * columns * factor[0] * factor[1] <= MOST_PIXELS else x
        case "pool":
            return b.max_pool(x, padding=(1, 0, 1, 1)) if min(rows, columns) > 2 else x
        case "depthwise":
            return b.conv(x, channels, padding=(0, 2, 2, 0), groups=channels, relu=relu, fmt=draw(st.none() | formats()))
        case "strided":
            return b.conv(x, 4, (1, 1), stride=(2, 2), padding=(0, 0, 0, 0), relu=relu)
    return b.select(x, tuple(range(MOST_CHANNELS))) if b.tensors[x].shape[0] > MOST_CHANNELS else x


@settings(max_examples=30, deadline=None, derandomize=True)
@given(graph=graphs())
def test_the_interpreter_equals_plain_python(graph: IntegerGraph) -> None:
    images = random_images(graph, 3)
    found = Interpreter(graph).layers(images)
    for name, codes in naive.layers(graph, images[2]).items():
        assert np.array_equal(found[name][2], codes), name
    again = IntegerGraph.from_json(graph.to_json(), graph.constants)
    assert (again.ops, again.tensors) == (graph.ops, graph.tensors)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(graph=graphs())
def test_the_interpreter_equals_onnx_runtime_with_and_without_its_optimizations(
    graph: IntegerGraph, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = build_model(graph)
    check_fusion(graph, fusion(model))
    path: Path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    path.write_bytes(model.SerializeToString())
    images = random_images(graph, 5)
    for optimise in (True, False):
        assert verify(Interpreter(graph), OnnxRunner(path, 1, optimise=optimise), images) == 5
