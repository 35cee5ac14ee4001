from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeft.errors import UnsupportedError
from edgeft.export.trt_lint import RULES, check_lint, lint
from tests.trt_files import FileBuilder, add_constant, find, good_model, insert, set_constant

Change = Callable[[onnx.ModelProto], Any]


def constant(name: str, value: Any, dtype: Any = np.float32) -> Change:
    return lambda model: set_constant(model, name, np.asarray(value, dtype))


def operator(name: str, operator: str) -> Change:
    return lambda model: setattr(find(model, name), "op_type", operator)


def between(reader: str, operator: str, more: Any = (), **attributes: Any) -> Change:
    """A node before a reader; `more` are values of its further inputs."""

    def change(model: onnx.ModelProto) -> None:
        names = [add_constant(model, f"new/{index}", np.asarray(value)) for index, value in enumerate(more)]
        insert(model, reader, operator, names, **attributes)

    return change


def wire(name: str, port: int, source: str) -> Change:
    return lambda model: find(model, name).input.__setitem__(port, source)


def drop_input(name: str) -> Change:
    return lambda model: find(model, name).input.pop()


def opset(version: int) -> Change:
    return lambda model: setattr(model.opset_import[0], "version", version)


def renamed(name: str, new: str) -> Change:
    return lambda model: setattr(find(model, name), "name", new)


def domain(model: onnx.ModelProto) -> None:
    find(model, "stem/Relu").domain = "com.microsoft"


def scale_as_input(model: onnx.ModelProto) -> None:
    (step,) = (each for each in model.graph.initializer if each.name == "stem/step")
    model.graph.initializer.remove(step)
    model.graph.input.append(helper.make_tensor_value_info("stem/step", TensorProto.FLOAT, []))


def per_channel(shape: tuple[int, ...], axis: int, layer: str = "block.conv1") -> Change:
    def change(model: onnx.ModelProto) -> None:
        set_constant(model, f"{layer}/weight/step", np.full(shape, 2.0**-9, np.float32))
        set_constant(model, f"{layer}/weight/zero", np.zeros(shape, np.int8))
        find(model, f"{layer}/weight/DequantizeLinear").attribute.append(helper.make_attribute("axis", axis))

    return change


def concat(frac: int) -> Change:
    """The input of block.conv1 beside a second one of scale 2^-frac."""

    def change(model: onnx.ModelProto) -> None:
        add_constant(model, "other/step", np.float32(2.0**-frac))
        other = helper.make_node(
            "DequantizeLinear", ["stem/codes", "other/step", "stem/zero"], ["other/real"], name="other/DequantizeLinear"
        )
        insert(model, "block.conv1/Conv", "Concat", ["other/real"], axis=1)
        model.graph.node.insert(list(model.graph.node).index(find(model, "new/Concat")), other)
        set_constant(model, "block.conv1/weight/codes", np.ones((16, 32, 3, 3), np.int8))

    return change


def branch(model: onnx.ModelProto) -> None:
    """Q and DQ on the other operand of the residual addition too."""
    insert(model, "block/Add", "QuantizeLinear", ["block/step", "block/zero"])
    insert(model, "block/Add", "DequantizeLinear", ["block/step", "block/zero"])


def table(to: int = TensorProto.INT32, *, float_table: bool = True) -> Change:
    """A function by table between the codes of "stem" and what reads them."""

    def change(model: onnx.ModelProto) -> None:
        add_constant(model, "values", np.zeros(256, np.float32 if float_table else np.int8))
        insert(model, "stem/DequantizeLinear", "Cast", to=to)
        index = find(model, "new/Cast")
        find(model, "stem/DequantizeLinear").input[0] = "table/codes"
        gather = helper.make_node("Gather", ["values", index.output[0]], ["table/real"], name="table/Gather")
        quantize = helper.make_node(
            "QuantizeLinear", ["table/real", "stem/step", "stem/zero"], ["table/codes"], name="table/QuantizeLinear"
        )
        position = list(model.graph.node).index(index) + 1
        for node in (quantize, gather) if float_table else (gather,):
            model.graph.node.insert(position, node)
        if not float_table:
            gather.output[0] = "table/codes"

    return change


def computed_choice(model: onnx.ModelProto) -> None:
    insert(model, "stem/Conv", "Gather", ["image/float"])


def float_weights(model: onnx.ModelProto) -> None:
    set_constant(model, "stem/weight/codes", np.ones((16, 3, 3, 3), np.float32))
    find(model, "stem/Conv").input[1] = "stem/weight/codes"


