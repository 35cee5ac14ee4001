"""Graphs with unsigned activations as signed ones."""

from typing import Literal

import numpy as np
import pytest

from edgeft.export.agreement import check_float_agreement
from edgeft.export.signed import CENTRED, is_signed, signed_graph
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import Conv, IntegerGraph
from edgeft.interpret import Interpreter
from tests.graphs import GraphBuilder, random_images, residual_net

UNSIGNED, SIGNED = FixedPointFormat.parse("u8.5"), FixedPointFormat.parse("s8.4")


def one_layer(padding: tuple[int, int, int, int], fmt: FixedPointFormat, image: Literal["u8.8", "s8.7"] = "u8.8") -> IntegerGraph:
    b = GraphBuilder(1, (3, 9, 9), image_format=image)
    b.conv("image", 4, padding=padding, fmt=fmt)
    return b.graph()


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("image", ["u8.8", "s8.7"])
def test_a_converted_net_computes_nearly_the_same(image: Literal["u8.8", "s8.7"], per_channel: bool) -> None:
    graph = residual_net(2, image_format=image, per_channel=per_channel)
    signed = signed_graph(graph)
    assert (is_signed(graph), is_signed(signed), signed.profile) == (False, True, "s8")
    check_float_agreement(signed)
    images = random_images(graph, 8)
    before, after = Interpreter(graph).logits(images), Interpreter(signed).logits(images)
    assert np.abs(before - after).mean() < 0.1 * before.std()


def test_weights_stay_and_unsigned_formats_lose_their_last_bit() -> None:
    graph = residual_net(2, image_format="s8.7")
    signed = signed_graph(graph)
    for name, tensor in graph.tensors.items():
        lost = int(not tensor.format.signed)
        if tensor.format.width == 8:
            assert signed.format(name) == FixedPointFormat(8, tensor.format.frac - lost, signed=True)
    for op in graph.ops:
        if isinstance(op, Conv):
            np.testing.assert_array_equal(signed.constants[op.weight], graph.constants[op.weight])
    assert [type(op) for op in signed.ops] == [type(op) for op in graph.ops]


def test_image_bytes_are_centred_exactly_where_the_first_layer_does_not_pad() -> None:
    graph = one_layer((0, 0, 0, 0), SIGNED)
    signed = signed_graph(graph)
    images = random_images(graph, 4)
    np.testing.assert_array_equal(Interpreter(signed).layers(images)["conv0"], Interpreter(graph).layers(images)["conv0"])
    assert (str(signed.format("image")), CENTRED in signed.tensors) == ("s8.7", False)


def test_where_it_pads_code_0_remains_byte_0() -> None:
    graph = one_layer((1, 1, 1, 1), SIGNED)
    signed = signed_graph(graph)
    bytes_ = np.arange(243, dtype=np.uint8).reshape(1, 3, 9, 9)
    layers = Interpreter(signed).layers(bytes_)
    np.testing.assert_array_equal(layers[CENTRED], np.rint(bytes_ / 2).clip(max=127))
    black = np.zeros((1, 3, 9, 9), np.uint8)
    np.testing.assert_array_equal(Interpreter(signed).layers(black)["conv0"], Interpreter(graph).layers(black)["conv0"])


@pytest.mark.parametrize("source", [UNSIGNED, SIGNED], ids=str)
@pytest.mark.parametrize("result", [UNSIGNED, SIGNED], ids=str)
def test_tables_are_read_and_written_in_the_new_codes(source: FixedPointFormat, result: FixedPointFormat) -> None:
    b = GraphBuilder(0, (1, 16, 16))
    x = b.conv("image", 1, (1, 1), fmt=source, relu=not source.signed)
    b.lookup(x, result)
    codes = np.arange(source.min_code, source.max_code + 1)
    values = codes * source.step  # the identity, in the codes of the result
    b.constants["lookup1.table"] = np.clip(np.rint(values / result.step), result.min_code, result.max_code).astype(np.int16)
    graph = b.graph()
    signed = signed_graph(graph)
    layers = Interpreter(signed).layers(random_images(graph, 2))
    x_real, y_real = (layers[name] * signed.format(name).step for name in (x, "lookup1"))
    assert signed.format("lookup1").signed
    step, lowest = signed.format("lookup1").step, 0 if not result.signed else -128
    assert np.abs(x_real.clip(lowest, 127 * step) - y_real).max() <= step


def test_what_is_signed_already_keeps_every_integer() -> None:
    graph = residual_net(3, profile="s8", image_format="s8.7")
    assert is_signed(graph)
    images = random_images(graph, 3)
    expected, found = Interpreter(graph).layers(images), Interpreter(signed_graph(graph)).layers(images)
    for name, codes in expected.items():
        np.testing.assert_array_equal(codes, found[name])


def test_a_reader_of_the_image_that_is_no_convolution_reads_centred_codes() -> None:
    b = GraphBuilder(0, (3, 8, 8))
    graph = b.head(b.conv(b.max_pool("image"), 4), 3)
    signed = signed_graph(graph)
    images = random_images(graph, 3)
    layers = Interpreter(signed).layers(images)
    pooled = Interpreter(graph).layers(images)["maxpool0"]
    np.testing.assert_array_equal(layers["maxpool0"], np.rint(pooled / 2).clip(max=127))
