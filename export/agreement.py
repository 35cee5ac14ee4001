"""What a runtime that rescales in float32 can reproduce code for code; graphs beyond it are refused. Equations: fixedpoint.md."""

import numpy as np

from edgeft.bounds import FLOAT32_EXACT, INT32_LIMIT, exact_in_float32, largest_code, shifted
from edgeft.errors import UnsupportedError
from edgeft.graph import Add, Conv, Flatten, GlobalPool, IntegerGraph, Linear, MaxPool, Mul, Op, op_inputs

Arithmetic = Conv | Linear | Add | Mul | GlobalPool
"""Ops that form an accumulator and round it; all others take codes as they are."""
_EXACT_BITS = 24
_MAX_EXPONENT = 126


def check_float_agreement(graph: IntegerGraph) -> None:
    """Raises UnsupportedError naming the first layer whose integers a float32 runtime could miss."""
    if graph.rounding != "half_even":
        raise UnsupportedError(f"rounding '{graph.rounding}': ONNX runtimes round half to even")
    for op in graph.ops:
        _check_exponents(graph, op)
        if graph.format(op.output).width > 8:
            _check_wide(graph, op)
        elif isinstance(op, Arithmetic):
            _check_shift(graph, op)


def accumulator_bound(graph: IntegerGraph, op: Arithmetic) -> int:
    """Largest |accumulator| that any input can produce (eq. 13), for every op that has one."""
    if isinstance(op, Conv | Linear | Add):
        return int(graph.bounds(op).max())
    if isinstance(op, GlobalPool):
        _, rows, columns = graph.tensors[op.input].shape
        return rows * columns * largest_code(graph.format(op.input))
    return largest_code(graph.format(op.left)) * largest_code(graph.format(op.right))


def _check_shift(graph: IntegerGraph, op: Arithmetic) -> None:
    """Eq. 14: an accumulator that float32 cannot hold must saturate anyway."""
    if isinstance(op, Add) and (wide := graph.wide_operand(op)) is not None:
        _check_wide_sum(graph, op, wide)
        return
    fmt, shift, bound = graph.format(op.output), int(graph.shift(op).max()), accumulator_bound(graph, op)
    if not exact_in_float32(np.asarray(bound), 0, shift, fmt):
        allowed = _EXACT_BITS - (fmt.width - int(fmt.signed))
        raise UnsupportedError(
            f"layer '{op.output}': shift {shift} is more than {allowed} and its accumulator may reach {bound}, "
            f"more than float32 holds exactly ({FLOAT32_EXACT})",
            f"lower the weight or input fraction of '{op.output}', or raise its output fraction '{fmt}'",
        )


def _check_wide_sum(graph: IntegerGraph, add: Add, wide: Conv) -> None:
    """Eq. 22: the same for the sum of accumulators and a skip, channel by channel in the finer of their two steps."""
    other = next(name for name in op_inputs(add) if name != wide.output)
    unused = np.minimum(-graph.shift(wide), max(0, graph.format(wide.output).frac - graph.format(other).frac))
    sums, others = shifted(graph.bounds(add), -unused), shifted(graph.operand_bounds(add, other), -unused)
    if not exact_in_float32(sums, others, graph.shift(add) - unused, graph.format(add.output)):
        raise UnsupportedError(
            f"layer '{add.output}': sums with the accumulators of '{wide.output}' may reach {int(sums.max())}, more than float32 holds "
            f"exactly ({FLOAT32_EXACT}), without saturating '{graph.format(add.output)}'",
            f"lower the weight fraction of '{wide.output}', or train with quant.residual=branch",
        )


def _check_wide(graph: IntegerGraph, op: Op) -> None:
    """Eq. 15: accumulators handed out as float32 must be exact. Only additions and what moves codes may read them."""
    if isinstance(op, Conv | Linear):
        left, bounds = -graph.shift(op), graph.bounds(op)
        if graph.format(op.output).width != 32 or int(left.min()) < 0 or int(shifted(bounds, left).max()) >= INT32_LIMIT or op.relu:
            raise UnsupportedError(f"layer '{op.output}': format '{graph.format(op.output)}' does not hold its accumulator as it is")
        added = bool(graph.consumers[op.output]) and all(isinstance(reader, Add) for reader in graph.consumers[op.output])
        if int(bounds.max()) > FLOAT32_EXACT and not added:
            raise UnsupportedError(
                f"layer '{op.output}': 32-bit accumulators up to {int(bounds.max())} are not exact in float32 ({FLOAT32_EXACT})"
            )
    for reader in graph.consumers[op.output]:
        if not isinstance(reader, MaxPool | Flatten | Add):
            raise UnsupportedError(f"layer '{reader.output}' reads '{op.output}', which is not 8-bit")


def _check_exponents(graph: IntegerGraph, op: Op) -> None:
    """Steps, also those of accumulators, must be normal float32 numbers."""
    fracs = [graph.format(name).frac for name in (*op_inputs(op), op.output)]
    if isinstance(op, Conv | Linear):
        fracs += [frac + graph.format(op.input).frac for frac in op.weight_frac]
    if isinstance(op, Mul):
        fracs.append(graph.format(op.left).frac + graph.format(op.right).frac)
    if max(abs(frac) for frac in fracs) > _MAX_EXPONENT:
        raise UnsupportedError(f"layer '{op.output}': a step of 2^{-max(fracs, key=abs)} is not a normal float32 number")
