"""Which layers of a plan are fused: computed together in bands of rows, so that the maps between them never exist as a whole.

Blocks are runs of neighbouring steps. Of all ways to cut a plan into blocks and single steps, first the least memory that any of them needs
is found; then, of those that need little more, the one with the fewest calls is taken: nothing is fused where nothing is gained.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from edgeft.export.c_arena import aligned
from edgeft.export.c_bands import FusedBlock, may_replace, scratch_of, simulate, stage_of
from edgeft.export.c_memory import homes
from edgeft.export.c_plan import LOGITS, Plan

LONGEST = 32
"""Steps in a block: the rows of all layers exist at once, so that longer blocks need more than they save. At most EDGEFT_MOST_STAGES."""
BAND_BYTES = (8 * 1024, 16 * 1024, 32 * 1024)
"""What a call of a fused layer may write, one row at least: little makes small buffers, much makes few calls."""
SLACK = 8
"""One part in so many of the least memory is given for fewer calls."""
_NEVER = 2**62


def fuse(plan: Plan) -> tuple[FusedBlock, ...]:
    """The blocks of a plan in order; none where no layer needs less memory together with others than alone."""
    search = Search(plan)
    least = _least(search)
    return _fewest_calls(search, least + least // SLACK)


def _least(search: "Search") -> int:
    """The memory that a plan needs when it is cut in the best way."""
    least = [0]  # for the first steps
    for last in range(search.n_steps):
        found = max(least[last], search.alone(last))
        for first in search.starts(last):
            if max(least[first], search.at_least(first, last)) < found:
                found = min(found, *(max(least[first], search.need(block)) for block in search.blocks(first, last, BAND_BYTES[:1])))
        least.append(found)
    return least[-1]


def _fewest_calls(search: "Search", most: int) -> tuple[FusedBlock, ...]:
    """The blocks that make the fewest calls of all that need at most so much memory."""
    best: list[tuple[int, tuple[FusedBlock, ...]]] = [(0, ())]  # for the first steps
    for last in range(search.n_steps):
        choices = [best[last]] if search.alone(last) <= most else []
        for first in search.starts(last):
            calls, before = best[first]
            if calls < _NEVER and search.at_least(first, last) <= most:
                fitting = [block for block in search.blocks(first, last, BAND_BYTES) if search.need(block) <= most]
                choices += [(calls + len(block.schedule.order), (*before, block)) for block in fitting]
        best.append(min(choices, key=lambda choice: choice[0], default=(_NEVER, ())))
    return best[-1][1]


@dataclass(frozen=True)
class _Life:
    """The steps from the first that writes a map in the arena to the last that needs it, and its bytes."""

    first: int
    last: int
    size: int


class Search:
    """The blocks that steps of a plan can be, and what they and single steps need. Every block is made once."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.n_steps = len(plan.steps)
        self._lives = _lives(plan)
        self._stages = [stage_of(plan, index) for index in range(len(plan.steps))]
        self._blocks: dict[tuple[int, int, int], FusedBlock | None] = {}
        order = {op.output: index for index, op in enumerate(plan.graph.ops)}
        self._op = [order.get(step.layer, -1) for step in plan.steps]
        self._viewed = {plan.root(name) for name in plan.views}

    def starts(self, last: int) -> list[int]:
        """First steps of blocks that end with step `last`."""
        found = []
        for first in range(last, max(-1, last - LONGEST), -1):
            if self._stages[first] is None or (first < last and self._op[first] + 1 != self._op[first + 1]):
                break
            found.append(first)
        return found[1:]

    def alone(self, index: int) -> int:
        """Memory during a step that is not fused."""
        step = self._plan.steps[index]
        root = self._plan.root(step.writes) if step.writes != LOGITS else ""
        life = self._lives.get(root)
        own = life.size if life and life.first == index else 0
        dying = {name: each for name in step.in_place if (each := self._lives.get(self._plan.root(name))) and each.last == index}
        replaced = any(each.size == own and each.first < index for each in dying.values())
        return self._others(index, index) + (0 if replaced else own) + aligned(step.scratch or 0)

    def at_least(self, first: int, last: int) -> int:
        """Memory that a block of these steps needs in any case: one row of each map between them, or as many as a window reads."""
        stages = [stage for stage in self._stages[first : last + 1] if stage is not None]
        reach = {name: stage.reach for stage in stages for name in stage.reads}
        rows = sum(stage.row_bytes * min(reach.get(stage.writes, 1), stage.rows) for stage in stages if self._ends(stage.writes, last))
        return self._others(first, last) + rows

    def need(self, block: FusedBlock) -> int:
        """Memory during a block."""
        maps = sum(self._lives[name].size for name in block.kept if name in self._lives and name not in block.replaces)
        return self._others(block.first, block.last) + maps + sum(map(aligned, block.lines.values())) + aligned(block.scratch)

    def blocks(self, first: int, last: int, sizes: Sequence[int]) -> list[FusedBlock]:
        """These steps as blocks, for each size of bands; none where they cannot be one."""
        for n_bytes in sizes:
            if (first, last, n_bytes) not in self._blocks:
                self._blocks[first, last, n_bytes] = self._block(first, last, n_bytes)
        return [block for n_bytes in sizes if (block := self._blocks[first, last, n_bytes])]

    def _block(self, first: int, last: int, band_bytes: int) -> FusedBlock | None:
        stages = [stage for stage in self._stages[first : last + 1] if stage is not None]
        written = {stage.writes for stage in stages}
        if any(stage.cuts_pixels and written & set(stage.reads) for stage in stages):
            return None
        kept = frozenset(name for name in written if not self._ends(name, last))
        found = simulate(stages, kept, band_bytes)
        replaces: dict[str, str] = {}
        for k, stage in enumerate(stages):
            for name in self._plan.steps[stage.step].in_place if stage.writes in kept else ():
                root = self._plan.root(name)
                life = self._lives.get(root)
                dies = life is not None and life.first < first and life.last <= last and life.size == self._lives[stage.writes].size
                if dies and root not in replaces.values() and may_replace(found, k, root):
                    replaces[stage.writes] = root
                    break
        longest = found.longest
        scratch = max(scratch_of(self._plan.steps[each.step], each.rows, longest[k]) for k, each in enumerate(stages))
        return FusedBlock(found, kept, replaces, scratch)

    def _ends(self, name: str, last: int) -> bool:
        """Whether nothing needs a map behind step `last`."""
        return self._lives[name].last <= last and name not in self._viewed

    def _others(self, first: int, last: int) -> int:
        """Maps from before that these steps or later ones need."""
        return sum(life.size for life in self._lives.values() if life.first < first <= life.last)


def _lives(plan: Plan) -> dict[str, _Life]:
    at = homes(plan)
    found: dict[str, _Life] = {}
    for index, step in enumerate(plan.steps):
        for name in (*step.reads, step.writes):
            root = plan.root(name) if name in plan.stored else name
            if at.get(root) == "arena":
                first = found[root].first if root in found else index
                found[root] = _Life(first, index, aligned(plan.stored[root].n_bytes))
    return found
