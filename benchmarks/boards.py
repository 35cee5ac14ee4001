"""Cortex-M boards that QEMU plays: C bundles built for a bare core, and run with their instructions counted.

How they are counted: with `-icount shift=6` 64 ns of QEMU's time pass for every instruction, whichever it is, and the boards have a counter
register at a fixed frequency of that time: 1.6 ticks for each instruction at 25 MHz, exact to one instruction. These are instructions, not
cycles: QEMU knows no pipeline, wait states or caches. Every program first counts a loop whose number of instructions is known, and
nothing is taken from a run where that is not found.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeft.errors import ConfigError, MissingExtraError, UnsupportedError, VerificationError
from edgeft.export.c_runner import DESCRIPTION

FILES = Path(__file__).parents[1] / "tests" / "cortex_m"
"""Vectors, linker scripts, and the program that measures."""
PROGRAMS = {
    "arm-none-eabi-gcc": "gcc-arm-none-eabi libnewlib-arm-none-eabi", "make": "make", "qemu-system-arm": "qemu-system-arm",
}  # fmt: skip
"""Programs and Debian's packages that bring them."""
ICOUNT_SHIFT = 6
LOOP, LOOP_SLACK = 2_000_000, 20
"""Instructions of the loop in measure.c, and those around it that are counted with it."""
WRAPPER = """
int __real_edgeft_{name}(int a, int b, int c, int d, int e, int f, int g);
int __wrap_edgeft_{name}(int a, int b, int c, int d, int e, int f, int g);
int __wrap_edgeft_{name}(int a, int b, int c, int d, int e, int f, int g)
{{
    const uint32_t outer = inside, start = count_now();
    inside = 0;
    const int status = __real_edgeft_{name}(a, b, c, d, e, f, g);
    const uint32_t spent = count_now() - start;
    count_own[{index}] += spent - inside;
    inside = outer + spent;
    return status;
}}
"""
"""Put around each kernel by the linker. All arguments are words, and those that a kernel does not have are not read."""
_SECONDS = 600


@dataclass(frozen=True)
class Board:
    """A core, the machine of QEMU that has it, its linker script, and the address and frequency in MHz of its counter."""

    cpu: str
    machine: str
    script: str
    counter: int
    counter_mhz: int

    @property
    def flags(self) -> tuple[str, ...]:
        """What makes the compiler write for this core."""
        return (f"-mcpu={self.cpu}", "-mthumb")


BOARDS = {
    board.cpu: board
    for board in (
        Board("cortex-m4", "mps2-an386", "mps2.ld", 0x4002_8018, 25),
        Board("cortex-m7", "mps2-an500", "mps2.ld", 0x4002_8018, 25),
        Board("cortex-m55", "mps3-an547", "mps3.ld", 0x4930_2018, 20),
    )
}


@dataclass(frozen=True)
class Count:
    """One run: instructions in all and by kernel (without those it calls), bytes of stack, of code and of constants, codes compared."""

    instructions: int
    by_kernel: dict[str, int]
    stack_bytes: int
    code_bytes: int
    constant_bytes: int
    codes: int


def need_programs() -> None:
    """Raises MissingExtraError naming the packages of what is not installed."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        packages = " ".join(PROGRAMS[name] for name in missing)
        raise MissingExtraError(f"there is no {', '.join(missing)} here", f"apt-get install {packages}")


def boards_of(cores: Sequence[str]) -> list[Board]:
    """The boards with these cores. Raises ConfigError naming those that there are."""
    unknown = [core for core in cores if core not in BOARDS]
    if unknown:
        raise ConfigError(f"no board has the core '{unknown[0]}'", f"known: {', '.join(BOARDS)}")
    return [BOARDS[core] for core in cores]


def toolchain() -> str:
    """Compiler and emulator with their versions."""
    firsts = [_call([name, "--version"], FILES).splitlines()[0] for name in ("arm-none-eabi-gcc", "qemu-system-arm")]
    versions = [found[1] if (found := re.search(r"(?<![\w.])(\d+\.\d+\.\d+)", line)) else line for line in firsts]
    return f"arm-none-eabi-gcc {versions[0]}, QEMU {versions[1]}"


def build(folder: Path, board: Board, flags: Sequence[str]) -> None:
    """Compile a bundle's library for a board with its own Makefile. Raises UnsupportedError when that fails."""
    tools = ("CC=arm-none-eabi-gcc", "AR=arm-none-eabi-ar", f"CFLAGS={' '.join((*flags, *board.flags))}")
    _call(["make", "clean"], folder)
    _call(["make", *tools, "libmodel.a"], folder)


