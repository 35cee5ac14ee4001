"""A graph with unsigned activations as one with signed ones only, for runtimes whose 8-bit type is int8 (profile `s8`)."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeft.fixedpoint import FixedPointFormat, round_shift
from edgeft.graph import Conv, IntegerGraph, Linear, Lookup, Op, Tensor, op_inputs

CENTRED = "image_centred"
"""Name of the depthwise 1x1 layer that makes signed codes of image bytes where the first layer pads."""
_BYTE_OFFSET = 128
_HALF = 64, 7
"""Code and fraction of the weight 1/2."""


def is_signed(graph: IntegerGraph) -> bool:
    """Whether every tensor of a graph is signed."""
    return all(tensor.format.signed for tensor in graph.tensors.values())


def signed_graph(graph: IntegerGraph) -> IntegerGraph:
    """The same network in profile `s8`: unsigned tensors u8.f become s8.(f-1), which loses their last bit.

    Weights stay as they are; biases, tables and shifts follow the new steps. Image bytes (u8.8) become byte - 128 (s8.7): exactly, where
    the first layer does not pad, and rounded to 7 bits otherwise, because code 0 must remain byte 0 there. Not the same integers: who
    wants all 8 bits after a ReLU trains with profile `s8`.
    """
    return _Conversion(graph).result()


def _signed(fmt: FixedPointFormat) -> FixedPointFormat:
    return fmt if fmt.signed else FixedPointFormat(fmt.width, fmt.frac - 1, signed=True)


class _Conversion:
    """Op by op, in order, so that the format of an accumulator follows from that of its input."""

    def __init__(self, graph: IntegerGraph) -> None:
        self.old = graph
        self.constants: dict[str, NDArray[Any]] = dict(graph.constants)
        self.tensors: dict[str, Tensor] = {}
        self.ops: list[Op] = []
        self.image = graph.input
        self._keep(graph.input)

    def result(self) -> IntegerGraph:
        readers = self.old.consumers[self.old.input]
        raw = not self.old.format(self.old.input).signed
        folds = raw and all(isinstance(op, Conv) and not any(op.padding) for op in readers)
        if raw and not folds:
            self._centre()
        for op in self.old.ops:
            if folds and op in readers:
                assert isinstance(op, Conv)
                self._fold_offset(op)
            else:
                self._convert(op)
        old = self.old
        return IntegerGraph(self.tensors, tuple(self.ops), old.input, "s8", old.residual, old.rounding, self.constants)

    def _keep(self, name: str) -> None:
        tensor = self.old.tensors[name]
        self.tensors[name] = replace(tensor, format=_signed(tensor.format))

    def _centre(self) -> None:
        """round(byte / 2) from byte - 128, by eq. 5 with the weight 1/2."""
        image, channels = self.tensors[self.image], self.tensors[self.image].shape[0]
        code, frac = _HALF
        weight, bias = f"{CENTRED}.weight", f"{CENTRED}.bias"
        self.constants[weight] = np.full((channels, 1, 1, 1), code, np.int8)
        self.constants[bias] = np.full(channels, code * _BYTE_OFFSET, np.int32)
        self.ops.append(Conv(CENTRED, self.image, weight, bias, (frac,), (1, 1), (0, 0, 0, 0), (1, 1), channels, relu=False))
        self.tensors[CENTRED] = replace(image, name=CENTRED)
        self.image = CENTRED

    def _fold_offset(self, op: Conv) -> None:
        """w * byte = w * (byte - 128) + 128 * w, in the same accumulator steps: 2^-8 of a byte is 2^-7 with half the weight."""
        weight = self.constants[op.weight].astype(np.int64)
        self.constants[op.bias] = (self.constants[op.bias] + _BYTE_OFFSET * weight.sum((1, 2, 3))).astype(np.int32)
        self.ops.append(replace(op, weight_frac=tuple(frac + 1 for frac in op.weight_frac)))
        self._keep(op.output)

    def _convert(self, op: Op) -> None:
        fmt = self.old.format(op.output)
        if isinstance(op, Conv | Linear):
            source = self.old.format(op.input)
            lost = source.frac - _signed(source).frac
            self.constants[op.bias] = round_shift(self.constants[op.bias].astype(np.int64), np.array(lost)).astype(np.int32)
            fmt = _signed(fmt) if fmt.width == 8 else replace(fmt, frac=fmt.frac - lost)
        elif isinstance(op, Lookup):
            self.constants[op.table] = self._table(op)
            fmt = _signed(fmt)
        else:
            fmt = _signed(fmt) if fmt.width == 8 else self.tensors[op_inputs(op)[0]].format
        if self.image != self.old.input:
            op = _reading(op, self.old.input, self.image)
        self.ops.append(op)
        self.tensors[op.output] = replace(self.old.tensors[op.output], format=fmt)

    def _table(self, op: Lookup) -> NDArray[np.int16]:
        """Output codes at the signed codes -128 ... 127; those below 0 of what was unsigned cannot occur."""
        source, result = self.old.format(op.input), self.old.format(op.output)
        codes = np.arange(-128, 128) * (1 if source.signed else 2)
        found = self.old.constants[op.table].astype(np.int64)[codes.clip(min=source.min_code) - source.min_code]
        new = _signed(result)
        return np.asarray(round_shift(found, np.array(result.frac - new.frac)).clip(new.min_code, new.max_code), np.int16)


def _reading(op: Op, old: str, new: str) -> Op:
    """An op that reads `new` where it read `old`."""
    names = {"input": getattr(op, "input", None), "left": getattr(op, "left", None), "right": getattr(op, "right", None)}
    changed: dict[str, Any] = {field: new for field, name in names.items() if name == old}
    if hasattr(op, "inputs"):
        changed["inputs"] = tuple(new if name == old else name for name in op.inputs)
    return replace(op, **changed)
