"""Static placement of tensors in one arena: who lives when, where it lies, and how close that is to what any placement needs."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ALIGNMENT = 64
"""Every tensor starts at a multiple of this: a cache line, and the widest vector."""
ROUNDS = 300
"""Placements tried by swapping two tensors in the order, where the orders that are tried first miss the bound."""


def aligned(n_bytes: int) -> int:
    """Bytes with those that keep what comes next aligned."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Block:
    """Memory that is needed from step `first` to step `last`, both included."""

    name: str
    n_bytes: int
    first: int
    last: int

    def __post_init__(self) -> None:
        assert self.n_bytes > 0
        assert self.first <= self.last

    @property
    def size(self) -> int:
        """Bytes with those that keep the next block aligned."""
        return aligned(self.n_bytes)

    def meets(self, other: "Block") -> bool:
        """Whether both are needed at some step."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Placement:
    """Offsets of blocks by name, bytes of the arena, and the bytes that no placement of these blocks can go below."""

    offsets: dict[str, int]
    n_bytes: int
    lower_bound: int

    @property
    def over(self) -> float:
        """Part of the lower bound that the arena has beyond it."""
        return self.n_bytes / self.lower_bound - 1 if self.lower_bound else 0.0


def lower_bound(blocks: Iterable[Block]) -> int:
    """The most bytes that are needed at one step."""
    blocks = list(blocks)  # the most is needed at a step where some block begins
    return max((sum(other.size for other in blocks if other.first <= each.first <= other.last) for each in blocks), default=0)


def place(blocks: Sequence[Block]) -> Placement:
    """Offsets such that blocks which are needed at the same step do not overlap.

    Blocks are put one after the other into the smallest gap that holds them. Three orders of the blocks are tried, and, while the bound is
    missed, orders with two blocks swapped. The same blocks always give the same placement.
    """
    bound = lower_bound(blocks)
    orders = [
        sorted(blocks, key=lambda each: (-each.size, each.first)),
        sorted(blocks, key=lambda each: (each.first - each.last, -each.size)),
        sorted(blocks, key=lambda each: (each.first, -each.size)),
    ]
    order, offsets, best = min(((order, *_offsets(order)) for order in orders), key=lambda found: found[2])
    rng = random.Random(0)
    for _ in range(ROUNDS if len(blocks) > 1 else 0):
        if best == bound:
            break
        tried, (i, j) = list(order), rng.sample(range(len(order)), 2)
        tried[i], tried[j] = tried[j], tried[i]
        found, n_bytes = _offsets(tried)
        if n_bytes <= best:
            order, offsets, best = tried, found, n_bytes
    return Placement({each.name: offsets[each.name] for each in blocks}, best, bound)


def _offsets(order: Sequence[Block]) -> tuple[dict[str, int], int]:
    """Each block in the smallest gap between those placed before it that live at the same time; offsets and the end of the last one."""
    offsets: dict[str, int] = {}
    end = 0
    for index, block in enumerate(order):
        taken = sorted((offsets[other.name], offsets[other.name] + other.size) for other in order[:index] if other.meets(block))
        offsets[block.name] = _best_gap(taken, block.size)
        end = max(end, offsets[block.name] + block.size)
    return offsets, end


def _best_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """Start of the smallest gap of at least `size` bytes between intervals sorted by start; the end of all of them if there is none."""
    ends = [0]
    for _, end in taken:
        ends.append(max(ends[-1], end))
    gaps = [(start - end, end) for end, (start, _) in zip(ends, taken, strict=False) if start - end >= size]
    return min(gaps)[1] if gaps else ends[-1]
