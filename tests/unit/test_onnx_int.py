import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotInRuntime

from edgeft.artifact import Artifact, write_artifact
from edgeft.errors import UnsupportedError, VerificationError
from edgeft.export import TARGETS, onnx_int
from edgeft.export.onnx_int import TARGET, build_model, scan
from edgeft.export.verify import verify
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import IntegerGraph
from edgeft.interpret import Interpreter
from tests.graphs import GraphBuilder, random_images, residual_net

UNSIGNED, GATE = (FixedPointFormat.parse(text) for text in ("u8.5", "u8.8"))
ALLOWED = "Add, BitShift, BitwiseAnd, Cast, Clip, Concat, ConvInteger, Flatten, Gather, MatMulInteger, MaxPool, Mul, ReduceSum, Sub"


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


# Scan


def insert(model: onnx.ModelProto, reader: str, operator: str, more: tuple[str, ...] = (), **attributes: Any) -> None:
    """Put a node "new/<operator>" between a node and its first input."""
    names = [node.name for node in model.graph.node]
    target = model.graph.node[names.index(reader)]
    new = helper.make_node(operator, [target.input[0], *more], [f"new/{operator}/out"], name=f"new/{operator}", **attributes)
    target.input[0] = new.output[0]
    model.graph.node.insert(names.index(reader), new)


def constant(model: onnx.ModelProto, value: NDArray[Any] | np.generic) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), "new"))
    return "new"


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    found: onnx.NodeProto = next(each for each in model.graph.node if each.name == name)
    return found


@pytest.fixture
def model() -> onnx.ModelProto:
    b = GraphBuilder(0, (3, 6, 7))
    x = b.conv("image", 4)
    x = b.lookup(b.mul(x, b.lookup(b.global_pool(x), GATE), UNSIGNED))
    return build_model(b.head(b.conv(x, 4), 3))


def refusal(model: onnx.ModelProto) -> str:
    with pytest.raises(VerificationError) as caught:
        scan(model)
    return caught.value.message


def test_what_the_writer_makes_passes(model: onnx.ModelProto) -> None:
    assert scan(model).operators == Counter(each.op_type for each in model.graph.node)


def test_a_float_multiplication_is_named(model: onnx.ModelProto) -> None:
    """Codes to float, times 0.5, and back to codes, in front of a convolution: the first node that makes a float is the one named."""
    insert(model, "conv5/ConvInteger", "Cast", to=TensorProto.INT8)
    node(model, "new/Cast").name = "back"
    insert(model, "back", "Mul", (constant(model, np.float32(0.5)),))
    insert(model, "new/Mul", "Cast", to=TensorProto.FLOAT)
    node(model, "back").output[0] = node(model, "conv5/ConvInteger").input[0] = "halved"
    assert refusal(model) == "node 'new/Cast' (Cast): 'new/Cast/out' is float; allowed: uint8, int8, int32, uint32"


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.INT16])
def test_other_types_are_named(model: onnx.ModelProto, kind: int) -> None:
    insert(model, "conv5/Cast", "Cast", to=kind)
    name = TensorProto.DataType.Name(kind).lower()
    assert refusal(model) == f"node 'new/Cast' (Cast): 'new/Cast/out' is {name}; allowed: uint8, int8, int32, uint32"


@pytest.mark.parametrize("operator", ["MatMul", "Div", "Mod", "Pow", "Conv", "If", "Mystery"])
def test_other_operators_are_named(model: onnx.ModelProto, operator: str) -> None:
    insert(model, "conv5/Add", operator, (constant(model, np.int32(3)),))
    assert refusal(model) == f"node 'new/{operator}' is of type {operator}; target onnx-int allows {ALLOWED}"


