import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest

from edgeft.errors import ArtifactError
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import Concat, IntegerGraph, Lookup, Mul, Op, Resize, Select, Tensor, op_inputs
from edgeft.interpret import Interpreter
from tests.graphs import GraphBuilder, random_images

SIGNED = FixedPointFormat(8, 5, signed=True)


def moves_net(seed: int = 0) -> IntegerGraph:
    """conv0, conv1 and pool2 from the image; then mul3, lookup4, concat5, select6, resize7."""
    b = GraphBuilder(seed, (3, 4, 5))
    left, right = b.conv("image", 4, fmt=SIGNED), b.conv("image", 4, relu=False, fmt=SIGNED)
    product = b.mul(left, b.global_pool(right))
    table = b.lookup(product, SIGNED)
    b.resize(b.select(b.concat(left, table, right), (11, 0, 4, 4)), (2, 3))
    return b.graph()


def tensor_changed(graph: IntegerGraph, name: str, **changes: Any) -> IntegerGraph:
    tensor = dataclasses.replace(graph.tensors[name], **changes)
    return dataclasses.replace(graph, tensors={**graph.tensors, name: tensor})


def op_changed(graph: IntegerGraph, name: str, **changes: Any) -> IntegerGraph:
    ops = tuple(dataclasses.replace(op, **changes) if op.output == name else op for op in graph.ops)
    return dataclasses.replace(graph, ops=ops)


def fmt(text: str) -> FixedPointFormat:
    return FixedPointFormat.parse(text)


def test_every_op_lists_what_it_reads() -> None:
    ops = {op.output: op for op in moves_net().ops}
    assert op_inputs(ops["mul3"]) == ("conv0", "pool2")
    assert op_inputs(ops["concat5"]) == ("conv0", "lookup4", "conv1")
    assert [op_inputs(ops[name]) for name in ("lookup4", "select6", "resize7")] == [("mul3",), ("concat5",), ("select6",)]


def test_the_shift_of_a_product_is_that_of_the_product_of_steps_and_moves_have_none() -> None:
    graph = moves_net()
    shifts = {op.output: graph.shift(op).tolist() for op in graph.ops}
    assert shifts["mul3"] == [5 + graph.format("pool2").frac - graph.format("mul3").frac]
    assert [shifts[name] for name in ("lookup4", "concat5", "select6", "resize7")] == [[0]] * 4


