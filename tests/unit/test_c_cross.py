"""Target c on devices without the devices: the bundle cross-compiled, its replay run by QEMU.

Debian: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.boards import BOARDS, PROGRAMS, count, replay
from edgeft.errors import VerificationError
from edgeft.export.c_bundle import write_bundle
from edgeft.graph import IntegerGraph
from tests.c_bundles import need, run, write
from tests.exports import every_op, wide_net
from tests.graphs import mobilenet_v1, mobilenet_v2, random_images, residual_net

pytestmark = [pytest.mark.cc, pytest.mark.slow]

KERNELS = {"dsp": (), "portable": ("-DEDGEFT_PORTABLE",)}
"""What a core with the DSP extension may run, as flags."""


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


@pytest.mark.parametrize("make", [*NETS, small_mobilenet])
@pytest.mark.parametrize("kernels", [*KERNELS])
@pytest.mark.parametrize("cpu", [*BOARDS])
def test_cortex_m_gives_the_same_codes(make: Callable[..., IntegerGraph], kernels: str, cpu: str, tmp_path: Path) -> None:
    need(*PROGRAMS)
    folder = write(make(0, profile="s8", image_format="s8.7"), tmp_path)
    assert re.fullmatch(r"\d+ images, 0 of \d+ codes differ\n", replay(folder, BOARDS[cpu], ("-O2", *KERNELS[kernels])))


@pytest.mark.parametrize("optimization", ["-O0", "-Os", "-O3"])
@pytest.mark.parametrize("cpu", [*BOARDS])
def test_mobilenet_v1_on_cortex_m(optimization: str, cpu: str, tmp_path: Path) -> None:
    """A quarter of the width at 128 pixels, what such a core is used for."""
    need(*PROGRAMS)
    folder = write(mobilenet_v1(0, 128, 10), tmp_path)
    assert replay(folder, BOARDS[cpu], (optimization,)) == "4 images, 0 of 40 codes differ\n"


@pytest.mark.parametrize("cpu", [*BOARDS])
def test_instructions_are_counted_and_dsp_kernels_take_fewer(cpu: str, tmp_path: Path) -> None:
    need(*PROGRAMS)
    graph = mobilenet_v1(0, 32, 10)
    folder = write(graph, tmp_path / "fast")
    dsp, again, portable = (count(folder, BOARDS[cpu], ("-O3", *KERNELS[kernels])) for kernels in ("dsp", "dsp", "portable"))
    write_bundle(graph, random_images(graph, 4), tmp_path / "simple", fast=False)
    simple = count(tmp_path / "simple", BOARDS[cpu], ("-O3",))
    assert dsp == again
    assert 0.98 < sum(dsp.by_kernel.values()) / dsp.instructions < 1
    assert 2 * dsp.instructions < min(portable.instructions, simple.instructions)
    assert 100 < dsp.stack_bytes < 8000


def test_a_code_that_differs_is_not_counted(tmp_path: Path) -> None:
    need(*PROGRAMS)
    folder = write(residual_net(0), tmp_path)
    weights = folder / "weights.c"
    weights.write_text(re.sub(r"(_bias\[\d+\] = \{\n +-?)", r"\g<1>1000", weights.read_text()))
    with pytest.raises(VerificationError, match="codes differ on cortex-m4"):
        count(folder, BOARDS["cortex-m4"], ("-O3",))


def test_a_small_net_is_small(tmp_path: Path) -> None:
    """The library of a small net is some kB of code and constants, and keeps nothing in memory that changes."""
    need(*PROGRAMS)
    found = count(write(residual_net(0), tmp_path), BOARDS["cortex-m4"], ("-O2",))
    assert found.code_bytes + found.constant_bytes < 24_000
