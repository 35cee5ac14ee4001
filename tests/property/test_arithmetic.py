"""Laws of the arithmetic, and equality of the interpreter with ONNX Runtime on random graphs."""

from fractions import Fraction
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeft.export.agreement import check_float_agreement
from edgeft.export.onnx_qdq import build_model, check_fusion
from edgeft.export.ort_runner import OnnxRunner, fusion
from edgeft.export.verify import verify
from edgeft.fixedpoint import FixedPointFormat, dequantize, quantize, requantize, round_shift
from edgeft.graph import IntegerGraph, Profile
from edgeft.interpret import Interpreter
from tests.graphs import GraphBuilder, random_images

settings.register_profile("edgeft", deadline=None, derandomize=True)
settings.load_profile("edgeft")

ACCUMULATORS = st.integers(-(2**31), 2**31 - 1)


@st.composite
def formats(draw: st.DrawFn) -> FixedPointFormat:
    signed = draw(st.booleans())
    return FixedPointFormat(draw(st.integers(2, 32)), draw(st.integers(-40, 40)), signed, narrow=signed and draw(st.booleans()))


@given(formats())
def test_the_text_of_a_format_parses_back(fmt: FixedPointFormat) -> None:
    assert FixedPointFormat.parse(str(fmt)) == fmt


@given(formats(), st.data())
def test_code_to_value_to_code_is_the_identity(fmt: FixedPointFormat, data: st.DataObject) -> None:
    codes = np.array(data.draw(st.lists(st.integers(fmt.min_code, fmt.max_code), min_size=1)), np.int64)
    assert np.array_equal(quantize(dequantize(codes, fmt), fmt), codes)


@given(formats(), st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_quantizing_is_monotone_and_within_half_a_step(fmt: FixedPointFormat, values: list[float]) -> None:
    x = np.sort(np.array(values))
    codes = quantize(x, fmt)
    assert np.all(np.diff(codes) >= 0)
    inside = (x >= fmt.min_code * fmt.step) & (x <= fmt.max_code * fmt.step)
    assert np.all(np.abs(dequantize(codes, fmt) - x)[inside] <= fmt.step / 2)


@given(ACCUMULATORS, st.integers(-20, 40))
def test_round_shift_is_rounding_of_the_exact_quotient(acc: int, shift: int) -> None:
    found = int(round_shift(np.array(acc), shift))
    assert found == round(Fraction(acc) / Fraction(2) ** shift)
    assert found == int(np.rint(np.ldexp(float(acc), -shift)))


@given(st.lists(ACCUMULATORS, min_size=2), st.integers(0, 31))
def test_round_shift_is_monotone_and_odd(acc: list[int], shift: int) -> None:
    codes = np.sort(np.array(acc, np.int64))
    rounded = round_shift(codes, shift)
    assert np.all(np.diff(rounded) >= 0)
    assert np.array_equal(round_shift(-codes, shift), -rounded)


@given(ACCUMULATORS, st.integers(0, 16), st.integers(0, 16), formats())
def test_shifting_left_first_changes_nothing(acc: int, left: int, right: int, fmt: FixedPointFormat) -> None:
    once = requantize(np.array(acc), right, fmt, relu=False)
    assert requantize(np.array(acc) << left, right + left, fmt, relu=False) == once


@given(ACCUMULATORS, st.integers(0, 17), st.booleans())
def test_float32_rescaling_agrees_up_to_the_bound(acc: int, shift: int, signed: bool) -> None:
    """Eq. 14, with the float32 operations of a fused kernel: convert, scale, round, clip."""
    fmt = FixedPointFormat(8, 0, signed)
    shift = min(shift, 17 if signed else 16)
    as_float = np.rint(np.float32(acc) * np.float32(2.0**-shift))
    assert np.clip(as_float, fmt.min_code, fmt.max_code) == requantize(np.array(acc), shift, fmt, relu=False)


@st.composite
def graphs(draw: st.DrawFn) -> IntegerGraph:
    """A stem, then up to four random blocks, then pool and classifier."""
    profile: Profile = draw(st.sampled_from(("u8", "s8")))
    image_format: Literal["u8.8", "s8.7"] = draw(st.sampled_from(("u8.8", "s8.7")))
    seed, per_channel, jitter = draw(st.integers(0, 2**16)), draw(st.booleans()), draw(st.integers(0, 3))
    b = GraphBuilder(seed, (3, 9, 11), profile=profile, per_channel=per_channel, image_format=image_format, jitter=jitter)
    x = b.conv("image", 4, stride=(2, 1), padding=(draw(st.integers(0, 1)), 0, 1, draw(st.integers(0, 2))))
    for block in draw(st.lists(st.sampled_from(("residual", "depthwise", "grouped", "dilated", "pool")), max_size=4)):
        relu = draw(st.booleans())
        match block:
            case "residual":
                x = b.add(x, b.conv(b.conv(x, 8, (1, 1)), 4, relu=draw(st.booleans())), relu=relu)
            case "depthwise":
                x = b.conv(x, 4, groups=4, relu=relu)
            case "grouped":
                x = b.conv(x, 4, (3, 1), groups=2, relu=relu)
            case "dilated":
                x = b.conv(x, 4, dilation=(2, 1), relu=relu)
            case "pool" if b.tensors[x].shape[1] > 2:
                x = b.max_pool(x, padding=(1, 0, 1, 1))
    return b.head(x, 3)


@settings(max_examples=40)
@given(graph=graphs())
def test_the_interpreter_equals_onnx_runtime_with_and_without_its_optimizations(
    graph: IntegerGraph, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_float_agreement(graph)
    model = build_model(graph)
    check_fusion(graph, fusion(model))
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    path.write_bytes(model.SerializeToString())
    images = random_images(graph, 6)
    for optimise in (True, False):
        assert verify(Interpreter(graph), OnnxRunner(path, 1, optimise=optimise), images) == 6
