"""Layers that are computed in bands of rows: how large bands are, in which order they come, and which rows must be kept meanwhile.

The calls are simulated here, row by row as kernels/src/fused.c makes them, so that the memory of a fused block is known exactly.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd

from edgeft.bounds import INT32_LIMIT
from edgeft.export.c_packed import DEPTH, SLACK, Window
from edgeft.export.c_plan import Params, Plan, Step

PAIRED_CHANNELS = 32
"""Depthwise convolutions take 64 channels at a time; where at most so many are left, these of two rows (dwconv2d_packed.c)."""
BAND_PIXELS = 56
"""A call computes at least so many pixels where the map has them: weights are read from the second level of the cache once for each."""
MOST_STAGES = 64
"""EDGEFT_MOST_STAGES of edgeft_bands.h."""
MOST_ROWS = 2**16 - 1
"""Rows and stages are numbers of 16 bits in the table of calls."""
WINDOWS = ("conv2d_packed", "dwconv2d_packed", "max_pool")
ELEMENTWISE = ("add", "add_narrow", "lookup")
KERNELS = WINDOWS + ELEMENTWISE
"""Kernels that have an edgeft_rows_of_... in edgeft_bands.h."""


@dataclass(frozen=True)
class Stage:
    """A step that can be computed in bands: the tensors it reads and writes, and its map.

    Output row r reads the input's rows from r * stride - pad on, `reach` of them, that lie in 0 ... in_rows - 1. Windows find them in a
    ring by number; other stages read as many rows as they write, in one piece. Bands are multiples of `unit` rows; `cuts_pixels`: because
    the kernel takes several pixels for one of more channels, which a row may end within.
    """

    step: int
    reads: tuple[str, ...]
    writes: str
    rows: int
    columns: int
    row_bytes: int
    in_rows: int
    stride: int = 1
    pad: int = 0
    reach: int = 1
    unit: int = 1
    cuts_pixels: bool = False
    is_window: bool = False

    def needs(self, first: int, n: int) -> tuple[int, int]:
        """The first row of input that rows first ... first + n - 1 read, and the one behind the last."""
        start = first * self.stride - self.pad
        low = min(max(start, 0), self.in_rows)
        return low, max(low, min(start + (n - 1) * self.stride + self.reach, self.in_rows))

    def band(self, first: int, end: int, band_bytes: int) -> int:
        """Rows of the next call when rows first ... end - 1 are wanted: shares of about the same size, of at most about `band_bytes`."""
        most = max(band_bytes // self.row_bytes, -(-BAND_PIXELS // self.columns))
        share = -(-(end - first) // -(-(end - first) // most))
        return min(-(-share // self.unit) * self.unit, self.rows - first)


@dataclass(frozen=True)
class Band:
    """One call: rows first ... first + n - 1 of stage number `stage`."""

    stage: int
    first: int
    n: int


@dataclass(frozen=True)
class Ring:
    """Where the rows of a map are: row r at place (r + start) % room, or at place r if `room` is 0, for whole maps."""

    room: int
    start: int = 0

    def cuts(self, first: int, n: int) -> list[int]:
        """Rows at place 0, but for the first of those given."""
        return [row for row in range(first + 1, first + n) if (row + self.start) % self.room == 0] if self.room else []


@dataclass(frozen=True)
class Schedule:
    """The calls of a block in order, as if rows were in one piece, and the rows of each stage that there are at a time (0: all)."""

    stages: tuple[Stage, ...]
    order: tuple[Band, ...]
    room: tuple[int, ...]

    @cached_property
    def rings(self) -> tuple[Ring, ...]:
        """Where the rows of each stage are: so that the ends of rings cut few calls."""
        pieces = [[k, *(r for r in range(len(self.stages)) if k in self._whole(r))] for k in range(len(self.stages))]
        calls = [[band for band in self.order if band.stage in each] for each in pieces]
        return tuple(_ring(room, stage.unit, each) for room, stage, each in zip(self.room, self.stages, calls, strict=True))

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        """The calls in order, cut where a ring ends within what they write, or read in one piece."""
        rings = [[self.rings[j] for j in (k, *self._whole(k))] for k in range(len(self.stages))]
        return tuple(piece for band in self.order for piece in _pieces(band, rings[band.stage]))

    @property
    def longest(self) -> dict[int, int]:
        """The most rows that a call of each stage computes."""
        found: dict[int, int] = {}
        for band in self.order:
            found[band.stage] = max(found.get(band.stage, 0), band.n)
        return found

    def _whole(self, k: int) -> list[int]:
        """The stages of which stage k reads some rows in one piece."""
        return [j for j, stage in enumerate(self.stages) if stage.writes in self.stages[k].reads and not self.stages[k].is_window]


@dataclass(frozen=True)
class FusedBlock:
    """Neighbouring steps as one call. `kept` are the tensors of it that are whole maps; of the others only some rows exist at a time."""

    schedule: Schedule
    kept: frozenset[str]
    replaces: dict[str, str]
    """Maps that may be written over an operand from outside of the block."""
    scratch: int
    """Bytes that its kernels write besides: one call after the other, at the same place."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Its layers."""
        return self.schedule.stages

    @property
    def first(self) -> int:
        """Its first step."""
        return self.stages[0].step

    @property
    def last(self) -> int:
        """Its last step."""
        return self.stages[-1].step

    @property
    def lines(self) -> dict[str, int]:
        """Bytes of the buffer of each tensor that is no whole map."""
        rooms = zip(self.stages, self.schedule.room, strict=True)
        return {stage.writes: room * stage.row_bytes for stage, room in rooms if room}