def computed_weights(model: onnx.ModelProto) -> None:
    find(model, "fc/weight/DequantizeLinear").input[0] = "stem/codes"


def bias_by_dequantize(model: onnx.ModelProto) -> None:
    node = find(model, "stem/bias/Mul")
    node.op_type = "DequantizeLinear"
    node.input[0] = "stem/bias/codes"


Q, DQ, BLOCK, INNER, SUM = "stem/QuantizeLinear", "stem/DequantizeLinear", "block/QuantizeLinear", "block.conv1/Conv", "pool/ReduceSum"
INNER_WEIGHT, FC_WEIGHT, PADS = "block.conv1/weight/DequantizeLinear", "fc/weight/DequantizeLinear", [0, 0, 1, 1, 0, 0, 1, 1]
NOTHING, DOUBLED, LOWEST = np.array([], np.float32), np.array([1, 1, 2, 2], np.float32), np.int8(-128)
BROKEN: dict[str, tuple[str, str, Change, str]] = {
    "old opset": ("opset", "", opset(13), "opset [13], and 17 to 21 are what every reader of the file takes"),
    "new opset": ("opset", "", opset(22), "opset [22], and"),
    "no name": ("name", "", renamed("stem/Relu", ""), "the Relu that writes 'stem/relu' has no name, by which"),
    "same name": ("name", "stem/Conv", renamed("stem/Relu", "stem/Conv"), "another node has the same name"),
    "other domain": ("operator", "stem/Relu", domain, "operator com.microsoft.Relu is refused: TensorRT has no plugin of that name"),
    "average pool": ("operator", SUM, operator(SUM, "GlobalAveragePool"), "GlobalAveragePool multiplies by 1/n"),
    "mean": ("operator", SUM, operator(SUM, "ReduceMean"), "ReduceMean multiplies by 1/n"),
    "transposed": ("operator", "stem/Conv", operator("stem/Conv", "ConvTranspose"), "ConvTranspose may run in float, without a warning"),
    "integer": ("operator", "stem/Conv", operator("stem/Conv", "QLinearConv"), "QLinearConv is not parsed by TensorRT"),
    "batch norm": ("operator", "stem/Relu", operator("stem/Relu", "BatchNormalization"), "BatchNormalization becomes a separate"),
    "unknown": ("operator", "stem/Relu", operator("stem/Relu", "Sigmoid"), "Sigmoid is not known to give the same integers in TensorRT"),
    "half": ("half", Q, constant("stem/step", 0.0625, np.float16), "'stem/step' is FLOAT16: int8 convolutions would"),
    "half cast": ("half", "new/Cast", between("stem/Relu", "Cast", to=TensorProto.FLOAT16), "'new/Cast/out' is FLOAT16: int8 convolutions"),
    "bfloat": ("half", "new/Cast", between("stem/Relu", "Cast", to=TensorProto.BFLOAT16), "'new/Cast/out' is BFLOAT16"),
    "uint8 inside": ("uint8", "new/Cast", between(Q, "Cast", to=TensorProto.UINT8), "'new/Cast/out' is uint8, which"),
    "uint8 moved": ("uint8", "new/Flatten", between("image/Cast", "Flatten"), "'new/Flatten/out' is uint8, which TensorRT has for"),
    "uint8 read": ("uint8", "new/Flatten", between("image/Cast", "Flatten"), "Flatten reads the uint8 input 'images', which"),
    "no zero point": ("zero point", Q, drop_input(Q), "the zero point is left out, which means"),
    "no zero point, DQ": ("zero point", DQ, drop_input(DQ), "the zero point is left out"),
    "uint8 zero": ("zero point", Q, constant("stem/zero", 0, np.uint8), "the zero point is uint8: TensorRT would take it"),
    "uint8 128": ("zero point", DQ, constant("stem/zero", 128, np.uint8), "the zero point is uint8"),
    "zero point 3": ("zero point", Q, constant("stem/zero", 3, np.int8), "the zero point is 3; TensorRT"),
    "zero point int16": ("zero point", Q, constant("stem/zero", 0, np.int16), "the zero point must be an int8 constant"),
    "zero point computed": ("zero point", BLOCK, wire(BLOCK, 2, "stem/codes"), "the zero point must be an"),
    "zero point vector": ("zero point", Q, constant("stem/zero", [0], np.int8), "the zero point has shape [1], the scale []"),
    "scale input": ("scale", Q, scale_as_input, "the scale 'stem/step' is a graph input, not a constant, of"),
    "scale computed": ("scale", BLOCK, wire(BLOCK, 1, "stem/real"), "the scale 'stem/real' is computed;"),
    "scale double": ("scale", Q, constant("stem/step", 0.5, np.float64), "the scale 'stem/step' must be float32"),
    "scale 0.03": ("scale", Q, constant("stem/step", 0.03), "the scale 'stem/step' must be a positive normal power of two"),
    "scale 0": ("scale", Q, constant("stem/step", 0.0), "the scale 'stem/step' must be a positive"),
    "scale negative": ("scale", Q, constant("stem/step", -0.5), "the scale 'stem/step' must be a positive"),
    "scale infinite": ("scale", Q, constant("stem/step", np.inf), "the scale 'stem/step' must be a positive"),
    "scale denormal": ("scale", DQ, constant("stem/step", 2.0**-140), "the scale 'stem/step' must be a positive normal"),
    "weight scale": ("scale", FC_WEIGHT, constant("fc/weight/step", 0.3), "the scale 'fc/weight/step' must be"),
    "scale [1]": ("scale shape", DQ, constant("stem/step", [0.0625]), "the scale has shape [1], not []: convolutions behind"),
    "weight scale [1]": ("scale shape", INNER_WEIGHT, per_channel((1,), 0), "the scale [1] along axis 0 is neither"),
    "input channels": ("scale shape", INNER_WEIGHT, per_channel((16,), 1), "the scale [16] along axis 1 is neither"),
    "gemm inputs": ("scale shape", FC_WEIGHT, per_channel((16,), 1, "fc"), "the scale [16] along axis 1 is neither"),
    "float weights": ("weights", "stem/Conv", float_weights, "its weights 'stem/weight/codes' do not come from a DequantizeLinear"),
    "computed weights": ("weights", "fc/Gemm", computed_weights, "its weights 'stem/codes' are computed; they must be an int8 constant"),
    "uint8 weights": ("weights", "fc/Gemm", constant("fc/weight/codes", np.ones((5, 16)), np.uint8), "its weights 'fc/weight/codes' are U"),
    "int16 weights": ("weights", "fc/Gemm", constant("fc/weight/codes", np.ones((5, 16)), np.int16), "its weights 'fc/weight/codes' are I"),
    "float bias": ("bias", "stem/Conv", constant("stem/bias/codes", np.ones(16)), "the bias 'stem/bias/real' must be an int32 constant"),
    "bare bias": ("bias", "stem/Conv", wire("stem/Conv", 2, "stem/bias/codes"), "the bias 'stem/bias/codes' must be an int32 constant"),
    "bias by DQ": ("bias", "stem/Conv", bias_by_dequantize, "the bias 'stem/bias/real' comes from a DequantizeLinear, which TensorRT"),
    "large bias": ("bias", "fc/Gemm", constant("fc/bias/codes", [2**24 + 1] * 5, np.int32), "the bias 'fc/bias/codes' is beyond 16777216"),
    "bias factor": ("bias", "fc/Gemm", constant("fc/bias/step", 3), "the factor of the bias 'fc/bias/real' must be a power of two"),
    "bias scale": ("bias", "fc/Gemm", constant("fc/bias/step", 2.0**-11), "the factor 0.00048828125 of the bias 'fc/bias/real' is not the"),
    "relu": ("input", INNER, between(INNER, "Relu"), "its data come from Relu 'new/Relu'"),
    "clip": ("input", INNER, between(INNER, "Clip"), "its data come from Clip 'new/Clip', not from"),
    "pad": ("input", "stem/Conv", between("stem/Conv", "Pad", [PADS]), "its data come from Pad 'new/Pad', not from"),
    "resize": ("input", "stem/Conv", between("stem/Conv", "Resize", [NOTHING, DOUBLED]), "its data come from Resize"),
    "no Q/DQ": ("input", "fc/Gemm", wire("flat/Flatten", 0, "pool/mean"), "its data come from Mul 'pool/Mul'"),
    "bare input": ("input", "stem/Conv", wire("stem/Conv", 0, "images"), "its data are an input or a constant of the file"),
    "table, no Q/DQ": ("input", "stem/Conv", computed_choice, "its data come from Gather 'new/Gather'"),
    "float skip": ("residual", "block/Add", wire("block/Add", 1, "stem/relu"), "neither operand comes from a DequantizeLinear: the skip"),
    "concat": ("concat", "new/Concat", concat(3), "its inputs have different scales: a convolution behind it may run in float"),
    "float pool": ("pool", SUM, wire(SUM, 0, "block/relu"), "a pool must sum the output of"),
    "pool divisor": ("pool", SUM, constant("pool/unit", 1 / 49), "Mul 'pool/Mul' reads the sum; it must be a Mul"),
    "pool relu": ("pool", SUM, between("pool/Mul", "Relu"), "Relu 'new/Relu' reads the sum; it must be a Mul"),
    "int8 indices": ("table", "table/Gather", table(TensorProto.INT8), "its indices are INT8; TensorRT takes int32 and int64 only"),
    "int8 table": ("table", "table/Gather", table(float_table=False), "it reads an int8 constant, with which the build fails: put"),
    "negative": ("table", "new/Gather", between(INNER, "Gather", [[-1] * 16], axis=1), "its indices are negative"),
    "padded codes": ("pad", "new/Pad", between(DQ, "Pad", [PADS, LOWEST]), "it pads int8 codes, and"),
}  # fmt: skip


