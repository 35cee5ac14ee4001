import dataclasses
import re

import numpy as np
import pytest

from edgeft.errors import UnsupportedError
from edgeft.export.agreement import accumulator_bound, check_float_agreement
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import Add, GlobalPool, IntegerGraph, Mul
from tests.graphs import GraphBuilder, residual_net


def wide_conv(shift: int, *, signed: bool, bias: int) -> IntegerGraph:
    """One convolution 1x1 with the given shift and an accumulator bound of 255 * 127 + bias."""
    b = GraphBuilder(0, (1, 2, 2))
    name = b.conv("image", 1, (1, 1), relu=not signed)
    b.constants[f"{name}.weight"][:], b.constants[f"{name}.bias"][:] = 127, bias
    conv = b.ops[0]
    frac = int(b.graph().shift(conv)[0]) + b.tensors[name].format.frac - shift
    b.tensors[name] = dataclasses.replace(b.tensors[name], format=FixedPointFormat(8, frac, signed=signed))
    return b.graph()


def test_ordinary_nets_are_accepted() -> None:
    for seed in range(4):
        check_float_agreement(residual_net(seed, per_channel=bool(seed % 2), jitter=2))


@pytest.mark.parametrize(("signed", "allowed"), [(False, 16), (True, 17)])
def test_a_shift_beyond_saturation_needs_a_small_accumulator(signed: bool, allowed: int) -> None:
    large = 2**24
    check_float_agreement(wide_conv(allowed, signed=signed, bias=large))
    check_float_agreement(wide_conv(allowed + 1, signed=signed, bias=large - 255 * 127))
    with pytest.raises(UnsupportedError) as caught:
        check_float_agreement(wide_conv(allowed + 1, signed=signed, bias=large))
    assert caught.value.message == (
        f"layer 'conv0': shift {allowed + 1} is more than {allowed} and its accumulator may reach {large + 255 * 127}, "
        "more than float32 holds exactly (16777216)"
    )


def logits_with_bias(bias: int) -> IntegerGraph:
    b = GraphBuilder(0, (4, 1, 1))
    b.linear(b.flatten("image"), 2)
    b.constants["linear1.weight"][:], b.constants["linear1.bias"][:] = 1, bias
    return b.graph()


def test_logits_must_be_exact_in_float32() -> None:
    check_float_agreement(logits_with_bias(2**24 - 4 * 255))
    message = "layer 'linear1': 32-bit accumulators up to 16777217 are not exact in float32 (16777216)"
    with pytest.raises(UnsupportedError, match=f"^{re.escape(message)}$"):
        check_float_agreement(logits_with_bias(2**24 - 4 * 255 + 1))


@pytest.mark.parametrize("text", ["s16.8", "s32.0", "s32.100"])
def test_wide_formats_must_hold_the_accumulator(text: str) -> None:
    graph = logits_with_bias(0)
    tensor = dataclasses.replace(graph.tensors["linear1"], format=FixedPointFormat.parse(text))
    with pytest.raises(UnsupportedError, match=f"^layer 'linear1': format '{text}' does not hold its accumulator as it is$"):
        check_float_agreement(dataclasses.replace(graph, tensors={**graph.tensors, "linear1": tensor}))


def test_computing_on_wide_tensors_is_refused() -> None:
    b = GraphBuilder(0, (4, 1, 1))
    b.linear(b.linear(b.flatten("image"), 4), 2)
    b.constants["linear2.weight"][:] = 0
    with pytest.raises(UnsupportedError, match=r"^layer 'linear2' reads 'linear1', which is not 8-bit$"):
        check_float_agreement(b.graph())


def test_concatenating_wide_tensors_is_refused() -> None:
    b = GraphBuilder(0, (4, 1, 1))
    logits = b.linear(b.flatten("image"), 4)
    b.concat(logits, logits)
    with pytest.raises(UnsupportedError, match=r"^layer 'concat2' reads 'linear1', which is not 8-bit$"):
        check_float_agreement(b.graph())


@pytest.mark.parametrize("shift", [-3, 0, 16, 17, 24, 40])
def test_products_are_exact_for_every_shift_and_their_bound_is_reached(shift: int) -> None:
    b = GraphBuilder(0, (2, 2, 2))
    b.mul("image", "image", FixedPointFormat(8, 16 - shift, signed=False))
    graph = b.graph()
    check_float_agreement(graph)
    assert isinstance(graph.ops[0], Mul)
    assert accumulator_bound(graph, graph.ops[0]) == 255 * 255


def test_the_step_of_a_product_must_be_a_normal_float32_number() -> None:
    b = GraphBuilder(0, (2, 2, 2))
    x = b.lookup("image", FixedPointFormat(8, 80, signed=False))
    b.mul(x, x, FixedPointFormat(8, 100, signed=False))
    with pytest.raises(UnsupportedError, match=re.escape("layer 'mul1': a step of 2^-160 is not a normal float32 number")):
        check_float_agreement(b.graph())


def test_steps_must_be_normal_float32_numbers() -> None:
    graph = residual_net(0)
    tensor = dataclasses.replace(graph.tensors["conv2"], format=FixedPointFormat(8, 127, signed=False))
    with pytest.raises(UnsupportedError, match=re.escape("layer 'conv2': a step of 2^-127 is not a normal float32 number")):
        check_float_agreement(dataclasses.replace(graph, tensors={**graph.tensors, "conv2": tensor}))


def test_bounds_of_additions_and_pools_are_reached() -> None:
    graph = residual_net(0, profile="s8")
    add = next(op for op in graph.ops if isinstance(op, Add))
    left, right = graph.format(add.left), graph.format(add.right)
    finer = max(left.frac, right.frac)
    assert accumulator_bound(graph, add) == (128 << (finer - left.frac)) + (128 << (finer - right.frac))
    pool = next(op for op in graph.ops if isinstance(op, GlobalPool))
    assert accumulator_bound(graph, pool) == 128 * int(np.prod(graph.tensors[pool.input].shape[1:]))
