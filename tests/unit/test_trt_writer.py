"""The TensorRT file, op by op: in ONNX Runtime without optimizations and in OpenVINO it gives the integers of the interpreter."""

import dataclasses
import importlib.util
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest

from edgeft.errors import UnsupportedError
from edgeft.export.ort_runner import OnnxRunner
from edgeft.export.signed import CENTRED, signed_graph
from edgeft.export.trt_check import ahead_of_time, available
from edgeft.export.trt_lint import lint
from edgeft.export.trt_qdq import build_model
from edgeft.export.verify import verify
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import Conv, IntegerGraph, Linear, Op, Profile
from edgeft.interpret import Interpreter
from tests.exports import CLASSES, ImageFormat, every_op, wide_net
from tests.graphs import GraphBuilder, random_images, residual_net

needs_builder = pytest.mark.skipif(not available(), reason="tensorrt_rtx is not installed: pip install 'edgeft[trt-check]'")
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
per_channel = pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
profiles = pytest.mark.parametrize("profile", ["u8", "s8"])
images = pytest.mark.parametrize("image", ["u8.8", "s8.7"])

NETS: dict[str, Callable[..., IntegerGraph]] = {"every op": every_op, "wide": wide_net, "branch": residual_net}
N = 9


def save(graph: IntegerGraph, folder: Path) -> Path:
    """The file of a graph in order: linted, with a name for every node."""
    model = build_model(graph)
    assert lint(model) == []
    names = [node.name for node in model.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def check(graph: IntegerGraph, folder: Path) -> Counter[str]:
    """Equal to the interpreter in every tensor, and in the logits of the file as it is; what nodes there are."""
    path = save(graph, folder)
    assert verify(Interpreter(graph), OnnxRunner(path, 1, optimise=False), random_images(graph, N)) == N
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def small(*, profile: Profile = "s8") -> GraphBuilder:
    return GraphBuilder(0, (3, 6, 6), profile=profile, image_format="s8.7")


# All ops


def test_every_op_is_really_there() -> None:
    assert {type(op) for op in every_op().ops} == set(get_args(Op))


@images
@profiles
@per_channel
@pytest.mark.parametrize("name", NETS)
def test_every_op_gives_the_integers_of_the_interpreter(
    name: str, per_channel: bool, profile: Profile, image: ImageFormat, tmp_path: Path
) -> None:
    graph = NETS[name](4, profile=profile, image_format=image, per_channel=per_channel)
    signed = signed_graph(graph)
    assert (CENTRED in signed.tensors) == (image == "u8.8"), "all of these nets pad their first layer"
    check(signed, tmp_path)


@needs_openvino
@images
@per_channel
@pytest.mark.parametrize("name", [*NETS, "no additions"])
def test_openvino_gives_the_same_integers(name: str, per_channel: bool, image: ImageFormat, tmp_path: Path) -> None:
    from edgeft.export.openvino_runner import OpenVinoRunner

    make = NETS.get(name, partial(every_op, additions=False))
    for profile in ("u8", "s8"):
        graph = signed_graph(make(4, profile=profile, per_channel=per_channel, image_format=image))
        assert verify(Interpreter(graph), OpenVinoRunner(save(graph, tmp_path), 1), random_images(graph, N)) == N


# How ops are written


def test_codes_are_int8_and_what_is_computed_with_has_one_dequantization(tmp_path: Path) -> None:
    graph = signed_graph(every_op())
    save(graph, tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    assert all(array.dtype != np.uint8 for each in model.graph.initializer if (array := onnx.numpy_helper.to_array(each)) is not None)
    dequantized = [node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert len(set(dequantized)) == len(dequantized)
    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, image.type.tensor_type.elem_type) == ("images", onnx.TensorProto.UINT8)
    assert (logits.name, logits.type.tensor_type.elem_type) == ("logits", onnx.TensorProto.FLOAT)
    assert logits.type.tensor_type.shape.dim[1].dim_value == len(CLASSES)


def test_weights_and_biases_keep_their_integers(tmp_path: Path) -> None:
    graph = every_op(profile="s8", image_format="s8.7", per_channel=True)
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(save(graph, tmp_path)).graph.initializer}
    for op in graph.ops:
        if isinstance(op, Conv | Linear):
            np.testing.assert_array_equal(constants[f"{op.output}/weight/codes"], graph.constants[op.weight], strict=True)
            np.testing.assert_array_equal(constants[f"{op.output}/bias/codes"], graph.constants[op.bias], strict=True)
            steps = 2.0 ** -(np.array(op.weight_frac) + graph.format(op.input).frac)
            np.testing.assert_array_equal(constants[f"{op.output}/bias/step"], steps)


def test_an_accumulator_that_is_added_is_not_quantized(tmp_path: Path) -> None:
    graph = wide_net()
    path = save(graph, tmp_path)
    written = {node.output[0]: node for node in onnx.load(path).graph.node}
    wide = [name for name, tensor in graph.tensors.items() if tensor.format.width > 8 and name != graph.output]
    assert len(wide) == 2
    for name in wide:
        assert written[f"{name}/real"].op_type == "Conv"
        assert f"{name}/codes" not in written


def test_neighbouring_channels_are_sliced_and_others_gathered(tmp_path: Path) -> None:
    b = small()
    x = b.conv("image", 5)
    b.linear(b.flatten(b.concat(b.select(x, (1, 2, 3)), b.select(x, (4,)), b.select(x, (2, 1)), b.select(x, (0, 2)))), 3)
    found = check(b.graph(), tmp_path)
    assert (found["Slice"], found["Gather"]) == (2, 2)


@pytest.mark.parametrize("source", ["u8.4", "s8.4"])
@pytest.mark.parametrize("result", ["u8.6", "s8.6"])
def test_a_table_is_read_at_every_code(source: str, result: str, tmp_path: Path) -> None:
    b = GraphBuilder(0, (1, 16, 16))
    x = b.lookup("image", FixedPointFormat.parse(source))
    b.constants["lookup0.table"] = np.random.default_rng(1).permutation(np.arange(256) + b.tensors[x].format.min_code).astype(np.int16)
    b.lookup(x, FixedPointFormat.parse(result))
    graph = signed_graph(b.graph())
    path = save(graph, tmp_path)
    every_byte = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    assert verify(Interpreter(graph), OnnxRunner(path, 1, optimise=False), every_byte) == 1


@pytest.mark.parametrize("side", [3, 4, 7])
def test_a_global_pool_divides_by_a_power_of_two(side: int, tmp_path: Path) -> None:
    b = GraphBuilder(0, (3, side, side), profile="s8", image_format="s8.7")
    graph = b.head(b.conv("image", 4, relu=False), 3)
    found = check(graph, tmp_path)
    assert found["ReduceSum"] == 1
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert constants["pool1/share"] == 2.0 ** -round(np.log2(side * side))


def test_nets_that_end_in_8_bits_or_move_their_logits(tmp_path: Path) -> None:
    b = small()
    narrow = b.conv("image", 4)
    check(b.graph(), tmp_path)
    b.flatten(b.linear(b.flatten(narrow), 3))
    check(b.graph(), tmp_path)


def test_accumulators_may_be_pooled_and_flattened(tmp_path: Path) -> None:
    b = small()
    x = b.conv("image", 4, relu=False)
    (op,) = b.ops
    frac = int(b.graph().shift(op)[0]) + b.tensors[x].format.frac
    b.tensors[x] = dataclasses.replace(b.tensors[x], format=FixedPointFormat(32, frac, signed=True))
    b.flatten(b.max_pool(x))
    found = check(b.graph(), tmp_path)
    assert (found["MaxPool"], found["Flatten"], found["QuantizeLinear"]) == (1, 1, 1)


def test_any_batch_size_runs(tmp_path: Path) -> None:
    graph = signed_graph(every_op(2))
    runner = OnnxRunner(save(graph, tmp_path), 1, optimise=False)
    batch = random_images(graph, 5)
    np.testing.assert_array_equal(runner.logits(batch)[3:4], runner.logits(batch[3:4]))


def test_an_unsigned_graph_is_refused_with_the_name_of_a_tensor() -> None:
    with pytest.raises(UnsupportedError) as caught:
        build_model(residual_net(0))
    assert caught.value.message == "tensor 'image' is unsigned ('u8.8'); TensorRT's 8-bit type is int8"
    assert caught.value.hint == "edgeft.export.signed.signed_graph converts it, or train with --profile s8"
    with pytest.raises(UnsupportedError, match=r"^tensor 'conv0' is unsigned \('u8.5'\); TensorRT's 8-bit type is int8$"):
        build_model(residual_net(0, image_format="s8.7"))


# What NVIDIA's builder makes of it


@needs_builder
@per_channel
def test_the_builder_computes_every_op_in_int8(per_channel: bool, tmp_path: Path) -> None:
    graph = every_op(profile="s8", image_format="s8.7", per_channel=per_channel)
    n = sum(isinstance(op, Conv | Linear) for op in graph.ops)
    found = ahead_of_time(save(graph, tmp_path))
    assert (found.n_int8, found.n_total, found.n_fused_adds, found.n_adds) == (n, n, 0, 1)


@needs_builder
def test_the_builder_fuses_wide_additions_and_no_others(tmp_path: Path) -> None:
    wide, branch = wide_net(), residual_net(0, profile="s8", image_format="s8.7")
    found = ahead_of_time(save(wide, tmp_path))
    assert (found.n_int8, found.n_total, found.n_fused_adds, found.n_adds) == (6, 6, 2, 2)
    found = ahead_of_time(save(branch, tmp_path))
    assert (found.n_int8, found.n_total, found.n_fused_adds, found.n_adds) == (7, 7, 0, 2)