def test_operators_of_other_domains_and_functions_are_named(model: onnx.ModelProto) -> None:
    insert(model, "conv5/Add", "Add", (constant(model, np.int32(3)),), domain="elsewhere")
    assert refusal(model) == f"node 'new/Add' is of type elsewhere.Add; target onnx-int allows {ALLOWED}"
    model.functions.append(helper.make_function("", "Clip", ["x"], ["y"], [], []))
    assert refusal(model) == "function 'Clip': a file of target onnx-int has none"


def test_a_wider_multiplication_is_named(model: onnx.ModelProto) -> None:
    insert(model, "conv5/Add", "Mul", (constant(model, np.int32(3)),))
    assert refusal(model) == "node 'new/Mul' (Mul) multiplies 'conv5/products', which is no Cast of an 8-bit tensor"


def test_both_factors_are_looked_at(model: onnx.ModelProto) -> None:
    node(model, "mul3/Mul").input[1] = constant(model, np.int32(3))
    assert refusal(model) == "node 'mul3/Mul' (Mul) multiplies 'new', which is no Cast of an 8-bit tensor"
    node(model, "mul3/Mul").input[1] = "pool1/round/signed"
    assert refusal(model) == "node 'mul3/Mul' (Mul) multiplies 'pool1/round/signed', which is no Cast of an 8-bit tensor"


def test_a_zero_point_is_named(model: onnx.ModelProto) -> None:
    node(model, "conv5/ConvInteger").input.append(constant(model, np.int8(3)))
    assert refusal(model) == "node 'conv5/ConvInteger' (ConvInteger) subtracts 'new', which makes a factor of 9 bits"


def test_shifts_and_tables_that_depend_on_the_image_are_named(model: onnx.ModelProto) -> None:
    before = onnx.ModelProto()
    before.CopyFrom(model)
    node(model, "conv5/round/BitShift").input[1] = "conv5/round/unsigned"
    assert refusal(model) == "node 'conv5/round/BitShift' (BitShift) shifts by 'conv5/round/unsigned', which is no constant"
    node(before, "lookup4/Gather").input[0] = constant(before, np.arange(2**16).astype(np.uint8))
    assert refusal(before) == "node 'lookup4/Gather' (Gather) reads 'new', which is no constant table of 256 bytes"


def test_factors_of_other_operators_have_8_bits_by_type(model: onnx.ModelProto) -> None:
    node(model, "conv5/ConvInteger").input[0] = "mul3/product"
    assert re.match(r"^the file contradicts itself: .*conv5/ConvInteger.*int32", refusal(model), re.DOTALL)


def test_a_tensor_that_nothing_writes_is_named(model: onnx.ModelProto) -> None:
    node(model, "conv5/Add").input[1] = "nowhere"
    assert re.match(r"^the file contradicts itself: .*input 'nowhere' of node: \nname: conv5/Add OpType: Add", refusal(model), re.DOTALL)


def test_a_tensor_of_no_known_type_is_named(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_sequence_value_info("new", TensorProto.FLOAT, None))
    assert refusal(model) == "tensor 'new' is of no known type; allowed: uint8, int8, int32, uint32"


def test_a_constant_that_an_input_can_replace_is_none(model: onnx.ModelProto) -> None:
    bits = node(model, "conv5/round/BitShift").input[1]
    model.graph.input.append(helper.make_tensor_value_info(bits, TensorProto.UINT32, []))
    assert refusal(model) == f"node 'conv5/round/BitShift' (BitShift) shifts by '{bits}', which is no constant"


def test_what_the_file_says_about_types_is_not_believed(model: onnx.ModelProto) -> None:
    insert(model, "conv5/Cast", "Cast", to=TensorProto.FLOAT)
    model.graph.value_info.append(helper.make_tensor_value_info("new/Cast/out", TensorProto.INT32, None))
    assert refusal(model) == "node 'new/Cast' (Cast): 'new/Cast/out' is float; allowed: uint8, int8, int32, uint32"


def test_an_output_of_another_type_than_declared_is_refused() -> None:
    b = GraphBuilder(0, (3, 4, 4))
    b.conv("image", 4)
    model = build_model(b.graph())
    model.graph.node[-1].attribute[0].i = TensorProto.FLOAT
    assert refusal(model).startswith("the file contradicts itself: ")


