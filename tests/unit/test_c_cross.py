"""Target c on devices without the devices: the bundle cross-compiled, its replay run by QEMU.

Debian: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm
"""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeft.graph import IntegerGraph
from tests.c_bundles import need, run, write
from tests.exports import every_op, wide_net
from tests.graphs import mobilenet_v2, residual_net

pytestmark = [pytest.mark.cc, pytest.mark.slow]

BOARD = Path(__file__).parent.parent / "cortex_m"
CPUS = {"cortex-m4": "mps2-an386", "cortex-m7": "mps2-an500"}
"""Cores, and the board that QEMU has with it."""


def small_mobilenet(seed: int, **_: object) -> IntegerGraph:
    """A network of realistic depth."""
    return mobilenet_v2(seed, 64, 10)


NETS: list[Callable[..., IntegerGraph]] = [every_op, wide_net, residual_net]


@pytest.mark.parametrize("make", [*NETS, small_mobilenet])
@pytest.mark.parametrize("image_format", ["u8.8", "s8.7"])
def test_aarch64_gives_the_same_codes(make: Callable[..., IntegerGraph], image_format: str, tmp_path: Path) -> None:
    need("make", "aarch64-linux-gnu-gcc", "qemu-aarch64")
    write(make(0, image_format=image_format), tmp_path)
    run("make", "CC=aarch64-linux-gnu-gcc", "LDFLAGS=-static", cwd=tmp_path)
    assert " 0 of " in run("qemu-aarch64", "./replay", cwd=tmp_path)


@pytest.mark.parametrize("make", [every_op, small_mobilenet])
@pytest.mark.parametrize("extension", ["dotprod", "i8mm"])
def test_aarch64_with_dot_products_gives_the_same_codes(make: Callable[..., IntegerGraph], extension: str, tmp_path: Path) -> None:
    need("make", "aarch64-linux-gnu-gcc", "qemu-aarch64")
    write(make(0, image_format="s8.7"), tmp_path)
    run("make", "CC=aarch64-linux-gnu-gcc", f"CFLAGS=-O3 -march=armv8.2-a+{extension}", "LDFLAGS=-static", cwd=tmp_path)
    assert " 0 of " in run("qemu-aarch64", "-cpu", "max", "./replay", cwd=tmp_path)


@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("cpu", [*CPUS])
def test_cortex_m_gives_the_same_codes(make: Callable[..., IntegerGraph], cpu: str, tmp_path: Path) -> None:
    found = replay_on(cpu, write(make(0, profile="s8", image_format="s8.7"), tmp_path))
    assert found == "4 images, 0 of 20 codes differ\n"


def replay_on(cpu: str, folder: Path) -> str:
    """Build a bundle with its Makefile for a bare core, link it with newlib's semihosting, run it on QEMU's board."""
    need("make", "arm-none-eabi-gcc", "qemu-system-arm")
    flags = f"-O2 -mcpu={cpu} -mthumb"
    tools = ("CC=arm-none-eabi-gcc", "AR=arm-none-eabi-ar", f"CFLAGS={flags}")
    run("arm-none-eabi-gcc", *flags.split(), "-c", BOARD / "startup.c", "-o", folder / "startup.o", cwd=folder)
    run("make", *tools, f"LDFLAGS=--specs=rdimon.specs -T {BOARD / 'mps2.ld'} startup.o", cwd=folder)
    board = ("-M", CPUS[cpu], "-nographic", "-semihosting", "-monitor", "none", "-serial", "none")
    done = subprocess.run(
        ["qemu-system-arm", *board, "-kernel", "replay"], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_small_net_is_small(tmp_path: Path) -> None:
    """The library of a small net is some kB of code and constants, and keeps nothing in memory that changes."""
    replay_on("cortex-m4", write(residual_net(0), tmp_path))
    sizes = run("arm-none-eabi-size", "libmodel.a", cwd=tmp_path)
    text, data = (sum(int(row.split()[column]) for row in sizes.splitlines()[1:]) for column in (0, 1))
    assert text < 20_000
    assert data == 0
