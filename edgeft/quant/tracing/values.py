"""What a node of the traced graph stands for: elements of a tensor of the plan in some order, and where they come from."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeft.quant.plan import Padding, Pair

ZERO = -1
"""Index of an element that is not in the source: a zero."""


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor as the traced code sees it, batch axis of 1 included: the elements `index` of the plan's tensor `name`.

    Views, slices, transpositions and padding only change `index` (flat element numbers, ZERO for padding); they cost nothing until a
    layer reads the value. Without an index the elements are those of the source in order.
    """

    name: str
    source: tuple[int, ...]
    shape: tuple[int, ...]
    index: Tensor | None = None

    @property
    def elements(self) -> Tensor:
        """The index, written out."""
        return self.index if self.index is not None else torch.arange(math.prod(self.source)).view(self.shape)

    @property
    def plain(self) -> bool:
        """Whether the elements are those of the source in order, in any shape."""
        return self.index is None or bool(
            self.index.numel() == math.prod(self.source) and torch.equal(self.index.flatten(), torch.arange(self.index.numel()))
        )

    @property
    def whole(self) -> bool:
        """Whether every element of the source is there exactly once."""
        if self.index is None:
            return True
        count = math.prod(self.source)
        return self.index.numel() == count and bool(torch.equal(self.index.flatten().sort().values, torch.arange(count)))

    def moved(self, index: Tensor) -> "Value":
        """The same source with its elements in another order."""
        return Value(self.name, self.source, tuple(index.shape), index)

    def of(self, name: str) -> "Value":
        """The same elements of another tensor of the same shape."""
        return Value(name, self.source, self.shape, self.index)

    def as_map(self) -> "Value":
        """A vector [1, c] as [1, c, 1, 1]; maps as they are."""
        if len(self.shape) == 2:
            return Value(self.name, self.source, (*self.shape, 1, 1), None if self.index is None else self.index[:, :, None, None])
        return self


@dataclass(frozen=True)
class Placement:
    """A map [c, h, w] as channels of another one, with a stride or enlarged, between zeros.

    Along each axis, pixel i is the source's i * stride // repeat, counted from the channel's first pixel. `channels`: source channel of
    each channel, ZERO for a channel of zeros; `offsets`: (row, column) of each channel's first pixel.
    """

    channels: tuple[int, ...]
    offsets: tuple[Pair, ...]
    stride: Pair
    repeat: Pair
    padding: Padding
    size: Pair
    """Height and width without the padding."""

    def picks_all(self, source: tuple[int, ...]) -> bool:
        """Whether the channels are those of the source in order."""
        return self.channels == tuple(range(source[0]))

    def keeps_pixels(self, source: tuple[int, ...]) -> bool:
        """Whether each channel, without its padding, is a whole channel of the source pixel by pixel."""
        return self.stride == self.repeat == (1, 1) and self.size == tuple(source[1:]) and set(self.offsets) <= {(0, 0)}

    def broadcasts(self, source: tuple[int, ...]) -> bool:
        """Whether the source has one pixel, which is repeated (or not) all over the map."""
        return tuple(source[1:]) == (1, 1) and self.repeat == self.size and not any(self.padding) and ZERO not in self.channels


def place(value: Value) -> Placement | None:
    """How a map's elements lie in its source; None when no stride, repetition and padding describes it."""
    if len(value.shape) != 4 or value.shape[0] != 1 or len(value.source) != 3:
        return None
    if value.index is None and value.shape[1:] == value.source:
        channels, height, width = value.source
        return Placement(tuple(range(channels)), ((0, 0),) * channels, (1, 1), (1, 1), (0, 0, 0, 0), (height, width))
    index = value.elements[0]
    used = index != ZERO
    channels_used, rows, columns = used.any(2).any(1), used.any(2).any(0), used.any(1).any(0)
    if not used.any() or not torch.equal(used, channels_used[:, None, None] & rows[:, None] & columns):
        return None
    top, bottom = _margins(rows)
    left, right = _margins(columns)
    inner = index[channels_used, top : index.shape[1] - bottom, left : index.shape[2] - right]
    _, height, width = value.source
    channel, row, column = inner // (height * width), inner % (height * width) // width, inner % width
    if (inner == ZERO).any() or (channel != channel[:, :1, :1]).any() or (row != row[:, :, :1]).any() or (column != column[:, :1]).any():
        return None
    vertical, horizontal = _progression(row[:, :, 0]), _progression(column[:, 0])
    if vertical is None or horizontal is None:
        return None
    numbers = torch.full((index.shape[0],), ZERO)
    numbers[channels_used] = channel[:, 0, 0]
    offsets = zip(row[:, 0, 0].tolist(), column[:, 0, 0].tolist(), strict=True)
    return Placement(
        tuple(numbers.tolist()), tuple(offsets), (vertical[0], horizontal[0]), (vertical[1], horizontal[1]),
        (top, left, bottom, right), (inner.shape[1], inner.shape[2]),
    )  # fmt: skip


def _margins(used: Tensor) -> Pair:
    where = used.nonzero().flatten()
    return int(where[0]), len(used) - 1 - int(where[-1])


def _progression(lines: Tensor) -> Pair | None:
    """(stride, repetitions) of the coordinates [c, n], which may start elsewhere in each channel; the smallest that fit."""
    n = lines.shape[1]
    relative = lines - lines[:, :1]
    if (relative != relative[:1]).any():
        return None
    steps, last = relative[0], int(relative[0, -1])
    for repeat in range(1, n + 1):
        stride = max(1, math.ceil(last * repeat / max(1, n - 1)))
        while (n - 1) * stride // repeat == last:
            if torch.equal(steps, torch.arange(n) * stride // repeat):
                return stride, repeat
            stride += 1
    return None
