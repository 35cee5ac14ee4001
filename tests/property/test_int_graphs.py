"""Random graphs: the integer-only ONNX file passes the scan and equals the interpreter, code for code."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeft.export.onnx_int import build_model, scan
from edgeft.export.ort_runner import OnnxRunner
from edgeft.export.verify import verify
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import Conv, IntegerGraph
from edgeft.interpret import Interpreter
from tests.graphs import GraphBuilder, random_images
from tests.property.test_graphs import formats, graphs


@st.composite
def wide_graphs(draw: st.DrawFn) -> IntegerGraph:
    """A stem, then up to two residual blocks whose additions take accumulators (mode `wide`), then pool and classifier."""
    image_format: Literal["u8.8", "s8.7"] = draw(st.sampled_from(("u8.8", "s8.7")))
    b = GraphBuilder(draw(st.integers(0, 2**16)), (2, 5, 4), image_format=image_format, per_channel=draw(st.booleans()), jitter=2)
    x = b.conv("image", 4, relu=draw(st.booleans()), fmt=draw(st.none() | formats()))
    for _ in range(draw(st.integers(1, 2))):
        y = b.conv(x, 4, (1, 1), relu=False)
        (op,) = (op for op in b.ops if isinstance(op, Conv) and op.output == y)
        frac = max(op.weight_frac) + b.tensors[x].format.frac
        result = b.add(*draw(st.permutations((x, y))), relu=draw(st.booleans()))
        b.tensors[y] = dataclasses.replace(b.tensors[y], format=FixedPointFormat(32, frac, signed=True))
        x = result
    return dataclasses.replace(b.head(x, 3), residual="wide")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(graph=graphs() | wide_graphs())
def test_the_interpreter_equals_the_integer_only_file(graph: IntegerGraph, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = build_model(graph)
    scan(model)
    path: Path = tmp_path_factory.mktemp("onnx-int") / "model.onnx"
    path.write_bytes(model.SerializeToString())
    images = random_images(graph, 5)
    assert verify(Interpreter(graph), OnnxRunner(path, 1), images) == 5