def stage_of(plan: Plan, index: int) -> Stage | None:
    """Step number `index` as a stage; None where it cannot be computed in bands."""
    step = plan.steps[index]
    tensor = plan.stored[step.writes].tensor if step.kernel in KERNELS else None
    if tensor is None or len(tensor.shape) != 3:
        return None
    channels, rows, columns = tensor.shape
    reads, sizes = tuple(plan.root(name) for name in step.reads), _sizes(step)
    if rows > MOST_ROWS or len(set(reads)) < len(reads):
        return None
    stage = Stage(index, reads, plan.root(step.writes), rows, columns, channels * columns, rows)
    if sizes is None:
        return stage
    if _is_pixelwise(sizes):
        pixels = sizes["in_rows"] * sizes["in_columns"]  # the map may be cut into other rows, or into pixels of more channels
        unit = rows // gcd(pixels, rows)
        return replace(stage, unit=unit, cuts_pixels=unit > 1) if pixels * rows < INT32_LIMIT else None
    reach = (sizes["kernel_rows"] - 1) * sizes.get("dilation_rows", 1) + 1
    unit = 2 if step.kernel == "dwconv2d_packed" and 0 < channels % DEPTH <= PAIRED_CHANNELS else 1
    stage = replace(stage, unit=unit, is_window=True, in_rows=sizes["in_rows"])
    return replace(stage, stride=sizes["stride_rows"], pad=sizes["pad_top"], reach=reach)


def params_of(step: Step, most_rows: int) -> tuple[str, Params]:
    """Parameters of a stage's kernel: those of its step, but staging no more rows at a time than a call computes."""
    struct, params = step.params
    if struct != "conv2d_packed" or not params["staged_columns"] or _is_pixelwise(params["conv"]):
        return struct, params
    return struct, {**params, "band_rows": min(params["band_rows"], most_rows)}


def scratch_of(step: Step, rows: int, most_rows: int) -> int:
    """Bytes that the kernel writes besides, for at most `most_rows` of `rows` rows at a time."""
    if not step.scratch:
        return 0
    params = params_of(step, most_rows)[1]
    sizes: Params = params["conv"]
    if _is_pixelwise(sizes):
        pixels: int = most_rows * sizes["in_rows"] * sizes["in_columns"] // rows
        return pixels * int(sizes["in_channels"]) + SLACK
    return Window(sizes).staged_bytes(params["band_rows"]) + SLACK


def simulate(stages: Sequence[Stage], kept: Collection[str], band_bytes: int) -> Schedule:
    """The calls of a block whose outputs `kept` are whole maps: every row as late as possible, none twice.

    The last stage goes through its map; each stage computes what the next ones want of it, in calls of about `band_bytes`. All rows of
    every stage are computed.
    """
    number = {stage.writes: k for k, stage in enumerate(stages)}
    inside = [[number[name] for name in stage.reads if name in number] for stage in stages]
    readers: list[list[int]] = [[k for k, read in enumerate(inside) if j in read] for j in range(len(stages))]
    done, room = [0] * len(stages), [0] * len(stages)
    order = []

    def unread(k: int) -> int:
        """The first row of stage k that will still be read."""
        return min((stages[r].needs(done[r], 1)[0] for r in readers[k] if done[r] < stages[r].rows), default=done[k])

    def produce(k: int, end: int) -> None:
        stage = stages[k]
        while done[k] < end:
            first, n = done[k], stage.band(done[k], end, band_bytes)
            high = stage.needs(first, n)[1]
            for source in inside[k]:
                if done[source] < high:
                    produce(source, high)
            order.append(Band(k, first, n))
            room[k] = max(room[k], first + n - min(unread(k), first))
            done[k] += n

    for k in reversed(range(len(stages))):
        produce(k, stages[k].rows)
    room = [0 if stage.writes in kept else -(-n // stage.unit) * stage.unit for stage, n in zip(stages, room, strict=True)]
    return Schedule(tuple(stages), tuple(order), tuple(room))


def _ring(room: int, unit: int, bands: Sequence[Band]) -> Ring:
    """The ring of so many rows whose end lies within the fewest of some calls."""
    if room == 0:
        return Ring(0)
    edges = Counter(row % room for band in bands for row in range(band.first + 1, band.first + band.n))
    return Ring(room, min(range(0, room, unit), key=lambda start: edges[-start % room]))


def _pieces(band: Band, rings: Sequence[Ring]) -> list[Band]:
    """A band in as many calls as the ends of rings cut it into."""
    starts = sorted({band.first, *(row for ring in rings for row in ring.cuts(band.first, band.n))})
    ends = [*starts[1:], band.first + band.n]
    return [Band(band.stage, start, end - start) for start, end in zip(starts, ends, strict=True)]


def may_replace(schedule: Schedule, writer: int, operand: str) -> bool:
    """Whether an element-wise stage may write its map over an operand from outside: no row is read after it was written over."""
    written = 0
    for band in schedule.order:
        stage = schedule.stages[band.stage]
        if band.stage == writer:
            written = band.first + band.n
        elif operand in stage.reads and stage.needs(band.first, band.n)[0] < written:
            return False
    return True


def _sizes(step: Step) -> Params | None:
    """Sizes of a window; None for what works on single codes."""
    struct, params = step.params
    if step.kernel not in WINDOWS:
        return None
    sizes: Params = params["conv"] if struct == "conv2d_packed" else params
    return sizes


def _is_pixelwise(sizes: Params) -> bool:
    """As edgeft_is_pixelwise in edgeft_bands.h."""
    ones = ("kernel_rows", "kernel_columns", "stride_rows", "stride_columns")
    same = sizes["in_rows"] == sizes["out_rows"] and sizes["in_columns"] == sizes["out_columns"]
    return "groups" in sizes and all(sizes[name] == 1 for name in ones) and not sizes["pad_top"] and not sizes["pad_left"] and same
