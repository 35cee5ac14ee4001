from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgeft.errors import UnsupportedError
from edgeft.export.onnx_qdq import build_model, check_fusion
from edgeft.export.onnx_writer import Writer, zero_points
from edgeft.export.ort_runner import Fusion, OnnxRunner, fusion, with_layer_outputs
from edgeft.export.verify import verify
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import IntegerGraph
from edgeft.interpret import Interpreter
from tests.graphs import GraphBuilder, random_images

SIGNED, UNSIGNED, GATE = (FixedPointFormat.parse(text) for text in ("s8.5", "u8.5", "u8.8"))


def check(graph: IntegerGraph, tmp_path: Path, n: int = 6) -> dict[str, int]:
    """Fused, and equal to the interpreter in every tensor with and without ONNX Runtime's optimizations; what it runs."""
    model = build_model(graph)
    found = fusion(model)
    check_fusion(graph, found)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    images = random_images(graph, n)
    for optimise in (True, False):
        assert verify(Interpreter(graph), OnnxRunner(path, 1, optimise=optimise), images) == n
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    tensors = [Writer(graph).stored(tensor) for tensor in graph.tensors.values()]
    shown = fusion(with_layer_outputs(model, tensors))
    assert (shown.in_float, fused(shown)) == ((), fused(found))
    return found.operators


def fused(found: Fusion) -> dict[str, int]:
    return {name: n for name, n in found.operators.items() if name.startswith("Q")}


def nodes(graph: IntegerGraph) -> Counter[str]:
    return Counter(node.op_type for node in build_model(graph).graph.node)


def all_pairs(left: FixedPointFormat, right: FixedPointFormat, shift: int, out_signed: bool) -> IntegerGraph:
    """The product of channel 0 and channel 1, each taken through a table to every code of its format."""
    b = GraphBuilder(0, (2, 256, 256))
    operands = []
    for channel, fmt in enumerate((left, right)):
        operands.append(b.lookup(b.select("image", (channel,)), fmt))
        b.constants[f"{operands[-1]}.table"] = np.arange(fmt.min_code, fmt.max_code + 1, dtype=np.int16)
    b.mul(operands[0], operands[1], FixedPointFormat(8, left.frac + right.frac - shift, out_signed))
    return b.graph()


@pytest.mark.parametrize("left", [UNSIGNED, SIGNED], ids=str)
@pytest.mark.parametrize("right", [GATE, SIGNED], ids=str)
@pytest.mark.parametrize(("shift", "out_signed"), [(8, False), (7, True), (-2, True), (13, False)])
def test_every_product_of_two_codes_is_exact(
    left: FixedPointFormat, right: FixedPointFormat, shift: int, out_signed: bool, tmp_path: Path
) -> None:
    graph = all_pairs(left, right, shift, out_signed)
    bytes_ = np.arange(256, dtype=np.uint8)
    images = np.stack(np.meshgrid(bytes_, bytes_, indexing="ij"))[None]
    (tmp_path / "model.onnx").write_bytes(build_model(graph).SerializeToString())
    assert verify(Interpreter(graph), OnnxRunner(tmp_path / "model.onnx", 1), images) == 1


def test_a_gate_on_a_map_is_one_fused_multiplication(tmp_path: Path) -> None:
    b = GraphBuilder(0, (3, 6, 7))
    x = b.conv("image", 8)
    gate = b.lookup(b.conv(b.conv(b.global_pool(x), 4, (1, 1)), 8, (1, 1), relu=False), GATE)
    graph = b.head(b.conv(b.mul(x, gate), 8), 3)
    found = check(graph, tmp_path)
    assert (found["QLinearMul"], found["QLinearConv"], found["GatherElements"]) == (1, 6, 1)


def test_a_multiplication_left_in_float_is_reported() -> None:
    graph = all_pairs(UNSIGNED, GATE, 8, out_signed=False)
    model = build_model(graph)
    model.graph.output.append(onnx.helper.make_tensor_value_info("mul4/result", onnx.TensorProto.FLOAT, None))
    with pytest.raises(UnsupportedError, match=r"leaves nodes in float: .*'mul4/Mul'.*; it lacks 1 QLinearMul$"):
        check_fusion(graph, fusion(model))


@pytest.mark.parametrize("profile", ["u8", "s8"])
def test_tables_between_convolutions_cost_no_transposition(profile: str, tmp_path: Path) -> None:
    b = GraphBuilder(0, (3, 9, 7), profile="u8" if profile == "u8" else "s8")
    x = b.lookup(b.conv("image", 8, relu=False), SIGNED)
    x = b.lookup(b.conv(x, 8), UNSIGNED)
    found = check(b.head(b.conv(b.lookup(b.conv(x, 8, groups=8, relu=False)), 4), 3), tmp_path)
    assert found["GatherElements"] == 3
    assert found["Transpose"] == 2  # of the image and of the pooled vector


