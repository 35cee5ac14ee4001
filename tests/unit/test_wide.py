"""Residual mode `wide`: additions that take a convolution's accumulators and round once."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgeft.bounds import exact_in_float32
from edgeft.errors import ArtifactError, UnsupportedError
from edgeft.export.agreement import check_float_agreement
from edgeft.export.verify import verify
from edgeft.fixedpoint import FixedPointFormat, requantize
from edgeft.graph import Add, Conv, IntegerGraph, Tensor
from edgeft.interpret import Interpreter
from edgeft.quant.lower import enforce_bounds, lower
from edgeft.quant.net import FixedPointNet
from edgeft.quant.rescale import prepare_plan
from edgeft.quant.training_graph import TrainingGraph
from tests.nets import HALF, SIZE, bytes_of, calibrated, depthwise_net, randomise, residual_net

NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": residual_net,
    "depthwise": depthwise_net,
    "resnet18": lambda: timm.create_model("resnet18", num_classes=5),
}


def lowered(net: nn.Module, profile: str, **quant: Any) -> tuple[FixedPointNet, IntegerGraph]:
    plan = prepare_plan(randomise(net), (3, SIZE, SIZE), HALF, HALF, profile, "wide")
    trained = calibrated(plan, profile=profile, residual="wide", **quant)
    enforce_bounds(trained)
    return trained, lower(trained)


@pytest.mark.parametrize("profile", ["u8", "s8"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("name", NETS)
def test_wide_additions_round_once_and_equal_the_training_graph(name: str, granularity: str, profile: str) -> None:
    net, graph = lowered(NETS[name](), profile, granularity=granularity, rounding="nearest" if name == "resnet18" else "gptq")
    additions = [op for op in graph.ops if isinstance(op, Add)]
    assert additions
    assert graph.residual == "wide"
    for add in additions:
        operand = graph.wide_operand(add)
        assert operand is not None
        assert sorted(graph.format(x).width for x in (add.left, add.right)) == [8, 32]
        assert graph.consumers[operand.output] == (add,)
    check_float_agreement(graph)
    assert verify(Interpreter(graph), TrainingGraph(net), bytes_of(8)) == 8


def addition(
    weight: list[int], frac: tuple[int, ...], skip: str = "s8.3", out: str = "s8.2", accumulator: str | None = None, bias: int = 0
) -> IntegerGraph:
    """image s8.7 -> skip (fraction changed) and accumulators of 1x1 weights, added."""
    n = len(weight)
    frac_a = 7 + max(frac)
    tensors = {
        "image": Tensor("image", (n, 16, 16), FixedPointFormat.parse("s8.7")),
        "skip": Tensor("skip", (n, 16, 16), FixedPointFormat.parse(skip)),
        "wide": Tensor("wide", (n, 16, 16), FixedPointFormat.parse(accumulator or f"s32.{frac_a}")),
        "sum": Tensor("sum", (n, 16, 16), FixedPointFormat.parse(out)),
    }

    def conv(name: str, weight_frac: tuple[int, ...]) -> Conv:
        return Conv(name, "image", f"{name}.w", f"{name}.b", weight_frac, (1, 1), (0, 0, 0, 0), (1, 1), n, relu=False)

    constants: dict[str, Any] = {
        "skip.w": np.full((n, 1, 1, 1), 3, np.int8), "skip.b": np.zeros(n, np.int32),
        "wide.w": np.array(weight, np.int8).reshape(n, 1, 1, 1), "wide.b": np.full(n, bias, np.int32),
    }  # fmt: skip
    ops = (conv("skip", (1,)), conv("wide", frac), Add("sum", "skip", "wide", relu=True))
    return IntegerGraph(tensors, ops, "image", "s8", "wide", constants=constants)


@pytest.mark.parametrize("frac", [(3,), (3, 5, 4), (-6,)], ids=["tensor", "channel", "coarser than the skip"])
def test_the_sum_is_that_of_equation_21(frac: tuple[int, ...]) -> None:
    weight = [90, -77, 127]
    graph = addition(weight, frac)
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), dtype=np.uint8)
    x = images.astype(np.int64) - 128
    skip = requantize(3 * x, np.array(7 + 1 - 3), FixedPointFormat.parse("s8.3"), relu=False)
    real = skip / 2.0**3 + x * np.array(weight).reshape(3, 1, 1) / 2.0 ** (7 + np.array(frac).reshape(-1, 1, 1))
    expected = np.clip(np.rint(real * 4), 0, 127)  # float64 holds all of it, rint has halves to even
    np.testing.assert_array_equal(Interpreter(graph).layers(images)["sum"], expected)


@settings(deadline=None)
@given(
    acc=st.integers(-(2**27), 2**27), skip=st.integers(-128, 127), skip_left=st.integers(0, 20), shift=st.integers(0, 20),
    signed=st.booleans(),
)  # fmt: skip
def test_float32_is_exact_where_equation_22_says_so(acc: int, skip: int, skip_left: int, shift: int, signed: bool) -> None:
    """The accumulator becomes float32 (one rounding), the skip is added (another one), the sum is scaled, rounded and saturated."""
    fmt, others = FixedPointFormat(8, 0, signed=signed), 128 << skip_left
    if not exact_in_float32(np.array([2**27 + others]), others, shift, fmt):
        return
    found = np.float32(acc) + np.float32(skip << skip_left)
    code = np.clip(np.rint(np.ldexp(found, -shift)), fmt.min_code, fmt.max_code)
    assert code == requantize(np.array(acc + (skip << skip_left)), np.array(shift), fmt, relu=False)


def test_equation_22_is_sharp() -> None:
    fmt = FixedPointFormat.parse("s8.0")
    assert exact_in_float32(np.array([2**27]), 2**23, 16, fmt)
    assert not exact_in_float32(np.array([2**27]), 2**23 + 1, 16, fmt)
    assert exact_in_float32(np.array([2**24]), 2**23 + 1, 16, fmt), "sums that float32 holds need not saturate"


def test_sums_that_float32_cannot_hold_are_refused_by_name() -> None:
    graph = addition([127], (12,), skip="s8.-1", out="s8.1", bias=2**25)
    with pytest.raises(UnsupportedError, match=r"^layer 'sum': sums with the accumulators of 'wide' may reach") as caught:
        check_float_agreement(graph)
    assert caught.value.hint == "lower the weight fraction of 'wide', or train with quant.residual=branch"


def test_overflow_of_a_sum_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"^layer 'sum': its accumulator may overflow 32 bits$"):
        addition([127], (20,), skip="s8.-1")


def test_two_accumulators_cannot_be_added() -> None:
    with pytest.raises(ArtifactError, match=r"^graph: Add 'sum' adds 's32.3' and 's32.10' to 's8.2'; at most one operand may be"):
        addition([127], (3,), skip="s32.3")
    with pytest.raises(UnsupportedError, match=r"^layer 'wide': format 's32.9' does not hold its accumulator as it is$"):
        check_float_agreement(addition([127], (3,), accumulator="s32.9"))


def test_a_wide_graph_survives_json() -> None:
    graph = addition([90, -77, 127], (3, 5, 4))
    again = IntegerGraph.from_json(graph.to_json(), graph.constants)
    assert again == graph
    assert again.residual == "wide"