def test_unused_floats_are_named(model: onnx.ModelProto) -> None:
    constant(model, np.float32(0.5))
    assert refusal(model) == "tensor 'new' is float; allowed: uint8, int8, int32, uint32"


# Target


def write_run(path: Path, graph: IntegerGraph, wrong: int = 0) -> Artifact:
    """A quantized artifact; `wrong` is added to the recorded logits."""
    images = random_images(graph, 20)
    logits = Interpreter(graph).layers(images)[graph.output] + wrong
    return write_artifact(
        path,
        kind="quantized",
        config={},
        seed=0,
        preprocessing={"size": 12},
        classes=("ant", "bee", "cat", "dog", "eel"),
        arrays={"weights.safetensors": graph.constants, "samples.safetensors": {"images": images, f"layer:{graph.output}": logits}},
        documents={"graph.json": graph.to_json()},
    )


def test_export_writes_scans_verifies_and_reports(tmp_path: Path) -> None:
    artifact = write_run(tmp_path / "run", residual_net(0))
    target, out = TARGETS.get("onnx-int"), tmp_path / "out"
    result = target.export(artifact, out)
    assert [path.name for path in out.iterdir()] == ["model.onnx"]
    assert (result.target, result.path, result.converted) == ("onnx-int", out, False)
    assert result.lines == (
        f"onnx-int   exact on 20/20 images, 13 tensors each   0.0 MB   {out / 'model.onnx'}",
        "           7 layers multiply 8 x 8 bits, 9 rounding shifts, no float tensor and no wider multiplication between input and logits",
    )
    assert json.loads(json.dumps(result.summary)) == result.summary
    assert (result.summary["products"], result.summary["rounding_shifts"], result.summary["verified_images"]) == (7, 9, 20)
    assert result.summary["file_bytes"] == (out / "model.onnx").stat().st_size
    stored = metadata(onnx.load(out / "model.onnx"))
    assert stored["edgeft.artifact"] == artifact.digest
    images = artifact.samples()["images"]
    (runner,) = target.runtimes(out)
    assert runner.name == "onnx-int"
    assert np.array_equal(runner.logits(images), Interpreter(artifact.graph()).logits(images))


def test_recorded_codes_that_differ_fail_the_export(tmp_path: Path) -> None:
    artifact = write_run(tmp_path / "run", residual_net(0), wrong=1)
    with pytest.raises(VerificationError, match=r"^layer 'linear11': the exported model does not give the codes recorded in the artifact$"):
        TARGET.export(artifact, tmp_path / "out")


def test_a_wrong_weight_in_the_file_is_located(tmp_path: Path) -> None:
    graph = residual_net(0)
    (tmp_path / "model.onnx").write_bytes(build_model(graph).SerializeToString())
    constants: dict[str, NDArray[Any]] = {**graph.constants, "conv3.weight": graph.constants["conv3.weight"] // 2}
    other = dataclasses.replace(graph, constants=constants)
    with pytest.raises(VerificationError, match=r"^layer 'conv3': onnx-int differs from interpreter in "):
        verify(Interpreter(other), TARGET.load(tmp_path, 1), random_images(graph, 4))


def test_a_runtime_without_signed_integer_convolutions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def old_runtime(*_: Any, **__: Any) -> None:
        raise NotInRuntime("Could not find an implementation for ConvInteger(10)")

    monkeypatch.setattr(onnx_int, "OnnxRunner", old_runtime)
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    with pytest.raises(UnsupportedError) as caught:
        TARGET.export(write_run(tmp_path / "run", residual_net(0)), tmp_path / "out")
    assert caught.value.message == "ONNX Runtime 1.23.2: Could not find an implementation for ConvInteger(10)"
    assert caught.value.hint == "1.24 and newer multiply signed integers: pip install --upgrade onnxruntime"