def test_json_round_trip_keeps_the_ops_and_their_codes() -> None:
    graph = moves_net()
    again = IntegerGraph.from_json(json.loads(json.dumps(graph.to_json())), graph.constants)
    assert again.ops == graph.ops
    images = random_images(graph, 2)
    before, after = Interpreter(graph).layers(images), Interpreter(again).layers(images)
    assert all(np.array_equal(after[name], codes) for name, codes in before.items())


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("mul3", (4, 4, 4), "Mul 'mul3' has shape (4, 4, 4); its left operand has (4, 4, 5)"),
        ("pool2", (4, 1, 5), "Mul 'mul3' multiplies (4, 4, 5) by (4, 1, 5); allowed: (4, 4, 5), (4, 1, 1)"),
        ("lookup4", (4, 5, 4), "Lookup 'lookup4' has shape (4, 5, 4); its input has (4, 4, 5)"),
        ("conv1", (4, 4, 6), "Concat 'concat5' joins shapes that differ beyond the channels: (4, 4, 5), (4, 4, 5), (4, 4, 6)"),
        ("concat5", (11, 4, 5), "Concat 'concat5' has shape (11, 4, 5); its inputs give (12, 4, 5)"),
        ("select6", (3, 4, 5), "Select 'select6' has shape (3, 4, 5); its inputs give (4, 4, 5)"),
        ("resize7", (4, 8, 10), "Resize 'resize7' has shape (4, 8, 10); its inputs give (4, 8, 15)"),
    ],
)
def test_shapes_must_fit(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ArtifactError, match=f"^{re.escape(f'graph: {message}')}$"):
        tensor_changed(moves_net(), name, shape=shape)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("pool2", "s16.5", "Mul 'mul3' needs 8-bit tensors; 'pool2' is 's16.5'"),
        ("mul3", "s32.5", "Mul 'mul3' needs 8-bit tensors; 'mul3' is 's32.5'"),
        ("mul3", "w8.5", "Lookup 'lookup4' needs formats of 256 codes; 'mul3' is 'w8.5'"),
        ("lookup4", "s7.5", "Lookup 'lookup4' needs formats of 256 codes; 'lookup4' is 's7.5'"),
        ("conv1", "s8.6", "'concat5' must keep the format of 'conv1'"),
        ("concat5", "u8.5", "'concat5' must keep the format of 'conv0'"),
        ("select6", "s8.6", "'select6' must keep the format of 'concat5'"),
        ("resize7", "s8.4", "'resize7' must keep the format of 'select6'"),
    ],
)
def test_formats_must_fit(name: str, text: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=f"^{re.escape(f'graph: {message}')}$"):
        tensor_changed(moves_net(), name, format=fmt(text))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.zeros(255, np.int16), "Lookup 'lookup4' needs a table int16 [256], not int16 [255]"),
        (np.zeros(256, np.int32), "Lookup 'lookup4' needs a table int16 [256], not int32 [256]"),
        (np.full(256, 128, np.int16), "Lookup 'lookup4' has a table of 128 ... 128; 's8.5' holds -128 ... 127"),
        (np.full(256, -129, np.int16), "Lookup 'lookup4' has a table of -129 ... -129; 's8.5' holds -128 ... 127"),
        (None, "Lookup 'lookup4' needs the constant 'lookup4.table', which is not there"),
    ],
)
def test_tables_must_fit(table: Any, message: str) -> None:
    graph = moves_net()
    constants = {name: value for name, value in {**graph.constants, "lookup4.table": table}.items() if value is not None}
    with pytest.raises(ArtifactError, match=f"^{re.escape(f'graph: {message}')}$"):
        dataclasses.replace(graph, constants=constants)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("concat5", {"inputs": ()}, "Concat 'concat5' has no inputs"),
        ("concat5", {"inputs": ("conv0", "nowhere")}, "op 'concat5' reads 'nowhere', which no earlier op writes"),
        ("select6", {"index": (0, 1, 2, 12)}, "Select 'select6' selects 0 ... 12; 'concat5' has channels 0 ... 11"),
        ("select6", {"index": (-1, 1, 2, 3)}, "Select 'select6' selects -1 ... 3; 'concat5' has channels 0 ... 11"),
        ("select6", {"index": ()}, "Select 'select6' selects no channels; 'concat5' has channels 0 ... 11"),
        (
            "resize7",
            {"factor": (2, 0)},
            "Resize 'resize7' enlarges shape (4, 4, 5) by (2, 0); it needs a shape [c, h, w] and factors of at least 1",
        ),
    ],
)
def test_fields_must_fit(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=f"^{re.escape(f'graph: {message}')}$"):
        op_changed(moves_net(), name, **changes)


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("mul3", "right", None, "Mul 'mul3' has None as 'right'"),
        ("lookup4", "table", 3, "Lookup 'lookup4' has 3 as 'table'"),
        ("concat5", "inputs", "conv0", "Concat 'concat5' has 'conv0' as 'inputs'"),
        ("concat5", "inputs", ["conv0", 1], "Concat 'concat5' has ['conv0', 1] as 'inputs'"),
        ("select6", "index", [0, 1.0, 2, 3], "Select 'select6' has [0, 1.0, 2, 3] as 'index'"),
        ("select6", "index", [0, True, 2, 3], "Select 'select6' has [0, True, 2, 3] as 'index'"),
        ("resize7", "factor", [2, 3, 1], "Resize 'resize7' has [2, 3, 1] as 'factor'"),
        ("resize7", "factor", 2, "Resize 'resize7' has 2 as 'factor'"),
        ("conv0", "groups", "1", "Conv 'conv0' has '1' as 'groups'"),
        ("conv0", "relu", 1, "Conv 'conv0' has 1 as 'relu'"),
        ("resize7", "op", "Shrink", "op 'resize7' is a 'Shrink', which this version does not know"),
    ],
)
def test_a_malformed_file_names_the_op(name: str, field: str, value: Any, message: str) -> None:
    graph = moves_net()
    tree = graph.to_json()
    next(entry for entry in tree["ops"] if entry["output"] == name)[field] = value
    with pytest.raises(ArtifactError, match=f"^{re.escape(f'graph: {message}')}"):
        IntegerGraph.from_json(tree, graph.constants)


@pytest.mark.parametrize(("kind", "field"), [(Mul, "left"), (Lookup, "table"), (Concat, "inputs"), (Select, "index"), (Resize, "factor")])
def test_a_missing_field_is_named(kind: type[Op], field: str) -> None:
    graph = moves_net()
    tree = graph.to_json()
    entry = next(entry for entry in tree["ops"] if entry["op"] == kind.__name__)
    del entry[field]
    with pytest.raises(ArtifactError, match=f"^graph: {kind.__name__} '{entry['output']}' lacks '{field}'$"):
        IntegerGraph.from_json(tree, graph.constants)


def test_what_is_not_an_op_or_not_a_format_is_refused() -> None:
    graph = moves_net()
    with pytest.raises(ArtifactError, match=r"^graph: 'Mul' is not an op$"):
        IntegerGraph.from_json({**graph.to_json(), "ops": ["Mul"]}, graph.constants)
    tensors = [{"name": "image", "shape": [3, 4, 5], "format": "u8"}]
    with pytest.raises(ArtifactError, match=r"^graph.json: 'u8' is not a fixed-point format$"):
        IntegerGraph.from_json({**graph.to_json(), "tensors": tensors}, graph.constants)


def test_a_missing_weight_is_named() -> None:
    graph = moves_net()
    constants = {name: value for name, value in graph.constants.items() if name != "conv0.bias"}
    with pytest.raises(ArtifactError, match=r"^graph: Conv 'conv0' needs the constant 'conv0.bias', which is not there$"):
        dataclasses.replace(graph, constants=constants)


def test_a_gate_of_a_vector_has_its_shape() -> None:
    tensors = {name: Tensor(name, (3,), fmt("u8.8")) for name in ("image", "y")}
    assert IntegerGraph(tensors, (Mul("y", "image", "image"),), "image").output == "y"
    tensors["one"] = Tensor("one", (1,), fmt("u8.8"))
    with pytest.raises(ArtifactError, match=r"Mul 'y' multiplies \(3,\) by \(1,\); allowed: \(3,\)$"):
        IntegerGraph(tensors, (Select("one", "image", (0,)), Mul("y", "image", "one")), "image")
