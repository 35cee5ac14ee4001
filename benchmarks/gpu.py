"""Suite gpu-check: whether a GPU gives the same integers and a killed run comes back, and what its training steps cost."""

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_exact, gpu_kernels, gpu_runs, gpu_steps
from benchmarks.record import Machine, write
from edgeft.artifact import atomic_write, json_bytes
from edgeft.errors import ConfigError
from edgeft.progress import Progress

SUITE = "gpu-check"
TITLE = "Exactness and training speed on a GPU"
COLUMNS = ("check", "net", "setting", "result")
PARTS = ("runs", "exact", "kernels", "steps")


@dataclass(frozen=True)
class GpuMachine(Machine):
    """A machine that is known by its GPU."""

    gpu: str = ""
    memory_bytes: int = 0
    cuda: str = ""
    cudnn: str = ""
    driver: str = ""

    @classmethod
    def look_at_gpu(cls, device: torch.device) -> "GpuMachine":
        """This machine and its GPU."""
        base = asdict(Machine.look(torch.get_num_threads()))
        if device.type != "cuda":
            return cls(**base, gpu="no GPU")
        found = torch.cuda.get_device_properties(device)
        driver = Path("/proc/driver/nvidia/version")
        version = re.search(r"Kernel Module\D*([\d.]+)", driver.read_text(encoding="utf-8")) if driver.is_file() else None
        return cls(
            **base, gpu=found.name, memory_bytes=found.total_memory, cuda=str(torch.version.cuda),
            cudnn=str(torch.backends.cudnn.version()), driver=version[1] if version else "unknown",
        )  # fmt: skip

    @property
    def text(self) -> str:
        """As tables show it."""
        return f"{self.gpu}, {self.memory_bytes / 2**30:.0f} GiB, CUDA {self.cuda}, cuDNN {self.cudnn}; {self.cpu}, {self.n_cores} cores"

    @property
    def slug(self) -> str:
        """As file names show it."""
        return re.sub(r"[^a-z0-9]+", "-", self.gpu.lower().removeprefix("nvidia")).strip("-")


@dataclass(frozen=True)
class Settings:
    """Where to measure and how much; `sets` are --set arguments of the runs."""

    device: torch.device
    n_rounds: int
    n_steps: int
    sets: tuple[str, ...]
    progress: Progress


def measure(part: str, settings: Settings) -> Any:
    """A JSON-able record of one part."""
    device, progress = settings.device, settings.progress
    if part == "steps":
        rounds = {"n_rounds": settings.n_rounds, "n_steps": settings.n_steps}
        return [gpu_steps.measure(case, device, **rounds, progress=progress) for case in gpu_steps.CASES]
    if part == "kernels":
        return [gpu_kernels.measure(name, device, n_rounds=settings.n_rounds, progress=progress) for name in gpu_kernels.TENSORS]
    if part == "exact":
        return [gpu_exact.measure(gpu_exact.random_subject(case, n), device, progress) for case, n in gpu_exact.RANDOM_NETS]
    with tempfile.TemporaryDirectory() as folder:
        return _measure_runs(Path(folder), settings)


def _measure_runs(folder: Path, settings: Settings) -> dict[str, Any]:
    device, sets, progress = settings.device.type, settings.sets, settings.progress
    runs = [gpu_runs.train(folder / precision, device, precision, sets, progress) for precision in gpu_runs.PRECISIONS]
    first = folder / gpu_runs.PRECISIONS[0]
    return {
        "runs": runs,
        "exact": gpu_exact.measure(gpu_exact.run_subject(first), settings.device, progress),
        "export": gpu_runs.export(first, progress),
        "killed": gpu_runs.killed_and_resumed(folder / "killed", device, first, sets, progress),
    }


def write_result(out: Path, records: dict[str, Any], device: torch.device) -> Path:
    """The table of all parts."""
    exact, steps = [records["runs"]["exact"], *records["exact"]], records["steps"]
    rows = [*gpu_runs.rows_of(records["runs"]), *(row for r in exact for row in gpu_exact.rows_of(r)),
            *(row for r in records["kernels"] for row in gpu_kernels.rows_of(r)),
            *(row for r in steps for row in gpu_steps.rows_of(r))]  # fmt: skip
    return write(
        out, GpuMachine.look_at_gpu(device), suite=SUITE, title=TITLE, columns=COLUMNS, rows=rows, notes=notes_of(records),
        options={"rounds": steps[0]["rounds"], "steps": steps[0]["steps"], "warm_up_steps": gpu_steps.WARM_UP_STEPS},
        n={"runs": len(records["runs"]["runs"]), "rounds": steps[0]["rounds"]}, measurements=records,
    )  # fmt: skip


def notes_of(records: dict[str, Any]) -> list[str]:
    """The conditions of the table."""
    exact, step = [records["runs"]["exact"], *records["exact"]], records["steps"][0]
    shifts = ", ".join(f"{record['net']}: {record['float_shift']:.1e}" for record in exact)
    return [
        "Runs: the command as typed with default settings, seed 0; wall time from start to exit, drawing the images on the CPU included; "
        "accuracies of the float and the fixed-point model, one run each. Every run itself compares all codes on 256 test images.",
        "Differing codes: the training graph on the GPU in eval mode against the NumPy interpreter, all tensors from image to logits.",
        f"Allowing TF32 changes the largest float logit by this share, so TF32 was in use: {shifts}. 8-bit codes and their products are "
        "exact in it.",
        f"Rounding: {gpu_kernels.N_CALLS} calls a round, forward and backward with what autograd adds, float32, channels-last; medians "
        "over rounds. Values and gradients of the Triton kernels were first compared with those of the elementwise operations: equal.",
        "Training steps: forward, backward and SGD update with frozen batch norm on one batch that stays on the GPU; "
        f"{step['rounds']} interleaved rounds of {step['steps']} steps after {gpu_steps.WARM_UP_STEPS} untimed ones, medians over rounds; "
        "cuDNN as in training (repeatable algorithms, TF32 in convolutions). Memory is the peak of what one variant allocates.",
    ]


def run(parts: Sequence[str], out: Path, records: Path | None, settings: Settings) -> Path | None:
    """Measure the named parts (none: all); write the result file once every part has been measured, otherwise return None.

    `records` is a folder that keeps each part's measurements, so that parts can be measured one at a time. Raises ConfigError for an
    unknown part and where there is no such device.
    """
    for part in parts:
        if part not in PARTS:
            raise ConfigError(f"unknown part '{part}'", f"known: {', '.join(PARTS)}")
    if settings.device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' is not available on this machine", "--device cpu tries the suite out; its numbers mean nothing")
    with tempfile.TemporaryDirectory() as scratch:
        folder = records or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for part in parts or PARTS:
            settings.progress.line(f"{SUITE}: {part}")
            atomic_write(folder / f"{part}.json", json_bytes(measure(part, settings)))
        if not all((folder / f"{part}.json").is_file() for part in PARTS):
            return None
        found = {part: json.loads((folder / f"{part}.json").read_text(encoding="utf-8")) for part in PARTS}
    return write_result(out, found, settings.device)
