"""Which kernels a graph becomes, how its tensors are stored, and what target c refuses."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from edgeft.errors import UnsupportedError
from edgeft.export.c_memory import lay_out
from edgeft.export.c_plan import IMAGE, LOGITS, Plan, c_name, plan
from edgeft.export.c_source import bundle_files
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import Conv, IntegerGraph, MaxPool
from tests.exports import every_op, plain_net, widen
from tests.graphs import GraphBuilder, random_images, residual_net


def kernels_of(planned: Plan) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for step in planned.steps:
        found.setdefault(step.layer, []).append(step.kernel)
    return found


def constants_of(planned: Plan, layer: str) -> dict[str, Any]:
    step = next(each for each in planned.steps if each.layer == layer)
    return {each.name.rpartition("_")[2]: each.values for each in step.constants}


def test_each_op_has_its_kernel() -> None:
    graph = every_op()
    found = kernels_of(plan(graph))
    assert [kernel for kernels in found.values() for kernel in kernels] == [
        "conv2d_packed", "max_pool", "dwconv2d_packed", "conv2d_packed", "add_narrow", "global_pool", "conv2d_packed", "lookup", "mul_gate",
        "conv2d_packed", "lookup", "conv2d_packed", "mul", "select", "select", "concat", "concat", "concat", "resize", "conv2d_packed",
        "global_pool", "conv2d_packed", "conv2d_packed_wide",
    ]  # fmt: skip


def test_flatten_permutes_the_weights_of_linear_layers_instead_of_codes() -> None:
    b = GraphBuilder(0, (2, 3, 4))
    x = b.linear(b.flatten(b.conv("image", 5, (1, 1))), 6)
    graph = b.graph()
    planned = plan(graph)
    assert planned.views == {"flatten1": "conv0"}
    assert planned.stored["flatten1"].map_shape == (5, 3, 4)
    weight = graph.constants[f"{x}.weight"]
    packed = constants_of(planned, x)["weight"]  # [groups, blocks, runs, quads, 16, 4]
    rows = packed[0, 0, 0].transpose(1, 0, 2).reshape(16, 60)[:6].reshape(6, 3, 4, 5)
    assert np.array_equal(rows[:, 1, 2], weight.reshape(6, 5, 3, 4)[:, :, 1, 2])


def test_flatten_moves_codes_for_readers_that_need_the_order() -> None:
    b = GraphBuilder(0, (2, 3, 4))
    b.linear(b.lookup(b.flatten("image")), 6)
    assert kernels_of(plan(b.graph()))["flatten0"] == ["flatten"]


def test_moves_that_move_nothing_are_views() -> None:
    b = GraphBuilder(0, (3, 4, 4))
    x = b.conv("image", 4)
    b.head(b.concat(b.resize(b.select(x, (0, 1, 2, 3)), (1, 1))), 3)
    planned = plan(b.graph())
    assert list(planned.views) == ["select1", "resize2", "concat3", "flatten5"]
    assert {planned.root(name) for name in ("select1", "resize2", "concat3")} == {x}


def test_a_signed_image_is_read_as_it_is_unless_codes_of_it_are_moved() -> None:
    assert plan(plain_net(image_format="s8.7")).stored["image"].storage == "EDGEFT_OFFSET"
    b = GraphBuilder(0, (3, 4, 4), image_format="s8.7")
    b.conv(b.resize("image", (2, 2)), 4)
    planned = plan(b.graph())
    assert planned.stored["image"].storage == "EDGEFT_S8"
    assert (planned.steps[0].kernel, planned.steps[0].reads, planned.steps[0].writes) == ("image_codes", (IMAGE,), "image")


def test_tables_are_in_the_order_of_the_bytes() -> None:
    b = GraphBuilder(0, (1, 2, 2))
    signed = b.lookup(b.conv("image", 1, relu=False), FixedPointFormat.parse("u8.5"))
    unsigned = b.lookup(signed)
    graph = b.graph()
    table = graph.constants[f"{signed}.table"]
    found = constants_of(plan(graph), signed)["table"]
    assert [found[code & 255] for code in (-128, -1, 0, 127)] == [table[code + 128] for code in (-128, -1, 0, 127)]
    assert np.array_equal(constants_of(plan(graph), unsigned)["table"], graph.constants[f"{unsigned}.table"].astype(np.uint8))


def test_results_are_written_over_operands_that_nothing_reads_any_more() -> None:
    b = GraphBuilder(0, (3, 4, 4))
    x = b.conv("image", 4, relu=False)
    y = b.lookup(b.add(x, b.lookup(x)))  # lookup1 must leave conv0, which add2 reads; add2 and lookup3 may write over their operands
    b.conv(y, 4)
    planned = plan(b.graph())
    memory = lay_out(planned)
    assert memory.in_place == ("add2", "lookup3")
    assert memory.offsets["add2"] == memory.offsets["lookup3"] != memory.offsets["lookup1"]


def test_logits_are_written_where_the_caller_wants_them() -> None:
    planned = plan(residual_net(0))
    assert lay_out(planned).homes[planned.graph.output] == "logits"
    assert not [step for step in planned.steps if step.writes == LOGITS]
    b = GraphBuilder(0, (3, 4, 4))
    b.conv("image", 4)
    assert (plan(b.graph()).steps[-1].kernel, plan(b.graph()).steps[-1].writes) == ("logits", LOGITS)


def test_names_are_names_of_c() -> None:
    b = GraphBuilder(0, (3, 4, 4))
    b.conv("image", 4)
    graph = b.graph()
    tensors = {**graph.tensors, "layer1.0/*x*/é": dataclasses.replace(graph.tensors["conv0"], name="layer1.0/*x*/é")}
    op = dataclasses.replace(graph.ops[0], output="layer1.0/*x*/é")
    named = IntegerGraph(tensors, (op,), "image", constants=graph.constants)
    assert c_name(named, "layer1.0/*x*/é") == "t1_layer1_0_x_"
    planned = plan(named)
    text = bundle_files(planned, lay_out(planned), random_images(named, 1), np.zeros((1, 64), np.int64), "a title")["model.c"]
    assert "/* layer1.0/ *x* /é = Conv(image): 4 x 4 x 4, u8.5 */" in text


def single(shift: int, *, out: str = "u8.0", weight: int = 1, bias: int = 0) -> IntegerGraph:
    """One 1x1 convolution of one channel whose right shift is given."""
    b = GraphBuilder(0, (1, 2, 2))
    fmt = FixedPointFormat.parse(out)
    b.conv("image", 1, (1, 1), fmt=fmt)
    (op,) = b.ops
    assert isinstance(op, Conv)
    constants: dict[str, Any] = {op.weight: np.full((1, 1, 1, 1), weight, np.int8), op.bias: np.full(1, bias, np.int32)}
    return IntegerGraph(b.tensors, (dataclasses.replace(op, weight_frac=(shift + fmt.frac - 8,)),), "image", constants=constants)


def test_shifts_beyond_the_kernels_are_shortened_where_the_codes_are_the_same() -> None:
    assert constants_of(plan(single(40)), "conv0")["shift"].max() == 31
    assert constants_of(plan(single(-40)), "conv0")["shift"].tolist() == [-30]


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (single(40, bias=2**30 + 1), "layer 'conv0': target c cannot shift accumulators of up to 1073742080 by 40 ... 40"),
        (single(-31, out="s32.0", weight=0), "layer 'conv0': target c cannot shift accumulators of up to 0 by -31 ... -31"),
        (single(0, out="u16.0"), "layer 'conv0': target c has no unsigned format of 16 bits ('u16.0')"),
        (single(0, out="s32.0"), "layer 'conv0' hands out a map of accumulators (1, 2, 2); target c hands out vectors of them"),
    ],
)
def test_numbers_beyond_the_kernels_are_refused_by_name(graph: IntegerGraph, message: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        plan(graph)
    assert caught.value.message == message


def test_ops_without_a_kernel_are_refused_by_name() -> None:
    b = GraphBuilder(0, (3, 4, 4))
    x = b.conv("image", 4)
    widen(b, x)
    b.ops.append(MaxPool("pool", x, (2, 2), (2, 2), (0, 0, 0, 0)))
    b.tensors["pool"] = dataclasses.replace(b.tensors[x], name="pool", shape=(4, 2, 2))
    with pytest.raises(UnsupportedError, match=r"^layer 'pool' reads 'conv0', which is not 8-bit; target c has no kernel for that$"):
        plan(b.graph())


def test_another_rounding_is_refused() -> None:
    graph: Any = dataclasses.replace(residual_net(0), rounding="half_up")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"^rounding 'half_up': the kernels of target c round half to even$"):
        plan(graph)
