import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from edgeft.errors import UnsupportedError
from edgeft.export.onnx_int import OPERATORS, OPSET, ScanResult, build_model, scan
from edgeft.export.onnx_nodes import TENSORS_KEY, StoredTensor
from edgeft.export.ort_runner import OnnxRunner, lacks_vnni
from edgeft.export.verify import verify
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import Add, Conv, IntegerGraph, Linear, Profile, Tensor
from edgeft.interpret import Interpreter
from tests.graphs import GraphBuilder, random_images, residual_net

SIGNED, UNSIGNED, GATE = (FixedPointFormat.parse(text) for text in ("s8.5", "u8.5", "u8.8"))


def modes() -> tuple[bool, ...]:
    """With and without optimizations; without them, x86 without VNNI sums a matrix product of bytes in 16 bits, which saturate."""
    cpuinfo = Path("/proc/cpuinfo")
    return (True,) if lacks_vnni(platform.machine(), cpuinfo.read_text() if cpuinfo.is_file() else "") else (True, False)


def check(graph: IntegerGraph, tmp_path: Path, images: NDArray[np.uint8] | None = None) -> ScanResult:
    """Equal to the interpreter in every tensor, with and without ONNX Runtime's optimizations; what the scan found."""
    model = build_model(graph)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    images = random_images(graph, 6) if images is None else images
    for optimise in modes():
        assert verify(Interpreter(graph), OnnxRunner(path, 1, optimise=optimise, name="onnx-int"), images) == len(images)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    return scan(model)


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def weighted(graph: IntegerGraph) -> int:
    return sum(isinstance(op, Conv | Linear) for op in graph.ops)


