"""What a runtime that rescales in float32 can reproduce code for code; graphs beyond it are refused. Equations: fixedpoint.md."""

from edgeft.errors import UnsupportedError
from edgeft.graph import FLOAT32_EXACT, INT32_LIMIT, Add, Conv, Flatten, GlobalPool, IntegerGraph, Linear, MaxPool, Mul, Op, op_inputs

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
    if isinstance(op, Conv | Linear):
        return graph.accumulator_bound(op)
    if isinstance(op, GlobalPool):
        _, rows, columns = graph.tensors[op.input].shape
        return rows * columns * _largest(graph, op.input)
    if isinstance(op, Mul):
        return _largest(graph, op.left) * _largest(graph, op.right)
    finer = max(graph.format(op.left).frac, graph.format(op.right).frac)
    return sum(_largest(graph, name) << (finer - graph.format(name).frac) for name in op_inputs(op))


def _largest(graph: IntegerGraph, name: str) -> int:
    return max(graph.format(name).max_code, -graph.format(name).min_code)


def _check_shift(graph: IntegerGraph, op: Arithmetic) -> None:
    """Eq. 14: an accumulator that float32 cannot hold must saturate anyway."""
    fmt, shift = graph.format(op.output), int(graph.shift(op).max())
    allowed = _EXACT_BITS - (fmt.width - int(fmt.signed))
    bound = accumulator_bound(graph, op)
    if shift > allowed and bound > FLOAT32_EXACT:
        raise UnsupportedError(
            f"layer '{op.output}': shift {shift} is more than {allowed} and its accumulator may reach {bound}, "
            f"more than float32 holds exactly ({FLOAT32_EXACT})",
            f"lower the weight or input fraction of '{op.output}', or raise its output fraction '{fmt}'",
        )


def _check_wide(graph: IntegerGraph, op: Op) -> None:
    """Eq. 15: accumulators handed out as float32 must be exact, and only handed out."""
    if isinstance(op, Conv | Linear):
        left, bound = -graph.shift(op), graph.accumulator_bound(op)
        if graph.format(op.output).width != 32 or int(left.min()) < 0 or bound << int(left.max()) >= INT32_LIMIT:
            raise UnsupportedError(f"layer '{op.output}': format '{graph.format(op.output)}' does not hold its accumulator as it is")
        if op.relu or bound > FLOAT32_EXACT:
            raise UnsupportedError(f"layer '{op.output}': 32-bit accumulators up to {bound} are not exact in float32 ({FLOAT32_EXACT})")
    for reader in graph.consumers[op.output]:
        if not isinstance(reader, MaxPool | Flatten):
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