def test_a_good_file_passes() -> None:
    assert lint(good_model()) == []
    check_lint(good_model())


@pytest.mark.parametrize(
    "change",
    [
        opset(21),
        per_channel((16,), 0),
        per_channel((5,), 0, "fc"),
        between("block.conv1/Conv", "MaxPool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        between("block.conv1/Conv", "Gather", [[0, 2, 1, 3] * 4], axis=1),
        between("block.conv1/Conv", "Tile", [[1, 1, 1, 1]]),
        concat(4),
        table(),
        branch,
        lambda model: find(model, "stem/Conv").input.pop(),
    ],
    ids=["opset 21", "per channel", "gemm per channel", "max-pool", "channels", "tile", "concat", "table", "branch", "no bias"],
)
def test_other_spellings_that_stay_in_int8_pass(change: Change) -> None:
    model = good_model()
    change(model)
    assert [problem for problem in lint(model) if problem.rule != "bias"] == []


@pytest.mark.parametrize(("rule", "node", "change", "text"), BROKEN.values(), ids=BROKEN.keys())
def test_each_broken_rule_is_reported_with_its_node(rule: str, node: str, change: Change, text: str) -> None:
    model = good_model()
    change(model)
    found = [problem.text for problem in lint(model) if (problem.rule, problem.node) == (rule, node)]
    assert any(each.startswith(text) for each in found), lint(model)


def test_every_rule_is_broken_once() -> None:
    assert {rule for rule, *_ in BROKEN.values()} == set(RULES)


def test_a_constant_node_is_as_good_as_an_initializer() -> None:
    model = good_model()
    (step,) = (each for each in model.graph.initializer if each.name == "stem/step")
    model.graph.initializer.remove(step)
    node = helper.make_node("Constant", [], ["stem/step"], name="stem/step", value_float=0.0625)
    model.graph.node.insert(0, node)
    assert lint(model) == []


def test_a_product_of_matrices_and_its_bias_are_checked() -> None:
    b = FileBuilder()
    flat = b.node("Flatten", [b.image()], "flat/real", axis=1)
    weight, bias = b.weights("fc", (192, 5), 7, 8)
    b.constant("fc/bias/codes", np.ones(5), np.int32)
    b.node("Add", [b.node("MatMul", [flat, weight], "fc/product"), bias], "logits", name="fc/Add")
    assert lint(b.model("logits")) == []
    b.nodes[-1].input[1] = b.constant("fc/float", np.ones(5), np.float32)
    (problem,) = lint(b.model("logits"))
    assert (problem.node, problem.rule) == ("fc/Add", "bias")


def test_all_problems_are_counted_and_five_are_shown() -> None:
    model = good_model()
    set_constant(model, "stem/step", np.float32(0.03))
    with pytest.raises(UnsupportedError) as caught:
        check_lint(model)
    text = "the scale 'stem/step' must be a positive normal power of two: any other is rounded twice"
    assert caught.value.message.startswith(
        f"the file breaks rules of TensorRT: 'stem/QuantizeLinear' (scale): {text}; 'stem/DequantizeLinear' (scale): {text}; "
    )
    for node in model.graph.node:
        node.name = ""
    with pytest.raises(UnsupportedError, match=r"the file \(name\): the Cast that writes 'image/float' has no name.*; and \d+ more$"):
        check_lint(model)