@pytest.mark.parametrize("profile", ["u8", "s8"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("image_format", ["u8.8", "s8.7"])
def test_every_layer_is_equal(profile: Profile, per_channel: bool, image_format: Any, tmp_path: Path) -> None:
    graph = residual_net(3, profile=profile, per_channel=per_channel, image_format=image_format, jitter=2)
    found = check(graph, tmp_path, random_images(graph, 20))
    assert found.n_products == weighted(graph) == 7
    assert 8 <= found.n_rounding_shifts <= 9, "six convolutions, two additions, and the pool unless its shift is 0"


def test_the_file_is_what_the_readme_says() -> None:
    model = build_model(residual_net(0, image_format="s8.7"), {"edgeft.artifact": "abc"})
    assert [each.version for each in model.opset_import] == [OPSET]
    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, image.type.tensor_type.elem_type) == ("images", TensorProto.UINT8)
    assert (logits.name, logits.type.tensor_type.elem_type) == ("logits", TensorProto.INT32)
    for value, rest in ((image, [3, 12, 12]), (logits, [5])):
        batch, *sizes = value.type.tensor_type.shape.dim
        assert batch.dim_param == "batch"
        assert [size.dim_value for size in sizes] == rest
    assert {node.op_type for node in model.graph.node} <= OPERATORS
    stored = metadata(model)
    assert (stored["edgeft.artifact"], stored["session.x64quantprecision"]) == ("abc", "1")
    tensors = [StoredTensor.from_json(tree) for tree in json.loads(stored[TENSORS_KEY])]
    assert {tensor.type for tensor in tensors if tensor.format.width == 8 and tensor.format.signed} == {TensorProto.INT8}
    assert {tensor.type for tensor in tensors if not tensor.format.signed} == {TensorProto.UINT8}
    assert (tensors[0].onnx, tensors[-1].onnx, tensors[-1].type) == ("image/codes", "logits", TensorProto.INT32)
    assert {tensor.zero_point for tensor in tensors} == {0}


def test_any_batch_size_runs_and_logits_are_real(tmp_path: Path) -> None:
    graph = residual_net(1)
    (tmp_path / "model.onnx").write_bytes(build_model(graph).SerializeToString())
    runner, images = OnnxRunner(tmp_path / "model.onnx", 1), random_images(graph, 7)
    assert np.array_equal(runner.logits(images)[3:4], runner.logits(images[3:4]))
    assert np.array_equal(runner.logits(images), Interpreter(graph).logits(images))


def test_a_net_that_ends_in_8_bits_or_flattens_its_logits_is_exact(tmp_path: Path) -> None:
    b = GraphBuilder(0, (3, 4, 4))
    narrow = b.conv("image", 4)
    check(b.graph(), tmp_path)
    b.flatten(b.linear(b.flatten(narrow), 3))
    check(b.graph(), tmp_path)


@pytest.mark.parametrize("profile", ["u8", "s8"])
def test_the_reference_implementation_of_onnx_gives_the_same_logits(profile: Profile) -> None:
    graph = residual_net(3, profile=profile, per_channel=True, image_format="s8.7", jitter=2)
    images = random_images(graph, 4)
    (logits,) = ReferenceEvaluator(build_model(graph)).run(None, {"images": images})
    np.testing.assert_array_equal(logits, Interpreter(graph).layers(images)[graph.output])


# Operations


@pytest.mark.parametrize("profile", ["u8", "s8"])
def test_a_gate_and_a_square(profile: Profile, tmp_path: Path) -> None:
    b = GraphBuilder(0, (3, 6, 7), profile=profile)
    x = b.conv("image", 8)
    x = b.mul(x, b.lookup(b.conv(b.global_pool(x), 8, (1, 1), relu=False), GATE))
    graph = b.head(b.mul(x, x), 3)
    found = check(graph, tmp_path)
    assert (found.operators["Mul"], found.n_products) == (2, weighted(graph) + 2)


def test_tables_on_maps_and_vectors_between_all_types(tmp_path: Path) -> None:
    b = GraphBuilder(0, (3, 4, 4), image_format="s8.7")
    x = b.lookup(b.lookup(b.lookup(b.lookup("image", SIGNED), UNSIGNED), UNSIGNED), SIGNED)
    b.lookup(b.lookup(b.linear(b.flatten(x), 6, wide=False), UNSIGNED))
    found = check(b.graph(), tmp_path)
    assert (found.operators["Gather"], found.n_products) == (6, 1)


@pytest.mark.parametrize("fmt", [SIGNED, UNSIGNED], ids=str)
def test_moves(fmt: FixedPointFormat, tmp_path: Path) -> None:
    b = GraphBuilder(0, (3, 5, 4))
    x = b.concat(b.conv("image", 4, fmt=fmt), b.conv("image", 3, relu=False, fmt=fmt))
    x = b.concat(b.select(x, (0, 1, 2)), b.select(x, (6, 6, 0)))
    x = b.max_pool(b.resize(b.resize(x, (2, 3)), (1, 2)), padding=(0, 1, 1, 0))
    check(b.head(b.conv(x, 4), 3), tmp_path)


@pytest.mark.parametrize("image_format", ["u8.8", "s8.7"])
def test_the_image_itself_may_be_moved(image_format: Any, tmp_path: Path) -> None:
    b = GraphBuilder(0, (3, 4, 4), image_format=image_format)
    x = b.concat(b.conv("image", 2, fmt=FixedPointFormat.parse(image_format)), "image")
    check(b.head(b.max_pool(b.concat(x, b.resize("image", (1, 1)))), 3), tmp_path)


def test_padding_of_a_max_pool_never_wins_over_negative_codes(tmp_path: Path) -> None:
    b = GraphBuilder(0, (3, 5, 6))
    x = b.lookup("image", SIGNED)
    b.constants[f"{x}.table"] = np.linspace(-128, -1, 256).astype(np.int16)
    pooled = b.max_pool(x, padding=(1, 1, 1, 1))
    graph = b.head(b.conv(pooled, 4), 3)
    assert Interpreter(graph).layers(random_images(graph, 6))[pooled].max() < 0
    check(graph, tmp_path)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("image_format", ["u8.8", "s8.7"])
def test_convolutions_of_all_kinds(relu: bool, image_format: Any, tmp_path: Path) -> None:
    b = GraphBuilder(1, (3, 11, 9), image_format=image_format, per_channel=True)
    x = b.conv("image", 8, (3, 5), stride=(2, 1), padding=(0, 2, 3, 1), relu=relu)
    x = b.conv(x, 8, groups=8, dilation=(2, 1), padding=(1, 0, 2, 2), relu=relu)
    x = b.conv(x, 16, groups=8, stride=(1, 2), relu=relu)
    x = b.conv(x, 12, groups=4, dilation=(1, 3), relu=relu)
    check(b.head(b.conv(x, 5, (1, 1), stride=(2, 2), padding=(0, 0, 0, 0), relu=relu), 3), tmp_path)


# Rounding, saturation and long shifts


def sums(shifts: tuple[int, ...], out: FixedPointFormat, bias: int = -(2**12), relu: bool = False) -> IntegerGraph:
    """Accumulators 64 * channel 0 + channel 1 + bias, shifted to codes of `out` by as many bits as said, one output channel for each."""
    n = len(shifts)
    tensors = {"image": Tensor("image", (2, 65, 129), GATE), "sum": Tensor("sum", (n, 65, 129), out)}
    frac = tuple(shift + out.frac - GATE.frac for shift in shifts)
    constants: dict[str, NDArray[Any]] = {
        "w": np.tile(np.array([64, 1], np.int8).reshape(2, 1, 1), (n, 1, 1, 1)), "b": np.full(n, bias, np.int32),
    }  # fmt: skip
    conv = Conv("sum", "image", "w", "b", frac, (1, 1), (0, 0, 0, 0), (1, 1), 1, relu)
    return IntegerGraph(tensors, (conv,), "image", constants=constants)


def every_sum() -> NDArray[np.uint8]:
    """The image for which `sums` has each accumulator from bias to bias + 2^13."""
    low, high = np.meshgrid(np.arange(65, dtype=np.uint8), np.arange(129, dtype=np.uint8), indexing="ij")
    assert set((64 * high.astype(int) + low).ravel()) == set(range(2**13 + 65))
    return np.stack((high, low))[None]


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("out", ["u8.3", "s8.0", "s8.-2", "u4.0", "s32.5", "s16.5"])
def test_every_rounding_tie_and_every_saturation(out: str, relu: bool, tmp_path: Path) -> None:
    fmt = FixedPointFormat.parse(out)
    check(sums((*range(-12, 15), 29, 30, 99), fmt, relu=relu), tmp_path, every_sum())
    for shift in range(-7, 15):
        found = check(sums((shift,), fmt, relu=relu), tmp_path, every_sum())
        assert (found.n_rounding_shifts, "BitShift" in found.operators) == (int(shift > 0), shift != 0)


@pytest.mark.parametrize("bias", [2**28 - 2**12, -(2**28) - 2**12, 2**30 - 2**15, -(2**30) + 2])
def test_ties_of_large_accumulators_at_the_longest_shifts(bias: int, tmp_path: Path) -> None:
    for shifts in ((29,), (28,), (27,), (26, 28, 22)):
        check(sums(shifts, SIGNED, bias), tmp_path, every_sum())


@pytest.mark.parametrize("bias", [2**31 - 2**15, -(2**31) + 2, 2**29 - 2**12])
def test_accumulators_beyond_30_bits_are_exact_where_they_saturate(bias: int, tmp_path: Path) -> None:
    for shifts in ((0,), (20,), (-3,), (20, 3, -40)):
        check(sums(shifts, UNSIGNED, bias), tmp_path, every_sum())


def test_a_channel_of_zeros_may_have_any_shift(tmp_path: Path) -> None:
    graph = sums((-40, 0, 3), FixedPointFormat.parse("s32.0"), bias=0)
    graph.constants["w"][0] = 0
    check(graph, tmp_path, every_sum())


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (sums((21,), SIGNED, 2**30), "'sum/sum' may reach 1073758399; target onnx-int needs it below 2^30"),
        (sums((30,), SIGNED, 2**28), "'sum/sum' may reach 268452031; target onnx-int needs it below 2^28"),
        (sums((-17,), FixedPointFormat.parse("s32.0")), "'sum/scale/shifted' may reach 2172518400; target onnx-int needs it below 2^30"),
    ],
    ids=["shifted", "far", "to the left"],
)
def test_what_32_bits_cannot_shift_is_refused_by_name(graph: IntegerGraph, message: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        build_model(graph)
    assert caught.value.message == f"layer 'sum': {message}"
    assert caught.value.hint == "use another target, or lower the weight or input fractions of 'sum'"


def test_another_rounding_rule_is_refused() -> None:
    graph = dataclasses.replace(residual_net(0), rounding="half_up")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"^rounding 'half_up': target onnx-int writes half to even$"):
        build_model(graph)


