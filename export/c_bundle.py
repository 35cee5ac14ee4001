"""Target "c": a folder of freestanding C99 that classifies images, with its kernels, weights, golden samples, Makefile and CMakeLists.txt.

What a kernel computes and how tensors lie in memory is written in kernels/include/edgeft_kernels.h. See README.md beside this file.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeft.artifact import Artifact, atomic_write, json_bytes
from edgeft.errors import MissingExtraError
from edgeft.export import ExportResult, Runtime
from edgeft.export.c_arena import ALIGNMENT
from edgeft.export.c_bands import FusedBlock
from edgeft.export.c_fusion import fuse
from edgeft.export.c_memory import Memory, lay_out
from edgeft.export.c_plan import LOGITS, Plan, plan
from edgeft.export.c_runner import DESCRIPTION, CRunner
from edgeft.export.c_source import bundle_files, sources
from edgeft.export.verify import golden, verify_samples
from edgeft.graph import IntegerGraph
from edgeft.interpret import image_offset
from edgeft.runner import Images

NAME = "c"
MOST_GOLDEN, MOST_GOLDEN_BYTES = 8, 2**19
"""Golden images in a bundle: they are compiled in, and must fit into the flash of a small device beside the weights."""


class CTarget:
    """Target "c": the bundle in `<out>`, equal to the interpreter on every golden sample where a compiler is at hand."""

    def export(self, artifact: Artifact, out: Path) -> ExportResult:
        """Plan, write, build, verify. Without a compiler the bundle is written and the result says that it was not built.

        Raises UnsupportedError naming a layer without a kernel, and VerificationError.
        """
        graph, samples = artifact.graph(), artifact.samples()
        summary = write_bundle(graph, samples["images"], out, f"Network of the edgeft artifact {artifact.digest}")
        try:
            runner = self.load(out)
        except MissingExtraError as error:
            lines = _lines(summary, out, error)
            return ExportResult(NAME, out, graph, {**summary, "not_built": error.message}, lines, not_run=error.message)
        summary |= {"verified_images": verify_samples(graph, runner, samples), "verified_in": runner.runtime}
        return ExportResult(NAME, out, graph, summary, _lines(summary, out))

    def load(self, out: Path, threads: int | None = None) -> CRunner:
        """Build the bundle for this machine and load it; it runs on one thread.

        Raises MissingExtraError naming what to install when there is no C compiler.
        """
        return CRunner(out)

    def runtimes(self, out: Path) -> list[Runtime]:
        """The bundle, built here."""
        return [self.load(out)]


TARGET = CTarget()
Fusion = Callable[[Plan], tuple[FusedBlock, ...]]


def write_bundle(
    graph: IntegerGraph, images: Images, out: Path, title: str = "", *, fusion: Fusion = fuse, fast: bool = True
) -> dict[str, Any]:
    """Write a graph as a bundle that replays some of the images; what was written, for the report.

    `fusion` decides which layers are fused; without `fast` only simple kernels are called, to compare with.

    Raises UnsupportedError naming the layer that no kernel computes.
    """
    planned = plan(graph, fast=fast)
    memory = lay_out(planned, fusion(planned))
    shown = images[: max(1, min(MOST_GOLDEN, MOST_GOLDEN_BYTES // images[0].size))]
    texts = bundle_files(planned, memory, shown, golden(graph, shown)[f"layer:{graph.output}"], title or "A network of edgeft")
    (out / "kernels").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        atomic_write(out / name, text.encode())
    about = describe(planned, memory, lay_out(planned) if memory.fused else memory)
    atomic_write(out / DESCRIPTION, json_bytes(about))
    _remove_products(out, about["sources"])
    kept = ("arena_bytes", "arena_lower_bound", "arena_unfused", "fused", "constant_bytes", "kernels", "in_place")
    return {"golden_images": len(shown), "tensors": len(graph.tensors), **{key: about[key] for key in kept}}


def describe(planned: Plan, memory: Memory, unfused: Memory) -> dict[str, Any]:
    """What bundle.json says: every tensor and where it lies, the sources, how many layers each kernel computes, what is fused, and memory.

    `unfused`: where everything would be without fused blocks.
    """
    graph = planned.graph
    tensors = []
    for name in (graph.input, *(op.output for op in graph.ops)):
        stored = planned.stored[name]
        tensors.append({
            "name": name, "shape": stored.tensor.shape, "format": str(stored.tensor.format), "storage": stored.storage,
            "map_shape": stored.map_shape, "place": memory.homes[name], "offset": memory.offsets.get(name, 0),
        })  # fmt: skip
    return {
        "image_offset": image_offset(graph), "tensors": tensors, "sources": sources(planned, memory),
        "arena_bytes": memory.placement.n_bytes, "arena_lower_bound": memory.placement.lower_bound, "arena_alignment": ALIGNMENT,
        "arena_unfused": {"bytes": unfused.placement.n_bytes, "lower_bound": unfused.placement.lower_bound},
        "fused": [[stage.writes for stage in block.stages] for block in memory.fused],
        "in_place": len(memory.in_place), "constant_bytes": sum(each.n_bytes for each in planned.constants),
        "kernels": dict(sorted(Counter(step.kernel for step in planned.steps if step.writes != LOGITS).items())),
    }  # fmt: skip


def _remove_products(out: Path, names: list[str]) -> None:
    """What the Makefile made of an earlier bundle in the same folder: it would be taken for a part of this one."""
    for name in (*(str(Path(each).with_suffix(".o")) for each in names), "main.o", "libmodel.a", "replay"):
        (out / name).unlink(missing_ok=True)


def _lines(summary: dict[str, Any], out: Path, missing: MissingExtraError | None = None) -> tuple[str, ...]:
    arena, bound = summary["arena_bytes"], summary["arena_lower_bound"]
    over = f"{100 * (arena / bound - 1):.0f} % over the least" if bound else "none needed"
    if summary["fused"]:
        layers, blocks = sum(map(len, summary["fused"])), len(summary["fused"])
        over += f"; {summary['arena_unfused']['bytes'] / 1e3:.1f} kB without fusing {layers} layers in {blocks} block{'s' * (blocks > 1)}"
    sizes = f"constants {summary['constant_bytes'] / 1e3:.1f} kB   arena {arena / 1e3:.1f} kB ({over})   {out}"
    if missing:
        return (f"c      written, not built here: {missing.message} ({missing.hint})", f"       {sizes}")
    n = summary["verified_images"]
    return (
        f"c      exact on {n}/{n} images, {summary['tensors']} tensors each, in {summary['verified_in']}",
        f"       {sizes}",
        f"       make check in it replays {summary['golden_images']} golden images; CC=... for another compiler",
    )
