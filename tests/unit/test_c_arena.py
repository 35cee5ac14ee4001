"""Placement of tensors in the arena of a C bundle."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeft.export.c_arena import ALIGNMENT, Block, Placement, lower_bound, place
from edgeft.export.c_memory import lay_out
from edgeft.export.c_plan import LOGITS, Plan, plan
from edgeft.graph import IntegerGraph
from tests.exports import every_op, plain_net, wide_net
from tests.graphs import mobilenet_v2, residual_net, resnet18

LIVES = st.tuples(st.integers(1, 5000), st.integers(0, 20), st.integers(0, 6)).map(lambda each: (each[0], each[1], each[1] + each[2]))


def overlapping(blocks: list[Block], found: Placement) -> list[tuple[str, str]]:
    """Pairs of blocks that are needed at one step and share a byte."""
    ends = {each.name: found.offsets[each.name] + each.n_bytes for each in blocks}
    return [
        (a.name, b.name)
        for i, a in enumerate(blocks)
        for b in blocks[:i]
        if a.first <= b.last and b.first <= a.last and found.offsets[a.name] < ends[b.name] and found.offsets[b.name] < ends[a.name]
    ]


@settings(deadline=None)
@given(lives=st.lists(LIVES, max_size=20))
def test_no_two_live_tensors_overlap(lives: list[tuple[int, int, int]]) -> None:
    blocks = [Block(str(index), *life) for index, life in enumerate(lives)]
    found = place(blocks)
    assert overlapping(blocks, found) == []
    assert all(offset % ALIGNMENT == 0 for offset in found.offsets.values())
    assert found.n_bytes == max((found.offsets[each.name] + each.size for each in blocks), default=0)
    assert found.n_bytes >= found.lower_bound == lower_bound(blocks)
    assert found == place(blocks), "the same blocks give the same placement"


def test_a_chain_needs_its_largest_pair() -> None:
    found = place([Block("a", 640, 0, 1), Block("b", 64, 1, 2), Block("c", 1280, 2, 3), Block("d", 1, 3, 3)])
    assert (found.n_bytes, found.lower_bound) == (1344, 1344)
    assert found.over == 0


def test_the_smallest_gap_is_taken() -> None:
    """x fits between a and c and exactly between c and e."""
    lives = [("a", 64, 0, 9), ("b", 192, 0, 1), ("c", 64, 0, 9), ("d", 128, 0, 1), ("e", 64, 0, 9), ("x", 128, 2, 9)]
    found = place([Block(*each) for each in lives])
    assert (found.n_bytes, found.over) == (512, 0)


def test_nothing_needs_nothing() -> None:
    assert place([]) == Placement({}, 0, 0)
    assert place([]).over == 0


NETS = {
    "residual": lambda: residual_net(0),
    "plain": lambda: plain_net(0),
    "every op": lambda: every_op(0),
    "wide": lambda: wide_net(0),
    "mobilenet_v2": lambda: mobilenet_v2(0, 64, 10),
    "resnet18": lambda: resnet18(0, 64, 10),
}


def last_reads(planned: Plan) -> dict[str, int]:
    """The last step at which the bytes of a tensor are read."""
    return {planned.root(name): index for index, step in enumerate(planned.steps) for name in step.reads if name in planned.stored}


def clashes(graph: IntegerGraph) -> list[str]:
    """Steps that write over bytes which a later step, or this one unless it may, still reads. Follows the calls one by one."""
    planned = plan(graph)
    memory, last = lay_out(planned), last_reads(planned)
    holders: dict[int, str] = {}  # the tensor whose codes a byte of the arena holds
    wrong = []
    for index, step in enumerate(planned.steps):
        wanted = [name for name in step.reads if memory.homes.get(name) == "arena"]
        for name in wanted:
            places = range(memory.offsets[name], memory.offsets[name] + planned.stored[name].n_bytes)
            wrong += [f"{step.layer} reads {name}"] * any(holders.get(byte) != planned.root(name) for byte in places)
        if step.writes == LOGITS or memory.homes[step.writes] != "arena":
            continue
        start = memory.offsets[step.writes]
        for byte in range(start, start + planned.stored[step.writes].n_bytes):
            held = holders.get(byte)
            busy = held is not None and held != planned.root(step.writes) and last.get(held, -1) >= index
            if busy and not (last[held or ""] == index and any(planned.root(name) == held for name in step.in_place)):
                wrong.append(f"{step.layer} writes over {held}")
            holders[byte] = planned.root(step.writes)
    return wrong


@pytest.mark.parametrize("name", NETS)
def test_arenas_are_within_a_tenth_of_the_bound_and_nothing_is_written_over(name: str) -> None:
    graph = NETS[name]()
    found = lay_out(plan(graph)).placement
    assert found.lower_bound <= found.n_bytes <= 1.1 * found.lower_bound
    assert clashes(graph) == []


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_arenas_at_224_pixels_are_what_any_placement_needs(name: str) -> None:
    graph = {"mobilenet_v2": mobilenet_v2, "resnet18": resnet18}[name](0, 224)
    found = lay_out(plan(graph)).placement
    assert (found.n_bytes, found.over) == ({"mobilenet_v2": 1_505_280, "resnet18": 1_003_520}[name], 0)
