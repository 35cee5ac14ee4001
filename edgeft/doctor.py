"""What this machine offers to edgeft: versions, devices, CPU flags, compilers, runtimes and missing extras."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from edgeft.artifact import installed_versions

REQUIRED = (
    "accelerate", "brevitas", "matplotlib", "numpy", "onnx", "onnxruntime", "pillow", "pydantic", "rich", "safetensors", "timm",
    "torch", "torchvision", "typer",
)  # fmt: skip
"""The dependencies of edgeft; a test compares them with pyproject.toml."""
EXTRAS = {
    "gpu": ("onnxruntime-gpu",),
    "trt": ("tensorrt",),
    "trt-check": ("tensorrt-rtx",),
    "openvino": ("openvino",),
    "sweep": ("optuna",),
    "flyp": ("open_clip_torch",),
    "dev": (
        "build",
        "hypothesis",
        "mypy",
        "open_clip_torch",
        "openvino",
        "optuna",
        "pytest",
        "pytest-cov",
        "ruff",
        "scikit-learn",
        "setuptools",
        "tensorrt-rtx",
    ),
}
CPU_FLAGS = {
    "avx2": ("avx2",),
    "avx512_vnni": ("avx512_vnni", "avx512vnni"),
    "avx_vnni": ("avx_vnni",),
    "amx_int8": ("amx_int8",),
    "neon_dotprod": ("asimddp",),
    "neon_i8mm": ("i8mm",),
}
"""Flags that decide how fast and by which instructions 8-bit products are summed, with their names in /proc/cpuinfo."""
COMPILERS = ("cc", "gcc", "clang", "arm-none-eabi-gcc", "aarch64-linux-gnu-gcc")
EMULATORS = ("qemu-arm", "qemu-aarch64", "qemu-system-arm")
TENSORRT_FLAVOURS = ("tensorrt", "tensorrt-rtx")
PROBE_TIMEOUT_S = 10


def examine() -> dict[str, Any]:
    """Everything as plain JSON values; `problems` lists what keeps edgeft from working."""
    missing = [name for name in REQUIRED if _version(name) is None]
    return {
        "versions": installed_versions(),
        "platform": platform.platform(),
        "cpu": {"machine": platform.machine(), "cores": os.cpu_count(), "flags": cpu_flags(_cpuinfo())},
        "devices": _devices(),
        "onnxruntime_providers": _providers(),
        "compilers": {name: _first_line(name) for name in COMPILERS if shutil.which(name)},
        "emulators": {name: _first_line(name) for name in EMULATORS if shutil.which(name)},
        "tensorrt": {name: version for name in TENSORRT_FLAVOURS if (version := _version(name))},
        "missing_extras": missing_extras(),
        "problems": [f"the required package '{name}' is not installed" for name in missing],
    }


def cpu_flags(cpuinfo: str) -> dict[str, bool] | None:
    """Which of CPU_FLAGS the text of /proc/cpuinfo names; None where there is no such text."""
    words = set(cpuinfo.split())
    return {name: not words.isdisjoint(spellings) for name, spellings in CPU_FLAGS.items()} if words else None


def missing_extras() -> dict[str, str]:
    """Extras with a package that is not installed, and the command that installs them."""
    return {
        extra: f"pip install 'edgeft[{extra}]'" for extra, packages in EXTRAS.items() if any(_version(name) is None for name in packages)
    }


def render(found: dict[str, Any]) -> str:
    """The findings as text."""
    cpu = found["cpu"]
    flags = "flags not known here" if cpu["flags"] is None else _present(cpu["flags"])
    rows = [
        ("platform", found["platform"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())),
        ("cpu", f"{cpu['machine']}, {cpu['cores']} cores, {flags}"),
        ("devices", ", ".join(found["devices"])),
        ("onnxruntime", ", ".join(found["onnxruntime_providers"]) or "not installed"),
        *((name, text) for name, text in found["compilers"].items()),
        *((name, text) for name, text in found["emulators"].items()),
        ("tensorrt", ", ".join(f"{name} {version}" for name, version in found["tensorrt"].items()) or "not installed"),
        *((f"extra '{extra}'", f"not complete: {command}") for extra, command in found["missing_extras"].items()),
        *(("problem", problem) for problem in found["problems"]),
    ]
    if not found["compilers"]:
        rows.append(("compilers", f"none of {', '.join(COMPILERS)}"))
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:{width}}  {value}" for key, value in rows)


def _present(flags: dict[str, bool]) -> str:
    return " ".join(f"{name}: {'yes' if has else 'no'}" for name, has in flags.items())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.is_file() else ""


def _devices() -> list[str]:
    if _version("torch") is None:
        return []
    import torch

    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices.append(f"cuda:{index} {torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return devices


def _providers() -> list[str]:
    if _version("onnxruntime") is None and _version("onnxruntime-gpu") is None:
        return []
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _first_line(program: str) -> str:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"cannot be run: {error}"
    return next(iter((done.stdout or done.stderr).splitlines()), "says nothing about its version")
