"""Where every tensor of a plan lies: in the caller's image or logits, or in the arena, several at one place when their lives allow it."""

from dataclasses import dataclass
from typing import Literal

from edgeft.export.c_arena import Block, Placement, place
from edgeft.export.c_plan import LOGITS, Plan

Home = Literal["image", "logits", "arena"]


@dataclass(frozen=True)
class Memory:
    """The home of every tensor, its offset in the arena and that of the scratch of steps, and the placement of the arena's blocks."""

    homes: dict[str, Home]
    offsets: dict[str, int]
    placement: Placement
    in_place: tuple[str, ...]
    """Tensors that are written over an operand."""


def lay_out(plan: Plan) -> Memory:
    """Place all tensors: views with what they show, results over operands that nothing reads any more, the rest in the arena."""
    homes = _homes(plan)
    blocks, owners = _blocks(plan, homes)
    placement = place([*blocks.values(), *_scratch(plan)])
    offsets = {name: placement.offsets[owners[plan.root(name)]] for name, home in homes.items() if home == "arena"}
    offsets |= {block.name: placement.offsets[block.name] for block in _scratch(plan)}
    in_place = tuple(name for name, owner in owners.items() if name != owner)
    return Memory(homes, offsets, placement, in_place)


def scratch_name(index: int) -> str:
    """The block that holds what step `index` writes besides its tensor."""
    return f"scratch of step {index}"


def _scratch(plan: Plan) -> list[Block]:
    return [Block(scratch_name(index), step.scratch, index, index) for index, step in enumerate(plan.steps) if step.scratch]


def _homes(plan: Plan) -> dict[str, Home]:
    written = {step.writes for step in plan.steps}
    output = plan.root(plan.graph.output)

    def home(root: str) -> Home:
        if root not in written:
            return "image"
        return "logits" if root == output and LOGITS not in written else "arena"

    return {name: home(plan.root(name)) for name in plan.stored}


def _blocks(plan: Plan, homes: dict[str, Home]) -> tuple[dict[str, Block], dict[str, str]]:
    """The arena's blocks by the tensor that is written there first, and that tensor for each other one."""
    last = {plan.root(name): index for index, step in enumerate(plan.steps) for name in step.reads if name in plan.stored}
    blocks: dict[str, Block] = {}
    owners: dict[str, str] = {}
    for index, step in enumerate(plan.steps):
        root, n_bytes = plan.root(step.writes), plan.stored[step.writes].n_bytes if step.writes != LOGITS else 0
        if root in owners or homes.get(root) != "arena":
            if root in owners:  # one more input of a concatenation
                _extend(blocks, owners[root], index)
            continue
        end = max(index, last.get(root, index))
        over = next((owner for name in step.in_place if (owner := _dying(plan, owners, blocks, name, index, n_bytes)) is not None), None)
        owners[root] = over or root
        if over is None:
            blocks[root] = Block(root, n_bytes, index, end)
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
