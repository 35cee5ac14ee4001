"""Where every tensor of a plan lies: in the caller's image or logits, or in the arena, several at one place when their lives allow it."""

from dataclasses import dataclass
from typing import Literal

from edgeft.export.c_arena import Block, Placement, place
from edgeft.export.c_bands import FusedBlock
from edgeft.export.c_plan import LOGITS, Plan

Home = Literal["image", "logits", "arena", "rows"]
"""`rows`: a buffer in the arena that holds some rows of the map at a time."""


@dataclass(frozen=True)
class Memory:
    """The home of every tensor, its offset in the arena and that of the scratch of steps, and the placement of the arena's blocks."""

    homes: dict[str, Home]
    offsets: dict[str, int]
    placement: Placement
    in_place: tuple[str, ...]
    """Tensors that are written over an operand."""
    fused: tuple[FusedBlock, ...] = ()

    def block_of(self, index: int) -> FusedBlock | None:
        """The fused block that step `index` is a part of."""
        return next((block for block in self.fused if block.first <= index <= block.last), None)


def lay_out(plan: Plan, fused: tuple[FusedBlock, ...] = ()) -> Memory:
    """Place all tensors: views with what they show, results over operands that nothing reads any more, the rest in the arena.

    Within a fused block everything is needed from its first step to its last.
    """
    places = homes(plan)
    for block in fused:
        places |= dict.fromkeys(block.lines, "rows")
    times = {index: (block.first, block.last) for block in fused for index in range(block.first, block.last + 1)}
    spans = [times.get(index, (index, index)) for index in range(len(plan.steps))]
    blocks, owners = _blocks(plan, places, spans, {name: over for block in fused for name, over in block.replaces.items()})
    lines = [Block(name, n_bytes, block.first, block.last) for block in fused for name, n_bytes in block.lines.items()]
    scratch = _scratch(plan, fused)
    placement = place([*blocks.values(), *lines, *scratch])
    offsets = {name: placement.offsets[owners[plan.root(name)]] for name, home in places.items() if home == "arena"}
    offsets |= {block.name: placement.offsets[block.name] for block in (*lines, *scratch)}
    in_place = tuple(name for name, owner in owners.items() if name != owner)
    return Memory(places, offsets, placement, in_place, fused)


def scratch_name(index: int) -> str:
    """The block that holds what step `index`, or the fused block that begins with it, writes besides its tensors."""
    return f"scratch of step {index}"


def _scratch(plan: Plan, fused: tuple[FusedBlock, ...]) -> list[Block]:
    inside = {index for block in fused for index in range(block.first, block.last + 1)}
    alone = [(index, index, step.scratch) for index, step in enumerate(plan.steps) if step.scratch and index not in inside]
    together = [(block.first, block.last, block.scratch) for block in fused if block.scratch]
    return [Block(scratch_name(first), n_bytes, first, last) for first, last, n_bytes in (*alone, *together)]


def homes(plan: Plan) -> dict[str, Home]:
    """Where tensors are if no step is fused."""
    written = {step.writes for step in plan.steps}
    output = plan.root(plan.graph.output)

    def home(root: str) -> Home:
        if root not in written:
            return "image"
        return "logits" if root == output and LOGITS not in written else "arena"

    return {name: home(plan.root(name)) for name in plan.stored}


def _blocks(
    plan: Plan, places: dict[str, Home], spans: list[tuple[int, int]], replaces: dict[str, str]
) -> tuple[dict[str, Block], dict[str, str]]:
    """The arena's blocks by the tensor that is written there first, and that tensor for each other one.

    `spans`: for each step, the first and the last step of what is computed with it; `replaces`: maps of fused blocks and the operands that
    they may be written over.
    """
    last = {plan.root(name): spans[index][1] for index, step in enumerate(plan.steps) for name in step.reads if name in plan.stored}
    blocks: dict[str, Block] = {}
    owners: dict[str, str] = {}
    for index, step in enumerate(plan.steps):
        (start, stop), root = spans[index], plan.root(step.writes)
        n_bytes = plan.stored[step.writes].n_bytes if step.writes != LOGITS else 0
        if root in owners or places.get(root) != "arena":
            if root in owners:  # one more input of a concatenation
                _extend(blocks, owners[root], stop)
            continue
        end = max(stop, last.get(root, stop))
        operands = step.in_place if start == stop else [replaces[root]] if root in replaces else []
        over = next((owner for name in operands if (owner := _dying(plan, owners, blocks, name, stop, n_bytes)) is not None), None)
        owners[root] = over or root
        if over is None:
            blocks[root] = Block(root, n_bytes, start, end)
        else:
            _extend(blocks, over, end)
    return blocks, owners


def _dying(plan: Plan, owners: dict[str, str], blocks: dict[str, Block], name: str, index: int, n_bytes: int) -> str | None:
    """The block of an operand, if it has the result's size and nothing reads it after this step."""
    owner = owners.get(plan.root(name))
    return owner if owner is not None and blocks[owner].last == index and blocks[owner].n_bytes == n_bytes else None


def _extend(blocks: dict[str, Block], owner: str, last: int) -> None:
    block = blocks[owner]
    blocks[owner] = Block(owner, block.n_bytes, block.first, max(block.last, last))