def test_a_table_on_a_vector_and_as_last_layer(tmp_path: Path) -> None:
    b = GraphBuilder(0, (3, 4, 4))
    x = b.lookup(b.linear(b.flatten(b.lookup("image")), 6, wide=False), UNSIGNED)
    b.lookup(x)
    assert check(b.graph(), tmp_path)["GatherElements"] == 3


def test_a_rectified_tensor_beside_a_signed_one_is_stored_with_its_zero_point(tmp_path: Path) -> None:
    b = GraphBuilder(0, (3, 6, 7))
    rectified, signed = b.conv("image", 4, fmt=SIGNED), b.conv("image", 4, relu=False, fmt=SIGNED)
    alone = b.conv("image", 4, fmt=SIGNED)
    half = b.select(rectified, (0, 1))
    graph = b.head(b.conv(b.add(b.concat(half, signed), b.concat(alone, half)), 4), 3)
    points = zero_points(graph)
    assert points["image"] == 0
    assert [points[name] for name in (rectified, half, signed, alone)] == [128] * 4
    assert nodes(graph)["Clip"] == 2
    found = check(graph, tmp_path)
    assert (found["QLinearConv"], found["QLinearAdd"], found["Concat"], found["Clip"]) == (5, 1, 2, 2)


def test_rectified_tensors_among_themselves_keep_zero_point_0(tmp_path: Path) -> None:
    for fmt, clips in ((UNSIGNED, 0), (SIGNED, 2)):
        b = GraphBuilder(0, (3, 6, 7))
        both = b.concat(b.conv("image", 4, fmt=fmt), b.conv("image", 4, fmt=fmt))
        graph = b.head(both, 3)
        assert {zero_points(graph)[name] for name in (both, "conv0", "conv1")} == {0}
        assert nodes(graph)["Clip"] == clips
        check(graph, tmp_path)


@pytest.mark.parametrize(("image_format", "expected"), [("u8.8", 0), ("s8.7", 128)])
def test_the_image_itself_may_be_concatenated(image_format: str, expected: int, tmp_path: Path) -> None:
    b = GraphBuilder(0, (3, 4, 4), image_format="u8.8" if image_format == "u8.8" else "s8.7")
    both = b.concat(b.conv("image", 2, fmt=FixedPointFormat.parse(image_format)), "image")
    graph = b.head(both, 3)
    assert {zero_points(graph)[name] for name in ("image", "conv0", both)} == {expected}
    check(graph, tmp_path)


def test_neighbouring_channels_are_a_slice_and_others_a_gather(tmp_path: Path) -> None:
    b = GraphBuilder(0, (3, 6, 7))
    x = b.conv("image", 8)
    first, second, shuffled = (b.select(x, index) for index in ((0, 1, 2, 3), (4, 5, 6, 7), (0, 4, 1, 5)))
    graph = b.head(b.conv(b.concat(first, second, shuffled, b.select(x, (7, 7, 0))), 4), 3)
    kinds = nodes(graph)
    assert (kinds["Slice"], kinds["Gather"]) == (2, 2)
    check(graph, tmp_path)


@pytest.mark.parametrize("factor", [(1, 1), (2, 2), (3, 1), (1, 5), (7, 6)])
def test_enlargement_is_exact(factor: tuple[int, int], tmp_path: Path) -> None:
    b = GraphBuilder(0, (3, 5, 4))
    graph = b.head(b.conv(b.resize(b.conv("image", 4, relu=False), factor), 4), 3)
    found = check(graph, tmp_path)
    assert (found["Tile"], found["QLinearConv"]) == (1, 3)


def test_constant_convolutions_are_fused_like_any_other(tmp_path: Path) -> None:
    """An averaging window with padding below and right only, a change of sign, and a stride with zero channels added."""
    b = GraphBuilder(0, (3, 7, 6))
    x = b.conv("image", 4)
    mean = b.conv(x, 4, (3, 3), padding=(0, 1, 2, 0), groups=4, relu=False, fmt=SIGNED)
    recoded = b.conv(mean, 4, (1, 1), groups=4, relu=False, fmt=UNSIGNED)
    strided = b.conv(recoded, 6, (1, 1), stride=(2, 2), padding=(0, 0, 0, 0), relu=False, fmt=UNSIGNED)
    weights = {mean: np.full((4, 1, 3, 3), 114), recoded: np.full((4, 1, 1, 1), 64), strided: np.eye(6, 4).reshape(6, 4, 1, 1)}
    for name, codes in weights.items():
        b.constants[f"{name}.weight"] = codes.astype(np.int8)
        b.constants[f"{name}.bias"][:] = 0
    found = check(b.head(strided, 3), tmp_path)
    assert found["QLinearConv"] == 5