def link(folder: Path, board: Board, sources: Sequence[Path], program: str, more: Sequence[str] = ()) -> None:
    """Link sources, vectors and library with newlib, whose console is the emulator's. Raises UnsupportedError when that fails."""
    command = ["arm-none-eabi-gcc", "-O2", *board.flags, f"-I{folder}", f"-I{FILES}", *more, *map(str, sources), str(FILES / "startup.c")]
    _call([*command, "libmodel.a", "--specs=rdimon.specs", "-T", str(FILES / board.script), "-o", program], folder)


def run(folder: Path, board: Board, program: str, *, counted: bool = False) -> str:
    """What a program prints on a board. Raises VerificationError when it ends with another status than 0, or does not end."""
    command = ["qemu-system-arm", "-M", board.machine, "-nographic", "-semihosting", "-monitor", "none", "-serial", "none"]
    command += ["-icount", f"shift={ICOUNT_SHIFT},sleep=off"] if counted else []
    try:
        done = subprocess.run([*command, "-kernel", program], cwd=folder, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise VerificationError(f"'{program}' did not end on {board.machine} within {_SECONDS} s") from error
    if done.returncode != 0:
        raise VerificationError(f"'{program}' ended with status {done.returncode} on {board.machine}:\n{done.stdout}{done.stderr}")
    return done.stdout


def replay(folder: Path, board: Board, flags: Sequence[str]) -> str:
    """Build a bundle and replay its golden images on a board; what its main.c prints."""
    build(folder, board, flags)
    link(folder, board, [folder / "main.c"], "replay")
    return run(folder, board, "replay")


def count(folder: Path, board: Board, flags: Sequence[str]) -> Count:
    """Build a bundle, compare its golden images, then count one run.

    Raises VerificationError where a code differs, or where the known loop is not counted as what it is.
    """
    build(folder, board, flags)
    sources = json.loads((folder / DESCRIPTION).read_text())["sources"]
    names = [Path(each).stem for each in sources if each.startswith("kernels/")]
    wrapped = folder / "counted.c"
    shown = ", ".join(f'"{name}"' for name in names)
    head = f'#include "count.h"\n\nconst char *const count_names[KERNELS] = {{{shown}}};\nstatic uint32_t inside;\n'
    wrapped.write_text(head + "".join(WRAPPER.format(name=name, index=index) for index, name in enumerate(names)))
    more = [f"-DCOUNTER={board.counter}u", f"-DKERNELS={len(names)}", *(f"-Wl,--wrap=edgeft_{name}" for name in names)]
    link(folder, board, [FILES / "measure.c", wrapped], "measure", more)
    return _read(run(folder, board, "measure", counted=True), board, folder)


def _read(text: str, board: Board, folder: Path) -> Count:
    found = {key: int(value) for key, value in re.findall(r"^(differing|loop|run|stack) (\d+)", text, re.MULTILINE)}
    codes = re.search(r"^differing \d+ of (\d+)$", text, re.MULTILINE)
    if codes is None or len(found) != len(("differing", "loop", "run", "stack")):
        raise VerificationError(f"the program printed something else on {board.machine}:\n{text}")
    if found["differing"]:
        raise VerificationError(f"{found['differing']} of {codes[1]} codes differ on {board.cpu}")

    def instructions(ticks: int) -> int:
        return round(ticks * 1000 / (board.counter_mhz << ICOUNT_SHIFT))

    if not 0 <= instructions(found["loop"]) - LOOP <= LOOP_SLACK:
        raise VerificationError(f"a loop of {LOOP} instructions was counted as {instructions(found['loop'])} on {board.machine}")
    kernels = {name: instructions(int(ticks)) for name, ticks in re.findall(r"^kernel (\w+) (\d+)$", text, re.MULTILINE)}
    sizes = _sizes(folder)
    constants = sizes.pop("weights.o")
    return Count(instructions(found["run"]), kernels, found["stack"], sum(sizes.values()), constants, int(codes[1]))


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of code and constants of each object of the library. Raises VerificationError where one has data that changes."""
    sizes = {}
    for line in _call(["arm-none-eabi-size", "libmodel.a"], folder).splitlines()[1:]:
        text, data, bss, _, _, name, *_ = line.split()
        if int(data) or int(bss):
            raise VerificationError(f"'{name}' of the library keeps {data} + {bss} bytes that change")
        sizes[name] = int(text)
    return sizes


def _call(command: Sequence[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UnsupportedError(f"'{' '.join(command)}' failed:\n{done.stderr}")
    return done.stdout
