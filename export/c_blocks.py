"""The C text of fused blocks: tables of stages and of calls, which kernels/src/fused.c goes through."""

from collections.abc import Sequence

from edgeft.export.c_bands import FusedBlock
from edgeft.export.c_memory import Memory, scratch_name
from edgeft.export.c_plan import Plan

FUSED = "fused"
"""The kernel that computes a block."""
CALLS_PER_LINE = 16


def block_name(last: str) -> str:
    """The name in C of the block whose last step has this name."""
    return f"{last}_block"


def block_text(plan: Plan, memory: Memory, block: FusedBlock, names: Sequence[str]) -> str:
    """The tables of a block; `names` are those of its steps' sizes."""
    name = block_name(names[-1])
    stages = "\n".join(_stage_text(plan, memory, block, k, name) for k, name in enumerate(names))
    bands = block.schedule.bands
    calls = [f"{{{band.stage}, {band.n}}}" for band in bands]
    lines = [", ".join(calls[start : start + CALLS_PER_LINE]) for start in range(0, len(calls), CALLS_PER_LINE)]
    table = ",\n".join(f"    {line}" for line in lines)
    scratch = memory.offsets[scratch_name(block.first)] if block.scratch else 0
    return (
        f"static const edgeft_stage {name}_stages[] = {{\n{stages}\n}};\n\n"
        f"static const edgeft_call {name}_calls[] = {{\n{table},\n}};\n\n"
        f"static const edgeft_fused_params {name} = {{{name}_stages, {name}_calls, {len(block.stages)}, {len(bands)}, {scratch}}};"
    )


def _stage_text(plan: Plan, memory: Memory, block: FusedBlock, k: int, name: str) -> str:
    stage, ring = block.stages[k], block.schedule.rings[k]
    step = plan.steps[stage.step]
    operands = ", ".join(_operand(memory, block, root) for root in stage.reads)
    fields = [
        f".run = edgeft_rows_of_{step.kernel}", f".params = &{name}",
        *(f".{each.name.rpartition('_')[2]} = {each.name}" for each in step.constants),
        f".n_operands = {len(stage.reads)}", f".operands = {{{operands}}}",
        f".rows = {stage.rows}", f".row_bytes = {stage.row_bytes}", f".room = {ring.room}", f".start = {ring.start}",
        f".offset = {memory.offsets[stage.writes]}",
    ]  # fmt: skip
    return "    {\n" + "".join(f"        {field},\n" for field in fields) + "    },"


def _operand(memory: Memory, block: FusedBlock, root: str) -> str:
    numbers = {stage.writes: k for k, stage in enumerate(block.stages)}
    if root in numbers:
        return f"{{EDGEFT_OF_STAGE, {numbers[root]}}}"
    return "{EDGEFT_OF_IMAGE, 0}" if memory.homes[root] == "image" else f"{{EDGEFT_OF_ARENA, {memory.offsets[root]}}}"