def test_a_sum_over_too_many_pixels_is_refused_by_name() -> None:
    b = GraphBuilder(0, (3, 2896, 2909))
    b.global_pool("image")
    with pytest.raises(UnsupportedError, match=r"^layer 'pool0': 'pool0/sum' may reach 2148238320; target onnx-int needs it below 2\^31$"):
        build_model(b.graph())


# Residual mode `wide`


@pytest.mark.parametrize("skip_frac", [-3, 2, 5, 14, 22])
@pytest.mark.parametrize("per_channel", [False, True])
def test_additions_of_accumulators_are_exact(per_channel: bool, skip_frac: int, tmp_path: Path) -> None:
    b = GraphBuilder(4, (3, 7, 6), per_channel=per_channel)
    skip = b.conv("image", 6, fmt=FixedPointFormat(8, skip_frac, signed=True))
    wide = b.conv("image", 6, relu=False, fmt=FixedPointFormat(32, 0, signed=True))
    frac = b.tensors["image"].format.frac + max(next(op.weight_frac for op in b.ops if isinstance(op, Conv) and op.output == wide))
    b.tensors[wide] = dataclasses.replace(b.tensors[wide], format=FixedPointFormat(32, frac, signed=True))
    graph = b.head(b._append(Add("total", wide, skip, relu=True), b.tensors[skip].shape, UNSIGNED), 3)
    found = check(dataclasses.replace(graph, residual="wide"), tmp_path)
    assert found.n_products == 3
    rounded = [op.output for op in graph.ops if int(graph.shift(op).max()) > 0]
    assert found.n_rounding_shifts == len(rounded)
    assert wide not in rounded
    assert "total" in rounded


def test_8_bit_operations_on_accumulators_are_refused_by_name() -> None:
    b = GraphBuilder(0, (3, 6, 6))
    wide = b.conv("image", 4, relu=False, fmt=FixedPointFormat(16, 10, signed=True))
    pooled = b.max_pool(wide)
    with pytest.raises(UnsupportedError, match=r"^layer 'maxpool1' reads 'conv0', which is not 8-bit$"):
        build_model(b.graph())
    b.ops.pop()
    del b.tensors[pooled]
    b.conv(wide, 4, fmt=UNSIGNED)
    with pytest.raises(UnsupportedError, match=r"^layer 'conv1' reads 'conv0', which is not 8-bit$"):
        build_model(b.graph())
