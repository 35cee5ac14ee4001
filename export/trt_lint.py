"""Rules that make TensorRT compute a file in int8, and exactly; checked without TensorRT.

NVIDIA's parser takes many spellings that it then runs in float, or changes, without a word. Every rule below keeps one of them out; what
would happen otherwise was measured with TensorRT-RTX 1.7.1 and is said in the problem. A new rule is a function and a line in RULES.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from edgeft.bounds import FLOAT32_EXACT
from edgeft.errors import UnsupportedError
from edgeft.export.onnx_index import FileIndex

OLDEST_OPSET, NEWEST_OPSET = 17, 21
MATRIX = ("Conv", "Gemm", "MatMul")
QUANTIZING = ("QuantizeLinear", "DequantizeLinear")
MOVES = frozenset({"Flatten", "MaxPool", "Reshape", "Slice", "Tile", "Transpose"})
"""Operators that may stand between a DequantizeLinear and a convolution: TensorRT moves them onto the int8 codes."""
KNOWN = frozenset(
    {*MATRIX, *QUANTIZING, *MOVES, "Add", "Cast", "Clip", "Concat", "Constant", "Gather", "Identity", "Max", "Min", "Mul", "Pad",
     "ReduceSum", "Relu", "Resize", "Round", "Split", "Squeeze", "Sub", "Unsqueeze"}
)  # fmt: skip
_POOL = "multiplies by 1/n or rounds in an unspecified way; a sum is ReduceSum, Mul by 2^-m, QuantizeLinear"
_INTEGER = "is not parsed by TensorRT"
SILENTLY_FLOAT = "may run in float, without a warning of TensorRT"
FORBIDDEN = {
    "AveragePool": _POOL, "GlobalAveragePool": _POOL, "ReduceMean": _POOL,
    "BatchNormalization": "becomes a separate float multiplication; fold it into the convolution",
    "ConvTranspose": SILENTLY_FLOAT,
    **dict.fromkeys(("BitShift", "BitwiseAnd", "ConvInteger", "DynamicQuantizeLinear", "MatMulInteger"), _INTEGER),
    **dict.fromkeys(("QLinearAdd", "QLinearConcat", "QLinearConv", "QLinearMatMul", "QLinearMul"), _INTEGER),
}  # fmt: skip
SHOWN = 5


@dataclass(frozen=True)
class Problem:
    """A node that breaks a rule. `node` is "" where the file as a whole does."""

    node: str
    rule: str
    text: str

    def __str__(self) -> str:
        return f"{repr(self.node) if self.node else 'the file'} ({self.rule}): {self.text}"


Complaints = Iterator[tuple[str, str]]
"""Name of a node and what is wrong with it."""


def lint(model: onnx.ModelProto) -> list[Problem]:
    """Everything by which TensorRT would refuse the file, change it, or leave int8; empty for a file in order."""
    index = FileIndex(model)
    return [Problem(node, name, text) for name, rule in RULES.items() for node, text in rule(index)]


def check_lint(model: onnx.ModelProto) -> None:
    """Raises UnsupportedError naming nodes and rules."""
    problems = lint(model)
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UnsupportedError(f"the file breaks rules of TensorRT: {'; '.join(map(str, problems[:SHOWN]))}{more}")


def _opset(index: FileIndex) -> Complaints:
    versions = [each.version for each in index.model.opset_import if each.domain in ("", "ai.onnx")]
    if len(versions) != 1 or not OLDEST_OPSET <= versions[0] <= NEWEST_OPSET:
        yield "", f"opset {versions}, and {OLDEST_OPSET} to {NEWEST_OPSET} are what every reader of the file takes"


def _names(index: FileIndex) -> Complaints:
    seen: set[str] = set()
    for node in index.nodes:
        if not node.name:
            yield "", f"the {node.op_type} that writes '{node.output[0]}' has no name, by which errors and the table of kernels call it"
        elif node.name in seen:
            yield node.name, "another node has the same name"
        seen.add(node.name)


def _operators(index: FileIndex) -> Complaints:
    for node in index.nodes:
        if node.domain not in ("", "ai.onnx"):
            yield node.name, f"operator {node.domain}.{node.op_type} is refused: TensorRT has no plugin of that name"
        elif node.op_type not in KNOWN:
            yield node.name, f"{node.op_type} {FORBIDDEN.get(node.op_type, 'is not known to give the same integers in TensorRT')}"


def _half(index: FileIndex) -> Complaints:
    for name, kind in index.types.items():
        if kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
            yield (
                index.place(name),
                f"'{name}' is {TensorProto.DataType.Name(kind)}: int8 convolutions would write half floats, which are not exact",
            )


def _uint8(index: FileIndex) -> Complaints:
    for name in (name for name, kind in index.types.items() if kind == TensorProto.UINT8):
        if name in index.inputs:
            for node in index.readers.get(name, []):
                if node.op_type != "Cast" or index.attribute(node, "to") != TensorProto.FLOAT:
                    yield node.name, f"{node.op_type} reads the uint8 input '{name}', which TensorRT refuses: Cast it to float first"
        elif not _reported_as_zero_point(index, name):
            yield index.place(name), f"'{name}' is uint8, which TensorRT has for graph inputs only"


def _reported_as_zero_point(index: FileIndex, name: str) -> bool:
    """Constants read by Q and DQ, and what a Q writes."""
    writer, readers = index.writers.get(name), index.readers.get(name, [])
    return all(node.op_type in QUANTIZING for node in ([writer] if writer else readers))


def _zero_points(index: FileIndex) -> Complaints:
    for node in index.of(*QUANTIZING):
        if index.types.get(node.input[0], TensorProto.INT8) == TensorProto.INT32:
            continue  # a bias, which has a rule of its own
        if len(node.input) < 3 or not node.input[2]:
            yield node.name, "the zero point is left out, which means uint8; TensorRT would take it as int8 without a warning"
            continue
        zero, scale = index.array(node.input[2]), index.array(node.input[1])
        kind = index.types.get(node.input[2])
        if kind == TensorProto.UINT8:
            yield node.name, "the zero point is uint8: TensorRT would take it as int8 and saturate at 127, not at 255"
        elif zero is None or kind != TensorProto.INT8:
            yield node.name, "the zero point must be an int8 constant"
        elif np.any(zero):
            yield node.name, f"the zero point is {zero.ravel().tolist()[0]}; TensorRT refuses any but 0"
        elif scale is not None and zero.shape != scale.shape:
            yield node.name, f"the zero point has shape {list(zero.shape)}, the scale {list(scale.shape)}: they must be equal"


def _scales(index: FileIndex) -> Complaints:
    for node in index.of(*QUANTIZING):
        name = node.input[1]
        scale = index.array(name)
        if name in index.inputs:
            yield node.name, f"the scale '{name}' is a graph input, not a constant, of which TensorRT's builder dies"
        elif scale is None:
            yield node.name, f"the scale '{name}' is computed; it must be a constant"
        elif index.types.get(name) != TensorProto.FLOAT:
            yield node.name, f"the scale '{name}' must be float32"
        elif not _powers_of_two(scale):
            yield node.name, f"the scale '{name}' must be a positive normal power of two: any other is rounded twice"


def _powers_of_two(values: np.ndarray) -> bool:
    return bool(np.all(np.isfinite(values) & (np.frexp(values)[0] == 0.5) & (values >= np.finfo(np.float32).tiny)))


def _scale_shapes(index: FileIndex) -> Complaints:
    for node in index.of(*QUANTIZING):
        scale = index.array(node.input[1])
        if scale is None or scale.ndim == 0:
            continue
        codes = index.array(node.input[0])
        if codes is None:
            yield node.name, f"the scale has shape {list(scale.shape)}, not []: convolutions behind it {SILENTLY_FLOAT}"
            continue
        axis = index.attribute(node, "axis", 1) % max(codes.ndim, 1)
        wanted = {_output_axis(index, reader) for reader in index.readers.get(node.output[0], [])}
        if wanted != {axis} or scale.shape != (codes.shape[axis],):
            shape = list(scale.shape)
            yield node.name, f"the scale {shape} along axis {axis} is neither one nor one for each output: the layer {SILENTLY_FLOAT}"


def _output_axis(index: FileIndex, reader: onnx.NodeProto) -> int:
    if reader.op_type in ("Conv", "Gemm"):
        return int(reader.op_type == "Gemm" and not index.attribute(reader, "transB", 0))
    return 1 if reader.op_type == "MatMul" else -1


def _weights(index: FileIndex) -> Complaints:
    for node in index.of(*MATRIX):
        writer = index.writers.get(node.input[1])
        if writer is None or writer.op_type != "DequantizeLinear":
            yield node.name, f"its weights '{node.input[1]}' do not come from a DequantizeLinear: the layer {SILENTLY_FLOAT}"
            continue
        kind = index.types.get(writer.input[0], TensorProto.UNDEFINED)
        if writer.input[0] not in index.constants:
            yield node.name, f"its weights '{writer.input[0]}' are computed; they must be an int8 constant"
        elif kind != TensorProto.INT8:
            yield (
                node.name,
                f"its weights '{writer.input[0]}' are {TensorProto.DataType.Name(kind)}, which TensorRT refuses; they must be int8",
            )


def _biases(index: FileIndex) -> Complaints:
    for node in index.of("Conv", "Gemm"):
        if len(node.input) > 2 and node.input[2]:
            yield from ((node.name, text) for text in _bias(index, node, node.input[2], node))
    for node in index.of("Add"):
        for product, bias in (node.input, reversed(node.input)):
            writer = index.writers.get(product)
            if writer is not None and writer.op_type == "MatMul" and bias in index.foldable:
                yield from ((node.name, text) for text in _bias(index, node, bias, writer))


def _bias(index: FileIndex, node: onnx.NodeProto, name: str, matrix: onnx.NodeProto) -> Iterator[str]:
    """An int32 constant, Cast, Mul by the scale of the accumulators: TensorRT folds it, and the integers stay in the file."""
    writer = index.writers.get(name)
    if writer is not None and writer.op_type == "DequantizeLinear":
        yield f"the bias '{name}' comes from a DequantizeLinear, which TensorRT refuses for int32 and does not fold for int8"
        return
    factors = list(writer.input) if writer is not None and writer.op_type == "Mul" else []
    casts = [index.writers.get(each) for each in factors]
    cast = next((each for each in casts if each is not None and each.op_type == "Cast"), None)
    units = [unit for each in factors if (unit := index.array(each)) is not None]
    codes = None if cast is None else index.array(cast.input[0])
    if cast is None or codes is None or codes.dtype != np.int32 or index.attribute(cast, "to") != TensorProto.FLOAT or len(units) != 1:
        yield f"the bias '{name}' must be an int32 constant, Cast to float and Mul by a power of two: its integers belong in the file"
        return
    if np.abs(codes.astype(np.int64)).max(initial=0) > FLOAT32_EXACT:
        yield f"the bias '{cast.input[0]}' is beyond {FLOAT32_EXACT}, up to which float32 holds all integers"
    if not _powers_of_two(units[0]) or units[0].ndim > 1:
        yield f"the factor of the bias '{name}' must be a power of two, or one for each output"
    elif (wanted := _accumulator_scale(index, matrix)) is not None and not np.all(wanted == units[0]):
        yield f"the factor {units[0].ravel()[0]} of the bias '{name}' is not the scale of data times that of weights, {np.ravel(wanted)[0]}"


def _accumulator_scale(index: FileIndex, node: onnx.NodeProto) -> np.ndarray | None:
    scales = [_scale_of(index, origin) for origin in (*origins(index, node.input[0]), index.writers.get(node.input[1]))]
    data, weight = scales[0], scales[-1]
    return None if data is None or weight is None else np.asarray(data * weight)


def _scale_of(index: FileIndex, node: onnx.NodeProto | None) -> np.ndarray | None:
    return index.array(node.input[1]) if node is not None and node.op_type in QUANTIZING else None


def origins(index: FileIndex, name: str) -> list[onnx.NodeProto | None]:
    """The nodes whose values a tensor holds, seen through everything that only moves them; None for an input or a constant."""
    found, waiting, seen = [], [name], {name}
    while waiting:
        node = index.writers.get(waiting.pop())
        if node is not None and (node.op_type in MOVES or node.op_type == "Concat" or _selects(index, node)):
            sources = node.input if node.op_type == "Concat" else node.input[:1]
            waiting += [source for source in sources if source not in seen]
            seen.update(sources)
        else:
            found.append(node)
    return found


def _selects(index: FileIndex, node: onnx.NodeProto) -> bool:
    """A Gather of constant channels moves codes; one with computed indices is a table."""
    return node.op_type == "Gather" and node.input[1] in index.constants


def _from_dequantize(index: FileIndex, name: str) -> bool:
    return all(node is not None and node.op_type == "DequantizeLinear" for node in origins(index, name))


def _inputs(index: FileIndex) -> Complaints:
    for node in index.of(*MATRIX):
        for origin in origins(index, node.input[0]):
            if origin is None:
                yield node.name, f"its data are an input or a constant of the file, not from a DequantizeLinear: the layer {SILENTLY_FLOAT}"
            elif origin.op_type != "DequantizeLinear":
                yield (
                    node.name,
                    f"its data come from {origin.op_type} '{origin.name}', not from a DequantizeLinear: the layer {SILENTLY_FLOAT}",
                )


def _residuals(index: FileIndex) -> Complaints:
    for node in index.of("Add"):
        computed = [name for name in node.input if name not in index.foldable]
        if len(computed) == 2 and not any(_from_dequantize(index, name) for name in computed):
            yield node.name, "neither operand comes from a DequantizeLinear: the skip of a residual addition must be int8"


def _concats(index: FileIndex) -> Complaints:
    for node in index.of("Concat"):
        scales = [scale for origin in origins(index, node.output[0]) if (scale := _scale_of(index, origin)) is not None]
        if any(not np.array_equal(scale, scales[0]) for scale in scales):
            yield node.name, f"its inputs have different scales: a convolution behind it {SILENTLY_FLOAT}"


def _pools(index: FileIndex) -> Complaints:
    for node in index.of("ReduceSum"):
        axes = index.array(node.input[1]) if len(node.input) > 1 else None
        if axes is None or not _from_dequantize(index, node.input[0]):
            yield node.name, "a pool must sum the output of a DequantizeLinear along constant axes given as input"
        for reader in _readers_behind_moves(index, node.output[0]):
            factors = [value for name in reader.input if (value := index.array(name)) is not None]
            divides = reader.op_type == "Mul" and len(factors) == 1 and factors[0].ndim == 0 and _powers_of_two(factors[0])
            if not divides and reader.op_type != "QuantizeLinear":
                yield node.name, f"{reader.op_type} '{reader.name}' reads the sum; it must be a Mul by a power of two, or a QuantizeLinear"


def _readers_behind_moves(index: FileIndex, name: str) -> Iterator[onnx.NodeProto]:
    for reader in index.readers.get(name, []):
        if reader.op_type in MOVES:
            yield from _readers_behind_moves(index, reader.output[0])
        else:
            yield reader


def _tables(index: FileIndex) -> Complaints:
    for node in index.of("Gather"):
        kind, indices = index.types.get(node.input[1], TensorProto.UNDEFINED), index.array(node.input[1])
        if kind not in (TensorProto.INT32, TensorProto.INT64):
            yield node.name, f"its indices are {TensorProto.DataType.Name(kind)}; TensorRT takes int32 and int64 only: Cast the codes"
        elif indices is not None and np.any(indices < 0):
            yield node.name, "its indices are negative"
        if index.types.get(node.input[0]) == TensorProto.INT8 and node.input[0] in index.constants:
            yield node.name, "it reads an int8 constant, with which the build fails: put a DequantizeLinear between them"


def _pads(index: FileIndex) -> Complaints:
    for node in index.of("Pad"):
        if index.types.get(node.input[0]) == TensorProto.INT8:
            yield node.name, "it pads int8 codes, and with a value the build fails: use the pads of the convolution"


RULES: dict[str, Callable[[FileIndex], Complaints]] = {
    "opset": _opset,
    "name": _names,
    "operator": _operators,
    "half": _half,
    "uint8": _uint8,
    "zero point": _zero_points,
    "scale": _scales,
    "scale shape": _scale_shapes,
    "weights": _weights,
    "bias": _biases,
    "input": _inputs,
    "residual": _residuals,
    "concat": _concats,
    "pool": _pools,
    "table": _tables,
    "pad": _pads,
}
