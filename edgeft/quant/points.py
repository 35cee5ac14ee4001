"""Where a plan needs activation formats, which tensors hold the same codes, and which of them may be unsigned."""

from collections.abc import Iterator

from edgeft.quant.formats import CLIP_FRAC, Groups, Point, activation_format
from edgeft.quant.plan import IMAGE, MOVES, AddStep, ConcatStep, ConvStep, GlobalPoolStep, MulStep, Plan, Step, TableStep
from edgeft.quant.tables import FUNCTIONS


def has_quantizer(step: Step) -> bool:
    """Whether a step computes new 8-bit codes: it does not only move some, and does not hand on its accumulators."""
    return not isinstance(step, MOVES) and not is_wide(step)


def is_wide(step: Step) -> bool:
    """Whether a step hands its accumulators to an addition."""
    return isinstance(step, ConvStep) and step.wide


class Storage:
    """Which tensors of a plan share one format because steps only move codes between them."""

    def __init__(self, plan: Plan, profile: str) -> None:
        self.plan = plan
        self.profile = profile
        self._classes = Groups.of(plan.steps, *MOVES)
        self._sources: dict[str, tuple[str, ...]] = {IMAGE: (IMAGE,)}
        nonnegative = {IMAGE: not plan.signed_image}
        for step in plan.steps:
            moved = dict.fromkeys(source for name in step.inputs for source in self._sources[name])
            self._sources[step.name] = tuple(moved) if isinstance(step, MOVES) else (step.name,)
            nonnegative[step.name] = _nonnegative(step, [nonnegative[name] for name in step.inputs])
        self._signed = {self._classes.find(name) for name, never in nonnegative.items() if not never}

    def sources(self, name: str) -> tuple[str, ...]:
        """The tensors whose codes `name` holds: itself, or those that steps which only move codes have read."""
        return self._sources[name]

    def shared(self, name: str) -> str:
        """Representative of all tensors that have the same format as `name`."""
        return self._classes.find(name)

    def unsigned(self, name: str) -> bool:
        """Whether no tensor that shares the format of `name` can be negative."""
        return self.shared(name) not in self._signed


def _nonnegative(step: Step, inputs: list[bool]) -> bool:
    if isinstance(step, TableStep):
        return FUNCTIONS[step.function].nonnegative
    if isinstance(step, (AddStep, GlobalPoolStep, MulStep, *MOVES)) or _keeps_signs(step):
        return step.relu or all(inputs)
    return step.relu


def _keeps_signs(step: Step) -> bool:
    """Whether constants, an averaging window's say, make nothing negative of what is not."""
    return isinstance(step, ConvStep) and step.fixed and bool((step.weight >= 0).all() and (step.bias >= 0).all())


def find_points(storage: Storage) -> Iterator[Point]:
    """The activations of a plan whose formats are to be chosen."""
    plan, profile = storage.plan, storage.profile
    groups = Groups.of(plan.steps, AddStep, *MOVES)
    in_additions = {groups.find(step.name) for step in plan.steps if isinstance(step, AddStep)}
    numbers = {root: i for i, root in enumerate(sorted(in_additions))}
    for step in plan.steps:
        if not has_quantizer(step) or step.name == plan.output:
            continue
        readers = [reader for name in _aliases(plan, step.name) for reader in plan.consumers(name) if not isinstance(reader, MOVES)]
        fmt = activation_format(profile, relu=storage.unsigned(step.name), frac=0)
        yield Point(
            step.name, fmt, step.relu, CLIP_FRAC[profile] if step.clip is not None else None, storage.shared(step.name),
            numbers.get(groups.find(step.name)), isinstance(step, AddStep) or len(readers) > 1,
        )  # fmt: skip


def _aliases(plan: Plan, name: str) -> list[str]:
    """The tensor and everything that only moves its codes around."""
    moved = [step.name for step in plan.consumers(name) if isinstance(step, MOVES)]
    return [name, *(alias for child in moved for alias in _aliases(plan, child))]


def separate(plan: Plan, profile: str) -> None:
    """Give concatenated tensors formats of their own where they cannot share one: a change of format goes in between.

    That is so for the image, whose format is given, and for tensors with a clip, whose top code must mean the clip, beside tensors
    without one or signed ones. The plan must have been rescaled.
    """
    for concat in [step for step in plan.steps if isinstance(step, ConcatStep)]:
        storage = Storage(plan, profile)
        members = storage.sources(concat.name)
        clips = {name: step.clip if (step := plan.producer(name)) is not None else None for name in members}
        same = storage.unsigned(concat.name) or profile == "s8"
        fits = same and (None not in clips.values() or not any(clips.values()))
        for position, name in enumerate(concat.inputs):
            sources = storage.sources(name)
            if IMAGE in sources or (not fits and any(clips[source] is not None for source in sources)):
                plan.insert_identity(concat, position)
