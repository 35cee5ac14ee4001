"""Counting what saturates and what vanishes in the integers of a run, for sets that it has not seen: by the interpreter, slowly."""

from dataclasses import dataclass

import numpy as np

from edgeft.evaluation.saturating import Shares
from edgeft.fixedpoint import round_shift
from edgeft.graph import Add, Conv, IntegerGraph, Linear, Op
from edgeft.interpret import Codes, Interpreter
from edgeft.runner import Images


@dataclass
class _Counts:
    n: int = 0
    saturated: int = 0
    nonzero: int = 0
    vanished: int = 0


class _Counter(Interpreter):
    """An interpreter that looks at every sum before it is rounded and saturated."""

    def __init__(self, graph: IntegerGraph) -> None:
        super().__init__(graph)
        self.counts: dict[str, _Counts] = {}

    def rounded(self, op: Op, acc: Codes, shift: Codes) -> None:
        fmt, relu = self.graph.format(op.output), isinstance(op, Conv | Linear | Add) and op.relu
        acc = np.maximum(acc, 0) if relu else acc
        codes = round_shift(acc, np.clip(shift, -32, 32))
        counts = self.counts.setdefault(op.output, _Counts())
        counts.n += acc.size
        counts.saturated += int(np.count_nonzero(codes > fmt.max_code) + np.count_nonzero(codes < fmt.min_code))
        counts.nonzero += int(np.count_nonzero(acc))
        counts.vanished += int(np.count_nonzero((acc != 0) & (codes == 0)))


def count_shares(graph: IntegerGraph, images: Images) -> dict[str, Shares]:
    """Shares for image bytes [n, 3, h, w], by tensor; all that are rounded, which look-up tables are not."""
    counter = _Counter(graph)
    counter.logits(images)
    return {name: Shares(one.saturated / max(one.n, 1), one.vanished / max(one.nonzero, 1)) for name, one in counter.counts.items()}
