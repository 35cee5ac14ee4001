import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest

from edgeft.errors import ArtifactError, UnsupportedError
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import Conv, IntegerGraph, Linear, Op
from edgeft.interpret import Interpreter
from tests.graphs import GraphBuilder, random_images, residual_net


def replace_op(graph: IntegerGraph, name: str, **changes: Any) -> IntegerGraph:
    ops = tuple(dataclasses.replace(op, **changes) if op.output == name else op for op in graph.ops)
    return dataclasses.replace(graph, ops=ops)


def op_named(graph: IntegerGraph, name: str) -> Op:
    return next(op for op in graph.ops if op.output == name)


def test_json_round_trip_keeps_every_integer() -> None:
    graph = residual_net(0, per_channel=True, profile="s8", image_format="s8.7")
    again = IntegerGraph.from_json(json.loads(json.dumps(graph.to_json())), graph.constants)
    assert (again.ops, again.tensors, again.input, again.profile) == (graph.ops, graph.tensors, graph.input, graph.profile)
    images = random_images(graph, 3)
    assert np.array_equal(Interpreter(again).logits(images), Interpreter(graph).logits(images))


def test_json_shows_shift_and_bound_to_the_reader() -> None:
    graph = residual_net(0)
    entries = {entry["output"]: entry for entry in graph.to_json()["ops"]}
    conv = op_named(graph, "conv2")
    assert isinstance(conv, Conv)
    assert entries["conv2"]["shift"] == [graph.format(conv.input).frac + conv.weight_frac[0] - graph.format("conv2").frac]
    assert entries["conv2"]["accumulator_bound"] == graph.accumulator_bound(conv)
    assert "accumulator_bound" not in entries["maxpool1"]


def test_another_schema_is_refused() -> None:
    graph = residual_net(0)
    with pytest.raises(ArtifactError, match=r"^graph schema 99 is not 1, the one this version reads$"):
        IntegerGraph.from_json({**graph.to_json(), "schema": 99}, graph.constants)


def test_a_missing_key_is_refused() -> None:
    tree = residual_net(0).to_json()
    del tree["profile"]
    with pytest.raises(ArtifactError, match=r"^graph.json is not complete: 'profile'$"):
        IntegerGraph.from_json(tree, residual_net(0).constants)


def test_reading_a_tensor_nobody_wrote_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"^graph: op 'conv2' reads 'nowhere', which no earlier op writes$"):
        replace_op(residual_net(0), "conv2", input="nowhere")


def test_writing_a_tensor_twice_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"^graph: tensor 'conv0' is written twice or has no format$"):
        replace_op(residual_net(0), "conv2", output="conv0")


def test_moving_codes_must_keep_the_format() -> None:
    graph = residual_net(0)
    other = dataclasses.replace(graph.tensors["maxpool1"], format=FixedPointFormat(8, 1, signed=False))
    with pytest.raises(ArtifactError, match=r"^graph: 'maxpool1' must keep the format of 'conv0'$"):
        dataclasses.replace(graph, tensors={**graph.tensors, "maxpool1": other})


@pytest.mark.parametrize(
    "wrong", [np.full((8, 3, 3, 3), -128, np.int8), np.zeros((8, 3, 3, 3), np.int16)], ids=["lowest code", "another type"]
)
def test_constants_must_be_narrow_int8(wrong: np.ndarray[Any, Any]) -> None:
    graph = residual_net(0)
    message = "graph: constants of 'conv0' must be int8 in -127 ... 127 and int32"
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        dataclasses.replace(graph, constants={**graph.constants, "conv0.weight": wrong})


def test_weight_fractions_are_one_or_one_per_channel() -> None:
    with pytest.raises(ArtifactError, match=r"^graph: 'conv0' needs 1 or 8 weight fractions$"):
        replace_op(residual_net(0), "conv0", weight_frac=(7, 7))


def one_linear(weight: int, bias: int, n_in: int = 4) -> GraphBuilder:
    b = GraphBuilder(0, (n_in, 1, 1))
    b.linear(b.flatten("image"), 2)
    b.constants["linear1.weight"][:] = weight
    b.constants["linear1.bias"][:] = bias
    return b


def test_the_accumulator_bound_is_reached() -> None:
    graph = one_linear(127, 1000).graph()
    linear = graph.ops[-1]
    assert isinstance(linear, Linear)
    largest = Interpreter(graph).layers(np.full((1, 4, 1, 1), 255, np.uint8))[graph.output].max()
    assert graph.accumulator_bound(linear) == largest == 4 * 127 * 255 + 1000


def test_an_accumulator_that_may_overflow_is_refused() -> None:
    bias = 2**31 - 4 * 127 * 255
    one_linear(127, bias - 1).graph()
    with pytest.raises(UnsupportedError, match=r"^layer 'linear1': its accumulator may overflow 32 bits$"):
        one_linear(127, bias).graph()


def test_consumers_are_listed_in_order() -> None:
    graph = residual_net(0)
    assert [op.output for op in graph.consumers["maxpool1"]] == ["conv2", "add4"]
    assert graph.consumers[graph.output] == ()
